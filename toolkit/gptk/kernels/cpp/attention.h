// Attention: of a few queries over a KV cache, and causal attention among the tokens of a prompt,
// with its gradients. Scores and sums are float32. In bfloat16, causal attention rounds its weights
// to bfloat16, too; attention over a cache does not.
//
// `vectors` is the head size in registers of 16 numbers: a head has 16 · vectors numbers.
#pragma once

#include <vector>

#include "common.h"

namespace {

constexpr int64_t CHUNK = 64;           // keys that are worked through together
constexpr int64_t MAX_HEAD_SIZE = 256;  // numbers
// Of a key head over a cache: FEW_QUERIES in kernels/build.py, which defines it.
constexpr int64_t MAX_QUERIES = GPTK_MAX_QUERIES;

// Of a row of so many vectors, how many have their sums in registers at a time, for four rows.
template <int vectors>
constexpr int TOGETHER = SUMS < 16     ? 1
                         : vectors % 4 ? 2
                                       : 4;

// What scores of heads of that size are multiplied by.
inline float scale_of(int64_t size) { return (float)(1 / std::sqrt((double)size)); }

// --- Over a cache ---

// What a query gets from a chunk of keys: the highest score and, of the weights exp(score -
// highest), the sum and the weighted sum of values. Partial results of several chunks can be
// merged, as in FlashAttention (Dao et al. 2022).
struct Partial {
  float highest, weight;
  float sum[MAX_HEAD_SIZE];
};

// The sizes and strides of attention over a cache. Each of `trees` trees of slots is read by `rows`
// query tokens; each key head serves `group` query heads. An element of the batch is a key head of
// a tree, with group · rows queries (group, rows).
struct CacheShape {
  int64_t trees, rows, group, kv_heads, length, row_stride, key_stride, tree_stride, mask_stride;
  float scale;

  int64_t batch() const { return trees * kv_heads; }
  int64_t queries() const { return group * rows; }

  // The row, counted through all trees, and the query head of a query of an element of the batch.
  int64_t row(int64_t element, int64_t query) const {
    return element / kv_heads * rows + query % rows;
  }
  int64_t head(int64_t element, int64_t query) const {
    return element % kv_heads * group + query / rows;
  }
};

// scores (count, rounded up to a multiple of 16) = q · key · scale + mask for the keys whose
// indexes are in `visible` (count); -inf beyond count. Returns the highest. q: (size); keys:
// (chunk, size); mask: (chunk), or null.
template <typename T, int vectors>
float compute_scores(const T* q, const T* keys, const T* mask, const int32_t* visible,
                     int64_t count, float scale, float* scores) {
  constexpr int64_t size = 16 * vectors, step = 64 / sizeof(T);
  Ints query[size / step];
  for (int v = 0; v < size / step; v++) query[v] = load_bits(q + v * step);
  Floats highest = broadcast(-INFINITY);
  for (int64_t first = 0; first < count; first += 16) {
    Floats dots[16];
    alignas(64) float added[16];
    for (int i = 0; i < 16; i++) {
      const int32_t key = visible[std::min(first + i, count - 1)];
      Floats dot{};
      for (int v = 0; v < size / step; v++)
        dot = multiply_add(dot, q, query[v], load_bits(keys + key * size + v * step));
      dots[i] = dot;
      added[i] = first + i < count ? (mask ? to_float(mask[key]) : 0) : -INFINITY;
    }
    const Floats result = fma(horizontal_sums(dots), broadcast(scale), load(added));
    store(scores + first, result);
    highest = max(highest, result);
  }
  return reduce_max(highest);
}

// For each of H queries, every `query_step`-th one, the sum of the visible values (chunk, size)
// with the query's weights, into its `Partial`.
template <typename T, int vectors, int H>
void sum_values(const T* values, const float (*weights)[CHUNK], int64_t query_step,
                const int32_t* visible, int64_t count, Partial* out) {
  constexpr int together = SUMS < 16 ? 1 : vectors;
  for (int first = 0; first < vectors; first += together) {
    Floats sum[H][together];
    for (auto& query : sum)
      for (auto& lanes : query) lanes = Floats{};
    for (int64_t key = 0; key < count; key++)
      for (int v = 0; v < together; v++) {
        const Floats value = load(values + (visible[key] * vectors + first + v) * 16);
        for (int h = 0; h < H; h++)
          sum[h][v] = fma(broadcast(weights[h * query_step][key]), value, sum[h][v]);
      }
    for (int h = 0; h < H; h++)
      for (int v = 0; v < together; v++)
        store(out[h * query_step].sum + 16 * (first + v), sum[h][v]);
  }
}

// The queries of one key head that are worked through together: for `rows` tokens the `group` heads
// that it serves, (group, rows). q: the first one; a token every row_stride numbers.
template <typename T>
struct Queries {
  const T* q;
  int64_t rows, group, row_stride;
  float scale;

  int64_t count() const { return rows * group; }
};

// All queries with a chunk of keys and values, (chunk, size). see(row, visible): puts the indexes
// of the keys that a row sees into `visible` and returns how many; mask: what is added to the
// scores of a row, `mask_stride` numbers after those of the row before, or null; out: (queries).
template <typename T, int vectors, typename See>
void attend_chunk(const Queries<T>& queries, const T* keys, const T* values, const See& see,
                  const T* mask, int64_t mask_stride, Partial* out) {
  constexpr int64_t size = 16 * vectors;
  alignas(64) float weights[MAX_QUERIES][CHUNK];
  // All heads of a row see the same keys; a row of a tree often sees few of them.
  for (int64_t row = 0; row < queries.rows; row++) {
    int32_t visible[CHUNK];
    const int64_t seen = see(row, visible);
    for (int64_t head = 0; head < queries.group; head++) {
      const int64_t query = head * queries.rows + row;
      const T* vector = queries.q + row * queries.row_stride + head * size;
      float* scores = weights[query];
      out[query].highest =
          compute_scores<T, vectors>(vector, keys, mask ? mask + row * mask_stride : nullptr,
                                     visible, seen, queries.scale, scores);
      const Floats shift = softmax_shift(out[query].highest);
      Floats total{};
      for (int64_t key = 0; key < seen; key += 16) {
        const Floats weight = exp(load(scores + key) - shift);
        store(scores + key, weight);
        total = total + weight;
      }
      out[query].weight = reduce_add(total);
    }
    constexpr int together = vectors > 4 ? 2 : 4;  // heads, as many as registers hold sums of
    for (int64_t head = 0; head < queries.group;) {
      const int64_t query = head * queries.rows + row, left = queries.group - head;
      const auto* of_head = weights + query;
      if (left >= together) {
        sum_values<T, vectors, together>(values, of_head, queries.rows, visible, seen, out + query);
        head += together;
      } else if (left == 3) {
        sum_values<T, vectors, 3>(values, of_head, queries.rows, visible, seen, out + query);
        head += 3;
      } else if (left == 2) {
        sum_values<T, vectors, 2>(values, of_head, queries.rows, visible, seen, out + query);
        head += 2;
      } else {
        sum_values<T, vectors, 1>(values, of_head, queries.rows, visible, seen, out + query);
        head += 1;
      }
    }
  }
}

// y (size) = the weighted mean of the values of all chunks for one query: `of_query` is its partial
// result of the first chunk, those of the others follow every `step`.
template <typename T, int vectors>
void merge_chunks(const Partial* of_query, int64_t chunks, int64_t step, T* y) {
  float highest = -INFINITY;
  for (int64_t chunk = 0; chunk < chunks; chunk++)
    highest = std::max(highest, of_query[chunk * step].highest);
  Floats sum[vectors], weight{};
  for (int v = 0; v < vectors; v++) sum[v] = Floats{};
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const Partial& part = of_query[chunk * step];
    const Floats factor = exp(broadcast(part.highest - highest));
    weight = fma(factor, broadcast(part.weight), weight);
    for (int v = 0; v < vectors; v++) sum[v] = fma(factor, load(part.sum + 16 * v), sum[v]);
  }
  for (int v = 0; v < vectors; v++) store(y + 16 * v, sum[v] / weight);
}

// y = softmax(q kᵀ · scale + mask) v; for the layouts see `gptk_attend`. Chunks are the same
// however many threads there are, and so is the result.
template <typename T, int vectors>
void attend(const T* q, const T* keys, const T* values, const T* mask, T* y,
            const CacheShape& shape) {
  constexpr int64_t size = 16 * vectors;
  const int64_t chunks = (shape.length + CHUNK - 1) / CHUNK, queries = shape.queries();
  if (queries == 0) return;
  const Memory<Partial> partial(shape.batch() * chunks * queries);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shape.batch() * chunks; task++) {
      const int64_t element = task / chunks, start = task % chunks * CHUNK;
      const int64_t from = element * shape.key_stride + start * size;
      const int64_t count = std::min(CHUNK, shape.length - start);
      const T* chunk_mask =
          mask ? mask + element / shape.kv_heads * shape.tree_stride + start : nullptr;
      const auto see = [&](int64_t row, int32_t* visible) {
        const T* of_row = chunk_mask ? chunk_mask + row * shape.mask_stride : nullptr;
        int64_t seen = 0;
        for (int64_t key = 0; key < count; key++)
          if (!of_row || to_float(of_row[key]) > -INFINITY) visible[seen++] = key;
        return seen;
      };
      const Queries<T> of_element{
          q + shape.row(element, 0) * shape.row_stride + shape.head(element, 0) * size, shape.rows,
          shape.group, shape.row_stride, shape.scale};
      attend_chunk<T, vectors>(of_element, keys + from, values + from, see, chunk_mask,
                               shape.mask_stride, &partial[task * queries]);
    }
    // Merge the chunks of each query.
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shape.batch() * queries; task++) {
      const int64_t element = task / queries, query = task % queries;
      T* to = y + (shape.row(element, query) * shape.kv_heads * shape.group +
                   shape.head(element, query)) *
                      size;
      merge_chunks<T, vectors>(&partial[element * chunks * queries + query], chunks, queries, to);
    }
  }
}

// --- Causal: queries and keys are the same tokens; each sees itself and those before it ---

// The sizes and strides of causal attention. Strides are those of rows and of tokens; heads follow
// each other without gaps.
struct CausalShape {
  int64_t rows, time, heads, kv_heads, q_row, q_time, kv_row, kv_time;
  float scale;

  int64_t chunks() const { return (time + CHUNK - 1) / CHUNK; }
  int64_t group() const { return heads / kv_heads; }
  int64_t count(int64_t chunk) const { return std::min(CHUNK, time - chunk * CHUNK); }
};

// A register of numbers in order: 16 in float32; the first `count` of 32, then zeros, in bfloat16.
inline Ints load_lanes(const float* x, int64_t) { return load_bits(x); }

inline Ints load_lanes(const uint16_t* x, int64_t count) { return load_pairs(x, count); }

// 16 numbers of a token, a lane each; in bfloat16 interleaved with those of the next token, or with
// zeros if there is none.
inline Ints load_interleaved(const float* x, const float*) { return load_bits(x); }

inline Ints load_interleaved(const uint16_t* x, const uint16_t* next_token) {
  return interleave(x, next_token, 16);
}

// The vectors of one head for a chunk of tokens (tokens, size), laid out for products in which the
// 16 lanes of a register are 16 tokens, or 16 of the head's numbers. A lane has 32 bits: one
// float32 number, or two bfloat16 numbers that are summed over, one after the other. Missing tokens
// are 0.
template <typename T, int vectors>
struct Chunk {
  static constexpr int64_t size = 16 * vectors;
  static constexpr int64_t per_lane = 4 / sizeof(T);  // numbers
  // (size, tokens), for sums over a head's numbers; in bfloat16 a lane has two numbers of a token.
  alignas(64) uint32_t token_lanes[size / per_lane][CHUNK];
  // (tokens, size), for sums over tokens; in bfloat16 a lane has the same number of two tokens.
  alignas(64) T size_lanes[CHUNK / per_lane][size][per_lane];

  // x: `count` tokens, `stride` numbers apart.
  void fill_token_lanes(const T* x, int64_t count, int64_t stride) {
    for (int64_t token = 0; token < CHUNK; token += 16)
      for (int64_t i = 0; i < size; i += 16 * per_lane) {
        Ints v[16];
        for (int64_t t = 0; t < 16; t++)
          v[t] = token + t < count ? load_lanes(x + (token + t) * stride + i, size - i) : Ints{};
        transpose<16>(v);
        for (int64_t n = 0; n < std::min<int64_t>(16, (size - i) / per_lane); n++)
          store_bits(&token_lanes[i / per_lane + n][token], v[n]);
      }
  }

  void fill_size_lanes(const T* x, int64_t count, int64_t stride) {
    for (int64_t token = 0; token < CHUNK; token += per_lane)
      for (int64_t i = 0; i < size; i += 16) {
        const T* from = x + token * stride + i;
        Ints lanes{};
        if (token < count)
          lanes = load_interleaved(from, token + 1 < count ? from + stride : nullptr);
        store_bits(&size_lanes[token / per_lane][i], lanes);
      }
  }
};

constexpr int64_t ROWS_AT_ONCE = 4;  // of a product, such as queries

// One lane's numbers, one float32 or two bfloat16, in every lane.
template <typename T>
inline Ints broadcast_lane(const T* x) {
  return broadcast_four(x);
}

using Scores = Floats[ROWS_AT_ONCE][CHUNK / 16];  // (rows, tokens of a chunk)

// y (rows, tokens) = x (rows, size) times the chunk's tokens, for four rows, `stride` numbers
// apart, of which there are `count`: missing ones repeat the last.
template <typename T, int vectors>
inline void multiply_with_tokens(const T* x, int64_t stride, int64_t count,
                                 const Chunk<T, vectors>& chunk, Scores& y) {
  constexpr int together = TOGETHER<CHUNK / 16>;
  for (int first = 0; first < CHUNK / 16; first += together) {
    Floats sums[ROWS_AT_ONCE][together];
    for (auto& row : sums)
      for (auto& lanes : row) lanes = Floats{};
    for (int64_t i = 0; i < chunk.size; i += chunk.per_lane)
      for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
        const Ints lane = broadcast_lane(x + std::min(r, count - 1) * stride + i);
        for (int k = 0; k < together; k++)
          sums[r][k] =
              multiply_add(sums[r][k], x, lane,
                           load_bits(&chunk.token_lanes[i / chunk.per_lane][16 * (first + k)]));
      }
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++)
      for (int k = 0; k < together; k++) y[r][first + k] = sums[r][k];
  }
}

// sum (rows, size) = sum · factor of the row + weights (rows, tokens) times the chunk's first
// `tokens` tokens, for four rows.
template <typename T, int vectors>
inline void add_weighted_tokens(const T (*weights)[CHUNK], const Chunk<T, vectors>& chunk,
                                int64_t tokens, const Floats* factors, float (*sum)[16 * vectors]) {
  constexpr int together = TOGETHER<vectors>;
  for (int first = 0; first < vectors; first += together) {
    Floats sums[ROWS_AT_ONCE][together];
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++)
      for (int v = 0; v < together; v++) sums[r][v] = load(&sum[r][16 * (first + v)]) * factors[r];
    for (int64_t token = 0; token < tokens; token += chunk.per_lane)
      for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
        const Ints lane = broadcast_lane(&weights[r][token]);
        for (int v = 0; v < together; v++)
          sums[r][v] =
              multiply_add(sums[r][v], weights[r], lane,
                           load_bits(&chunk.size_lanes[token / chunk.per_lane][16 * (first + v)]));
      }
    for (int64_t r = 0; r < ROWS_AT_ONCE; r++)
      for (int v = 0; v < together; v++) store(&sum[r][16 * (first + v)], sums[r][v]);
  }
}

// Four consecutive queries, `stride` numbers apart, of which there are `queries`, with a chunk of
// keys and values. The first query sees `visible` keys, each further one a key more. sum (4, size),
// highest (4) and weight (4), see `Partial`, continue those of the chunks before.
template <typename T, int vectors>
void attend_chunk_causally(const T* q, int64_t stride, int64_t queries, float scale,
                           int64_t visible, const Chunk<T, vectors>& chunk,
                           float (*sum)[16 * vectors], float* highest, float* weight) {
  Scores scores;
  multiply_with_tokens(q, stride, queries, chunk, scores);
  alignas(64) T weights[ROWS_AT_ONCE][CHUNK];
  Floats factors[ROWS_AT_ONCE];
  for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
    Floats lane_highest = broadcast(highest[r]), total{};
    for (int k = 0; k < CHUNK / 16; k++) {
      const Floats scaled = scores[r][k] * broadcast(scale);
      scores[r][k] = select(first_lanes(visible + r - 16 * k), scaled, broadcast(-INFINITY));
      lane_highest = max(scores[r][k], lane_highest);
    }
    const float new_highest = reduce_max(lane_highest);
    factors[r] = exp(broadcast(highest[r]) - softmax_shift(new_highest));
    for (int k = 0; k < CHUNK / 16; k++) {
      const Floats lane_weights = exp(scores[r][k] - softmax_shift(new_highest));
      store(&weights[r][16 * k], lane_weights);
      total = total + lane_weights;
    }
    weight[r] = std::fma(weight[r], first_lane(factors[r]), reduce_add(total));
    highest[r] = new_highest;
  }
  add_weighted_tokens(weights, chunk, std::min(CHUNK, visible + ROWS_AT_ONCE - 1), factors, sum);
}

// y = softmax(q kᵀ · scale) v, causally; for the layouts see `gptk_attend_causally`. logsums,
// unless it is null: (rows, heads, time), log Σ exp of each query's scores.
template <typename T, int vectors>
void attend_causally(const T* q, const T* k, const T* v, T* y, float* logsums,
                     const CausalShape& shape) {
  constexpr int64_t size = 16 * vectors;
  const int64_t chunks = shape.chunks();
  // (rows, kv_heads, chunks): keys with tokens in lanes, values with their numbers in lanes.
  const Memory<Chunk<T, vectors>> packed(shape.rows * shape.kv_heads * chunks);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < shape.rows * shape.kv_heads * chunks; task++) {
      const int64_t chunk = task % chunks, head = task / chunks;  // through all rows
      const int64_t from = head / shape.kv_heads * shape.kv_row + chunk * CHUNK * shape.kv_time +
                           head % shape.kv_heads * size;
      packed[task].fill_token_lanes(k + from, shape.count(chunk), shape.kv_time);
      packed[task].fill_size_lanes(v + from, shape.count(chunk), shape.kv_time);
    }
    // A task is a chunk of queries of one head. The last chunks of a text, which see the most keys,
    // come first.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < shape.rows * shape.heads * chunks; task++) {
      const int64_t block = chunks - 1 - task / (shape.rows * shape.heads);
      const int64_t row_head = task % (shape.rows * shape.heads);
      const int64_t row = row_head / shape.heads, head = row_head % shape.heads;
      const Chunk<T, vectors>* kv = &packed[(row * shape.kv_heads + head / shape.group()) * chunks];
      alignas(64) float sum[CHUNK][size] = {};
      float highest[CHUNK], weight[CHUNK] = {};
      std::fill(highest, highest + CHUNK, -INFINITY);
      const int64_t start = block * CHUNK, count = shape.count(block);
      // Copied, because the queries of a head are far apart: so they are fetched at the same time.
      alignas(64) T from[CHUNK][size];
      const T* first = q + row * shape.q_row + start * shape.q_time + head * size;
      for (int64_t i = 0; i < count; i++)
        std::memcpy(from[i], first + i * shape.q_time, size * sizeof(T));
      for (int64_t chunk = 0; chunk <= block; chunk++)
        for (int64_t i = 0; i < count; i += ROWS_AT_ONCE)
          attend_chunk_causally<T, vectors>(from[i], size, std::min(ROWS_AT_ONCE, count - i),
                                            shape.scale, chunk < block ? CHUNK : i + 1, kv[chunk],
                                            sum + i, highest + i, weight + i);
      for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < size; j += 16)
          store(y + ((row * shape.time + start + i) * shape.heads + head) * size + j,
                load(&sum[i][j]) / broadcast(weight[i]));
        if (logsums) logsums[row_head * shape.time + start + i] = highest[i] + std::log(weight[i]);
      }
    }
  }
}

// y (chunk, chunk) = the transpose of x, rounded to y's dtype.
template <typename T>
void transpose(const float (*x)[CHUNK], T (*y)[CHUNK]) {
  for (int64_t i = 0; i < CHUNK; i += 16)
    for (int64_t j = 0; j < CHUNK; j += 16) {
      Ints v[16];
      for (int r = 0; r < 16; r++) v[r] = load_bits(&x[i + r][j]);
      transpose<16>(v);
      for (int r = 0; r < 16; r++) store(&y[j + r][i], floats_of_bits(v[r]));
    }
}

// The gradients of one query head for its queries, and what it adds to those of its keys and values
// (Dao et al. 2022). With P = exp(scores - logsum) and D = dy · y for each query,
//
//     dv = Pᵀ dy,  dS = P (dy vᵀ - D) scale,  dq = dS k,  dk = dSᵀ q
template <typename T, int vectors>
struct Backward {
  static constexpr int64_t size = 16 * vectors;
  using Vector = float[size];

  // Of each chunk: keys in both layouts, values with tokens in lanes; queries and the gradients dy
  // with their numbers in lanes.
  const Memory<Chunk<T, vectors>> keys, values, queries, gradients;
  const Memory<Vector> dq, dk, dv;  // (chunks · CHUNK, size)
  const Memory<float> d;            // (chunks · CHUNK)

  explicit Backward(int64_t chunks)
      : keys(chunks),
        values(chunks),
        queries(chunks),
        gradients(chunks),
        dq(chunks * CHUNK),
        dk(chunks * CHUNK),
        dv(chunks * CHUNK),
        d(chunks * CHUNK) {}

  // Adds to dq, dk and dv the terms of one chunk of queries, `block`, with one chunk of keys. q,
  // dy: the head's first query and gradient, the next ones q_time and dy_time numbers on; logsums:
  // (time).
  void add_chunks(const T* q, int64_t q_time, const T* dy, int64_t dy_time, const float* logsums,
                  int64_t block, int64_t chunk, const CausalShape& shape) const {
    alignas(64) float p[CHUNK][CHUNK], ds[CHUNK][CHUNK];  // (queries, keys)
    alignas(64) T transposed[CHUNK][CHUNK];
    const int64_t count = shape.count(block), start = block * CHUNK;
    const Floats one = broadcast(1), ones[ROWS_AT_ONCE] = {one, one, one, one};
    const int64_t used = (count + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * ROWS_AT_ONCE;
    for (auto* matrix : {p, ds}) std::fill(matrix[used], matrix[CHUNK], 0.0f);
    for (int64_t i = 0; i < count; i += ROWS_AT_ONCE) {
      Scores scores, products;  // q kᵀ, dy vᵀ
      const int64_t rows = std::min(ROWS_AT_ONCE, count - i);
      multiply_with_tokens(q + (start + i) * q_time, q_time, rows, keys[chunk], scores);
      multiply_with_tokens(dy + (start + i) * dy_time, dy_time, rows, values[chunk], products);
      alignas(64) T weights[ROWS_AT_ONCE][CHUNK];
      for (int64_t r = 0; r < ROWS_AT_ONCE; r++) {
        const int64_t visible = r >= rows ? 0 : chunk < block ? CHUNK : i + r + 1;
        const int64_t query = start + std::min(i + r, count - 1);
        for (int k = 0; k < CHUNK / 16; k++) {
          const Floats scale = broadcast(shape.scale);
          const Floats weight =
              select(first_lanes(visible - 16 * k),
                     exp(fma(scores[r][k], scale, -broadcast(logsums[query]))), Floats{});
          const Floats change = weight * scale * (products[r][k] - broadcast(d[query]));
          store(&p[i + r][16 * k], weight);
          store(&ds[i + r][16 * k], change);
          store(&weights[r][16 * k], change);
        }
      }
      add_weighted_tokens(weights, keys[chunk], CHUNK, ones, dq.get() + start + i);
    }
    const int64_t first = chunk * CHUNK;
    transpose(p, transposed);
    for (int64_t i = 0; i < CHUNK; i += ROWS_AT_ONCE)
      add_weighted_tokens(transposed + i, gradients[block], CHUNK, ones, dv.get() + first + i);
    transpose(ds, transposed);
    for (int64_t i = 0; i < CHUNK; i += ROWS_AT_ONCE)
      add_weighted_tokens(transposed + i, queries[block], CHUNK, ones, dk.get() + first + i);
  }
};

// The gradients of `attend_causally` from dy, that of y, with y and logsums as it gave them. y, dy,
// dq: (rows, time, heads, size) and dk, dv: (rows, time, kv_heads, size), without gaps.
template <typename T, int vectors>
void attend_causally_backward(const T* q, const T* k, const T* v, const T* y, const T* dy,
                              const float* logsums, T* dq, T* dk, T* dv, const CausalShape& shape) {
  constexpr int64_t size = 16 * vectors;
  const int64_t chunks = shape.chunks(), tasks = shape.rows * shape.kv_heads;
  std::vector<std::unique_ptr<Backward<T, vectors>>> of_threads(omp_get_max_threads());
  for (auto& of_thread : of_threads) of_thread.reset(new Backward<T, vectors>(chunks));
#pragma omp parallel
  {
    const Backward<T, vectors>& backward = *of_threads[omp_get_thread_num()];
    // A task is a key head of a row, with all the query heads that it serves.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      const int64_t row = task / shape.kv_heads, kv_head = task % shape.kv_heads;
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t from = row * shape.kv_row + chunk * CHUNK * shape.kv_time + kv_head * size;
        backward.keys[chunk].fill_token_lanes(k + from, shape.count(chunk), shape.kv_time);
        backward.keys[chunk].fill_size_lanes(k + from, shape.count(chunk), shape.kv_time);
        backward.values[chunk].fill_token_lanes(v + from, shape.count(chunk), shape.kv_time);
      }
      for (auto* gradient : {&backward.dk, &backward.dv})
        std::fill(*gradient->get(), *(gradient->get() + chunks * CHUNK), 0.0f);
      // Rounds gradients (time, size) to T; `stride` numbers from one token to the next.
      const auto write = [&](const float (*from)[size], T* to, int64_t stride) {
        for (int64_t i = 0; i < shape.time; i++)
          for (int64_t j = 0; j < size; j += 16) store(to + i * stride + j, load(&from[i][j]));
      };
      for (int64_t head = kv_head * shape.group(); head < (kv_head + 1) * shape.group(); head++) {
        const int64_t stride = shape.heads * size, first = row * shape.time * stride + head * size;
        const T *head_q = q + row * shape.q_row + head * size, *head_dy = dy + first;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const int64_t start = chunk * CHUNK, count = shape.count(chunk);
          backward.queries[chunk].fill_size_lanes(head_q + start * shape.q_time, count,
                                                  shape.q_time);
          backward.gradients[chunk].fill_size_lanes(head_dy + start * stride, count, stride);
        }
        for (int64_t i = 0; i < shape.time; i++) {
          Floats sum{};
          for (int64_t j = 0; j < size; j += 16)
            sum = fma(load(head_dy + i * stride + j), load(y + first + i * stride + j), sum);
          backward.d[i] = reduce_add(sum);
        }
        std::fill(*backward.dq.get(), *(backward.dq.get() + chunks * CHUNK), 0.0f);
        for (int64_t block = 0; block < chunks; block++)
          for (int64_t chunk = 0; chunk <= block; chunk++)
            backward.add_chunks(head_q, shape.q_time, head_dy, stride,
                                logsums + (row * shape.heads + head) * shape.time, block, chunk,
                                shape);
        write(backward.dq.get(), dq + first, stride);
      }
      const int64_t stride = shape.kv_heads * size, to = row * shape.time * stride + kv_head * size;
      write(backward.dk.get(), dk + to, stride);
      write(backward.dv.get(), dv + to, stride);
    }
  }
}

// --- The instance for a head size: 32, 64, 96, 128 or 256 ---

template <typename T>
void attend_causally_by_size(const void* q, const void* k, const void* v, void* y, float* logsums,
                             int64_t size, const CausalShape& shape) {
  auto* run = size == 32    ? attend_causally<T, 2>
              : size == 64  ? attend_causally<T, 4>
              : size == 96  ? attend_causally<T, 6>
              : size == 128 ? attend_causally<T, 8>
                            : attend_causally<T, 16>;
  run((const T*)q, (const T*)k, (const T*)v, (T*)y, logsums, shape);
}

template <typename T>
void attend_causally_backward_by_size(const void* q, const void* k, const void* v, const void* y,
                                      const void* dy, const float* logsums, void* dq, void* dk,
                                      void* dv, int64_t size, const CausalShape& shape) {
  auto* run = size == 32    ? attend_causally_backward<T, 2>
              : size == 64  ? attend_causally_backward<T, 4>
              : size == 96  ? attend_causally_backward<T, 6>
              : size == 128 ? attend_causally_backward<T, 8>
                            : attend_causally_backward<T, 16>;
  run((const T*)q, (const T*)k, (const T*)v, (const T*)y, (const T*)dy, logsums, (T*)dq, (T*)dk,
      (T*)dv, shape);
}

template <typename T>
void attend_by_size(const void* q, const void* keys, const void* values, const void* mask, void* y,
                    int64_t size, const CacheShape& shape) {
  auto* run = size == 32    ? attend<T, 2>
              : size == 64  ? attend<T, 4>
              : size == 96  ? attend<T, 6>
              : size == 128 ? attend<T, 8>
                            : attend<T, 16>;
  run((const T*)q, (const T*)keys, (const T*)values, (const T*)mask, (T*)y, shape);
}

}  // namespace
