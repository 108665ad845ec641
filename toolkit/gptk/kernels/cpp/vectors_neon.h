// The vectors of vectors.h, four registers each, for ARM processors with NEON's dot products. Codes
// of 8 bits are multiplied by I8MM where the compiler may use it.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

// A register with 4 lanes.
struct Floats4 {
  float32x4_t v;
};
struct Ints4 {
  int32x4_t v;
};
struct Lanes4 {
  uint32x4_t v;  // all bits of a lane are set, or none
};

inline Floats4 operator+(Floats4 a, Floats4 b) { return {vaddq_f32(a.v, b.v)}; }
inline Floats4 operator-(Floats4 a, Floats4 b) { return {vsubq_f32(a.v, b.v)}; }
inline Floats4 operator*(Floats4 a, Floats4 b) { return {vmulq_f32(a.v, b.v)}; }
inline Floats4 operator/(Floats4 a, Floats4 b) { return {vdivq_f32(a.v, b.v)}; }
inline Floats4 operator-(Floats4 a) { return {vnegq_f32(a.v)}; }
inline Floats4 fma(Floats4 a, Floats4 b, Floats4 sum) { return {vfmaq_f32(sum.v, a.v, b.v)}; }
inline Lanes4 operator<(Floats4 a, Floats4 b) { return {vcltq_f32(a.v, b.v)}; }
inline Lanes4 operator<=(Floats4 a, Floats4 b) { return {vcleq_f32(a.v, b.v)}; }
inline Lanes4 operator==(Floats4 a, Floats4 b) { return {vceqq_f32(a.v, b.v)}; }
inline Floats4 select(Lanes4 lanes, Floats4 yes, Floats4 no) {
  return {vbslq_f32(lanes.v, yes.v, no.v)};
}
// NEON's own give NaN if either number is NaN.
inline Floats4 max(Floats4 a, Floats4 b) { return select(b < a, a, b); }
inline Floats4 min(Floats4 a, Floats4 b) { return select(a < b, a, b); }
inline Floats4 round(Floats4 x) { return {vrndnq_f32(x.v)}; }

inline Ints4 operator+(Ints4 a, Ints4 b) { return {vaddq_s32(a.v, b.v)}; }
inline Ints4 operator-(Ints4 a, Ints4 b) { return {vsubq_s32(a.v, b.v)}; }
inline Ints4 operator*(Ints4 a, Ints4 b) { return {vmulq_s32(a.v, b.v)}; }
inline Ints4 operator&(Ints4 a, Ints4 b) { return {vandq_s32(a.v, b.v)}; }
inline Ints4 operator|(Ints4 a, Ints4 b) { return {vorrq_s32(a.v, b.v)}; }
inline Ints4 operator^(Ints4 a, Ints4 b) { return {veorq_s32(a.v, b.v)}; }
inline Ints4 operator<<(Ints4 x, int n) { return {x.v << n}; }
inline Ints4 operator>>(Ints4 x, int n) { return {x.v >> n}; }
inline Ints4 shift_right_logical(Ints4 x, int n) {
  return {vreinterpretq_s32_u32(vreinterpretq_u32_s32(x.v) >> n)};
}
inline Ints4 max(Ints4 a, Ints4 b) { return {vmaxq_s32(a.v, b.v)}; }
inline Ints4 min(Ints4 a, Ints4 b) { return {vminq_s32(a.v, b.v)}; }
inline Ints4 select(Lanes4 lanes, Ints4 yes, Ints4 no) { return {vbslq_s32(lanes.v, yes.v, no.v)}; }

inline Ints4 bits_of(Floats4 x) { return {vreinterpretq_s32_f32(x.v)}; }
inline Floats4 floats_of_bits(Ints4 x) { return {vreinterpretq_f32_s32(x.v)}; }
inline Floats4 to_floats(Ints4 x) { return {vcvtq_f32_s32(x.v)}; }
inline Ints4 to_ints(Floats4 x) { return {vcvtnq_s32_f32(x.v)}; }

// Combines lanes i and i + 2, then i and i + 1.
template <typename Combine>
inline float reduce(Floats4 x, Combine combine) {
  const Floats4 two = combine(x, Floats4{vextq_f32(x.v, x.v, 2)});
  return vgetq_lane_f32(combine(two, Floats4{vextq_f32(two.v, two.v, 1)}).v, 0);
}
inline float reduce_add(Floats4 x) {
  return reduce(x, [](Floats4 a, Floats4 b) { return a + b; });
}
inline float reduce_max(Floats4 x) {
  return reduce(x, [](Floats4 a, Floats4 b) { return max(a, b); });
}
inline float reduce_min(Floats4 x) {
  return reduce(x, [](Floats4 a, Floats4 b) { return min(a, b); });
}
inline int32_t reduce_add(Ints4 x) { return vaddvq_s32(x.v); }
inline int32_t reduce_max(Ints4 x) { return vmaxvq_s32(x.v); }
inline int32_t reduce_min(Ints4 x) { return vminvq_s32(x.v); }

template <int size>
inline void transpose(Ints4* x) {
  static_assert(size == 4, "as many vectors as lanes");
  const auto pairs = [](int32x4_t a) { return vreinterpretq_s64_s32(a); };
  const int32x4_t a = vtrn1q_s32(x[0].v, x[1].v), b = vtrn2q_s32(x[0].v, x[1].v);
  const int32x4_t c = vtrn1q_s32(x[2].v, x[3].v), d = vtrn2q_s32(x[2].v, x[3].v);
  x[0].v = vreinterpretq_s32_s64(vtrn1q_s64(pairs(a), pairs(c)));
  x[1].v = vreinterpretq_s32_s64(vtrn1q_s64(pairs(b), pairs(d)));
  x[2].v = vreinterpretq_s32_s64(vtrn2q_s64(pairs(a), pairs(c)));
  x[3].v = vreinterpretq_s32_s64(vtrn2q_s64(pairs(b), pairs(d)));
}

}  // namespace

#include "vectors_halves.h"

namespace {

using Floats = Two<Two<Floats4>>;
using Ints = Two<Two<Ints4>>;
using Lanes = Two<Two<Lanes4>>;

// A vector of four registers, each made by a function of its number.
template <typename Function>
inline auto from_registers(Function make) {
  return Two{Two{make(0), make(1)}, Two{make(2), make(3)}};
}
// Calls a function with the number of each register and the register.
template <typename Register, typename Function>
inline void for_registers(Two<Two<Register>> x, Function use) {
  use(0, x.low.low), use(1, x.low.high), use(2, x.high.low), use(3, x.high.high);
}

inline Floats broadcast(float x) {
  return from_registers([&](int) { return Floats4{vdupq_n_f32(x)}; });
}
inline Ints broadcast_int(int32_t x) {
  return from_registers([&](int) { return Ints4{vdupq_n_s32(x)}; });
}
inline float first_lane(Floats x) { return vgetq_lane_f32(x.low.low.v, 0); }
inline uint32_t bits(Lanes lanes) {
  const uint32x4_t one_bit = {1, 2, 4, 8};
  uint32_t all = 0;
  for_registers(
      lanes, [&](int i, Lanes4 four) { all |= vaddvq_u32(vandq_u32(four.v, one_bit)) << 4 * i; });
  return all;
}

inline Floats load(const float* x) {
  return from_registers([&](int i) { return Floats4{vld1q_f32(x + 4 * i)}; });
}
inline void store(float* y, Floats x) {
  for_registers(x, [&](int i, Floats4 four) { vst1q_f32(y + 4 * i, four.v); });
}
// By bytes, which may be anywhere.
inline Ints load_bits(const void* x) {
  return from_registers(
      [&](int i) { return Ints4{vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)x + 16 * i))}; });
}
inline void store_bits(void* y, Ints x) {
  for_registers(
      x, [&](int i, Ints4 four) { vst1q_u8((uint8_t*)y + 16 * i, vreinterpretq_u8_s32(four.v)); });
}
inline Ints load_shorts(const uint16_t* x) {
  return from_registers(
      [&](int i) { return Ints4{vreinterpretq_s32_u32(vmovl_u16(vld1_u16(x + 4 * i)))}; });
}
inline void store_shorts(uint16_t* y, Ints x) {
  for_registers(
      x, [&](int i, Ints4 four) { vst1_u16(y + 4 * i, vmovn_u32(vreinterpretq_u32_s32(four.v))); });
}
inline Ints pack_shorts(Ints low, Ints high) {
  const auto pack = [](Two<Ints4> x) {
    return Ints4{vreinterpretq_s32_s16(
        vuzp1q_s16(vreinterpretq_s16_s32(x.low.v), vreinterpretq_s16_s32(x.high.v)))};
  };
  return {{pack(low.low), pack(low.high)}, {pack(high.low), pack(high.high)}};
}
inline Ints load_bytes(const uint8_t* x) {
  const uint8x16_t bytes = vld1q_u8(x);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  const auto wide = [](uint16x4_t four) { return Ints4{vreinterpretq_s32_u32(vmovl_u16(four))}; };
  return {{wide(vget_low_u16(low)), wide(vget_high_u16(low))},
          {wide(vget_low_u16(high)), wide(vget_high_u16(high))}};
}
inline void store_bytes(int8_t* y, Ints x) {
  const auto narrow = [](Two<Ints4> half) {
    return vmovn_s16(vcombine_s16(vmovn_s32(half.low.v), vmovn_s32(half.high.v)));
  };
  vst1q_s8(y, vcombine_s8(narrow(x.low), narrow(x.high)));
}
inline Floats load_float16(const void* x) {
  return from_registers([&](int i) {
    const uint8x8_t bytes = vld1_u8((const uint8_t*)x + 8 * i);
    return Floats4{vcvt_f32_f16(vreinterpret_f16_u8(bytes))};
  });
}
inline void store_float16(void* y, Floats x) {
  for_registers(x, [&](int i, Floats4 four) {
    vst1_u8((uint8_t*)y + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(four.v)));
  });
}

inline Floats horizontal_sums(Floats* x) {
  return from_registers([&](int i) {
    Ints4 sums[4];  // of lanes i, i + 4, i + 8 and i + 12
    for (int j = 0; j < 4; j++) {
      const Two<Floats4> eight = x[4 * i + j].low + x[4 * i + j].high;
      sums[j] = bits_of(eight.low + eight.high);
    }
    transpose<4>(sums);
    return (floats_of_bits(sums[0]) + floats_of_bits(sums[2])) +
           (floats_of_bits(sums[1]) + floats_of_bits(sums[3]));
  });
}

inline Ints look_up(const uint8_t* table, Ints x) {
  const uint8x16_t values = vld1q_u8(table);
  const auto look = [&](Ints4 four) {
    return Ints4{vreinterpretq_s32_u8(vqtbl1q_u8(values, vreinterpretq_u8_s32(four.v)))};
  };
  return {{look(x.low.low), look(x.low.high)}, {look(x.high.low), look(x.high.high)}};
}

// sum + the product of four values and four bytes with a sign, in each lane. Without I8MM values of
// 8 bits are multiplied as if 128 were subtracted from them.
template <int bits>
inline Ints4 add_product(Ints4 sum, Ints4 values, int8x16_t four) {
  if (bits < 8) return {vdotq_s32(sum.v, vreinterpretq_s8_s32(values.v), four)};
#ifdef __ARM_FEATURE_MATMUL_INT8
  return {vusdotq_s32(sum.v, vreinterpretq_u8_s32(values.v), four)};
#else
  const uint8x16_t shifted = veorq_u8(vreinterpretq_u8_s32(values.v), vdupq_n_u8(128));
  return {vdotq_s32(sum.v, vreinterpretq_s8_u8(shifted), four)};
#endif
}

template <int bits, int count, int vectors>
inline void dot_values(const Ints* values, const int8_t* const* x, Ints* sums) {
  for (int n = 0; n < count; n++) {
    int32_t start = 0;
#ifndef __ARM_FEATURE_MATMUL_INT8
    if (bits == 8) {
      const int8x16_t ones = vdupq_n_s8(1);
      int32x4_t sum = vdotq_s32(vdupq_n_s32(0), vld1q_s8(x[n]), ones);
      if (vectors == 8) sum = vdotq_s32(sum, vld1q_s8(x[n] + 16), ones);
      start = 128 * vaddvq_s32(sum);
    }
#endif
    Ints sum = broadcast_int(start);
    for (int i = 0; i < vectors; i++) {
      const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x[n] + 4 * i)));
      sum.low.low = add_product<bits>(sum.low.low, values[i].low.low, four);
      sum.low.high = add_product<bits>(sum.low.high, values[i].low.high, four);
      sum.high.low = add_product<bits>(sum.high.low, values[i].high.low, four);
      sum.high.high = add_product<bits>(sum.high.high, values[i].high.high, four);
    }
    sums[n] = sum;
  }
}

// 24 of 32 registers.
constexpr int SUMS = 6;
constexpr int DOT_BITS = 8;
constexpr int64_t TILE_ROWS = 4, TILE_COLUMNS = 16;

inline void store_tile_rows(void* y, Ints x, int64_t part) {
  for_registers(x, [&](int i, Ints4 four) {
    if (i == part) vst1q_s32((int32_t*)y, four.v);
  });
}

}  // namespace
