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
        store(to + 16 * v, _mm512_div_ps(sum[v], weight));
    }
  }
}

// Queries and keys are the same tokens, and each sees itself and those before it.
struct Causal {
  int64_t rows, time, heads, kv_heads, q_row, q_time, kv_row, kv_time;  // strides; heads have none
  float scale;

  int64_t chunks() const { return (time + CHUNK - 1) / CHUNK; }
  int64_t group() const { return heads / kv_heads; }
  int64_t count(int64_t chunk) const { return std::min(CHUNK, time - chunk * CHUNK); }
};

inline __m512i load_line(const float* x, int64_t) { return _mm512_loadu_si512(x); }

inline __m512i load_line(const uint16_t* x, int64_t count) { return load_pairs(x, count); }

// Lanes of what is summed together: a token's number; in bfloat16 that and the next token's.
inline __m512i beside(const float* x, const float*) { return _mm512_loadu_si512(x); }

inline __m512i beside(const uint16_t* x, const uint16_t* next) { return join(x, next, ALL); }

// A chunk of tokens, laid out so that sums stand side by side. For products with each token: lanes
// of 32 bits, as many numbers as fit into one, (numbers of a head, tokens). For sums over tokens:
// (tokens, numbers of a head), with as many tokens in a lane. What is missing is 0.
template <typename T, int vectors>
struct Chunk {
  static constexpr int64_t size = 16 * vectors, per = 4 / sizeof(T);
  alignas(64) uint32_t across[size / per][CHUNK];
  alignas(64) T along[CHUNK / per][size][per];

  void fill_across(const T* x, int64_t count, int64_t stride) {
    for (int64_t token = 0; token < CHUNK; token += 16)
      for (int64_t i = 0; i < size; i += 16 * per) {
        __m512i v[16];
        for (int64_t t = 0; t < 16; t++)
          v[t] = token + t < count ? load_line(x + (token + t) * stride + i, size - i)
                                   : _mm512_setzero_si512();
        transpose(v);
        for (int64_t n = 0; n < std::min<int64_t>(16, (size - i) / per); n++)
          _mm512_store_si512(&across[i / per + n][token], v[n]);
      }
  }

  void fill_along(const T* x, int64_t count, int64_t stride) {
    for (int64_t token = 0; token < CHUNK; token += per)
      for (int64_t i = 0; i < size; i += 16) {
        const T* from = x + token * stride + i;
        __m512i lanes = _mm512_setzero_si512();
        if (token < count) lanes = beside(from, token + 1 < count ? from + stride : nullptr);
        _mm512_store_si512(&along[token / per][i], lanes);
      }
  }
};

constexpr int64_t AT_ONCE = 4;  // rows whose sums are made together

template <typename T>
inline __m512i lane_of(const T* x) {
  int32_t some;
  std::memcpy(&some, x, 4);
  return _mm512_set1_epi32(some);
}

using Scores = __m512[AT_ONCE][CHUNK / 16];

// Products of four rows, `apart`, with each token of a chunk. Rows from `count` on are the last one.
template <typename T, int vectors>
inline void multiply_across(const T* x, int64_t apart, int64_t count,
                            const Chunk<T, vectors>& chunk, Scores& y) {
  for (auto& row : y)
    for (auto& one : row) one = _mm512_setzero_ps();
  for (int64_t i = 0; i < chunk.size; i += chunk.per)
    for (int64_t r = 0; r < AT_ONCE; r++) {
      const __m512i own = lane_of(x + std::min(r, count - 1) * apart + i);
      for (int k = 0; k < CHUNK / 16; k++)
        y[r][k] =
            multiply(y[r][k], x, own, _mm512_load_si512(&chunk.across[i / chunk.per][16 * k]));
    }
}

// sum = sum · factor + the chunk's first tokens, weighed; for four rows.
template <typename T, int vectors>
inline void add_along(const T (*weights)[CHUNK], const Chunk<T, vectors>& chunk, int64_t tokens,
                      const __m512* factors, float (*sum)[16 * vectors]) {
  constexpr int some = vectors % 4 ? 2 : 4;
  for (int first = 0; first < vectors; first += some) {
    __m512 sums[AT_ONCE][some];
    for (int64_t r = 0; r < AT_ONCE; r++)
      for (int v = 0; v < some; v++)
        sums[r][v] = _mm512_mul_ps(_mm512_load_ps(&sum[r][16 * (first + v)]), factors[r]);
    for (int64_t token = 0; token < tokens; token += chunk.per)
      for (int64_t r = 0; r < AT_ONCE; r++) {
        const __m512i own = lane_of(&weights[r][token]);
        for (int v = 0; v < some; v++)
          sums[r][v] = multiply(sums[r][v], weights[r], own,
                                _mm512_load_si512(&chunk.along[token / chunk.per][16 * (first + v)]));
      }
    for (int64_t r = 0; r < AT_ONCE; r++)
      for (int v = 0; v < some; v++) _mm512_store_ps(&sum[r][16 * (first + v)], sums[r][v]);
  }
}

// Four queries, a token apart, with a chunk; the first sees `seen` of its keys. sum, most and
// weight go on from the chunks before.
template <typename T, int vectors>
void attend_chunk_causally(const T* q, int64_t apart, int64_t queries, float scale, int64_t seen,
                           const Chunk<T, vectors>& chunk, float (*sum)[16 * vectors], float* most,
                           float* weight) {
  Scores scores;
  multiply_across(q, apart, queries, chunk, scores);
  alignas(64) T weights[AT_ONCE][CHUNK];
  __m512 factors[AT_ONCE];
  for (int64_t r = 0; r < AT_ONCE; r++) {
    __m512 highest = _mm512_set1_ps(most[r]), added = _mm512_setzero_ps();
    for (int k = 0; k < CHUNK / 16; k++) {
      const __m512 scaled = _mm512_mul_ps(scores[r][k], _mm512_set1_ps(scale));
      scores[r][k] =
          _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), lanes_of(seen + r - 16 * k), scaled);
      highest = _mm512_max_ps(scores[r][k], highest);
    }
    const float now = _mm512_reduce_max_ps(highest);
    factors[r] = exp(_mm512_sub_ps(_mm512_set1_ps(most[r]), unit_of(now)));
    for (int k = 0; k < CHUNK / 16; k++) {
      const __m512 one = exp(_mm512_sub_ps(scores[r][k], unit_of(now)));
      store(&weights[r][16 * k], one);
      added = _mm512_add_ps(added, one);
    }
    weight[r] = weight[r] * _mm512_cvtss_f32(factors[r]) + _mm512_reduce_add_ps(added);
    most[r] = now;
  }
  add_along(weights, chunk, std::min(CHUNK, seen + AT_ONCE - 1), factors, sum);
}

// logsums, if asked for: (rows, heads, time), log Σ exp of a query's scores.
template <typename T, int vectors>
void attend_causally(const T* q, const T* k, const T* v, T* y, float* logsums, const Causal& at) {
  constexpr int64_t size = 16 * vectors;
  const int64_t chunks = at.chunks();
  const std::unique_ptr<Chunk<T, vectors>[]> packed(
      new Chunk<T, vectors>[at.rows * at.kv_heads * chunks]);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < at.rows * at.kv_heads * chunks; task++) {
      const int64_t chunk = task % chunks, one = task / chunks;
      const int64_t from = one / at.kv_heads * at.kv_row + chunk * CHUNK * at.kv_time +
                           one % at.kv_heads * size;
      packed[task].fill_across(k + from, at.count(chunk), at.kv_time);
      packed[task].fill_along(v + from, at.count(chunk), at.kv_time);
    }
    // A chunk of queries a task, the last first: they see the most.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < at.rows * at.heads * chunks; task++) {
      const int64_t block = chunks - 1 - task / (at.rows * at.heads);
      const int64_t of = task % (at.rows * at.heads), row = of / at.heads, head = of % at.heads;
      const Chunk<T, vectors>* seen =
          &packed[(row * at.kv_heads + head / at.group()) * chunks];
      alignas(64) float sum[CHUNK][size] = {};
      float most[CHUNK], weight[CHUNK] = {};
      std::fill(most, most + CHUNK, -INFINITY);
      const int64_t start = block * CHUNK, count = at.count(block);
      const T* from = q + row * at.q_row + start * at.q_time + head * size;
      for (int64_t chunk = 0; chunk <= block; chunk++)
        for (int64_t i = 0; i < count; i += AT_ONCE)
          attend_chunk_causally<T, vectors>(
              from + i * at.q_time, at.q_time, std::min(AT_ONCE, count - i), at.scale,
              chunk < block ? CHUNK : i + 1, seen[chunk], sum + i, most + i, weight + i);
      for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < size; j += 16)
          store(y + ((row * at.time + start + i) * at.heads + head) * size + j,
                _mm512_div_ps(_mm512_load_ps(&sum[i][j]), _mm512_set1_ps(weight[i])));
        if (logsums) logsums[of * at.time + start + i] = most[i] + std::log(weight[i]);
      }
    }
  }
}

template <typename T>
void transpose(const float (*x)[CHUNK], T (*y)[CHUNK]) {
  for (int64_t i = 0; i < CHUNK; i += 16)
    for (int64_t j = 0; j < CHUNK; j += 16) {
      __m512i v[16];
      for (int r = 0; r < 16; r++) v[r] = _mm512_load_si512(&x[i + r][j]);
      transpose(v);
      for (int r = 0; r < 16; r++) store(&y[j + r][i], _mm512_castsi512_ps(v[r]));
    }
}

// The gradients of one head for its queries, and what they add to those of its keys and values
// (Dao et al. 2022): with P = exp(scores - logsum) and D = dy · y,
//
//     dv = Pᵀ dy,  dS = P (dy vᵀ - D) scale,  dq = dS k,  dk = dSᵀ q
template <typename T, int vectors>
struct Backward {
  static constexpr int64_t size = 16 * vectors;
  using Sum = float[size];

  // Of each chunk: keys (both ways), values across; queries and gradients along.
  std::vector<Chunk<T, vectors>> keys, values, queries, gradients;
  std::unique_ptr<float[]> memory;
  Sum *dq, *dk, *dv;
  std::vector<float> d;

  explicit Backward(int64_t chunks)
      : keys(chunks),
        values(chunks),
        queries(chunks),
        gradients(chunks),
        memory(new float[3 * chunks * CHUNK * size + 16]),
        d(chunks * CHUNK) {
    auto* start = (Sum*)(((uintptr_t)memory.get() + 63) & ~(uintptr_t)63);
    dq = start;
    dk = start + chunks * CHUNK;
    dv = start + 2 * chunks * CHUNK;
  }

  void tile(const T* q, int64_t q_time, const T* dy, int64_t dy_time, const float* logsums,
            int64_t block, int64_t chunk, const Causal& at) {
    alignas(64) float p[CHUNK][CHUNK], ds[CHUNK][CHUNK];
    alignas(64) T turned[CHUNK][CHUNK];
    const int64_t count = at.count(block), start = block * CHUNK;
    const __m512 one = _mm512_set1_ps(1), ones[AT_ONCE] = {one, one, one, one};
    const int64_t used = (count + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    for (auto* some : {p, ds}) std::fill(some[used], some[CHUNK], 0.0f);
    for (int64_t i = 0; i < count; i += AT_ONCE) {
      Scores scores, outer;
      const int64_t some = std::min(AT_ONCE, count - i);
      multiply_across(q + (start + i) * q_time, q_time, some, keys[chunk], scores);
      multiply_across(dy + (start + i) * dy_time, dy_time, some, values[chunk], outer);
      alignas(64) T weights[AT_ONCE][CHUNK];
      for (int64_t r = 0; r < AT_ONCE; r++) {
        const int64_t seen = r >= some ? 0 : chunk < block ? CHUNK : i + r + 1;
        const int64_t query = start + std::min(i + r, count - 1);
        for (int k = 0; k < CHUNK / 16; k++) {
          const __m512 scale = _mm512_set1_ps(at.scale);
          const __m512 weight = _mm512_maskz_mov_ps(
              lanes_of(seen - 16 * k),
              exp(_mm512_fmsub_ps(scores[r][k], scale, _mm512_set1_ps(logsums[query]))));
          const __m512 change = _mm512_mul_ps(
              _mm512_mul_ps(weight, scale), _mm512_sub_ps(outer[r][k], _mm512_set1_ps(d[query])));
          _mm512_store_ps(&p[i + r][16 * k], weight);
          _mm512_store_ps(&ds[i + r][16 * k], change);
          store(&weights[r][16 * k], change);
        }
      }
      add_along(weights, keys[chunk], CHUNK, ones, dq + start + i);
    }
    const int64_t first = chunk * CHUNK;
    transpose(p, turned);
    for (int64_t i = 0; i < CHUNK; i += AT_ONCE)
      add_along(turned + i, gradients[block], CHUNK, ones, dv + first + i);
    transpose(ds, turned);
    for (int64_t i = 0; i < CHUNK; i += AT_ONCE)
      add_along(turned + i, queries[block], CHUNK, ones, dk + first + i);
  }
};

// y, dy, dq: (rows, time, heads, size), dk, dv: (rows, time, kv_heads, size), without gaps.
template <typename T, int vectors>
void attend_causally_backward(const T* q, const T* k, const T* v, const T* y, const T* dy,
                              const float* logsums, T* dq, T* dk, T* dv, const Causal& at) {
  constexpr int64_t size = 16 * vectors;
  const int64_t chunks = at.chunks();
#pragma omp parallel
  {
    Backward<T, vectors> own(chunks);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < at.rows * at.kv_heads; task++) {
      const int64_t row = task / at.kv_heads, kv_head = task % at.kv_heads;
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t from = row * at.kv_row + chunk * CHUNK * at.kv_time + kv_head * size;
        own.keys[chunk].fill_across(k + from, at.count(chunk), at.kv_time);
        own.keys[chunk].fill_along(k + from, at.count(chunk), at.kv_time);
        own.values[chunk].fill_across(v + from, at.count(chunk), at.kv_time);
      }
      std::fill(own.dk[0], own.dk[chunks * CHUNK], 0.0f);
      std::fill(own.dv[0], own.dv[chunks * CHUNK], 0.0f);
      const auto write = [&](const float(*from)[size], T* to, int64_t apart) {
        for (int64_t i = 0; i < at.time; i++)
          for (int64_t j = 0; j < size; j += 16)
            store(to + i * apart + j, _mm512_load_ps(&from[i][j]));
      };
      for (int64_t head = kv_head * at.group(); head < (kv_head + 1) * at.group(); head++) {
        const int64_t apart = at.heads * size, first = row * at.time * apart + head * size;
        const T *own_q = q + row * at.q_row + head * size, *own_dy = dy + first;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const int64_t start = chunk * CHUNK, count = at.count(chunk);
          own.queries[chunk].fill_along(own_q + start * at.q_time, count, at.q_time);
          own.gradients[chunk].fill_along(own_dy + start * apart, count, apart);
        }
        for (int64_t i = 0; i < at.time; i++) {
          __m512 sum = _mm512_setzero_ps();
          for (int64_t j = 0; j < size; j += 16)
            sum = _mm512_fmadd_ps(load(own_dy + i * apart + j), load(y + first + i * apart + j),
                                  sum);
          own.d[i] = _mm512_reduce_add_ps(sum);
        }
        std::fill(own.dq[0], own.dq[chunks * CHUNK], 0.0f);
        for (int64_t block = 0; block < chunks; block++)
          for (int64_t chunk = 0; chunk <= block; chunk++)
            own.tile(own_q, at.q_time, own_dy, apart, logsums + (row * at.heads + head) * at.time,
                     block, chunk, at);
        write(own.dq, dq + first, apart);
      }
      const int64_t apart = at.kv_heads * size, to = row * at.time * apart + kv_head * size;
      write(own.dk, dk + to, apart);
      write(own.dv, dv + to, apart);
    }
  }
}

template <typename T>
void attend_causally_of(const void* q, const void* k, const void* v, void* y, float* logsums,
                        int64_t size, const Causal& at) {
  auto* run = size == 32 ? attend_causally<T, 2> : size == 64 ? attend_causally<T, 4>
              : size == 96 ? attend_causally<T, 6> : attend_causally<T, 8>;
  run((const T*)q, (const T*)k, (const T*)v, (T*)y, logsums, at);
}

template <typename T>
void attend_causally_backward_of(const void* q, const void* k, const void* v, const void* y,
                                 const void* dy, const float* logsums, void* dq, void* dk,
                                 void* dv, int64_t size, const Causal& at) {
  auto* run = size == 32 ? attend_causally_backward<T, 2>
              : size == 64 ? attend_causally_backward<T, 4>
              : size == 96 ? attend_causally_backward<T, 6> : attend_causally_backward<T, 8>;
  run((const T*)q, (const T*)k, (const T*)v, (const T*)y, (const T*)dy, logsums, (T*)dq, (T*)dk,
      (T*)dv, at);
}

template <typename T>
void attend_of(const void* q, const void* keys, const void* values, const void* mask, void* y,
               int64_t size, const Attention& at) {
  auto* run = size == 32 ? attend<T, 2> : size == 64 ? attend<T, 4> : size == 96 ? attend<T, 6>
              : attend<T, 8>;
  run((const T*)q, (const T*)keys, (const T*)values, (const T*)mask, (T*)y, at);
}

}  // namespace
