// The vectors of vectors.h, two registers each, for x86 processors with AVX2, FMA and F16C. Bytes
// are multiplied by AVX-VNNI where the compiler may use it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

// A register with 8 lanes.
struct Floats8 {
  __m256 v;
};
struct Ints8 {
  __m256i v;
};
struct Lanes8 {
  __m256 v;  // all bits of a lane are set, or none
};

inline Floats8 operator+(Floats8 a, Floats8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats8 operator-(Floats8 a, Floats8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats8 operator*(Floats8 a, Floats8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats8 operator/(Floats8 a, Floats8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Floats8 operator-(Floats8 a) { return {-a.v}; }
inline Floats8 fma(Floats8 a, Floats8 b, Floats8 sum) { return {_mm256_fmadd_ps(a.v, b.v, sum.v)}; }
inline Floats8 max(Floats8 a, Floats8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Floats8 min(Floats8 a, Floats8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Lanes8 operator<(Floats8 a, Floats8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Lanes8 operator<=(Floats8 a, Floats8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline Lanes8 operator==(Floats8 a, Floats8 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Floats8 round(Floats8 x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Floats8 select(Lanes8 lanes, Floats8 yes, Floats8 no) {
  return {_mm256_blendv_ps(no.v, yes.v, lanes.v)};
}

inline Ints8 operator+(Ints8 a, Ints8 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints8 operator-(Ints8 a, Ints8 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline Ints8 operator*(Ints8 a, Ints8 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline Ints8 operator&(Ints8 a, Ints8 b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Ints8 operator|(Ints8 a, Ints8 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline Ints8 operator^(Ints8 a, Ints8 b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Ints8 operator<<(Ints8 x, int n) { return {_mm256_slli_epi32(x.v, n)}; }
inline Ints8 operator>>(Ints8 x, int n) { return {_mm256_srai_epi32(x.v, n)}; }
inline Ints8 shift_right_logical(Ints8 x, int n) { return {_mm256_srli_epi32(x.v, n)}; }
inline Ints8 max(Ints8 a, Ints8 b) { return {_mm256_max_epi32(a.v, b.v)}; }
inline Ints8 min(Ints8 a, Ints8 b) { return {_mm256_min_epi32(a.v, b.v)}; }

inline Ints8 bits_of(Floats8 x) { return {_mm256_castps_si256(x.v)}; }
inline Floats8 floats_of_bits(Ints8 x) { return {_mm256_castsi256_ps(x.v)}; }
inline Floats8 to_floats(Ints8 x) { return {_mm256_cvtepi32_ps(x.v)}; }
inline Ints8 to_ints(Floats8 x) { return {_mm256_cvtps_epi32(x.v)}; }
inline Ints8 select(Lanes8 lanes, Ints8 yes, Ints8 no) {
  return bits_of(select(lanes, floats_of_bits(yes), floats_of_bits(no)));
}

// Combines lanes i and i + 4, then i and i + 2, then i and i + 1.
template <typename Combine>
inline float reduce(Floats8 x, Combine combine) {
  const __m128 four = combine(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  const __m128 two = combine(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(combine(two, _mm_movehdup_ps(two)));
}
inline float reduce_add(Floats8 x) {
  return reduce(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
inline float reduce_max(Floats8 x) {
  return reduce(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
inline float reduce_min(Floats8 x) {
  return reduce(x, [](__m128 a, __m128 b) { return _mm_min_ps(a, b); });
}
template <typename Combine>
inline int32_t reduce(Ints8 x, Combine combine) {
  const __m128i four = combine(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  const __m128i two = combine(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(combine(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline int32_t reduce_add(Ints8 x) {
  return reduce(x, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
}
inline int32_t reduce_max(Ints8 x) {
  return reduce(x, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
}
inline int32_t reduce_min(Ints8 x) {
  return reduce(x, [](__m128i a, __m128i b) { return _mm_min_epi32(a, b); });
}

template <int size>
inline void transpose(Ints8* x) {
  static_assert(size == 8, "as many vectors as lanes");
  __m256i w[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256i a = _mm256_unpacklo_epi32(x[i].v, x[i + 1].v);
    const __m256i b = _mm256_unpackhi_epi32(x[i].v, x[i + 1].v);
    const __m256i c = _mm256_unpacklo_epi32(x[i + 2].v, x[i + 3].v);
    const __m256i d = _mm256_unpackhi_epi32(x[i + 2].v, x[i + 3].v);
    w[i] = _mm256_unpacklo_epi64(a, c), w[i + 1] = _mm256_unpackhi_epi64(a, c);
    w[i + 2] = _mm256_unpacklo_epi64(b, d), w[i + 3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    x[i].v = _mm256_permute2x128_si256(w[i], w[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2x128_si256(w[i], w[i + 4], 0x31);
  }
}

}  // namespace

#include "vectors_halves.h"

namespace {

using Floats = Two<Floats8>;
using Ints = Two<Ints8>;
using Lanes = Two<Lanes8>;

inline Floats broadcast(float x) { return {{_mm256_set1_ps(x)}, {_mm256_set1_ps(x)}}; }
inline Ints broadcast_int(int32_t x) { return {{_mm256_set1_epi32(x)}, {_mm256_set1_epi32(x)}}; }
inline float first_lane(Floats x) { return _mm256_cvtss_f32(x.low.v); }
inline uint32_t bits(Lanes lanes) {
  return _mm256_movemask_ps(lanes.low.v) | _mm256_movemask_ps(lanes.high.v) << 8;
}

inline Floats load(const float* x) { return {{_mm256_loadu_ps(x)}, {_mm256_loadu_ps(x + 8)}}; }
inline void store(float* y, Floats x) {
  _mm256_storeu_ps(y, x.low.v);
  _mm256_storeu_ps(y + 8, x.high.v);
}
inline Ints load_bits(const void* x) {
  const __m256i* halves = (const __m256i*)x;
  return {{_mm256_loadu_si256(halves)}, {_mm256_loadu_si256(halves + 1)}};
}
inline void store_bits(void* y, Ints x) {
  _mm256_storeu_si256((__m256i*)y, x.low.v);
  _mm256_storeu_si256((__m256i*)y + 1, x.high.v);
}
inline Ints load_bytes(const uint8_t* x) {
  return {{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)x))},
          {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(x + 8)))}};
}
inline Ints load_shorts(const uint16_t* x) {
  const __m128i* halves = (const __m128i*)x;
  return {{_mm256_cvtepu16_epi32(_mm_loadu_si128(halves))},
          {_mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1))}};
}
// 16 numbers below 2¹⁶ as 16 bits each.
inline __m256i to_shorts(Ints x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low.v, x.high.v), 0xd8);
}
inline Ints pack_shorts(Ints low, Ints high) { return {{to_shorts(low)}, {to_shorts(high)}}; }
inline void store_shorts(uint16_t* y, Ints x) { _mm256_storeu_si256((__m256i*)y, to_shorts(x)); }
inline void store_bytes(int8_t* y, Ints x) {
  const __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low.v, x.high.v), 0xd8);
  _mm_storeu_si128((__m128i*)y, _mm_packs_epi16(_mm256_castsi256_si128(shorts),
                                                _mm256_extracti128_si256(shorts, 1)));
}
inline Floats load_float16(const void* x) {
  const __m128i* halves = (const __m128i*)x;
  return {{_mm256_cvtph_ps(_mm_loadu_si128(halves))},
          {_mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
}
inline void store_float16(void* y, Floats x) {
  _mm_storeu_si128((__m128i*)y, _mm256_cvtps_ph(x.low.v, 0));
  _mm_storeu_si128((__m128i*)y + 1, _mm256_cvtps_ph(x.high.v, 0));
}

inline Floats horizontal_sums(Floats* x) {
  __m256 eight[16], four[8], two[4];
  for (int i = 0; i < 16; i++) eight[i] = (x[i].low + x[i].high).v;
  // In each half of a register a vector's four sums: i and i + 4.
  for (int i = 0; i < 8; i++) {
    const __m256 a = eight[i / 4 * 8 + i % 4], b = eight[i / 4 * 8 + i % 4 + 4];
    four[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  for (int i = 0; i < 4; i++) {
    const __m256 a = four[2 * i], b = four[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  const auto last = [&](__m256 a, __m256 b) {
    return Floats8{_mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee))};
  };
  return {last(two[0], two[1]), last(two[2], two[3])};
}

inline Ints look_up(const uint8_t* table, Ints x) {
  const __m256i values = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
  return {{_mm256_shuffle_epi8(values, x.low.v)}, {_mm256_shuffle_epi8(values, x.high.v)}};
}

#ifdef __AVXVNNI__
constexpr int DOT_BITS = 8;
#else
constexpr int DOT_BITS = 6;
#endif

// The compiler is told to have each sum in a register after each product: in an order of its own it
// would keep most of them in memory.
template <int bits, int count, int vectors>
inline void dot_values(const Ints* values, const int8_t* const* x, Ints* sums) {
#ifdef __AVXVNNI__
  constexpr int steps = 1, together = vectors;
#else
  // Of 8 bits, the lower 4 and the upper 4. So many vectors of products, each of two values, are
  // summed in 16 bits: below 2¹⁵.
  constexpr int steps = bits == 8 ? 2 : 1;
  constexpr int most = bits <= 4 || bits == 8 ? 8 : bits == 5 ? 4 : 2;
  constexpr int together = most < vectors ? most : vectors;
#endif
  for (int step = 0; step < steps; step++)
    for (int first = 0; first < vectors; first += together) {
      __m256i low[count], high[count];
#ifdef __AVXVNNI__
      for (int n = 0; n < count; n++) low[n] = high[n] = _mm256_setzero_si256();
#endif
#pragma GCC unroll 8
      for (int i = 0; i < together; i++) {
        const Ints& value = values[8 * step + first + i];
#pragma GCC unroll 3
        for (int n = 0; n < count; n++) {
          const __m256i four = _mm256_set1_epi32(four_bytes(x[n] + 4 * (first + i)));
#ifdef __AVXVNNI__
          low[n] = _mm256_dpbusd_avx_epi32(low[n], value.low.v, four);
          high[n] = _mm256_dpbusd_avx_epi32(high[n], value.high.v, four);
#else
          const __m256i to_low = _mm256_maddubs_epi16(value.low.v, four);
          const __m256i to_high = _mm256_maddubs_epi16(value.high.v, four);
          low[n] = i ? _mm256_add_epi16(low[n], to_low) : to_low;
          high[n] = i ? _mm256_add_epi16(high[n], to_high) : to_high;
#endif
          asm("" : "+x"(low[n]), "+x"(high[n]));
        }
      }
      for (int n = 0; n < count; n++) {
#ifndef __AVXVNNI__
        const __m256i factor = _mm256_set1_epi16(1 << 4 * step);
        low[n] = _mm256_madd_epi16(low[n], factor), high[n] = _mm256_madd_epi16(high[n], factor);
#endif
        const Ints sum{{low[n]}, {high[n]}};
        sums[n] = step + first ? sums[n] + sum : sum;
      }
    }
}

// 12 of 16 registers.
constexpr int SUMS = 6;
constexpr int64_t TILE_ROWS = 4, TILE_COLUMNS = 16;

inline void store_tile_rows(void* y, Ints x, int64_t part) {
  const __m256i half = part < 2 ? x.low.v : x.high.v;
  _mm_storeu_si128((__m128i*)y,
                   part % 2 ? _mm256_extracti128_si256(half, 1) : _mm256_castsi256_si128(half));
}

}  // namespace
