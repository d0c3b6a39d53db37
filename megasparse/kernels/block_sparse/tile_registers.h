// Products of tiles of bfloat16 in the tile registers of AMX: 16 x 16 sums, in each step of 16 cells (pairs of bfloat16).
//
// A: rows of cells along the summed dimension. B: [cell of the summed dimension][16 outputs]. This is how block_products
// packs its operands for the vector instructions too. With MEGASPARSE_TILES the same in plain C++, for tests.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AMX_BF16__) && defined(__linux__) && !defined(MEGASPARSE_TILES)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MEGASPARSE_AMX
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

// c (add: itself +) = A B for Tall x Wide tiles of sums. Steps between rows in cells; `steps` is a multiple of 16.
template <int Tall, int Wide>
inline void multiply_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps, float* c,
                           int64_t c_row, bool add) {
  const auto at = [&](int row, int column) { return c + row * kTileSide * c_row + column * kTileSide; };
  if (add) {
    _tile_loadd(0, at(0, 0), c_row * 4);
    if constexpr (Wide == 2) _tile_loadd(1, at(0, 1), c_row * 4);
    if constexpr (Tall == 2) _tile_loadd(2, at(1, 0), c_row * 4);
    if constexpr (Tall == 2 && Wide == 2) _tile_loadd(3, at(1, 1), c_row * 4);
  } else {
    _tile_zero(0);
    if constexpr (Wide == 2) _tile_zero(1);
    if constexpr (Tall == 2) _tile_zero(2);
    if constexpr (Tall == 2 && Wide == 2) _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k += kTileSide) {
    _tile_loadd(4, a + k, a_row * 4);
    _tile_loadd(6, b + k * b_row, b_row * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Wide == 2) {
      _tile_loadd(7, b + k * b_row + kTileSide, b_row * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Tall == 2) {
      _tile_loadd(5, a + kTileSide * a_row + k, a_row * 4);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Wide == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, at(0, 0), c_row * 4);
  if constexpr (Wide == 2) _tile_stored(1, at(0, 1), c_row * 4);
  if constexpr (Tall == 2) _tile_stored(2, at(1, 0), c_row * 4);
  if constexpr (Tall == 2 && Wide == 2) _tile_stored(3, at(1, 1), c_row * 4);
}

#elif defined(MEGASPARSE_TILES)

inline bool ask_for_tiles() { return true; }

struct TileRegisters {
  TileRegisters() {}
};

template <int Tall, int Wide>
inline void multiply_tiles(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t steps, float* c,
                           int64_t c_row, bool add) {
  const auto half = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  for (int64_t row = 0; row < Tall * kTileSide; ++row)
    for (int64_t column = 0; column < Wide * kTileSide; ++column) {
      float sum = add ? c[row * c_row + column] : 0.0f;
      for (int64_t k = 0; k < steps; ++k) {
        const uint32_t left = a[row * a_row + k], right = b[k * b_row + column];
        sum += half(left << 16) * half(right << 16);
        sum += half(left & 0xffff0000u) * half(right & 0xffff0000u);
      }
      c[row * c_row + column] = sum;
    }
}

#else

inline bool ask_for_tiles() { return false; }

struct TileRegisters {};

template <int Tall, int Wide>
void multiply_tiles(const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t, bool);

#endif

}  // namespace
