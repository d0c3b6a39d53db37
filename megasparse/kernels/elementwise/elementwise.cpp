// What lies between the products of a transformer, for CPUs: activations, normalisation and rotary positions, forward
// and backward, each in one pass over memory. cpu.py calls it; what is computed is defined in reference.py.
//
// Elements are float32, bfloat16 or float16; arithmetic is float32. A row, or a run of kRun elements, is computed by one
// thread, and sums over rows are made of kGroup rows each, then in their order: results do not depend on the number of
// threads.

#include "../common/vectors.h"

#include <algorithm>

namespace {

constexpr int64_t kRun = 4096;
constexpr int64_t kGroup = 32;
constexpr int64_t kFew = 8192;  // elements that are not worth more than one thread
constexpr float kLog2E = 1.44269504f;
constexpr float kGeluScale = 0.797884561f;  // sqrt(2 / pi)
constexpr float kGeluCube = 0.044715f;

// With 0 in the lanes from `count` on.
inline Vector first_lanes(Vector value, int64_t count) {
  for (int64_t lane = count; lane < kLanes; ++lane) value[lane] = 0;
  return value;
}

// e^-x, at most 2^126: beyond that 1 / (1 + e^-x) is 0 for float32 all the same.
inline Vector exponential_of_minus(Vector x) {
  const Vector power = x * -kLog2E;
  return power_of_2(power < 126.0f ? power : Vector{} + 126.0f);
}

// The value of an activation and its derivative.
struct ValueAndSlope {
  Vector value, slope;
};

// x sigmoid(x).
struct Silu {
  static ValueAndSlope at(Vector x) {
    const Vector e = exponential_of_minus(x), sigmoid = 1.0f / (1.0f + e);
    const Vector value = x * sigmoid;
    return {value, sigmoid + value * (e * sigmoid)};
  }
};

// The tanh approximation of GELU: 0.5 (1 + tanh(u)) is sigmoid(2 u).
struct Gelu {
  static ValueAndSlope at(Vector x) {
    const Vector square = x * x;
    const Vector e = exponential_of_minus((2 * kGeluScale) * x * (1.0f + kGeluCube * square));
    const Vector sigmoid = 1.0f / (1.0f + e), value = x * sigmoid;
    const Vector inner_slope = (2 * kGeluScale) * (1.0f + (3 * kGeluCube) * square);
    return {value, sigmoid + value * (e * sigmoid) * inner_slope};
  }
};

template <class Function>
void in_runs(int64_t count, int threads, Function&& function) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > kFew)
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t last = std::min(first + kRun, count);
    for (int64_t i = first; i < last; i += kLanes) function(i, last - i);
  }
}

template <class Type, class Activation>
void activate(const void* x_data, int64_t count, void* y_data, int threads) {
  using Element = typename Type::Element;
  const auto* x = static_cast<const Element*>(x_data);
  auto* y = static_cast<Element*>(y_data);
  in_runs(count, threads, [&](int64_t i, int64_t left) {
    write<Type>(y + i, Activation::at(read<Type>(x + i, left)).value, left);
  });
}

template <class Type, class Activation>
void activate_backward(const void* dy_data, const void* x_data, int64_t count, void* dx_data, int threads) {
  using Element = typename Type::Element;
  const auto *dy = static_cast<const Element*>(dy_data), *x = static_cast<const Element*>(x_data);
  auto* dx = static_cast<Element*>(dx_data);
  in_runs(count, threads, [&](int64_t i, int64_t left) {
    write<Type>(dx + i, read<Type>(dy + i, left) * Activation::at(read<Type>(x + i, left)).slope, left);
  });
}

// Rows of x are a gate and then as many elements that it multiplies.
template <class Type, class Activation>
void gate(const void* x_data, int64_t rows, int64_t width, void* y_data, int threads) {
  using Element = typename Type::Element;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > kFew)
  for (int64_t row = 0; row < rows; ++row) {
    const auto* x = static_cast<const Element*>(x_data) + 2 * width * row;
    auto* y = static_cast<Element*>(y_data) + width * row;
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t left = width - i;
      write<Type>(y + i, Activation::at(read<Type>(x + i, left)).value * read<Type>(x + width + i, left), left);
    }
  }
}

template <class Type, class Activation>
void gate_backward(const void* dy_data, const void* x_data, int64_t rows, int64_t width, void* dx_data, int threads) {
  using Element = typename Type::Element;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > kFew)
  for (int64_t row = 0; row < rows; ++row) {
    const auto* dy = static_cast<const Element*>(dy_data) + width * row;
    const auto* x = static_cast<const Element*>(x_data) + 2 * width * row;
    auto* dx = static_cast<Element*>(dx_data) + 2 * width * row;
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t left = width - i;
      const ValueAndSlope gate = Activation::at(read<Type>(x + i, left));
      const Vector gradient = read<Type>(dy + i, left);
      write<Type>(dx + i, gradient * read<Type>(x + width + i, left) * gate.slope, left);
      write<Type>(dx + width + i, gradient * gate.value, left);
    }
  }
}

// Sums over a row, in four chains of additions.
struct RowSum {
  Vector parts[4] = {};

  void add(int64_t i, Vector value) { parts[i / kLanes % 4] += value; }
  float total() const {
    float lanes[kLanes];
    store(lanes, (parts[0] + parts[1]) + (parts[2] + parts[3]));
    // By halves: one lane after the other would take as long as a narrow row itself.
    for (int count = kLanes / 2; count >= 4; count /= 2)
      for (int lane = 0; lane < count; ++lane) lanes[lane] += lanes[lane + count];
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
};

// y = (x - mean) * scale * weight + bias; mean is 0 and bias null for RMSNorm. moments: mean and scale of each row.
template <class Type>
void normalize(const void* x_data, const void* weight_data, const void* bias_data, int64_t rows, int64_t width,
               float epsilon, bool centred, void* y_data, float* moments, int threads) {
  using Element = typename Type::Element;
  const auto* weight = static_cast<const Element*>(weight_data);
  const auto* bias = static_cast<const Element*>(bias_data);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > kFew)
  for (int64_t row = 0; row < rows; ++row) {
    const auto* x = static_cast<const Element*>(x_data) + width * row;
    auto* y = static_cast<Element*>(y_data) + width * row;
    float mean = 0;
    if (centred) {
      RowSum sum;
      for (int64_t i = 0; i < width; i += kLanes) sum.add(i, read<Type>(x + i, width - i));
      mean = sum.total() / float(width);
    }
    RowSum squares;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vector value = first_lanes(read<Type>(x + i, width - i) - mean, width - i);
      squares.add(i, value * value);
    }
    const float scale = 1.0f / std::sqrt(squares.total() / float(width) + epsilon);
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t left = width - i;
      Vector value = (read<Type>(x + i, left) - mean) * scale * read<Type>(weight + i, left);
      if (bias) value += read<Type>(bias + i, left);
      write<Type>(y + i, value, left);
    }
    moments[2 * row] = mean;
    moments[2 * row + 1] = scale;
  }
}

// With n = (x - mean) * scale and g = dy * weight: dx = scale * (g - [mean of g] - n * mean of g n), the bracket for a
// centred one. sums: for each group of rows `width` sums of dy n and as many of dy, for the gradients of weight and bias.
template <class Type>
void normalize_backward(const void* dy_data, const void* x_data, const void* weight_data, const float* moments,
                        int64_t rows, int64_t width, bool centred, void* dx_data, float* sums, int threads) {
  using Element = typename Type::Element;
  const auto* weight = static_cast<const Element*>(weight_data);
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > kFew)
  for (int64_t first = 0; first < rows; first += kGroup) {
    float* of_weight = sums + first / kGroup * 2 * padded;
    float* of_bias = of_weight + padded;
    std::fill(of_weight, of_weight + 2 * padded, 0.0f);
    for (int64_t row = first; row < std::min(first + kGroup, rows); ++row) {
      const auto* dy = static_cast<const Element*>(dy_data) + width * row;
      const auto* x = static_cast<const Element*>(x_data) + width * row;
      auto* dx = static_cast<Element*>(dx_data) + width * row;
      const float mean = moments[2 * row], scale = moments[2 * row + 1];
      RowSum plain, with_n;
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t left = width - i;
        const Vector gradient = read<Type>(dy + i, left), n = (read<Type>(x + i, left) - mean) * scale;
        const Vector g = gradient * read<Type>(weight + i, left);
        plain.add(i, g);
        with_n.add(i, g * n);
        store(of_weight + i, load(of_weight + i) + gradient * n);
        if (centred) store(of_bias + i, load(of_bias + i) + gradient);
      }
      const float mean_of_g = centred ? plain.total() / float(width) : 0.0f;
      const float mean_of_gn = with_n.total() / float(width);
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t left = width - i;
        const Vector n = (read<Type>(x + i, left) - mean) * scale;
        const Vector g = read<Type>(dy + i, left) * read<Type>(weight + i, left);
        write<Type>(dx + i, scale * (g - mean_of_g - n * mean_of_gn), left);
      }
    }
  }
}

// Element i of a row and element i + width / 2 are a pair, turned by the angle of the row's position: forwards, or
// backwards for the gradient. x: [samples, positions, heads, width] with these strides; y without gaps.
template <class Type>
void rotate(const void* x_data, const int64_t* strides, const int64_t* sizes, const float* cosines, const float* sines,
            float direction, void* y_data, int threads) {
  using Element = typename Type::Element;
  const int64_t positions = sizes[1], heads = sizes[2], width = sizes[3], half = width / 2, tokens = sizes[0] * positions;
#pragma omp parallel for num_threads(threads) schedule(static) if (tokens * heads * width > kFew)
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t sample = token / positions, position = token % positions;
    const float *cosine = cosines + position * half, *sine = sines + position * half;
    for (int64_t head = 0; head < heads; ++head) {
      const auto* x = static_cast<const Element*>(x_data) + sample * strides[0] + position * strides[1] + head * strides[2];
      auto* y = static_cast<Element*>(y_data) + (token * heads + head) * width;
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t left = half - i;
        const Vector first = read<Type>(x + i, left), second = read<Type>(x + half + i, left);
        const Vector along = read<Float32>(cosine + i, left), across = direction * read<Float32>(sine + i, left);
        write<Type>(y + i, first * along - second * across, left);
        write<Type>(y + half + i, second * along + first * across, left);
      }
    }
  }
}

// type: 0 float32, 1 bfloat16, 2 float16.
template <class Function>
void with_type(int type, Function&& function) {
  if (type == 0) function(Float32{});
  if (type == 1) function(BFloat16{});
  if (type == 2) function(Float16{});
}

// activation: 0 GELU (tanh), 1 SiLU.
template <class Function>
void with_both(int type, int activation, Function&& function) {
  with_type(type, [&](auto element) {
    if (activation == 0) function(element, Gelu{});
    if (activation == 1) function(element, Silu{});
  });
}

}  // namespace

extern "C" {

void megasparse_activate(int type, int activation, const void* x, int64_t count, void* y, int threads) {
  with_both(type, activation, [&](auto t, auto a) { activate<decltype(t), decltype(a)>(x, count, y, threads); });
}

void megasparse_activate_backward(int type, int activation, const void* dy, const void* x, int64_t count, void* dx,
                                  int threads) {
  with_both(type, activation,
            [&](auto t, auto a) { activate_backward<decltype(t), decltype(a)>(dy, x, count, dx, threads); });
}

void megasparse_gate(int type, int activation, const void* x, int64_t rows, int64_t width, void* y, int threads) {
  with_both(type, activation, [&](auto t, auto a) { gate<decltype(t), decltype(a)>(x, rows, width, y, threads); });
}

void megasparse_gate_backward(int type, int activation, const void* dy, const void* x, int64_t rows, int64_t width,
                              void* dx, int threads) {
  with_both(type, activation,
            [&](auto t, auto a) { gate_backward<decltype(t), decltype(a)>(dy, x, rows, width, dx, threads); });
}

void megasparse_normalize(int type, const void* x, const void* weight, const void* bias, int64_t rows, int64_t width,
                          float epsilon, int centred, void* y, float* moments, int threads) {
  with_type(type, [&](auto t) {
    normalize<decltype(t)>(x, weight, bias, rows, width, epsilon, centred, y, moments, threads);
  });
}

// Floats that `sums` must hold.
int64_t megasparse_normalize_sums(int64_t rows, int64_t width) {
  return (rows + kGroup - 1) / kGroup * 2 * ((width + kLanes - 1) / kLanes * kLanes);
}

// dweight, dbias: float32 [width]; dbias may be null.
void megasparse_normalize_backward(int type, const void* dy, const void* x, const void* weight, const float* moments,
                                   int64_t rows, int64_t width, int centred, void* dx, float* dweight, float* dbias,
                                   float* sums, int threads) {
  with_type(type, [&](auto t) {
    normalize_backward<decltype(t)>(dy, x, weight, moments, rows, width, centred, dx, sums, threads);
  });
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes, groups = (rows + kGroup - 1) / kGroup;
  std::fill(dweight, dweight + width, 0.0f);
  if (dbias) std::fill(dbias, dbias + width, 0.0f);
  for (int64_t group = 0; group < groups; ++group) {
    const float* own = sums + group * 2 * padded;
    for (int64_t i = 0; i < width; ++i) dweight[i] += own[i];
    if (dbias)
      for (int64_t i = 0; i < width; ++i) dbias[i] += own[padded + i];
  }
}

void megasparse_rotate(int type, const void* x, const int64_t* strides, const int64_t* sizes, const float* cosines,
                       const float* sines, float direction, void* y, int threads) {
  with_type(type, [&](auto t) { rotate<decltype(t)>(x, strides, sizes, cosines, sines, direction, y, threads); });
}

}  // extern "C"
