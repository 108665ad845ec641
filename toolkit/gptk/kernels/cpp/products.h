// Products of few rows with weights.
//
// A product of few rows with weights that are quantized in groups of 32 takes as long as reading
// the weights, if the arithmetic keeps up. Here it does: codes are multiplied as the integers they
// are, four to a lane. x is rounded to 15 bits and a sign in each group of 32, so that a
// product is exact to some 1e-5. Each row's sums are made in the same order however many rows
// there are: a row's product does not depend on its company, to the last bit.
#pragma once

#include "common.h"

namespace {

constexpr int64_t GROUP = 32;   // inputs that share a scale and an offset
constexpr int64_t BLOCK = 16;   // outputs that stand side by side, one in each lane
constexpr int64_t AHEAD = 2048; // bytes that are prefetched before their turn

// Of a group in a block: 16 scales and 16 offsets in float16, then the codes.
constexpr int64_t bytes_of(int bits) { return 4 * BLOCK + GROUP * BLOCK * bits / 8; }

// Rows in groups: x = scale · (128 · high + low), and the group's sum.
struct Rows {
  int64_t groups;
  std::unique_ptr<int8_t[]> high, low;
  std::unique_ptr<float[]> scale, sum;

  Rows(int64_t rows, int64_t inputs)
      : groups(inputs / GROUP),
        high(new int8_t[rows * inputs]),
        low(new int8_t[rows * inputs]),
        scale(new float[rows * groups]),
        sum(new float[rows * groups]) {}

  template <typename T>
  void round(const T* x, int64_t at) {  // the group `at`, counted through all rows
    const __m512 a = load(x + at * GROUP), b = load(x + at * GROUP + 16);
    // As integers, absolute values keep their order, with infinity and NaN at its end.
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    const int32_t most = _mm512_reduce_max_epi32(
        _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), sign),
                         _mm512_and_si512(_mm512_castps_si512(b), sign)));
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    const float step = most < 0x7f800000 ? largest * (1.0f / 16256) : __builtin_nanf("");
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 16256 / largest : 0);
    const __m512i wide[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)),
                             _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse))};
    for (int half = 0; half < 2; half++) {
      const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(wide[half], _mm512_set1_epi32(64)), 7);
      const __m512i rest = _mm512_sub_epi32(wide[half], _mm512_slli_epi32(up, 7));
      const int64_t to = at * GROUP + 16 * half;
      _mm_storeu_si128((__m128i*)&high[to], _mm512_cvtepi32_epi8(up));
      _mm_storeu_si128((__m128i*)&low[to], _mm512_cvtepi32_epi8(rest));
    }
    scale[at] = step;
    sum[at] = step * _mm512_reduce_add_epi32(_mm512_add_epi32(wide[0], wide[1]));
  }
};

inline __m512i four_inputs(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

// A block of outputs for R rows from `row` on.
template <int bits, int R>
inline void products(const uint8_t* weights, const Rows& x, int64_t row, __m512* y) {
  for (int r = 0; r < R; r++) y[r] = _mm512_setzero_ps();
  for (int64_t group = 0; group < x.groups; group++, weights += bytes_of(bits)) {
    for (int64_t line = 0; line < bytes_of(bits); line += 64)
      _mm_prefetch((const char*)weights + AHEAD + line, _MM_HINT_T0);
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)weights));
    const __m512 offset = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)weights + 1));
    __m512i codes[8];  // four inputs each
    if constexpr (bits == 4) {
      const __m512i nibble = _mm512_set1_epi8(15);
      for (int i = 0; i < 4; i++) {
        const __m512i both = _mm512_loadu_si512(weights + 64 + 64 * i);
        codes[i] = _mm512_and_si512(both, nibble);
        codes[4 + i] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
      }
    } else {
      for (int i = 0; i < 8; i++) codes[i] = _mm512_loadu_si512(weights + 64 + 64 * i);
    }
    for (int r = 0; r < R; r++) {
      const int64_t at = (row + r) * x.groups + group;
      const int8_t *high = &x.high[at * GROUP], *low = &x.low[at * GROUP];
      __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
      for (int i = 0; i < 8; i += 2) {
        a = _mm512_dpbusd_epi32(a, codes[i], four_inputs(high + 4 * i));
        b = _mm512_dpbusd_epi32(b, codes[i + 1], four_inputs(high + 4 * i + 4));
        c = _mm512_dpbusd_epi32(c, codes[i], four_inputs(low + 4 * i));
        d = _mm512_dpbusd_epi32(d, codes[i + 1], four_inputs(low + 4 * i + 4));
      }
      a = _mm512_slli_epi32(_mm512_add_epi32(a, b), 7);
      a = _mm512_add_epi32(a, _mm512_add_epi32(c, d));
      const __m512 whole = _mm512_mul_ps(_mm512_cvtepi32_ps(a), scale);
      y[r] = _mm512_fmadd_ps(whole, _mm512_set1_ps(x.scale[at]), y[r]);
      y[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sum[at]), y[r]);
    }
  }
}

// Within a parallel region: this thread's outputs for all rows.
template <int bits, typename T>
void outputs_of(const Rows& x, const uint8_t* weights, const T* bias, T* y, int64_t rows,
                int64_t outputs) {
#pragma omp for schedule(static)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++) {
    const uint8_t* from = weights + block * x.groups * bytes_of(bits);
    const int64_t first = block * BLOCK, count = std::min(BLOCK, outputs - first);
    const __mmask16 lanes = lanes_of(count);
    const __m512 added = bias ? load_some(bias + first, lanes) : _mm512_setzero_ps();
    __m512 sums[4];
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (taken == 4)
        products<bits, 4>(from, x, row, sums);
      else if (taken == 2)
        products<bits, 2>(from, x, row, sums);
      else
        products<bits, 1>(from, x, row, sums);
      for (int64_t r = 0; r < taken; r++)
        store_some(y + (row + r) * outputs + first, lanes, _mm512_add_ps(sums[r], added));
      row += taken;
    }
  }
}

constexpr int64_t ROUNDED_BY_EACH = 8;  // rows; more are worth waiting for each other

template <int bits, typename T>
void linear(const T* x, const uint8_t* weights, const T* bias, T* y, int64_t rows, int64_t inputs,
            int64_t outputs) {
  const int64_t groups = rows * (inputs / GROUP);
  if (rows <= ROUNDED_BY_EACH) {
#pragma omp parallel
    {
      Rows own(rows, inputs);
      for (int64_t at = 0; at < groups; at++) own.round(x, at);
      outputs_of<bits>(own, weights, bias, y, rows, outputs);
    }
    return;
  }
  Rows rounded(rows, inputs);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < groups; at++) rounded.round(x, at);
    outputs_of<bits>(rounded, weights, bias, y, rows, outputs);
  }
}

// The layout for `products`: codes (outputs, inputs), one in a byte, scale and offset (outputs,
// groups). The last block is filled up with zeros.
template <int bits>
void pack(const uint8_t* codes, const float* scale, const float* offset, uint8_t* y,
          int64_t outputs, int64_t inputs) {
  const int64_t groups = inputs / GROUP;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++)
    for (int64_t group = 0; group < groups; group++) {
      uint8_t* to = y + (block * groups + group) * bytes_of(bits);
      alignas(64) float scales[BLOCK] = {}, offsets[BLOCK] = {};
      alignas(64) uint32_t fours[GROUP / 4][BLOCK] = {};
      const int64_t first = block * BLOCK;
      for (int64_t i = 0; i < std::min(BLOCK, outputs - first); i++) {
        const int64_t at = (first + i) * groups + group;
        scales[i] = scale[at];
        offsets[i] = offset[at];
        uint32_t row[GROUP / 4];
        std::memcpy(row, codes + at * GROUP, GROUP);
        for (int four = 0; four < GROUP / 4; four++) fours[four][i] = row[four];
      }
      _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(_mm512_load_ps(scales), 0));
      _mm256_storeu_si256((__m256i*)to + 1, _mm512_cvtps_ph(_mm512_load_ps(offsets), 0));
      for (int i = 0; i < bits; i++) {
        __m512i line = _mm512_load_si512(fours[i]);
        if (bits == 4)
          line = _mm512_or_si512(line, _mm512_slli_epi32(_mm512_load_si512(fours[4 + i]), 4));
        _mm512_storeu_si512(to + 64 + 64 * i, line);
      }
    }
}

// y = code · scale + offset, in groups.
template <typename T>
void dequantize(const uint8_t* codes, const float* scale, const float* offset, T* y,
                int64_t groups) {
#pragma omp parallel for schedule(static)
  for (int64_t group = 0; group < groups; group++)
    for (int64_t i = group * GROUP; i < (group + 1) * GROUP; i += 16) {
      const __m512i some = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
      store(y + i,
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(some), _mm512_set1_ps(scale[group]),
                            _mm512_set1_ps(offset[group])));
    }
}

// The weights themselves, y (outputs, inputs).
template <int bits, typename T>
void expand(const uint8_t* weights, T* y, int64_t inputs, int64_t outputs) {
  const int64_t groups = inputs / GROUP;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++)
    for (int64_t group = 0; group < groups; group++) {
      const uint8_t* from = weights + (block * groups + group) * bytes_of(bits);
      alignas(64) float scale[BLOCK], offset[BLOCK];
      _mm512_store_ps(scale, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
      _mm512_store_ps(offset, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from + 1)));
      alignas(64) uint8_t codes[GROUP / 4][BLOCK][4];
      for (int i = 0; i < bits; i++) {
        const __m512i loaded = _mm512_loadu_si512(from + 64 + 64 * i);
        const __m512i nibble = _mm512_set1_epi8(15);
        _mm512_store_si512(codes[i], bits == 4 ? _mm512_and_si512(loaded, nibble) : loaded);
        if (bits == 4)
          _mm512_store_si512(codes[4 + i], _mm512_and_si512(_mm512_srli_epi16(loaded, 4), nibble));
      }
      const int64_t count = std::min(BLOCK, outputs - block * BLOCK);
      for (int64_t i = 0; i < count; i++) {
        uint8_t row[GROUP];
        for (int four = 0; four < GROUP / 4; four++)
          std::memcpy(row + 4 * four, codes[four][i], 4);
        T* to = y + (block * BLOCK + i) * inputs + group * GROUP;
        for (int half = 0; half < 2; half++) {
          const __m128i some = _mm_loadu_si128((const __m128i*)row + half);
          const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(some));
          store(to + 16 * half,
                _mm512_fmadd_ps(numbers, _mm512_set1_ps(scale[i]), _mm512_set1_ps(offset[i])));
        }
      }
    }
}

// R rows of x with one output, each a vector of sums yet to be summed up.
template <int R, typename T>
inline void dots(const T* x, const T* weights, int64_t inputs, int64_t output,
                 __m512 (*sums)[BLOCK]) {
  __m512 sum[R];
  for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += 64 / sizeof(T)) {
    _mm_prefetch((const char*)(weights + i) + AHEAD, _MM_HINT_T0);
    const __m512i own = _mm512_loadu_si512(weights + i);
    for (int r = 0; r < R; r++)
      sum[r] = multiply(sum[r], x, own, _mm512_loadu_si512(x + r * inputs + i));
  }
  for (int r = 0; r < R; r++) sums[r][output] = sum[r];
}

// Weights as they are, (outputs, inputs), read from the first to the last by each thread.
template <typename T>
void dense(const T* x, const T* weights, const T* bias, T* y, int64_t rows, int64_t inputs,
           int64_t outputs) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < outputs; first += BLOCK) {
    const int64_t count = std::min(BLOCK, outputs - first);
    const __mmask16 lanes = lanes_of(count);
    const __m512 added = bias ? load_some(bias + first, lanes) : _mm512_setzero_ps();
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const T* from = x + row * inputs;
      __m512 sums[4][BLOCK] = {};
      for (int64_t o = 0; o < count; o++) {
        const T* own = weights + (first + o) * inputs;
        if (taken == 4)
          dots<4>(from, own, inputs, o, sums);
        else if (taken == 2)
          dots<2>(from, own, inputs, o, sums);
        else
          dots<1>(from, own, inputs, o, sums);
      }
      for (int64_t r = 0; r < taken; r++)
        store_some(y + (row + r) * outputs + first, lanes, _mm512_add_ps(sums_of(sums[r]), added));
      row += taken;
    }
  }
}

}  // namespace
