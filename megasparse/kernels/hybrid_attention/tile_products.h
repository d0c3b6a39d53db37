// Small dense products in registers, and packing, for the attention kernels (attention.cpp).
//
// A register tile holds Rows x kWidth sums: in each step a cell of A is broadcast and multiplied with kWidth cells of B.
// Operands are packed in float32: rows with a stride of an odd number of cache lines, so that neighbours do not fall on
// the same cache sets, and panels, [panel][column of the rows][kWidth rows], which are the rows transposed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../common/vectors.h"

namespace {

#if defined(__AVX512F__) || defined(MEGASPARSE_WIDE)
constexpr int kVectors = 1, kMaxRows = 12;
#else
constexpr int kVectors = 2, kMaxRows = 6;  // 12 of 16 registers hold sums
#endif
constexpr int64_t kWidth = kVectors * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

inline Integers lane_numbers() {
  Integers numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

inline int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }
inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline float power_of_2(float x) { return power_of_2(broadcast(x))[0]; }

inline float maximum_of(Vector value) {
  float most = value[0];
  for (int lane = 1; lane < kLanes; ++lane) most = std::max(most, value[lane]);
  return most;
}

// Zeros from `first` to `last`, rounded to whole vectors.
inline void clear(float* x, int64_t first, int64_t last) {
  for (int64_t i = round_down(first, kLanes); i < last; i += kLanes) store(x + i, Vector{});
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

// c[row][0 .. kWidth) = (add: itself +) the sum over `steps` of a[row * a_row + step * a_step] * b[step * b_step ..].
template <int Rows>
inline void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                     float* c, int64_t c_row, bool add) {
  Vector sums[Rows][kVectors] = {};
  if (add)
    for (int row = 0; row < Rows; ++row)
      for (int v = 0; v < kVectors; ++v) sums[row][v] = load(c + row * c_row + v * kLanes);
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
    Vector right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < Rows; ++row) {
      const float left = a[row * a_row];
      for (int v = 0; v < kVectors; ++v) sums[row][v] += left * right[v];
    }
  }
  for (int row = 0; row < Rows; ++row)
    for (int v = 0; v < kVectors; ++v) store(c + row * c_row + v * kLanes, sums[row][v]);
}

// Asks for `bytes` of memory ahead of its use: rows of a head are too far apart for the processor to foresee them.
template <int Write = 0>
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, Write);
}

// Writes `count` widened elements times `factor`, then zeros up to `padded`, a multiple of kLanes.
template <class Type>
inline void widen_row(const typename Type::Element* from, int64_t count, float factor, int64_t padded, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, Type::widen(from + i) * factor);
  if (i < count) {
    typename Type::Element rest[kLanes] = {};
    for (int64_t j = 0; j < count - i; ++j) rest[j] = from[i + j];
    store(to + i, Type::widen(rest) * factor);
    i += kLanes;
  }
  for (; i < padded; i += kLanes) store(to + i, Vector{});
}

// Writes `count` elements rounded from `from` times `factor`; `from` may be read up to the next multiple of kLanes.
template <class Type>
inline void narrow_row(const float* from, int64_t count, float factor, typename Type::Element* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Type::narrow(to + i, load(from + i) * factor);
  if (i < count) {
    typename Type::Element rest[kLanes];
    Type::narrow(rest, load(from + i) * factor);
    for (int64_t j = 0; j < count - i; ++j) to[i + j] = rest[j];
  }
}

inline void transpose_8x8(const float* from, int64_t ld_from, float factor, float* to, int64_t ld_to) {
  Eight in[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) in[i] = *reinterpret_cast<const Eight*>(from + i * ld_from) * factor;
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(in[i], in[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(in[i], in[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int half = 0; half < 8; half += 4)
    for (int i = 0; i < 2; ++i) {
      const Eight one = pairs[half + i], two = pairs[half + i + 2];
      fours[half + 2 * i] = __builtin_shufflevector(one, two, 0, 1, 8, 9, 4, 5, 12, 13);
      fours[half + 2 * i + 1] = __builtin_shufflevector(one, two, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    const Eight upper = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Eight lower = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    *reinterpret_cast<Eight*>(to + i * ld_to) = upper;
    *reinterpret_cast<Eight*>(to + (i + 4) * ld_to) = lower;
  }
}

// `count` rows (a multiple of 8) as panels, times `factor`; `width` is a multiple of kWidth.
inline void transpose_rows(const float* rows, int64_t ld, int64_t count, int64_t width, float factor, float* panels) {
  for (int64_t row = 0; row < count; row += 8) {
    float* panel = panels + row / kWidth * width * kWidth + row % kWidth;
    for (int64_t column = 0; column < width; column += 8)
      transpose_8x8(rows + row * ld + column, ld, factor, panel + column * kWidth, kWidth);
  }
}

}  // namespace
