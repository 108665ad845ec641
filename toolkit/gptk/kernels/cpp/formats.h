// How quantized weights are stored: the formats of GGUF files, and their layout for products.
//
// In all of them a weight is value · scale + offset, where the value is a code, or what a table has
// for it. In memory weights are in blocks of 16 outputs, a lane each. A block has one unit of
// inputs after the other, as many as a file's block has, 32 or 256. A unit has scales (and offsets)
// of the 16 outputs, and then for each 32 inputs the codes, see `load_values`.
#pragma once

#include "common.h"

namespace {

constexpr int64_t GROUP = 32;  // inputs that are computed together
constexpr int64_t BLOCK = 16;  // outputs that are computed together, a lane each

// kernels/formats.py has the same numbers.
enum class Format : int32_t {
  Q4_0 = 0,
  Q4_1 = 1,
  Q8_0 = 2,
  Q8_OFFSET = 3,  // no file's: any codes of 8 bits, as Q4_1 are those of 4
  Q5_0 = 4,
  Q5_1 = 5,
  Q2_K = 6,
  Q3_K = 7,
  Q4_K = 8,
  Q5_K = 9,
  Q6_K = 10,
  IQ4_NL = 11,
  IQ4_XS = 12,
  MXFP4 = 13,
};

// What a unit has for each output, besides codes.
enum class Scales {
  HALF,          // a float16 scale
  HALF_OFFSET,   // and a float16 offset
  POWER,         // a byte e for the scale 2^(e - 128)
  SIGNED,        // a float16 number and bytes: scales are its products with the bytes less 128
  WITH_MINIMUM,  // two numbers and pairs of bytes: scales are products of the first ones, offsets
                 // of the second ones
  NIBBLES,       // the same with pairs of 4 bits
};

struct Traits {
  int bits;        // of a code
  int value_bits;  // of a value, without a sign
  int zero;        // the value whose weight is 0, where no offsets are stored
  Scales scales;
  int64_t unit;    // inputs
  int64_t group;   // inputs that share a scale
  int64_t stored;  // bytes of a unit of one output in a file
};

constexpr Traits traits_of(Format format) {
  switch (format) {
    case Format::Q4_0:
      return {4, 4, 8, Scales::HALF, 32, 32, 18};
    case Format::Q4_1:
      return {4, 4, 0, Scales::HALF_OFFSET, 32, 32, 20};
    case Format::Q8_0:
      return {8, 8, 128, Scales::HALF, 32, 32, 34};
    case Format::Q8_OFFSET:
      return {8, 8, 0, Scales::HALF_OFFSET, 32, 32, 0};
    case Format::Q5_0:
      return {5, 5, 16, Scales::HALF, 32, 32, 22};
    case Format::Q5_1:
      return {5, 5, 0, Scales::HALF_OFFSET, 32, 32, 24};
    case Format::Q2_K:
      return {2, 2, 0, Scales::NIBBLES, 256, 16, 84};
    case Format::Q3_K:
      return {3, 3, 4, Scales::SIGNED, 256, 16, 110};
    case Format::Q4_K:
      return {4, 4, 0, Scales::WITH_MINIMUM, 256, 32, 144};
    case Format::Q5_K:
      return {5, 5, 0, Scales::WITH_MINIMUM, 256, 32, 176};
    case Format::Q6_K:
      return {6, 6, 32, Scales::SIGNED, 256, 16, 210};
    case Format::IQ4_NL:
      return {4, 8, 127, Scales::HALF, 32, 32, 18};
    case Format::IQ4_XS:
      return {4, 8, 127, Scales::SIGNED, 256, 32, 136};
    case Format::MXFP4:
      return {4, 5, 12, Scales::POWER, 32, 32, 17};
  }
  return {};
}

template <Format format>
struct Packed {
  static constexpr Traits T = traits_of(format);
  static constexpr int BITS = T.bits, VALUE_BITS = T.value_bits;
  static constexpr bool HAS_TABLE = BITS != VALUE_BITS;
  static constexpr bool HAS_TWO = T.scales == Scales::HALF_OFFSET ||
                                  T.scales == Scales::WITH_MINIMUM || T.scales == Scales::NIBBLES;
  static constexpr bool HAS_BYTES = T.unit > GROUP;
  // Scales of a group of 32 inputs.
  static constexpr int PARTS = GROUP / T.group;
  // Where bytes for the scales begin, how many there are for each scale, and where codes begin.
  static constexpr int64_t BYTES_AT = T.scales == Scales::POWER ? 0 : 2 * BLOCK * (HAS_TWO ? 2 : 1);
  static constexpr int64_t BYTES_PER_SCALE = T.scales == Scales::WITH_MINIMUM         ? 2
                                             : HAS_BYTES || T.scales == Scales::POWER ? 1
                                                                                      : 0;
  static constexpr int64_t SCALES = T.unit / T.group;
  static constexpr int64_t CODES_AT = BYTES_AT + BLOCK * SCALES * BYTES_PER_SCALE;
  static constexpr int64_t GROUP_BYTES = GROUP * BLOCK * BITS / 8;
  static constexpr int64_t UNIT_BYTES = CODES_AT + T.unit / GROUP * GROUP_BYTES;

  // Codes are in planes: of 8 bits; or of 4 (2, for fewer), and one of the bits above these.
  static constexpr int LOW_BITS = BITS >= 4 ? (BITS == 8 ? 8 : 4) : 2;
  static constexpr int HIGH_BITS = BITS - LOW_BITS;
};

// The values of the codes of a format that has a table, as numbers without a sign.
template <Format format>
inline const uint8_t* table_of() {
  alignas(16) static constexpr uint8_t NONLINEAR[16] = {0,   23,  44,  62,  78,  92,  105, 117,
                                                        128, 140, 152, 165, 180, 196, 216, 240};
  alignas(16) static constexpr uint8_t FLOAT4[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                     12, 11, 10, 9,  8,  6,  4,  0};
  return format == Format::MXFP4 ? FLOAT4 : NONLINEAR;
}

// Four bytes with these bits each.
constexpr int32_t in_every_byte(uint32_t bits) { return (int32_t)(bits * 0x01010101); }

// Bits of a line moved up by `by`, or down.
inline Ints moved(Ints line, int by) {
  return by == 0 ? line : by > 0 ? line << by : shift_right_logical(line, -by);
}

// The values of 32 inputs of 16 outputs, four inputs of each in each of 8 vectors, a value in a
// byte. split: 8 vectors of their lower 4 bits and 8 of the upper ones.
//
// A plane of w bits has w lines of 64 bytes. In line i are vectors i, i + w, i + 2w and so on of
// the 8: the first one in the lowest bits of each byte.
template <Format format, bool split = false>
inline void load_values(const uint8_t* packed, Ints* values) {
  using P = Packed<format>;
  constexpr int low = P::LOW_BITS, high = P::HIGH_BITS;
  for (int i = 0; i < low; i++) {
    const Ints line = load_bits(packed + 64 * i);
    for (int k = 0; k < 8 / low; k++)
      values[i + low * k] =
          low == 8 ? line : moved(line, -low * k) & broadcast_int(in_every_byte((1 << low) - 1));
  }
  if constexpr (high > 0)
    for (int i = 0; i < high; i++) {
      const Ints line = load_bits(packed + 64 * (low + i));
      for (int k = 0; k < 8 / high; k++)
        values[i + high * k] =
            values[i + high * k] |
            (moved(line, low - high * k) & broadcast_int(in_every_byte(((1 << high) - 1) << low)));
    }
  if constexpr (P::HAS_TABLE)
    for (int i = 0; i < 8; i++) values[i] = look_up(table_of<format>(), values[i]);
  if constexpr (split) {
    const Ints nibbles = broadcast_int(0x0f0f0f0f);
    for (int i = 0; i < 8; i++) {
      values[8 + i] = shift_right_logical(values[i], 4) & nibbles;
      values[i] = values[i] & nibbles;
    }
  }
}

// Writes what `load_values` reads, without a table. codes: 8 vectors, as it has them.
template <Format format>
inline void store_fours(const uint32_t (*codes)[BLOCK], uint8_t* packed) {
  using P = Packed<format>;
  const auto store_plane = [&](int width, int from, uint8_t* to) {
    const Ints field = broadcast_int(in_every_byte((1 << width) - 1));
    for (int i = 0; i < width; i++) {
      Ints line{};
      for (int k = 0; k < 8 / width; k++)
        line = line | moved(moved(load_bits(codes[i + width * k]), -from) & field, width * k);
      store_bits(to + 64 * i, line);
    }
  };
  store_plane(P::LOW_BITS, 0, packed);
  if constexpr (P::HIGH_BITS > 0) store_plane(P::HIGH_BITS, P::LOW_BITS, packed + 64 * P::LOW_BITS);
}

// The scales and offsets of a group of 32 inputs, for 16 outputs: of its first and its last 16
// inputs, or of all.
template <Format format>
struct GroupScales {
  using P = Packed<format>;
  static constexpr int PARTS = P::PARTS;
  Floats scale[PARTS], offset[PARTS];

  // group: in the unit.
  GroupScales(const uint8_t* unit, int64_t group) {
    constexpr Scales kind = P::T.scales;
    const uint8_t* bytes = unit + P::BYTES_AT + BLOCK * PARTS * P::BYTES_PER_SCALE * group;
    if constexpr (kind == Scales::POWER) {
      // Below 2⁻¹²⁶ a number's only bit moves.
      const Ints e = load_bytes(bytes), one = broadcast_int(1);
      scale[0] =
          floats_of_bits(select(to_floats(e) < broadcast(2), (e + one) << 21, (e - one) << 23));
    } else {
      scale[0] = load_float16(unit);
    }
    if constexpr (P::HAS_TWO) offset[0] = load_float16(unit + 2 * BLOCK);
    if constexpr (P::HAS_BYTES) {
      const Floats by = scale[0], offset_by = offset[0];
      for (int part = 0; part < PARTS; part++, bytes += BLOCK * P::BYTES_PER_SCALE) {
        const Ints first = load_bytes(bytes);
        if constexpr (kind == Scales::SIGNED) {
          scale[part] = by * to_floats(first - broadcast_int(128));
        } else if constexpr (kind == Scales::WITH_MINIMUM) {
          scale[part] = by * to_floats(first);
          offset[part] = offset_by * to_floats(load_bytes(bytes + BLOCK));
        } else {
          scale[part] = by * to_floats(first & broadcast_int(15));
          offset[part] = offset_by * to_floats(first >> 4);
        }
      }
    }
    if constexpr (!P::HAS_TWO)
      for (int part = 0; part < PARTS; part++) offset[part] = scale[part] * broadcast(-P::T.zero);
  }
};

// How many blocks hold this many outputs.
constexpr int64_t blocks_of(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK; }

template <Format format>
using FormatConstant = std::integral_constant<Format, format>;

// Calls a function with a format as a constant.
template <typename Function>
inline auto with_format(int64_t format, const Function& function) {
  // clang-format off
  switch ((Format)format) {
    case Format::Q4_0: return function(FormatConstant<Format::Q4_0>());
    case Format::Q4_1: return function(FormatConstant<Format::Q4_1>());
    case Format::Q8_0: return function(FormatConstant<Format::Q8_0>());
    case Format::Q5_0: return function(FormatConstant<Format::Q5_0>());
    case Format::Q5_1: return function(FormatConstant<Format::Q5_1>());
    case Format::Q2_K: return function(FormatConstant<Format::Q2_K>());
    case Format::Q3_K: return function(FormatConstant<Format::Q3_K>());
    case Format::Q4_K: return function(FormatConstant<Format::Q4_K>());
    case Format::Q5_K: return function(FormatConstant<Format::Q5_K>());
    case Format::Q6_K: return function(FormatConstant<Format::Q6_K>());
    case Format::IQ4_NL: return function(FormatConstant<Format::IQ4_NL>());
    case Format::IQ4_XS: return function(FormatConstant<Format::IQ4_XS>());
    case Format::MXFP4: return function(FormatConstant<Format::MXFP4>());
    default: return function(FormatConstant<Format::Q8_OFFSET>());
  }
  // clang-format on
}

}  // namespace
