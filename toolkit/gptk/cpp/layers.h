// What stands between the products of a layer.
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
      store(to + i, ALL, _mm512_mul_ps(_mm512_mul_ps(load(from + i), factor), load(weight + i)));
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
      store(y + row * size + i, ALL, _mm512_mul_ps(silu, load(up + i)));
    }
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
      store(y + head * size + i, ALL,
            _mm512_fmadd_ps(load(from + i), load(cosines + at + i), turned));
    }
  }
}

}  // namespace
