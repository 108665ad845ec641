// Attention of sequences of any lengths over keys and values in blocks, in one pass: sequences with
// few new tokens beside prompts.
//
// What a token gets is the same to the last bit however its sequence is divided among passes, and
// whatever is read beside it: of each chunk of 64 tokens a partial result, from the token's query
// alone, and the partial results merged in the order of the chunks.
#pragma once

#include <vector>

#include "attention.h"

namespace {

// A sequence in a pass: `count` new tokens from token `first` of the pass on, after `past` tokens
// whose keys and values are in its blocks. `table`: its blocks, of CHUNK tokens each.
struct Sequence {
  int64_t first, count, past;
  const int32_t* table;

  int64_t chunks() const { return (past + count + CHUNK - 1) / CHUNK; }
  // The first chunk that any of its new tokens sees, of so many tokens, the last ones.
  int64_t first_chunk(int64_t window) const {
    return std::max<int64_t>(0, past + 1 - window) / CHUNK;
  }
};

// Where the tokens of a pass go, see gptk_attend_blocks: sequences (count, 4), tables (entries),
// slabs (slab_count).
struct Places {
  const int64_t* sequences;
  int64_t count;
  const int32_t* tables;
  int64_t entries;
  const int64_t* slabs;
  int64_t slab_count, slab_bits;

  int64_t blocks() const { return slab_count << slab_bits; }
  bool has(int32_t block) const {
    return 0 <= block && block < blocks() && slabs[block >> slab_bits];
  }
};

// Keys and values of one layer. Memory is in slabs of 2^slab_bits blocks. A block has for each key
// head the keys and values of CHUNK tokens in lanes of 32 bits, which hold one float32 number, or
// two bfloat16 numbers: keys (size / numbers in a lane, tokens), a lane's numbers being of one
// token; values (tokens / numbers in a lane, size), a lane's numbers being of consecutive tokens.
template <typename T>
struct Blocks {
  static constexpr int64_t per_lane = 4 / sizeof(T);  // numbers
  const int64_t* slabs;                               // addresses
  int64_t slab_bits, keys_from, values_from, kv_heads, size;

  T* at(int64_t from, int32_t block, int64_t head) const {
    const int64_t in_slab = block & ((int64_t(1) << slab_bits) - 1);
    return (T*)slabs[block >> slab_bits] + from + (in_slab * kv_heads + head) * CHUNK * size;
  }
  T* keys(int32_t block, int64_t head) const { return at(keys_from, block, head); }
  T* values(int32_t block, int64_t head) const { return at(values_from, block, head); }

  // Stores the key and the value (size) of a head of one token. is_last: no other token of its text
  // is stored at the same time after it.
  void store(const T* key, const T* value, int32_t block, int64_t slot, int64_t head,
             bool is_last) const {
    uint32_t* lanes = (uint32_t*)keys(block, head) + slot;
    for (int64_t i = 0; i < size; i += per_lane)
      std::memcpy(lanes + i / per_lane * CHUNK, key + i, 4);
    T* to = values(block, head) + slot / per_lane * per_lane * size + slot % per_lane;
    for (int64_t i = 0; i < size; i++) to[i * per_lane] = value[i];
    // Until the next token comes its numbers are 0: what was there before may be NaN.
    if (per_lane == 2 && slot % 2 == 0 && is_last)
      for (int64_t i = 0; i < size; i++) to[i * per_lane + 1] = 0;
  }
};

// One query in one chunk: where its vector is (size), how many of the chunk's tokens it sees, less
// the first `hidden`, which are before its window, and where its partial result goes.
template <typename T>
struct Query {
  const T* q;
  int64_t visible, hidden;
  Partial* result;
};

// The partial results of R queries with a chunk of keys and values in lanes, see `Blocks`. next:
// the keys that will be worked through after these, or null if these are in the cache already.
// Memory is fetched ahead of its use: values while keys are multiplied, the next keys while values
// are.
template <typename T, int vectors, int R>
void attend_to_chunk(const Query<T>* queries, const T* keys, const T* values, const T* next,
                     float scale) {
  constexpr int64_t size = 16 * vectors, per_lane = 4 / sizeof(T);
  constexpr int registers = CHUNK / 16;
  Floats scores[R][registers];
  constexpr int keys_together = TOGETHER<registers>;
  for (int first = 0; first < registers; first += keys_together) {
    Floats sums[R][keys_together];
    for (auto& row : sums)
      for (auto& lanes : row) lanes = Floats{};
    for (int64_t i = 0; i < size; i += per_lane) {
      if (next)
        for (int k = 0; k < keys_together; k++)
          prefetch(values + i * CHUNK + 16 * per_lane * (first + k));
      Ints key[keys_together];
      for (int k = 0; k < keys_together; k++)
        key[k] = load_bits(keys + i * CHUNK + 16 * per_lane * (first + k));
      for (int r = 0; r < R; r++) {
        const Ints lane = broadcast_lane(queries[r].q + i);
        for (int k = 0; k < keys_together; k++)
          sums[r][k] = multiply_add(sums[r][k], keys, lane, key[k]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int k = 0; k < keys_together; k++) scores[r][first + k] = sums[r][k];
  }
  alignas(64) T weights[R][CHUNK];
  int64_t seen = 0;
  for (int r = 0; r < R; r++) {
    Floats lane_highest = broadcast(-INFINITY), total = Floats{};
    for (int k = 0; k < registers; k++) {
      const Floats scaled = scores[r][k] * broadcast(scale);
      scores[r][k] = select(first_lanes(queries[r].visible - 16 * k), scaled, broadcast(-INFINITY));
      if (queries[r].hidden > 16 * k)
        scores[r][k] =
            select(first_lanes(queries[r].hidden - 16 * k), broadcast(-INFINITY), scores[r][k]);
      lane_highest = max(scores[r][k], lane_highest);
    }
    const float highest = reduce_max(lane_highest);
    const Floats shift = softmax_shift(highest);
    for (int k = 0; k < registers; k++) {
      const Floats weight = exp(scores[r][k] - shift);
      ::store(&weights[r][16 * k], weight);
      total = total + weight;
    }
    queries[r].result->highest = highest;
    queries[r].result->weight = reduce_add(total);
    seen = std::max(seen, std::min(CHUNK, queries[r].visible));
  }
  constexpr int together = TOGETHER<vectors>;
  for (int first = 0; first < vectors; first += together) {
    Floats sums[R][together];
    for (auto& row : sums)
      for (auto& lanes : row) lanes = Floats{};
    for (int64_t token = 0; token < seen; token += per_lane) {
      if (next && first == 0)
        for (int64_t line = 0; line < size * per_lane; line += 64 / sizeof(T))
          prefetch(next + token * size + line);
      Ints value[together];
      for (int v = 0; v < together; v++)
        value[v] = load_bits(values + token * size + 16 * per_lane * (first + v));
      for (int r = 0; r < R; r++) {
        const Ints lane = broadcast_lane(&weights[r][token]);
        for (int v = 0; v < together; v++)
          sums[r][v] = multiply_add(sums[r][v], values, lane, value[v]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < together; v++)
        store(queries[r].result->sum + 16 * (first + v), sums[r][v]);
  }
}

template <typename T, int vectors>
void attend_to_chunk(const Query<T>* queries, int64_t count, const T* keys, const T* values,
                     const T* next, float scale) {
  for (; count >= 4; count -= 4, queries += 4)
    attend_to_chunk<T, vectors, 4>(queries, keys, values, next, scale);
  if (count == 3) attend_to_chunk<T, vectors, 3>(queries, keys, values, next, scale);
  if (count == 2) attend_to_chunk<T, vectors, 2>(queries, keys, values, next, scale);
  if (count == 1) attend_to_chunk<T, vectors, 1>(queries, keys, values, next, scale);
}

// The partial results of the chunks so far, merged.
template <int vectors>
struct Merged {
  Floats sum[vectors];
  float highest = -INFINITY, weight = 0;

  Merged() {
    for (auto& lanes : sum) lanes = Floats{};
  }
  void merge(const Partial& part) {
    const float new_highest = std::max(highest, part.highest);
    const Floats shift = softmax_shift(new_highest);
    const Floats old = exp(broadcast(highest) - shift);
    const Floats added = exp(broadcast(part.highest) - shift);
    weight = std::fma(first_lane(added), part.weight, weight * first_lane(old));
    for (int v = 0; v < vectors; v++) sum[v] = fma(added, load(part.sum + 16 * v), sum[v] * old);
    highest = new_highest;
  }
  template <typename T>
  void finish(T* y) const {
    for (int v = 0; v < vectors; v++) store(y + 16 * v, sum[v] / broadcast(weight));
  }
};

// All tokens are seen: so many that a position without them is a number, too.
constexpr int64_t NO_WINDOW = INT64_MAX / 2;

// How the attention of a pass is divided among threads: the same for all layers of one window, that
// is how many tokens, the last ones, a query sees.
class BlockPlan {
 public:
  // Consecutive new tokens of a sequence that are few enough to be worked through together, a task
  // for each key head and chunk; or, with more queries than MAX_QUERIES, a task for each head.
  struct Tile {
    const Sequence* sequence;
    int64_t start, rows;
    int64_t first_chunk, chunks;  // the first that is seen, and how many are
    int64_t partial;  // the first of its partial results, (kv_heads, chunks, rows · group)
    int64_t task;     // the first of its tasks, (kv_heads, chunks)
  };
  // Where a token's keys and values go.
  struct Place {
    int32_t block, slot;
    bool is_last;  // of its sequence
  };

  std::vector<Sequence> sequences;
  std::vector<Place> places;  // of each token
  std::vector<Tile> tiles, long_tiles;
  int64_t heads, kv_heads, group, window, partials = 0, tasks = 0;

  // window: 0 for none. Throws a Status if a number is out of range.
  BlockPlan(const Places& given, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t window)
      : sequences(given.count),
        places(tokens, {-1, 0, false}),
        heads(heads),
        kv_heads(kv_heads),
        group(heads / kv_heads),
        window(window && window < NO_WINDOW ? window : NO_WINDOW) {
    const int64_t* numbers = given.sequences;
    int64_t placed = 0;
    for (Sequence& sequence : sequences) {
      const int64_t first = numbers[0], count = numbers[1], past = numbers[2], from = numbers[3];
      numbers += 4;
      require(0 <= first && first <= tokens && 0 <= count && count <= tokens - first && 0 <= from &&
                  from <= given.entries && 0 <= past &&
                  past <= (given.entries - from) * CHUNK - count,
              BAD_SEQUENCES);
      sequence = {first, count, past, given.tables + from};
      for (int64_t i = sequence.first_chunk(this->window); i < sequence.chunks(); i++)
        require(given.has(sequence.table[i]), BAD_TABLES);
      for (int64_t i = 0; i < count; i++) {
        require(places[first + i].block < 0, BAD_SEQUENCES);
        places[first + i] = {sequence.table[(past + i) / CHUNK], int32_t((past + i) % CHUNK),
                             i + 1 == count};
      }
      placed += count;
      divide(sequence);
    }
    require(placed == tokens, BAD_SEQUENCES);
    require_writers_alone(given);
  }

 private:
  void divide(const Sequence& sequence) {
    const int64_t rows_together = std::max<int64_t>(1, MAX_QUERIES / group);
    const bool is_long = sequence.count * group > MAX_QUERIES;
    const int64_t step = is_long ? CHUNK : rows_together;
    for (int64_t start = 0; start < sequence.count; start += step) {
      const int64_t rows = std::min(step, sequence.count - start);
      const int64_t oldest = std::max<int64_t>(0, sequence.past + start + 1 - window);
      const int64_t first = oldest / CHUNK;
      const int64_t chunks = (sequence.past + start + rows + CHUNK - 1) / CHUNK - first;
      (is_long ? long_tiles : tiles)
          .push_back({&sequence, start, rows, first, chunks, partials, tasks});
      if (is_long) continue;
      partials += kv_heads * chunks * group * rows;
      tasks += kv_heads * chunks;
    }
  }

  // Throws BAD_TABLES if a block that a sequence writes to is once more in a table. Any may read
  // the others.
  void require_writers_alone(const Places& given) const {
    std::vector<bool> written(given.blocks());
    for (const Sequence& sequence : sequences)
      for (int64_t i = sequence.past / CHUNK; sequence.count && i < sequence.chunks(); i++) {
        require(!written[sequence.table[i]], BAD_TABLES);
        written[sequence.table[i]] = true;
      }
    for (const Sequence& sequence : sequences)
      for (int64_t i = sequence.first_chunk(window); i < sequence.past / CHUNK; i++)
        require(!written[sequence.table[i]], BAD_TABLES);
  }
};

// Where a head of a token begins. qkv: (tokens, heads + 2 · kv_heads, size).
template <typename T>
inline const T* head_of(const BlockPlan& plan, const T* qkv, int64_t size, int64_t token,
                        int64_t head) {
  return qkv + (token * (plan.heads + 2 * plan.kv_heads) + head) * size;
}

// Stores the keys and values of a token in its block.
template <typename T>
void store_token(const BlockPlan& plan, const Blocks<T>& blocks, const T* qkv, int64_t token) {
  const auto [block, slot, is_last] = plan.places[token];
  const T* key = head_of(plan, qkv, blocks.size, token, plan.heads);
  for (int64_t head = 0; head < plan.kv_heads; head++, key += blocks.size)
    blocks.store(key, key + plan.kv_heads * blocks.size, block, slot, head, is_last);
}

// Attention of the tokens of a pass in one layer, after all are stored. y: (tokens, heads, size).
template <typename T, int vectors>
struct BlockAttention {
  static constexpr int64_t size = 16 * vectors;
  const BlockPlan& plan;
  const Blocks<T>& blocks;
  const T* qkv;
  T* y;
  Partial* partial;  // (plan.partials)
  const float scale = 1 / std::sqrt((float)size);

  // All threads of a parallel region call it.
  void run() const {
#pragma omp for schedule(dynamic) nowait
    for (int64_t task = 0; task < (int64_t)plan.long_tiles.size() * plan.heads; task++)
      // The last tokens of a text, which see the most keys, come first.
      attend_long(plan.long_tiles[plan.long_tiles.size() - 1 - task / plan.heads],
                  task % plan.heads);
    const auto [from, to] = share_of_thread(plan.tasks);
    auto tile = std::upper_bound(
        plan.tiles.begin(), plan.tiles.end(), from,
        [](int64_t task, const BlockPlan::Tile& tile) { return task < tile.task; });
    if (from < to) tile--;
    for (int64_t task = from; task < to; task++) {
      const auto now = tile;
      const int64_t in_tile = task - tile->task;
      if (in_tile + 1 == plan.kv_heads * tile->chunks) tile++;
      attend(*now, in_tile, task + 1 < to ? keys_of(*tile, task + 1 - tile->task) : nullptr);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < (int64_t)plan.tiles.size() * plan.heads; t++)
      merge(plan.tiles[t / plan.heads], t % plan.heads);
  }

 private:
  static int64_t visible(const BlockPlan::Tile& tile, int64_t row, int64_t chunk) {
    return tile.sequence->past + tile.start + row + 1 - chunk * CHUNK;
  }

  bool sees(const BlockPlan::Tile& tile, int64_t row, int64_t chunk) const {
    const int64_t tokens = visible(tile, row, chunk);
    return tokens > 0 && tokens - plan.window < CHUNK;
  }

  const T* keys_of(const BlockPlan::Tile& tile, int64_t task) const {
    const int64_t chunk = tile.first_chunk + task % tile.chunks;
    return blocks.keys(tile.sequence->table[chunk], task / tile.chunks);
  }

  // A chunk of a key head, for all tokens of a tile. next: the keys of the next task.
  void attend(const BlockPlan::Tile& tile, int64_t task, const T* next) const {
    const int64_t head = task / tile.chunks, chunk = tile.first_chunk + task % tile.chunks;
    Partial* result = partial + tile.partial + task * tile.rows * plan.group;
    Query<T> queries[MAX_QUERIES];
    for (int64_t row = 0; row < tile.rows; row++)
      for (int64_t i = 0; i < plan.group; i++)
        queries[row * plan.group + i] = {
            head_of(plan, qkv, size, tile.sequence->first + tile.start + row,
                    head * plan.group + i),
            visible(tile, row, chunk), visible(tile, row, chunk) - plan.window,
            result + row * plan.group + i};
    attend_to_chunk<T, vectors>(queries, tile.rows * plan.group, keys_of(tile, task),
                                blocks.values(tile.sequence->table[chunk], head), next, scale);
  }

  void merge(const BlockPlan::Tile& tile, int64_t head) const {
    const int64_t queries = tile.rows * plan.group;
    for (int64_t row = 0; row < tile.rows; row++) {
      Merged<vectors> merged;
      for (int64_t chunk = 0; chunk < tile.chunks; chunk++)
        if (sees(tile, row, tile.first_chunk + chunk))
          merged.merge(partial[tile.partial + (head / plan.group * tile.chunks + chunk) * queries +
                               row * plan.group + head % plan.group]);
      merged.finish(y + ((tile.sequence->first + tile.start + row) * plan.heads + head) * size);
    }
  }

  // One head of all tokens of a tile, chunk after chunk.
  void attend_long(const BlockPlan::Tile& tile, int64_t head) const {
    const Sequence& sequence = *tile.sequence;
    // Copied, because the queries of a head are far apart: so they are fetched at the same time.
    alignas(64) T from[CHUNK][size];
    for (int64_t i = 0; i < tile.rows; i++)
      std::memcpy(from[i], head_of(plan, qkv, size, sequence.first + tile.start + i, head),
                  sizeof from[i]);
    Merged<vectors> merged[CHUNK];
    for (int64_t i = 0; i < tile.chunks; i++) {
      const int64_t chunk = tile.first_chunk + i;
      const int32_t block = sequence.table[chunk];
      const int64_t head_of_keys = head / plan.group;
      const T *keys = blocks.keys(block, head_of_keys),
              *values = blocks.values(block, head_of_keys);
      const int64_t first = std::max<int64_t>(0, 1 - visible(tile, 0, chunk));
      for (int64_t row = first; row < tile.rows; row += ROWS_AT_ONCE) {
        const int64_t rows = std::min(ROWS_AT_ONCE, tile.rows - row);
        Partial parts[ROWS_AT_ONCE];
        Query<T> queries[ROWS_AT_ONCE];
        for (int64_t r = 0; r < rows; r++)
          queries[r] = {from[row + r], visible(tile, row + r, chunk),
                        visible(tile, row + r, chunk) - plan.window, parts + r};
        attend_to_chunk<T, vectors>(queries, rows, keys, values, nullptr, scale);
        for (int64_t r = 0; r < rows; r++)
          if (sees(tile, row + r, chunk)) merged[row + r].merge(parts[r]);
      }
    }
    for (int64_t i = 0; i < tile.rows; i++)
      merged[i].finish(y + ((sequence.first + tile.start + i) * plan.heads + head) * size);
  }
};

// All threads of a parallel region call it, see `BlockAttention`.
template <typename T>
void attend_to_blocks(const BlockPlan& plan, const Blocks<T>& blocks, const T* qkv, T* y,
                      Partial* partial) {
  const auto run = [&](auto vectors) {
    BlockAttention<T, decltype(vectors)::value>{plan, blocks, qkv, y, partial}.run();
  };
  switch (blocks.size) {
    case 32:
      return run(std::integral_constant<int, 2>());
    case 64:
      return run(std::integral_constant<int, 4>());
    case 96:
      return run(std::integral_constant<int, 6>());
    case 128:
      return run(std::integral_constant<int, 8>());
    default:
      return run(std::integral_constant<int, 16>());
  }
}

// Stores the new keys and values of all sequences in their blocks, then y = softmax(q kᵀ / √size) v
// where each token sees those before it and itself. See `gptk_attend_blocks` for the layouts.
template <typename T>
void attend_blocks(const T* qkv, T* y, const BlockPlan& plan, const Blocks<T>& blocks) {
  thread_local Memory<Partial> memory;  // kept for the next call
  memory.reserve(plan.partials);
  Partial* const partial = memory.get();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < (int64_t)plan.places.size(); token++)
      store_token(plan, blocks, qkv, token);
    attend_to_blocks(plan, blocks, qkv, y, partial);
  }
}

}  // namespace
