// gptk_quantized_linear without a bias for compiled steps, which call it by PyTorch's stable C
// interface. A library of its own, which links PyTorch: it is compiled when a step is.

#include <cstdint>

using Tensor = struct AtenTensorOpaque*;

extern "C" {
int32_t gptk_quantized_linear(int is_bfloat16, int bits, const void* x, const void* weights,
                              const void* bias, void* y, int64_t rows, int64_t inputs,
                              int64_t outputs);

int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_size(Tensor, int64_t, int64_t*);
int32_t aoti_torch_get_stride(Tensor, int64_t, int64_t*);
int32_t aoti_torch_get_numel(Tensor, int64_t*);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 Tensor*);

// Returns 0; or 1 if memory is too little, or if a tensor is not what the program was compiled for.
int32_t aoti_torch_cpu_quantized_linear(Tensor x, Tensor weights, int64_t bits, int64_t outputs,
                                        Tensor* y) {
  int64_t rows, inputs, row_stride, stride, bytes;
  int32_t dtype;
  void *x_data, *weights_data, *y_data;
  if (aoti_torch_get_size(x, 0, &rows) || aoti_torch_get_size(x, 1, &inputs) ||
      aoti_torch_get_stride(x, 0, &row_stride) || aoti_torch_get_stride(x, 1, &stride) ||
      aoti_torch_get_dtype(x, &dtype) || aoti_torch_get_data_ptr(x, &x_data) ||
      aoti_torch_get_numel(weights, &bytes) || aoti_torch_get_data_ptr(weights, &weights_data))
    return 1;
  const bool is_bfloat16 = dtype == aoti_torch_dtype_bfloat16();
  if (!is_bfloat16 && dtype != aoti_torch_dtype_float32()) return 1;
  // See `pack` in products.h: in a block of 16 outputs, groups of 32 inputs with 16 scales and 16
  // offsets in float16 and the codes.
  const int64_t packed = (outputs + 15) / 16 * (inputs / 32) * (64 + 64 * bits);
  if (stride != 1 || (rows > 1 && row_stride != inputs) || bytes != packed) return 1;
  const int64_t sizes[2] = {rows, outputs}, strides[2] = {outputs, 1};
  if (aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, y) ||
      aoti_torch_get_data_ptr(*y, &y_data))
    return 1;
  return gptk_quantized_linear(is_bfloat16, bits, x_data, weights_data, nullptr, y_data, rows,
                               inputs, outputs);
}
}
