// Laying quantized weights out for `quantized_linear` straight from the blocks of a GGUF file.
#pragma once

#include "common.h"
#include "products.h"

namespace {

// A block of 32 weights: a scale in float16; with an offset, that in float16, too; then 32 codes.
// Those of 4 bits have the first 16 weights in the low nibbles, as in the layout of `pack`. Those
// of 8 bits are signed.
enum class Format : int32_t { Q4_0 = 0, Q4_1 = 1, Q8_0 = 2 };

template <Format format>
struct Stored {
  static constexpr int BITS = format == Format::Q8_0 ? 8 : 4;
  static constexpr bool HAS_OFFSET = format == Format::Q4_1;
  static constexpr int64_t CODES_AT = HAS_OFFSET ? 4 : 2, BYTES = CODES_AT + GROUP * BITS / 8;
  // The code whose weight is 0, where there is no offset; and what makes signed codes unsigned.
  static constexpr int ZERO_CODE = BITS == 8 ? 128 : 8;
  static constexpr uint32_t FLIPPED = BITS == 8 ? 0x80808080 : 0;
};

// y: in the layout of `pack`. rows: where the blocks of each output begin, one after the other.
template <Format format>
void pack_stored(const uint8_t* const* rows, uint8_t* y, int64_t outputs, int64_t inputs) {
  using S = Stored<format>;
  const int64_t groups = inputs / GROUP;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++)
    for (int64_t group = 0; group < groups; group++) {
      uint8_t* packed = y + (block * groups + group) * group_bytes(S::BITS);
      alignas(64) uint16_t scales[BLOCK] = {}, offsets[BLOCK] = {};
      alignas(64) uint32_t fours[S::BITS][BLOCK] = {};
      const int64_t first = block * BLOCK, count = std::min(BLOCK, outputs - first);
      for (int64_t i = 0; i < count; i++) {
        const uint8_t* stored = rows[first + i] + group * S::BYTES;
        std::memcpy(&scales[i], stored, 2);
        if constexpr (S::HAS_OFFSET) std::memcpy(&offsets[i], stored + 2, 2);
        uint32_t row[S::BITS];
        std::memcpy(row, stored + S::CODES_AT, sizeof row);
        for (int four = 0; four < S::BITS; four++) fours[four][i] = row[four] ^ S::FLIPPED;
      }
      if constexpr (!S::HAS_OFFSET)
        store_float16(offsets, select(first_lanes(count),
                                      load_float16(scales) * broadcast(-S::ZERO_CODE), Floats{}));
      std::memcpy(packed, scales, sizeof scales);
      std::memcpy(packed + sizeof scales, offsets, sizeof offsets);
      std::memcpy(packed + 4 * BLOCK, fours, sizeof fours);
    }
}

}  // namespace
