// Attention of bfloat16 in tile registers (../common/tile_registers.h): what the passes bfloat16_forward.h and
// bfloat16_backward.h share. Queries, keys, values and dout are multiplied as they are; the weights and the gradients of
// the scores are rounded to bfloat16 for their products; all else is float32.
//
// Everything is padded to squares of 32 x 32, which are 2 x 2 registers. Of 32 tokens, the second factor of a product is
// packed as columns, [cell of the head dimension][32 tokens], where the sum runs over the head dimension, and as pairs,
// [pair of tokens][head dimension], where it runs over the tokens.
//
// Where a query does not see a key, their weight of 0 is multiplied all the same, and 0 times infinity is NaN. So a head
// with an infinity or NaN is computed anew without tiles, where such a number reaches a few rows and no more.

#pragma once

#include "../common/tile_registers.h"
#include "parts.h"

namespace {

#if defined(MEGASPARSE_HAS_TILES)

// Fewer tokens, and smaller head dimensions, are faster without.
#if defined(MEGASPARSE_ALL_IN_TILES)  // for tests
constexpr int64_t kShortestInTiles = 1, kNarrowestInTiles = 1;
#else
constexpr int64_t kShortestInTiles = 64, kNarrowestInTiles = 32;
#endif

constexpr int64_t kSquare = 2 * kTileSide;
constexpr int64_t kSquarePairs = kSquare / 2;
constexpr int64_t kMostColumns = 256;  // scores of a row that are in work at a time
// Rows of scores in float32 and pairs, and rounded ones, are an odd number of cache lines apart.
constexpr int64_t kScoreStride = kMostColumns + 16, kRoundedStride = kMostColumns + 32;

// c = (add: itself +) A B for one or two tiles of rows, and two of columns.
inline void multiply_tiles(int64_t rows, const uint16_t* a, int64_t a_row, const uint32_t* b, int64_t b_row,
                           int64_t steps, float* c, int64_t c_row, bool add) {
  const auto run = [&](auto tall) {
    if (add) {
      TileSums<tall.value, 2> sums(c, c_row);
      sums.add(a, a_row * 2, b, b_row, steps);
      sums.store(c, c_row);
    } else {
      TileSums<tall.value, 2> sums;
      sums.add(a, a_row * 2, b, b_row, steps);
      sums.store(c, c_row);
    }
  };
  if (rows > kTileSide)
    run(std::integral_constant<int, 2>{});
  else
    run(std::integral_constant<int, 1>{});
}

inline const uint32_t* as_cells(const uint16_t* rows) { return reinterpret_cast<const uint32_t*>(rows); }

// 32 rows as columns.
inline void pack_columns(const uint16_t* rows, int64_t width, uint32_t* columns) {
  for (int64_t row = 0; row < kSquare; row += kTileSide)
    for (int64_t cell = 0; cell < width / 2; cell += kTileSide)
      transpose(as_cells(rows + row * width) + cell, width / 2, columns + cell * kSquare + row, kSquare);
}

inline Cells pair_up(const uint16_t* first, const uint16_t* second) {
  const auto widen = [](const uint16_t* from) {
    return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Cells);
  };
  return widen(first) | widen(second) << 16;
}

// 32 rows as pairs.
inline void pack_pairs(const uint16_t* rows, int64_t width, uint32_t* pairs) {
  for (int64_t i = 0; i < kSquarePairs; ++i, rows += 2 * width, pairs += width)
    for (int64_t j = 0; j < width; j += kLanes)
      *reinterpret_cast<Cells*>(pairs + j) = pair_up(rows + j, rows + width + j);
}

inline float largest_of(Vector value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  return maximum_of(value);
#endif
}

inline float total_of(Vector value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  return sum_of(value);
#endif
}

inline void clear(uint16_t* x, int64_t first, int64_t last) {
  if (first < last) std::memset(x + first, 0, (last - first) * sizeof(uint16_t));
}

// Rows that are multiplied together, at most 32, and the columns that any of them sees, in whole squares.
struct SquareRows {
  int64_t top, rows;
  Interval columns;

  SquareRows(const Interval* active, int64_t top, int64_t count)
      : top(top), rows(std::min(kSquare, count - top)), columns{std::numeric_limits<int64_t>::max(), 0} {
    for (int64_t i = top; i < top + rows; ++i)
      if (!active[i].empty())
        columns = {std::min(columns.first, active[i].first), std::max(columns.last, active[i].last)};
    if (!columns.empty()) columns = {round_down(columns.first, kSquare), round_up(columns.last, kSquare)};
  }
};

// Tokens in the order in which they are multiplied, and some that come after them.
struct Order {
  int32_t* tokens;
  int64_t count = 0, known = 0;

  int64_t token(int64_t index) const { return tokens[index]; }
  int64_t ahead(int64_t index) const { return tokens[std::min(index + kAhead, known - 1)]; }
  void add(const Sequence& sequence, int64_t most) {
    for (int64_t i = 0; i < std::min(sequence.count, most); ++i) tokens[known++] = int32_t(sequence.token(i));
  }
};

// Queries and what they see of the keys, or keys and the queries that see them.
struct Meeting {
  Order own, other;
  const Interval* active;
};

// What both passes do with the rows of a head.
template <class Rows>
struct TilePass : Rows {
  using typename Rows::Element;
  using Rows::at, Rows::call, Rows::row, Rows::width;
  int32_t *own_tokens, *other_tokens;  // of the classes that are in work
  Interval* active;                    // what the first see of the others
  uint16_t* gathered;                  // 32 rows
  mutable Halves special = {};         // not 0 once an infinity or NaN was gathered

  TilePass(const Call& call, Memory& memory) : Rows(call, memory, kSquare) {
    for (int32_t** tokens : {&own_tokens, &other_tokens}) *tokens = take<int32_t>(memory, call.length + kAhead);
    active = take<Interval>(memory, call.length);
    gathered = take<uint16_t>(memory, kSquare * width);
  }
  static int64_t size(const Call& call) {
    return Rows::size(call) + 6 * call.length + 2 * kAhead + kSquare / 2 * padded_width(call) + 4 * 16;
  }

  static int64_t padded_width(const Call& call) { return round_up(call.width, kSquare); }
  static int64_t padded_length(const Call& call) { return round_up(call.length, kSquare); }

  template <class Value>
  static Value* take(Memory& memory, int64_t count) {
    return reinterpret_cast<Value*>(memory.take((count * sizeof(Value) + 3) / 4));
  }

  bool all_finite() const {
    bool all = true;
    for (int lane = 0; lane < kLanes; ++lane) all &= !special[lane];
    return all;
  }

  // The classes of a part from `number` on, as many as fill a square: few tokens would leave most of it empty. Classes lie
  // one after the other, so that intervals stay intervals.
  template <class Rule>
  Meeting meet(const Part& part, int64_t sample, int64_t* number, bool keys_first, Rule&& rule) const {
    Order own{own_tokens}, other{other_tokens};
    const auto classes = [&](auto&& function) {
      const Sequence queries = part.queries(*number), keys = part.keys(*number);
      keys_first ? function(keys, queries) : function(queries, keys);
    };
    for (; *number < part.num_classes() && own.count < kSquare; ++*number)
      classes([&](const Sequence& mine, const Sequence& theirs) {
        this->intervals(mine, 0, mine.count, theirs, sample, rule, active + own.count);
        for (Interval* seen = active + own.count; seen < active + own.count + mine.count; ++seen)
          *seen = {seen->first + other.count, seen->last + other.count};
        own.add(mine, mine.count);
        other.add(theirs, theirs.count);
        own.count = own.known, other.count = other.known;
      });
    if (*number < part.num_classes())
      classes([&](const Sequence& mine, const Sequence& theirs) {
        own.add(mine, kAhead);
        other.add(theirs, kAhead);
      });
    return {own, other, active};
  }

  // Rows `first` to `first + count`, and zeros up to `padded` rows.
  void gather(const Operand& x, int64_t sample, int64_t head, const Order& order, int64_t first, int64_t count,
              int64_t padded, uint16_t* to) const {
    const uint16_t* base = at(x, sample, head, 0);
    const int64_t size = call.width, columns = width, step = x.token;
    Halves seen = special;
    for (int64_t row = first; row < first + count; ++row, to += columns) {
      prefetch(base + order.ahead(row) * step, size * sizeof(Element));
      const uint16_t* from = base + order.token(row) * step;
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) {
        const Halves some = *reinterpret_cast<const Halves*>(from + i);
        *reinterpret_cast<Halves*>(to + i) = some;
        seen |= (Halves)((some & 0x7f80) == 0x7f80);
      }
      for (; i < size; ++i) {
        to[i] = from[i];
        seen[0] |= (from[i] & 0x7f80) == 0x7f80;
      }
      if (i < columns) clear(to, i, columns);
    }
    special = seen;
    clear(to, 0, (padded - count) * columns);
  }
};

#endif

}  // namespace
