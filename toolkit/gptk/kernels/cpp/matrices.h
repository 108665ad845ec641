// Products of large matrices: bfloat16 times bfloat16, summed in float32. Training spends most of
// its time in them.
//
// y = A B is computed a tile at a time. For that, rows of A and columns of B are packed into
// panels, in the order in which tiles read them; operands in float32 are rounded to bfloat16 on the
// way.
#pragma once

#include "common.h"

namespace {

// The depth is processed in parts of at most this many numbers.
constexpr int64_t MAX_PART_DEPTH = 1536;
// How many numbers of one operand are packed at a time, to stay in the cache while the other
// operand passes by.
constexpr int64_t BLOCK_NUMBERS = 512 * MAX_PART_DEPTH;
// Up to so many threads pack the block each for itself. What another core has packed would come
// from its cache, which takes longer than packing.
constexpr int64_t MAX_THREADS_ALONE = 4;

// A matrix as an operand: `count` rows of A (count, depth), or columns of B (depth, count).
template <typename T>
struct Operand {
  const T* x;
  int64_t stride, count;
  // True: the numbers of a row of A (row-major), or of a column of B (column-major), are next to
  // each other in memory, and `stride` leads to the next row or column. False: numbers of the same
  // depth are next to each other, and `stride` leads to the next depth.
  bool contiguous_in_depth;
};

// Writes one pair of depths of 16 rows or columns, a lane each, into the panels they belong to:
// panels (count / WIDTH, pairs, WIDTH, 2) of bfloat16. first: the first of these rows or columns.
template <int64_t WIDTH>
void store_pair(Ints lanes, int64_t first, int64_t count, int64_t pair, int64_t pairs,
                uint16_t* panels) {
  uint16_t* to = panels + (first / WIDTH * pairs + pair) * WIDTH * 2;
  if (WIDTH == TILE_COLUMNS) {
    store_bits(to + first % WIDTH * 2, lanes);
    return;
  }
  for (int64_t part = 0; WIDTH * part < std::min<int64_t>(16, count - first); part++)
    store_tile_rows(to + pairs * WIDTH * 2 * part, lanes, part);
}

// Packs `count` rows of A or columns of B, from `first` on, at depths `from` to `from + depth`,
// into panels of WIDTH rows or columns: (count / WIDTH, depth / 2, WIDTH, 2) of bfloat16, all
// divisions rounded up, and zeros for what is missing.
template <int64_t WIDTH, typename T>
void pack_panels(const Operand<T>& operand, int64_t first, int64_t count, int64_t from,
                 int64_t depth, uint16_t* panels) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t start = 0; start < round_up(count, WIDTH); start += 16) {
    if (operand.contiguous_in_depth) {
      const T* x = operand.x + (first + start) * operand.stride + from;
      for (int64_t k = 0; k < depth; k += 32) {
        Ints v[16];
        for (int64_t i = 0; i < 16; i++)
          v[i] = start + i < count ? load_pairs(x + i * operand.stride + k, depth - k) : Ints{};
        transpose<16>(v);
        for (int64_t i = 0; i < 16 && k / 2 + i < pairs; i++)
          store_pair<WIDTH>(v[i], start, count, k / 2 + i, pairs, panels);
      }
    } else {
      const T* x = operand.x + from * operand.stride + first + start;
      for (int64_t k = 0; k < depth; k += 2, x += 2 * operand.stride)
        store_pair<WIDTH>(
            interleave(x, k + 1 < depth ? x + operand.stride : nullptr, count - start), start,
            count, k / 2, pairs, panels);
    }
  }
}

// Prefetches the memory that `pack_panels` will read with the same arguments, some cache lines at a
// time.
struct Prefetcher {
  const char* x = nullptr;
  // Memory in `runs` that are `stride` bytes apart, each of `lines` cache lines, of which `line` is
  // the next.
  int64_t stride = 0, lines = 0, runs = 0, line = 0;

  template <typename T>
  Prefetcher(const Operand<T>& operand, int64_t first, int64_t count, int64_t from, int64_t depth) {
    if (count <= 0) return;
    x = (const char*)(operand.x + (operand.contiguous_in_depth ? first * operand.stride + from
                                                               : from * operand.stride + first));
    stride = operand.stride * sizeof(T);
    lines = (operand.contiguous_in_depth ? depth : count) * sizeof(T) / 64 + 1;
    runs = operand.contiguous_in_depth ? count : depth;
  }

  // Prefetches the next `count` lines.
  void prefetch(int64_t count) {
    for (; count > 0 && runs > 0; count--) {
      prefetch_second(x + 64 * line);
      if (++line == lines) line = 0, x += stride, runs--;
    }
  }
};

// Where the sums of a tile go: into `sums` while parts of the depth are still to come, with the
// last part into y, plus the bias unless it is null. Pointers are to the tile's first row and
// column.
template <typename Y>
struct Target {
  float* sums;
  int64_t sums_stride;
  Y* y;
  int64_t stride;
  const float* bias;
  bool add;   // the tile's sums are added to what is in `sums`
  bool last;  // this is the last part of the depth
};

// Stores the sums of a tile. rows, columns: how many of y there are from the tile's first on.
// WHOLE: at least as many as the tile has.
template <bool WHOLE, typename Y>
inline void store_tile(const Floats (&sum)[TILE_ROWS][TILE_COLUMNS / 16], const Target<Y>& to,
                       int64_t rows, int64_t columns) {
#pragma GCC unroll 8
  for (int i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 3
    for (int j = 0; j < TILE_COLUMNS / 16; j++) {
      const int64_t count = WHOLE ? 16 : i < rows ? columns - 16 * j : 0;
      float* sums = to.sums + i * to.sums_stride + 16 * j;
      Y* y = to.y + i * to.stride + 16 * j;
      Floats value = sum[i][j];
      if (to.add) value = value + (load_first(sums, count));
      if (to.last && to.bias) value = value + load_first(to.bias + 16 * j, count);
      to.last ? store_first(y, count, value) : store_first(sums, count, value);
    }
}

// The product of a panel of A (pairs, TILE_ROWS, 2) and one of B (pairs, TILE_COLUMNS, 2),
// bfloat16, summed in float32. rows, columns: see `store_tile`.
template <typename Y>
void multiply_tile(const uint16_t* a, const uint16_t* b, int64_t pairs, const Target<Y>& to,
                   int64_t rows, int64_t columns) {
  if (to.add)
    for (int64_t i = 0; i < std::min(rows, TILE_ROWS); i++)
      for (int64_t j = 0; j < std::min(columns, TILE_COLUMNS); j += 16)
        prefetch(to.sums + i * to.sums_stride + j);
  Floats sum[TILE_ROWS][TILE_COLUMNS / 16];
  for (auto& row : sum)
    for (auto& lanes : row) lanes = Floats{};
  for (int64_t k = 0; k < pairs; k++, a += TILE_ROWS * 2, b += TILE_COLUMNS * 2) {
    Ints right[TILE_COLUMNS / 16];
    for (int j = 0; j < TILE_COLUMNS / 16; j++) right[j] = load_bits(b + j * 32);
    for (int i = 0; i < TILE_ROWS; i++) {
      const Ints left = broadcast_four(a + i * 2);
      for (int j = 0; j < TILE_COLUMNS / 16; j++)
        sum[i][j] = multiply_add(sum[i][j], a, left, right[j]);
    }
  }
  if (rows >= TILE_ROWS && columns >= TILE_COLUMNS)
    store_tile<true>(sum, to, rows, columns);
  else
    store_tile<false>(sum, to, rows, columns);
}

// `product` for a depth of 0: y = 0, plus the bias, plus y itself if `add`.
template <typename Y>
void sum_of_nothing(int64_t rows, int64_t columns, Y* y, int64_t stride, const float* bias,
                    bool add) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t j = 0; j < columns; j += 16) {
      Y* to = y + row * stride + j;
      Floats sum = bias ? load_first(bias + j, columns - j) : Floats{};
      if (add) sum = sum + load_first(to, columns - j);
      store_first(to, columns - j, sum);
    }
}

// y (rows of A, columns of B) = A B, plus the bias (columns) unless it is null, plus y itself if
// `add`, for which y must be float32. y is row-major, a row every `stride` numbers.
//
// All threads together, or each for itself, pack a block of one operand, as much as stays in the
// cache. Of the other
// operand each thread packs a chunk of 48 rows or columns at a time, multiplies it by the whole
// block, and meanwhile prefetches its next chunk. The operand with fewer rows or columns is the one
// in blocks; but if A is column-major, as for a gradient of weights, it is always B, so that whole
// rows of y are written.
template <typename B, typename Y>
void product(const Operand<uint16_t>& a, const Operand<B>& b, int64_t depth, Y* y, int64_t stride,
             const float* bias, bool add) {
  if (a.count == 0 || b.count == 0) return;
  if (depth == 0) return sum_of_nothing(a.count, b.count, y, stride, bias, add);
  const bool a_in_blocks = a.contiguous_in_depth && a.count <= b.count;
  const int64_t block_total = a_in_blocks ? a.count : b.count;
  const int64_t chunk_total = a_in_blocks ? b.count : a.count;
  const int64_t parts = (depth + MAX_PART_DEPTH - 1) / MAX_PART_DEPTH;
  const int64_t part_depth = round_up((depth - 1) / parts + 1, 32);
  const int64_t block_size = std::min(round_up(BLOCK_NUMBERS / part_depth, TILE_COLUMNS),
                                      round_up(block_total, TILE_COLUMNS));
  // Kept for the next call. A block and, for each thread, a chunk.
  thread_local Memory<uint16_t> block_memory, chunk_memory;
  thread_local Memory<float> sums_memory;
  const int64_t chunk_numbers = TILE_COLUMNS * part_depth;
  const int64_t most_threads = omp_get_max_threads(), block_numbers = block_size * part_depth;
  const bool alone = most_threads <= MAX_THREADS_ALONE;
  block_memory.reserve((alone ? most_threads : 1) * block_numbers);
  chunk_memory.reserve(most_threads * chunk_numbers);
  uint16_t *const blocks = block_memory.get(), *const chunks = chunk_memory.get();
  // Sums of parts of the depth are kept in y if that is float32, else in memory for one block.
  constexpr bool y_is_float32 = std::is_same<Y, float>::value;
  const int64_t sums_stride = y_is_float32  ? stride
                              : a_in_blocks ? round_up(b.count, 16)
                                            : block_size;
  float* sums = (float*)y;
  if (!y_is_float32 && parts > 1) {
    sums_memory.reserve((a_in_blocks ? block_size : a.count) * sums_stride);
    sums = sums_memory.get();
  }
#pragma omp parallel
  {
    const int64_t thread = omp_get_thread_num();
    uint16_t* const block_panels = blocks + (alone ? thread * block_numbers : 0);
    uint16_t* const chunk_panels = chunks + thread * chunk_numbers;
    const int64_t first_packed = alone ? 0 : thread * TILE_COLUMNS;
    const int64_t pack_step = (alone ? 1 : omp_get_num_threads()) * TILE_COLUMNS;
    for (int64_t first = 0; first < block_total; first += block_size)
      for (int64_t from = 0; from < depth; from += part_depth) {
        const int64_t count = std::min(block_size, block_total - first);
        const int64_t depth_here = std::min(part_depth, depth - from), pairs = (depth_here + 1) / 2;
        for (int64_t start = first_packed; start < count; start += pack_step) {
          const int64_t width = std::min(TILE_COLUMNS, count - start);
          uint16_t* panels = block_panels + start * pairs * 2;
          if (a_in_blocks)
            pack_panels<TILE_ROWS>(a, first + start, width, from, depth_here, panels);
          else
            pack_panels<TILE_COLUMNS>(b, first + start, width, from, depth_here, panels);
        }
        if (!alone) {
#pragma omp barrier
        }
      // Statically, so that a thread has the same chunks for all parts of the depth.
#pragma omp for schedule(static) nowait
        for (int64_t start = 0; start < chunk_total; start += TILE_COLUMNS) {
          const int64_t width = std::min(TILE_COLUMNS, chunk_total - start);
          const int64_t next = start + TILE_COLUMNS;
          const int64_t next_width = std::min(TILE_COLUMNS, chunk_total - next);
          if (a_in_blocks)
            pack_panels<TILE_COLUMNS>(b, start, width, from, depth_here, chunk_panels);
          else
            pack_panels<TILE_ROWS>(a, start, width, from, depth_here, chunk_panels);
          Prefetcher next_chunk = a_in_blocks ? Prefetcher(b, next, next_width, from, depth_here)
                                              : Prefetcher(a, next, next_width, from, depth_here);
          const int64_t block_step = a_in_blocks ? TILE_ROWS : TILE_COLUMNS;
          const int64_t chunk_step = a_in_blocks ? TILE_COLUMNS : TILE_ROWS;
          const int64_t tiles =
              round_up(width, chunk_step) / chunk_step * (round_up(count, block_step) / block_step);
          const int64_t lines_per_tile = next_chunk.lines * next_chunk.runs / tiles + 1;
          for (int64_t i = 0; i < width; i += chunk_step)
            for (int64_t j = 0; j < count; j += block_step) {
              next_chunk.prefetch(lines_per_tile);
              const uint16_t* chunk_panel = chunk_panels + i * pairs * 2;
              const uint16_t* block_panel = block_panels + j * pairs * 2;
              const int64_t row = a_in_blocks ? first + j : start + i;
              const int64_t column = a_in_blocks ? start + i : first + j;
              const int64_t offset = y_is_float32  ? row * stride + column
                                     : a_in_blocks ? j * sums_stride + column
                                                   : row * sums_stride + j;
              const Target<Y> to{sums + offset,
                                 sums_stride,
                                 y + row * stride + column,
                                 stride,
                                 bias ? bias + column : nullptr,
                                 add || from > 0,
                                 from + depth_here == depth};
              multiply_tile(a_in_blocks ? block_panel : chunk_panel,
                            a_in_blocks ? chunk_panel : block_panel, pairs, to, a.count - row,
                            b.count - column);
            }
        }
        if (!alone) {
#pragma omp barrier
        }
      }
  }
}

}  // namespace
