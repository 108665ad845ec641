// The exported functions of kernels with a file of their own apart, which kernels/build.py compiles
// and loads. They return a Status. kernels/door.py has checked dtypes, shapes and addresses.
//
// is_bfloat16: matrices passed as void* are bfloat16; else they are float32.

#include "layers.h"
#include "matrices.h"
#include "products.h"
#include "vocabulary.h"

extern "C" {

// y (rows, outputs) = x (rows, inputs) times quantized weights, laid out as formats.h says, plus
// the bias (outputs) unless it is null. x is rounded to integers in each group of 32 inputs, see
// products.h.
int32_t gptk_quantized_linear(int64_t is_bfloat16, int64_t format, const void* x,
                              const void* weights, const void* bias, void* y, int64_t rows,
                              int64_t inputs, int64_t outputs) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16, quantized_linear(format, (const T*)x, (const uint8_t*)weights,
                                                 (const T*)bias, (T*)y, rows, inputs, outputs));
  });
}

// y (rows, columns) = a (rows, depth) times b (depth, columns), plus the bias (columns) unless it
// is null, plus y itself if `add`, for which y must be float32. a is bfloat16; b and y are float32
// or bfloat16; b is rounded to bfloat16, and sums are float32.
//
// a_contiguous_in_depth: a is row-major, and a_stride leads to the next row; else it is
// column-major, and a_stride leads to the next column. b_contiguous_in_depth: b is column-major,
// and b_stride leads to the next column; else it is row-major, and b_stride leads to the next row.
// y is row-major, a row every y_stride numbers.
int32_t gptk_product(const void* a, int64_t a_stride, int64_t a_contiguous_in_depth,
                     int64_t b_is_bfloat16, const void* b, int64_t b_stride,
                     int64_t b_contiguous_in_depth, int64_t y_is_bfloat16, void* y,
                     int64_t y_stride, const float* bias, int64_t add, int64_t rows,
                     int64_t columns, int64_t depth) {
  return status_of([&] {
    const Operand<uint16_t> left{(const uint16_t*)a, a_stride, rows, a_contiguous_in_depth != 0};
    DISPATCH_DTYPE(b_is_bfloat16, {
      const Operand<T> right{(const T*)b, b_stride, columns, b_contiguous_in_depth != 0};
      if (y_is_bfloat16)
        product(left, right, depth, (uint16_t*)y, y_stride, bias, add);
      else
        product(left, right, depth, (float*)y, y_stride, bias, add);
    });
  });
}

// y = x / √(mean x² + eps) · weight for each row. x, y: (rows, size); weight: (size). size: a
// multiple of 16.
int32_t gptk_rms_norm(int64_t is_bfloat16, const void* x, const void* weight, double eps, void* y,
                      int64_t rows, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
      DISPATCH_DTYPE(is_bfloat16, rms_norm_row((const T*)x + row * size, (const T*)weight,
                                               (float)eps, (T*)y + row * size, size));
  });
}

// y = (x - mean x) / √(mean (x - mean x)² + eps) · weight for each row, plus the bias (size) unless
// it is null. x, y: (rows, size); weight: (size).
int32_t gptk_layer_norm(int64_t is_bfloat16, const void* x, const void* weight, const void* bias,
                        double eps, void* y, int64_t rows, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
      DISPATCH_DTYPE(is_bfloat16,
                     layer_norm_row((const T*)x + row * size, (const T*)weight, (const T*)bias,
                                    (float)eps, (T*)y + row * size, size));
  });
}

// y (rows, size) = silu(x[:, :size]) · x[:, size:]. size: a multiple of 16.
int32_t gptk_swiglu(int64_t is_bfloat16, const void* x, void* y, int64_t rows, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
      DISPATCH_DTYPE(is_bfloat16, {
        const T* gate = (const T*)x + 2 * row * size;
        swiglu_row(gate, gate + size, (T*)y + row * size, size);
      });
  });
}

constexpr int64_t GELU_PART = 4096;  // numbers that a thread takes at a time

// y (size) = gelu(x); or, unless dy is null, the gradient of x from dy, that of gelu(x).
int32_t gptk_gelu(int64_t is_bfloat16, const void* x, const void* dy, void* y, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (size > PARALLEL_FROM)
    for (int64_t i = 0; i < size; i += GELU_PART)
      DISPATCH_DTYPE(is_bfloat16, {
        const auto run = dy ? gelu_row<true, T> : gelu_row<false, T>;
        run((const T*)x + i, dy ? (const T*)dy + i : nullptr, (T*)y + i,
            std::min(GELU_PART, size - i));
      });
  });
}

// Rotary position embedding of x (heads, size) into y, see `rotate_head`. cosines, sines: (angles,
// size); head i takes those of i % angles. size: a multiple of 32.
int32_t gptk_rotate(int64_t is_bfloat16, const void* x, const void* cosines, const void* sines,
                    void* y, int64_t heads, int64_t angles, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (heads * size > PARALLEL_FROM)
    for (int64_t head = 0; head < heads; head++) {
      const int64_t angle = head % angles * size;
      DISPATCH_DTYPE(is_bfloat16, rotate_head((const T*)x + head * size, (const T*)cosines + angle,
                                              (const T*)sines + angle, (T*)y + head * size, size));
    }
  });
}

// y (count): exponential noise for tokens (count), by keys (count, 2), or all by one key (2) unless
// key_of_each.
int32_t gptk_exponential(const int32_t* keys, int64_t key_of_each, const int32_t* tokens, float* y,
                         int64_t count) {
  return status_of([&] { exponential(keys, key_of_each, tokens, y, count); });
}

// For each row of x (rows, size): the highest number, the sum of the weights exp(x - highest), and
// the sum of weight · (x - highest).
int32_t gptk_softmax_sums(const float* x, float* highest, float* weight, float* weighted,
                          int64_t rows, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
      const SoftmaxSums sums(x + row * size, size);
      highest[row] = sums.highest;
      weight[row] = sums.weight;
      weighted[row] = sums.weighted;
    }
  });
}

// y (rows): for each row of keys and logits (rows, size) the key at which tokens, in the order of
// falling keys, reach the probability p.
int32_t gptk_last_key(const float* keys, const float* logits, double p, float* y, int64_t rows,
                      int64_t size) {
  return status_of([&] {
    const bool parallel = rows * size > PARALLEL_FROM;
    const Memory<WeightedKey> scratch(size * (parallel ? omp_get_max_threads() : 1));
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t row = 0; row < rows; row++)
      y[row] = last_key(keys + row * size, logits + row * size, size, p,
                        scratch.get() + omp_get_thread_num() * size);
  });
}

// y = x where the key is at least its row's `least` or either is NaN, else -inf. x, keys, y: (rows,
// size); least: (rows).
int32_t gptk_keep_from(const float* x, const float* least, const float* keys, float* y,
                       int64_t rows, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = row * size; i < (row + 1) * size; i++)
        y[i] = keys[i] < least[row] ? -INFINITY : x[i];
  });
}

// values, tokens (rows, k): the k largest numbers of each row of x (rows, size), and their indexes.
// found (rows): 0 for a row with a NaN, else 1.
int32_t gptk_top(const float* x, float* values, int64_t* tokens, int32_t* found, int64_t rows,
                 int64_t size, int64_t k) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
      found[row] = top(x + row * size, size, k, values + row * k, tokens + row * k);
  });
}

// tokens (rows): for each row of logits (rows, size) one token, drawn with probability
// softmax(logits) by the row's key, keys (rows, 2); logprobs (rows): its log-probability.
int32_t gptk_draw(const float* logits, const int32_t* keys, int64_t* tokens, float* logprobs,
                  int64_t rows, int64_t size) {
  return status_of([&] {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
      logprobs[row] = draw(logits + row * size, size, keys + 2 * row, tokens + row);
  });
}

// y (columns) = the sums of the columns of x (rows, columns), float32.
int32_t gptk_column_sums(int64_t is_bfloat16, const void* x, float* y, int64_t rows,
                         int64_t columns) {
  return status_of(
      [&] { DISPATCH_DTYPE(is_bfloat16, column_sums((const T*)x, y, rows, columns)); });
}

// losses (rows) = -log softmax(logits)[target] for each row of logits (rows, size), a row every
// `stride` numbers; and, unless scale is 0, logits = scale · (softmax(logits) - 1 at the target).
int32_t gptk_cross_entropy(int64_t is_bfloat16, void* logits, const int64_t* targets, float* losses,
                           double scale, int64_t rows, int64_t size, int64_t stride) {
  return status_of([&] {
    DISPATCH_DTYPE(is_bfloat16,
                   cross_entropy((T*)logits, targets, losses, (float)scale, rows, size, stride));
  });
}

// y (count): the first numbers of a random permutation of 0 to size - 1.
int32_t gptk_permutation(int64_t seed, int64_t size, int64_t count, int32_t* y) {
  return status_of([&] { permutation((uint32_t)seed, size, count, y); });
}
}
