// What stands between the products of layers, and after the last.
#pragma once

#include "common.h"

namespace {

template <typename T>
void rms_norm(const T* x, const T* weight, float eps, T* y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * size;
    T* to = y + row * size;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 one = load(from + i);
      squares = _mm512_fmadd_ps(one, one, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / size;
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(mean + eps));
    for (int64_t i = 0; i < size; i += 16)
      store(to + i, _mm512_mul_ps(_mm512_mul_ps(load(from + i), factor), load(weight + i)));
  }
}

template <typename T>
void swiglu(const T* x, T* y, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = x + 2 * row * size, *up = gate + size;
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 one = load(gate + i), below = exp(_mm512_sub_ps(_mm512_setzero_ps(), one));
      const __m512 silu = _mm512_div_ps(one, _mm512_add_ps(_mm512_set1_ps(1), below));
      store(y + row * size + i, _mm512_mul_ps(silu, load(up + i)));
    }
  }
}

// GELU as GPT-2 has it, x · sigmoid(2 u) with u = √(2/π) (x + 0.044715 x³), or its gradient from
// that of y, dy.
template <bool BACKWARD, typename T>
void gelu(const T* x, const T* dy, T* y, int64_t size) {
  const __m512 zero = _mm512_setzero_ps(), bound = _mm512_set1_ps(16);
  const __m512 one = _mm512_set1_ps(1), twice = _mm512_set1_ps(1.59576912f);  // 2 √(2/π)
  const __m512 cubic = _mm512_set1_ps(0.0713548163f);                         // times 0.044715
#pragma omp parallel for schedule(static) if (size > FEW)
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 lanes = lanes_of(size - i);
    const __m512 from = load_some(x + i, lanes);
    // Beyond, the share is 0 or 1; NaN stays.
    const __m512 near = _mm512_min_ps(bound, _mm512_max_ps(_mm512_sub_ps(zero, bound), from));
    const __m512 square = _mm512_mul_ps(near, near);
    const __m512 below = _mm512_mul_ps(near, _mm512_fmadd_ps(cubic, square, twice));
    const __m512 other = exp(_mm512_sub_ps(zero, below));
    const __m512 share = _mm512_div_ps(one, _mm512_add_ps(one, other));
    __m512 value = _mm512_mul_ps(from, share);
    if (BACKWARD) {
      const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(3), cubic), square, twice);
      const __m512 rest = _mm512_mul_ps(value, _mm512_sub_ps(one, share));
      value = _mm512_mul_ps(_mm512_fmadd_ps(rest, slope, share), load_some(dy + i, lanes));
    }
    store_some(y + i, lanes, value);
  }
}

template <typename T>
void rotate(const T* x, const T* cosines, const T* sines, T* y, int64_t heads, int64_t angles,
            int64_t size) {
#pragma omp parallel for schedule(static) if (heads * size > FEW)
  for (int64_t head = 0; head < heads; head++) {
    const T* from = x + head * size;
    const int64_t at = head % angles * size;
    for (int64_t i = 0; i < size; i += 16) {
      const __m512 other = load(from + (i < size / 2 ? i + size / 2 : i - size / 2));
      const __m512 turned = _mm512_mul_ps(other, load(sines + at + i));
      store(y + head * size + i,
            _mm512_fmadd_ps(load(from + i), load(cosines + at + i), turned));
    }
  }
}

// The sums of columns, for 64 of them at a time.
template <typename T>
void column_sums(const T* x, float* y, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static) if (rows * columns > FEW)
  for (int64_t first = 0; first < columns; first += 64) {
    __m512 sums[4];
    __mmask16 lanes[4];
    for (int k = 0; k < 4; k++) {
      sums[k] = _mm512_setzero_ps();
      lanes[k] = lanes_of(columns - first - 16 * k);
    }
    for (int64_t row = 0; row < rows; row++)
      for (int k = 0; k < 4; k++)
        sums[k] =
            _mm512_add_ps(sums[k], load_some(x + row * columns + first + 16 * k, lanes[k]));
    for (int k = 0; k < 4; k++) store_some(y + first + 16 * k, lanes[k], sums[k]);
  }
}

template <typename T>
void cross_entropy(T* x, const int64_t* targets, float* losses, float scale, int64_t rows,
                   int64_t size, int64_t stride) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++) {
    T* const from = x + row * stride;
    const float target = number(from[targets[row]]);
    __m512 high = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < size; i += 16) {
      const __mmask16 lanes = lanes_of(size - i);
      high = _mm512_mask_max_ps(high, lanes, high, load_some(from + i, lanes));
    }
    const float highest = _mm512_reduce_max_ps(high);
    const __m512 unit = unit_of(highest);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
      const __mmask16 lanes = lanes_of(size - i);
      const __m512 weights = exp(_mm512_sub_ps(load_some(from + i, lanes), unit));
      sums = _mm512_mask_add_ps(sums, lanes, sums, weights);
    }
    const float sum = _mm512_reduce_add_ps(sums);
    losses[row] = std::log(sum) + highest - target;
    if (scale == 0) continue;
    const __m512 factor = _mm512_set1_ps(scale / sum);
    for (int64_t i = 0; i < size; i += 16) {
      const __mmask16 lanes = lanes_of(size - i);
      const __m512 weights = exp(_mm512_sub_ps(load_some(from + i, lanes), unit));
      store_some(from + i, lanes, _mm512_mul_ps(weights, factor));
    }
    const float share = std::exp(target - highest) / sum;
    const __m512 changed = _mm512_set1_ps(scale * (share - 1));
    store_some(from + targets[row], 1, changed);
  }
}

}  // namespace
