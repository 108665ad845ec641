// The operations between the matrix products of a model, and the loss after the last product.
#pragma once

#include "common.h"

namespace {

// y = x / √(mean x² + eps) · weight. x, weight, y: (size), of one dtype; computed in float32. size:
// a multiple of 16.
template <typename T>
void rms_norm_row(const T* x, const T* weight, float eps, T* y, int64_t size) {
  Floats squares{};
  for (int64_t i = 0; i < size; i += 16) {
    const Floats value = load(x + i);
    squares = fma(value, value, squares);
  }
  const Floats factor = broadcast(1 / std::sqrt(reduce_add(squares) / size + eps));
  for (int64_t i = 0; i < size; i += 16) store(y + i, load(x + i) * factor * load(weight + i));
}

// y = (x - mean x) / √(mean (x - mean x)² + eps) · weight, plus the bias unless it is null. x,
// weight, bias, y: (size), of one dtype; computed in float32.
template <typename T>
void layer_norm_row(const T* x, const T* weight, const T* bias, float eps, T* y, int64_t size) {
  Floats sums{}, squares{};
  for (int64_t i = 0; i < size; i += 16) sums = sums + load_first(x + i, size - i);
  const Floats mean = broadcast(reduce_add(sums) / size);
  for (int64_t i = 0; i < size; i += 16) {
    const Floats difference = load_first(x + i, size - i) - mean;
    squares = fma(difference, select(first_lanes(size - i), difference, Floats{}), squares);
  }
  const Floats factor = broadcast(1 / std::sqrt(reduce_add(squares) / size + eps));
  for (int64_t i = 0; i < size; i += 16) {
    const Floats normal = (load_first(x + i, size - i) - mean) * factor;
    const Floats added = bias ? load_first(bias + i, size - i) : Floats{};
    store_first(y + i, size - i, fma(normal, load_first(weight + i, size - i), added));
  }
}

// y = silu(gate) · up. gate, up, y: (size), of one dtype; computed in float32. size: a multiple of
// 16.
template <typename T>
void swiglu_row(const T* gate, const T* up, T* y, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const Floats value = load(gate + i);
    const Floats silu = value / (broadcast(1) + exp(-value));
    store(y + i, silu * load(up + i));
  }
}

// GPT-2's GELU, y = x · sigmoid(2 u) with u = √(2/π) (x + 0.044715 x³); or, if BACKWARD, the
// gradient with respect to x, from dy, that with respect to the result. x, dy, y: (size), of one
// dtype; computed in float32.
template <bool BACKWARD, typename T>
void gelu_row(const T* x, const T* dy, T* y, int64_t size) {
  const Floats one = broadcast(1), bound = broadcast(16);
  const Floats twice = broadcast(1.59576912f), cubic = broadcast(0.0713548163f);  // 2 √(2/π)
  for (int64_t i = 0; i < size; i += 16) {
    const Floats value = load_first(x + i, size - i);
    // Beyond ±16 the sigmoid is 0 or 1. NaN stays NaN.
    const Floats clamped = min(bound, max(-bound, value));
    const Floats square = clamped * clamped;
    const Floats twice_u = clamped * fma(cubic, square, twice);
    const Floats sigmoid = one / (one + exp(-twice_u));
    Floats result = value * sigmoid;
    if (BACKWARD) {
      const Floats slope = fma(broadcast(3) * cubic, square, twice);
      const Floats rest = result * (one - sigmoid);
      result = fma(rest, slope, sigmoid) * load_first(dy + i, size - i);
    }
    store_first(y + i, size - i, result);
  }
}

// Rotary position embedding of a head, its halves as pairs: y = x · cosines + swapped · sines,
// where `swapped` is x with its halves exchanged, and sines are negative in the first half. All
// are (size) and of one dtype; computed in float32. size: a multiple of 32. y may be x.
template <typename T>
void rotate_head(const T* x, const T* cosines, const T* sines, T* y, int64_t size) {
  for (int64_t i = 0, j = size / 2; j < size; i += 16, j += 16) {
    const Floats first = load(x + i), second = load(x + j);
    store(y + i, fma(first, load(cosines + i), second * load(sines + i)));
    store(y + j, fma(second, load(cosines + j), first * load(sines + j)));
  }
}

// y (columns) = the sums of the columns of x (rows, columns), float32; 64 columns at a time.
template <typename T>
void column_sums(const T* x, float* y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_FROM)
  for (int64_t first = 0; first < columns; first += 64) {
    Floats sums[4] = {};
    for (int64_t row = 0; row < rows; row++)
      for (int k = 0; k < 4; k++) {
        const int64_t column = first + 16 * k;
        sums[k] = sums[k] + load_first(x + row * columns + column, columns - column);
      }
    for (int k = 0; k < 4; k++) store_first(y + first + 16 * k, columns - first - 16 * k, sums[k]);
  }
}

// losses (rows) = -log softmax(x)[target] for each row of logits x (rows, size), a row every
// `stride` numbers; and, unless scale is 0, x = scale · (softmax(x) - 1 at the target), the
// gradient of scale · loss. Losses and sums are float32. Throws BAD_TARGETS, and does nothing, if a
// target is not in a row.
template <typename T>
void cross_entropy(T* x, const int64_t* targets, float* losses, float scale, int64_t rows,
                   int64_t size, int64_t stride) {
  for (int64_t row = 0; row < rows; row++)
    require(0 <= targets[row] && targets[row] < size, BAD_TARGETS);
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
  for (int64_t row = 0; row < rows; row++) {
    T* const logits = x + row * stride;
    const float target = to_float(logits[targets[row]]);
    Floats high = broadcast(-INFINITY);
    for (int64_t i = 0; i < size; i += 16) {
      const Lanes lanes = first_lanes(size - i);
      high = select(lanes, max(high, load_first(logits + i, size - i)), high);
    }
    const float highest = reduce_max(high);
    const Floats shift = softmax_shift(highest);
    Floats sums{};
    for (int64_t i = 0; i < size; i += 16) {
      const Lanes lanes = first_lanes(size - i);
      const Floats weights = exp(load_first(logits + i, size - i) - shift);
      sums = select(lanes, sums + weights, sums);
    }
    const float sum = reduce_add(sums);
    losses[row] = std::log(sum) + highest - target;
    if (scale == 0) continue;
    const Floats factor = broadcast(scale / sum);
    for (int64_t i = 0; i < size; i += 16) {
      const Floats weights = exp(load_first(logits + i, size - i) - shift);
      store_first(logits + i, size - i, weights * factor);
    }
    const float probability = std::exp(target - highest) / sum;
    const Floats gradient = broadcast(scale * (probability - 1));
    store_first(logits + targets[row], 1, gradient);
  }
}

}  // namespace
