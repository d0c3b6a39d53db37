// The backward pass of bfloat16_tiles.h: tiles of keys against the queries that see them.
//
// Rows of scores are keys: log-sum-exp and delta then lie along a vector, and the weights and the gradients of the scores
// are, row for row, the first factors of the gradients of values and keys. The gradient of the queries is summed
// transposed, so that the same rows in pairs are its second factor.

#pragma once

#include "bfloat16_tiles.h"

namespace {

#if defined(MEGASPARSE_HAS_TILES)

struct TileBackward : TilePass<BackwardPass<BFloat16>> {
  using Base = TilePass<BackwardPass<BFloat16>>;
  static constexpr int64_t kTile = 64;  // keys
  uint32_t *query_columns, *query_pairs, *dout_columns, *dout_pairs;  // of the classes
  float *lse, *deltas;                                                // of the classes
  float* dq_columns;                                                  // of the classes: [32 queries][width][query]
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
      const Meeting meeting = meet(part, sample, &number, true, rule);
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

  // Adds the gradients of these queries to those of the head.
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

struct TileBackward;

#endif

}  // namespace
