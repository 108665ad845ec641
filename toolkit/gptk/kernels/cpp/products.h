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

constexpr int64_t GROUP = 32;  // inputs that share a scale and an offset
constexpr int64_t BLOCK = 16;  // outputs that are computed together, a lane each
constexpr int64_t PREFETCH_DISTANCE =
    2048;  // bytes by which weights are fetched ahead of their use

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
    const __m512 a = load(x + group * GROUP), b = load(x + group * GROUP + 16);
    // As integers, absolute values keep their order, with infinity and NaN at its end.
    const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
    const int32_t largest_bits = _mm512_reduce_max_epi32(
        _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), absolute),
                         _mm512_and_si512(_mm512_castps_si512(b), absolute)));
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    const float step = largest_bits < 0x7f800000 ? largest * (1.0f / LARGEST) : __builtin_nanf("");
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? LARGEST / largest : 0);
    const __m512i rounded[2] = {_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)),
                                _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse))};
    for (int half = 0; half < 2; half++) {
      __m512i rest = rounded[half];
      for (int p = parts - 1; p >= 0; p--) {
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(64)), 7);
        const __m512i lower = p == 0 ? rest : _mm512_sub_epi32(rest, _mm512_slli_epi32(upper, 7));
        _mm_storeu_si128((__m128i*)&part[p][group * GROUP + 16 * half],
                         _mm512_cvtepi32_epi8(lower));
        rest = upper;
      }
    }
    scale[group] = step;
    sum[group] = step * _mm512_reduce_add_epi32(_mm512_add_epi32(rounded[0], rounded[1]));
  }
};

// Four consecutive codes of x, in every lane.
inline __m512i broadcast_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

// y[r], a lane for each output of a block: the product of row `row` + r of x, for r < R. weights:
// the block's, in the layout of `pack`.
template <int bits, int R, int parts>
inline void multiply_block(const uint8_t* weights, const QuantizedRows<parts>& x, int64_t row,
                           __m512* y) {
  for (int r = 0; r < R; r++) y[r] = _mm512_setzero_ps();
  for (int64_t group = 0; group < x.groups; group++, weights += group_bytes(bits)) {
    for (int64_t line = 0; line < group_bytes(bits); line += 64)
      _mm_prefetch((const char*)weights + PREFETCH_DISTANCE + line, _MM_HINT_T0);
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)weights));
    const __m512 offset = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)weights + 1));
    __m512i codes[8];  // of four inputs each
    if constexpr (bits == 4) {
      const __m512i nibble = _mm512_set1_epi8(15);
      for (int i = 0; i < 4; i++) {
        const __m512i both = _mm512_loadu_si512(weights + 64 + 64 * i);
        codes[i] = _mm512_and_si512(both, nibble);
        codes[4 + i] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
      }
    } else {
      for (int i = 0; i < 8; i++) codes[i] = _mm512_loadu_si512(weights + 64 + 64 * i);
    }
    for (int r = 0; r < R; r++) {
      const int64_t x_group = (row + r) * x.groups + group;
      __m512i sum[parts];  // Σ code · part over the group, exact in 32 bits
      for (int p = 0; p < parts; p++) {
        const int8_t* numbers = &x.part[p][x_group * GROUP];
        __m512i even = _mm512_setzero_si512(), odd = even;
        for (int i = 0; i < 8; i += 2) {
          even = _mm512_dpbusd_epi32(even, codes[i], broadcast_four(numbers + 4 * i));
          odd = _mm512_dpbusd_epi32(odd, codes[i + 1], broadcast_four(numbers + 4 * i + 4));
        }
        sum[p] = _mm512_add_epi32(even, odd);
      }
      const __m512i lower = _mm512_add_epi32(_mm512_slli_epi32(sum[parts - 2], 7), sum[parts - 1]);
      __m512 total = _mm512_cvtepi32_ps(lower);
      if constexpr (parts == 3)
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[0]), _mm512_set1_ps(1 << 14), total);
      // Σ (code · scale + offset) · x over the group.
      const __m512 scaled = _mm512_mul_ps(total, scale);
      y[r] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(x.scale[x_group]), y[r]);
      y[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sum[x_group]), y[r]);
    }
  }
}

// This thread's share, within a parallel region, of y (rows, outputs) = x times the weights, plus
// the bias (outputs) unless it is null: a range of blocks of outputs, for all rows.
template <int bits, typename T>
void multiply_blocks(const QuantizedRows<PARTS<T>>& x, const uint8_t* weights, const T* bias, T* y,
                     int64_t rows, int64_t outputs) {
#pragma omp for schedule(static)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++) {
    const uint8_t* block_weights = weights + block * x.groups * group_bytes(bits);
    const int64_t first = block * BLOCK, count = std::min(BLOCK, outputs - first);
    const __mmask16 lanes = first_lanes(count);
    const __m512 block_bias = bias ? load_masked(bias + first, lanes) : _mm512_setzero_ps();
    __m512 sums[4];
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row, together = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (together == 4)
        multiply_block<bits, 4>(block_weights, x, row, sums);
      else if (together == 2)
        multiply_block<bits, 2>(block_weights, x, row, sums);
      else
        multiply_block<bits, 1>(block_weights, x, row, sums);
      for (int64_t r = 0; r < together; r++)
        store_masked(y + (row + r) * outputs + first, lanes, _mm512_add_ps(sums[r], block_bias));
      row += together;
    }
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
  const int64_t groups = rows * (inputs / GROUP),
                bytes = QuantizedRows<PARTS<T>>::bytes(rows, inputs);
  const bool by_each = rows <= ROWS_QUANTIZED_BY_EACH;
  const Memory<int8_t> memory((by_each ? omp_get_max_threads() : 1) * bytes);
  if (by_each) {
#pragma omp parallel
    {
      QuantizedRows<PARTS<T>> quantized(rows, inputs, memory.get() + omp_get_thread_num() * bytes);
      for (int64_t group = 0; group < groups; group++) quantized.quantize(x, group);
      multiply_blocks<bits>(quantized, weights, bias, y, rows, outputs);
    }
    return;
  }
  QuantizedRows<PARTS<T>> quantized(rows, inputs, memory.get());
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups; group++) quantized.quantize(x, group);
    multiply_blocks<bits>(quantized, weights, bias, y, rows, outputs);
  }
}

// Lays quantized weights out for `quantized_linear`. codes: (outputs, inputs), one in a byte; scale
// and offset: (outputs, groups).
//
// y: (blocks, groups), each of `group_bytes`: the scales and the offsets of a group for the block's
// 16 outputs in float16, then the codes of inputs 0 to 3 for each of the 16 outputs, 64 bytes,
// those of inputs 4 to 7, and so on. With 4 bits, the low nibbles of these bytes are inputs 0 to 15
// of the group, the high nibbles 16 to 31. Outputs that the last block lacks are zeros. Returns
// BAD_VALUE if a code has more bits.
template <int bits>
Status pack(const uint8_t* codes, const float* scale, const float* offset, uint8_t* y,
            int64_t outputs, int64_t inputs) {
  const int64_t groups = inputs / GROUP;
  uint32_t used = 0;  // the bits that are set in any of four codes
#pragma omp parallel for schedule(static) reduction(| : used)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++)
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
      _mm256_storeu_si256((__m256i*)packed, _mm512_cvtps_ph(_mm512_load_ps(scales), 0));
      _mm256_storeu_si256((__m256i*)packed + 1, _mm512_cvtps_ph(_mm512_load_ps(offsets), 0));
      for (int i = 0; i < bits; i++) {
        __m512i line = _mm512_load_si512(fours[i]);
        if (bits == 4)
          line = _mm512_or_si512(line, _mm512_slli_epi32(_mm512_load_si512(fours[4 + i]), 4));
        _mm512_storeu_si512(packed + 64 + 64 * i, line);
      }
    }
  return bits == 4 && (used & 0xf0f0f0f0) ? BAD_VALUE : OK;
}

// y = code · scale + offset. codes, y: (groups, 32), a code in a byte; scale, offset: (groups).
template <typename T>
void dequantize(const uint8_t* codes, const float* scale, const float* offset, T* y,
                int64_t groups) {
#pragma omp parallel for schedule(static)
  for (int64_t group = 0; group < groups; group++)
    for (int64_t i = group * GROUP; i < (group + 1) * GROUP; i += 16) {
      const __m512i integers = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
      store(y + i, _mm512_fmadd_ps(_mm512_cvtepi32_ps(integers), _mm512_set1_ps(scale[group]),
                                   _mm512_set1_ps(offset[group])));
    }
}

// y (outputs, inputs) = the dequantized weights of a matrix in the layout of `pack`.
template <int bits, typename T>
void dequantize_packed(const uint8_t* weights, T* y, int64_t inputs, int64_t outputs) {
  const int64_t groups = inputs / GROUP;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < (outputs + BLOCK - 1) / BLOCK; block++)
    for (int64_t group = 0; group < groups; group++) {
      const uint8_t* packed = weights + (block * groups + group) * group_bytes(bits);
      alignas(64) float scale[BLOCK], offset[BLOCK];
      _mm512_store_ps(scale, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)packed)));
      _mm512_store_ps(offset, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)packed + 1)));
      alignas(64) uint8_t codes[GROUP / 4][BLOCK][4];
      for (int i = 0; i < bits; i++) {
        const __m512i loaded = _mm512_loadu_si512(packed + 64 + 64 * i);
        const __m512i nibble = _mm512_set1_epi8(15);
        _mm512_store_si512(codes[i], bits == 4 ? _mm512_and_si512(loaded, nibble) : loaded);
        if (bits == 4)
          _mm512_store_si512(codes[4 + i], _mm512_and_si512(_mm512_srli_epi16(loaded, 4), nibble));
      }
      const int64_t count = std::min(BLOCK, outputs - block * BLOCK);
      for (int64_t i = 0; i < count; i++) {
        uint8_t row[GROUP];
        for (int four = 0; four < GROUP / 4; four++) std::memcpy(row + 4 * four, codes[four][i], 4);
        T* to = y + (block * BLOCK + i) * inputs + group * GROUP;
        for (int half = 0; half < 2; half++) {
          const __m128i bytes = _mm_loadu_si128((const __m128i*)row + half);
          const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
          store(to + 16 * half,
                _mm512_fmadd_ps(numbers, _mm512_set1_ps(scale[i]), _mm512_set1_ps(offset[i])));
        }
      }
    }
}

// The products of R rows of x (R, inputs) with the weights of one output (inputs), into
// sums[r][output]: vectors whose lanes are still to be summed up.
template <int R, typename T>
inline void dot_rows(const T* x, const T* weights, int64_t inputs, int64_t output,
                     __m512 (*sums)[BLOCK]) {
  __m512 sum[R];
  for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
  for (int64_t i = 0; i < inputs; i += 64 / sizeof(T)) {
    _mm_prefetch((const char*)(weights + i) + PREFETCH_DISTANCE, _MM_HINT_T0);
    const __m512i loaded = _mm512_loadu_si512(weights + i);
    for (int r = 0; r < R; r++)
      sum[r] = multiply_add(sum[r], x, loaded, _mm512_loadu_si512(x + r * inputs + i));
  }
  for (int r = 0; r < R; r++) sums[r][output] = sum[r];
}

// y (rows, outputs) = x (rows, inputs) times weights (outputs, inputs), plus the bias (outputs)
// unless it is null. All are row-major and of one dtype; sums are float32. Each thread reads a
// range of outputs from the first weight to the last.
template <typename T>
void linear(const T* x, const T* weights, const T* bias, T* y, int64_t rows, int64_t inputs,
            int64_t outputs) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < outputs; first += BLOCK) {
    const int64_t count = std::min(BLOCK, outputs - first);
    const __mmask16 lanes = first_lanes(count);
    const __m512 block_bias = bias ? load_masked(bias + first, lanes) : _mm512_setzero_ps();
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row, together = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const T* from = x + row * inputs;
      __m512 sums[4][BLOCK] = {};
      for (int64_t output = 0; output < count; output++) {
        const T* output_weights = weights + (first + output) * inputs;
        if (together == 4)
          dot_rows<4>(from, output_weights, inputs, output, sums);
        else if (together == 2)
          dot_rows<2>(from, output_weights, inputs, output, sums);
        else
          dot_rows<1>(from, output_weights, inputs, output, sums);
      }
      for (int64_t r = 0; r < together; r++)
        store_masked(y + (row + r) * outputs + first, lanes,
                     _mm512_add_ps(horizontal_sums(sums[r]), block_bias));
      row += together;
    }
  }
}

}  // namespace
