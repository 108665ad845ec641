// Products of a few rows with a matrix of weights (outputs, inputs), quantized or plain.
//
// A product of few rows with weights that are quantized in groups of 32 takes as long as reading
// the weights, if the arithmetic keeps up. It does if codes are multiplied as integers, four to a
// lane (VNNI). For that x is quantized, too, in each group of 32 inputs: float32 to 21 bits and a
// sign, an error of 2⁻²² of the group's largest number, which is that of float32 itself; bfloat16,
// which has 8 bits, to 14 and a sign. A row's products are summed in the same order for any number
// of rows, so that its result is the same, bit for bit, whatever the other rows are.
#pragma once

#include "common.h"

namespace {

constexpr int64_t GROUP = 32;                // inputs that share a scale and an offset
constexpr int64_t BLOCK = 16;                // outputs that are computed together, a lane each
constexpr int64_t PREFETCH_DISTANCE = 8192;  // bytes that weights are fetched ahead of their use

// How many blocks hold this many outputs.
constexpr int64_t blocks_of(int64_t outputs) { return (outputs + BLOCK - 1) / BLOCK; }

// The bytes of a group of inputs in a block of outputs: 16 scales and 16 offsets in float16, then
// 32 x 16 codes of `bits` bits.
constexpr int64_t group_bytes(int bits) { return 4 * BLOCK + GROUP * BLOCK * bits / 8; }

// Integers of 8 bits that a number of x is made of: see QuantizedRows.
template <typename T>
constexpr int PARTS = sizeof(T) == 4 ? 3 : 2;

// Rows of x, (rows, inputs), quantized in groups of 32 inputs: x = scale · n, where the integer n
// is part[0] · 128² + part[1] · 128 + part[2] with three parts, or part[0] · 128 + part[1] with
// two; and for each group the sum of x.
template <int parts>
struct QuantizedRows {
  static constexpr int32_t LARGEST = 127 << 7 * (parts - 1);

  int64_t groups;       // in a row
  int8_t* part[parts];  // (rows, inputs)
  float *scale, *sum;   // (rows, groups)

  // memory: of at least `bytes(rows, inputs)`.
  QuantizedRows(int64_t rows, int64_t inputs, int8_t* memory)
      : groups(inputs / GROUP),
        scale((float*)(memory + parts * rows * inputs)),
        sum(scale + rows * groups) {
    for (int p = 0; p < parts; p++) part[p] = memory + p * rows * inputs;
  }

  static int64_t bytes(int64_t rows, int64_t inputs) {
    return round_up(parts * rows * inputs + 2 * rows * (inputs / GROUP) * sizeof(float), 64);
  }

  // Quantizes one group; `group` counts through all rows of x. Infinity and NaN make the group NaN.
  template <typename T>
  void quantize(const T* x, int64_t group) {
    const Floats a = load(x + group * GROUP), b = load(x + group * GROUP + 16);
    // As integers, absolute values keep their order, with infinity and NaN at its end.
    const Ints absolute = broadcast_int(0x7fffffff);
    const int32_t largest_bits = reduce_max(max(bits_of(a) & absolute, bits_of(b) & absolute));
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    const float step = largest_bits < 0x7f800000 ? largest * (1.0f / LARGEST) : __builtin_nanf("");
    const Floats inverse = broadcast(largest > 1e-30f ? LARGEST / largest : 0);
    const Ints rounded[2] = {to_ints(a * inverse), to_ints(b * inverse)};
    for (int half = 0; half < 2; half++) {
      Ints rest = rounded[half];
      for (int p = parts - 1; p >= 0; p--) {
        const Ints upper = (rest + broadcast_int(64)) >> 7;
        const Ints lower = p == 0 ? rest : rest - (upper << 7);
        store_bytes(&part[p][group * GROUP + 16 * half], lower);
        rest = upper;
      }
    }
    scale[group] = step;
    sum[group] = step * reduce_add(rounded[0] + rounded[1]);
  }
};

// Four inputs of 16 outputs in each of 8 vectors, a code in a byte, from the layout of `pack`.
// split: codes of 8 bits are in 16 vectors, first their lower 4 bits, then the upper ones.
template <int bits, bool split = false>
inline void load_codes(const uint8_t* packed, Ints* codes) {
  const Ints nibbles = broadcast_int(0x0f0f0f0f);
  for (int i = 0; i < bits; i++) {
    const Ints line = load_bits(packed + 64 * i);
    codes[i] = bits == 4 || split ? line & nibbles : line;
    if (bits == 4 || split) codes[bits + i] = shift_right_logical(line, 4) & nibbles;
  }
}

// y[r], a lane for each output of a block: the product of row `row` + r of x, for r < R. weights:
// the block's, in the layout of `pack`.
template <int bits, int R, int parts>
#ifdef GPTK_AVX2
// Else its sums would be in memory where it is inlined, as there are only 16 registers.
__attribute__((noinline))
#endif
inline void multiply_block(const uint8_t* weights, const QuantizedRows<parts>& x, int64_t row,
                           Floats* y) {
  for (int r = 0; r < R; r++) y[r] = Floats{};
  for (int64_t group = 0; group < x.groups; group++, weights += group_bytes(bits)) {
    for (int64_t line = 0; line < group_bytes(bits); line += 64)
      prefetch(weights + PREFETCH_DISTANCE + line);
    const Floats scale = load_float16(weights), offset = load_float16(weights + 32);
    constexpr bool split = bits > DOT_BITS;
    Ints codes[split ? 16 : 8];
    load_codes<bits, split>(weights + 64, codes);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      // Σ code · part over the group for each part, exact in 32 bits.
      const int64_t x_group = (row + r) * x.groups + group;
      const int8_t* numbers[parts];
      Ints sum[parts];
#pragma GCC unroll 3
      for (int p = 0; p < parts; p++) numbers[p] = &x.part[p][x_group * GROUP];
      dot_codes<bits, parts>(codes, numbers, sum);
      Floats total = to_floats((sum[parts - 2] << 7) + sum[parts - 1]);
      if constexpr (parts == 3) total = fma(to_floats(sum[0]), broadcast(1 << 14), total);
      // Σ (code · scale + offset) · x over the group.
      y[r] = fma(total * scale, broadcast(x.scale[x_group]), y[r]);
      y[r] = fma(offset, broadcast(x.sum[x_group]), y[r]);
    }
  }
}

// Calls put(row, output, sums) for the 16 outputs of a block of x times the weights, plus the bias
// (outputs) unless it is null, for all rows. The last block may have less than 16 outputs.
template <int bits, typename T, typename Put>
void multiply_by_block(const QuantizedRows<PARTS<T>>& x, const uint8_t* weights, const T* bias,
                       int64_t rows, int64_t outputs, int64_t block, const Put& put) {
  const uint8_t* block_weights = weights + block * x.groups * group_bytes(bits);
  const int64_t first = block * BLOCK;
  const Floats block_bias = bias ? load_first(bias + first, outputs - first) : Floats{};
  for (int64_t row = 0; row < rows;) {
    Floats sums[4];
    const int64_t left = rows - row, together = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (together == 4)
      multiply_block<bits, 4>(block_weights, x, row, sums);
    else if (together == 2)
      multiply_block<bits, 2>(block_weights, x, row, sums);
    else
      multiply_block<bits, 1>(block_weights, x, row, sums);
    for (int64_t r = 0; r < together; r++) put(row + r, first, sums[r] + block_bias);
    row += together;
  }
}

// Up to this many rows each thread quantizes all of x for itself, which takes less time than
// waiting for the other threads.
constexpr int64_t ROWS_QUANTIZED_BY_EACH = 8;

// y (rows, outputs) = x (rows, inputs) times the weights, in the layout of `pack`, plus the bias
// (outputs) unless it is null. x, bias and y have one dtype; sums are float32.
template <int bits, typename T>
void quantized_linear(const T* x, const uint8_t* weights, const T* bias, T* y, int64_t rows,
                      int64_t inputs, int64_t outputs) {
  const int64_t groups = rows * (inputs / GROUP);
  const int64_t bytes = QuantizedRows<PARTS<T>>::bytes(rows, inputs);
  const bool by_each = rows <= ROWS_QUANTIZED_BY_EACH;
  const Memory<int8_t> memory((by_each ? omp_get_max_threads() : 1) * bytes);
#pragma omp parallel
  {
    QuantizedRows<PARTS<T>> quantized(rows, inputs,
                                      memory.get() + (by_each ? omp_get_thread_num() * bytes : 0));
    const Range to_quantize = by_each ? Range{0, groups} : share_of_thread(groups);
    for (int64_t group = to_quantize.from; group < to_quantize.to; group++)
      quantized.quantize(x, group);
    if (!by_each) {
#pragma omp barrier
    }
    const Range blocks = share_of_thread(blocks_of(outputs));
    for (int64_t block = blocks.from; block < blocks.to; block++)
      multiply_by_block<bits>(quantized, weights, bias, rows, outputs, block,
                              [&](int64_t row, int64_t output, Floats sums) {
                                store_first(y + row * outputs + output, outputs - output, sums);
                              });
  }
}

// Lays quantized weights out for `quantized_linear`. codes: (outputs, inputs), one in a byte; scale
// and offset: (outputs, groups).
//
// y: (blocks, groups), each of `group_bytes`: the scales and the offsets of a group for the block's
// 16 outputs in float16, then the codes of inputs 0 to 3 for each of the 16 outputs, 64 bytes,
// those of inputs 4 to 7, and so on. With 4 bits, the low nibbles of these bytes are inputs 0 to 15
// of the group, the high nibbles 16 to 31. Outputs that the last block lacks are zeros. Throws
// BAD_CODES if a code has more bits.
template <int bits>
void pack(const uint8_t* codes, const float* scale, const float* offset, uint8_t* y,
          int64_t outputs, int64_t inputs) {
  const int64_t groups = inputs / GROUP;
  uint32_t used = 0;  // the bits that are set in any of four codes
#pragma omp parallel for schedule(static) reduction(| : used)
  for (int64_t block = 0; block < blocks_of(outputs); block++)
    for (int64_t group = 0; group < groups; group++) {
      uint8_t* packed = y + (block * groups + group) * group_bytes(bits);
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
      store_float16(packed + 32, load(offsets));
      for (int i = 0; i < bits; i++) {
        Ints line = load_bits(fours[i]);
        if (bits == 4) line = line | (load_bits(fours[4 + i]) << 4);
        store_bits(packed + 64 + 64 * i, line);
      }
    }
  require(bits == 8 || !(used & 0xf0f0f0f0), BAD_CODES);
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

// y (outputs, inputs) = the dequantized weights of a matrix in the layout of `pack`.
template <int bits, typename T>
void dequantize_packed(const uint8_t* weights, T* y, int64_t inputs, int64_t outputs) {
  const int64_t groups = inputs / GROUP;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks_of(outputs); block++)
    for (int64_t group = 0; group < groups; group++) {
      const uint8_t* packed = weights + (block * groups + group) * group_bytes(bits);
      alignas(64) float scale[BLOCK], offset[BLOCK];
      store(scale, load_float16(packed));
      store(offset, load_float16(packed + 32));
      Ints lines[GROUP / 4];
      load_codes<bits>(packed + 64, lines);
      uint8_t codes[GROUP / 4][BLOCK][4];
      for (int i = 0; i < GROUP / 4; i++) store_bits(codes[i], lines[i]);
      const int64_t count = std::min(BLOCK, outputs - block * BLOCK);
      for (int64_t i = 0; i < count; i++) {
        uint8_t row[GROUP];
        for (int four = 0; four < GROUP / 4; four++) std::memcpy(row + 4 * four, codes[four][i], 4);
        T* to = y + (block * BLOCK + i) * inputs + group * GROUP;
        for (int half = 0; half < 2; half++) {
          const Floats numbers = to_floats(load_bytes(row + 16 * half));
          store(to + 16 * half, fma(numbers, broadcast(scale[i]), broadcast(offset[i])));
        }
      }
    }
}

}  // namespace
