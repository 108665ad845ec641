// The vectors of vectors.h, a register each, for x86 processors with AVX-512 and VNNI. bfloat16
// numbers are rounded and multiplied by AVX-512 BF16 where the compiler may use it.
#pragma once

// GCC warns of undefined vectors in its header, which are there on purpose.
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

namespace {

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Lanes {
  __mmask16 v;
};

// --- Lanes ---

inline Lanes first_lanes(int64_t count) {
  return {(__mmask16)(count >= 16 ? 0xffff : count < 1 ? 0 : (1 << count) - 1)};
}
inline uint32_t bits(Lanes lanes) { return lanes.v; }

// --- Float lanes ---

inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats operator-(Floats a) { return {-a.v}; }
inline Floats fma(Floats a, Floats b, Floats sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes operator<(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Lanes operator<=(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Lanes operator==(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Floats select(Lanes lanes, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(lanes.v, no.v, yes.v)};
}
inline Floats round(Floats x) { return {_mm512_roundscale_ps(x.v, 0)}; }
inline Floats scale_by_power(Floats x, Floats n) { return {_mm512_scalef_ps(x.v, n.v)}; }
inline float first_lane(Floats x) { return _mm512_cvtss_f32(x.v); }

// --- Integer lanes ---

inline Ints broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Ints operator<<(Ints x, int count) { return {_mm512_slli_epi32(x.v, count)}; }
inline Ints operator>>(Ints x, int count) { return {_mm512_srai_epi32(x.v, count)}; }
inline Ints shift_right_logical(Ints x, int count) { return {_mm512_srli_epi32(x.v, count)}; }
inline Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Ints min(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline Ints select(Lanes lanes, Ints yes, Ints no) {
  return {_mm512_mask_blend_epi32(lanes.v, no.v, yes.v)};
}

// --- Conversions ---

inline Ints bits_of(Floats x) { return {_mm512_castps_si512(x.v)}; }
inline Floats floats_of_bits(Ints x) { return {_mm512_castsi512_ps(x.v)}; }
inline Floats to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Ints to_ints(Floats x) { return {_mm512_cvtps_epi32(x.v)}; }

// --- Memory ---

inline Floats load(const float* x) { return {_mm512_loadu_ps(x)}; }
inline void store(float* y, Floats x) { _mm512_storeu_ps(y, x.v); }
inline Ints load_bits(const void* x) { return {_mm512_loadu_si512(x)}; }
inline void store_bits(void* y, Ints x) { _mm512_storeu_si512(y, x.v); }

inline Ints load_bytes(const uint8_t* x) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x))};
}
inline void store_bytes(int8_t* y, Ints x) {
  _mm_storeu_si128((__m128i*)y, _mm512_cvtepi32_epi8(x.v));
}

inline Ints load_shorts(const uint16_t* x) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x))};
}

inline Floats load_float16(const void* x) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x))};
}
inline void store_float16(void* y, Floats x) {
  _mm256_storeu_si256((__m256i*)y, _mm512_cvtps_ph(x.v, 0));
}

inline Ints pack_shorts(Ints low, Ints high) {
  return {_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low.v)),
                             _mm512_cvtepi32_epi16(high.v), 1)};
}
inline void store_shorts(uint16_t* y, Ints x) {
  _mm256_storeu_si256((__m256i*)y, _mm512_cvtepi32_epi16(x.v));
}

#ifdef __AVX512BF16__
#define GPTK_NATIVE_BFLOAT16
inline Ints to_bfloat16(Floats low, Floats high) {
  return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)};
}
inline Ints to_bfloat16_pairs(Floats low, Floats high) {
  const __m512i alternating =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(alternating, to_bfloat16(low, high).v)};
}
inline void store(uint16_t* y, Floats x) {
  _mm256_storeu_si256((__m256i*)y, (__m256i)_mm512_cvtneps_pbh(x.v));
}
inline Floats multiply_add_pairs(Floats sum, Ints a, Ints b) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif

// --- Across lanes ---

inline float reduce_add(Floats x) { return _mm512_reduce_add_ps(x.v); }
inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x.v); }
inline float reduce_min(Floats x) { return _mm512_reduce_min_ps(x.v); }
inline int32_t reduce_add(Ints x) { return _mm512_reduce_add_epi32(x.v); }
inline int32_t reduce_max(Ints x) { return _mm512_reduce_max_epi32(x.v); }
inline int32_t reduce_min(Ints x) { return _mm512_reduce_min_epi32(x.v); }

inline Floats horizontal_sums(Floats* x) {
  for (int i = 0; i < 8; i++)
    x[i].v = _mm512_add_ps(_mm512_shuffle_f32x4(x[i].v, x[i + 8].v, 0x44),
                           _mm512_shuffle_f32x4(x[i].v, x[i + 8].v, 0xee));
  for (int i = 0; i < 4; i++)
    x[i].v = _mm512_add_ps(_mm512_shuffle_f32x4(x[i].v, x[i + 4].v, 0x88),
                           _mm512_shuffle_f32x4(x[i].v, x[i + 4].v, 0xdd));
  for (int i = 0; i < 2; i++)
    x[i].v = _mm512_add_ps(_mm512_unpacklo_ps(x[i].v, x[i + 2].v),
                           _mm512_unpackhi_ps(x[i].v, x[i + 2].v));
  const __m512 sums =
      _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
  return {_mm512_shuffle_f32x4(sums, sums, 0xd8)};
}

template <int size>
inline void transpose(Ints* x) {
  static_assert(size == 16, "as many vectors as lanes");
  __m512i w[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(x[i].v, x[i + 1].v);
    const __m512i b = _mm512_unpackhi_epi32(x[i].v, x[i + 1].v);
    const __m512i c = _mm512_unpacklo_epi32(x[i + 2].v, x[i + 3].v);
    const __m512i d = _mm512_unpackhi_epi32(x[i + 2].v, x[i + 3].v);
    w[i] = _mm512_unpacklo_epi64(a, c), w[i + 1] = _mm512_unpackhi_epi64(a, c);
    w[i + 2] = _mm512_unpacklo_epi64(b, d), w[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
    x[i].v = _mm512_shuffle_i32x4(a, b, 0x88), x[i + 8].v = _mm512_shuffle_i32x4(a, b, 0xdd);
    x[i + 4].v = _mm512_shuffle_i32x4(c, d, 0x88), x[i + 12].v = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

// --- Products of bytes ---

inline Ints look_up(const uint8_t* table, Ints x) {
  const __m512i tables = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table));
  return {_mm512_shuffle_epi8(tables, x.v)};
}

template <int bits, int count, int vectors>
inline void dot_values(const Ints* values, const int8_t* const* x, Ints* sums) {
#pragma GCC unroll 12
  for (int n = 0; n < count; n++) {
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (int i = 0; i < vectors; i += 2) {
      even = _mm512_dpbusd_epi32(even, values[i].v, _mm512_set1_epi32(four_bytes(x[n] + 4 * i)));
      odd = _mm512_dpbusd_epi32(odd, values[i + 1].v,
                                _mm512_set1_epi32(four_bytes(x[n] + 4 * i + 4)));
    }
    sums[n].v = _mm512_add_epi32(even, odd);
  }
}

// --- Tiles ---

// 24 of 32 registers.
constexpr int SUMS = 24;
constexpr int DOT_BITS = 8;
constexpr int64_t TILE_ROWS = 8, TILE_COLUMNS = 48;

inline void store_tile_rows(void* y, Ints x, int64_t part) {
  _mm256_storeu_si256((__m256i*)y,
                      part ? _mm512_extracti64x4_epi64(x.v, 1) : _mm512_castsi512_si256(x.v));
}

}  // namespace
