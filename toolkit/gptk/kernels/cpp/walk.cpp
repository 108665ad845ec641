// The exported functions of plain weights in panels, of keys and values in blocks, and of passes
// through all blocks of a GPT, which
// kernels/build.py compiles and loads.

#include "walk.h"

extern "C" {

// y (rows, outputs) = x (rows, inputs) times weights in panels, plus the bias (outputs) unless it
// is null; sums are float32. For the layout see `Panels`. inputs: even in bfloat16. in_float32: y
// is float32, of numbers that are rounded to x's dtype.
int32_t gptk_linear_in_panels(int64_t is_bfloat16, int64_t in_float32, const void* x,
                              const void* panels, const void* bias, void* y, int64_t rows,
                              int64_t inputs, int64_t outputs) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16, {
      const Panels<T> weights{(const int32_t*)panels, (const T*)bias, inputs, outputs};
      if (in_float32)
        linear_in_panels((const T*)x, rows, weights, (float*)y);
      else
        linear_in_panels((const T*)x, rows, weights, (T*)y);
    });
  });
}

// y (rows, outputs) = x (rows, inputs) times weights (outputs, inputs), plus the bias (outputs)
// unless it is null, summed in float32. inputs: even in bfloat16.
int32_t gptk_linear(int64_t is_bfloat16, const void* x, const void* weights, const void* bias,
                    void* y, int64_t rows, int64_t inputs, int64_t outputs) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16, linear((const T*)x, (const T*)weights, (const T*)bias, (T*)y, rows,
                                       inputs, outputs));
  });
}

// panels = weights (outputs, inputs).
int32_t gptk_to_panels(int64_t is_bfloat16, const void* weights, void* panels, int64_t outputs,
                       int64_t inputs) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16,
                   convert_panels<true>((const T*)weights, (int32_t*)panels, outputs, inputs));
  });
}

// weights (outputs, inputs) = panels.
int32_t gptk_from_panels(int64_t is_bfloat16, void* weights, const void* panels, int64_t outputs,
                         int64_t inputs) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16,
                   convert_panels<false>((T*)weights, (const int32_t*)panels, outputs, inputs));
  });
}

// Stores new keys and values of sequences in their blocks, and y = softmax(q kᵀ / √size) v, where
// each token sees those before it in its sequence, and itself. All numbers are float32 or bfloat16.
//
// qkv: (tokens, heads + 2 · kv_heads, size) without gaps, queries, keys, values; y: (tokens, heads,
// size). sequences: (count, 4): its first token, how many tokens it has here, how many are in its
// blocks already, and where its blocks begin in `tables`. tables: (entries), numbers of blocks.
// slabs: (slab_count), the addresses of slabs of 2^slab_bits blocks, of which this layer's keys and
// values begin at keys_from and values_from, in numbers; for a block see `Blocks`. size: 32, 64, 96
// 128 or 256; heads / kv_heads is at most 16. window: how many tokens each sees, the last ones; 0:
// all.
int32_t gptk_attend_blocks(int64_t is_bfloat16, const void* qkv, void* y, const int64_t* sequences,
                           const int32_t* tables, const int64_t* slabs, int64_t tokens,
                           int64_t count, int64_t entries, int64_t slab_count, int64_t slab_bits,
                           int64_t heads, int64_t kv_heads, int64_t size, int64_t keys_from,
                           int64_t values_from, int64_t window) {
  return status_of([&] {
    const BlockPlan plan({sequences, count, tables, entries, slabs, slab_count, slab_bits}, tokens,
                         heads, kv_heads, window);
    DISPATCH_DTYPE(is_bfloat16, {
      const Blocks<T> blocks{slabs, slab_bits, keys_from, values_from, kv_heads, size};
      attend_blocks((const T*)qkv, (T*)y, plan, blocks);
    });
  });
}

// Reads the tokens of a pass with a model. x (tokens, width): the embeddings, overwritten. table
// (kinds, 2, angles, head size): cosines and sines, as `rotate` takes them, and positions (tokens):
// which of them each token has; without angles there are no rotations. From sequences to slab_bits:
// see gptk_attend_blocks; a layer's keys take `half` numbers of a slab, and so do its values.
// wanted (wanted_count): the tokens whose states are asked of, in ascending order; -1: all. kept
// (kept_count): layers whose states are asked of, too, in ascending order; 0: the embeddings.
// states (tokens asked of, 1 + kept_count, width): the normalized last states, then these.
int32_t gptk_walk(const Model* model, int64_t tokens, void* x, const void* table, int64_t angles,
                  const int64_t* positions, const int64_t* sequences, const int32_t* tables,
                  const int64_t* slabs, int64_t count, int64_t entries, int64_t slab_count,
                  int64_t slab_bits, int64_t half, const int64_t* wanted, int64_t wanted_count,
                  const int64_t* kept, int64_t kept_count, void* states) {
  return status_of([&] {
    const Pass pass{
        tokens, x,          table,
        angles, positions,  {sequences, count, tables, entries, slabs, slab_count, slab_bits},
        half,   wanted,     wanted_count,
        kept,   kept_count, states};
    DISPATCH_DTYPE(model->is_bfloat16, walk<T>(*model, pass));
  });
}
}
