// Element types of block_products.cpp: how a vector of sums is loaded and stored, how elements become cells of 32 bits (a
// float32, or a pair of bfloat16 that are neighbours along the summed dimension), and the step of the sum.

#pragma once

#include "../common/tile_registers.h"

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kMaxRows = 12;  // 24 of 32 registers hold sums
#else
constexpr int kLanes = 8, kMaxRows = 6;  // 12 of 16 registers hold sums
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Cells __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline float to_float(uint32_t cell) {
  float value;
  std::memcpy(&value, &cell, 4);
  return value;
}

struct Float32 {
  using Element = float;
  static constexpr int kPerCell = 1;
  static constexpr bool kInTiles = false;
  static constexpr int64_t kSide = kLanes;          // outputs of a vector
  static constexpr int64_t kStep = 1;               // the summed cells are padded to a multiple of it
  static constexpr int64_t kRows = kMaxRows;        // tokens that are multiplied at a time
  static constexpr int64_t kGradientTokens = 128;   // that the weight gradient packs at once: panel and strip fit in L1
  static Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
  static void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
  static uint32_t cell(const float* from, int64_t) {
    uint32_t bits;
    std::memcpy(&bits, from, 4);
    return bits;
  }
  using Right = Vector;
  static Right right(const uint32_t* b) { return *reinterpret_cast<const Vector*>(b); }
  static float left(uint32_t cell) { return to_float(cell); }
  static Vector multiply_add(Vector sum, float left, Right right) { return sum + left * right; }
};

struct BFloat16 : Float32 {
  using Element = uint16_t;
  static Vector load(const uint16_t* from) {
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Cells) << 16);
  }
  static void store(uint16_t* to, Vector value) {
#if defined(__AVX512BF16__)
    *reinterpret_cast<Halves*>(to) = (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const Cells bits = (Cells)value;
    const Cells rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const Cells quiet_nan = (bits >> 16) | 0x40u;
    const Cells stored = (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
    *reinterpret_cast<Halves*>(to) = __builtin_convertvector(stored, Halves);
#endif
  }
  static uint32_t cell(const uint16_t* from, int64_t) { return uint32_t(*from) << 16; }
};

#if defined(__AVX512BF16__)
struct BFloat16Pairs : BFloat16 {
  static constexpr int kPerCell = 2;
  static uint32_t cell(const uint16_t* from, int64_t next) { return from[0] | uint32_t(from[next]) << 16; }
  using Right = __m512bh;
  static Right right(const uint32_t* b) { return (__m512bh)_mm512_loadu_si512(b); }
  static __m512bh left(uint32_t cell) { return (__m512bh)_mm512_set1_epi32(int(cell)); }
  static Vector multiply_add(Vector sum, __m512bh left, Right right) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, left, right);
  }
};
#elif defined(MEGASPARSE_PAIRS)
// The layout of pairs without the instruction, for tests.
struct BFloat16Pairs : BFloat16 {
  static constexpr int kPerCell = 2;
  static uint32_t cell(const uint16_t* from, int64_t next) { return from[0] | uint32_t(from[next]) << 16; }
  using Right = Cells;
  static Right right(const uint32_t* b) { return *reinterpret_cast<const Cells*>(b); }
  static uint32_t left(uint32_t cell) { return cell; }
  static Vector multiply_add(Vector sum, uint32_t left, Right right) {
    sum += to_float(left << 16) * (Vector)(right << 16);
    return sum + to_float(left & 0xffff0000u) * (Vector)(right & 0xffff0000u);
  }
};
#else
using BFloat16Pairs = BFloat16;
#endif

#if defined(MEGASPARSE_HAS_TILES)
// Multiplied in tile registers, at most 2 x 2 tiles of sums at a time.
struct BFloat16Tiles : BFloat16 {
  static constexpr int kPerCell = 2;
  static constexpr bool kInTiles = true;
  static constexpr int64_t kSide = kTileSide, kStep = kTileSide, kRows = 2 * kTileSide;
  static constexpr int64_t kGradientTokens = 256;  // loading and storing the sums then takes a third of the time
  static uint32_t cell(const uint16_t* from, int64_t next) { return from[0] | uint32_t(from[next]) << 16; }
};
#else
using BFloat16Tiles = BFloat16Pairs;
#endif

}  // namespace
