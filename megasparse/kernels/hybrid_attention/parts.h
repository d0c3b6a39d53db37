// What the passes of attention.cpp over a head share: patterns as parts, the arguments of a call, and the walk.
//
// A pattern is one or two parts. In each part the queries and the keys of a class (all tokens, those of equal position
// modulo the stride, or the last tokens of the blocks) are gathered, and every query sees an interval of its keys. So a
// tile of queries against its keys is a small dense product. Parts are joined by their maxima and sums; documents
// shorten the intervals.

#pragma once

#include "tile_products.h"

namespace {

constexpr int64_t kAhead = 8;  // rows that are asked for before they are read
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

  explicit Pass(const Call& call, int64_t multiple = kWidth)
      : call(call), width(round_up(call.width, multiple)), row(call.row()) {}

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

// What is known of the queries of a head after the parts before.
template <class Type>
struct ForwardPass : Pass<Type> {
  using Base = Pass<Type>;
  using Base::at, Base::call, Base::row, Base::width;
  float *state, *tops, *sums;  // of each token: weighted values, maximum, sum of weights

  ForwardPass(const Call& call, Memory& memory, int64_t multiple = kWidth) : Base(call, multiple) {
    state = memory.take(call.length * row);
    tops = memory.take(call.length);
    sums = memory.take(call.length);
  }
  static int64_t size(const Call& call) { return call.length * (call.row() + 2) + 3 * 16; }

  void clear_state() const {
    clear(state, 0, call.length * row);
    std::fill(tops, tops + call.length, -kInfinity);
    std::fill(sums, sums + call.length, 0.0f);
  }

  // The output of a token: its weighted values over the sum of the weights.
  void write_out(int64_t sample, int64_t head, int64_t token, int64_t next, const float* out, float top,
                 float sum) const {
    this->template expect<1>(call.out, sample, head, next);
    narrow_row<Type>(out, call.width, 1.0f / sum, at(call.out, sample, head, token));
    call.lse[(sample * call.heads + head) * call.length + token] = top + std::log2(sum);
  }
};

// A query head, part by part.
template <class Kernel>
void compute_head(const Kernel& kernel, int64_t sample, int64_t head) {
  const Call& call = kernel.call;
  const int64_t key_head = head / (call.heads / call.key_heads);
  const Parts parts(call.patterns[head], call.stride, call.offsets[head], call.length);
  if (parts.count > 1) kernel.clear_state();
  for (int p = 0; p < parts.count; ++p)
    kernel.add_part(sample, head, key_head, parts.list[p], parts.count > 1, p + 1 == parts.count);
}

// ---- backward ----

template <class Type>
struct BackwardPass : Pass<Type> {
  using Base = Pass<Type>;
  using Base::at, Base::call, Base::row, Base::width;
  float* delta;         // of the head: dout . out of each query
  float *dq, *dk, *dv;  // sums of the head and, of the keys, of the heads that share them
  float* pair;          // a row of out and one of dout

  BackwardPass(const Call& call, Memory& memory, int64_t multiple = kWidth) : Base(call, multiple) {
    delta = memory.take(call.length);
    for (float** rows : {&dq, &dk, &dv}) *rows = memory.take(call.length * row);
    pair = memory.take(2 * row);
  }
  static int64_t size(const Call& call) { return call.length * (3 * call.row() + 1) + 2 * call.row() + 5 * 16; }

  void clear_key_gradients() const {
    for (float* rows : {dk, dv}) clear(rows, 0, call.length * row);
  }

  void prepare(int64_t sample, int64_t head) const {
    const int64_t columns = width;
    float *out = pair, *dout = pair + row;
    clear(dq, 0, call.length * row);
    for (int64_t token = 0; token < call.length; ++token) {
      for (const Operand& x : {call.out, call.dout}) this->expect(x, sample, head, token + kAhead);
      widen_row<Type>(at(call.out, sample, head, token), call.width, 1.0f, columns, out);
      widen_row<Type>(at(call.dout, sample, head, token), call.width, 1.0f, columns, dout);
      Vector total = {};
      for (int64_t column = 0; column < columns; column += kLanes) total += load(out + column) * load(dout + column);
      delta[token] = sum_of(total);
    }
  }

  void write_query_gradient(int64_t sample, int64_t head) const {
    for (int64_t token = 0; token < call.length; ++token) {
      this->template expect<1>(call.dq, sample, head, token + kAhead);
      narrow_row<Type>(dq + token * row, call.width, call.scale, at(call.dq, sample, head, token));
    }
  }

  void write_key_gradients(int64_t sample, int64_t key_head, int64_t token, int64_t next, const float* dkey,
                           const float* dvalue) const {
    for (const Operand& x : {call.dk, call.dv}) this->template expect<1>(x, sample, key_head, next);
    narrow_row<Type>(dkey, call.width, call.scale, at(call.dk, sample, key_head, token));
    narrow_row<Type>(dvalue, call.width, 1.0f, at(call.dv, sample, key_head, token));
  }
};

// The gradients of a key-value head, and of the queries that use it.
template <class Kernel>
void compute_gradients(const Kernel& kernel, int64_t sample, int64_t key_head) {
  const Call& call = kernel.call;
  const int64_t share = call.heads / call.key_heads;
  bool joined = false;
  for (int64_t head = key_head * share; head < (key_head + 1) * share; ++head) {
    const Parts parts(call.patterns[head], call.stride, call.offsets[head], call.length);
    if (!joined && (parts.count > 1 || share > 1)) {
      kernel.clear_key_gradients();
      joined = true;
    }
    kernel.prepare(sample, head);
    for (int p = 0; p < parts.count; ++p) {
      const bool finishes = p + 1 == parts.count && head + 1 == (key_head + 1) * share;
      kernel.add_part(sample, head, key_head, parts.list[p], joined, finishes);
    }
    kernel.write_query_gradient(sample, head);
  }
}

}  // namespace
