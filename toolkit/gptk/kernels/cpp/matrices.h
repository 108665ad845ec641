// Products of large matrices in bfloat16, summed in float32: what training spends its time with.
// Either side is packed into panels as it is needed; float32 is rounded on the way.
#pragma once

#include <omp.h>

#include <type_traits>

#include "common.h"

namespace {

// A tile of the product is TALL rows of A by WIDE columns of B: its sums fill 24 registers.
constexpr int64_t TALL = 8, WIDE = 48;
// Numbers of each row and column that are multiplied before the next, at most; and of the packed
// side that stays in the cache meanwhile, in all.
constexpr int64_t DEEP = 1536, KEPT = 512 * DEEP;

struct alignas(64) Line {
  uint16_t numbers[32];
};

// The rows of A or the columns of B. `along`: the numbers of one stand next to each other; else
// those of its neighbors do.
template <typename T>
struct Side {
  const T* x;
  int64_t stride, count;
  bool along;
};

inline int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

inline __m512i load_pairs(const float* x, int64_t count) {
  return bfloat16s(load_some(x, lanes_of(count)), load_some(x + 16, lanes_of(count - 16)));
}

inline __m512i join(const float* x, const float* under, __mmask16 lanes) {
  const __m512i in_turns =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 high = under ? load_some(under, lanes) : _mm512_setzero_ps();
  return _mm512_permutexvar_epi16(in_turns, bfloat16s(load_some(x, lanes), high));
}

// A panel is (pairs, WIDTH, 2). Puts a pair each of 16 rows or columns, from `at` on, into theirs.
template <int64_t WIDTH>
void put(__m512i lanes, int64_t at, int64_t count, int64_t pair, int64_t pairs, uint16_t* panels) {
  uint16_t* to = panels + (at / WIDTH * pairs + pair) * WIDTH * 2;
  if (WIDTH % 16 == 0) {
    _mm512_storeu_si512(to + at % WIDTH * 2, lanes);
    return;
  }
  _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(lanes));
  if (at + WIDTH < count)
    _mm256_storeu_si256((__m256i*)(to + pairs * WIDTH * 2), _mm512_extracti64x4_epi64(lanes, 1));
}

// Numbers `from` to `from` + `depth` of `count` rows or columns from `first` on, in panels.
template <int64_t WIDTH, typename T>
void pack_panels(const Side<T>& side, int64_t first, int64_t count, int64_t from, int64_t depth,
                 uint16_t* panels) {
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t at = 0; at < rounded(count, WIDTH); at += 16) {
    if (side.along) {
      const T* x = side.x + (first + at) * side.stride + from;
      for (int64_t k = 0; k < depth; k += 32) {
        __m512i v[16];
        for (int64_t i = 0; i < 16; i++)
          v[i] = at + i < count ? load_pairs(x + i * side.stride + k, depth - k)
                                : _mm512_setzero_si512();
        transpose(v);
        for (int64_t i = 0; i < 16 && k / 2 + i < pairs; i++)
          put<WIDTH>(v[i], at, count, k / 2 + i, pairs, panels);
      }
    } else {
      const T* x = side.x + from * side.stride + first + at;
      const __mmask16 lanes = lanes_of(count - at);
      for (int64_t k = 0; k < depth; k += 2, x += 2 * side.stride)
        put<WIDTH>(join(x, k + 1 < depth ? x + side.stride : nullptr, lanes), at, count, k / 2,
                   pairs, panels);
    }
  }
}

// Asks for what is to be packed next, a few lines of memory at a time.
struct Ahead {
  const char* x = nullptr;
  int64_t stride = 0, lines = 0, runs = 0, line = 0;

  template <typename T>
  Ahead(const Side<T>& side, int64_t first, int64_t count, int64_t from, int64_t depth) {
    if (count <= 0) return;
    x = (const char*)(side.x + (side.along ? first * side.stride + from
                                           : from * side.stride + first));
    stride = side.stride * sizeof(T);
    lines = (side.along ? depth : count) * sizeof(T) / 64 + 1;
    runs = side.along ? count : depth;
  }

  void ask(int64_t count) {
    for (; count > 0 && runs > 0; count--) {
      _mm_prefetch(x + 64 * line, _MM_HINT_T1);
      if (++line == lines) line = 0, x += stride, runs--;
    }
  }
};

// Where a tile's sums go: into `sums` while there is more to add, at last into y.
template <typename Y>
struct Target {
  float* sums;
  int64_t sums_stride;
  Y* y;
  int64_t stride;
  const float* bias;
  bool add, last;
};

// WHOLE: all of the tile is there.
template <bool WHOLE, typename Y>
inline void store_tile(const __m512 (&sum)[TALL][WIDE / 16], const Target<Y>& to, int64_t rows,
                       int64_t columns) {
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++)
#pragma GCC unroll 3
    for (int j = 0; j < WIDE / 16; j++) {
      const __mmask16 lanes = WHOLE ? ALL : i < rows ? lanes_of(columns - 16 * j) : 0;
      float* sums = to.sums + i * to.sums_stride + 16 * j;
      Y* y = to.y + i * to.stride + 16 * j;
      __m512 value = sum[i][j];
      if (to.add) value = _mm512_add_ps(value, WHOLE ? load(sums) : load_some(sums, lanes));
      if (to.last && to.bias) value = _mm512_add_ps(value, load_some(to.bias + 16 * j, lanes));
      if (WHOLE)
        to.last ? store(y, value) : store(sums, value);
      else
        to.last ? store_some(y, lanes, value) : store_some(sums, lanes, value);
    }
}

template <typename Y>
void multiply_tile(const uint16_t* a, const uint16_t* b, int64_t pairs, const Target<Y>& to,
                   int64_t rows, int64_t columns) {
  if (to.add)
    for (int64_t i = 0; i < std::min(rows, TALL); i++)
      for (int64_t j = 0; j < std::min(columns, WIDE); j += 16)
        _mm_prefetch(to.sums + i * to.sums_stride + j, _MM_HINT_T0);
  __m512 sum[TALL][WIDE / 16];
  for (auto& line : sum)
    for (auto& one : line) one = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++, a += TALL * 2, b += WIDE * 2) {
    __m512i right[WIDE / 16];
    for (int j = 0; j < WIDE / 16; j++) right[j] = _mm512_load_si512(b + j * 32);
    for (int i = 0; i < TALL; i++) {
      int32_t pair;
      std::memcpy(&pair, a + i * 2, sizeof pair);
      for (int j = 0; j < WIDE / 16; j++)
        sum[i][j] = multiply(sum[i][j], a, _mm512_set1_epi32(pair), right[j]);
    }
  }
  if (rows >= TALL && columns >= WIDE)
    store_tile<true>(sum, to, rows, columns);
  else
    store_tile<false>(sum, to, rows, columns);
}

// y (rows of A, columns of B) = A B + bias, or in float32 with that added to it. All pack a block
// of one side, as much as stays in the cache; of the other side each core packs a chunk of WIDE,
// which passes the block, and asks for its next one. The side with fewer rows or columns is kept;
// but B where A's rows are columns in memory, as for a gradient of weights: rows of y are then
// written whole.
template <typename B, typename Y>
void product(const Side<uint16_t>& a, const Side<B>& b, int64_t depth, Y* y, int64_t stride,
             const float* bias, bool add) {
  const bool keep_a = a.along && a.count <= b.count;
  const int64_t kept = keep_a ? a.count : b.count, passing = keep_a ? b.count : a.count;
  const int64_t parts = (depth + DEEP - 1) / DEEP, deep = rounded((depth - 1) / parts + 1, 32);
  const int64_t block = std::min(rounded(KEPT / deep, WIDE), rounded(kept, WIDE));
  thread_local std::vector<Line> kept_panels, unfinished;
  kept_panels.resize(block * deep / 32);
  uint16_t* const block_panels = (uint16_t*)kept_panels.data();
  constexpr bool exact = std::is_same<Y, float>::value;
  const int64_t sums_stride = exact ? stride : keep_a ? rounded(b.count, 16) : block;
  float* sums = (float*)y;
  if (!exact && parts > 1) {
    unfinished.resize((keep_a ? block : a.count) * sums_stride / 16);
    sums = (float*)unfinished.data();
  }
#pragma omp parallel
  {
    thread_local std::vector<Line> own_panels;
    own_panels.resize(WIDE * deep / 32);
    uint16_t* const chunk_panels = (uint16_t*)own_panels.data();
    for (int64_t first = 0; first < kept; first += block)
      for (int64_t from = 0; from < depth; from += deep) {
        const int64_t count = std::min(block, kept - first), some = std::min(deep, depth - from);
        const int64_t pairs = (some + 1) / 2;
#pragma omp for schedule(static)
        for (int64_t at = 0; at < count; at += WIDE) {
          const int64_t width = std::min(WIDE, count - at);
          uint16_t* to = block_panels + at * pairs * 2;
          if (keep_a)
            pack_panels<TALL>(a, first + at, width, from, some, to);
          else
            pack_panels<WIDE>(b, first + at, width, from, some, to);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < passing; at += WIDE) {
          const int64_t width = std::min(WIDE, passing - at), next = at + WIDE;
          const int64_t next_width = std::min(WIDE, passing - next);
          if (keep_a)
            pack_panels<WIDE>(b, at, width, from, some, chunk_panels);
          else
            pack_panels<TALL>(a, at, width, from, some, chunk_panels);
          Ahead ahead = keep_a ? Ahead(b, next, next_width, from, some)
                               : Ahead(a, next, next_width, from, some);
          const int64_t step = keep_a ? TALL : WIDE, passing_step = keep_a ? WIDE : TALL;
          const int64_t tiles =
              rounded(width, passing_step) / passing_step * (rounded(count, step) / step);
          const int64_t lines = ahead.lines * ahead.runs / tiles + 1;
          for (int64_t i = 0; i < width; i += passing_step)
            for (int64_t j = 0; j < count; j += step) {
              ahead.ask(lines);
              const uint16_t* mine = chunk_panels + i * pairs * 2;
              const uint16_t* other = block_panels + j * pairs * 2;
              const int64_t row = keep_a ? first + j : at + i, column = keep_a ? at + i : first + j;
              const int64_t place = exact    ? row * stride + column
                                    : keep_a ? j * sums_stride + column
                                             : row * sums_stride + j;
              const Target<Y> to{sums + place,
                                 sums_stride,
                                 y + row * stride + column,
                                 stride,
                                 bias ? bias + column : nullptr,
                                 add || from > 0,
                                 from + some == depth};
              multiply_tile(keep_a ? other : mine, keep_a ? mine : other, pairs, to, a.count - row,
                            b.count - column);
            }
        }
      }
  }
}

}  // namespace
