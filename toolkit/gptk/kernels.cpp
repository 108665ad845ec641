// gptk's own kernels for x86 processors with AVX-512 and VNNI; gptk/kernels.py compiles them.
// Numbers are float32 or bfloat16 (as uint16_t) in memory and float32 in registers.
//
// A product of few rows with weights that are quantized in groups of 32 takes as long as reading
// the weights, if the arithmetic keeps up. Here it does: codes are multiplied as the integers they
// are, four to a lane. x is rounded to 15 bits and a sign in each group of 32, so that a
// product is exact to some 1e-5. Each row's sums are made in the same order however many rows
// there are: a row's product does not depend on its company, to the last bit.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int64_t GROUP = 32;   // inputs that share a scale and an offset
constexpr int64_t BLOCK = 16;   // outputs that stand side by side, one in each lane
constexpr int64_t AHEAD = 2048; // bytes that are prefetched before their turn

// Of a group in a block: 16 scales and 16 offsets in float16, then the codes.
constexpr int64_t bytes_of(int bits) { return 4 * BLOCK + GROUP * BLOCK * bits / 8; }

inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }

inline __m512 load(const uint16_t* x) {  // bfloat16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline __m512 load_some(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }

inline __m512 load_some(const uint16_t* x, __mmask16 lanes) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline float number(float x) { return x; }

inline float number(uint16_t x) {  // bfloat16
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void store(float* y, __mmask16 lanes, __m512 value) {
  _mm512_mask_storeu_ps(y, lanes, value);
}

inline void store(uint16_t* y, __mmask16 lanes, __m512 value) {  // to the nearest bfloat16, or even
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  near = _mm512_mask_mov_epi32(near, nan, _mm512_set1_epi32(0x7fc00000));
  _mm512_mask_cvtepi32_storeu_epi16(y, lanes, _mm512_srli_epi32(near, 16));
}

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
    const __mmask16 lanes = (1u << count) - 1;
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
        store(y + (row + r) * outputs + first, lanes, _mm512_add_ps(sums[r], added));
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
      store(y + i, 0xffff,
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
          store(to + 16 * half, 0xffff,
                _mm512_fmadd_ps(numbers, _mm512_set1_ps(scale[i]), _mm512_set1_ps(offset[i])));
        }
      }
    }
}

// The sum of each of 16 vectors, in a lane each.
inline __m512 sums_of(__m512* v) {
  for (int i = 0; i < 8; i++)
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44),
                         _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
  for (int i = 0; i < 4; i++)
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88),
                         _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd));
  for (int i = 0; i < 2; i++)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 2]), _mm512_unpackhi_ps(v[i], v[i + 2]));
  v[0] = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  return _mm512_shuffle_f32x4(v[0], v[0], 0xd8);
}

// sum + the products of 64 bytes of each.
inline __m512 multiply(__m512 sum, const float*, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

inline __m512 multiply(__m512 sum, const uint16_t*, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                        _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, upper)),
                         _mm512_castsi512_ps(_mm512_and_si512(b, upper)), sum);
#endif
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
    const __mmask16 lanes = (1u << count) - 1;
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
        store(y + (row + r) * outputs + first, lanes, _mm512_add_ps(sums_of(sums[r]), added));
      row += taken;
    }
  }
}

constexpr int64_t FEW = 1 << 15; // numbers that are not worth a second thread

inline __m512 exp(__m512 x) {  // to 1e-7; 0 below -104
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(factor));
  const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(seen, y, n);
}

constexpr __mmask16 ALL = 0xffff;

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

// -log(1 - u) for 0 < u < 1, to 2e-7 of it.
inline __m512 exponential_of(__m512 u) {
  const __m512 one = _mm512_set1_ps(1), rest = _mm512_sub_ps(one, u);
  const __m512 exponent = _mm512_getexp_ps(_mm512_mul_ps(rest, _mm512_set1_ps(4.0f / 3)));
  const __m512 m = _mm512_scalef_ps(rest, _mm512_sub_ps(_mm512_setzero_ps(), exponent));
  // log m = 2 artanh s, for m from 3/4 to 3/2.
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 y = _mm512_set1_ps(2.0f / 11);
  for (float factor : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
    y = _mm512_fmadd_ps(y, square, _mm512_set1_ps(factor));
  y = _mm512_fmadd_ps(exponent, _mm512_set1_ps(0.693147181f), _mm512_mul_ps(y, s));
  // What was lost when u was taken from 1.
  const __m512 lost = _mm512_sub_ps(_mm512_sub_ps(one, rest), u);
  return _mm512_sub_ps(_mm512_sub_ps(_mm512_setzero_ps(), y), _mm512_div_ps(lost, rest));
}

inline __m512i fold(__m512i x, int bits) { return _mm512_xor_si512(x, _mm512_srli_epi32(x, bits)); }

inline __m512i lanes_from(int32_t first) {
  return _mm512_add_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(first));
}

// gptk.random.exponential: the same bits, and the logarithm to the last digit or two.
inline __m512 noise(__m512i tokens, __m512i first, __m512i second) {
  __m512i x = _mm512_add_epi32(_mm512_mullo_epi32(tokens, _mm512_set1_epi32(0x9e3779b1)), first);
  x = _mm512_mullo_epi32(fold(x, 16), _mm512_set1_epi32(0x7feb352d));
  x = _mm512_mullo_epi32(fold(_mm512_xor_si512(x, second), 15), _mm512_set1_epi32(0x846ca68b));
  x = _mm512_xor_si512(x, _mm512_srai_epi32(x, 16));
  x = _mm512_and_si512(x, _mm512_set1_epi32(0x7fffffff));
  const __m512 scale = _mm512_set1_ps(0x1p-31f * (1 - 0x1p-23f));
  const __m512 u =
      _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(x), scale), _mm512_set1_ps(0x1p-32f));
  return exponential_of(u);
}

void exponential(const int32_t* keys, int64_t stride, const int32_t* tokens, float* y,
                 int64_t count) {
#pragma omp parallel for schedule(static) if (count > FEW)
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = count - i >= 16 ? ALL : (1u << (count - i)) - 1;
    __m512i first = _mm512_set1_epi32(keys[0]), second = _mm512_set1_epi32(keys[1]);
    if (stride) {
      const __m512i at = _mm512_mullo_epi32(lanes_from(0), _mm512_set1_epi32(stride));
      first = _mm512_mask_i32gather_epi32(first, lanes, at, keys + i * stride, 4);
      second = _mm512_mask_i32gather_epi32(second, lanes, at, keys + i * stride + 1, 4);
    }
    const __m512i token = _mm512_maskz_loadu_epi32(lanes, tokens + i);
    _mm512_mask_storeu_ps(y + i, lanes, noise(token, first, second));
  }
}

// What follows takes rows of numbers by token: logits, or keys to order tokens by.

inline __m512 tokens_from(const float* x, int64_t at, int64_t count) {  // -inf beyond the end
  const __m512 none = _mm512_set1_ps(-INFINITY);
  return count - at >= 16 ? _mm512_loadu_ps(x + at)
                          : _mm512_mask_loadu_ps(none, (1u << (count - at)) - 1, x + at);
}

float highest_of(const float* x, int64_t count) {  // of those that are numbers
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < count; i += 16) most = _mm512_max_ps(tokens_from(x, i, count), most);
  return _mm512_reduce_max_ps(most);
}

inline __m512 unit_of(float highest) { return _mm512_set1_ps(highest == -INFINITY ? 0 : highest); }

// Of weights exp(x - highest): their sum, and that of weight times x - highest.
struct Sums {
  float highest;
  double weight = 0, weighted = 0;

  Sums(const float* x, int64_t count) : highest(highest_of(x, count)) {
    const __m512 unit = unit_of(highest), zero = _mm512_setzero_ps();
    for (int64_t start = 0; start < count; start += 1024) {
      __m512 some = zero, more = zero;
      for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
        const __m512 below = _mm512_sub_ps(tokens_from(x, i, count), unit), one = exp(below);
        some = _mm512_add_ps(some, one);
        const __mmask16 seen = _mm512_cmp_ps_mask(one, zero, _CMP_NEQ_UQ);  // 0 · -inf is 0 here
        more = _mm512_mask3_fmadd_ps(one, below, more, seen);
      }
      weight += _mm512_reduce_add_ps(some);
      weighted += _mm512_reduce_add_ps(more);
    }
  }
};

struct Weighed {
  float key, weight;
};

// The tokens whose keys are at least `least`, with exp(logit - unit); returns their mass.
double gather(const float* keys, const float* logits, int64_t count, float least, __m512 unit,
              std::vector<Weighed>& to) {
  double mass = 0;
  to.clear();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 key = tokens_from(keys, i, count);
    const __mmask16 near = _mm512_cmp_ps_mask(key, _mm512_set1_ps(least), _CMP_GE_OQ);
    if (!near) continue;
    alignas(64) float found[16], weights[16];
    _mm512_store_ps(found, key);
    _mm512_store_ps(weights, exp(_mm512_sub_ps(tokens_from(logits, i, count), unit)));
    for (unsigned left = near; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (i + lane >= count) break;
      to.push_back({found[lane], weights[lane]});
      mass += weights[lane];
    }
  }
  return mass;
}

// The key at which tokens in the order of falling keys reach a mass together, or the lowest.
float key_at(std::vector<Weighed>& tokens, double mass) {
  auto from = tokens.begin(), to = tokens.end();
  double before = 0;
  const auto mass_of = [](auto first, auto last) {
    double sum = 0;
    for (; first < last; first++) sum += first->weight;
    return sum;
  };
  while (to - from > 32) {
    float some[3] = {from->key, from[(to - from) / 2].key, to[-1].key};
    std::sort(some, some + 3);
    const float pivot = some[1];
    const auto above = std::partition(from, to, [=](auto& one) { return one.key > pivot; });
    const auto upto = std::partition(above, to, [=](auto& one) { return one.key == pivot; });
    const double higher = before + mass_of(from, above), all = higher + mass_of(above, upto);
    if (higher >= mass) {
      to = above;
    } else if (all >= mass || upto == tokens.end()) {
      return pivot;
    } else {
      before = all;
      from = upto;
    }
  }
  std::sort(from, to, [](auto& one, auto& other) { return one.key > other.key; });
  for (; from < to; from++)
    if ((before += from->weight) >= mass) return from->key;
  return tokens.empty() ? -INFINITY : to[-1].key;
}

float last_key(const float* keys, const float* logits, int64_t count, double p,
               std::vector<Weighed>& scratch) {
  const Sums sums(logits, count);
  // Most often the mass is among tokens whose keys, log-probabilities or distances of such, are
  // near the highest.
  const float highest = keys == logits ? sums.highest : highest_of(keys, count);
  const __m512 unit = unit_of(sums.highest);
  double mass = p * sums.weight;
  if (!(gather(keys, logits, count, highest - 8, unit, scratch) >= mass))
    mass = p * gather(keys, logits, count, -INFINITY, unit, scratch);
  return key_at(scratch, mass);
}

// The k largest numbers, in falling order, the first of equal ones first. False if one is NaN.
bool top(const float* x, int64_t count, int64_t k, float* values, int64_t* tokens) {
  for (int64_t found = 0, i = 0; i < count; i += 16) {
    const __m512 some = tokens_from(x, i, count);
    if (_mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q)) return false;
    unsigned left = count - i >= 16 ? ALL : (1u << (count - i)) - 1;
    if (found == k)
      left = _mm512_cmp_ps_mask(some, _mm512_set1_ps(values[k - 1]), _CMP_GT_OQ);
    for (; left; left &= left - 1) {
      const int64_t token = i + __builtin_ctz(left);
      const float value = x[token];
      if (found == k && !(value > values[k - 1])) continue;
      int64_t to = found < k ? found++ : k - 1;
      for (; to && values[to - 1] < value; to--) {
        values[to] = values[to - 1];
        tokens[to] = tokens[to - 1];
      }
      values[to] = value;
      tokens[to] = token;
    }
  }
  return true;
}

// argmin noise / weight, with gptk_exponential's noise for a key. Returns the log-probability.
float draw(const float* x, int64_t count, const int32_t* key, int64_t* token) {
  const float highest = highest_of(x, count);
  const __m512 unit = unit_of(highest), none = _mm512_set1_ps(-INFINITY);
  __m512 best = _mm512_set1_ps(INFINITY);
  __m512i places = _mm512_setzero_si512(), place = lanes_from(0);
  double total = 0;
  for (int64_t start = 0; start < count; start += 1024) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = start; i < std::min(start + 1024, count); i += 16) {
      const __m512 some = tokens_from(x, i, count);
      if (_mm512_cmp_ps_mask(some, none, _CMP_NLE_UQ)) {
        const __m512 weight = exp(_mm512_sub_ps(some, unit));
        const __m512i first = _mm512_set1_epi32(key[0]), second = _mm512_set1_epi32(key[1]);
        const __m512 race = _mm512_div_ps(noise(place, first, second), weight);
        const __mmask16 won = _mm512_cmp_ps_mask(race, best, _CMP_LT_OQ);
        best = _mm512_mask_mov_ps(best, won, race);
        places = _mm512_mask_mov_epi32(places, won, place);
        sum = _mm512_add_ps(sum, weight);
      }
      place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
    total += _mm512_reduce_add_ps(sum);
  }
  const __mmask16 won =
      _mm512_cmp_ps_mask(best, _mm512_set1_ps(_mm512_reduce_min_ps(best)), _CMP_EQ_OQ);
  *token = _mm512_mask_reduce_min_epi32(won, places);
  return x[*token] - highest - (float)std::log(total);
}

constexpr int64_t CHUNK = 64;    // keys that are looked at together
constexpr int64_t WIDEST = 128;  // of a head
constexpr int64_t QUERIES = 16;  // the most there can be

// What a query makes of a chunk of keys: the largest score, and with it as the unit the sum of
// weights and the weighted sum of values.
struct Partial {
  float most, weight;
  float sum[WIDEST];
};

// Rows of queries, `rows` of each tree; each key head serves `group` query heads.
struct Attention {
  int64_t trees, rows, group, kv_heads, length, row_stride, key_stride, tree_stride, mask_stride;
  float scale;

  int64_t batch() const { return trees * kv_heads; }
  int64_t queries() const { return group * rows; }

  // Where a query of an element of the batch stands: its row, counted through all, and its head.
  int64_t row(int64_t one, int64_t query) const { return one / kv_heads * rows + query % rows; }
  int64_t head(int64_t one, int64_t query) const { return one % kv_heads * group + query / rows; }
};

// The scores of a query, for keys that are `seen`, into scores; returns the largest. Beyond count,
// up to a multiple of 16, they are -inf.
template <typename T, int vectors>
float score(const T* q, const T* keys, const T* mask, const int32_t* seen, int64_t count,
            float scale, float* scores) {
  constexpr int64_t size = 16 * vectors, step = 64 / sizeof(T);
  __m512i own[size / step];
  for (int v = 0; v < size / step; v++) own[v] = _mm512_loadu_si512(q + v * step);
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t key = 0; key < count; key += 16) {
    __m512 dots[16];
    alignas(64) float added[16];
    for (int i = 0; i < 16; i++) {
      const int32_t at = seen[std::min(key + i, count - 1)];
      dots[i] = _mm512_setzero_ps();
      for (int v = 0; v < size / step; v++)
        dots[i] = multiply(dots[i], q, own[v], _mm512_loadu_si512(keys + at * size + v * step));
      added[i] = key + i < count ? (mask ? number(mask[at]) : 0) : -INFINITY;
    }
    const __m512 some =
        _mm512_fmadd_ps(sums_of(dots), _mm512_set1_ps(scale), _mm512_load_ps(added));
    _mm512_store_ps(scores + key, some);
    most = _mm512_max_ps(most, some);
  }
  return _mm512_reduce_max_ps(most);
}

// The values that are `seen`, times the weights of H queries that are `apart`, for each.
template <typename T, int vectors, int H>
void weigh(const T* values, const float (*weights)[CHUNK], int64_t apart, const int32_t* seen,
           int64_t count, Partial* out) {
  __m512 sum[H][vectors];
  for (auto& one : sum)
    for (auto& some : one) some = _mm512_setzero_ps();
  for (int64_t key = 0; key < count; key++)
    for (int v = 0; v < vectors; v++) {
      const __m512 value = load(values + seen[key] * 16 * vectors + 16 * v);
      for (int h = 0; h < H; h++)
        sum[h][v] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h * apart][key]), value, sum[h][v]);
    }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < vectors; v++) _mm512_storeu_ps(out[h * apart].sum + 16 * v, sum[h][v]);
}

template <typename T, int vectors>
void attend_chunk(const T* q, const T* keys, const T* values, const T* mask, const Attention& at,
                  int64_t one, int64_t count, Partial* out) {
  constexpr int64_t size = 16 * vectors;
  alignas(64) float weights[QUERIES][CHUNK];
  // A row's heads see the same keys, of a tree often few.
  for (int64_t row = 0; row < at.rows; row++) {
    const T* added = mask ? mask + row * at.mask_stride : nullptr;
    int32_t seen[CHUNK];
    int64_t some = 0;
    for (int64_t key = 0; key < count; key++)
      if (!added || number(added[key]) > -INFINITY) seen[some++] = key;
    for (int64_t query = row; query < at.queries(); query += at.rows) {
      const T* from = q + at.row(one, query) * at.row_stride + at.head(one, query) * size;
      float* own = weights[query];
      out[query].most =
          score<T, vectors>(from, keys, added, seen, some, at.scale, own);
      const __m512 unit = unit_of(out[query].most);
      __m512 weight = _mm512_setzero_ps();
      for (int64_t key = 0; key < some; key += 16) {
        const __m512 part = exp(_mm512_sub_ps(_mm512_load_ps(own + key), unit));
        _mm512_store_ps(own + key, part);
        weight = _mm512_add_ps(weight, part);
      }
      out[query].weight = _mm512_reduce_add_ps(weight);
    }
    constexpr int together = vectors > 4 ? 2 : 4;  // as many sums as there are registers
    for (int64_t head = 0; head < at.group;) {
      const int64_t query = head * at.rows + row, left = at.group - head;
      if (left >= together) {
        weigh<T, vectors, together>(values, weights + query, at.rows, seen, some, out + query);
        head += together;
      } else if (left == 3) {
        weigh<T, vectors, 3>(values, weights + query, at.rows, seen, some, out + query);
        head += 3;
      } else if (left == 2) {
        weigh<T, vectors, 2>(values, weights + query, at.rows, seen, some, out + query);
        head += 2;
      } else {
        weigh<T, vectors, 1>(values, weights + query, at.rows, seen, some, out + query);
        head += 1;
      }
    }
  }
}

// Chunks are the same however many threads there are, and so is the result.
template <typename T, int vectors>
void attend(const T* q, const T* keys, const T* values, const T* mask, T* y, const Attention& at) {
  constexpr int64_t size = 16 * vectors;
  const int64_t chunks = (at.length + CHUNK - 1) / CHUNK, queries = at.queries();
  const std::unique_ptr<Partial[]> partial(new Partial[at.batch() * chunks * queries]);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < at.batch() * chunks; task++) {
      const int64_t one = task / chunks, start = task % chunks * CHUNK;
      const int64_t from = one * at.key_stride + start * size;
      attend_chunk<T, vectors>(q, keys + from, values + from,
                               mask ? mask + one / at.kv_heads * at.tree_stride + start : nullptr, at, one,
                               std::min(CHUNK, at.length - start), &partial[task * queries]);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < at.batch() * queries; task++) {
      const int64_t one = task / queries, query = task % queries;
      const Partial* of = &partial[one * chunks * queries + query];
      T* to = y + (at.row(one, query) * at.kv_heads * at.group + at.head(one, query)) * size;
      float most = -INFINITY;
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        most = std::max(most, of[chunk * queries].most);
      __m512 sum[vectors], weight = _mm512_setzero_ps();
      for (int v = 0; v < vectors; v++) sum[v] = _mm512_setzero_ps();
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const Partial& some = of[chunk * queries];
        const __m512 factor = exp(_mm512_set1_ps(some.most - most));
        weight = _mm512_fmadd_ps(factor, _mm512_set1_ps(some.weight), weight);
        for (int v = 0; v < vectors; v++)
          sum[v] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(some.sum + 16 * v), sum[v]);
      }
      for (int v = 0; v < vectors; v++)
        store(to + 16 * v, ALL, _mm512_div_ps(sum[v], weight));
    }
  }
}

// Queries and keys are the same tokens, and each sees itself and those before it.
struct Causal {
  int64_t rows, time, heads, kv_heads, q_row, q_time, kv_row, kv_time;  // strides; heads have none
  float scale;
};

// Chunks of keys are laid out so that sums stand side by side: lanes of 32 bits, as many numbers as
// fit into one, (numbers of a head, CHUNK keys); values likewise, (CHUNK keys, numbers of a head).
template <typename T, int vectors>
struct Chunk {
  static constexpr int64_t size = 16 * vectors, per = 4 / sizeof(T);
  alignas(64) uint32_t keys[size / per][CHUNK];
  alignas(64) T values[CHUNK / per][size][per];

  void fill(const T* k, const T* v, int64_t count, int64_t stride) {
    for (int64_t key = 0; key < CHUNK; key++)
      for (int64_t i = 0; i < size; i += per) {
        uint32_t some = 0;
        if (key < count) std::memcpy(&some, k + key * stride + i, 4);
        keys[i / per][key] = some;
        for (int64_t j = i; j < i + per; j++)
          values[key / per][j][key % per] = key < count ? v[key * stride + j] : T(0);
      }
  }
};

constexpr int QUERIES_AT_ONCE = 4;

template <typename T>
inline __m512i lane_of(const T* x) {
  int32_t some;
  std::memcpy(&some, x, 4);
  return _mm512_set1_epi32(some);
}

// Four queries, a token apart, with a chunk; the first sees `seen` of its keys. sum, most and
// weight go on from the chunks before.
template <typename T, int vectors>
void attend_chunk_causally(const T* q, int64_t apart, int64_t queries, float scale, int64_t seen,
                           const Chunk<T, vectors>& chunk, float (*sum)[16 * vectors], float* most,
                           float* weight) {
  constexpr int64_t size = 16 * vectors, per = 4 / sizeof(T);
  constexpr int Q = QUERIES_AT_ONCE, some = vectors % 4 ? 2 : 4;
  __m512 scores[Q][CHUNK / 16] = {};
  for (int64_t i = 0; i < size; i += per)
    for (int r = 0; r < Q; r++) {
      const __m512i own = lane_of(q + std::min<int64_t>(r, queries - 1) * apart + i);
      for (int k = 0; k < CHUNK / 16; k++)
        scores[r][k] =
            multiply(scores[r][k], q, own, _mm512_load_si512(&chunk.keys[i / per][16 * k]));
    }
  alignas(64) T weights[Q][CHUNK];
  __m512 factors[Q];
  for (int r = 0; r < Q; r++) {
    const int64_t own = std::min(seen + r, CHUNK);
    __m512 highest = _mm512_set1_ps(most[r]), added = _mm512_setzero_ps();
    for (int k = 0; k < CHUNK / 16; k++) {
      const int64_t left = std::min<int64_t>(std::max<int64_t>(own - 16 * k, 0), 16);
      const __m512 scaled = _mm512_mul_ps(scores[r][k], _mm512_set1_ps(scale));
      scores[r][k] =
          _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (1u << left) - 1, scaled);
      highest = _mm512_max_ps(scores[r][k], highest);
    }
    const float now = _mm512_reduce_max_ps(highest);
    factors[r] = exp(_mm512_sub_ps(_mm512_set1_ps(most[r]), unit_of(now)));
    for (int k = 0; k < CHUNK / 16; k++) {
      const __m512 one = exp(_mm512_sub_ps(scores[r][k], unit_of(now)));
      store(&weights[r][16 * k], ALL, one);
      added = _mm512_add_ps(added, one);
    }
    weight[r] = weight[r] * _mm512_cvtss_f32(factors[r]) + _mm512_reduce_add_ps(added);
    most[r] = now;
  }
  const int64_t last = std::min(CHUNK, seen + Q - 1);  // no query sees more
  for (int first = 0; first < vectors; first += some) {
    __m512 sums[Q][some];
    for (int r = 0; r < Q; r++)
      for (int v = 0; v < some; v++)
        sums[r][v] = _mm512_mul_ps(_mm512_load_ps(&sum[r][16 * (first + v)]), factors[r]);
    for (int64_t key = 0; key < last; key += per)
      for (int r = 0; r < Q; r++) {
        const __m512i own = lane_of(&weights[r][key]);
        for (int v = 0; v < some; v++)
          sums[r][v] = multiply(
              sums[r][v], q, own, _mm512_load_si512(&chunk.values[key / per][16 * (first + v)]));
      }
    for (int r = 0; r < Q; r++)
      for (int v = 0; v < some; v++) _mm512_store_ps(&sum[r][16 * (first + v)], sums[r][v]);
  }
}

template <typename T, int vectors>
void attend_causally(const T* q, const T* k, const T* v, T* y, const Causal& at) {
  constexpr int64_t size = 16 * vectors, Q = QUERIES_AT_ONCE;
  const int64_t chunks = (at.time + CHUNK - 1) / CHUNK, group = at.heads / at.kv_heads;
  const std::unique_ptr<Chunk<T, vectors>[]> packed(
      new Chunk<T, vectors>[at.rows * at.kv_heads * chunks]);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < at.rows * at.kv_heads * chunks; task++) {
      const int64_t start = task % chunks * CHUNK, one = task / chunks;
      const int64_t from = one / at.kv_heads * at.kv_row + start * at.kv_time +
                           one % at.kv_heads * size;
      packed[task].fill(k + from, v + from, std::min(CHUNK, at.time - start), at.kv_time);
    }
    // A chunk's length of queries a task, the longest first: they see the most.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < at.rows * at.heads * chunks; task++) {
      const int64_t block = chunks - 1 - task / (at.rows * at.heads), of = task % (at.rows * at.heads);
      const int64_t row = of / at.heads, head = of % at.heads;
      const Chunk<T, vectors>* seen = &packed[(row * at.kv_heads + head / group) * chunks];
      alignas(64) float sum[CHUNK][size] = {};
      float most[CHUNK], weight[CHUNK] = {};
      std::fill(most, most + CHUNK, -INFINITY);
      const int64_t start = block * CHUNK, count = std::min(CHUNK, at.time - start);
      const T* from = q + row * at.q_row + start * at.q_time + head * size;
      for (int64_t chunk = 0; chunk <= block; chunk++)
        for (int64_t i = 0; i < count; i += Q)
          attend_chunk_causally<T, vectors>(
              from + i * at.q_time, at.q_time, std::min(Q, count - i), at.scale,
              chunk < block ? CHUNK : i + 1, seen[chunk], sum + i, most + i, weight + i);
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < size; j += 16)
          store(y + ((row * at.time + start + i) * at.heads + head) * size + j, ALL,
                _mm512_div_ps(_mm512_load_ps(&sum[i][j]), _mm512_set1_ps(weight[i])));
    }
  }
}

template <typename T>
void attend_causally_of(const void* q, const void* k, const void* v, void* y, int64_t size,
                        const Causal& at) {
  auto* run = size == 32 ? attend_causally<T, 2> : size == 64 ? attend_causally<T, 4>
              : size == 96 ? attend_causally<T, 6> : attend_causally<T, 8>;
  run((const T*)q, (const T*)k, (const T*)v, (T*)y, at);
}

template <typename T>
void attend_of(const void* q, const void* keys, const void* values, const void* mask, void* y,
               int64_t size, const Attention& at) {
  auto* run = size == 32 ? attend<T, 2> : size == 64 ? attend<T, 4> : size == 96 ? attend<T, 6>
              : attend<T, 8>;
  run((const T*)q, (const T*)keys, (const T*)values, (const T*)mask, (T*)y, at);
}

}  // namespace

// All take x, and what is of its dtype, as bfloat16, or as float32.
#define OF(is_bfloat16, call)       \
  if (is_bfloat16) {                \
    using T = uint16_t;             \
    call;                           \
  } else {                          \
    using T = float;                \
    call;                           \
  }

extern "C" {

// y (rows, outputs) = x (rows, inputs) times the weights, plus the bias if there is one.
void gptk_linear(int is_bfloat16, int bits, const void* x, const void* weights, const void* bias,
                 void* y, int64_t rows, int64_t inputs, int64_t outputs) {
  OF(is_bfloat16, (bits == 4 ? linear<4, T> : linear<8, T>)(
                      (const T*)x, (const uint8_t*)weights, (const T*)bias, (T*)y, rows, inputs,
                      outputs));
}

// The same with weights as they are, (outputs, inputs), inputs a multiple of 32.
void gptk_dense(int is_bfloat16, const void* x, const void* weights, const void* bias, void* y,
                int64_t rows, int64_t inputs, int64_t outputs) {
  OF(is_bfloat16, dense((const T*)x, (const T*)weights, (const T*)bias, (T*)y, rows, inputs,
                        outputs));
}

// The weights of gptk_linear, y, from codes in a byte each, and of each group scale and offset.
void gptk_pack(int bits, const void* codes, const float* scale, const float* offset, void* y,
               int64_t outputs, int64_t inputs) {
  (bits == 4 ? pack<4> : pack<8>)((const uint8_t*)codes, scale, offset, (uint8_t*)y, outputs,
                                  inputs);
}

// y = codes · scale + offset, for groups of 32 codes in a byte each.
void gptk_dequantize(int is_bfloat16, const void* codes, const float* scale, const float* offset,
                     void* y, int64_t groups) {
  OF(is_bfloat16, dequantize((const uint8_t*)codes, scale, offset, (T*)y, groups));
}

// The weights of gptk_linear themselves, y (outputs, inputs).
void gptk_expand(int is_bfloat16, int bits, const void* weights, void* y, int64_t inputs,
                 int64_t outputs) {
  OF(is_bfloat16, (bits == 4 ? expand<4, T> : expand<8, T>)((const uint8_t*)weights, (T*)y, inputs,
                                                            outputs));
}

// x, y: (rows, size), size a multiple of 16.
void gptk_rms_norm(int is_bfloat16, const void* x, const void* weight, float eps, void* y,
                   int64_t rows, int64_t size) {
  OF(is_bfloat16, rms_norm((const T*)x, (const T*)weight, eps, (T*)y, rows, size));
}

// y (rows, size) = silu(x[:, :size]) · x[:, size:], size a multiple of 16.
void gptk_swiglu(int is_bfloat16, const void* x, void* y, int64_t rows, int64_t size) {
  OF(is_bfloat16, swiglu((const T*)x, (T*)y, rows, size));
}

// x, y: (heads, size), size a multiple of 32; cosines, sines: (angles, size), taken in turns.
void gptk_rotate(int is_bfloat16, const void* x, const void* cosines, const void* sines, void* y,
                 int64_t heads, int64_t angles, int64_t size) {
  OF(is_bfloat16, rotate((const T*)x, (const T*)cosines, (const T*)sines, (T*)y, heads, angles,
                         size));
}

// y (count): noise for tokens with keys of two numbers each, `stride` numbers apart, or one key, 0.
void gptk_exponential(const int32_t* keys, int64_t stride, const int32_t* tokens, float* y,
                      int64_t count) {
  exponential(keys, stride, tokens, y, count);
}

// Of each row of x (rows, size): the highest number, the sum of weights exp(x - highest), and the
// sum of weight · (x - highest).
void gptk_sums(const float* x, float* highest, float* weight, float* weighted, int64_t rows,
               int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const Sums sums(x + row * size, size);
    highest[row] = sums.highest;
    weight[row] = sums.weight;
    weighted[row] = sums.weighted;
  }
}

// For each row the key at which tokens in the order of falling keys reach the probability p.
void gptk_last_key(const float* keys, const float* logits, double p, float* y, int64_t rows,
                   int64_t size) {
#pragma omp parallel if (rows * size > FEW)
  {
    std::vector<Weighed> scratch;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
      y[row] = last_key(keys + row * size, logits + row * size, size, p, scratch);
  }
}

// y = x where the key is at least its row's `least`, or NaN; else -inf.
void gptk_keep_from(const float* x, const float* least, const float* keys, float* y, int64_t rows,
                    int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = row * size; i < (row + 1) * size; i++)
      y[i] = keys[i] < least[row] ? -INFINITY : x[i];
}

// The k largest numbers of each row and where they are. `found` is 0 for a row with a NaN.
void gptk_top(const float* x, float* values, int64_t* tokens, int32_t* found, int64_t rows,
              int64_t size, int64_t k) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++)
    found[row] = top(x + row * size, size, k, values + row * k, tokens + row * k);
}

// A token of each row in proportion to exp(logits), by a row's key, and its log-probability.
void gptk_draw(const float* logits, const int32_t* keys, int64_t* tokens, float* logprobs,
               int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++)
    logprobs[row] = draw(logits + row * size, size, keys + 2 * row, tokens + row);
}

// y = softmax(q kᵀ · scale + mask) v. q: (trees · rows, heads, size) at row_stride, y alike without
// gaps; keys, values: (trees · kv_heads, length, size) at key_stride; mask, or none:
// (trees, rows, length) at its strides. size: 32, 64, 96 or 128.
void gptk_attend(int is_bfloat16, const void* q, const void* keys, const void* values,
                 const void* mask, void* y, float scale, int64_t trees, int64_t rows,
                 int64_t heads, int64_t kv_heads, int64_t length, int64_t size, int64_t row_stride,
                 int64_t key_stride, int64_t tree_stride, int64_t mask_stride) {
  const Attention at{trees,      rows,        heads / kv_heads, kv_heads, length, row_stride,
                     key_stride, tree_stride, mask_stride,      scale};
  OF(is_bfloat16, attend_of<T>(q, keys, values, mask, y, size, at));
}

// y = softmax(q kᵀ · scale) v, where each token sees itself and those before it. q, y: (rows, time,
// heads, size), k, v: (rows, time, kv_heads, size), at their strides; y without gaps.
void gptk_attend_causally(int is_bfloat16, const void* q, const void* k, const void* v, void* y,
                          float scale, int64_t rows, int64_t time, int64_t heads,
                          int64_t kv_heads, int64_t size, int64_t q_row, int64_t q_time,
                          int64_t kv_row, int64_t kv_time) {
  const Causal at{rows, time, heads, kv_heads, q_row, q_time, kv_row, kv_time, scale};
  OF(is_bfloat16, attend_causally_of<T>(q, k, v, y, size, at));
}
}

// The same for a program by AOTInductor: functions of PyTorch's stable C interface.
using Tensor = struct AtenTensorOpaque*;
extern "C" {
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_size(Tensor, int64_t, int64_t*);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 Tensor*);

int32_t aoti_torch_cpu_few_rows_linear(Tensor x, Tensor weights, int64_t bits, int64_t outputs,
                                       Tensor* y) {
  int64_t rows, inputs;
  int32_t dtype;
  void *from, *codes, *to;
  if (aoti_torch_get_size(x, 0, &rows) || aoti_torch_get_size(x, 1, &inputs) ||
      aoti_torch_get_dtype(x, &dtype) || aoti_torch_get_data_ptr(x, &from) ||
      aoti_torch_get_data_ptr(weights, &codes))
    return 1;
  const int64_t sizes[2] = {rows, outputs}, strides[2] = {outputs, 1};
  if (aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, y) ||
      aoti_torch_get_data_ptr(*y, &to))
    return 1;
  gptk_linear(dtype == aoti_torch_dtype_bfloat16(), bits, from, codes, nullptr, to, rows, inputs,
              outputs);
  return 0;
}
}
