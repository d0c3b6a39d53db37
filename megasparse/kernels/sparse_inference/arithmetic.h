// What the products for inference compute with: vectors of weights and inputs, in float32 (weights float32 or bfloat16)
// or int8 (weights int8, inputs uint8, sums int32), and 64 weights of a row made from a bit mask and packed values.
//
// A plain version of everything stands beside those for AVX-512 and AVX2; MEGASPARSE_PLAIN and
// MEGASPARSE_NARROW leave out both, or that for AVX-512, for tests.

#pragma once

#include "../common/vectors.h"

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI2__) && \
    defined(__AVX512VNNI__) && !defined(MEGASPARSE_PLAIN) && !defined(MEGASPARSE_NARROW)
#define MEGASPARSE_EXPAND 1
#endif
#if !defined(MEGASPARSE_EXPAND) && defined(__AVX2__) && !defined(MEGASPARSE_PLAIN)
#define MEGASPARSE_PLACES 1
#endif
#if defined(MEGASPARSE_EXPAND) || defined(MEGASPARSE_PLACES)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kGroup = 64;       // columns of a word of the mask
constexpr int64_t kPrefetch = 1024;  // bytes ahead of what is read
constexpr int64_t kLine = 64;        // bytes of a line of the cache

// Sums of 4 neighbouring products, so that a vector of bytes has a fourth as many sums.
template <int Bytes>
struct Integers {
  typedef int8_t Weights __attribute__((vector_size(Bytes), aligned(1), may_alias));
  typedef uint8_t Inputs __attribute__((vector_size(Bytes), aligned(1), may_alias));
  typedef int32_t Sums __attribute__((vector_size(Bytes), aligned(4), may_alias));
};

template <int Bytes>
inline typename Integers<Bytes>::Sums multiply_add_bytes(typename Integers<Bytes>::Sums sums,
                                                         typename Integers<Bytes>::Weights weights,
                                                         typename Integers<Bytes>::Inputs inputs) {
#if defined(MEGASPARSE_EXPAND)
  using Sums = typename Integers<Bytes>::Sums;
  if constexpr (Bytes == 64) return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)inputs, (__m512i)weights);
  if constexpr (Bytes == 32) return (Sums)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)inputs, (__m256i)weights);
  if constexpr (Bytes == 16) return (Sums)_mm_dpbusd_epi32((__m128i)sums, (__m128i)inputs, (__m128i)weights);
#else
  using Sums = typename Integers<Bytes>::Sums;
#if defined(MEGASPARSE_PLACES)
  // Even and odd bytes as halves of lanes: two products a lane each, which no int16 would hold, so exact.
  if constexpr (Bytes == 32) {
    const __m256i w = (__m256i)weights, x = (__m256i)inputs;
    const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8),
                                           _mm256_and_si256(x, _mm256_set1_epi16(255)));
    const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(w, 8), _mm256_srli_epi16(x, 8));
    return sums + (Sums)_mm256_add_epi32(even, odd);
  }
#endif
  // Each byte of the lanes in turn, with its sign.
  for (int shift = 0; shift < 32; shift += 8)
    sums += (((Sums)weights << (24 - shift)) >> 24) * (((Sums)inputs >> shift) & 255);
  return sums;
#endif
}

// A product in float32, of weights that are widened to it. Wide: elements of a vector.
template <class Type>
struct FloatProduct {
  using Weight = typename Type::Element;
  using Input = float;
  using Unpacked = float;  // what weights become in a buffer
  using Total = float;
  template <int Wide>
  struct Of {
    static_assert(Wide == kLanes, "vectors are of one width");
    using Weights = Vector;
    using Inputs = Vector;
    using Sums = Vector;
    static Weights weights(const Weight* from) { return Type::widen(from); }
    static Weights unpacked(const float* from) { return load(from); }
    static Inputs inputs(const float* from) { return load(from); }
    static Sums multiply_add(Sums sums, Weights w, Inputs x) { return ::multiply_add(sums, w, x); }
  };
  static constexpr int kWide = kLanes;
  static constexpr int kPerSum = 1;  // elements that go into one lane of the sums
};

struct IntegerProduct {
  using Weight = int8_t;
  using Input = uint8_t;
  using Unpacked = int8_t;
  using Total = int32_t;
  template <int Wide>
  struct Of {
    using Weights = typename Integers<Wide>::Weights;
    using Inputs = typename Integers<Wide>::Inputs;
    using Sums = typename Integers<Wide>::Sums;
    static Weights weights(const int8_t* from) { return *reinterpret_cast<const Weights*>(from); }
    static Weights unpacked(const int8_t* from) { return weights(from); }
    static Inputs inputs(const uint8_t* from) { return *reinterpret_cast<const Inputs*>(from); }
    static Sums multiply_add(Sums sums, Weights w, Inputs x) { return multiply_add_bytes<Wide>(sums, w, x); }
  };
  static constexpr int kWide = 4 * kLanes;
  static constexpr int kPerSum = 4;
};

// The sum of `Count` lanes from `first` on, by halves.
template <class Total, int Count, class Sums>
inline Total sum_lanes(const Sums& sums, int first) {
#if defined(MEGASPARSE_EXPAND)
  if constexpr (Count == 16 && std::is_same_v<Total, float>) return _mm512_reduce_add_ps((__m512)sums);
  if constexpr (Count == 16 && std::is_same_v<Total, int32_t>) return _mm512_reduce_add_epi32((__m512i)sums);
#endif
  Total parts[Count];
  for (int i = 0; i < Count; ++i) parts[i] = sums[first + i];
#pragma GCC unroll 6
  for (int half = Count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// 64 weights of a row: those of the set bits of a mask from `values`, which moves on, and 0 elsewhere. Reads up to a
// vector beyond them.
inline void expand_plain(uint64_t mask, const void*& values, int bytes, void* to) {
  std::memset(to, 0, kGroup * bytes);
  const auto* from = static_cast<const char*>(values);
  for (; mask; mask &= mask - 1, from += bytes)
    std::memcpy(static_cast<char*>(to) + __builtin_ctzll(mask) * bytes, from, bytes);
  values = from;
}

template <class Product>
struct Expanded {
  static constexpr int kWide = Product::kWide, kVectors = kGroup / kWide;
  using Of = typename Product::template Of<kWide>;
  typename Of::Weights vectors[kVectors];

  // Without a mask: all 64.
  void read(const typename Product::Weight*& values) {
    for (int v = 0; v < kVectors; ++v) vectors[v] = Of::weights(values + v * kWide);
    values += kGroup;
  }

  void read(uint64_t mask, const typename Product::Weight*& values) {
    typename Product::Weight some[kGroup];
    const void* from = values;
    expand_plain(mask, from, sizeof(some[0]), some);
    values = static_cast<const typename Product::Weight*>(from);
    for (int v = 0; v < kVectors; ++v) vectors[v] = Of::weights(some + v * kWide);
  }

  void write(typename Product::Unpacked* to) const { std::memcpy(to, vectors, sizeof(vectors)); }
};

#if defined(MEGASPARSE_EXPAND)
template <>
inline void Expanded<FloatProduct<Float32>>::read(uint64_t mask, const float*& values) {
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v, mask >>= kWide) {
    vectors[v] = (Vector)_mm512_maskz_expand_ps(__mmask16(mask), _mm512_loadu_ps(values));
    values += __builtin_popcount(uint16_t(mask));
  }
}

template <>
inline void Expanded<FloatProduct<BFloat16>>::read(uint64_t mask, const uint16_t*& values) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; v += 2, mask >>= 32) {
    const __m512i halves = _mm512_maskz_expand_epi16(__mmask32(mask), _mm512_loadu_si512(values));
    const __m256i first = _mm512_castsi512_si256(halves), second = _mm512_extracti64x4_epi64(halves, 1);
    vectors[v] = (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16);
    vectors[v + 1] = (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    values += __builtin_popcount(uint32_t(mask));
  }
}

template <>
inline void Expanded<IntegerProduct>::read(uint64_t mask, const int8_t*& values) {
  vectors[0] = (Integers<64>::Weights)_mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
  values += __builtin_popcountll(mask);
}
#elif defined(MEGASPARSE_PLACES)
// For each byte of a mask, the place of each lane's value among those of the set bits; 128 where there is none.
struct Places {
  uint64_t of[256];
  constexpr Places() : of() {
    for (int mask = 0; mask < 256; ++mask)
      for (uint64_t bit = 0, count = 0; bit < 8; ++bit) of[mask] |= (mask >> bit & 1 ? count++ : 128) << 8 * bit;
  }
};
constexpr Places kPlaces;

inline __m128i places_of(uint64_t byte) { return _mm_cvtsi64_si128(int64_t(kPlaces.of[byte])); }

// How many bits of a mask lie in its first byte, its first two, ... as the bytes of a word: where the values of each
// byte begin is then known at once, and no load waits for a count before it.
inline uint64_t counts_of(uint64_t mask) {
  mask -= mask >> 1 & 0x5555555555555555;
  mask = (mask & 0x3333333333333333) + (mask >> 2 & 0x3333333333333333);
  return ((mask + (mask >> 4)) & 0x0f0f0f0f0f0f0f0f) * 0x0101010101010101;
}

// function(a byte of the mask, its number as a constant, its first value) for the eight bytes; `values` moves on. By
// an index sequence, so that what the bytes become stays in registers.
template <class Weight, class Function, int... Number>
inline void by_bytes(uint64_t mask, const Weight*& values, Function&& function,
                     std::integer_sequence<int, Number...>) {
  const uint64_t counts = counts_of(mask), begins = counts << 8;
  (function(mask >> 8 * Number & 255, std::integral_constant<int, Number>(), values + (begins >> 8 * Number & 255)),
   ...);
  values += counts >> 56;
}

template <class Weight, class Function>
inline void by_bytes(uint64_t mask, const Weight*& values, Function&& function) {
  by_bytes(mask, values, function, std::make_integer_sequence<int, 8>());
}

template <>
inline void Expanded<FloatProduct<Float32>>::read(uint64_t mask, const float*& values) {
  auto* to = reinterpret_cast<float*>(vectors);
  by_bytes(mask, values, [&](uint64_t byte, auto i, const float* from) {
    // Bit 7 of a place, where there is no value, becomes the sign of its lane.
    const __m256i places = _mm256_cvtepi8_epi32(places_of(byte));
    const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), places);
    _mm256_storeu_ps(to + 8 * i, _mm256_andnot_ps((__m256)_mm256_srai_epi32(places, 31), found));
  });
}

template <>
inline void Expanded<FloatProduct<BFloat16>>::read(uint64_t mask, const uint16_t*& values) {
  auto* to = reinterpret_cast<__m256i*>(vectors);
  by_bytes(mask, values, [&](uint64_t byte, auto i, const uint16_t* from) {
    // The two bytes of each value; a saturated sum keeps the 128 of those that are not there.
    const __m128i places = places_of(byte), first = _mm_adds_epu8(places, _mm_and_si128(places, _mm_set1_epi8(127)));
    const __m128i pairs = _mm_unpacklo_epi8(first, _mm_or_si128(first, _mm_set1_epi8(1)));
    const __m128i found = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), pairs);
    _mm256_storeu_si256(to + i, _mm256_slli_epi32(_mm256_cvtepu16_epi32(found), 16));
  });
}

template <>
inline void Expanded<IntegerProduct>::read(uint64_t mask, const int8_t*& values) {
  __m128i found[8];
  by_bytes(mask, values, [&](uint64_t byte, auto i, const int8_t* from) {
    found[i] = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), places_of(byte));
  });
  // Put together in registers: a load of what shorter stores have left has to wait for them.
  const auto half = [&](int first) {
    return _mm256_set_m128i(_mm_unpacklo_epi64(found[first + 2], found[first + 3]),
                            _mm_unpacklo_epi64(found[first], found[first + 1]));
  };
  // One vector where registers are wider and the instructions for expanding are missing.
  const __m256i halves[2] = {half(0), half(4)};
  static_assert(sizeof(vectors) == sizeof(halves), "64 weights");
  std::memcpy(vectors, halves, sizeof(vectors));
}
#endif

}  // namespace
