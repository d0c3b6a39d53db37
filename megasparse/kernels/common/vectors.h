// Vectors of float32, the element types that are widened to them, and the exponential: what all kernels for CPUs compute
// with. Little here is of one processor: the compiler turns the vectors into the instructions that there are.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) || defined(MEGASPARSE_WIDE)  // the latter: its layout on other processors, for tests
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Cells __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
// sum + left * right in one rounding where the processor can. Of the plain expression compilers make that or two
// roundings as suits the loop around it (GCC tunes so for AMD's 256-bit processors), and bits would depend on the tile.
inline Vector multiply_add(Vector sum, Vector left, Vector right) {
#if defined(__FMA__) && defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)left, (__m512)right, (__m512)sum);
#elif defined(__FMA__) && !defined(MEGASPARSE_WIDE)
  return (Vector)_mm256_fmadd_ps((__m256)left, (__m256)right, (__m256)sum);
#else
  return sum + left * right;
#endif
}
inline Vector broadcast(float value) { return value - Vector{}; }  // value + 0 is an addition: it turns -0 into 0

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
  // The same in one instruction where there is one, which takes numbers below 2^-126 for 0.
  static void narrow_normal(uint16_t* to, Vector value) {
#if defined(__AVX512BF16__)
    *reinterpret_cast<Halves*>(to) = (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    narrow(to, value);
#endif
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

// Loads and stores of whole vectors, and of the `count` < kLanes elements that are left.
template <class Type>
inline Vector read(const typename Type::Element* from, int64_t count) {
  if (count >= kLanes) return Type::widen(from);
  typename Type::Element some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return Type::widen(some);
}

template <class Type>
inline void write(typename Type::Element* to, Vector value, int64_t count) {
  if (count >= kLanes) return Type::narrow(to, value);
  typename Type::Element some[kLanes];
  Type::narrow(some, value);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

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

inline float sum_of(Vector value) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

}  // namespace
