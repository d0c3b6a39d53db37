// AdamW and sums of squares over a piece of a flat matrix of which only blocks are active, for CPUs. cpu.py calls it;
// what is computed is defined in reference.py.
//
// Inactive blocks are neither read nor written. A piece is walked in rows, those of the matrix or of kRun elements; a
// row is computed by one thread, and sums are made of kGroup rows each, then in their order: results do not depend on
// the number of threads. The last elements of a run go through the same vectors as the others, so that it does not
// matter where a piece begins either.

#include "../common/vectors.h"

#include <algorithm>
#include <cstddef>

namespace {

constexpr int64_t kRun = 4096;
constexpr int64_t kGroup = 32;
constexpr int64_t kFew = 8192;  // elements that are not worth more than one thread

// What of a piece is active; the fields are those of cpu.Extent.
struct Extent {
  int64_t count;          // elements of the piece
  int64_t start;          // its first one in the flat matrix
  int64_t block;          // side of a block
  int64_t columns;        // blocks in a row of the matrix
  const uint8_t* active;  // one byte for each block of the matrix, or null: all are
};

// The fields are those of cpu.Numbers; ratios of the step come as numbers, so that they are torch's.
struct Numbers {
  float gradient_scale;   // what the gradient is multiplied by first
  float keep;             // 1 - lr weight_decay
  float new1, beta2, new2;  // 1 - beta1, beta2, 1 - beta2
  float epsilon;
  float step_size;        // lr / (1 - beta1^step)
  float root;             // sqrt(1 - beta2^step)
  // Where each weight has its own count of steps:
  float lr;
  float correction1, correction2;  // 1 - beta^step
  float ramp;             // steps over which the updates of a regrown weight grow, 0: at once
  int32_t regrown_below;  // a weight of fewer steps than these is a regrown one
  int32_t most_steps;     // that are counted
};

struct Tensors {
  const void* gradient;
  float *master, *first, *second;
  void* low;                  // the weights in the precision of the model, or null
  int16_t* steps;             // of each weight, or null
  const float* corrections1;  // 1 - beta1^n for n = 0, 1, .., most_steps; null: that of the step holds for all
  const float* corrections2;
};

inline Vector square_root(Vector x) {
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}

// Rows that a piece has a part of.
inline int64_t rows_of(const Extent& extent, int64_t* first) {
  if (!extent.active) {
    *first = 0;
    return (extent.count + kRun - 1) / kRun;
  }
  const int64_t width = extent.columns * extent.block;
  *first = extent.start / width;
  return extent.count ? (extent.start + extent.count - 1) / width - *first + 1 : 0;
}

// Elements from a run to the one below it two rows on: the processor foresees only what is read one after the other.
inline int64_t ahead(const Extent& extent) { return extent.active ? 2 * extent.columns * extent.block : 0; }

// Calls function(i, length) for each run of active elements in a row: they begin at the piece's element i.
template <class Function>
inline void in_runs(const Extent& extent, int64_t row, Function&& function) {
  if (!extent.active) {
    const int64_t begin = row * kRun;
    function(begin, std::min(kRun, extent.count - begin));
    return;
  }
  const int64_t width = extent.columns * extent.block, offset = row * width - extent.start;
  const uint8_t* active = extent.active + row / extent.block * extent.columns;
  for (int64_t column = 0; column < extent.columns; ++column) {
    if (!active[column]) continue;
    int64_t end = column + 1;
    while (end < extent.columns && active[end]) ++end;
    const int64_t from = std::max<int64_t>(offset + column * extent.block, 0);
    const int64_t to = std::min(offset + end * extent.block, extent.count);
    if (from < to) function(from, to - from);
    column = end;
  }
}

template <class Gradient, class Low, bool kBySteps>
inline void update(const Tensors& t, const Numbers& n, int64_t i, int64_t left) {
  const auto* gradients = static_cast<const typename Gradient::Element*>(t.gradient);
  const Vector gradient = read<Gradient>(gradients + i, left) * n.gradient_scale;
  Vector first = read<Float32>(t.first + i, left), second = read<Float32>(t.second + i, left);
  first = first + n.new1 * (gradient - first);
  second = n.beta2 * second + n.new2 * gradient * gradient;
  Vector weight = read<Float32>(t.master + i, left) * n.keep;
  if (kBySteps) {
    Vector correction1 = Vector{} + n.correction1, correction2 = Vector{} + n.correction2, share = Vector{} + 1.0f;
    for (int64_t lane = 0; lane < std::min<int64_t>(left, kLanes); ++lane) {
      const int32_t steps = std::min<int32_t>(t.steps[i + lane] + 1, n.most_steps);
      t.steps[i + lane] = static_cast<int16_t>(steps);
      if (t.corrections1) correction1[lane] = t.corrections1[steps], correction2[lane] = t.corrections2[steps];
      if (n.ramp > 0 && steps < n.regrown_below) share[lane] = std::min(steps / n.ramp, 1.0f);
    }
    weight -= n.lr * (first / correction1 / (square_root(second / correction2) + n.epsilon) * share);
  } else {
    weight -= n.step_size * first / (square_root(second) / n.root + n.epsilon);
  }
  write<Float32>(t.first + i, first, left);
  write<Float32>(t.second + i, second, left);
  write<Float32>(t.master + i, weight, left);
  if (t.low) write<Low>(static_cast<typename Low::Element*>(t.low) + i, weight, left);
}

template <class Gradient, class Low, bool kBySteps>
void adamw(const Extent& extent, const Tensors& tensors, const Numbers& numbers, int threads) {
  int64_t first_row;
  const int64_t rows = rows_of(extent, &first_row), next = ahead(extent);
  const auto* gradients = static_cast<const typename Gradient::Element*>(tensors.gradient);
#pragma omp parallel for num_threads(threads) schedule(static) if (extent.count > kFew)
  for (int64_t row = 0; row < rows; ++row) {
    in_runs(extent, first_row + row, [&](int64_t begin, int64_t length) {
      const int64_t end = begin + length;
      for (int64_t i = begin; i < end; i += kLanes) {
        if (next && i + next < extent.count) {
          __builtin_prefetch(gradients + i + next);
          __builtin_prefetch(tensors.first + i + next, 1);
          __builtin_prefetch(tensors.second + i + next, 1);
          __builtin_prefetch(tensors.master + i + next, 1);
        }
        update<Gradient, Low, kBySteps>(tensors, numbers, i, end - i);
      }
    });
  }
}

template <class Gradient, class Low>
void adamw_by_steps(const Extent& extent, const Tensors& tensors, const Numbers& numbers, int threads) {
  if (tensors.steps) return adamw<Gradient, Low, true>(extent, tensors, numbers, threads);
  adamw<Gradient, Low, false>(extent, tensors, numbers, threads);
}

// The sum of one row, in float32 vectors of at most kRun elements each.
template <class Type>
double square_sum_of_row(const Extent& extent, const typename Type::Element* gradient, int64_t row) {
  double total = 0;
  const int64_t next = ahead(extent);
  in_runs(extent, row, [&](int64_t begin, int64_t length) {
    for (int64_t part = begin; part < begin + length; part += kRun) {
      const int64_t end = std::min(part + kRun, begin + length);
      Vector sum = {}, other = {};
      int64_t i = part;
      for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
        if (next && i + next < extent.count) __builtin_prefetch(gradient + i + next);
        const Vector one = Type::widen(gradient + i), two = Type::widen(gradient + i + kLanes);
        sum += one * one;
        other += two * two;
      }
      for (; i < end; i += kLanes) {
        const Vector value = read<Type>(gradient + i, end - i);
        sum += value * value;
      }
      total += sum_of(sum + other);
    }
  });
  return total;
}

template <class Type>
void square_sums(const Extent& extent, const void* data, double* sums, int threads) {
  const auto* gradient = static_cast<const typename Type::Element*>(data);
  int64_t first_row;
  const int64_t rows = rows_of(extent, &first_row), groups = (rows + kGroup - 1) / kGroup;
#pragma omp parallel for num_threads(threads) schedule(static) if (extent.count > kFew)
  for (int64_t group = 0; group < groups; ++group) {
    sums[group] = 0;
    for (int64_t row = group * kGroup; row < std::min(rows, (group + 1) * kGroup); ++row)
      sums[group] += square_sum_of_row<Type>(extent, gradient, first_row + row);
  }
}

}  // namespace

extern "C" {

// Types of elements: 0 float32, 1 bfloat16, 2 float16.
void megasparse_adamw(int gradient_type, int low_type, const Extent* extent, const Tensors* tensors,
                      const Numbers* numbers, int threads) {
  auto with = [&](auto gradient) {
    using Gradient = decltype(gradient);
    if (low_type == 0) return adamw_by_steps<Gradient, Float32>(*extent, *tensors, *numbers, threads);
    if (low_type == 1) return adamw_by_steps<Gradient, BFloat16>(*extent, *tensors, *numbers, threads);
    adamw_by_steps<Gradient, Float16>(*extent, *tensors, *numbers, threads);
  };
  if (gradient_type == 0) return with(Float32{});
  if (gradient_type == 1) return with(BFloat16{});
  with(Float16{});
}

// Numbers that megasparse_square_sum has room for in `sums`.
int64_t megasparse_square_sums(const Extent* extent) {
  int64_t first_row;
  return (rows_of(*extent, &first_row) + kGroup - 1) / kGroup;
}

double megasparse_square_sum(int type, const Extent* extent, const void* gradient, double* sums, int threads) {
  if (type == 0) square_sums<Float32>(*extent, gradient, sums, threads);
  if (type == 1) square_sums<BFloat16>(*extent, gradient, sums, threads);
  if (type == 2) square_sums<Float16>(*extent, gradient, sums, threads);
  double total = 0;
  for (int64_t group = 0; group < megasparse_square_sums(extent); ++group) total += sums[group];
  return total;
}

}  // extern "C"
