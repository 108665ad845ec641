// The operations between the matrix products of a model, and the loss after the last product.
#pragma once

#include "common.h"

namespace {

// y = x / √(mean x² + eps) · weight for each row. x, y: (rows, size), weight: (size), of one dtype;
// computed in float32. size: a multiple of 16.
template <typename T>
void rms_norm(const T* x, const T* weight, float eps, T* y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * size;
    T* to = y + row * size;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 value = load(from + i);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / size;
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(mean + eps));
    for (int64_t i = 0; i < size; i += 16)
      store(to + i, _mm512_mul_ps(_mm512_mul_ps(load(from + i), factor), load(weight + i)));
  }
}

// y (rows, size) = silu(gate) · up, with x (rows, 2 size): a row's gate, then its up. x and y have
// one dtype; computed in float32. size: a multiple of 16.
template <typename T>
void swiglu(const T* x, T* y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = x + 2 * row * size, *up = gate + size;
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 value = load(gate + i);
      const __m512 inverse = exp(_mm512_sub_ps(_mm512_setzero_ps(), value));
      const __m512 silu = _mm512_div_ps(value, _mm512_add_ps(_mm512_set1_ps(1), inverse));
      store(y + row * size + i, _mm512_mul_ps(silu, load(up + i)));
    }
  }
}

// GPT-2's GELU of `size` numbers, y = x · sigmoid(2 u) with u = √(2/π) (x + 0.044715 x³); or, if
// BACKWARD, the gradient with respect to x, from dy, that with respect to the result. x, dy and y
// have one dtype; computed in float32.
template <bool BACKWARD, typename T>
void gelu(const T* x, const T* dy, T* y, int64_t size) {
  const __m512 zero = _mm512_setzero_ps(), bound = _mm512_set1_ps(16);
  const __m512 one = _mm512_set1_ps(1), twice = _mm512_set1_ps(1.59576912f);  // 2 √(2/π)
  const __m512 cubic = _mm512_set1_ps(0.0713548163f);                         // times 0.044715
#pragma omp parallel for schedule(static) if (size > PARALLEL_FROM)
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 lanes = first_lanes(size - i);
    const __m512 value = load_masked(x + i, lanes);
    // Beyond ±16 the sigmoid is 0 or 1. NaN stays NaN.
    const __m512 clamped = _mm512_min_ps(bound, _mm512_max_ps(_mm512_sub_ps(zero, bound), value));
    const __m512 square = _mm512_mul_ps(clamped, clamped);
    const __m512 twice_u = _mm512_mul_ps(clamped, _mm512_fmadd_ps(cubic, square, twice));
    const __m512 inverse = exp(_mm512_sub_ps(zero, twice_u));
    const __m512 sigmoid = _mm512_div_ps(one, _mm512_add_ps(one, inverse));
    __m512 result = _mm512_mul_ps(value, sigmoid);
    if (BACKWARD) {
      const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(3), cubic), square, twice);
      const __m512 rest = _mm512_mul_ps(result, _mm512_sub_ps(one, sigmoid));
      result = _mm512_mul_ps(_mm512_fmadd_ps(rest, slope, sigmoid), load_masked(dy + i, lanes));
    }
    store_masked(y + i, lanes, result);
  }
}

// Rotary position embedding, the halves of a head as pairs: y = x · cosines + swapped · sines,
// where `swapped` is x with its halves exchanged, and sines are negative in the first half. x, y:
// (heads, size); cosines, sines: (angles, size), where head i takes those of i % angles. All have
// one dtype; computed in float32. size: a multiple of 32.
template <typename T>
void rotate(const T* x, const T* cosines, const T* sines, T* y, int64_t heads, int64_t angles,
            int64_t size) {
#pragma omp parallel for schedule(static) if (heads * size > PARALLEL_FROM)
  for (int64_t head = 0; head < heads; head++) {
    const T* from = x + head * size;
    const int64_t angle = head % angles * size;
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 swapped = load(from + (i < size / 2 ? i + size / 2 : i - size / 2));
      const __m512 turned = _mm512_mul_ps(swapped, load(sines + angle + i));
      store(y + head * size + i,
            _mm512_fmadd_ps(load(from + i), load(cosines + angle + i), turned));
    }
  }
}

// y (columns) = the sums of the columns of x (rows, columns), float32; 64 columns at a time.
template <typename T>
void column_sums(const T* x, float* y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > PARALLEL_FROM)
  for (int64_t first = 0; first < columns; first += 64) {
    __m512 sums[4];
    __mmask16 lanes[4];
    for (int k = 0; k < 4; k++) {
      sums[k] = _mm512_setzero_ps();
      lanes[k] = first_lanes(columns - first - 16 * k);
    }
    for (int64_t row = 0; row < rows; row++)
      for (int k = 0; k < 4; k++)
        sums[k] = _mm512_add_ps(sums[k], load_masked(x + row * columns + first + 16 * k, lanes[k]));
    for (int k = 0; k < 4; k++) store_masked(y + first + 16 * k, lanes[k], sums[k]);
  }
}

// losses (rows) = -log softmax(x)[target] for each row of logits x (rows, size), a row every
// `stride` numbers; and, unless scale is 0, x = scale · (softmax(x) - 1 at the target), the
// gradient of scale · loss. Losses and sums are float32. Returns BAD_VALUE, and does nothing, if a
// target is not in a row.
template <typename T>
Status cross_entropy(T* x, const int64_t* targets, float* losses, float scale, int64_t rows,
                     int64_t size, int64_t stride) {
  for (int64_t row = 0; row < rows; row++)
    if (targets[row] < 0 || targets[row] >= size) return BAD_VALUE;
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
  for (int64_t row = 0; row < rows; row++) {
    T* const logits = x + row * stride;
    const float target = to_float(logits[targets[row]]);
    __m512 high = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < size; i += 16) {
      const __mmask16 lanes = first_lanes(size - i);
      high = _mm512_mask_max_ps(high, lanes, high, load_masked(logits + i, lanes));
    }
    const float highest = _mm512_reduce_max_ps(high);
    const __m512 shift = softmax_shift(highest);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 weights = exp(_mm512_sub_ps(load_masked(logits + i, lanes), shift));
      sums = _mm512_mask_add_ps(sums, lanes, sums, weights);
    }
    const float sum = _mm512_reduce_add_ps(sums);
    losses[row] = std::log(sum) + highest - target;
    if (scale == 0) continue;
    const __m512 factor = _mm512_set1_ps(scale / sum);
    for (int64_t i = 0; i < size; i += 16) {
      const __mmask16 lanes = first_lanes(size - i);
      const __m512 weights = exp(_mm512_sub_ps(load_masked(logits + i, lanes), shift));
      store_masked(logits + i, lanes, _mm512_mul_ps(weights, factor));
    }
    const float probability = std::exp(target - highest) / sum;
    const __m512 gradient = _mm512_set1_ps(scale * (probability - 1));
    store_masked(logits + targets[row], 1, gradient);
  }
  return OK;
}

}  // namespace
