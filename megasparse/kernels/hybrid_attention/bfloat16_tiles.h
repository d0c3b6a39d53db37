// Attention of bfloat16 in tile registers (../common/tile_registers.h), forward and backward: the passes of attention.cpp
// where the processor multiplies tiles. Queries, keys, values and dout are multiplied as they are; the weights and the
// gradients of the scores are rounded to bfloat16 for their products; all else is float32.
//
// Everything is padded to squares of 32 x 32, which are 2 x 2 registers. Of a block of 32 tokens, the second factor of a
// product is packed as columns, [cell of the head dimension][32 tokens], where it is summed over the head dimension, and
// as pairs, [pair of tokens][head dimension], where it is summed over the tokens.
//
// A 0 that no query sees is multiplied with all that stands in its square. So these passes want finite numbers: a head
// with an infinity or NaN is left to the others, where that reaches no further than a few rows.

#pragma once

#include "../common/tile_registers.h"
#include "parts.h"

namespace {

#if defined(MEGASPARSE_HAS_TILES)

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
  using Rows::at, Rows::call, Rows::row, Rows::width;
  int32_t *own_tokens, *other_tokens;  // of a part
  Interval* active;
  uint16_t* gathered;           // 32 rows
  mutable Halves special = {};  // not 0 once an infinity or NaN was gathered

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

  // The next classes of a part, together, until they have `enough` tokens: few would leave most of a square empty.
  template <class Rule>
  Meeting meet(const Part& part, int64_t sample, int64_t* number, bool keys_first, int64_t enough, Rule&& rule) const {
    Order own{own_tokens}, other{other_tokens};
    const auto classes = [&](auto&& function) {
      const Sequence queries = part.queries(*number), keys = part.keys(*number);
      keys_first ? function(keys, queries) : function(queries, keys);
    };
    for (; *number < part.num_classes() && own.count < enough; ++*number)
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
      prefetch(base + order.ahead(row) * step, size * 2);
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

// ---- forward ----

struct TileForward : TilePass<ForwardPass<BFloat16>> {
  using Base = TilePass<ForwardPass<BFloat16>>;
  static constexpr int64_t kTile = 32;  // queries
  uint32_t *keys, *values;  // of the part: columns, and pairs
  uint16_t *queries, *weights;  // of the tile
  float *scores, *out;

  TileForward(const Call& call, Memory memory) : Base(call, memory) {
    for (uint32_t** rows : {&keys, &values}) *rows = take<uint32_t>(memory, padded_length(call) * width / 2);
    queries = take<uint16_t>(memory, kTile * width);
    weights = take<uint16_t>(memory, kTile * kRoundedStride);
    scores = memory.take(kTile * kScoreStride);
    out = memory.take(kTile * row);
  }

  static int64_t size(const Call& call) {
    return Base::size(call) + padded_width(call) * (padded_length(call) + kTile / 2) +
           kTile * (kRoundedStride / 2 + kScoreStride + call.row()) + 6 * 16;
  }

  bool head(int64_t sample, int64_t head) const {
    special = Halves{};
    compute_head(*this, sample, head);
    return all_finite();
  }

  void add_part(int64_t sample, int64_t head, int64_t key_head, const Part& part, bool joined, bool finishes) const {
    for (int64_t number = 0; number < part.num_classes();) {
      const auto rule = [&](int64_t query) { return part.keys_of(query); };
      const Meeting meeting = meet(part, sample, &number, false, kSquare, rule);
      pack_keys(sample, key_head, meeting.other);
      for (int64_t first = 0; first < meeting.own.count; first += kTile)
        tile(sample, head, meeting.own, meeting.active + first, first, joined, finishes);
    }
  }

  void pack_keys(int64_t sample, int64_t head, const Order& order) const {
    for (int64_t first = 0; first < order.count; first += kSquare) {
      const int64_t count = std::min(kSquare, order.count - first);
      gather(call.k, sample, head, order, first, count, kSquare, gathered);
      pack_columns(gathered, width, keys + first * width / 2);
      gather(call.v, sample, head, order, first, count, kSquare, gathered);
      pack_pairs(gathered, width, values + first * width / 2);
    }
  }

  void tile(int64_t sample, int64_t head, const Order& own, const Interval* active, int64_t first, bool joined,
            bool finishes) const {
    const int64_t count = std::min(kTile, own.count - first);
    const SquareRows all(active, 0, count);
    if (all.columns.empty() && !finishes) return;
    gather(call.q, sample, head, own, first, count, round_up(count, kTileSide), queries);
    float top[kTile], sum[kTile];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = own.token(first + i);
      top[i] = joined ? tops[token] : -kInfinity;
      sum[i] = joined ? sums[token] : 0.0f;
      if (joined)
        std::memcpy(out + i * row, state + token * row, width * sizeof(float));
      else
        clear(out + i * row, 0, width);
    }
    for (int64_t from = all.columns.first; from < all.columns.last; from += kMostColumns) {
      const int64_t columns = std::min(kMostColumns, all.columns.last - from);
      for (int64_t column = 0; column < columns; column += kSquare)
        multiply_tiles(count, queries, width, keys + (from + column) * width / 2, kSquare, width / 2, scores + column,
                       kScoreStride, false);
      for (int64_t i = 0; i < count; ++i)
        weigh_row(active[i].within(from, from + columns), from, columns, i, top[i], sum[i]);
      for (int64_t column = 0; column < width; column += kSquare)
        multiply_tiles(count, weights, kRoundedStride, values + from / 2 * width + column, width, columns / 2, out + column,
                       row, true);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = own.token(first + i);
      if (finishes) {
        write_out(sample, head, token, own.ahead(first + i), out + i * row, top[i], sum[i]);
      } else {
        std::memcpy(state + token * row, out + i * row, width * sizeof(float));
        tops[token] = top[i];
        sums[token] = sum[i];
      }
    }
  }

  // Row i of the weights 2^(score - maximum), 0 where inactive, and scales what is summed already.
  void weigh_row(Interval seen, int64_t from, int64_t columns, int64_t i, float& top, float& sum) const {
    float* x = scores + i * kScoreStride - from;
    uint16_t* rounded = weights + i * kRoundedStride - from;
    if (seen.empty()) return clear(rounded, from, from + columns);
    const Interval vectors = mask_row(seen, x);
    Vector most = load(x + vectors.first);
    for (int64_t j = vectors.first + kLanes; j < vectors.last; j += kLanes) {
      const Vector value = load(x + j);
      most = value > most ? value : most;
    }
    const float scale = call.scale * kLog2E, maximum = std::max(top, largest_of(most) * scale);
    const Vector factor = broadcast(scale), shift = broadcast(-maximum);
    Vector total = {};
    for (int64_t j = vectors.first; j < vectors.last; j += kLanes) {
      const Vector weight = power_of_2(multiply_add(shift, load(x + j), factor));
      BFloat16::narrow_normal(rounded + j, weight);
      total += weight;
    }
    clear(rounded, from, vectors.first);
    clear(rounded, vectors.last, from + columns);
    if (top != maximum) {
      const float earlier = power_of_2(top - maximum);
      for (int64_t j = 0; j < width; j += kLanes) store(out + i * row + j, load(out + i * row + j) * earlier);
      sum *= earlier;
      top = maximum;
    }
    sum += total_of(total);
  }
};

// ---- backward ----

struct TileBackward : TilePass<BackwardPass<BFloat16>> {
  using Base = TilePass<BackwardPass<BFloat16>>;
  static constexpr int64_t kTile = 64;  // keys
  uint32_t *query_columns, *query_pairs, *dout_columns, *dout_pairs;  // of the part
  float *lse, *deltas;                                                // of the part
  float* dq_columns;                                                  // of the part: [32 queries][width][query]
  uint16_t *keys, *values;                                            // of the tile
  uint32_t *key_pairs, *key_columns;                                  // of the tile: pairs of 32, and [width][pair]
  float *scores, *score_gradients;                                    // of 32 keys
  uint16_t *weights, *dscores;                                        // of the tile, rounded
  uint32_t* dscore_pairs;                                             // the same, [pair of keys][query]
  float *dkeys, *dvalues;                                             // of the tile

  TileBackward(const Call& call, Memory memory) : Base(call, memory) {
    const int64_t length = padded_length(call);
    for (uint32_t** rows : {&query_columns, &query_pairs, &dout_columns, &dout_pairs})
      *rows = take<uint32_t>(memory, length * width / 2);
    for (float** column : {&lse, &deltas}) *column = memory.take(length);
    dq_columns = memory.take(length * width);
    for (uint16_t** rows : {&keys, &values}) *rows = take<uint16_t>(memory, kTile * width);
    key_pairs = take<uint32_t>(memory, kSquarePairs * width);
    key_columns = take<uint32_t>(memory, kTile / 2 * width);
    for (float** rows : {&scores, &score_gradients}) *rows = memory.take(kSquare * kScoreStride);
    for (uint16_t** rows : {&weights, &dscores}) *rows = take<uint16_t>(memory, kTile * kRoundedStride);
    dscore_pairs = take<uint32_t>(memory, kTile / 2 * kScoreStride);
    for (float** rows : {&dkeys, &dvalues}) *rows = memory.take(kTile * row);
  }

  static int64_t size(const Call& call) {
    const int64_t width = padded_width(call), length = padded_length(call);
    return Base::size(call) + length * (3 * width + 2) + (kSquarePairs + kTile + kTile / 2) * width +
           2 * kSquare * kScoreStride + kTile * (kRoundedStride + kScoreStride / 2 + 2 * call.row()) + 18 * 16;
  }

  bool head(int64_t sample, int64_t key_head) const {
    special = Halves{};
    compute_gradients(*this, sample, key_head);
    return all_finite();
  }

  void add_part(int64_t sample, int64_t head, int64_t key_head, const Part& part, bool joined, bool finishes) const {
    for (int64_t number = 0; number < part.num_classes();) {
      const auto rule = [&](int64_t key) { return part.queries_of(key); };
      const Meeting meeting = meet(part, sample, &number, true, kSquare, rule);
      pack_queries(sample, head, meeting.other);
      for (int64_t first = 0; first < meeting.own.count; first += kTile)
        tile(sample, key_head, meeting.own, meeting.active + first, first, joined, finishes);
      add_query_gradients(meeting.other);
    }
  }

  void pack_queries(int64_t sample, int64_t head, const Order& tokens) const {
    const float* given = call.lse + (sample * call.heads + head) * call.length;
    for (int64_t first = 0; first < tokens.count; first += kSquare) {
      const int64_t count = std::min(kSquare, tokens.count - first), at = first * width / 2;
      gather(call.q, sample, head, tokens, first, count, kSquare, gathered);
      pack_columns(gathered, width, query_columns + at);
      pack_pairs(gathered, width, query_pairs + at);
      gather(call.dout, sample, head, tokens, first, count, kSquare, gathered);
      pack_columns(gathered, width, dout_columns + at);
      pack_pairs(gathered, width, dout_pairs + at);
      for (int64_t i = 0; i < kSquare; ++i) {
        lse[first + i] = i < count ? given[tokens.token(first + i)] : 0.0f;
        deltas[first + i] = i < count ? delta[tokens.token(first + i)] : 0.0f;
      }
    }
    clear(dq_columns, 0, round_up(tokens.count, kSquare) * width);
  }

  // Adds the gradients of a part to those of the head.
  void add_query_gradients(const Order& tokens) const {
    alignas(64) uint32_t square[kTileSide * kTileSide];
    const float* sums = reinterpret_cast<const float*>(square);
    for (int64_t first = 0; first < tokens.count; first += kTileSide) {
      const float* columns = dq_columns + round_down(first, kSquare) * width + first % kSquare;
      for (int64_t part = 0; part < width; part += kTileSide) {
        transpose(reinterpret_cast<const uint32_t*>(columns + part * kSquare), kSquare, square, kTileSide);
        for (int64_t i = 0; i < std::min(kTileSide, tokens.count - first); ++i) {
          float* to = dq + tokens.token(first + i) * row + part;
          for (int64_t j = 0; j < kTileSide; j += kLanes) store(to + j, load(to + j) + load(sums + i * kTileSide + j));
        }
      }
    }
  }

  void pack_tile(int64_t sample, int64_t key_head, const Order& own, int64_t first, int64_t count) const {
    const int64_t padded = round_up(count, kSquare);
    gather(call.k, sample, key_head, own, first, count, padded, keys);
    gather(call.v, sample, key_head, own, first, count, padded, values);
    for (int64_t top = 0; top < count; top += kSquare) {
      pack_pairs(keys + top * width, width, key_pairs);
      for (int64_t column = 0; column < width; column += kTileSide)
        transpose(key_pairs + column, width, key_columns + (column * kTile + top) / 2, kTile / 2);
    }
  }

  void tile(int64_t sample, int64_t key_head, const Order& own, const Interval* active, int64_t first, bool joined,
            bool finishes) const {
    const int64_t count = std::min(kTile, own.count - first);
    static_assert(kTile == 2 * kSquare);
    const SquareRows halves[] = {{active, 0, count}, {active, std::min(kSquare, count), count}};
    const Interval all{std::min(halves[0].columns.first, halves[1].columns.first),
                       std::max(halves[0].columns.last, halves[1].columns.last)};
    if (all.empty() && !finishes) return;
    pack_tile(sample, key_head, own, first, count);
    for (int64_t i = 0; i < count; ++i)
      for (const auto& [sums, kept] : {std::pair{dkeys, dk}, std::pair{dvalues, dv}}) {
        if (joined)
          std::memcpy(sums + i * row, kept + own.token(first + i) * row, width * sizeof(float));
        else
          clear(sums + i * row, 0, width);
      }
    for (int64_t from = all.first; from < all.last; from += kMostColumns) {
      for (const SquareRows& half : halves) {
        const Interval columns = half.columns.within(from, from + kMostColumns);
        if (!columns.empty()) add_to_keys(half, columns, active, from);
      }
      add_to_queries(halves, all.within(from, from + kMostColumns), from);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = own.token(first + i);
      if (finishes) {
        write_key_gradients(sample, key_head, token, own.ahead(first + i), dkeys + i * row, dvalues + i * row);
      } else {
        std::memcpy(dk + token * row, dkeys + i * row, width * sizeof(float));
        std::memcpy(dv + token * row, dvalues + i * row, width * sizeof(float));
      }
    }
  }

  // The weights and the gradients of the scores of at most 32 keys, and what the queries of these columns give the keys.
  void add_to_keys(const SquareRows& half, Interval columns, const Interval* active, int64_t from) const {
    const int64_t top = half.top, rows = half.rows, count = columns.last - columns.first;
    for (int64_t column = columns.first; column < columns.last; column += kSquare) {
      multiply_tiles(rows, keys + top * width, width, query_columns + column * width / 2, kSquare, width / 2,
                     scores + column - from, kScoreStride, false);
      multiply_tiles(rows, values + top * width, width, dout_columns + column * width / 2, kSquare, width / 2,
                     score_gradients + column - from, kScoreStride, false);
    }
    for (int64_t i = 0; i < kSquare; ++i)
      weigh_row(i < rows ? active[top + i].within(columns.first, columns.last) : Interval{0, 0}, columns, from, i, top);
    for (int64_t i = top / 2; i < (top + kSquare) / 2; ++i)
      for (int64_t j = columns.first - from; j < columns.last - from; j += kLanes)
        *reinterpret_cast<Cells*>(dscore_pairs + i * kScoreStride + j) =
            pair_up(dscores + 2 * i * kRoundedStride + j, dscores + (2 * i + 1) * kRoundedStride + j);
    const int64_t at = top * kRoundedStride + columns.first - from, pairs = columns.first / 2 * width;
    for (int64_t part = 0; part < width; part += kSquare) {
      multiply_tiles(rows, weights + at, kRoundedStride, dout_pairs + pairs + part, width, count / 2,
                     dvalues + top * row + part, row, true);
      multiply_tiles(rows, dscores + at, kRoundedStride, query_pairs + pairs + part, width, count / 2,
                     dkeys + top * row + part, row, true);
    }
  }

  void weigh_row(Interval seen, Interval columns, int64_t from, int64_t i, int64_t top) const {
    float *x = scores + i * kScoreStride - from, *dx = score_gradients + i * kScoreStride - from;
    uint16_t* weight_row = weights + (top + i) * kRoundedStride - from;
    uint16_t* gradient_row = dscores + (top + i) * kRoundedStride - from;
    const Interval vectors = seen.empty() ? Interval{columns.first, columns.first} : mask_row(seen, x);
    const Vector factor = broadcast(call.scale * kLog2E);
    const float *shift = lse, *mean = deltas;
    for (int64_t j = vectors.first; j < vectors.last; j += kLanes) {
      const Vector weight = power_of_2(multiply_add(-load(shift + j), load(x + j), factor));
      BFloat16::narrow_normal(weight_row + j, weight);
      BFloat16::narrow_normal(gradient_row + j, weight * (load(dx + j) - load(mean + j)));
    }
    for (uint16_t* inactive : {weight_row, gradient_row}) {
      clear(inactive, columns.first, vectors.first);
      clear(inactive, vectors.last, columns.last);
    }
  }

  // What the keys of the tile give the gradients of the queries of these columns.
  void add_to_queries(const SquareRows (&halves)[2], Interval columns, int64_t from) const {
    for (int64_t column = columns.first; column < columns.last; column += kSquare) {
      const auto sees = [&](int half) { return !halves[half].columns.within(column, column + kSquare).empty(); };
      const int64_t first = sees(0) ? 0 : kSquarePairs, last = sees(1) ? 2 * kSquarePairs : kSquarePairs;
      if (first >= last) continue;
      for (int64_t part = 0; part < width; part += kSquare)
        multiply_tiles(kSquare, reinterpret_cast<const uint16_t*>(key_columns + part * kTile / 2 + first), kTile,
                       dscore_pairs + first * kScoreStride + column - from, kScoreStride, last - first,
                       dq_columns + column * width + part * kSquare, kSquare, true);
    }
  }
};

#else

struct TileForward;
struct TileBackward;

#endif

}  // namespace
