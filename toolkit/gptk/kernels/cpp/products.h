// Products of a few rows with a matrix of quantized weights (outputs, inputs).
//
// A product of few rows takes as long as reading the weights, if the arithmetic keeps up. It does
// if codes are multiplied as integers, four to a lane (VNNI). For that x is quantized, too, in each
// group of 32 inputs: float32 to 21 bits and a sign, an error of 2⁻²² of the group's largest
// number, which is that of float32 itself; bfloat16, which has 8 bits, to 14 and a sign. A row's
// products are summed in the same order for any number of rows, so that its result is the same, bit
// for bit, whatever the other rows are.
#pragma once

#include "formats.h"

// Rows of x, (rows, inputs), quantized in groups of 32 inputs: x = scale · n, where the integer n
// is part[0] · 128² + part[1] · 128 + part[2] with three parts, or part[0] · 128 + part[1] with
// two; and for each 16 inputs the sum of x.
struct IntegerRows {
  int64_t groups;         // in a row
  const int8_t* part[3];  // (rows, inputs)
  const float* scale;     // (rows, groups)
  const float* sum;       // (rows, groups, 2)
};

// y (rows, 16) = the products of so many rows of x from `row` on with a block of 16 outputs.
using MultiplyRows = void (*)(const uint8_t* weights, const IntegerRows& x, int64_t row, float* y);

// Those for one, two and four rows.
struct BlockProducts {
  MultiplyRows one, two, four;
  int64_t unit, unit_bytes;  // inputs of a unit of the layout, and its bytes in a block
};

// In formats.cpp. parts: of x.
BlockProducts block_products(int64_t format, int64_t parts);

namespace {

constexpr int64_t PREFETCH_DISTANCE = 8192;  // bytes that weights are fetched ahead of their use

// Integers of 8 bits that a number of x is made of: see IntegerRows.
template <typename T>
constexpr int PARTS = sizeof(T) == 4 ? 3 : 2;

// Makes IntegerRows.
template <int parts>
struct QuantizedRows {
  static constexpr int32_t LARGEST = 127 << 7 * (parts - 1);

  int64_t groups;
  int8_t* part[parts];
  float *scale, *sum;

  // memory: of at least `bytes(rows, inputs)`.
  QuantizedRows(int64_t rows, int64_t inputs, int8_t* memory)
      : groups(inputs / GROUP),
        scale((float*)(memory + parts * rows * inputs)),
        sum(scale + rows * groups) {
    for (int p = 0; p < parts; p++) part[p] = memory + p * rows * inputs;
  }

  static int64_t bytes(int64_t rows, int64_t inputs) {
    return round_up(parts * rows * inputs + 3 * rows * (inputs / GROUP) * sizeof(float), 64);
  }

  IntegerRows rows() const { return {groups, {part[0], part[1], part[parts - 1]}, scale, sum}; }

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
    for (int half = 0; half < 2; half++) sum[2 * group + half] = step * reduce_add(rounded[half]);
  }
};

// Consecutive outputs of a matrix whose weights have one format.
struct Segment {
  int64_t format;
  const void* weights;
  int64_t outputs, inputs;
};

// Calls put(row, output, sums) for the 16 outputs of a block of x times the weights, plus the bias
// (outputs) unless it is null, for all rows. weights: the block's. first, outputs: of the matrix,
// which may end in the block.
template <typename T, typename Put>
void multiply_by_block(const BlockProducts& products, const IntegerRows& x, const uint8_t* weights,
                       const T* bias, int64_t rows, int64_t first, int64_t outputs,
                       const Put& put) {
  const Floats block_bias = bias ? load_first(bias + first, outputs - first) : Floats{};
  alignas(64) float sums[4][BLOCK];
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row, together = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const MultiplyRows multiply = together == 4   ? products.four
                                  : together == 2 ? products.two
                                                  : products.one;
    multiply(weights, x, row, sums[0]);
    for (int64_t r = 0; r < together; r++) put(row + r, first, load(sums[r]) + block_bias);
    row += together;
  }
}

// Up to this many rows each thread quantizes all of x for itself, which takes less time than
// waiting for the other threads.
constexpr int64_t ROWS_QUANTIZED_BY_EACH = 8;

// y (rows, outputs) = x (rows, inputs) times the weights, in the layout of formats.h, plus the bias
// (outputs) unless it is null. x, bias and y have one dtype; sums are float32.
template <typename T>
void quantized_linear(int64_t format, const T* x, const uint8_t* weights, const T* bias, T* y,
                      int64_t rows, int64_t inputs, int64_t outputs) {
  const int64_t groups = rows * (inputs / GROUP);
  const int64_t bytes = QuantizedRows<PARTS<T>>::bytes(rows, inputs);
  const bool by_each = rows <= ROWS_QUANTIZED_BY_EACH;
  const Memory<int8_t> memory((by_each ? omp_get_max_threads() : 1) * bytes);
  const BlockProducts products = block_products(format, PARTS<T>);
  const int64_t block_bytes = inputs / products.unit * products.unit_bytes;
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
      multiply_by_block(products, quantized.rows(), weights + block * block_bytes, bias, rows,
                        block * BLOCK, outputs, [&](int64_t row, int64_t output, Floats sums) {
                          store_first(y + row * outputs + output, outputs - output, sums);
                        });
  }
}

}  // namespace
