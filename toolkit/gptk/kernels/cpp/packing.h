// Laying quantized weights out as formats.h says, and dequantizing them.
#pragma once

#include "formats.h"

namespace {

// Lays quantized weights out. codes: (outputs, inputs), one in a byte; scale and offset: (outputs,
// groups of 32 inputs). y: blocks of 16 outputs. Outputs that the last block lacks are zeros.
// Throws BAD_CODES if a code has more bits than the format.
template <Format format>
void pack(const uint8_t* codes, const float* scale, const float* offset, uint8_t* y,
          int64_t outputs, int64_t inputs) {
  using P = Packed<format>;
  static_assert(P::T.scales == Scales::HALF_OFFSET && P::T.unit == GROUP, "groups of 32 inputs");
  const int64_t groups = inputs / GROUP;
  uint32_t used = 0;  // the bits that are set in any of four codes
#pragma omp parallel for schedule(static) reduction(| : used)
  for (int64_t block = 0; block < blocks_of(outputs); block++)
    for (int64_t group = 0; group < groups; group++) {
      uint8_t* packed = y + (block * groups + group) * P::UNIT_BYTES;
      alignas(64) float scales[BLOCK] = {}, offsets[BLOCK] = {};
      alignas(64) uint32_t fours[GROUP / 4][BLOCK] = {};
      const int64_t first = block * BLOCK;
      for (int64_t i = 0; i < std::min(BLOCK, outputs - first); i++) {
        const int64_t index = (first + i) * groups + group;
        scales[i] = scale[index];
        offsets[i] = offset[index];
        uint32_t row[GROUP / 4];
        std::memcpy(row, codes + index * GROUP, GROUP);
        for (int four = 0; four < GROUP / 4; four++) {
          fours[four][i] = row[four];
          used |= row[four];
        }
      }
      store_float16(packed, load(scales));
      store_float16(packed + 2 * BLOCK, load(offsets));
      store_fours<format>(fours, packed + P::CODES_AT);
    }
  require(P::BITS == 8 || !(used & 0xf0f0f0f0), BAD_CODES);
}

// y = code · scale + offset. codes, y: (groups, 32), a code in a byte; scale, offset: (groups).
template <typename T>
void dequantize(const uint8_t* codes, const float* scale, const float* offset, T* y,
                int64_t groups) {
#pragma omp parallel for schedule(static)
  for (int64_t group = 0; group < groups; group++)
    for (int64_t i = group * GROUP; i < (group + 1) * GROUP; i += 16) {
      store(y + i, fma(to_floats(load_bytes(codes + i)), broadcast(scale[group]),
                       broadcast(offset[group])));
    }
}

// The weights of a group of 32 inputs of a block, dequantized.
template <Format format>
class DequantizedGroup {
 public:
  // unit: of the layout; group: in it.
  DequantizedGroup(const uint8_t* unit, int64_t group) {
    using P = Packed<format>;
    const GroupScales<format> scales(unit, group);
    Ints fours[GROUP / 4];
    load_values<format>(unit + P::CODES_AT + group * P::GROUP_BYTES, fours);
    for (int i = 0; i < GROUP / 4; i++) store_bits(values[i], fours[i]);
    for (int half = 0; half < 2; half++) {
      store(scale[half], scales.scale[half % P::PARTS]);
      store(offset[half], scales.offset[half % P::PARTS]);
    }
  }

  // Writes those of the output in a lane of the block.
  template <typename T>
  void write(int64_t lane, T* y) const {
    uint8_t row[GROUP];
    for (int four = 0; four < GROUP / 4; four++) std::memcpy(row + 4 * four, values[four][lane], 4);
    for (int half = 0; half < 2; half++)
      store(y + 16 * half, fma(to_floats(load_bytes(row + 16 * half)), broadcast(scale[half][lane]),
                               broadcast(offset[half][lane])));
  }

 private:
  uint8_t values[GROUP / 4][BLOCK][4];
  float scale[2][BLOCK], offset[2][BLOCK];  // of the first and the last 16 inputs
};

// Calls use(group, unit of the layout, group in the unit) for all groups of a block's inputs.
template <Format format, typename Use>
void for_groups(const uint8_t* block, int64_t inputs, const Use& use) {
  constexpr int64_t groups_of_unit = Packed<format>::T.unit / GROUP;
  for (int64_t group = 0; group < inputs / GROUP; group++)
    use(group, block + group / groups_of_unit * Packed<format>::UNIT_BYTES, group % groups_of_unit);
}

// y (outputs, inputs) = the dequantized weights of a matrix.
template <Format format, typename T>
void dequantize_packed(const uint8_t* weights, T* y, int64_t inputs, int64_t outputs) {
  const int64_t block_bytes = inputs / Packed<format>::T.unit * Packed<format>::UNIT_BYTES;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks_of(outputs); block++)
    for_groups<format>(weights + block * block_bytes, inputs,
                       [&](int64_t group, const uint8_t* unit, int64_t in_unit) {
                         const DequantizedGroup<format> numbers(unit, in_unit);
                         const int64_t first = block * BLOCK;
                         for (int64_t i = 0; i < std::min(BLOCK, outputs - first); i++)
                           numbers.write(i, y + (first + i) * inputs + group * GROUP);
                       });
}

// y (count, inputs) = the dequantized weights of some outputs.
template <Format format, typename T>
void dequantize_rows(const uint8_t* weights, const int64_t* wanted, T* y, int64_t inputs,
                     int64_t count) {
  const int64_t block_bytes = inputs / Packed<format>::T.unit * Packed<format>::UNIT_BYTES;
#pragma omp parallel for schedule(static) if (count * inputs > PARALLEL_FROM)
  for (int64_t i = 0; i < count; i++)
    for_groups<format>(weights + wanted[i] / BLOCK * block_bytes, inputs,
                       [&](int64_t group, const uint8_t* unit, int64_t in_unit) {
                         DequantizedGroup<format>(unit, in_unit)
                             .write(wanted[i] % BLOCK, y + i * inputs + group * GROUP);
                       });
}

}  // namespace
