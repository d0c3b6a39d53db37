// Small dense products in registers, packing, and the exponential, for the attention kernels (attention.cpp).
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

namespace {

#if defined(__AVX512F__) || defined(MEGASPARSE_WIDE)  // the latter: its layout on other processors, for tests
constexpr int kLanes = 16, kVectors = 1, kMaxRows = 12;
#else
constexpr int kLanes = 8, kVectors = 2, kMaxRows = 6;  // 12 of 16 registers hold sums
#endif
constexpr int64_t kWidth = kVectors * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Cells __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector broadcast(float value) { return value - Vector{}; }  // value + 0 is an addition: it turns -0 into 0

inline Integers lane_numbers() {
  Integers numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

inline int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }
inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The element types: a vector of them widened to float32 (exactly), or rounded from it to nearest, ties to even.
struct Float32 {
  using Element = float;
  static Vector widen(const float* from) { return load(from); }
  static void narrow(float* to, Vector value) { store(to, value); }
};

struct BFloat16 {
  using Element = uint16_t;
  static Vector widen(const uint16_t* from) {
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Cells) << 16);
  }
  static void narrow(uint16_t* to, Vector value) {
    const Cells bits = (Cells)value;
    const Cells rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Cells quiet_nan = (bits >> 16) | 0x40u;
    const Cells stored = (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(stored, Halves);
  }
};

struct Float16 {
  using Element = uint16_t;
  static Vector widen(const uint16_t* from) {
    const Cells bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Cells);
    // Exponent and mantissa in the places of a float32, 2^-112 too small; this covers subnormal numbers.
    const Vector scaled = (Vector)((bits & 0x7fffu) << 13) * 0x1p112f;
    const Cells special = (bits & 0x7c00u) == 0x7c00u ? Cells{} + 0x7f800000u : Cells{};
    return (Vector)((Cells)scaled | special | (bits & 0x8000u) << 16);
  }
  static void narrow(uint16_t* to, Vector value) {
    const Cells bits = (Cells)value, sign = bits & 0x80000000u, size = bits ^ sign;
    const Cells normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // Added to 0.5, a subnormal result lies in the last bits of the sum, which the addition rounds.
    const Cells subnormal = (Cells)((Vector)size + 0.5f) - 0x3f000000u;
    const Cells infinity = Cells{} + 0x7c00u, nan = Cells{} + 0x7e00u;
    const Cells finite = size < 0x38800000u ? subnormal : normal;
    const Cells stored = size > 0x7f800000u ? nan : (size >= 0x47800000u ? infinity : finite);
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(stored | sign >> 16, Halves);
  }
};

// 2^x with a relative error below 1.5e-7 (its polynomial: 2e-9); 0 below 2^-126; NaN stays NaN.
inline Vector power_of_2(Vector x) {
  const Vector shifted = x + 0x1.8p23f;  // the nearest integer, in the last bits
  const Vector rest = x - (shifted - 0x1.8p23f);
  Vector value = 0x1.41d334p-13f * rest + 0x1.5f456ap-10f;
  value = value * rest + 0x1.3b2dbcp-7f;
  value = value * rest + 0x1.c6aed4p-5f;
  value = value * rest + 0x1.ebfbdap-3f;
  value = value * rest + 0x1.62e43p-1f;
  value = value * rest + 1.0f;
  const Vector power = (Vector)(((Cells)shifted << 23) + 0x3f800000u);
  return x < -126.0f ? Vector{} : value * power;
}

inline float power_of_2(float x) { return power_of_2(broadcast(x))[0]; }

inline float sum_of(Vector value) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

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
