// gptk's own kernels for x86 processors with AVX-512 and VNNI, as gptk/kernels.py compiles and calls
// them.

#include "layers.h"
#include "matrices.h"
#include "products.h"
#include "vocabulary.h"

extern "C" {

// y (rows, outputs) = x (rows, inputs) times the weights, plus the bias if there is one.
void gptk_linear(int is_bfloat16, int bits, const void* x, const void* weights, const void* bias,
                 void* y, int64_t rows, int64_t inputs, int64_t outputs) {
  OF(is_bfloat16, (bits == 4 ? linear<4, T> : linear<8, T>)(
                      (const T*)x, (const uint8_t*)weights, (const T*)bias, (T*)y, rows, inputs,
                      outputs));
}

// The same with weights as they are, (outputs, inputs), inputs a multiple of 32.
void gptk_dense(int is_bfloat16, const void* x, const void* weights, const void* bias, void* y,
                int64_t rows, int64_t inputs, int64_t outputs) {
  OF(is_bfloat16, dense((const T*)x, (const T*)weights, (const T*)bias, (T*)y, rows, inputs,
                        outputs));
}

// The weights of gptk_linear, y, from codes in a byte each, and of each group scale and offset.
void gptk_pack(int bits, const void* codes, const float* scale, const float* offset, void* y,
               int64_t outputs, int64_t inputs) {
  (bits == 4 ? pack<4> : pack<8>)((const uint8_t*)codes, scale, offset, (uint8_t*)y, outputs,
                                  inputs);
}

// y = codes · scale + offset, for groups of 32 codes in a byte each.
void gptk_dequantize(int is_bfloat16, const void* codes, const float* scale, const float* offset,
                     void* y, int64_t groups) {
  OF(is_bfloat16, dequantize((const uint8_t*)codes, scale, offset, (T*)y, groups));
}

// The weights of gptk_linear themselves, y (outputs, inputs).
void gptk_expand(int is_bfloat16, int bits, const void* weights, void* y, int64_t inputs,
                 int64_t outputs) {
  OF(is_bfloat16, (bits == 4 ? expand<4, T> : expand<8, T>)((const uint8_t*)weights, (T*)y, inputs,
                                                            outputs));
}

// y (rows, columns) = a (rows, depth) b (depth, columns), plus the bias if there is one, plus y,
// float32, if that is added to. a is bfloat16. Strides are those of rows; or of columns, where the numbers of a
// row of a, or of a column of b, stand along each other the other way.
void gptk_product(const void* a, int64_t a_stride, int a_along, int b_is_bfloat16, const void* b,
                  int64_t b_stride, int b_along, int y_is_bfloat16, void* y, int64_t y_stride,
                  const float* bias, int add, int64_t rows, int64_t columns, int64_t depth) {
  const Side<uint16_t> left{(const uint16_t*)a, a_stride, rows, a_along != 0};
  OF(b_is_bfloat16, {
    const Side<T> right{(const T*)b, b_stride, columns, b_along != 0};
    if (y_is_bfloat16)
      product(left, right, depth, (uint16_t*)y, y_stride, bias, add);
    else
      product(left, right, depth, (float*)y, y_stride, bias, add);
  });
}

// x, y: (rows, size), size a multiple of 16.
void gptk_rms_norm(int is_bfloat16, const void* x, const void* weight, float eps, void* y,
                   int64_t rows, int64_t size) {
  OF(is_bfloat16, rms_norm((const T*)x, (const T*)weight, eps, (T*)y, rows, size));
}

// y (rows, size) = silu(x[:, :size]) · x[:, size:], size a multiple of 16.
void gptk_swiglu(int is_bfloat16, const void* x, void* y, int64_t rows, int64_t size) {
  OF(is_bfloat16, swiglu((const T*)x, (T*)y, rows, size));
}

// y (size) = gelu(x), or with dy its gradient by x.
void gptk_gelu(int is_bfloat16, const void* x, const void* dy, void* y, int64_t size) {
  OF(is_bfloat16, dy ? gelu<true>((const T*)x, (const T*)dy, (T*)y, size)
                     : gelu<false>((const T*)x, (const T*)dy, (T*)y, size));
}

// x, y: (heads, size), size a multiple of 32; cosines, sines: (angles, size), taken in turns.
void gptk_rotate(int is_bfloat16, const void* x, const void* cosines, const void* sines, void* y,
                 int64_t heads, int64_t angles, int64_t size) {
  OF(is_bfloat16, rotate((const T*)x, (const T*)cosines, (const T*)sines, (T*)y, heads, angles,
                         size));
}

// y (count): noise for tokens with keys of two numbers each, `stride` numbers apart, or one key, 0.
void gptk_exponential(const int32_t* keys, int64_t stride, const int32_t* tokens, float* y,
                      int64_t count) {
  exponential(keys, stride, tokens, y, count);
}

// Of each row of x (rows, size): the highest number, the sum of weights exp(x - highest), and the
// sum of weight · (x - highest).
void gptk_sums(const float* x, float* highest, float* weight, float* weighted, int64_t rows,
               int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++) {
    const Sums sums(x + row * size, size);
    highest[row] = sums.highest;
    weight[row] = sums.weight;
    weighted[row] = sums.weighted;
  }
}

// For each row the key at which tokens in the order of falling keys reach the probability p.
void gptk_last_key(const float* keys, const float* logits, double p, float* y, int64_t rows,
                   int64_t size) {
#pragma omp parallel if (rows * size > FEW)
  {
    std::vector<Weighed> scratch;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
      y[row] = last_key(keys + row * size, logits + row * size, size, p, scratch);
  }
}

// y = x where the key is at least its row's `least`, or NaN; else -inf.
void gptk_keep_from(const float* x, const float* least, const float* keys, float* y, int64_t rows,
                    int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = row * size; i < (row + 1) * size; i++)
      y[i] = keys[i] < least[row] ? -INFINITY : x[i];
}

// The k largest numbers of each row and where they are. `found` is 0 for a row with a NaN.
void gptk_top(const float* x, float* values, int64_t* tokens, int32_t* found, int64_t rows,
              int64_t size, int64_t k) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++)
    found[row] = top(x + row * size, size, k, values + row * k, tokens + row * k);
}

// A token of each row in proportion to exp(logits), by a row's key, and its log-probability.
void gptk_draw(const float* logits, const int32_t* keys, int64_t* tokens, float* logprobs,
               int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > FEW)
  for (int64_t row = 0; row < rows; row++)
    logprobs[row] = draw(logits + row * size, size, keys + 2 * row, tokens + row);
}

// y (columns) = the sums of the columns of x (rows, columns).
void gptk_column_sums(int is_bfloat16, const void* x, float* y, int64_t rows, int64_t columns) {
  OF(is_bfloat16, column_sums((const T*)x, y, rows, columns));
}

// For each row of x (rows, size), at its stride, the loss -log softmax(x)[target]; and, unless scale
// is 0, scale · (softmax(x) - one at the target) in the place of x.
void gptk_cross_entropy(int is_bfloat16, void* x, const int64_t* targets, float* losses, float scale,
                        int64_t rows, int64_t size, int64_t stride) {
  OF(is_bfloat16, cross_entropy((T*)x, targets, losses, scale, rows, size, stride));
}

// y (count): the first numbers of a random permutation of `size`.
void gptk_permutation(int64_t seed, int64_t size, int64_t count, int32_t* y) {
  permutation((uint32_t)seed, size, count, y);
}
}

// The same for a program by AOTInductor: functions of PyTorch's stable C interface.
using Tensor = struct AtenTensorOpaque*;
extern "C" {
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_size(Tensor, int64_t, int64_t*);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 Tensor*);

int32_t aoti_torch_cpu_few_rows_linear(Tensor x, Tensor weights, int64_t bits, int64_t outputs,
                                       Tensor* y) {
  int64_t rows, inputs;
  int32_t dtype;
  void *from, *codes, *to;
  if (aoti_torch_get_size(x, 0, &rows) || aoti_torch_get_size(x, 1, &inputs) ||
      aoti_torch_get_dtype(x, &dtype) || aoti_torch_get_data_ptr(x, &from) ||
      aoti_torch_get_data_ptr(weights, &codes))
    return 1;
  const int64_t sizes[2] = {rows, outputs}, strides[2] = {outputs, 1};
  if (aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, y) ||
      aoti_torch_get_data_ptr(*y, &to))
    return 1;
  gptk_linear(dtype == aoti_torch_dtype_bfloat16(), bits, from, codes, nullptr, to, rows, inputs,
              outputs);
  return 0;
}
}
