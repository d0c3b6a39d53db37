// Products of tiles of bfloat16 in the tile registers of AMX: 16 x 16 sums, in each step of 16 cells (pairs of bfloat16).
//
// A: rows of cells along the summed dimension; rows of bfloat16 as they lie are rows of cells. B: [cell of the summed
// dimension][16 outputs]. The instruction takes numbers below 2^-126 for 0. With MEGASPARSE_TILES the same sums in plain
// C++, for tests.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__) && !defined(MEGASPARSE_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#define MEGASPARSE_AMX
#endif
#if defined(MEGASPARSE_AMX) || defined(MEGASPARSE_TILES)
#define MEGASPARSE_HAS_TILES
#endif

namespace {

constexpr int64_t kTileSide = 16;  // rows and columns of sums, and cells of a step

#if defined(MEGASPARSE_AMX)

// Whether the system lets this process use tile registers, which it must be asked for.
inline bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// While it lives, this thread's tile registers are 16 rows of 64 bytes.
struct TileRegisters {
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// Tall x Wide tiles of sums, which are 0 at first. The compiler knows nothing of their registers: one object at a time.
template <int Tall, int Wide>
struct TileSums {
  TileSums() {
    _tile_zero(0);
    if constexpr (Wide == 2) _tile_zero(1);
    if constexpr (Tall == 2) _tile_zero(2);
    if constexpr (Tall == 2 && Wide == 2) _tile_zero(3);
  }
  TileSums(const float* from, int64_t row) {
    _tile_loadd(0, at(from, row, 0, 0), row * 4);
    if constexpr (Wide == 2) _tile_loadd(1, at(from, row, 0, 1), row * 4);
    if constexpr (Tall == 2) _tile_loadd(2, at(from, row, 1, 0), row * 4);
    if constexpr (Tall == 2 && Wide == 2) _tile_loadd(3, at(from, row, 1, 1), row * 4);
  }
  TileSums(const TileSums&) = delete;

  // += A B over `steps` cells, a multiple of 16. Steps between rows: of A in bytes, of B in cells.
  void add(const void* a, int64_t a_bytes, const uint32_t* b, int64_t b_row, int64_t steps) {
    const char* left = static_cast<const char*>(a);
    for (int64_t k = 0; k < steps; k += kTileSide, left += 4 * kTileSide, b += kTileSide * b_row) {
      _tile_loadd(4, left, a_bytes);
      _tile_loadd(6, b, b_row * 4);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Wide == 2) {
        _tile_loadd(7, b + kTileSide, b_row * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (Tall == 2) {
        _tile_loadd(5, left + kTileSide * a_bytes, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Wide == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  void store(float* to, int64_t row) const {
    _tile_stored(0, at(to, row, 0, 0), row * 4);
    if constexpr (Wide == 2) _tile_stored(1, at(to, row, 0, 1), row * 4);
    if constexpr (Tall == 2) _tile_stored(2, at(to, row, 1, 0), row * 4);
    if constexpr (Tall == 2 && Wide == 2) _tile_stored(3, at(to, row, 1, 1), row * 4);
  }

 private:
  template <class Float>
  static Float* at(Float* c, int64_t row, int tall, int wide) {
    return c + tall * kTileSide * row + wide * kTileSide;
  }
};

#elif defined(MEGASPARSE_TILES)

inline bool ask_for_tiles() { return true; }

struct TileRegisters {
  TileRegisters() {}
};

template <int Tall, int Wide>
struct TileSums {
  TileSums() : sums{} {}
  TileSums(const float* from, int64_t row) {
    for (int64_t i = 0; i < kTall; ++i) std::memcpy(sums[i], from + i * row, sizeof sums[i]);
  }
  TileSums(const TileSums&) = delete;

  void add(const void* a, int64_t a_bytes, const uint32_t* b, int64_t b_row, int64_t steps) {
    for (int64_t i = 0; i < kTall; ++i)
      for (int64_t k = 0; k < steps; ++k) {
        uint32_t left;
        std::memcpy(&left, static_cast<const char*>(a) + i * a_bytes + 4 * k, 4);
        for (int64_t j = 0; j < kWide; ++j) {
          const uint32_t right = b[k * b_row + j];
          sums[i][j] += half(left << 16) * half(right << 16);
          sums[i][j] += half(left & 0xffff0000u) * half(right & 0xffff0000u);
        }
      }
  }

  void store(float* to, int64_t row) const {
    for (int64_t i = 0; i < kTall; ++i) std::memcpy(to + i * row, sums[i], sizeof sums[i]);
  }

 private:
  static constexpr int64_t kTall = Tall * kTileSide, kWide = Wide * kTileSide;
  float sums[kTall][kWide];

  static float half(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

#else

inline bool ask_for_tiles() { return false; }

struct TileRegisters {};

template <int Tall, int Wide>
struct TileSums {
  TileSums();
  TileSums(const float*, int64_t);
  void add(const void*, int64_t, const uint32_t*, int64_t, int64_t);
  void store(float*, int64_t) const;
};

#endif

#if defined(__AVX512F__)

// Rows that are Apart apart exchange the halves, quarters, ... of themselves that lie across the diagonal.
template <int Apart>
inline __attribute__((always_inline)) void exchange(__m512i (&rows)[kTileSide]) {
  alignas(64) uint32_t upper_half[kTileSide], lower_half[kTileSide];
#pragma GCC unroll 16
  for (uint32_t i = 0; i < kTileSide; ++i) {
    upper_half[i] = i & Apart ? i - Apart + kTileSide : i;
    lower_half[i] = i & Apart ? i + kTileSide : i + Apart;
  }
  const __m512i upper_places = _mm512_load_si512(upper_half), lower_places = _mm512_load_si512(lower_half);
#pragma GCC unroll 16
  for (int i = 0; i < kTileSide; ++i)
    if (!(i & Apart)) {
      const __m512i upper = rows[i], lower = rows[i + Apart];
      rows[i] = _mm512_permutex2var_epi32(upper, upper_places, lower);
      rows[i + Apart] = _mm512_permutex2var_epi32(upper, lower_places, lower);
    }
}

// Writes the columns of a square as rows, `step` cells apart; its own rows are `row` cells apart.
inline void transpose(const uint32_t* square, int64_t row, uint32_t* out, int64_t step) {
  __m512i rows[kTileSide];
#pragma GCC unroll 16
  for (int i = 0; i < kTileSide; ++i) rows[i] = _mm512_loadu_si512(square + i * row);
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kTileSide; ++i) _mm512_storeu_si512(out + i * step, rows[i]);
}

#else

inline void transpose(const uint32_t* square, int64_t row, uint32_t* out, int64_t step) {
  for (int64_t i = 0; i < kTileSide; ++i)
    for (int64_t k = 0; k < kTileSide; ++k) out[i * step + k] = square[k * row + i];
}

#endif

}  // namespace
