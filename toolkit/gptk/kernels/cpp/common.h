// What all of gptk's kernels use: loading, rounding, storing, and a few vector functions.
//
// Numbers in memory are float32, or bfloat16 held as uint16_t; sums are float32. A vector register
// has 16 lanes of 32 bits.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>

// Runs a statement with the type T set to uint16_t (bfloat16) or float.
#define DISPATCH_DTYPE(is_bfloat16, ...) \
  if (is_bfloat16) {                     \
    using T = uint16_t;                  \
    __VA_ARGS__;                         \
  } else {                               \
    using T = float;                     \
    __VA_ARGS__;                         \
  }

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 15;  // numbers; with fewer a second thread does not pay
constexpr __mmask16 ALL_LANES = 0xffff;

// What an exported function returns; Python raises an exception for all but OK.
enum Status : int32_t { OK = 0, OUT_OF_MEMORY = 1, BAD_VALUE = 2, NO_DATA = 3 };

// The memory of a tensor: where it is, and how many numbers a kernel reads or writes. PyTorch's
// tensors without data, such as those of a tracer, have null pointers.
struct Numbers {
  const void* data;
  int64_t count;
};

// Runs a kernel, which returns nothing or a Status, on these numbers. Kernels take memory outside
// of parallel regions only: an exception that leaves one ends the process.
template <typename Run>
int32_t status_of(std::initializer_list<Numbers> tensors, const Run& run) {
  for (const Numbers& numbers : tensors)
    if (numbers.count > 0 && !numbers.data) return NO_DATA;
  try {
    if constexpr (std::is_void<decltype(run())>::value) {
      run();
      return OK;
    } else {
      return run();
    }
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}

// `count`, rounded up to a multiple of `unit`.
inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Memory for the intermediate numbers of a call, uninitialized, from the start of a cache line on.
// It is for numbers and structs of these: no constructors run.
template <typename T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t count) { reserve(count); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data); }

  // Makes it hold at least `count`; what it held is lost. Throws std::bad_alloc.
  void reserve(int64_t count) {
    if (count <= capacity) return;
    std::free(data);
    capacity = 0;
    data = (T*)std::aligned_alloc(64, round_up(count * sizeof(T), 64));
    if (!data) throw std::bad_alloc();
    capacity = count;
  }
  T* get() const { return data; }
  T& operator[](int64_t index) const { return data[index]; }

 private:
  T* data = nullptr;
  int64_t capacity = 0;
};

// A mask of the first `count` lanes: all of them for 16 or more, none for 0 or less.
inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? ALL_LANES : count < 1 ? 0 : (1 << count) - 1;
}

// 16 consecutive numbers, as float32.
inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }

inline __m512 load(const uint16_t* x) {  // bfloat16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// The same for the lanes of a mask, 0 in the other lanes, whose memory is not read.
inline __m512 load_masked(const float* x, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, x);
}

inline __m512 load_masked(const uint16_t* x, __mmask16 lanes) {  // bfloat16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// One number, as float32.
inline float to_float(float x) { return x; }

inline float to_float(uint16_t x) {  // bfloat16
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// 32 numbers, those of `low` first, rounded to the nearest bfloat16, ties to even.
inline __m512i to_bfloat16(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  __m256i halves[2];
  for (int i = 0; i < 2; i++) {
    const __m512 value = i ? high : low;
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    near = _mm512_mask_mov_epi32(near, nan, _mm512_set1_epi32(0x7fc00000));
    halves[i] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16));
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
#endif
}

// 16 numbers, rounded to the nearest bfloat16, ties to even.
inline __m256i to_bfloat16(__m512 value) {
  return _mm512_castsi512_si256(to_bfloat16(value, value));
}

// Writes 16 consecutive numbers, rounded to the dtype of y.
inline void store(float* y, __m512 value) { _mm512_storeu_ps(y, value); }

inline void store(uint16_t* y, __m512 value) {  // bfloat16
  _mm256_storeu_si256((__m256i*)y, to_bfloat16(value));
}

// The same for the lanes of a mask. A store with a mask takes several times as long as one without,
// even if the mask has all lanes.
inline void store_masked(float* y, __mmask16 lanes, __m512 value) {
  lanes == ALL_LANES ? store(y, value) : _mm512_mask_storeu_ps(y, lanes, value);
}

inline void store_masked(uint16_t* y, __mmask16 lanes, __m512 value) {  // bfloat16
  lanes == ALL_LANES ? store(y, value) : _mm256_mask_storeu_epi16(y, lanes, to_bfloat16(value));
}

// The first `count` of 32 consecutive bfloat16 numbers, then zeros: lane i has numbers 2i, 2i + 1.
inline __m512i load_pairs(const uint16_t* x, int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(x);
  return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), x);
}

// Two rows of 16 bfloat16 numbers, interleaved: lane i has row[i] in its low half and next_row[i],
// or 0 without a next row, in its high half. Lanes that are not in the mask are 0.
inline __m512i interleave(const uint16_t* row, const uint16_t* next_row, __mmask16 lanes) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row));
  if (!next_row) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, next_row));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Transposes a matrix of 16 by 16 lanes, a register a row, in place.
inline void transpose(__m512i* v) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    w[i] = _mm512_unpacklo_epi64(a, c), w[i + 1] = _mm512_unpackhi_epi64(a, c);
    w[i + 2] = _mm512_unpacklo_epi64(b, d), w[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
    v[i] = _mm512_shuffle_i32x4(a, b, 0x88), v[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88), v[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

// Sums each of 16 vectors: lane i of the result is the sum of the lanes of v[i]. Overwrites v.
inline __m512 horizontal_sums(__m512* v) {
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

// sum + a · b lane by lane, where each lane of a and b holds a float32 number or two bfloat16
// numbers, whose two products are both added. The pointer is not read: its type says which.
inline __m512 multiply_add(__m512 sum, const float*, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

inline __m512 multiply_add(__m512 sum, const uint16_t*, __m512i a, __m512i b) {
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

// exp(x) of each lane, with a relative error of about 1e-7; 0 for x below -104.
inline __m512 exp(__m512 x) {
  // exp(x) = 2ⁿ exp(f), where n is the integer nearest to x / log 2, and f = x - n log 2.
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(factor));
  const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(positive, y, n);
}

// What a softmax subtracts from its scores: the highest one; 0 if all are masked with -inf, as the
// difference of two -inf is NaN.
inline __m512 softmax_shift(float highest) {
  return _mm512_set1_ps(highest == -INFINITY ? 0 : highest);
}

}  // namespace
