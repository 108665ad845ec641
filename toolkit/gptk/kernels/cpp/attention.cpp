// The exported functions of attention, which kernels/build.py compiles and loads. They are in a
// separate file, compiled in parallel with kernels.cpp, as they take half of the time to compile.

#include "attention.h"

extern "C" {

// y = softmax(q kᵀ / √size + mask) v for `rows` query tokens of each tree over a KV cache. All are
// float32 or bfloat16; computed in float32.
//
// q: (trees · rows, heads, size), a row every row_stride numbers; y: the same without gaps; keys,
// values: (trees · kv_heads, length, size), a head every key_stride numbers; mask: (trees, rows,
// length) at tree_stride and mask_stride, or null. size: 32, 64, 96 or 128. heads / kv_heads · rows
// is at most 16.
int32_t gptk_attend(int64_t is_bfloat16, const void* q, const void* keys, const void* values,
                    const void* mask, void* y, int64_t trees, int64_t rows, int64_t heads,
                    int64_t kv_heads, int64_t length, int64_t size, int64_t row_stride,
                    int64_t key_stride, int64_t tree_stride, int64_t mask_stride) {
  return status_of([&] {
    const CacheShape shape{trees,      rows,       heads / kv_heads, kv_heads,    length,
                           row_stride, key_stride, tree_stride,      mask_stride, scale_of(size)};
    DISPATCH_DTYPE(is_bfloat16, attend_by_size<T>(q, keys, values, mask, y, size, shape));
  });
}

// y = softmax(q kᵀ / √size) v, where each token sees itself and those before it. q, k, v and y are
// all float32, or all bfloat16; scores and sums are float32.
//
// q: (rows, time, heads, size), a row every q_row numbers and a token every q_time; y: the same
// without gaps; k, v: (rows, time, kv_heads, size), at kv_row and kv_time; logsums: (rows, heads,
// time) float32, log Σ exp of each query's scores, or null. size: 32, 64, 96 or 128.
int32_t gptk_attend_causally(int64_t is_bfloat16, const void* q, const void* k, const void* v,
                             void* y, float* logsums, int64_t rows, int64_t time, int64_t heads,
                             int64_t kv_heads, int64_t size, int64_t q_row, int64_t q_time,
                             int64_t kv_row, int64_t kv_time) {
  return status_of([&] {
    const CausalShape shape{rows,   time,   heads,   kv_heads,      q_row,
                            q_time, kv_row, kv_time, scale_of(size)};
    DISPATCH_DTYPE(is_bfloat16, attend_causally_by_size<T>(q, k, v, y, logsums, size, shape));
  });
}

// The gradients dq, dk and dv of gptk_attend_causally from dy, that of y, with the y and logsums
// that it gave. All but logsums are bfloat16, and all but q, k and v are without gaps.
int32_t gptk_attend_causally_backward(const void* q, const void* k, const void* v, const void* y,
                                      const void* dy, const float* logsums, void* dq, void* dk,
                                      void* dv, int64_t rows, int64_t time, int64_t heads,
                                      int64_t kv_heads, int64_t size, int64_t q_row, int64_t q_time,
                                      int64_t kv_row, int64_t kv_time) {
  return status_of([&] {
    const CausalShape shape{rows,   time,   heads,   kv_heads,      q_row,
                            q_time, kv_row, kv_time, scale_of(size)};
    attend_causally_backward_by_size<uint16_t>(q, k, v, y, dy, logsums, dq, dk, dv, size, shape);
  });
}
}
