// Hybrid sparse attention for CPUs, forward and backward. cpu.py calls it; the patterns are defined in patterns.py.
//
// A pattern is one or two parts. In each part the queries and the keys of a class (all tokens, those of equal position
// modulo the stride, or the last tokens of the blocks) are gathered, and every query sees an interval of its keys. So a
// tile of queries against its keys is a small dense product of which only the register tiles with an active pair are
// computed. Parts are joined by their maxima and sums; documents shorten the intervals.
//
// The forward pass walks tiles of queries, the backward pass tiles of keys, which see an interval of queries each: there
// the gradients of a tile's keys are summed in place and only that of the queries is added up in memory.
//
// Scores are logarithms to the base 2: queries are multiplied by log2(e) together with the scale. Sums are float32.
// A head is computed by one thread in a fixed order: results do not depend on the number of threads.

#include "tile_products.h"
#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t kTile = 24;        // queries of a forward tile, keys of a backward one: a multiple of kMaxRows
constexpr int64_t kColumns = 192;    // scores of a tile's row that are in work at a time: a multiple of kWidth
constexpr int64_t kColumnStride = kColumns + 16;
constexpr int64_t kAhead = 8;        // rows that are asked for before they are read
constexpr float kLog2E = 1.44269504f;

enum Pattern { kFull, kLocal, kStrided, kSparse, kFixed };  // the order of patterns.PATTERNS

// Tokens start, start + step, ...
struct Sequence {
  int64_t start, step, count;

  int64_t token(int64_t index) const { return start + index * step; }
  // Number of its tokens before this one.
  int64_t before(int64_t token) const {
    return token <= start ? 0 : std::min(count, (token - start + step - 1) / step);
  }
};

struct Interval {
  int64_t first, last;  // without last

  bool empty() const { return first >= last; }
  Interval within(int64_t from, int64_t to) const { return {std::max(first, from), std::min(last, to)}; }
};

// Which tokens meet, and which of them see each other.
struct Part {
  enum Kind { kWindow, kResidues, kFarResidues, kBlocks, kSummaries, kSelf } kind;
  int64_t stride, offset, length;

  bool by_residue() const { return kind == kResidues || kind == kFarResidues; }
  int64_t num_classes() const { return by_residue() ? std::min(stride, length) : 1; }
  Sequence every(int64_t start, int64_t step) const {
    return {start, step, start < length ? (length - start + step - 1) / step : 0};
  }
  Sequence queries(int64_t number) const { return by_residue() ? every(number, stride) : every(0, 1); }
  Sequence keys(int64_t number) const {
    if (by_residue()) return every((number + stride - offset) % stride, stride);
    return kind == kSummaries ? every(stride - 1 - offset, stride) : every(0, 1);
  }

  int64_t block_start(int64_t token) const { return (token + offset) / stride * stride - offset; }
  // The tokens that a query sees, as far as they are keys of its class.
  Interval keys_of(int64_t query) const {
    switch (kind) {
      case kWindow: return {query - stride + 1, query + 1};
      case kResidues: return {0, query + 1};
      case kFarResidues: return {0, query - stride + 1};
      case kBlocks: return {block_start(query), query + 1};
      case kSummaries: return {0, block_start(query)};
      default: return {query, query + 1};
    }
  }
  // The tokens that see a key, as far as they are queries of its class.
  Interval queries_of(int64_t key) const {
    switch (kind) {
      case kWindow: return {key, key + stride};
      case kResidues: return {key, length};
      case kFarResidues: return {key + stride, length};
      case kBlocks: return {key, block_start(key) + stride};
      case kSummaries: return {key + 1, length};
      default: return {key, key + 1};
    }
  }
};

// The parts of a pattern. In the last one, which finishes the rows, every token sees itself.
struct Parts {
  Part list[2];
  int count;

  Parts(int64_t pattern, int64_t stride, int64_t offset, int64_t length) : count(0) {
    const auto add = [&](Part::Kind kind, int64_t step) { list[count++] = Part{kind, step, offset, length}; };
    if (pattern == kFull) {
      offset = 0;
      add(Part::kResidues, 1);
    }
    if (pattern == kStrided) add(Part::kResidues, stride);
    if (pattern == kStrided && offset) add(Part::kSelf, stride);
    if (pattern == kSparse && stride < length) add(Part::kFarResidues, stride);
    if (pattern == kSparse || pattern == kLocal) add(Part::kWindow, stride);
    if (pattern == kFixed) {
      add(Part::kSummaries, stride);
      add(Part::kBlocks, stride);
    }
  }
};

// [samples, heads, tokens, width]; the strides of the first three, in elements.
struct Operand {
  void* data;
  int64_t sample, head, token;
};

// The arguments of a call; cpu.py has the same structure.
struct Call {
  int64_t type, samples, heads, key_heads, length, width, stride;
  const int64_t *patterns, *offsets;                   // of the query heads
  const int32_t *document_starts, *document_ends;      // [samples, tokens], or null
  Operand q, k, v, out, dout, dq, dk, dv;
  float* lse;                                          // [samples, heads, tokens], base 2
  float* scratch;
  int64_t threads;
  float scale;

  int64_t padded_width() const { return round_up(width, kWidth); }
  int64_t row() const { return round_up(padded_width(), 32) + 16; }  // an odd number of cache lines
  int64_t padded_length() const { return round_up(length, kWidth); }
};

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

// Sets the vectors of a row of scores that hold active columns to -inf outside of those; returns them as an interval.
inline Interval mask_row(Interval active, float* scores) {
  const Interval vectors{round_down(active.first, kLanes), round_up(active.last, kLanes)};
  const Vector inactive = broadcast(-kInfinity);
  float *head = scores + vectors.first, *tail = scores + vectors.last - kLanes;
  store(head, lane_numbers() < int32_t(active.first - vectors.first) ? inactive : load(head));
  store(tail, lane_numbers() < int32_t(active.last - vectors.last + kLanes) ? load(tail) : inactive);
  return vectors;
}

// Hands out pieces of a thread's memory.
struct Memory {
  float* next;
  float* take(int64_t size) {
    float* piece = next;
    next += round_up(size, 16);
    return piece;
  }
};

template <class Type>
struct Pass {
  using Element = typename Type::Element;
  const Call& call;
  const int64_t width, row;  // of packed rows: columns, and the distance between rows

  explicit Pass(const Call& call) : call(call), width(call.padded_width()), row(call.row()) {}

  static Element* at(const Operand& x, int64_t sample, int64_t head, int64_t token) {
    return static_cast<Element*>(x.data) + sample * x.sample + head * x.head + token * x.token;
  }

  template <int Write = 0>
  void expect(const Operand& x, int64_t sample, int64_t head, int64_t token) const {
    prefetch<Write>(at(x, sample, head, token), call.width * sizeof(Element));
  }

  // Rows `first` to `first + count` of a sequence, and zeros up to `padded` rows.
  void gather(const Operand& x, int64_t sample, int64_t head, const Sequence& tokens, int64_t first, int64_t count,
              int64_t padded, float factor, float* to) const {
    const int64_t step = tokens.step * x.token, size = call.width, columns = width, ld = row;
    const int64_t bytes = size * sizeof(Element), left = tokens.count - first;  // then comes the next class
    const Element* from = at(x, sample, head, tokens.token(first));
    for (int64_t i = 0; i < count; ++i) {
      prefetch(from + (i + kAhead < left ? (i + kAhead) * step : x.token + (i + kAhead - tokens.count) * step), bytes);
      widen_row<Type>(from + i * step, size, factor, columns, to + i * ld);
    }
    for (int64_t i = count; i < padded; ++i) clear(to + i * ld, 0, columns);
  }

  // What each of `count` queries (or keys) sees of the sequence on the other side.
  template <class Rule>
  void intervals(const Sequence& own, int64_t first, int64_t count, const Sequence& other, int64_t sample, Rule&& rule,
                 Interval* active) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = own.token(first + i);
      Interval seen = rule(token);
      if (call.document_starts)
        seen = seen.within(call.document_starts[sample * call.length + token],
                           call.document_ends[sample * call.length + token]);
      active[i] = {other.before(seen.first), other.before(seen.last)};
    }
  }
};

// ---- forward ----

template <class Type>
struct Forward : Pass<Type> {
  using Base = Pass<Type>;
  using Base::at, Base::call, Base::row, Base::width;
  float *panels, *values;              // keys transposed and values of the class
  float *state, *tops, *sums;          // what earlier parts gave each token: weighted values, maximum, sum of weights
  float *queries, *scores, *alone;     // of the tile; its weighted values where no other part joins

  Forward(const Call& call, Memory memory) : Base(call) {
    const int64_t length = call.padded_length();
    panels = memory.take(length * width);
    values = memory.take(length * row);
    state = memory.take(call.length * row);
    tops = memory.take(call.length);
    sums = memory.take(call.length);
    queries = memory.take(kTile * row);
    scores = memory.take(kTile * kColumnStride);
    alone = memory.take(kTile * row);
  }

  static int64_t size(const Call& call) {
    const int64_t row = call.row(), length = call.padded_length();
    return length * (call.padded_width() + 2 * row + 2) + kTile * (2 * row + kColumnStride) + 8 * 16;
  }

  void head(int64_t sample, int64_t head) const {
    const int64_t key_head = head / (call.heads / call.key_heads);
    const Parts parts(call.patterns[head], call.stride, call.offsets[head], call.length);
    if (parts.count > 1) {
      clear(state, 0, call.length * row);
      std::fill(tops, tops + call.length, -kInfinity);
      std::fill(sums, sums + call.length, 0.0f);
    }
    for (int p = 0; p < parts.count; ++p)
      for (int64_t number = 0; number < parts.list[p].num_classes(); ++number) {
        const Sequence own = parts.list[p].queries(number), keys = parts.list[p].keys(number);
        pack_keys(sample, key_head, keys);
        for (int64_t first = 0; first < own.count; first += kTile)
          tile(sample, head, parts.list[p], own, keys, first, parts.count > 1, p + 1 == parts.count);
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
        this->template expect<1>(call.out, sample, head, own.token(first + i + kAhead));
        narrow_row<Type>(out + i * out_row, call.width, 1.0f / sum[i], at(call.out, sample, head, token));
        call.lse[(sample * call.heads + head) * call.length + token] = top[i] + std::log2(sum[i]);
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
struct Backward : Pass<Type> {
  using Base = Pass<Type>;
  using Base::at, Base::call, Base::row, Base::width;
  float *queries, *douts;              // of the class, rows
  float *query_panels, *dout_panels;   // the same transposed; queries scaled
  float *lse, *deltas;                 // of the class
  float *delta;                        // of the head: dout . out of each query
  float *dq, *dk, *dv;                 // sums of the head and, of the keys, of the heads that share them
  float *keys, *values, *weights, *dscores;  // of the tile
  float *dkeys_alone, *dvalues_alone;           // of the tile, where no other part or head joins

  Backward(const Call& call, Memory memory) : Base(call) {
    const int64_t length = call.padded_length();
    for (float** rows : {&queries, &douts, &dq, &dk, &dv}) *rows = memory.take(length * row);
    for (float** rows : {&query_panels, &dout_panels}) *rows = memory.take(length * width);
    for (float** column : {&lse, &deltas, &delta}) *column = memory.take(length);
    for (float** rows : {&keys, &values, &dkeys_alone, &dvalues_alone}) *rows = memory.take(kTile * row);
    for (float** rows : {&weights, &dscores}) *rows = memory.take(kTile * kColumnStride);
  }

  static int64_t size(const Call& call) {
    const int64_t row = call.row(), length = call.padded_length();
    return length * (5 * row + 2 * call.padded_width() + 3) + kTile * (4 * row + 2 * kColumnStride) + 16 * 16;
  }

  // The gradients of a key-value head, and of the queries that use it.
  void key_head(int64_t sample, int64_t key_head) const {
    const int64_t share = call.heads / call.key_heads;
    bool joined = false;
    for (int64_t head = key_head * share; head < (key_head + 1) * share; ++head) {
      const Parts parts(call.patterns[head], call.stride, call.offsets[head], call.length);
      clear(dq, 0, call.length * row);
      if (!joined && (parts.count > 1 || share > 1)) {
        clear(dk, 0, call.length * row);
        clear(dv, 0, call.length * row);
        joined = true;
      }
      prepare(sample, head);
      for (int p = 0; p < parts.count; ++p) {
        const bool finishes = p + 1 == parts.count && head + 1 == (key_head + 1) * share;
        for (int64_t number = 0; number < parts.list[p].num_classes(); ++number) {
          const Sequence own = parts.list[p].keys(number), other = parts.list[p].queries(number);
          if (!own.count) continue;
          pack_queries(sample, head, other);
          for (int64_t first = 0; first < own.count; first += kTile)
            tile(sample, key_head, parts.list[p], own, other, first, joined, finishes);
        }
      }
      for (int64_t token = 0; token < call.length; ++token) {
        this->template expect<1>(call.dq, sample, head, token + kAhead);
        narrow_row<Type>(dq + token * row, call.width, call.scale, at(call.dq, sample, head, token));
      }
    }
  }

  void prepare(int64_t sample, int64_t head) const {
    const int64_t columns = width;
    for (int64_t token = 0; token < call.length; ++token) {
      for (const Operand& x : {call.out, call.dout}) this->expect(x, sample, head, token + kAhead);
      widen_row<Type>(at(call.out, sample, head, token), call.width, 1.0f, columns, keys);
      widen_row<Type>(at(call.dout, sample, head, token), call.width, 1.0f, columns, values);
      Vector total = {};
      for (int64_t column = 0; column < columns; column += kLanes) total += load(keys + column) * load(values + column);
      delta[token] = sum_of(total);
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
      for (const Operand& x : {call.dk, call.dv})
        this->template expect<1>(x, sample, key_head, own.token(first + i + kAhead));
      narrow_row<Type>(dkeys + i * sum_row, call.width, call.scale, at(call.dk, sample, key_head, token));
      narrow_row<Type>(dvalues + i * sum_row, call.width, 1.0f, at(call.dv, sample, key_head, token));
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

template <class Function>
auto with_type(const Call& call, Function&& function) {
  if (call.type == 1) return function(BFloat16{});
  if (call.type == 2) return function(Float16{});
  return function(Float32{});
}

}  // namespace

extern "C" {

// Floats of scratch memory that a thread needs.
int64_t megasparse_attention_scratch(const Call* call, int backward) {
  return backward ? Backward<Float32>::size(*call) : Forward<Float32>::size(*call);
}

void megasparse_attention_forward(const Call* call) {
  with_type(*call, [&](auto type) {
    using Kernel = Forward<decltype(type)>;
#pragma omp parallel num_threads(call->threads)
    {
      const Kernel kernel(*call, Memory{call->scratch + omp_get_thread_num() * Kernel::size(*call)});
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < call->samples * call->heads; ++i) kernel.head(i / call->heads, i % call->heads);
    }
  });
}

void megasparse_attention_backward(const Call* call) {
  with_type(*call, [&](auto type) {
    using Kernel = Backward<decltype(type)>;
#pragma omp parallel num_threads(call->threads)
    {
      const Kernel kernel(*call, Memory{call->scratch + omp_get_thread_num() * Kernel::size(*call)});
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < call->samples * call->key_heads; ++i)
        kernel.key_head(i / call->key_heads, i % call->key_heads);
    }
  });
}
}
