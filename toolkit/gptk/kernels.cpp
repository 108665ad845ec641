// gptk's own kernels for x86 processors with AVX-512 and VNNI; gptk/kernels.py compiles them.
//
// A product of few rows with weights that are quantized in groups of 32 takes as long as reading
// the weights, if the arithmetic keeps up. Here it does: codes are multiplied as the integers they
// are, four to a lane. x is rounded to 15 bits and a sign in each group of 32, so that a
// product is exact to some 1e-5. Each row's sums are made in the same order however many rows
// there are: a row's product does not depend on its company, to the last bit.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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
  std::vector<int8_t> high, low;
  std::vector<float> scale, sum;

  Rows(int64_t rows, int64_t inputs)
      : groups(inputs / GROUP),
        high(rows * inputs),
        low(rows * inputs),
        scale(rows * groups),
        sum(rows * groups) {}

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
    const float step = most < 0x7f800000 ? largest / 16256 : __builtin_nanf("");
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

template <int bits, typename T>
void linear(const T* x, const uint8_t* weights, const T* bias, T* y, int64_t rows, int64_t inputs,
            int64_t outputs) {
  Rows rounded(rows, inputs);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < rows * rounded.groups; at++) rounded.round(x, at);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++) {
      const uint8_t* from = weights + block * rounded.groups * bytes_of(bits);
      const int64_t first = block * BLOCK, count = std::min(BLOCK, outputs - first);
      const __mmask16 lanes = (1u << count) - 1;
      float shift[BLOCK] = {};
      if (bias)
        for (int64_t i = 0; i < count; i++) {
          if constexpr (sizeof(T) == 4)
            shift[i] = bias[first + i];
          else {
            const uint32_t whole = (uint32_t)bias[first + i] << 16;
            std::memcpy(shift + i, &whole, sizeof whole);
          }
        }
      const __m512 added = _mm512_loadu_ps(shift);
      __m512 sums[4];
      for (int64_t row = 0; row < rows;) {
        const int64_t left = rows - row, taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (taken == 4)
          products<bits, 4>(from, rounded, row, sums);
        else if (taken == 2)
          products<bits, 2>(from, rounded, row, sums);
        else
          products<bits, 1>(from, rounded, row, sums);
        for (int64_t r = 0; r < taken; r++)
          store(y + (row + r) * outputs + first, lanes, _mm512_add_ps(sums[r], added));
        row += taken;
      }
    }
  }
}

template <typename T>
void linear_of(int bits, const void* x, const void* weights, const void* bias, void* y,
               int64_t rows, int64_t inputs, int64_t outputs) {
  auto* run = bits == 4 ? linear<4, T> : linear<8, T>;
  run((const T*)x, (const uint8_t*)weights, (const T*)bias, (T*)y, rows, inputs, outputs);
}

}  // namespace

// y (rows, outputs) = x (rows, inputs) times the weights, plus the bias if there is one. x, bias
// and y are bfloat16, or all float32.
extern "C" void gptk_linear(int bits, int is_bfloat16, const void* x, const void* weights,
                            const void* bias, void* y, int64_t rows, int64_t inputs,
                            int64_t outputs) {
  auto* run = is_bfloat16 ? linear_of<uint16_t> : linear_of<float>;
  run(bits, x, weights, bias, y, rows, inputs, outputs);
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
  gptk_linear(bits, dtype == aoti_torch_dtype_bfloat16(), from, codes, nullptr, to, rows, inputs,
              outputs);
  return 0;
}
}
