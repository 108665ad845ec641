// Attention: of few queries over a cache, and of a prompt with itself.
#pragma once

#include "common.h"

namespace {

constexpr int64_t CHUNK = 64;    // keys that are looked at together
constexpr int64_t WIDEST = 128;  // of a head
constexpr int64_t QUERIES = 16;  // the most there can be

// What a query makes of a chunk of keys: the largest score, and with it as the unit the sum of
// weights and the weighted sum of values.
struct Partial {
  float most, weight;
  float sum[WIDEST];
};

// Rows of queries, `rows` of each tree; each key head serves `group` query heads.
struct Attention {
  int64_t trees, rows, group, kv_heads, length, row_stride, key_stride, tree_stride, mask_stride;
  float scale;

  int64_t batch() const { return trees * kv_heads; }
  int64_t queries() const { return group * rows; }

  // Where a query of an element of the batch stands: its row, counted through all, and its head.
  int64_t row(int64_t one, int64_t query) const { return one / kv_heads * rows + query % rows; }
  int64_t head(int64_t one, int64_t query) const { return one % kv_heads * group + query / rows; }
};

// The scores of a query, for keys that are `seen`, into scores; returns the largest. Beyond count,
// up to a multiple of 16, they are -inf.
template <typename T, int vectors>
float score(const T* q, const T* keys, const T* mask, const int32_t* seen, int64_t count,
            float scale, float* scores) {
  constexpr int64_t size = 16 * vectors, step = 64 / sizeof(T);
  __m512i own[size / step];
  for (int v = 0; v < size / step; v++) own[v] = _mm512_loadu_si512(q + v * step);
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t key = 0; key < count; key += 16) {
    __m512 dots[16];
    alignas(64) float added[16];
    for (int i = 0; i < 16; i++) {
      const int32_t at = seen[std::min(key + i, count - 1)];
      dots[i] = _mm512_setzero_ps();
      for (int v = 0; v < size / step; v++)
        dots[i] = multiply(dots[i], q, own[v], _mm512_loadu_si512(keys + at * size + v * step));
      added[i] = key + i < count ? (mask ? number(mask[at]) : 0) : -INFINITY;
    }
    const __m512 some =
        _mm512_fmadd_ps(sums_of(dots), _mm512_set1_ps(scale), _mm512_load_ps(added));
    _mm512_store_ps(scores + key, some);
    most = _mm512_max_ps(most, some);
  }
  return _mm512_reduce_max_ps(most);
}

// The values that are `seen`, times the weights of H queries that are `apart`, for each.
template <typename T, int vectors, int H>
void weigh(const T* values, const float (*weights)[CHUNK], int64_t apart, const int32_t* seen,
           int64_t count, Partial* out) {
  __m512 sum[H][vectors];
  for (auto& one : sum)
    for (auto& some : one) some = _mm512_setzero_ps();
  for (int64_t key = 0; key < count; key++)
    for (int v = 0; v < vectors; v++) {
      const __m512 value = load(values + seen[key] * 16 * vectors + 16 * v);
      for (int h = 0; h < H; h++)
        sum[h][v] = _mm512_fmadd_ps(_mm512_set1_ps(weights[h * apart][key]), value, sum[h][v]);
    }
  for (int h = 0; h < H; h++)
    for (int v = 0; v < vectors; v++) _mm512_storeu_ps(out[h * apart].sum + 16 * v, sum[h][v]);
}

template <typename T, int vectors>
void attend_chunk(const T* q, const T* keys, const T* values, const T* mask, const Attention& at,
                  int64_t one, int64_t count, Partial* out) {
  constexpr int64_t size = 16 * vectors;
  alignas(64) float weights[QUERIES][CHUNK];
  // A row's heads see the same keys, of a tree often few.
  for (int64_t row = 0; row < at.rows; row++) {
    const T* added = mask ? mask + row * at.mask_stride : nullptr;
    int32_t seen[CHUNK];
    int64_t some = 0;
    for (int64_t key = 0; key < count; key++)
      if (!added || number(added[key]) > -INFINITY) seen[some++] = key;
    for (int64_t query = row; query < at.queries(); query += at.rows) {
      const T* from = q + at.row(one, query) * at.row_stride + at.head(one, query) * size;
      float* own = weights[query];
      out[query].most =
          score<T, vectors>(from, keys, added, seen, some, at.scale, own);
      const __m512 unit = unit_of(out[query].most);
      __m512 weight = _mm512_setzero_ps();
      for (int64_t key = 0; key < some; key += 16) {
        const __m512 part = exp(_mm512_sub_ps(_mm512_load_ps(own + key), unit));
        _mm512_store_ps(own + key, part);
        weight = _mm512_add_ps(weight, part);
      }
      out[query].weight = _mm512_reduce_add_ps(weight);
    }
    constexpr int together = vectors > 4 ? 2 : 4;  // as many sums as there are registers
    for (int64_t head = 0; head < at.group;) {
      const int64_t query = head * at.rows + row, left = at.group - head;
      if (left >= together) {
        weigh<T, vectors, together>(values, weights + query, at.rows, seen, some, out + query);
        head += together;
      } else if (left == 3) {
        weigh<T, vectors, 3>(values, weights + query, at.rows, seen, some, out + query);
        head += 3;
      } else if (left == 2) {
        weigh<T, vectors, 2>(values, weights + query, at.rows, seen, some, out + query);
        head += 2;
      } else {
        weigh<T, vectors, 1>(values, weights + query, at.rows, seen, some, out + query);
        head += 1;
      }
    }
  }
}

// Chunks are the same however many threads there are, and so is the result.
template <typename T, int vectors>
void attend(const T* q, const T* keys, const T* values, const T* mask, T* y, const Attention& at) {
  constexpr int64_t size = 16 * vectors;
  const int64_t chunks = (at.length + CHUNK - 1) / CHUNK, queries = at.queries();
  const std::unique_ptr<Partial[]> partial(new Partial[at.batch() * chunks * queries]);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < at.batch() * chunks; task++) {
      const int64_t one = task / chunks, start = task % chunks * CHUNK;
      const int64_t from = one * at.key_stride + start * size;
      attend_chunk<T, vectors>(q, keys + from, values + from,
                               mask ? mask + one / at.kv_heads * at.tree_stride + start : nullptr, at, one,
                               std::min(CHUNK, at.length - start), &partial[task * queries]);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < at.batch() * queries; task++) {
      const int64_t one = task / queries, query = task % queries;
      const Partial* of = &partial[one * chunks * queries + query];
      T* to = y + (at.row(one, query) * at.kv_heads * at.group + at.head(one, query)) * size;
      float most = -INFINITY;
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        most = std::max(most, of[chunk * queries].most);
      __m512 sum[vectors], weight = _mm512_setzero_ps();
      for (int v = 0; v < vectors; v++) sum[v] = _mm512_setzero_ps();
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const Partial& some = of[chunk * queries];
        const __m512 factor = exp(_mm512_set1_ps(some.most - most));
        weight = _mm512_fmadd_ps(factor, _mm512_set1_ps(some.weight), weight);
        for (int v = 0; v < vectors; v++)
          sum[v] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(some.sum + 16 * v), sum[v]);
      }
      for (int v = 0; v < vectors; v++)
        store(to + 16 * v, ALL, _mm512_div_ps(sum[v], weight));
    }
  }
}

// Queries and keys are the same tokens, and each sees itself and those before it.
struct Causal {
  int64_t rows, time, heads, kv_heads, q_row, q_time, kv_row, kv_time;  // strides; heads have none
  float scale;
};

// Chunks of keys are laid out so that sums stand side by side: lanes of 32 bits, as many numbers as
// fit into one, (numbers of a head, CHUNK keys); values likewise, (CHUNK keys, numbers of a head).
template <typename T, int vectors>
struct Chunk {
  static constexpr int64_t size = 16 * vectors, per = 4 / sizeof(T);
  alignas(64) uint32_t keys[size / per][CHUNK];
  alignas(64) T values[CHUNK / per][size][per];

  void fill(const T* k, const T* v, int64_t count, int64_t stride) {
    for (int64_t key = 0; key < CHUNK; key++)
      for (int64_t i = 0; i < size; i += per) {
        uint32_t some = 0;
        if (key < count) std::memcpy(&some, k + key * stride + i, 4);
        keys[i / per][key] = some;
        for (int64_t j = i; j < i + per; j++)
          values[key / per][j][key % per] = key < count ? v[key * stride + j] : T(0);
      }
  }
};

constexpr int QUERIES_AT_ONCE = 4;

template <typename T>
inline __m512i lane_of(const T* x) {
  int32_t some;
  std::memcpy(&some, x, 4);
  return _mm512_set1_epi32(some);
}

// Four queries, a token apart, with a chunk; the first sees `seen` of its keys. sum, most and
// weight go on from the chunks before.
template <typename T, int vectors>
void attend_chunk_causally(const T* q, int64_t apart, int64_t queries, float scale, int64_t seen,
                           const Chunk<T, vectors>& chunk, float (*sum)[16 * vectors], float* most,
                           float* weight) {
  constexpr int64_t size = 16 * vectors, per = 4 / sizeof(T);
  constexpr int Q = QUERIES_AT_ONCE, some = vectors % 4 ? 2 : 4;
  __m512 scores[Q][CHUNK / 16] = {};
  for (int64_t i = 0; i < size; i += per)
    for (int r = 0; r < Q; r++) {
      const __m512i own = lane_of(q + std::min<int64_t>(r, queries - 1) * apart + i);
      for (int k = 0; k < CHUNK / 16; k++)
        scores[r][k] =
            multiply(scores[r][k], q, own, _mm512_load_si512(&chunk.keys[i / per][16 * k]));
    }
  alignas(64) T weights[Q][CHUNK];
  __m512 factors[Q];
  for (int r = 0; r < Q; r++) {
    const int64_t own = std::min(seen + r, CHUNK);
    __m512 highest = _mm512_set1_ps(most[r]), added = _mm512_setzero_ps();
    for (int k = 0; k < CHUNK / 16; k++) {
      const int64_t left = std::min<int64_t>(std::max<int64_t>(own - 16 * k, 0), 16);
      const __m512 scaled = _mm512_mul_ps(scores[r][k], _mm512_set1_ps(scale));
      scores[r][k] =
          _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (1u << left) - 1, scaled);
      highest = _mm512_max_ps(scores[r][k], highest);
    }
    const float now = _mm512_reduce_max_ps(highest);
    factors[r] = exp(_mm512_sub_ps(_mm512_set1_ps(most[r]), unit_of(now)));
    for (int k = 0; k < CHUNK / 16; k++) {
      const __m512 one = exp(_mm512_sub_ps(scores[r][k], unit_of(now)));
      store(&weights[r][16 * k], ALL, one);
      added = _mm512_add_ps(added, one);
    }
    weight[r] = weight[r] * _mm512_cvtss_f32(factors[r]) + _mm512_reduce_add_ps(added);
    most[r] = now;
  }
  const int64_t last = std::min(CHUNK, seen + Q - 1);  // no query sees more
  for (int first = 0; first < vectors; first += some) {
    __m512 sums[Q][some];
    for (int r = 0; r < Q; r++)
      for (int v = 0; v < some; v++)
        sums[r][v] = _mm512_mul_ps(_mm512_load_ps(&sum[r][16 * (first + v)]), factors[r]);
    for (int64_t key = 0; key < last; key += per)
      for (int r = 0; r < Q; r++) {
        const __m512i own = lane_of(&weights[r][key]);
        for (int v = 0; v < some; v++)
          sums[r][v] = multiply(
              sums[r][v], q, own, _mm512_load_si512(&chunk.values[key / per][16 * (first + v)]));
      }
    for (int r = 0; r < Q; r++)
      for (int v = 0; v < some; v++) _mm512_store_ps(&sum[r][16 * (first + v)], sums[r][v]);
  }
}

template <typename T, int vectors>
void attend_causally(const T* q, const T* k, const T* v, T* y, const Causal& at) {
  constexpr int64_t size = 16 * vectors, Q = QUERIES_AT_ONCE;
  const int64_t chunks = (at.time + CHUNK - 1) / CHUNK, group = at.heads / at.kv_heads;
  const std::unique_ptr<Chunk<T, vectors>[]> packed(
      new Chunk<T, vectors>[at.rows * at.kv_heads * chunks]);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < at.rows * at.kv_heads * chunks; task++) {
      const int64_t start = task % chunks * CHUNK, one = task / chunks;
      const int64_t from = one / at.kv_heads * at.kv_row + start * at.kv_time +
                           one % at.kv_heads * size;
      packed[task].fill(k + from, v + from, std::min(CHUNK, at.time - start), at.kv_time);
    }
    // A chunk's length of queries a task, the longest first: they see the most.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < at.rows * at.heads * chunks; task++) {
      const int64_t block = chunks - 1 - task / (at.rows * at.heads), of = task % (at.rows * at.heads);
      const int64_t row = of / at.heads, head = of % at.heads;
      const Chunk<T, vectors>* seen = &packed[(row * at.kv_heads + head / group) * chunks];
      alignas(64) float sum[CHUNK][size] = {};
      float most[CHUNK], weight[CHUNK] = {};
      std::fill(most, most + CHUNK, -INFINITY);
      const int64_t start = block * CHUNK, count = std::min(CHUNK, at.time - start);
      const T* from = q + row * at.q_row + start * at.q_time + head * size;
      for (int64_t chunk = 0; chunk <= block; chunk++)
        for (int64_t i = 0; i < count; i += Q)
          attend_chunk_causally<T, vectors>(
              from + i * at.q_time, at.q_time, std::min(Q, count - i), at.scale,
              chunk < block ? CHUNK : i + 1, seen[chunk], sum + i, most + i, weight + i);
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < size; j += 16)
          store(y + ((row * at.time + start + i) * at.heads + head) * size + j, ALL,
                _mm512_div_ps(_mm512_load_ps(&sum[i][j]), _mm512_set1_ps(weight[i])));
    }
  }
}

template <typename T>
void attend_causally_of(const void* q, const void* k, const void* v, void* y, int64_t size,
                        const Causal& at) {
  auto* run = size == 32 ? attend_causally<T, 2> : size == 64 ? attend_causally<T, 4>
              : size == 96 ? attend_causally<T, 6> : attend_causally<T, 8>;
  run((const T*)q, (const T*)k, (const T*)v, (T*)y, at);
}

template <typename T>
void attend_of(const void* q, const void* keys, const void* values, const void* mask, void* y,
               int64_t size, const Attention& at) {
  auto* run = size == 32 ? attend<T, 2> : size == 64 ? attend<T, 4> : size == 96 ? attend<T, 6>
              : attend<T, 8>;
  run((const T*)q, (const T*)keys, (const T*)values, (const T*)mask, (T*)y, at);
}

}  // namespace
