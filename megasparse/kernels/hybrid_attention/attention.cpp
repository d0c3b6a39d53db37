// Hybrid sparse attention for CPUs, forward and backward. cpu.py calls it; the patterns are defined in patterns.py.
//
// Patterns come in parts (parts.h). A tile of queries against its keys is a small dense product of which only the
// register tiles with an active pair are computed. The forward pass walks tiles of queries, the backward pass tiles of
// keys, which see an interval of queries each: there the gradients of a tile's keys are summed in place and only that of
// the queries is added up in memory.
//
// bfloat16 is multiplied in the tile registers of AMX where there are any (bfloat16_tiles.h); elsewhere it is widened as it
// is packed, as float16 is.
//
// Scores are logarithms to the base 2: queries are multiplied by log2(e) together with the scale. Sums are float32.
// A head is computed by one thread in a fixed order: results do not depend on the number of threads.

#include "bfloat16_backward.h"
#include "bfloat16_forward.h"
#include "parts.h"
#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t kTile = 24;        // queries of a forward tile, keys of a backward one: a multiple of kMaxRows
constexpr int64_t kColumns = 192;    // scores of a tile's row that are in work at a time: a multiple of kWidth
constexpr int64_t kColumnStride = kColumns + 16;

// Rows that are computed together, and the columns that any of them sees.
struct Group {
  int64_t top, rows;
  Interval columns;
};

// The rows of a tile in groups of nearly equal height, each at most kMaxRows.
struct Groups {
  Group list[kTile];
  int64_t count;
  Interval columns;  // of all

  Groups(const Interval* active, int64_t rows) : count((rows + kMaxRows - 1) / kMaxRows), columns(none()) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t top = i * rows / count, bottom = (i + 1) * rows / count;
      Interval all = none();
      for (int64_t row = top; row < bottom; ++row)
        if (!active[row].empty()) all = {std::min(all.first, active[row].first), std::max(all.last, active[row].last)};
      list[i] = {top, bottom - top, all};
      columns = {std::min(columns.first, all.first), std::max(columns.last, all.last)};
    }
  }
  static Interval none() { return {std::numeric_limits<int64_t>::max(), 0}; }
};

// scores[row][column - from] = a[row] . (column of the panels), for the columns [from, to) that the groups see.
inline void multiply_panels(const Groups& groups, int64_t from, int64_t to, const float* a, int64_t a_row,
                            const float* panels, int64_t width, float* scores) {
  for (int64_t column = from; column < to; column += kWidth)
    for (int64_t i = 0; i < groups.count; ++i) {
      const Group& group = groups.list[i];
      if (group.columns.within(column, column + kWidth).empty()) continue;
      with_rows(group.rows, [&](auto rows) {
        multiply<rows.value>(a + group.top * a_row, a_row, 1, panels + column * width, kWidth, width,
                             scores + group.top * kColumnStride + column - from, kColumnStride, false);
      });
    }
}

// c[row] += the sum of weights[row][column - from] * b[column] over the columns [from, to) that the row's group sees.
inline void add_weighted_rows(const Groups& groups, int64_t from, int64_t to, const float* weights, const float* b,
                              int64_t b_row, int64_t width, float* c, int64_t c_row) {
  for (int64_t part = 0; part < width; part += kWidth)
    for (int64_t i = 0; i < groups.count; ++i) {
      const Group& group = groups.list[i];
      const Interval columns = group.columns.within(from, to);
      if (columns.empty()) continue;
      with_rows(group.rows, [&](auto rows) {
        multiply<rows.value>(weights + group.top * kColumnStride + columns.first - from, kColumnStride, 1,
                             b + columns.first * b_row + part, b_row, columns.last - columns.first,
                             c + group.top * c_row + part, c_row, true);
      });
    }
}

// ---- forward ----

template <class Type>
struct Forward : ForwardPass<Type> {
  using Base = ForwardPass<Type>;
  using Base::at, Base::call, Base::row, Base::width, Base::state, Base::tops, Base::sums;
  float *panels, *values;           // keys transposed and values of the class
  float *queries, *scores, *alone;  // of the tile; its weighted values where no other part joins

  Forward(const Call& call, Memory memory) : Base(call, memory) {
    const int64_t length = call.padded_length();
    panels = memory.take(length * width);
    values = memory.take(length * row);
    queries = memory.take(kTile * row);
    scores = memory.take(kTile * kColumnStride);
    alone = memory.take(kTile * row);
  }

  static int64_t size(const Call& call) {
    const int64_t row = call.row(), length = call.padded_length();
    return Base::size(call) + length * (call.padded_width() + row) + kTile * (2 * row + kColumnStride) + 5 * 16;
  }

  void head(int64_t sample, int64_t head) const { compute_head(*this, sample, head); }

  void add_part(int64_t sample, int64_t head, int64_t key_head, const Part& part, bool joined, bool finishes) const {
    for (int64_t number = 0; number < part.num_classes(); ++number) {
      const Sequence own = part.queries(number), keys = part.keys(number);
      pack_keys(sample, key_head, keys);
      for (int64_t first = 0; first < own.count; first += kTile)
        tile(sample, head, part, own, keys, first, joined, finishes);
    }
  }

  void pack_keys(int64_t sample, int64_t head, const Sequence& keys) const {
    for (int64_t first = 0; first < keys.count; first += kWidth) {
      const int64_t count = std::min(kWidth, keys.count - first), padded = round_up(count, kLanes);
      float* rows = values + first * row;  // the keys are transposed before the values take their place
      this->gather(call.k, sample, head, keys, first, count, padded, 1.0f, rows);
      transpose_rows(rows, row, padded, width, 1.0f, panels + first * width);
      this->gather(call.v, sample, head, keys, first, count, padded, 1.0f, rows);
    }
  }

  void tile(int64_t sample, int64_t head, const Part& part, const Sequence& own, const Sequence& keys, int64_t first,
            bool joined, bool finishes) const {
    const int64_t count = std::min(kTile, own.count - first);
    Interval active[kTile];
    this->intervals(own, first, count, keys, sample, [&](int64_t query) { return part.keys_of(query); }, active);
    const Groups groups(active, count);
    if (groups.columns.empty() && !finishes) return;
    this->gather(call.q, sample, head, own, first, count, count, call.scale * kLog2E, queries);
    float top[kTile], sum[kTile];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = own.token(first + i);
      top[i] = joined ? tops[token] : -kInfinity;
      sum[i] = joined ? sums[token] : 0.0f;
      if (!joined) clear(alone + i * row, 0, width);
    }
    float* out = joined ? state + own.token(first) * row : alone;
    const int64_t out_row = joined ? own.step * row : row;
    for (int64_t from = round_down(groups.columns.first, kWidth); from < groups.columns.last; from += kColumns) {
      const int64_t to = std::min(from + kColumns, groups.columns.last);
      multiply_panels(groups, from, to, queries, row, panels, width, scores);
      for (int64_t i = 0; i < groups.count; ++i) weigh(groups.list[i], active, from, to, top, sum, out, out_row);
      add_weighted_rows(groups, from, to, scores, values, row, width, out, out_row);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = own.token(first + i);
      if (finishes) {
        this->write_out(sample, head, token, own.token(first + i + kAhead), out + i * out_row, top[i], sum[i]);
      } else {
        tops[token] = top[i];
        sums[token] = sum[i];
      }
    }
  }

  // Turns the scores of a group into weights 2^(score - maximum), 0 where inactive, and scales what is summed already.
  void weigh(const Group& group, const Interval* active, int64_t from, int64_t to, float* top, float* sum, float* out,
             int64_t out_row) const {
    const Interval columns = group.columns.within(from, to);
    for (int64_t i = group.top; i < group.top + group.rows; ++i) {
      float* x = scores + i * kColumnStride - from;
      const Interval seen = active[i].within(from, to);
      if (seen.empty()) {
        clear(x, columns.first, columns.last);
        continue;
      }
      const Interval vectors = mask_row(seen, x);
      Vector most = load(x + vectors.first);
      for (int64_t j = vectors.first + kLanes; j < vectors.last; j += kLanes) {
        const Vector value = load(x + j);
        most = value > most ? value : most;
      }
      const float maximum = std::max(top[i], maximum_of(most));
      const Vector shift = broadcast(maximum);
      Vector total = {};
      for (int64_t j = vectors.first; j < vectors.last; j += kLanes) {
        const Vector weight = power_of_2(load(x + j) - shift);
        store(x + j, weight);
        total += weight;
      }
      clear(x, columns.first, vectors.first);
      clear(x, vectors.last, columns.last);
      const float factor = power_of_2(top[i] - maximum);
      rescale(factor, out + i * out_row);
      sum[i] = sum[i] * factor + sum_of(total);
      top[i] = maximum;
    }
  }

  void rescale(float factor, float* x) const {
    if (factor == 1.0f) return;
    for (int64_t column = 0; column < width; column += kLanes) store(x + column, load(x + column) * factor);
  }
};

// ---- backward ----

template <class Type>
struct Backward : BackwardPass<Type> {
  using Base = BackwardPass<Type>;
  using Base::at, Base::call, Base::row, Base::width, Base::delta, Base::dq, Base::dk, Base::dv;
  float *queries, *douts;                    // of the class, rows
  float *query_panels, *dout_panels;         // the same transposed; queries scaled
  float *lse, *deltas;                       // of the class
  float *keys, *values, *weights, *dscores;  // of the tile
  float *dkeys_alone, *dvalues_alone;        // of the tile, where no other part or head joins

  Backward(const Call& call, Memory memory) : Base(call, memory) {
    const int64_t length = call.padded_length();
    for (float** rows : {&queries, &douts}) *rows = memory.take(length * row);
    for (float** rows : {&query_panels, &dout_panels}) *rows = memory.take(length * width);
    for (float** column : {&lse, &deltas}) *column = memory.take(length);
    for (float** rows : {&keys, &values, &dkeys_alone, &dvalues_alone}) *rows = memory.take(kTile * row);
    for (float** rows : {&weights, &dscores}) *rows = memory.take(kTile * kColumnStride);
  }

  static int64_t size(const Call& call) {
    const int64_t row = call.row(), length = call.padded_length();
    return Base::size(call) + length * (2 * row + 2 * call.padded_width() + 2) +
           kTile * (4 * row + 2 * kColumnStride) + 12 * 16;
  }

  void head(int64_t sample, int64_t key_head) const { compute_gradients(*this, sample, key_head); }

  void add_part(int64_t sample, int64_t head, int64_t key_head, const Part& part, bool joined, bool finishes) const {
    for (int64_t number = 0; number < part.num_classes(); ++number) {
      const Sequence own = part.keys(number), other = part.queries(number);
      if (!own.count) continue;
      pack_queries(sample, head, other);
      for (int64_t first = 0; first < own.count; first += kTile)
        tile(sample, key_head, part, own, other, first, joined, finishes);
    }
  }

  void pack_queries(int64_t sample, int64_t head, const Sequence& tokens) const {
    const float* given = call.lse + (sample * call.heads + head) * call.length;
    const float factor = call.scale * kLog2E;
    for (int64_t first = 0; first < tokens.count; first += kWidth) {
      const int64_t count = std::min(kWidth, tokens.count - first), padded = round_up(count, kLanes);
      this->gather(call.q, sample, head, tokens, first, count, padded, 1.0f, queries + first * row);
      transpose_rows(queries + first * row, row, padded, width, factor, query_panels + first * width);
      this->gather(call.dout, sample, head, tokens, first, count, padded, 1.0f, douts + first * row);
      transpose_rows(douts + first * row, row, padded, width, 1.0f, dout_panels + first * width);
      for (int64_t i = 0; i < padded; ++i) {
        lse[first + i] = i < count ? given[tokens.token(first + i)] : 0.0f;
        deltas[first + i] = i < count ? delta[tokens.token(first + i)] : 0.0f;
      }
    }
  }

  void tile(int64_t sample, int64_t key_head, const Part& part, const Sequence& own, const Sequence& other,
            int64_t first, bool joined, bool finishes) const {
    const int64_t count = std::min(kTile, own.count - first);
    Interval active[kTile];
    this->intervals(own, first, count, other, sample, [&](int64_t key) { return part.queries_of(key); }, active);
    const Groups groups(active, count);
    if (groups.columns.empty() && !finishes) return;
    this->gather(call.k, sample, key_head, own, first, count, count, 1.0f, keys);
    this->gather(call.v, sample, key_head, own, first, count, count, 1.0f, values);
    float* dkeys = joined ? dk + own.token(first) * row : dkeys_alone;
    float* dvalues = joined ? dv + own.token(first) * row : dvalues_alone;
    const int64_t sum_row = joined ? own.step * row : row;
    if (!joined)
      for (float* rows : {dkeys, dvalues}) clear(rows, 0, count * row);
    for (int64_t from = round_down(groups.columns.first, kWidth); from < groups.columns.last; from += kColumns) {
      const int64_t to = std::min(from + kColumns, groups.columns.last);
      multiply_panels(groups, from, to, keys, row, query_panels, width, weights);
      multiply_panels(groups, from, to, values, row, dout_panels, width, dscores);
      for (int64_t i = 0; i < count; ++i) weigh_row(active[i], from, to, i);
      add_weighted_rows(groups, from, to, weights, douts, row, width, dvalues, sum_row);
      add_weighted_rows(groups, from, to, dscores, queries, row, width, dkeys, sum_row);
      add_to_queries(active, count, groups.columns.within(from, to), from, other);
    }
    for (int64_t i = 0; finishes && i < count; ++i) {
      const int64_t token = own.token(first + i);
      this->write_key_gradients(sample, key_head, token, own.token(first + i + kAhead), dkeys + i * sum_row,
                                dvalues + i * sum_row);
    }
  }

  // Row i of the weights and of the gradients of the scores; 0 where inactive.
  void weigh_row(Interval active, int64_t from, int64_t to, int64_t i) const {
    float* x = weights + i * kColumnStride - from;
    float* dx = dscores + i * kColumnStride - from;
    const Interval seen = active.within(from, to);
    const Interval vectors = seen.empty() ? Interval{from, from} : mask_row(seen, x);
    const float *shift = lse, *mean = deltas;
    for (int64_t j = vectors.first; j < vectors.last; j += kLanes) {
      const Vector weight = power_of_2(load(x + j) - load(shift + j));
      store(x + j, weight);
      store(dx + j, weight * (load(dx + j) - load(mean + j)));
    }
    for (float* inactive : {x, dx}) {
      clear(inactive, from, vectors.first);
      clear(inactive, vectors.last, to);
    }
  }

  // Adds to the gradient of the queries what the keys of the tile give them. Intervals never begin or end earlier than
  // those of the keys before.
  void add_to_queries(const Interval* active, int64_t count, Interval columns, int64_t from, const Sequence& other) const {
    int64_t first = 0, last = 0;  // keys that the queries see
    const int64_t step = other.step * row;
    for (int64_t top = columns.first; top < columns.last; top += kMaxRows) {
      const int64_t bottom = std::min(top + kMaxRows, columns.last);
      while (first < count && active[first].last <= top) ++first;
      while (last < count && active[last].first < bottom) ++last;
      if (first >= last) continue;
      with_rows(bottom - top, [&](auto rows) {
        for (int64_t part = 0; part < width; part += kWidth)
          multiply<rows.value>(dscores + first * kColumnStride + top - from, 1, kColumnStride, keys + first * row + part,
                               row, last - first, dq + other.token(top) * row + part, step, true);
      });
    }
  }
};

// A pass in tiles, and the one for the heads that turn out not to suit it.
template <class Tiles, class Vectors>
struct Either {
  TileRegisters registers;
  Tiles tiles;
  Vectors vectors;

  Either(const Call& call, Memory memory) : tiles(call, memory), vectors(call, memory) {}
  static int64_t size(const Call& call) { return std::max(Tiles::size(call), Vectors::size(call)); }

  void head(int64_t sample, int64_t head) const {
    if (!tiles.head(sample, head)) vectors.head(sample, head);
  }
};

template <class Kernel>
struct Chosen {
  using type = Kernel;
};

// Calls function(Chosen<a pass for this type of elements>).
template <template <class> class Vectors, class Tiles, class Function>
auto with_kernel(const Call& call, Function&& function) {
#if defined(MEGASPARSE_HAS_TILES)
  static const bool has_tiles = ask_for_tiles();
  if (call.type == 1 && has_tiles && call.length >= kShortestInTiles && call.width >= kNarrowestInTiles)
    return function(Chosen<Either<Tiles, Vectors<BFloat16>>>{});
#endif
  if (call.type == 1) return function(Chosen<Vectors<BFloat16>>{});
  if (call.type == 2) return function(Chosen<Vectors<Float16>>{});
  return function(Chosen<Vectors<Float32>>{});
}

template <template <class> class Vectors, class Tiles>
int64_t scratch(const Call& call) {
  return with_kernel<Vectors, Tiles>(call, [&](auto chosen) { return decltype(chosen)::type::size(call); });
}

// Heads (backward: key-value heads) are shared out among the threads.
template <template <class> class Vectors, class Tiles>
void compute(const Call& call, int64_t heads) {
  with_kernel<Vectors, Tiles>(call, [&](auto chosen) {
    using Kernel = typename decltype(chosen)::type;
#pragma omp parallel num_threads(call.threads)
    {
      const Kernel kernel(call, Memory{call.scratch + omp_get_thread_num() * Kernel::size(call)});
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < call.samples * heads; ++i) kernel.head(i / heads, i % heads);
    }
  });
}

}  // namespace

extern "C" {

// Floats of scratch memory that a thread needs.
int64_t megasparse_attention_scratch(const Call* call, int backward) {
  return backward ? scratch<Backward, TileBackward>(*call) : scratch<Forward, TileForward>(*call);
}

void megasparse_attention_forward(const Call* call) { compute<Forward, TileForward>(*call, call->heads); }
void megasparse_attention_backward(const Call* call) { compute<Backward, TileBackward>(*call, call->key_heads); }
}
