// Laying quantized weights out straight from the blocks of a GGUF file. The formats are ggml's, see
// ggml-common.h and dequantize_row_… in ggml-quants.c there.
#pragma once

#include "formats.h"

namespace {

// What a file's block has: codes, each in a byte, and what makes scales and offsets.
struct StoredUnit {
  uint8_t codes[256];
  uint16_t scale, offset;  // float16; a power as a byte
  uint8_t scales[16], offsets[16];
};

// Codes of 4 bits, each 2 · `half` of them in `half` bytes: first the low nibbles.
inline void read_nibbles(const uint8_t* from, int64_t count, int64_t half, uint8_t* codes) {
  for (int64_t start = 0; start < count; start += 2 * half, from += half)
    for (int64_t i = 0; i < half; i++) {
      codes[start + i] = from[i] & 15;
      codes[start + half + i] = from[i] >> 4;
    }
}

// Codes of 2 bits: in each 32 bytes 128 of them, the first 32 in the lowest bits.
inline void read_pairs(const uint8_t* from, uint8_t* codes) {
  for (int64_t start = 0; start < 256; start += 128, from += 32)
    for (int64_t k = 0; k < 4; k++)
      for (int64_t i = 0; i < 32; i++) codes[start + 32 * k + i] = from[i] >> 2 * k & 3;
}

// Adds a bit above the others of 256 codes: of the k-th 32, bit k of the 32 bytes.
inline void add_bits(const uint8_t* from, int bit, uint8_t* codes) {
  for (int64_t k = 0; k < 8; k++)
    for (int64_t i = 0; i < 32; i++) codes[32 * k + i] |= (from[i] >> k & 1) << bit;
}

// The 8 scales and 8 minimums of 6 bits of Q4_K and Q5_K.
inline void read_sixes(const uint8_t* from, StoredUnit& unit) {
  for (int64_t i = 0; i < 4; i++) {
    unit.scales[i] = from[i] & 63;
    unit.offsets[i] = from[4 + i] & 63;
    unit.scales[4 + i] = (from[8 + i] & 15) | (from[i] >> 6) << 4;
    unit.offsets[4 + i] = from[8 + i] >> 4 | (from[4 + i] >> 6) << 4;
  }
}

template <Format format>
void read_unit(const uint8_t* block, StoredUnit& unit) {
  constexpr Traits T = traits_of(format);
  const auto half_at = [&](int64_t at) {
    uint16_t half;
    std::memcpy(&half, block + at, 2);
    return half;
  };
  const auto negative_half_at = [&](int64_t at) { return (uint16_t)(half_at(at) ^ 0x8000); };
  if constexpr (T.unit == GROUP && format != Format::MXFP4) {
    unit.scale = half_at(0);
    if constexpr (T.scales == Scales::HALF_OFFSET) unit.offset = half_at(2);
    const uint8_t* from = block + (T.scales == Scales::HALF_OFFSET ? 4 : 2);
    if constexpr (T.bits == 8) {
      for (int64_t i = 0; i < GROUP; i++) unit.codes[i] = from[i] ^ 128;  // from signed ones
    } else {
      read_nibbles(T.bits == 5 ? from + 4 : from, GROUP, 16, unit.codes);
      if constexpr (T.bits == 5) {
        uint32_t high;
        std::memcpy(&high, from, 4);
        for (int64_t i = 0; i < GROUP; i++) unit.codes[i] |= (high >> i & 1) << 4;
      }
    }
  } else if constexpr (format == Format::MXFP4) {
    unit.scale = block[0];
    read_nibbles(block + 1, GROUP, 16, unit.codes);
  } else if constexpr (format == Format::Q2_K) {
    std::memcpy(unit.scales, block, 16);
    read_pairs(block + 16, unit.codes);
    unit.scale = half_at(80);
    unit.offset = negative_half_at(82);
  } else if constexpr (format == Format::Q3_K) {
    read_pairs(block + 32, unit.codes);
    add_bits(block, 2, unit.codes);
    const uint8_t* from = block + 96;
    for (int64_t i = 0; i < 16; i++) {
      const int low = i < 8 ? from[i] & 15 : from[i - 8] >> 4;
      unit.scales[i] = (low | (from[8 + i % 4] >> 2 * (i / 4) & 3) << 4) - 32 + 128;
    }
    unit.scale = half_at(108);
  } else if constexpr (format == Format::Q4_K || format == Format::Q5_K) {
    unit.scale = half_at(0);
    unit.offset = negative_half_at(2);
    read_sixes(block + 4, unit);
    read_nibbles(block + (T.bits == 5 ? 48 : 16), 256, 32, unit.codes);
    if constexpr (T.bits == 5) add_bits(block + 16, 4, unit.codes);
  } else if constexpr (format == Format::Q6_K) {
    read_nibbles(block, 256, 64, unit.codes);
    uint8_t high[256];
    read_pairs(block + 128, high);
    for (int64_t i = 0; i < 256; i++) unit.codes[i] |= high[i] << 4;
    for (int64_t i = 0; i < 16; i++) unit.scales[i] = block[192 + i] ^ 128;
    unit.scale = half_at(208);
  } else {
    static_assert(format == Format::IQ4_XS, "every format");
    unit.scale = half_at(0);
    const uint16_t high = half_at(2);
    for (int64_t i = 0; i < 8; i++)
      unit.scales[i] =
          ((block[4 + i / 2] >> 4 * (i % 2) & 15) | (high >> 2 * i & 3) << 4) - 32 + 128;
    read_nibbles(block + 8, 256, 16, unit.codes);
  }
}

// y: blocks of 16 outputs, see formats.h. rows: where the blocks of each output begin in the file,
// one after the other. Outputs that the last block lacks are zeros.
template <Format format>
void pack_stored(const uint8_t* const* rows, uint8_t* y, int64_t outputs, int64_t inputs) {
  using P = Packed<format>;
  constexpr int64_t unit_size = P::T.unit, groups = unit_size / GROUP;
  const int64_t units = inputs / unit_size;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks_of(outputs); block++)
    for (int64_t index = 0; index < units; index++) {
      uint8_t* packed = y + (block * units + index) * P::UNIT_BYTES;
      std::memset(packed, 0, P::CODES_AT);
      alignas(64) uint32_t fours[unit_size / 4][BLOCK] = {};
      const int64_t first = block * BLOCK;
      for (int64_t i = 0; i < std::min(BLOCK, outputs - first); i++) {
        StoredUnit unit;
        read_unit<format>(rows[first + i] + index * P::T.stored, unit);
        if constexpr (P::T.scales == Scales::POWER) packed[i] = (uint8_t)unit.scale;
        if constexpr (P::T.scales != Scales::POWER) std::memcpy(packed + 2 * i, &unit.scale, 2);
        if constexpr (P::HAS_TWO) std::memcpy(packed + 2 * (BLOCK + i), &unit.offset, 2);
        if constexpr (P::HAS_BYTES)
          for (int64_t s = 0; s < P::SCALES; s++) {
            uint8_t* bytes = packed + P::BYTES_AT + s * BLOCK * P::BYTES_PER_SCALE + i;
            bytes[0] = unit.scales[s];
            if constexpr (P::BYTES_PER_SCALE == 2) bytes[BLOCK] = unit.offsets[s];
          }
        uint32_t row[unit_size / 4];
        std::memcpy(row, unit.codes, unit_size);
        for (int64_t four = 0; four < unit_size / 4; four++) fours[four][i] = row[four];
      }
      for (int64_t group = 0; group < groups; group++)
        store_fours<format>(fours + group * (GROUP / 4),
                            packed + P::CODES_AT + group * P::GROUP_BYTES);
    }
}

}  // namespace
