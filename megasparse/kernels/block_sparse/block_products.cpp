// Products of a linear layer whose weight is zero outside of active blocks, for CPUs. cpu.py calls them; their meaning is
// that of reference.py. Weights are stored dense or packed; `Places` says where a block lies, nothing else knows of it.
//
// Operands are packed into cells of 32 bits: a float32, or a pair of bfloat16 that are neighbours along the summed
// dimension. A tile of Rows x (Vectors * lanes) sums stays in registers while the summed dimension runs: in each step a
// row's cell is broadcast and multiplied with the vectors of B. AVX-512-BF16 multiplies and adds pairs in one
// instruction, AMX whole tiles of them; elsewhere bfloat16 is widened to float32 (exactly) while it is packed.
//
// Every output is summed by one thread in a fixed order: results do not depend on the number of threads.

#include "element_types.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t kPadding = 16;           // cells between packed rows, so that they do not fall on one cache set
constexpr int64_t kTileCells = 48 * 1024;  // packed inputs of a tile of tokens: most of a second-level cache
constexpr int64_t kMaxBlock = 128;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// sums[row][v] += A[row] * B[v] over `steps` cells. A: cell (row, k) at a[row * a_row + k * a_step].
template <class Type, int Rows, int Vectors>
inline __attribute__((always_inline)) void accumulate(Vector (&sums)[Rows][Vectors], const uint32_t* a, int64_t a_row,
                                                      int64_t a_step, const uint32_t* b, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += Vectors * kLanes) {
    typename Type::Right right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = Type::right(b + v * kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < Rows; ++row) {
      const auto left = Type::left(a[row * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[row][v] = Type::multiply_add(sums[row][v], left, right[v]);
    }
  }
}

// Calls function(std::integral_constant<int, rows>) for a number of rows known only now, 1 to kMaxRows.
template <class Function, int... Numbers>
inline void with_rows(int rows, Function&& function, std::integer_sequence<int, Numbers...>) {
  (void)((rows == Numbers + 1 && (function(std::integral_constant<int, Numbers + 1>{}), true)) || ...);
}

template <class Function>
inline void with_rows(int64_t rows, Function&& function) {
  with_rows(int(rows), function, std::make_integer_sequence<int, kMaxRows>{});
}

// The blocks of one direction: group g (a block row, or a block column) holds indices[offsets[g] .. offsets[g + 1]).
struct Groups {
  int64_t count, block;
  const int32_t *offsets, *indices;

  int64_t size(int64_t group) const { return offsets[group + 1] - offsets[group]; }
  int64_t total() const { return offsets[count]; }
  int64_t largest() const {
    int64_t most = 1;
    for (int64_t group = 0; group < count; ++group) most = std::max(most, size(group));
    return most;
  }
};

// Where the weight holds active block j of a group, as a number of elements: at(group, j), in rows that are `ld` apart.
// See storage.py: a place is the block's index within its group (dense) or its slot (packed).
struct Places {
  const int32_t* places;
  int64_t group_step, place_step, ld;

  int64_t at(int64_t group, int64_t j) const { return group * group_step + places[j] * place_step; }
};

// C = A W^T (transposed) or A W, plus bias, over the active blocks of each group of outputs.
template <class Type, int Vectors>
struct Product {
  using Element = typename Type::Element;
  static constexpr int64_t kWidth = Vectors * Type::kSide, kPerCell = Type::kPerCell, kStep = Type::kStep;
  const Element *a, *weight, *bias;
  Places places;  // of the weight
  int64_t lda, ldc, tokens;
  bool transposed;
  Element* c;
  Groups groups;
  uint32_t *packed_weights, *tiles;

  int64_t cells() const { return groups.block / kPerCell; }
  // Summed cells of a group, with those that pad them.
  int64_t steps(int64_t group) const { return round_up(groups.size(group) * cells(), kStep); }
  uint32_t* weights_of(int64_t group) const {
    return packed_weights + (groups.offsets[group] * cells() + group * (kStep - 1)) * groups.block;
  }

  static int64_t weight_cells(const Groups& groups) {
    return (groups.total() * groups.block / kPerCell + groups.count * (kStep - 1)) * groups.block;
  }
  static int64_t row_cells(const Groups& groups) {
    return round_up(groups.largest() * groups.block / kPerCell, kStep) + kPadding;
  }
  static int64_t tile_tokens(const Groups& groups) {
    return std::clamp<int64_t>(kTileCells / row_cells(groups) / Type::kRows, 1, 384 / Type::kRows) * Type::kRows;
  }
  static int64_t tile_cells(const Groups& groups) { return tile_tokens(groups) * row_cells(groups); }

  // Weights of a group as strips of kWidth outputs: [strip][cell of the summed dimension][output].
  void pack_weights(int64_t group) const {
    const int64_t cells = this->cells(), ld = places.ld;
    const int64_t padding = (steps(group) - groups.size(group) * cells) * kWidth;
    uint32_t* __restrict out = weights_of(group);
    for (int64_t strip = 0; strip < groups.block; strip += kWidth, out = std::fill_n(out, padding, 0u))
      for (int64_t j = groups.offsets[group]; j < groups.offsets[group + 1]; ++j, out += cells * kWidth) {
        const Element* from = weight + places.at(group, j) + strip * (transposed ? ld : 1);
        if (transposed) {
          for (int64_t output = 0; output < kWidth; ++output)
            for (int64_t k = 0; k < cells; ++k) out[k * kWidth + output] = Type::cell(from + output * ld + k * kPerCell, 1);
        } else {
          for (int64_t k = 0; k < cells; ++k)
            for (int64_t output = 0; output < kWidth; ++output)
              out[k * kWidth + output] = Type::cell(from + output + k * kPerCell * ld, ld);
        }
      }
  }

  // The group's blocks of a tile of A, side by side.
  void pack_tile(int64_t group, int64_t token, int64_t count, int64_t ld_tile, uint32_t* tile) const {
    const int64_t width = cells(), ahead = 4 * lda, padding = steps(group) - groups.size(group) * width;
    for (int64_t row = 0; row < count; ++row) {
      const Element* from = a + (token + row) * lda;
      uint32_t* __restrict out = tile + row * ld_tile;
      for (int64_t j = groups.offsets[group]; j < groups.offsets[group + 1]; ++j, out += width) {
        const Element* block = from + groups.indices[j] * groups.block;
        for (int64_t k = 0; k < width; k += 16) __builtin_prefetch(block + ahead + k * kPerCell);
        if (kPerCell * sizeof(Element) == 4)
          std::memcpy(out, block, width * 4);
        else
          for (int64_t k = 0; k < width; ++k) out[k] = Type::cell(block + k * kPerCell, 1);
      }
      std::fill_n(out, padding, 0u);
    }
  }

  // Rows of A as they lie are tiles where a block is as wide as a step of them, or wider.
  void run_in_place(int64_t group, int64_t token, int64_t count) const {
    if constexpr (Type::kInTiles) {
      alignas(64) float sums[Type::kRows * kWidth];
      for (int64_t top = 0; top < count; top += Type::kRows)
        for (int64_t strip = 0; strip < groups.block; strip += kWidth) {
          const uint32_t* b = weights_of(group) + strip * steps(group);
          TileSums<2, Vectors> tiles;
          for (int64_t j = groups.offsets[group]; j < groups.offsets[group + 1]; ++j, b += cells() * kWidth)
            tiles.add(a + (token + top) * lda + groups.indices[j] * groups.block, lda * sizeof(Element), b, kWidth, cells());
          tiles.store(sums, kWidth);
          round_tiles(sums, token + top, Type::kRows, group * groups.block + strip);
        }
    }
  }

  void run_tile(int64_t group, int64_t token, int64_t count) const {
    if (Type::kInTiles && cells() >= kStep) {
      const int64_t whole = count / Type::kRows * Type::kRows;
      run_in_place(group, token, whole);
      token += whole, count -= whole;
      if (!count) return;
    }
    const int64_t steps = this->steps(group), ld_tile = steps + kPadding;
    uint32_t* tile = tiles + omp_get_thread_num() * tile_cells(groups);
    pack_tile(group, token, count, ld_tile, tile);
    for (int64_t strip = 0; strip < groups.block; strip += kWidth) {
      const uint32_t* b = weights_of(group) + strip * steps;
      const int64_t output = group * groups.block + strip;
      for (int64_t top = 0; top < count && Type::kInTiles; top += Type::kRows)
        multiply_in_tiles(tile + top * ld_tile, ld_tile, b, steps, token + top, std::min(Type::kRows, count - top), output);
      for (int64_t top = 0; top < count && !Type::kInTiles; top += kMaxRows)
        with_rows(std::min<int64_t>(kMaxRows, count - top), [&](auto rows) {
          Vector sums[rows.value][Vectors] = {};
          accumulate<Type, rows.value, Vectors>(sums, tile + top * ld_tile, ld_tile, 1, b, steps);
          for (int row = 0; row < rows.value; ++row)
            for (int v = 0; v < Vectors; ++v) {
              const int64_t at = output + v * kLanes;
              const Vector sum = bias ? sums[row][v] + Type::load(bias + at) : sums[row][v];
              Type::store(c + (token + top + row) * ldc + at, sum);
            }
        });
    }
  }

  // Some rows of a tile in tile registers; those that are read beyond them are nobody's.
  void multiply_in_tiles(const uint32_t* rows, int64_t ld, const uint32_t* b, int64_t steps, int64_t token, int64_t count,
                         int64_t output) const {
    if constexpr (Type::kInTiles) {
      alignas(64) float sums[Type::kRows * kWidth];
      if (count > kTileSide)
        multiply<2>(rows, ld, b, steps, sums);
      else
        multiply<1>(rows, ld, b, steps, sums);
      round_tiles(sums, token, count, output);
    }
  }

  template <int Tall>
  static void multiply(const uint32_t* rows, int64_t ld, const uint32_t* b, int64_t steps, float* sums) {
    TileSums<Tall, Vectors> tiles;
    tiles.add(rows, ld * 4, b, kWidth, steps);
    tiles.store(sums, kWidth);
  }

  void round_tiles(const float* sums, int64_t token, int64_t count, int64_t output) const {
    if constexpr (Type::kInTiles) {
      for (int64_t row = 0; row < count; ++row)
        for (int64_t i = 0; i < kWidth; i += kLanes) {
          const Vector sum = Float32::load(sums + row * kWidth + i);
          Type::store(c + (token + row) * ldc + output + i, bias ? sum + Type::load(bias + output + i) : sum);
        }
    }
  }

  void run(int threads) const {
    const int64_t tile = tile_tokens(groups), num_tiles = (tokens + tile - 1) / tile;
#pragma omp parallel num_threads(threads)
    {
      [[maybe_unused]] const std::conditional_t<Type::kInTiles, TileRegisters, int> registers{};
#pragma omp for schedule(dynamic, 1)
      for (int64_t group = 0; group < groups.count; ++group) pack_weights(group);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < num_tiles * groups.count; ++task) {
        const int64_t token = task / groups.count * tile;
        run_tile(task % groups.count, token, std::min(tile, tokens - token));
      }
    }
  }
};

// dW = dY^T X on active blocks, and the sum of dY over the tokens.
template <class Type, int Vectors>
struct WeightGradient {
  using Element = typename Type::Element;
  static constexpr int64_t kWidth = Vectors * Type::kSide, kPerCell = Type::kPerCell, kStep = Type::kStep;
  static constexpr int64_t kGradientTokens = Type::kGradientTokens, kTileLd = kGradientTokens / kPerCell + kPadding;
  static constexpr bool kInPlace = std::is_same_v<Element, float>;
  const Element *dy, *x;
  Places places;  // of dweight
  int64_t ld_dy, ld_x, tokens, num_columns;
  Groups rows;
  Element *dweight, *dbias;
  uint32_t *packed_dy, *packed_x;
  float *sums, *bias_sums;  // sums: [active block][block][block], where the gradient itself is not float32

  int64_t ld_packed() const { return rows.block + kPadding; }
  int64_t packed_cells() const { return packed_cells(rows.block); }
  static int64_t packed_cells(int64_t block) {
    return Type::kInTiles ? block * kTileLd : (block + kPadding) * kGradientTokens / kPerCell;
  }
  static int64_t cells_of(int64_t count) { return round_up((count + kPerCell - 1) / kPerCell, kStep); }

  // Tokens of a block row of dY: [cell][padded block]; for tiles [output][padded cells].
  void pack_dy(int64_t row, int64_t token, int64_t count, uint32_t* out) const {
    const Element* from = dy + token * ld_dy + row * rows.block;
    if (Type::kInTiles && rows.size(row)) pack_transposed(from, count, out);
    for (int64_t t = 0; t < count && rows.size(row) && !Type::kInTiles; t += kPerCell, out += ld_packed()) {
      pack_row(from + t * ld_dy, ld_dy, t + kPerCell > count, rows.block, out);
      __builtin_prefetch(from + (t + 8) * ld_dy);
    }
    if (!dbias) return;
    float total[kMaxBlock] = {};
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < rows.block; i += kLanes)
        *reinterpret_cast<Vector*>(total + i) += Type::load(from + t * ld_dy + i);
    for (int64_t i = 0; i < rows.block; ++i) bias_sums[row * rows.block + i] += total[i];
  }

  void pack_transposed(const Element* from, int64_t count, uint32_t* __restrict out) const {
    const int64_t num_cells = cells_of(count);
    uint32_t square[kTileSide][kTileSide];
    for (int64_t cell = 0; cell < num_cells; cell += kTileSide)
      for (int64_t i = 0; i < rows.block; i += kTileSide) {
        for (int64_t k = 0; k < kTileSide; ++k) {
          const int64_t t = (cell + k) * kPerCell;
          __builtin_prefetch(from + (t + 2 * kTileSide) * ld_dy + i);
          if (t < count)
            pack_row(from + t * ld_dy + i, ld_dy, t + kPerCell > count, kTileSide, square[k]);
          else
            std::fill_n(square[k], kTileSide, 0u);
        }
        transpose(square[0], kTileSide, out + i * kTileLd + cell, kTileLd);
      }
  }

  // Tokens of a block column of X in strips: [strip][cell][kWidth].
  void pack_x(int64_t column, int64_t token, int64_t count) const {
    const Element* from = x + token * ld_x + column * rows.block;
    uint32_t* out = packed_x + column * packed_cells();
    const int64_t num_cells = cells_of(count);
    for (int64_t t = 0; t < num_cells * kPerCell; t += kPerCell, out += kWidth)
      for (int64_t strip = 0; strip < rows.block; strip += kWidth) {
        if (t >= count) {
          std::fill_n(out + strip * num_cells, kWidth, 0u);
          continue;
        }
        __builtin_prefetch(from + (t + 8) * ld_x + strip);
        pack_row(from + t * ld_x + strip, ld_x, t + kPerCell > count, kWidth, out + strip * num_cells);
      }
  }

  // Cells along the tokens; an odd last token stands alone, paired with zero.
  static void pack_row(const Element* from, int64_t ld, bool alone, int64_t width, uint32_t* __restrict out) {
    if (kPerCell == 2 && alone)
      for (int64_t i = 0; i < width; ++i) out[i] = from[i];
    else
      for (int64_t i = 0; i < width; ++i) out[i] = Type::cell(from + i, ld);
  }

  // Adds a tile of tokens to active block j, which lies in block row `row`.
  void add_block(int64_t j, int64_t row, const uint32_t* dy_strip, int64_t count, bool first, bool last) const {
    const int64_t block = rows.block, column = rows.indices[j], num_cells = cells_of(count);
    const int64_t num_panels = (block + kMaxRows - 1) / kMaxRows;
    Element* target = dweight + places.at(row, j);
    float* kept = kInPlace ? reinterpret_cast<float*>(target) : sums + j * block * block;
    const int64_t ld = kInPlace ? places.ld : block;
    for (int64_t strip = 0; strip < block; strip += kWidth) {
      const uint32_t* b = packed_x + column * packed_cells() + strip * num_cells;
      if (Type::kInTiles) add_in_tiles(dy_strip, b, num_cells, kept + strip, first);
      for (int64_t panel = 0; panel < num_panels && !Type::kInTiles; ++panel) {
        // Panels of nearly equal height: 64 rows = 9 * 6 + 2 * 5.
        const int64_t top = panel * block / num_panels, bottom = (panel + 1) * block / num_panels;
        with_rows(bottom - top, [&](auto height) {
          constexpr int kHeight = height.value;
          Vector part[kHeight][Vectors] = {};
          if (!first)
            for (int r = 0; r < kHeight; ++r)
              for (int v = 0; v < Vectors; ++v) part[r][v] = Float32::load(kept + (top + r) * ld + strip + v * kLanes);
          accumulate<Type, kHeight, Vectors>(part, dy_strip + top, 1, ld_packed(), b, num_cells);
          for (int r = 0; r < kHeight; ++r)
            for (int v = 0; v < Vectors; ++v) {
              const int64_t at = strip + v * kLanes;
              if (last)
                Type::store(target + (top + r) * places.ld + at, part[r][v]);
              else
                Float32::store(kept + (top + r) * ld + at, part[r][v]);
            }
        });
      }
    }
  }

  // A strip of a block, in tile registers.
  void add_in_tiles(const uint32_t* a, const uint32_t* b, int64_t num_cells, float* kept, bool first) const {
    if constexpr (Type::kInTiles) {
      constexpr int kTall = Vectors;  // blocks of 16 have one tile either way
      for (int64_t top = 0; top < rows.block; top += kTall * kTileSide) {
        float* part = kept + top * rows.block;
        if (first) {
          TileSums<kTall, Vectors> tiles;
          tiles.add(a + top * kTileLd, kTileLd * 4, b, kWidth, num_cells);
          tiles.store(part, rows.block);
        } else {
          TileSums<kTall, Vectors> tiles(part, rows.block);
          tiles.add(a + top * kTileLd, kTileLd * 4, b, kWidth, num_cells);
          tiles.store(part, rows.block);
        }
      }
    }
  }

  // The finished sums of an active block, rounded.
  void round_block(int64_t j, int64_t row) const {
    const int64_t block = rows.block;
    for (int64_t i = 0; i < block; ++i)
      for (int64_t at = 0; at < block; at += kLanes)
        Type::store(dweight + places.at(row, j) + i * places.ld + at,
                    Float32::load(sums + (j * block + i) * block + at));
  }

  void run(const int32_t* block_rows, const int32_t* column_offsets, int threads) const {
    // With many block rows each is packed where it is needed, in the thread's own cache; with few, blocks are shared out.
    const bool by_rows = rows.count >= 4 * threads;
#pragma omp parallel num_threads(threads)
    {
      [[maybe_unused]] const std::conditional_t<Type::kInTiles, TileRegisters, int> registers{};
      for (int64_t token = 0; token < tokens; token += kGradientTokens) {
        const int64_t count = std::min(kGradientTokens, tokens - token);
        const bool first = token == 0, last = token + count == tokens;
        const auto add = [&](int64_t j, int64_t row, const uint32_t* dy_strip) {
          add_block(j, row, dy_strip, count, first, last);
          if (Type::kInTiles && last) round_block(j, row);
        };
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = by_rows ? rows.count : 0; task < rows.count + num_columns; ++task) {
          if (task < rows.count)
            pack_dy(task, token, count, packed_dy + task * packed_cells());
          else if (column_offsets[task - rows.count + 1] > column_offsets[task - rows.count])
            pack_x(task - rows.count, token, count);
        }
        if (by_rows) {
          uint32_t* own = packed_dy + omp_get_thread_num() * packed_cells();
#pragma omp for schedule(dynamic, 1)
          for (int64_t row = 0; row < rows.count; ++row) {
            pack_dy(row, token, count, own);
            for (int64_t j = rows.offsets[row]; j < rows.offsets[row + 1]; ++j) add(j, row, own);
          }
        } else {
#pragma omp for schedule(dynamic, 1)
          for (int64_t j = 0; j < rows.total(); ++j) add(j, block_rows[j], packed_dy + block_rows[j] * packed_cells());
        }
      }
    }
    if (dbias)
      for (int64_t i = 0; i < rows.count * rows.block; i += kLanes) Type::store(dbias + i, Float32::load(bias_sums + i));
  }
};

template <class Function>
auto with_type(int is_bfloat16, int64_t block, Function&& function) {
  // Blocks of 16 are as wide as one vector of AVX-512.
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  const bool wide = block >= 2 * kLanes;
  static const bool has_tiles = ask_for_tiles();
  if (is_bfloat16 && has_tiles)
    return block > kTileSide ? function(BFloat16Tiles{}, Two{}) : function(BFloat16Tiles{}, One{});
  if (is_bfloat16) return wide ? function(BFloat16Pairs{}, Two{}) : function(BFloat16Pairs{}, One{});
  return wide ? function(Float32{}, Two{}) : function(Float32{}, One{});
}

}  // namespace

extern "C" {

// Bytes of scratch memory for a product.
int64_t megasparse_product_scratch(int is_bfloat16, int64_t num_groups, const int32_t* offsets, int64_t block,
                                   int threads) {
  return with_type(is_bfloat16, block, [&](auto type, auto vectors) -> int64_t {
    using Kernel = Product<decltype(type), vectors.value>;
    const Groups groups{num_groups, block, offsets, nullptr};
    return 4 * (Kernel::weight_cells(groups) + threads * Kernel::tile_cells(groups));
  });
}

void megasparse_product(int is_bfloat16, const void* a, int64_t lda, int64_t tokens, const void* weight,
                        const int32_t* places, int64_t group_step, int64_t place_step, int64_t ld_weight,
                        int transposed, const void* bias, void* c, int64_t ldc, int64_t num_groups,
                        const int32_t* offsets, const int32_t* indices, int64_t block, void* scratch, int threads) {
  with_type(is_bfloat16, block, [&](auto type, auto vectors) {
    using Kernel = Product<decltype(type), vectors.value>;
    using Element = typename Kernel::Element;
    const Groups groups{num_groups, block, offsets, indices};
    auto* weights = static_cast<uint32_t*>(scratch);
    Kernel{static_cast<const Element*>(a),
           static_cast<const Element*>(weight),
           static_cast<const Element*>(bias),
           Places{places, group_step, place_step, ld_weight},
           lda,
           ldc,
           tokens,
           bool(transposed),
           static_cast<Element*>(c),
           groups,
           weights,
           weights + Kernel::weight_cells(groups)}
        .run(threads);
  });
}

// Bytes of scratch memory for the weight gradient.
int64_t megasparse_gradient_scratch(int is_bfloat16, int64_t num_rows, int64_t num_columns, int64_t num_active,
                                    int64_t block) {
  return with_type(is_bfloat16, block, [&](auto type, auto vectors) -> int64_t {
    const int64_t cells = WeightGradient<decltype(type), vectors.value>::packed_cells(block);
    return 4 * ((num_rows + num_columns) * cells + num_rows * block + (is_bfloat16 ? num_active * block * block : 0));
  });
}

void megasparse_weight_gradient(int is_bfloat16, const void* dy, int64_t ld_dy, const void* x, int64_t ld_x,
                                int64_t tokens, int64_t num_rows, int64_t num_columns, const int32_t* row_offsets,
                                const int32_t* columns, const int32_t* block_rows, const int32_t* column_offsets,
                                int64_t block, void* dweight, const int32_t* places, int64_t group_step,
                                int64_t place_step, int64_t ld_dweight, void* dbias, void* scratch, int threads) {
  with_type(is_bfloat16, block, [&](auto type, auto vectors) {
    using Kernel = WeightGradient<decltype(type), vectors.value>;
    using Element = typename Kernel::Element;
    Kernel gradient{static_cast<const Element*>(dy),
                    static_cast<const Element*>(x),
                    Places{places, group_step, place_step, ld_dweight},
                    ld_dy,
                    ld_x,
                    tokens,
                    num_columns,
                    Groups{num_rows, block, row_offsets, columns},
                    static_cast<Element*>(dweight),
                    static_cast<Element*>(dbias),
                    static_cast<uint32_t*>(scratch),
                    nullptr,
                    nullptr,
                    nullptr};
    gradient.packed_x = gradient.packed_dy + num_rows * gradient.packed_cells();
    gradient.bias_sums = reinterpret_cast<float*>(gradient.packed_x + num_columns * gradient.packed_cells());
    gradient.sums = gradient.bias_sums + num_rows * block;
    std::fill(gradient.bias_sums, gradient.sums, 0.0f);
    gradient.run(block_rows, column_offsets, threads);
  });
}
}
