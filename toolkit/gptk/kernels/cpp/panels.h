// Products of any number of rows with plain weights in panels, the layout of inference.
//
// A panel has 16 outputs, a lane each: for one input after the other (two, in bfloat16) the weights
// of all 16, next to each other. So the product of one row is read from memory at full speed, that
// of many rows needs no packing, and each number of the result is one sum over the inputs in order:
// the same to the last bit, whatever the other rows are.
#pragma once

#include <utility>

#include "common.h"

namespace {

// Outputs of a panel.
constexpr int64_t PANEL = 16;
// The tile whose sums are kept in registers: rows times panels.
constexpr int64_t PANELS = SUMS < 24 ? 1 : 3, PANEL_ROWS = SUMS / PANELS;
// Bytes by which the first tile of some panels fetches their weights ahead of their use.
constexpr int64_t PANEL_PREFETCH = 4096;

// A matrix of weights (outputs, inputs) in panels: (outputs / 16, inputs / numbers in a lane, 16
// lanes). Outputs that the last panel lacks are zeros. inputs: even in bfloat16.
template <typename T>
struct Panels {
  static constexpr int64_t per_lane = 4 / sizeof(T);  // numbers
  const int32_t* lanes;
  const T* bias;  // (outputs), or null
  int64_t inputs, outputs;

  int64_t steps() const { return inputs / per_lane; }
  int64_t count() const { return (outputs + PANEL - 1) / PANEL; }
  const int32_t* panel(int64_t index) const { return lanes + index * steps() * PANEL; }
};

// The sums of a tile, a row after the other.
using TileSums = float[PANEL_ROWS][PANELS * PANEL];

// sums = R rows of x, `stride` numbers apart, times J panels from `first` on, plus the bias.
// fetch: the weights are fetched ahead of their use.
template <typename T, int R, int J>
void multiply_tile(const T* x, int64_t stride, const Panels<T>& weights, int64_t first, bool fetch,
                   TileSums& sums) {
  Floats tile[R][J];
  for (auto& row : tile)
    for (Floats& of_panel : row) of_panel = Floats{};
  const int32_t* lanes = weights.panel(first);
  const int64_t steps = weights.steps(), next = steps * PANEL;
  for (int64_t step = 0; step < steps; step++, lanes += PANEL, x += weights.per_lane) {
    Ints right[J];
    for (int j = 0; j < J; j++) {
      if (fetch) prefetch((const uint8_t*)(lanes + j * next) + PANEL_PREFETCH);
      right[j] = load_bits(lanes + j * next);
    }
    for (int r = 0; r < R; r++) {
      const Ints lane = broadcast_four(x + r * stride);
      for (int j = 0; j < J; j++) tile[r][j] = multiply_add(tile[r][j], x, lane, right[j]);
    }
  }
  for (int j = 0; j < J; j++) {
    const int64_t output = (first + j) * PANEL;
    Floats bias{};
    if (weights.bias) bias = load_first(weights.bias + output, weights.outputs - output);
    for (int r = 0; r < R; r++) store(sums[r] + j * PANEL, tile[r][j] + bias);
  }
}

template <typename T>
using MultiplyTile = void (*)(const T*, int64_t, const Panels<T>&, int64_t, bool, TileSums&);

template <typename T, int J, int... R>
MultiplyTile<T> tile_of_rows(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr MultiplyTile<T> OF_ROWS[] = {multiply_tile<T, R + 1, J>...};
  return OF_ROWS[rows - 1];
}

// `multiply_tile` for so many rows and panels.
template <typename T, int J = PANELS>
MultiplyTile<T> tile_of(int64_t rows, int64_t panels) {
  if constexpr (J > 1)
    if (panels < J) return tile_of<T, J - 1>(rows, panels);
  return tile_of_rows<T, J>(rows, std::make_integer_sequence<int, PANEL_ROWS>());
}

// Calls put(row, output, sums) for all rows of x (rows, inputs) times panels `from` to `to`, 16
// outputs of one row at a time; the last panel may have less.
template <typename T, typename Put>
void multiply_panels(const T* x, int64_t rows, const Panels<T>& weights, int64_t from, int64_t to,
                     const Put& put) {
  alignas(64) TileSums sums;
  const int64_t lines = weights.steps() * PANELS, tiles = (rows + PANEL_ROWS - 1) / PANEL_ROWS;
  for (int64_t first = from; first < to; first += PANELS) {
    const int64_t panels = std::min(PANELS, to - first);
    // While these panels are multiplied with many rows, the next ones are fetched.
    const int64_t next_lines = first + PANELS < to && tiles > 1 ? lines : 0;
    const int32_t* const next = weights.panel(first + PANELS);
    for (int64_t row = 0; row < rows; row += PANEL_ROWS) {
      const int64_t tile = row / PANEL_ROWS;
      for (int64_t i = next_lines * tile / tiles; i < next_lines * (tile + 1) / tiles; i++)
        prefetch_second(next + i * PANEL);
      const int64_t count = std::min(PANEL_ROWS, rows - row);
      const auto multiply = tile_of<T>(count, panels);
      multiply(x + row * weights.inputs, weights.inputs, weights, first, tile == 0, sums);
      for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < panels; j++)
          put(row + r, (first + j) * PANEL, load(sums[r] + j * PANEL));
    }
  }
}

// Numbers as the dtype of x holds them.
inline Floats rounded_as(const float*, Floats numbers) { return numbers; }

inline Floats rounded_as(const uint16_t*, Floats numbers) {
  return floats_of_bits(to_bfloat16_pairs(Floats{}, numbers));
}

// y (rows, outputs) = x (rows, inputs) times weights, plus the bias, rounded to x's dtype, and held
// in this or in float32.
template <typename T, typename Y>
void linear_in_panels(const T* x, int64_t rows, const Panels<T>& weights, Y* y) {
#pragma omp parallel
  {
    const auto [from, to] = share_of_thread(weights.count());
    multiply_panels(x, rows, weights, from, to, [&](int64_t row, int64_t output, Floats sums) {
      store_first(y + row * weights.outputs + output, weights.outputs - output,
                  rounded_as(x, sums));
    });
  }
}

// A panel = weights (count, inputs) of up to 16 outputs, or the other way round. Their numbers of
// 32 bits are transposed.
template <bool PACK, typename T>
void convert_panel(T* weights, std::conditional_t<PACK, int32_t, const int32_t>* panel,
                   int64_t count, int64_t inputs) {
  const int64_t steps = inputs * sizeof(T) / 4;
  auto* rows = (std::conditional_t<PACK, const float, float>*)weights;  // only their bits matter
  for (int64_t step = 0; step < steps; step += 16) {
    Ints v[16];
    for (int64_t i = 0; i < 16; i++) {
      if constexpr (PACK)
        v[i] = i < count ? bits_of(load_first(rows + i * steps + step, steps - step)) : Ints{};
      else
        v[i] = step + i < steps ? load_bits(panel + (step + i) * PANEL) : Ints{};
    }
    transpose<16>(v);
    for (int64_t i = 0; i < 16; i++) {
      if constexpr (PACK) {
        if (step + i < steps) store_bits(panel + (step + i) * PANEL, v[i]);
      } else {
        if (i < count) store_first(rows + i * steps + step, steps - step, floats_of_bits(v[i]));
      }
    }
  }
}

// panels = weights (outputs, inputs), or the other way round.
template <bool PACK, typename T>
void convert_panels(T* weights, std::conditional_t<PACK, int32_t, const int32_t>* panels,
                    int64_t outputs, int64_t inputs) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < outputs; first += PANEL)
    convert_panel<PACK>(weights + first * inputs, panels + first * inputs * sizeof(T) / 4,
                        std::min(PANEL, outputs - first), inputs);
}

// y (rows, outputs) = x (rows, inputs) times weights (outputs, inputs), plus the bias (outputs)
// unless it is null: as `linear_in_panels`, to the last bit. Each thread lays out the panels of a
// tile when it needs them.
template <typename T>
void linear(const T* x, const T* weights, const T* bias, T* y, int64_t rows, int64_t inputs,
            int64_t outputs) {
  const int64_t steps = inputs * sizeof(T) / 4, tile = PANELS * PANEL;
  const Memory<int32_t> memory(omp_get_max_threads() * steps * tile);
#pragma omp parallel
  {
    int32_t* const panels = memory.get() + omp_get_thread_num() * steps * tile;
    const auto [from, to] = share_of_thread((outputs + tile - 1) / tile);
    for (int64_t first = from * tile; first < std::min(to * tile, outputs); first += tile) {
      const int64_t count = std::min(tile, outputs - first);
      for (int64_t output = 0; output < count; output += PANEL)
        convert_panel<true>(weights + (first + output) * inputs, panels + output * steps,
                            std::min(PANEL, count - output), inputs);
      const Panels<T> here{panels, bias ? bias + first : nullptr, inputs, count};
      multiply_panels(x, rows, here, 0, here.count(),
                      [&](int64_t row, int64_t output, Floats sums) {
                        store_first(y + row * outputs + first + output, count - output, sums);
                      });
    }
  }
}

}  // namespace
