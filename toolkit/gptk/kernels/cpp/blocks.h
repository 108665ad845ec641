// Attention of sequences of any lengths over keys and values in blocks, in one pass: sequences with
// few new tokens beside prompts.
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
};

// Keys and values of one layer. Memory is in slabs of 2^slab_bits blocks; a block has for each key
// head CHUNK tokens of `size` numbers.
template <typename T>
struct Blocks {
  const int64_t* slabs;  // addresses
  int64_t slab_bits, keys_from, values_from, kv_heads, size;

  T* at(int64_t from, int32_t block, int64_t head) const {
    const int64_t in_slab = block & ((int64_t(1) << slab_bits) - 1);
    return (T*)slabs[block >> slab_bits] + from + (in_slab * kv_heads + head) * CHUNK * size;
  }
  T* keys(int32_t block, int64_t head) const { return at(keys_from, block, head); }
  T* values(int32_t block, int64_t head) const { return at(values_from, block, head); }
};

// Consecutive new tokens of a sequence that are few enough to be worked through together.
struct Tile {
  int64_t sequence, start, rows;
  int64_t partial;  // the first of its partial results, (kv_heads, chunks, group · rows)
  int64_t task;     // the first of its tasks, (kv_heads, chunks)
  int64_t chunks;
};

// A chunk of queries of a sequence with many new tokens.
struct LongTile {
  int64_t sequence, start, rows, packed;  // packed: the first chunk of the sequence's keys
};

// Stores the new keys and values of all sequences in their blocks, then y = softmax(q kᵀ · scale) v
// where each token sees those before it and itself. See `gptk_attend_blocks` for the layouts.
template <typename T, int vectors>
void attend_blocks(const T* qkv, T* y, const std::vector<Sequence>& sequences,
                   const Blocks<T>& blocks, int64_t heads, float scale) {
  constexpr int64_t size = 16 * vectors;
  const int64_t kv_heads = blocks.kv_heads, group = heads / kv_heads;
  const int64_t stride = (heads + 2 * kv_heads) * size;
  const int64_t rows_together = std::max<int64_t>(1, MAX_QUERIES / group);
  std::vector<Tile> tiles;
  std::vector<LongTile> long_tiles;
  std::vector<int64_t> packed_of(sequences.size(), 0);
  int64_t partials = 0, tasks = 0, packed_chunks = 0, tokens = 0;
  for (size_t s = 0; s < sequences.size(); s++) {
    const Sequence& sequence = sequences[s];
    tokens += sequence.count;
    packed_of[s] = packed_chunks;
    if (sequence.count * group > MAX_QUERIES) {
      for (int64_t start = 0; start < sequence.count; start += CHUNK)
        long_tiles.push_back(
            {(int64_t)s, start, std::min(CHUNK, sequence.count - start), packed_chunks});
      packed_chunks += sequence.chunks() * kv_heads;
      continue;
    }
    for (int64_t start = 0; start < sequence.count; start += rows_together) {
      const int64_t rows = std::min(rows_together, sequence.count - start);
      const int64_t chunks = (sequence.past + start + rows + CHUNK - 1) / CHUNK;
      tiles.push_back({(int64_t)s, start, rows, partials, tasks, chunks});
      partials += kv_heads * chunks * group * rows;
      tasks += kv_heads * chunks;
    }
  }
  // Kept for the next call. Of packed: keys with tokens in lanes, values with their numbers in
  // lanes.
  thread_local Memory<Partial> partial_memory;
  thread_local Memory<Chunk<T, vectors>> packed_memory;
  partial_memory.reserve(partials);
  packed_memory.reserve(packed_chunks);
  Partial* const partial = partial_memory.get();
  Chunk<T, vectors>* const packed = packed_memory.get();
#pragma omp parallel
  {
    // New keys and values go into the blocks.
#pragma omp for schedule(static)
    for (int64_t s = 0; s < (int64_t)sequences.size() * kv_heads; s++) {
      const Sequence& sequence = sequences[s / kv_heads];
      const int64_t head = s % kv_heads;
      for (int64_t i = 0; i < sequence.count; i++) {
        const int64_t position = sequence.past + i, slot = position % CHUNK * size;
        const int32_t block = sequence.table[position / CHUNK];
        const T* from = qkv + (sequence.first + i) * stride + (heads + head) * size;
        std::memcpy(blocks.keys(block, head) + slot, from, size * sizeof(T));
        std::memcpy(blocks.values(block, head) + slot, from + kv_heads * size, size * sizeof(T));
      }
    }
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < tasks; task++) {
      const auto after =
          std::upper_bound(tiles.begin(), tiles.end(), task,
                           [](int64_t t, const Tile& tile) { return t < tile.task; });
      const Tile& tile = *(after - 1);
      const Sequence& sequence = sequences[tile.sequence];
      const int64_t head = (task - tile.task) / tile.chunks,
                    chunk = (task - tile.task) % tile.chunks;
      const Queries<T> queries{qkv + (sequence.first + tile.start) * stride + head * group * size,
                               tile.rows, group, stride, scale};
      const int64_t first_sees = sequence.past + tile.start + 1 - chunk * CHUNK;
      const auto see = [&](int64_t row, int32_t* visible) {
        const int64_t seen = std::min(CHUNK, std::max<int64_t>(0, first_sees + row));
        for (int64_t key = 0; key < seen; key++) visible[key] = key;
        return seen;
      };
      const int32_t block = sequence.table[chunk];
      attend_chunk<T, vectors>(queries, blocks.keys(block, head), blocks.values(block, head), see,
                               (const T*)nullptr, 0,
                               &partial[tile.partial + (task - tile.task) * queries.count()]);
    }
    if (packed_chunks) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < packed_chunks; task++) {
        const auto after = std::upper_bound(packed_of.begin(), packed_of.end(), task);
        size_t s = after - packed_of.begin() - 1;
        while (sequences[s].count * group <= MAX_QUERIES) s--;  // has none, the same first chunk
        const Sequence& sequence = sequences[s];
        const int64_t chunk = (task - packed_of[s]) % sequence.chunks();
        const int64_t head = (task - packed_of[s]) / sequence.chunks();
        const int64_t count = std::min(CHUNK, sequence.past + sequence.count - chunk * CHUNK);
        const int32_t block = sequence.table[chunk];
        packed[task].fill_token_lanes(blocks.keys(block, head), count, size);
        packed[task].fill_size_lanes(blocks.values(block, head), count, size);
      }
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < (int64_t)long_tiles.size() * heads; task++) {
        // The last tokens of a text, which see the most keys, come first.
        const LongTile& tile = long_tiles[long_tiles.size() - 1 - task / heads];
        const Sequence& sequence = sequences[tile.sequence];
        const int64_t head = task % heads, sees = sequence.past + tile.start + 1;
        const int64_t first = tile.packed + head / group * sequence.chunks();
        alignas(64) float sum[CHUNK][size] = {};
        float highest[CHUNK], weight[CHUNK] = {};
        std::fill(highest, highest + CHUNK, -INFINITY);
        // Copied, because the queries of a head are far apart: so they are fetched at the same
        // time.
        alignas(64) T from[CHUNK][size];
        for (int64_t i = 0; i < tile.rows; i++)
          std::memcpy(from[i], qkv + (sequence.first + tile.start + i) * stride + head * size,
                      size * sizeof(T));
        const int64_t chunks = (sees + tile.rows - 1 + CHUNK - 1) / CHUNK;
        for (int64_t chunk = 0; chunk < chunks; chunk++)
          for (int64_t i = 0; i < tile.rows; i += ROWS_AT_ONCE) {
            const int64_t visible = sees + i - chunk * CHUNK,
                          rows = std::min(ROWS_AT_ONCE, tile.rows - i);
            if (visible + rows - 1 <= 0) continue;
            attend_chunk_causally<T, vectors>(from[i], size, rows, scale, std::min(visible, CHUNK),
                                              packed[first + chunk], sum + i, highest + i,
                                              weight + i);
          }
        for (int64_t i = 0; i < tile.rows; i++)
          for (int64_t j = 0; j < size; j += 16)
            store(y + ((sequence.first + tile.start + i) * heads + head) * size + j,
                  _mm512_div_ps(_mm512_load_ps(&sum[i][j]), _mm512_set1_ps(weight[i])));
      }
    }
#pragma omp barrier
    // Merge the chunks of each query.
#pragma omp for schedule(static)
    for (int64_t t = 0; t < (int64_t)tiles.size() * kv_heads; t++) {
      const Tile& tile = tiles[t / kv_heads];
      const Sequence& sequence = sequences[tile.sequence];
      const int64_t head = t % kv_heads, queries = group * tile.rows;
      for (int64_t query = 0; query < queries; query++) {
        const int64_t token = sequence.first + tile.start + query % tile.rows;
        merge_chunks<T, vectors>(&partial[tile.partial + head * tile.chunks * queries + query],
                                 tile.chunks, queries,
                                 y + (token * heads + head * group + query / tile.rows) * size);
      }
    }
  }
}

template <typename T>
void attend_blocks_by_size(const void* qkv, void* y, const std::vector<Sequence>& sequences,
                           const Blocks<T>& blocks, int64_t heads, float scale) {
  auto* run = blocks.size == 32   ? attend_blocks<T, 2>
              : blocks.size == 64 ? attend_blocks<T, 4>
              : blocks.size == 96 ? attend_blocks<T, 6>
                                  : attend_blocks<T, 8>;
  run((const T*)qkv, (T*)y, sequences, blocks, heads, scale);
}

}  // namespace
