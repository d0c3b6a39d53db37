// Products of inference on CPUs, y = x W^T + b, of weights that are kept packed. cpu.py calls them; compressed.py
// defines the layouts.
//
// Few rows of x are bound by reading the weight: it is read once for all of them, straight from the packed values to
// the sums. With more, 4 rows of the weight at a time are unpacked into the cache, and multiplied with tiles of x.
//
// Every output is one chain of additions over the columns in their order, in as many lanes as the processor has, whose
// sums are added at the end. So a row of y has the same bits whichever rows stand beside it, at any number of threads.
// Sums of int8 are exact.

#include "arithmetic.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t kStrip = 4;    // rows of the weight that are multiplied at a time
constexpr int kTile = 6;         // rows of x: kStrip * kTile = 24 of 32 registers hold sums
constexpr int kDirect = 4;       // up to so many rows of x nothing is unpacked
constexpr int64_t kTokens = 48;  // rows of x for which the weight is read once: x stays in the second-level cache
constexpr int64_t kApart = 64;   // elements between unpacked rows, so that they do not fall on one cache set

// Rows of x, `step` elements from one to the next.
template <class Product>
struct Inputs {
  const typename Product::Input* data;
  int64_t step;
  const typename Product::Input* row(int64_t n) const { return data + n * step; }
};

// What becomes of a sum. Of int8 inputs 128 was added to each, see quantize.
struct Outputs {
  float* y;
  int64_t step;  // between rows of y
  const float *bias, *input_scales, *weight_scales;
  const int32_t* row_sums;

  void write(int64_t n, int64_t o, float sum) const { y[n * step + o] = bias ? sum + bias[o] : sum; }
  void write(int64_t n, int64_t o, int32_t sum) const {
    write(n, o, float(sum - 128 * row_sums[o]) * (input_scales[n] * weight_scales[o]));
  }
};

// Of `Count` weights the lines of the cache that lie kPrefetch bytes behind them.
template <int Count, class Weight>
inline void prefetch(const Weight* weights) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < int64_t(Count * sizeof(Weight)); i += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(weights) + kPrefetch + i);
}

// Rows of 64-column groups: with a mask the values of the set bits, without one all of them.
template <class Product>
struct Rows {
  const uint64_t* masks;
  const typename Product::Weight* values;
  const int64_t* offsets;
  int64_t groups;

  // function(group, the 64 weights) over the groups of a row.
  template <class Function>
  inline void walk(int64_t row, Function&& function) const {
    Expanded<Product> weights;
    if (!masks) {
      const auto* from = values + row * groups * kGroup;
      for (int64_t g = 0; g < groups; ++g) {
        prefetch<kGroup>(from);
        weights.read(from);
        function(g, weights);
      }
      return;
    }
    const auto* from = values + offsets[row];
    for (int64_t g = 0; g < groups; ++g) {
      prefetch<kGroup / 2>(from);
      weights.read(masks[row * groups + g], from);
      function(g, weights);
    }
  }
};

// One row of the weight, `Count` rows of x.
template <class Product, int Count>
void multiply_row(const Rows<Product>& rows, int64_t row, const Inputs<Product>& x, const Outputs& outputs) {
  using Of = typename Expanded<Product>::Of;
  constexpr int wide = Product::kWide;
  typename Of::Sums sums[Count] = {};
  rows.walk(row, [&](int64_t g, const Expanded<Product>& weights) {
#pragma GCC unroll 8
    for (int v = 0; v < Expanded<Product>::kVectors; ++v)
#pragma GCC unroll 4
      for (int n = 0; n < Count; ++n)
        sums[n] = Of::multiply_add(sums[n], weights.vectors[v], Of::inputs(x.row(n) + g * kGroup + v * wide));
  });
  using Total = typename Product::Total;
  for (int n = 0; n < Count; ++n) outputs.write(n, row, sum_lanes<Total, wide / Product::kPerSum>(sums[n], 0));
}

// `Height` unpacked rows of the weight, `Count` rows of x.
template <class Product, int Height, int Count>
void multiply_tile(const typename Product::Unpacked* unpacked, const Inputs<Product>& x, int64_t width, int64_t row,
                   int64_t n, const Outputs& outputs) {
  using Of = typename Expanded<Product>::Of;
  constexpr int wide = Product::kWide;
  typename Of::Sums sums[Height][Count] = {};
  for (int64_t k = 0; k < width; k += wide) {
    typename Of::Weights weights[Height];
#pragma GCC unroll 4
    for (int r = 0; r < Height; ++r) weights[r] = Of::unpacked(unpacked + r * (width + kApart) + k);
#pragma GCC unroll 6
    for (int i = 0; i < Count; ++i) {
      const auto inputs = Of::inputs(x.row(n + i) + k);
#pragma GCC unroll 4
      for (int r = 0; r < Height; ++r) sums[r][i] = Of::multiply_add(sums[r][i], weights[r], inputs);
    }
  }
  using Total = typename Product::Total;
  for (int r = 0; r < Height; ++r)
    for (int i = 0; i < Count; ++i)
      outputs.write(n + i, row + r, sum_lanes<Total, wide / Product::kPerSum>(sums[r][i], 0));
}

// function(first row, a constant: how many) over the rows from `first` to `last`, in tiles of kTile, 2 or 1: each size
// that is compiled costs time at the first start.
template <class Function>
inline void in_tiles(int64_t first, int64_t last, Function&& function) {
  for (; last - first >= kTile; first += kTile) function(first, std::integral_constant<int, kTile>());
  for (; last - first >= 2; first += 2) function(first, std::integral_constant<int, 2>());
  for (; last > first; ++first) function(first, std::integral_constant<int, 1>());
}

template <class Product, int Height>
void multiply_tiles(const typename Product::Unpacked* unpacked, const Inputs<Product>& x, int64_t width, int64_t row,
                    int64_t first, int64_t last, const Outputs& outputs) {
  in_tiles(first, last, [&](int64_t n, auto count) {
    multiply_tile<Product, Height, decltype(count)::value>(unpacked, x, width, row, n, outputs);
  });
}

// 1 to kStrip rows of the weight by all rows of x of a tile of tokens.
template <class Product>
void multiply_strip(const Rows<Product>& rows, int64_t row, int64_t height, const Inputs<Product>& x, int64_t first,
                    int64_t last, const Outputs& outputs, typename Product::Unpacked* unpacked) {
  const int64_t width = rows.groups * kGroup;
  for (int64_t r = 0; r < height; ++r)
    rows.walk(row + r, [&](int64_t g, const Expanded<Product>& weights) {
      weights.write(unpacked + r * (width + kApart) + g * kGroup);
    });
  if (height == kStrip) return multiply_tiles<Product, kStrip>(unpacked, x, width, row, first, last, outputs);
  for (int64_t r = 0; r < height; ++r)
    multiply_tiles<Product, 1>(unpacked + r * (width + kApart), x, width, row + r, first, last, outputs);
}

template <class Product>
void multiply_rows(const Inputs<Product>& x, int64_t num_x, const Rows<Product>& rows, int64_t num_rows,
                   const Outputs& outputs, void* scratch, int threads) {
  const int64_t width = rows.groups * kGroup, strips = (num_rows + kStrip - 1) / kStrip;
  if (num_x <= kDirect) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < num_rows; ++row) {
      if (num_x == 1) multiply_row<Product, 1>(rows, row, x, outputs);
      if (num_x == 2) multiply_row<Product, 2>(rows, row, x, outputs);
      if (num_x == 3) multiply_row<Product, 3>(rows, row, x, outputs);
      if (num_x == 4) multiply_row<Product, 4>(rows, row, x, outputs);
    }
    return;
  }
  for (int64_t first = 0; first < num_x; first += kTokens) {
    const int64_t last = std::min(first + kTokens, num_x);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t strip = 0; strip < strips; ++strip) {
      auto* unpacked = static_cast<typename Product::Unpacked*>(scratch);
      unpacked += omp_get_thread_num() * kStrip * (width + kApart);
      const int64_t row = strip * kStrip, height = std::min(kStrip, num_rows - row);
      multiply_strip(rows, row, height, x, first, last, outputs, unpacked);
    }
  }
}

// Blocks of Side x Side: for each strip of 4 rows of a row of blocks, 4 x Side values of each of its blocks in turn.
struct Blocks {
  const void* values;
  const int64_t* offsets;   // [rows of blocks + 1]: first entry in `columns`
  const uint16_t* columns;  // of the blocks
};

// `Side` inputs, as often as fit into a vector.
template <class Of, int Side, int Wide, class Input>
inline typename Of::Inputs repeated(const Input* x) {
#if defined(MEGASPARSE_EXPAND)
  if constexpr (Side * sizeof(Input) == 16 && Wide * sizeof(Input) == 64)
    return (typename Of::Inputs)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  if constexpr (Side * sizeof(Input) == 32 && Wide * sizeof(Input) == 64)
    return (typename Of::Inputs)_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#endif
  Input some[Wide];
  for (int i = 0; i < Wide; i += Side) std::memcpy(some + i, x, Side * sizeof(Input));
  return Of::inputs(some);
}

template <class Product, int Side, int Count>
void multiply_blocks(const Blocks& blocks, int64_t strip, const Inputs<Product>& x, int64_t n,
                     const Outputs& outputs) {
  // Vectors of int8 may be shorter, so that they hold 4 rows of small blocks.
  constexpr int wide = std::min<int>(Product::kWide, Product::kPerSum == 4 ? kStrip * Side : Product::kWide);
  constexpr int vectors = kStrip * Side / wide, rows_of_vector = wide > Side ? wide / Side : 1;
  constexpr int per_row = Side > wide ? Side / wide : 1, num_sums = vectors / per_row;
  using Of = typename Product::template Of<wide>;
  typename Of::Sums sums[num_sums][Count] = {};
  constexpr int64_t strips = Side / kStrip;
  const int64_t group = strip / strips, begin = blocks.offsets[group], count = blocks.offsets[group + 1] - begin;
  const auto* values = static_cast<const typename Product::Weight*>(blocks.values) +
                       (begin * strips + strip % strips * count) * kStrip * Side;
  for (int64_t j = begin; j < begin + count; ++j, values += kStrip * Side) {
    const auto* from = x.row(n) + int64_t(blocks.columns[j]) * Side;
    prefetch<kStrip * Side>(values);
#pragma GCC unroll 8
    for (int part = 0; part < per_row; ++part) {
      typename Of::Weights weights[num_sums];
#pragma GCC unroll 4
      for (int r = 0; r < num_sums; ++r) weights[r] = Of::weights(values + (r * per_row + part) * wide);
#pragma GCC unroll 6
      for (int i = 0; i < Count; ++i) {
        typename Of::Inputs inputs;
        if constexpr (Side >= wide)
          inputs = Of::inputs(from + i * x.step + part * wide);
        else
          inputs = repeated<Of, Side, wide>(from + i * x.step);
#pragma GCC unroll 4
        for (int r = 0; r < num_sums; ++r) sums[r][i] = Of::multiply_add(sums[r][i], weights[r], inputs);
      }
    }
  }
  constexpr int lanes = wide / Product::kPerSum / rows_of_vector;
  for (int r = 0; r < kStrip; ++r)
    for (int i = 0; i < Count; ++i)
      outputs.write(n + i, strip * kStrip + r,
                    sum_lanes<typename Product::Total, lanes>(sums[r / rows_of_vector][i], r % rows_of_vector * lanes));
}

template <class Product, int Side>
void multiply_all_blocks(const Inputs<Product>& x, int64_t num_x, const Blocks& blocks, int64_t num_rows,
                         const Outputs& outputs, int threads) {
  for (int64_t first = 0; first < num_x; first += kTokens) {
    const int64_t last = std::min(first + kTokens, num_x);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t strip = 0; strip < num_rows / kStrip; ++strip)
      in_tiles(first, last, [&](int64_t n, auto count) {
        multiply_blocks<Product, Side, decltype(count)::value>(blocks, strip, x, n, outputs);
      });
  }
}

template <class Product>
void multiply_blocks_of_any_size(int64_t side, const Inputs<Product>& x, int64_t num_x, const Blocks& blocks,
                                 int64_t num_rows, const Outputs& outputs, int threads) {
  switch (side) {
    case 4: return multiply_all_blocks<Product, 4>(x, num_x, blocks, num_rows, outputs, threads);
    case 8: return multiply_all_blocks<Product, 8>(x, num_x, blocks, num_rows, outputs, threads);
    case 16: return multiply_all_blocks<Product, 16>(x, num_x, blocks, num_rows, outputs, threads);
    case 32: return multiply_all_blocks<Product, 32>(x, num_x, blocks, num_rows, outputs, threads);
    case 64: return multiply_all_blocks<Product, 64>(x, num_x, blocks, num_rows, outputs, threads);
  }
}

// function(a product of that type of weights).
template <class Function>
void with_product(int type, Function&& function) {
  if (type == 0) return function(FloatProduct<Float32>());
  if (type == 1) return function(FloatProduct<BFloat16>());
  function(IntegerProduct());
}

}  // namespace

extern "C" {

// Rows of x [num_x, width] to int8, symmetric by row, 128 added: bytes [num_x, padded], and the scale of each row.
void megasparse_quantize(const float* x_data, int64_t num_x, int64_t width, int64_t padded, uint8_t* to_data,
                         float* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (num_x > kTile)
  for (int64_t n = 0; n < num_x; ++n) {
    const float* x = x_data + n * width;
    uint8_t* to = to_data + n * padded;
    float largest = 0;
    int is_lost = 0;  // an entry is infinite or no number: the whole row of y then is none
    for (int64_t i = 0; i < width; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
      is_lost |= !(std::fabs(x[i]) <= std::numeric_limits<float>::max());
    }
    const float scale = largest / 127 > 0 && !is_lost ? largest / 127 : 1;
    for (int64_t i = 0; i < width; ++i) {
      const float rounded = std::min(std::max(-127.0f, std::nearbyint(x[i] / scale)), 127.0f);
      to[i] = uint8_t(int(rounded) + 128);
    }
    std::memset(to + width, 128, padded - width);
    scales[n] = is_lost ? std::numeric_limits<float>::quiet_NaN() : scale;
  }
}

int64_t megasparse_rows_scratch(int type, int64_t num_x, int64_t groups, int threads) {
  return num_x <= kDirect ? 0 : (groups * kGroup + kApart) * kStrip * threads * (type == 2 ? 1 : 4);
}

// x: `num_x` rows, `step` elements from one to the next, with zeros (quantize: 128) up to whole groups of 64.
void megasparse_multiply_rows(int type, const void* x, int64_t num_x, int64_t step, int64_t groups,
                              const uint64_t* masks, const void* values, const int64_t* offsets, int64_t num_rows,
                              const float* bias, const float* input_scales, const float* weight_scales,
                              const int32_t* row_sums, float* y, void* scratch, int threads) {
  const Outputs outputs{y, num_rows, bias, input_scales, weight_scales, row_sums};
  with_product(type, [&](auto product) {
    using Product = decltype(product);
    const Inputs<Product> inputs{static_cast<const typename Product::Input*>(x), step};
    const Rows<Product> rows{masks, static_cast<const typename Product::Weight*>(values), offsets, groups};
    multiply_rows(inputs, num_x, rows, num_rows, outputs, scratch, threads);
  });
}

// Rows [first, last) of a weight in float32, of whole groups of columns: what a dense product reads.
void megasparse_unpack_rows(int type, int64_t groups, const uint64_t* masks, const void* values, const int64_t* offsets,
                            int64_t first, int64_t last, float* to, int threads) {
  const auto unpack = [&](auto product) {
    using Product = decltype(product);
    const Rows<Product> rows{masks, static_cast<const typename Product::Weight*>(values), offsets, groups};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = first; row < last; ++row)
      rows.walk(row, [&](int64_t g, const Expanded<Product>& weights) {
        weights.write(to + ((row - first) * groups + g) * kGroup);
      });
  };
  if (type == 0) unpack(FloatProduct<Float32>());
  if (type == 1) unpack(FloatProduct<BFloat16>());
}

void megasparse_multiply_blocks(int type, const void* x, int64_t num_x, int64_t step, int64_t side, const void* values,
                                const int64_t* offsets, const uint16_t* columns, int64_t num_rows, const float* bias,
                                const float* input_scales, const float* weight_scales, const int32_t* row_sums,
                                float* y, int threads) {
  const Outputs outputs{y, num_rows, bias, input_scales, weight_scales, row_sums};
  with_product(type, [&](auto product) {
    using Product = decltype(product);
    const Inputs<Product> inputs{static_cast<const typename Product::Input*>(x), step};
    multiply_blocks_of_any_size(side, inputs, num_x, Blocks{values, offsets, columns}, num_rows, outputs, threads);
  });
}
}
