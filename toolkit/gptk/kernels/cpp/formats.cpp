// The exported functions that lay quantized weights out and dequantize them, and the products of
// rows with a block of each format, which kernels/build.py compiles and loads.

#include "packing.h"
#include "products.h"
#include "stored.h"

namespace {

// y (R, 16) = R rows of x, from `row` on, times a block of 16 outputs.
template <Format format, int parts, int R>
void multiply_rows(const uint8_t* weights, const IntegerRows& x, int64_t row, float* y) {
  using P = Packed<format>;
  constexpr bool split = P::VALUE_BITS > DOT_BITS;
  constexpr int64_t groups_of_unit = P::T.unit / GROUP, size = GROUP / P::PARTS;
  Floats sums[R];
  for (int r = 0; r < R; r++) sums[r] = Floats{};
  for (int64_t first = 0; first < x.groups; first += groups_of_unit, weights += P::UNIT_BYTES)
    for (int64_t g = 0; g < groups_of_unit; g++) {
      const int64_t codes_at = P::CODES_AT + g * P::GROUP_BYTES;
      for (int64_t at = g ? codes_at : 0; at < codes_at + P::GROUP_BYTES; at += 64)
        prefetch(weights + PREFETCH_DISTANCE + at);
      const GroupScales<format> scales(weights, g);
      Ints values[split ? 16 : 8];
      load_values<format, split>(weights + codes_at, values);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const int64_t group = (row + r) * x.groups + first + g;
        const Floats scale = broadcast(x.scale[group]);
#pragma GCC unroll 2
        for (int part = 0; part < P::PARTS; part++) {
          // Σ value · n over the inputs for each part of n, exact in 32 bits.
          const int8_t* numbers[parts];
          Ints sum[parts];
#pragma GCC unroll 3
          for (int p = 0; p < parts; p++) numbers[p] = x.part[p] + group * GROUP + part * size;
          dot_values<P::VALUE_BITS, parts, size / 4>(values + part * size / 4, numbers, sum);
          Floats total = to_floats((sum[parts - 2] << 7) + sum[parts - 1]);
          if constexpr (parts == 3) total = fma(to_floats(sum[0]), broadcast(1 << 14), total);
          // Σ (value · scale + offset) · x.
          sums[r] = fma(total * scales.scale[part], scale, sums[r]);
          const float* x_sum = x.sum + 2 * group;
          sums[r] = fma(scales.offset[part],
                        broadcast(P::PARTS == 1 ? x_sum[0] + x_sum[1] : x_sum[part]), sums[r]);
        }
      }
    }
  for (int r = 0; r < R; r++) store(y + r * BLOCK, sums[r]);
}

template <Format format, int parts>
BlockProducts products_of() {
  return {multiply_rows<format, parts, 1>, multiply_rows<format, parts, 2>,
          multiply_rows<format, parts, 4>, Packed<format>::T.unit, Packed<format>::UNIT_BYTES};
}

}  // namespace

BlockProducts block_products(int64_t format, int64_t parts) {
  return with_format(format, [&](auto f) {
    return parts == 3 ? products_of<decltype(f)::value, 3>() : products_of<decltype(f)::value, 2>();
  });
}

extern "C" {

// Lays quantized weights out for gptk_quantized_linear. codes: (outputs, inputs), a code in a byte;
// scale, offset: (outputs, groups of 32 inputs); weights: the result, see formats.h. bits: 4 or 8.
int32_t gptk_pack(int64_t bits, const void* codes, const float* scale, const float* offset,
                  void* weights, int64_t outputs, int64_t inputs) {
  return status_of([&] {
    (bits == 4 ? pack<Format::Q4_1> : pack<Format::Q8_OFFSET>)((const uint8_t*)codes, scale, offset,
                                                               (uint8_t*)weights, outputs, inputs);
  });
}

// The same from the blocks of a GGUF file. format: see formats.h; rows: where the blocks of each
// output begin.
int32_t gptk_pack_stored(int64_t format, const uint8_t* const* rows, void* weights, int64_t outputs,
                         int64_t inputs) {
  return status_of([&] {
    with_format(format, [&](auto f) {
      if constexpr (Packed<decltype(f)::value>::T.stored > 0)
        pack_stored<decltype(f)::value>(rows, (uint8_t*)weights, outputs, inputs);
    });
  });
}

// y = code · scale + offset. codes, y: (groups, 32), a code in a byte; scale, offset: (groups).
int32_t gptk_dequantize(int64_t is_bfloat16, const void* codes, const float* scale,
                        const float* offset, void* y, int64_t groups) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16, dequantize((const uint8_t*)codes, scale, offset, (T*)y, groups));
  });
}

// y (outputs, inputs) = the dequantized weights of a matrix in the layout of formats.h.
int32_t gptk_dequantize_packed(int64_t is_bfloat16, int64_t format, const void* weights, void* y,
                               int64_t inputs, int64_t outputs) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16, with_format(format, [&](auto f) {
                     dequantize_packed<decltype(f)::value>((const uint8_t*)weights, (T*)y, inputs,
                                                           outputs);
                   }));
  });
}

// y (count, inputs) = the dequantized weights of some outputs. wanted: (count), their numbers.
int32_t gptk_dequantize_rows(int64_t is_bfloat16, int64_t format, const void* weights,
                             const int64_t* wanted, void* y, int64_t inputs, int64_t outputs,
                             int64_t count) {
  return status_of([&] {
    for (int64_t i = 0; i < count; i++) require(0 <= wanted[i] && wanted[i] < outputs, BAD_OUTPUTS);
    DISPATCH_DTYPE(is_bfloat16, with_format(format, [&](auto f) {
                     dequantize_rows<decltype(f)::value>((const uint8_t*)weights, wanted, (T*)y,
                                                         inputs, count);
                   }));
  });
}
}
