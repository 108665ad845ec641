// Vectors of 16 lanes of 32 bits, the same operations on every processor: kernels are written with
// them once. A header for each instruction set says what an operation is there:
//
//     vectors_avx512.h   one register a vector
//     vectors_avx2.h     two registers
//     vectors_neon.h     four registers
//     vectors_plain.h    an array: what the others are compared with
//
// All give the same results, bit for bit, as operations have IEEE's rounding, and sums over lanes
// are in one order. The exception are products of bfloat16 pairs by AVX-512 BF16: see
// `multiply_add_pairs`.
//
// Such a header has the types
//
//     Floats   16 float32 numbers; Floats{} is 0
//     Ints     16 int32 numbers, or 512 bits for other uses: 32 bfloat16 numbers, 64 bytes
//     Lanes    true or false for each lane
//
// and, besides C++'s operators for these (comparisons are false with NaN; >> keeps the sign):
//
//     first_lanes(count)            the first `count` lanes: all for 16 or more, none for 0 or less
//     bits(lanes)                   bit i says whether lane i is true
//     select(lanes, yes, no)        yes where true, else no
//     broadcast(x), broadcast_int(x)
//                                   a number in every lane
//     fma(a, b, sum)                a · b + sum, rounded once
//     max(a, b), min(a, b)          b if either is NaN
//     round(x)                      to the nearest integer, ties to even
//     scale_by_power(x, n)          x · 2ⁿ for integers n, with x from 0.5 to 2
//     shift_right_logical(x, n)     zeros come in
//     bits_of(x), floats_of_bits(x) the same bits as the other type
//     to_floats(x), to_ints(x)      the same number; rounded to the nearest, ties to even
//     load(p), store(p, x)          16 consecutive float32 numbers; load_float16, store_float16
//     load_bits, store_bits         512 bits
//     load_bytes, load_shorts       16 numbers without a sign, of 8 or 16 bits
//     store_bytes, store_shorts     16 numbers that fit, as 8 bits with or 16 without a sign
//     pack_shorts(low, high)        32 numbers that fit in 16 bits without a sign, as these
//     first_lane(x)                 lane 0
//     reduce_add, reduce_max, reduce_min
//                                   over all lanes: lanes i and i + 8 are combined, then i and i +
//                                   4, i and i + 2, i and i + 1
//     horizontal_sums(v)            lane i is reduce_add(v[i]), of 16 vectors, which it may
//                                   overwrite
//     transpose<16>(v)              a matrix of 16 by 16 lanes, a vector a row, in place
//     look_up(table, x)             for each byte of x, below 16, that of the table (16)
//     dot_values<bits, count, vectors>(values, x, sums)
//                                   for each of `count` vectors x (4 · vectors) a vector of sums:
//                                   lane i of it is the product of x and as many values without a
//                                   sign, four bytes in lane i of each of 4 or 8 vectors; exact.
//                                   bits: of a value, up to 6, or 8; those of more bits than
//                                   DOT_BITS are in two parts, the lower 4 bits, and the upper ones
//                                   8 vectors later. Numbers of x are above -128
//
// SUMS is how many vectors of sums the registers hold beside what is multiplied. A tile of a
// product is TILE_ROWS, a divisor of 16, times TILE_COLUMNS, a multiple; store_tile_rows(p, x, i)
// stores lanes i · TILE_ROWS to (i + 1) · TILE_ROWS.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

namespace {

inline int32_t four_bytes(const void* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return four;
}

}  // namespace

#if defined(GPTK_AVX512)
#include "vectors_avx512.h"
#elif defined(GPTK_AVX2)
#include "vectors_avx2.h"
#elif defined(GPTK_NEON)
#include "vectors_neon.h"
#elif defined(GPTK_PLAIN)
#include "vectors_plain.h"
#else
#error "name an instruction set: GPTK_AVX512, GPTK_AVX2, GPTK_NEON or GPTK_PLAIN"
#endif

namespace {

#ifndef GPTK_AVX512
inline Lanes first_lanes(int64_t count) {
  static constexpr int32_t LANES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float bound = count < 0 ? 0 : count > 16 ? 16 : count;
  return to_floats(load_bits(LANES)) < broadcast(bound);
}

// In two steps, for powers of which float32 has only half. Lower ones give 0, higher ones infinity.
inline Floats scale_by_power(Floats x, Floats n) {
  const Ints all = to_ints(min(broadcast(254), max(broadcast(-252), n))), half = all >> 1;
  const auto power = [](Ints m) { return floats_of_bits((m + broadcast_int(127)) << 23); };
  return x * power(half) * power(all - half);
}
#endif

// Four bytes of memory in every lane.
inline Ints broadcast_four(const void* x) { return broadcast_int(four_bytes(x)); }

inline bool all(Lanes lanes) { return bits(lanes) == 0xffff; }

// --- Numbers in memory ---

inline float to_float(float x) { return x; }

inline float to_float(uint16_t x) {  // bfloat16
  const uint32_t bits = (uint32_t)x << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// 16 consecutive numbers.
inline Floats load(const uint16_t* x) { return floats_of_bits(load_shorts(x) << 16); }

// The first `count` of 16 consecutive numbers, then zeros; those beyond count are not read. count
// may be below 0 or above 16.
template <typename T>
inline Floats load_first(const T* x, int64_t count) {
  if (count >= 16) return load(x);
  T padded[16] = {};
  if (count > 0) std::memcpy(padded, x, count * sizeof(T));
  return load(padded);
}

// Writes the first `count` lanes, as above.
template <typename T>
inline void store_first(T* y, int64_t count, Floats x) {
  if (count >= 16) return store(y, x);
  T padded[16];
  store(padded, x);
  if (count > 0) std::memcpy(y, padded, count * sizeof(T));
}

// --- bfloat16, whose bits are the upper 16 of a float32 number ---

#ifndef GPTK_NATIVE_BFLOAT16
// Rounded to the nearest bfloat16, ties to even, in the upper 16 bits of a lane; the lower ones are
// undefined.
inline Ints round_to_bfloat16(Floats x) {
  const Ints near =
      bits_of(x) + (shift_right_logical(bits_of(x), 16) & broadcast_int(1)) + broadcast_int(0x7fff);
  return select(x == x, near, broadcast_int(0x7fc00000));
}

// 32 numbers, those of `low` first, rounded to bfloat16.
inline Ints to_bfloat16(Floats low, Floats high) {
  return pack_shorts(shift_right_logical(round_to_bfloat16(low), 16),
                     shift_right_logical(round_to_bfloat16(high), 16));
}

// Rounded to bfloat16: lane i has low[i] in its low half, high[i] in its high half.
inline Ints to_bfloat16_pairs(Floats low, Floats high) {
  return shift_right_logical(round_to_bfloat16(low), 16) |
         (round_to_bfloat16(high) & broadcast_int(0xffff0000));
}

inline void store(uint16_t* y, Floats x) {
  store_shorts(y, shift_right_logical(round_to_bfloat16(x), 16));
}

// sum + a · b, where each lane of a and b holds two bfloat16 numbers, whose two products are both
// added: first that of the low halves. AVX-512 BF16 takes the high halves first, and has 0 in place
// of numbers below 2⁻¹²⁶.
inline Floats multiply_add_pairs(Floats sum, Ints a, Ints b) {
  const Ints upper = broadcast_int(0xffff0000);
  sum = fma(floats_of_bits(a << 16), floats_of_bits(b << 16), sum);
  return fma(floats_of_bits(a & upper), floats_of_bits(b & upper), sum);
}
#endif

// The first `count` of 32 consecutive numbers as bfloat16, then zeros: lane i has numbers 2i and
// 2i + 1.
inline Ints load_pairs(const uint16_t* x, int64_t count) {
  if (count >= 32) return load_bits(x);
  uint16_t padded[32] = {};
  std::memcpy(padded, x, count * sizeof *x);
  return load_bits(padded);
}

inline Ints load_pairs(const float* x, int64_t count) {
  return to_bfloat16(load_first(x, count), load_first(x + 16, count - 16));
}

// The first `count` numbers of two rows as bfloat16, interleaved, then zeros: lane i has row[i] in
// its low half and next_row[i], or 0 without a next row, in its high half.
inline Ints interleave(const uint16_t* row, const uint16_t* next_row, int64_t count) {
  const Ints low = bits_of(load_first(row, count));
  const Ints high = next_row ? bits_of(load_first(next_row, count)) : Ints{};
  return shift_right_logical(low, 16) | high;
}

inline Ints interleave(const float* row, const float* next_row, int64_t count) {
  return to_bfloat16_pairs(load_first(row, count),
                           next_row ? load_first(next_row, count) : Floats{});
}

// sum + a · b lane by lane, where each lane of a and b holds a float32 number or two bfloat16
// numbers. The pointer is not read: its type says which.
inline Floats multiply_add(Floats sum, const float*, Ints a, Ints b) {
  return fma(floats_of_bits(a), floats_of_bits(b), sum);
}

inline Floats multiply_add(Floats sum, const uint16_t*, Ints a, Ints b) {
  return multiply_add_pairs(sum, a, b);
}

// Fetches a cache line that will be read soon, into the nearest cache, or into the second one.
inline void prefetch(const void* x) { __builtin_prefetch(x, 0, 3); }
inline void prefetch_second(const void* x) { __builtin_prefetch(x, 0, 2); }

// --- Functions ---

// The exponent n of positive normal numbers m · 2ⁿ with m from 1 to below 2.
inline Floats exponent_of(Floats x) {
  return to_floats(shift_right_logical(bits_of(x), 23) - broadcast_int(127));
}

// exp(x) of each lane, with a relative error of about 1e-7; 0 for x below -104.
inline Floats exp(Floats x) {
  x = max(broadcast(-104), x);  // NaN stays
  // exp(x) = 2ⁿ exp(f), where n is the integer nearest to x / log 2, and f = x - n log 2.
  const Floats n = round(x * broadcast(1.44269504f));
  Floats f = fma(-n, broadcast(0.693145752f), x);
  f = fma(-n, broadcast(1.42860677e-6f), f);
  Floats y = broadcast(1.0f / 720);
  for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = fma(y, f, broadcast(factor));
  return scale_by_power(y, n);
}

// What a softmax subtracts from its scores: the highest one; 0 if all are masked with -inf, as the
// difference of two -inf is NaN.
inline Floats softmax_shift(float highest) { return broadcast(highest == -INFINITY ? 0 : highest); }

}  // namespace
