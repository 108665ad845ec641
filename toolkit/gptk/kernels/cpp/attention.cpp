// gptk's kernels for attention: a part of their own, since they take half of the time to compile.

#include "attention.h"

extern "C" {

// y = softmax(q kᵀ · scale + mask) v. q: (trees · rows, heads, size) at row_stride, y alike without
// gaps; keys, values: (trees · kv_heads, length, size) at key_stride; mask, or none:
// (trees, rows, length) at its strides. size: 32, 64, 96 or 128.
void gptk_attend(int is_bfloat16, const void* q, const void* keys, const void* values,
                 const void* mask, void* y, float scale, int64_t trees, int64_t rows,
                 int64_t heads, int64_t kv_heads, int64_t length, int64_t size, int64_t row_stride,
                 int64_t key_stride, int64_t tree_stride, int64_t mask_stride) {
  const Attention at{trees,      rows,        heads / kv_heads, kv_heads, length, row_stride,
                     key_stride, tree_stride, mask_stride,      scale};
  OF(is_bfloat16, attend_of<T>(q, keys, values, mask, y, size, at));
}

// y = softmax(q kᵀ · scale) v, where each token sees itself and those before it. q, y: (rows, time,
// heads, size), k, v: (rows, time, kv_heads, size), at their strides; y without gaps. logsums, or
// none: (rows, heads, time), of the scores.
void gptk_attend_causally(int is_bfloat16, const void* q, const void* k, const void* v, void* y,
                          float* logsums, float scale, int64_t rows, int64_t time, int64_t heads,
                          int64_t kv_heads, int64_t size, int64_t q_row, int64_t q_time,
                          int64_t kv_row, int64_t kv_time) {
  const Causal at{rows, time, heads, kv_heads, q_row, q_time, kv_row, kv_time, scale};
  OF(is_bfloat16, attend_causally_of<T>(q, k, v, y, logsums, size, at));
}

// Its gradients, from that of y, all bfloat16. All but q, k and v are without gaps.
void gptk_attend_causally_backward(const void* q, const void* k, const void* v, const void* y,
                                   const void* dy, const float* logsums, void* dq, void* dk,
                                   void* dv, float scale, int64_t rows, int64_t time,
                                   int64_t heads, int64_t kv_heads, int64_t size, int64_t q_row,
                                   int64_t q_time, int64_t kv_row, int64_t kv_time) {
  const Causal at{rows, time, heads, kv_heads, q_row, q_time, kv_row, kv_time, scale};
  attend_causally_backward_of<uint16_t>(q, k, v, y, dy, logsums, dq, dk, dv, size, at);
}
}
