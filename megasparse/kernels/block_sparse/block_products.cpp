// Products of a linear layer whose weight is zero outside of live blocks, for CPUs: see cpu.py for how it is called.
//
// Everything is seen in cells of 32 bits: one float32, or a pair of bfloat16 that are neighbours along the summed
// dimension. A tile of Rows x (Vectors * lanes) sums stays in registers while the summed dimension runs: per step each
// row's cell is broadcast and multiplied with the vectors of B. With AVX-512-BF16 one instruction multiplies and adds a
// pair; elsewhere the two halves are widened to float32 (exactly) and take one fused multiply-add each.
//
// Every output element is summed by one thread in a fixed order: results do not depend on the number of threads.

#include <cstdint>
#include <cstring>
#include <algorithm>
#include <utility>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMaxRows = 12;  // 24 of 32 registers hold sums
#else
constexpr int kLanes = 8, kMaxRows = 6;  // 12 of 16 registers hold sums
#endif
constexpr int64_t kTileBytes = 192 * 1024;  // of x that a tile of tokens keeps in the second-level cache
constexpr int64_t kGradientTokens = 128;    // tokens that are packed at once for the weight gradient

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Cells __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Float32 {
  using Element = float;
  static constexpr int kPerCell = 1;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kPerCell = 2;
  static float load(uint16_t value) { return from_bits(uint32_t(value) << 16); }
  static uint16_t store(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);  // NaN stays NaN
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                    // to nearest, ties to even
  }
};

// sums[row][v] += A[row] * B[v] over `steps` cells. A: cell (row, k) at a[row * a_row + k * a_step].
template <class Type, int Rows, int Vectors>
inline __attribute__((always_inline)) void accumulate(Vector (&sums)[Rows][Vectors], const uint32_t* a, int64_t a_row,
                                                      int64_t a_step, const uint32_t* b, int64_t steps) {
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += Vectors * kLanes) {
    if constexpr (Type::kPerCell == 1) {
      Vector right[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
#pragma GCC unroll 12
      for (int row = 0; row < Rows; ++row) {
        const float left = from_bits(a[row * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[row][v] += left * right[v];
      }
    } else {
#if defined(__AVX512BF16__)
      __m512bh right[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 12
      for (int row = 0; row < Rows; ++row) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(int(a[row * a_row]));
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
          sums[row][v] = (Vector)_mm512_dpbf16_ps((__m512)sums[row][v], left, right[v]);
      }
#else
      Vector even[Vectors], odd[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const Cells pair = *reinterpret_cast<const Cells*>(b + v * kLanes);
        even[v] = (Vector)(pair << 16);
        odd[v] = (Vector)(pair & 0xffff0000u);
      }
#pragma GCC unroll 12
      for (int row = 0; row < Rows; ++row) {
        const Cells pair = Cells{} + a[row * a_row];
        const Vector first = (Vector)(pair << 16), second = (Vector)(pair & 0xffff0000u);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          sums[row][v] += first * even[v];
          sums[row][v] += second * odd[v];
        }
      }
#endif
    }
  }
}

// Calls function(std::integral_constant<int, rows>) for a number of rows known only now, 1 to kMaxRows.
template <class Function, int... Numbers>
inline void with_rows(int rows, Function&& function, std::integer_sequence<int, Numbers...>) {
  (void)((rows == Numbers + 1 && (function(std::integral_constant<int, Numbers + 1>{}), true)) || ...);
}

template <class Function>
inline void with_rows(int rows, Function&& function) {
  with_rows(rows, function, std::make_integer_sequence<int, kMaxRows>{});
}

// The blocks of one direction: group g (a block row, or a block column) holds indices[offsets[g] .. offsets[g + 1]).
struct Groups {
  int64_t count, block;
  const int32_t *offsets, *indices;

  int64_t size(int64_t group) const { return offsets[group + 1] - offsets[group]; }
  int64_t total() const { return offsets[count]; }
};

// Weights of one group as strips of Vectors * kLanes outputs: [strip][cell of the summed dimension][output].
template <class Type, int Vectors>
void pack_weights(const typename Type::Element* weight, int64_t ld, bool transposed, const Groups& groups, int64_t group,
                  uint32_t* packed) {
  constexpr int64_t width = Vectors * kLanes, per_cell = Type::kPerCell;
  const int64_t block = groups.block, cells = block / per_cell;
  auto* out = reinterpret_cast<typename Type::Element*>(packed);
  // An element's two steps in memory: along the outputs and along the summed dimension.
  const int64_t along_output = transposed ? ld : 1, along_sum = transposed ? 1 : ld;
  for (int64_t strip = 0; strip < block / width; ++strip) {
    for (int64_t j = groups.offsets[group]; j < groups.offsets[group + 1]; ++j, out += cells * width * per_cell) {
      const int64_t index = groups.indices[j];
      const auto* from = weight + (transposed ? group * ld + index : index * ld + group) * block +
                         strip * width * along_output;
      for (int64_t k = 0; k < block; ++k)
        for (int64_t output = 0; output < width; ++output)
          out[((k / per_cell) * width + output) * per_cell + k % per_cell] =
              from[output * along_output + k * along_sum];
    }
  }
}

// C[tokens of the tile, outputs of the group] = A[:, its blocks] * packed weights + bias.
template <class Type, int Vectors>
void product_tile(const typename Type::Element* a, int64_t lda, int64_t tokens, const uint32_t* packed,
                  const typename Type::Element* bias, typename Type::Element* c, int64_t ldc, const Groups& groups,
                  int64_t group) {
  constexpr int64_t width = Vectors * kLanes;
  const int64_t block = groups.block, cells = block / Type::kPerCell, a_row = lda / Type::kPerCell;
  const auto* a_cells = reinterpret_cast<const uint32_t*>(a);
  for (int64_t strip = 0; strip < block / width; ++strip) {
    const uint32_t* b = packed + strip * groups.size(group) * cells * width;
    const int64_t output = group * block + strip * width;
    for (int64_t token = 0; token < tokens; token += kMaxRows) {
      with_rows(int(std::min<int64_t>(kMaxRows, tokens - token)), [&](auto rows) {
        Vector sums[rows.value][Vectors] = {};
        const uint32_t* from = b;
        for (int64_t j = groups.offsets[group]; j < groups.offsets[group + 1]; ++j, from += cells * width)
          accumulate<Type, rows.value, Vectors>(sums, a_cells + token * a_row + groups.indices[j] * cells, a_row, 1,
                                                from, cells);
        for (int row = 0; row < rows.value; ++row)
          for (int64_t i = 0; i < width; ++i)
            c[(token + row) * ldc + output + i] =
                Type::store(sums[row][i / kLanes][i % kLanes] + (bias ? Type::load(bias[output + i]) : 0.0f));
      });
    }
  }
}

template <class Type, int Vectors>
void product(const void* a, int64_t lda, int64_t tokens, const void* weight, int64_t ld_weight, bool transposed,
             const void* bias, void* c, int64_t ldc, const Groups& groups, uint32_t* scratch, int threads) {
  using Element = typename Type::Element;
  const int64_t block = groups.block, block_cells = block * block / Type::kPerCell;
  const int64_t mean_bytes = std::max<int64_t>(groups.total() * block * sizeof(Element) / groups.count, 1);
  const int64_t tile = std::clamp<int64_t>(kTileBytes / mean_bytes, kMaxRows, 32 * kMaxRows) / kMaxRows * kMaxRows;
  const int64_t num_tiles = (tokens + tile - 1) / tile;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < groups.count; ++group)
      pack_weights<Type, Vectors>(static_cast<const Element*>(weight), ld_weight, transposed, groups, group,
                                  scratch + groups.offsets[group] * block_cells);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tiles * groups.count; ++task) {
      const int64_t token = task / groups.count * tile, group = task % groups.count;
      product_tile<Type, Vectors>(static_cast<const Element*>(a) + token * lda, lda, std::min(tile, tokens - token),
                                  scratch + groups.offsets[group] * block_cells, static_cast<const Element*>(bias),
                                  static_cast<Element*>(c) + token * ldc, ldc, groups, group);
    }
  }
}

// Tokens [0, tokens) of `width` columns as cells along the tokens: [cell][column]; an odd last token is paired with 0.
template <class Type>
void pack_tokens(const typename Type::Element* from, int64_t ld, int64_t tokens, int64_t width, uint32_t* out) {
  for (int64_t token = 0; token < tokens; token += Type::kPerCell, out += width) {
    const auto* row = from + token * ld;
    if constexpr (Type::kPerCell == 1) {
      std::memcpy(out, row, width * 4);
    } else if (token + 1 < tokens) {
      for (int64_t i = 0; i < width; ++i) out[i] = uint32_t(row[i]) | uint32_t(row[ld + i]) << 16;
    } else {
      for (int64_t i = 0; i < width; ++i) out[i] = row[i];
    }
  }
}

// The rows of a block in panels of nearly equal height, none above kMaxRows: 64 = 9 * 6 + 2 * 5.
struct Panels {
  int64_t block, count = (block + kMaxRows - 1) / kMaxRows;
  int64_t start(int64_t panel) const { return panel * (block / count) + std::min(panel, block % count); }
};

template <class Type, int Vectors>
struct WeightGradient {
  using Element = typename Type::Element;
  static constexpr int64_t kWidth = Vectors * kLanes;
  const Element *dy, *x;
  int64_t ld_dy, ld_x, tokens;
  Groups rows;
  int64_t num_columns;
  Element* dweight;
  int64_t ld_dweight;
  Element* dbias;
  uint32_t *packed_dy, *packed_x;
  float *sums, *bias_sums;  // sums: [live block][block][block] where the gradient itself is not float32

  int64_t block_cells() const { return rows.block * kGradientTokens / Type::kPerCell; }

  void pack_dy(int64_t row, int64_t token, int64_t count) const {
    const Panels panels{rows.block};
    const int64_t cells = (count + Type::kPerCell - 1) / Type::kPerCell;
    const Element* from = dy + token * ld_dy + row * rows.block;
    for (int64_t panel = 0; panel < panels.count && rows.size(row); ++panel) {
      const int64_t start = panels.start(panel);
      pack_tokens<Type>(from + start, ld_dy, count, panels.start(panel + 1) - start,
                        packed_dy + row * block_cells() + start * cells);
    }
    if (!dbias) return;
    float total[256] = {};
    for (int64_t t = 0; t < count; ++t)
      for (int64_t i = 0; i < rows.block; ++i) total[i] += Type::load(from[t * ld_dy + i]);
    for (int64_t i = 0; i < rows.block; ++i) bias_sums[row * rows.block + i] += total[i];
  }

  void pack_x(int64_t column, int64_t token, int64_t count) const {
    const int64_t cells = (count + Type::kPerCell - 1) / Type::kPerCell;
    for (int64_t start = 0; start < rows.block; start += kWidth)
      pack_tokens<Type>(x + token * ld_x + column * rows.block + start, ld_x, count, kWidth,
                        packed_x + column * block_cells() + start * cells);
  }

  // Adds the tile's part to live block j, which lies in block row `row`.
  void add_block(int64_t j, int64_t row, int64_t count, bool first, bool last) const {
    const int64_t block = rows.block, column = rows.indices[j], cells = (count + Type::kPerCell - 1) / Type::kPerCell;
    const Panels panels{block};
    Element* target = dweight + row * block * ld_dweight + column * block;
    for (int64_t start = 0; start < block; start += kWidth) {
      const uint32_t* b = packed_x + column * block_cells() + start * cells;
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        const int64_t top = panels.start(panel);
        const uint32_t* a = packed_dy + row * block_cells() + top * cells;
        with_rows(int(panels.start(panel + 1) - top), [&](auto height) {
          constexpr int kHeight = height.value;
          Vector part[kHeight][Vectors] = {};
          float* kept = sums + (j * block + top) * block + start;
          if constexpr (Type::kPerCell == 1) kept = target + top * ld_dweight + start;
          const int64_t ld = Type::kPerCell == 1 ? ld_dweight : block;
          if (!first)
            for (int r = 0; r < kHeight; ++r)
              for (int v = 0; v < Vectors; ++v) part[r][v] = *reinterpret_cast<Vector*>(kept + r * ld + v * kLanes);
          accumulate<Type, kHeight, Vectors>(part, a, 1, kHeight, b, cells);
          if (Type::kPerCell == 1 || !last) {
            for (int r = 0; r < kHeight; ++r)
              for (int v = 0; v < Vectors; ++v) *reinterpret_cast<Vector*>(kept + r * ld + v * kLanes) = part[r][v];
          } else {
            for (int r = 0; r < kHeight; ++r)
              for (int64_t i = 0; i < kWidth; ++i)
                target[(top + r) * ld_dweight + start + i] = Type::store(part[r][i / kLanes][i % kLanes]);
          }
        });
      }
    }
  }

  void run(const int32_t* block_rows, const int32_t* column_offsets, int threads) const {
#pragma omp parallel num_threads(threads)
    {
      for (int64_t token = 0; token < tokens; token += kGradientTokens) {
        const int64_t count = std::min(kGradientTokens, tokens - token);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < rows.count + num_columns; ++task) {
          if (task < rows.count)
            pack_dy(task, token, count);
          else if (column_offsets[task - rows.count + 1] > column_offsets[task - rows.count])
            pack_x(task - rows.count, token, count);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t j = 0; j < rows.total(); ++j)
          add_block(j, block_rows[j], count, token == 0, token + count == tokens);
      }
    }
    if (dbias)
      for (int64_t i = 0; i < rows.count * rows.block; ++i) dbias[i] = Type::store(bias_sums[i]);
  }
};

template <class Function>
void with_type(int is_bfloat16, int64_t block, Function&& function) {
  // Blocks of 16 are as wide as one vector of AVX-512.
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (is_bfloat16)
    block >= 2 * kLanes ? function(BFloat16{}, Two{}) : function(BFloat16{}, One{});
  else
    block >= 2 * kLanes ? function(Float32{}, Two{}) : function(Float32{}, One{});
}

}  // namespace

extern "C" {

// Bytes of scratch memory for the weight gradient.
int64_t megasparse_gradient_scratch(int is_bfloat16, int64_t rows, int64_t columns, int64_t num_live, int64_t block) {
  const int64_t cells = kGradientTokens / (is_bfloat16 ? 2 : 1);
  return 4 * ((rows + columns) * block * cells + rows * block + (is_bfloat16 ? num_live * block * block : 0));
}

void megasparse_product(int is_bfloat16, const void* a, int64_t lda, int64_t tokens, const void* weight,
                        int64_t ld_weight, int transposed, const void* bias, void* c, int64_t ldc, int64_t num_groups,
                        const int32_t* offsets, const int32_t* indices, int64_t block, void* scratch, int threads) {
  with_type(is_bfloat16, block, [&](auto type, auto vectors) {
    product<decltype(type), vectors.value>(a, lda, tokens, weight, ld_weight, transposed, bias, c, ldc,
                                           Groups{num_groups, block, offsets, indices},
                                           static_cast<uint32_t*>(scratch), threads);
  });
}

void megasparse_weight_gradient(int is_bfloat16, const void* dy, int64_t ld_dy, const void* x, int64_t ld_x,
                                int64_t tokens, int64_t num_rows, int64_t num_columns, const int32_t* row_offsets,
                                const int32_t* columns, const int32_t* block_rows, const int32_t* column_offsets,
                                int64_t block, void* dweight, int64_t ld_dweight, void* dbias, void* scratch,
                                int threads) {
  with_type(is_bfloat16, block, [&](auto type, auto vectors) {
    using Type = decltype(type);
    using Element = typename Type::Element;
    WeightGradient<Type, vectors.value> gradient{
        static_cast<const Element*>(dy), static_cast<const Element*>(x), ld_dy, ld_x, tokens,
        Groups{num_rows, block, row_offsets, columns}, num_columns, static_cast<Element*>(dweight), ld_dweight,
        static_cast<Element*>(dbias), static_cast<uint32_t*>(scratch), nullptr, nullptr, nullptr};
    gradient.packed_x = gradient.packed_dy + num_rows * gradient.block_cells();
    gradient.bias_sums = reinterpret_cast<float*>(gradient.packed_x + num_columns * gradient.block_cells());
    gradient.sums = gradient.bias_sums + num_rows * block;
    std::fill(gradient.bias_sums, gradient.sums, 0.0f);
    gradient.run(block_rows, column_offsets, threads);
  });
}
}
