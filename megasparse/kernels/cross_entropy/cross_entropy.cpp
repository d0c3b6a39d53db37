// Cross entropy of logits and its gradient in their place, for CPUs. cpu.py calls it.
//
// Logits are float32, bfloat16 or float16 and stay so; arithmetic is float32. A row is read from memory once and written
// once: its maximum, its sum and its gradient are made while it lies in the second-level cache. A row is computed by one
// thread in a fixed order: results do not depend on the number of threads.

#include "../common/vectors.h"

#include <algorithm>
#include <limits>

namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kUnrolled = 4;                  // vectors whose sums do not wait for each other
constexpr int64_t kRun = 32 * kUnrolled * kLanes;  // elements that are summed up before they join the rest of a row
constexpr int64_t kFew = 16384;                   // elements that are not worth more than one thread
constexpr int kMeasure = 1, kWrite = 2;

// A vector, with `rest` in the lanes from `count` on.
template <class Type>
inline Vector read_or(const typename Type::Element* from, int64_t count, float rest) {
  Vector value = read<Type>(from, count);
  for (int64_t lane = count; lane < kLanes; ++lane) value[lane] = rest;
  return value;
}

// Function(first element, elements left) -> vector; `join` of all of them, lane by lane, from `start` on.
template <class Function, class Join>
inline Vector reduce(int64_t count, Vector start, Function&& function, Join&& join) {
  Vector parts[kUnrolled] = {start, start, start, start};
  int64_t i = 0;
  for (; i + kUnrolled * kLanes <= count; i += kUnrolled * kLanes)
    for (int64_t part = 0; part < kUnrolled; ++part)
      parts[part] = join(parts[part], function(i + part * kLanes, int64_t(kLanes)));
  for (; i < count; i += kLanes) parts[0] = join(parts[0], function(i, count - i));
  return join(join(parts[0], parts[1]), join(parts[2], parts[3]));
}

// NaN may get lost here, but not in the sum of the exponentials.
template <class Type>
float largest_of(const typename Type::Element* row, int64_t width) {
  const Vector found = reduce(
      width, broadcast(-kInfinity), [&](int64_t i, int64_t left) { return read_or<Type>(row + i, left, -kInfinity); },
      [](Vector one, Vector other) { return one > other ? one : other; });
  float largest = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, found[lane]);
  return largest;
}

template <class Type>
float sum_of_exponentials(const typename Type::Element* row, int64_t width, float largest) {
  float total = 0;
  for (int64_t first = 0; first < width; first += kRun)
    total += sum_of(reduce(
        std::min(kRun, width - first), Vector{},
        [&](int64_t i, int64_t left) {
          return power_of_2((read_or<Type>(row + first + i, left, -kInfinity) - largest) * kLog2E);
        },
        [](Vector one, Vector other) { return one + other; }));
  return total;
}

// softmax(row) - [the target], in place; 0 in the entries that pad the row.
template <class Type>
void write_gradient(typename Type::Element* row, int64_t width, int64_t padded, int64_t target, float largest,
                    float sum) {
  const float factor = 1.0f / sum;
  const auto share = [&](Vector logits) { return power_of_2((logits - largest) * kLog2E) * factor; };
  const Vector at_target = target < 0 ? Vector{} : share(read<Type>(row + target, 1)) - 1.0f;
  for (int64_t i = 0; i < width; i += kLanes) write<Type>(row + i, share(read<Type>(row + i, width - i)), width - i);
  for (int64_t i = width; i < padded; i += kLanes) write<Type>(row + i, Vector{}, padded - i);
  if (target >= 0) write<Type>(row + target, at_target, 1);
}

template <class Type>
void cross_entropy(void* logits, int64_t stride, int64_t rows, int64_t width, int64_t padded, const int64_t* targets,
                   int phases, float* largest, float* sums, float* picked, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > kFew)
  for (int64_t n = 0; n < rows; ++n) {
    auto* row = static_cast<typename Type::Element*>(logits) + n * stride;
    if (phases & kMeasure) {
      largest[n] = largest_of<Type>(row, width);
      sums[n] = sum_of_exponentials<Type>(row, width, largest[n]);
      picked[n] = targets[n] < 0 ? 0.0f : read<Type>(row + targets[n], 1)[0];
    }
    if (phases & kWrite) write_gradient<Type>(row, width, padded, targets[n], largest[n], sums[n]);
  }
}

}  // namespace

extern "C" {

// phases: 1 fills `largest`, `sums` of exp(logit - largest) and `picked` logits of the targets; 2 writes the gradient
// from the first two; 3 both. targets: -1 where the target is no entry of this row. type: 0 float32, 1 bfloat16,
// 2 float16.
void megasparse_cross_entropy(int type, void* logits, int64_t stride, int64_t rows, int64_t width, int64_t padded,
                              const int64_t* targets, int phases, float* largest, float* sums, float* picked,
                              int threads) {
  const auto run = [&](auto t) {
    cross_entropy<decltype(t)>(logits, stride, rows, width, padded, targets, phases, largest, sums, picked, threads);
  };
  if (type == 0) return run(Float32{});
  if (type == 1) return run(BFloat16{});
  run(Float16{});
}

}  // extern "C"
