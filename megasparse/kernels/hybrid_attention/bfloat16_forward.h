// The forward pass of bfloat16_tiles.h: tiles of queries against the keys that they see, with a running maximum and sum.

#pragma once

#include "bfloat16_tiles.h"

namespace {

#if defined(MEGASPARSE_HAS_TILES)

struct TileForward : TilePass<ForwardPass<BFloat16>> {
  using Base = TilePass<ForwardPass<BFloat16>>;
  static constexpr int64_t kTile = 32;  // queries
  uint32_t *keys, *values;      // of the classes: columns, and pairs
  uint16_t *queries, *weights;  // of the tile, as are the next two
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
      const Meeting meeting = meet(part, sample, &number, false, rule);
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
        multiply_tiles(count, weights, kRoundedStride, values + from / 2 * width + column, width, columns / 2,
                       out + column, row, true);
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

#else

struct TileForward;

#endif

}  // namespace
