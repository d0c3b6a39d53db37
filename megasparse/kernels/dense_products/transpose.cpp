// Transposed copies of matrices with elements of 16 bits (transposition.py).
//
// Squares of 8 x 8 are transposed in registers; 4 x 4 of them are read and written as whole cache lines.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kSquare = 8, kBlock = 32;

typedef uint16_t Eight __attribute__((vector_size(16), aligned(2), may_alias));

// Rows of two squares that lie `from` and `to` elements apart.
inline void transpose_square(const uint16_t* in, int64_t from, uint16_t* out, int64_t to) {
  Eight rows[kSquare], pairs[kSquare], fours[kSquare];
  for (int i = 0; i < kSquare; ++i) rows[i] = *reinterpret_cast<const Eight*>(in + i * from);
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
    pairs[2 * i + 1] = __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  for (int half = 0; half < 8; half += 4)
    for (int i = 0; i < 2; ++i) {
      const Eight one = pairs[half + i], two = pairs[half + i + 2];
      fours[half + 2 * i] = __builtin_shufflevector(one, two, 0, 1, 8, 9, 2, 3, 10, 11);
      fours[half + 2 * i + 1] = __builtin_shufflevector(one, two, 4, 5, 12, 13, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    const Eight upper = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Eight lower = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    *reinterpret_cast<Eight*>(out + 2 * i * to) = upper;
    *reinterpret_cast<Eight*>(out + (2 * i + 1) * to) = lower;
  }
}

// Up to kBlock rows and columns.
void transpose_block(const uint16_t* in, int64_t from, int64_t rows, int64_t columns, uint16_t* out, int64_t to) {
  const int64_t whole_rows = rows / kSquare * kSquare, whole_columns = columns / kSquare * kSquare;
  for (int64_t column = 0; column < whole_columns; column += kSquare)
    for (int64_t row = 0; row < whole_rows; row += kSquare)
      transpose_square(in + row * from + column, from, out + column * to + row, to);
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t row = column < whole_columns ? whole_rows : 0; row < rows; ++row)
      out[column * to + row] = in[row * from + column];
}

}  // namespace

extern "C" {

// out[column * to + row] = in[row * from + column]
void megasparse_transpose(const uint16_t* in, int64_t from, int64_t rows, int64_t columns, uint16_t* out, int64_t to,
                          int64_t threads) {
  const int64_t blocks = (columns + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t column = block * kBlock, wide = std::min(kBlock, columns - column);
    for (int64_t row = 0; row < rows; row += kBlock)
      transpose_block(in + row * from + column, from, std::min(kBlock, rows - row), wide, out + column * to + row, to);
  }
}
}
