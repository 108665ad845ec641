// A pass through all blocks of a GPT in one call: what gptk.model.gpt does with a module for each
// operation, with the same roundings, so that every number is the same to the last bit.
//
// The threads of one parallel region stay together from the first block to the last. Between two
// steps, of which one needs what all threads have made in the other, they wait for each other.
#pragma once

#include "blocks.h"
#include "layers.h"
#include "panels.h"
#include "products.h"

namespace {

// A model is filled by Python: kernels/structures.py has the same structures.

// A normalization of `size` numbers; without a weight there is none.
struct Norm {
  int64_t is_bfloat16, is_layer_norm;  // else RMS norm
  const void *weight, *bias;
  double eps;
  int64_t size;
};

// A linear layer: with plain weights in panels, or with quantized ones in up to three segments, of
// which each but the last has whole blocks.
struct Matrix {
  int64_t is_bfloat16;
  const void *panels, *bias;  // panels: or null
  int64_t inputs, outputs;
  Segment segments[3];
};

// attention_post_norm, mlp_post_norm: of what is added to the residual stream. window: how many
// tokens each sees, the last ones; 0: all. rope: which of the tables it rotates by, from 1; 0:
// none.
struct Layer {
  Norm attention_norm, query_norm, key_norm, attention_post_norm, mlp_norm, mlp_post_norm;
  Matrix qkv, out, up, down;
  int64_t window, rope;
};

enum Activation : int64_t { GELU, SWIGLU, GEGLU };

struct Model {
  int64_t is_bfloat16, activation;  // of the MLP
  int64_t layers, width, heads, kv_heads, head_size;
  int64_t window, ropes;  // the one window that layers may have; how many tables there are
  const Layer* layer;
  Norm norm;
};

// See gptk_walk.
struct Pass {
  int64_t tokens;
  void* x;
  const void* table;
  int64_t angles;
  const int64_t* positions;
  Places places;
  int64_t half;
  const int64_t* wanted;
  int64_t wanted_count;
  const int64_t* kept;
  int64_t kept_count;
  void* states;

  bool wants_some() const { return wanted_count >= 0; }

  // Throws a Status if a number is out of range.
  void check(const Model& model) const {
    for (int64_t i = 0; angles && i < tokens; i++)
      require(0 <= positions[i] && positions[i] < angles, BAD_POSITIONS);
    for (int64_t i = 0; i < wanted_count; i++)
      require((i ? wanted[i - 1] + 1 : 0) <= wanted[i] && wanted[i] < tokens, BAD_WANTED);
    for (int64_t i = 0; i < kept_count; i++)
      require((i ? kept[i - 1] + 1 : 0) <= kept[i] && kept[i] <= model.layers, BAD_KEPT);
  }
};

template <typename T>
void normalize(const Norm& norm, const T* x, T* y) {
  const T *weight = (const T*)norm.weight, *bias = (const T*)norm.bias;
  if (norm.is_layer_norm)
    layer_norm_row(x, weight, bias, (float)norm.eps, y, norm.size);
  else
    rms_norm_row(x, weight, (float)norm.eps, y, norm.size);
}

// Rows of activations as a matrix takes them: plain, or quantized.
template <typename T>
struct Activations {
  const T* x;
  int64_t rows, size;
  QuantizedRows<PARTS<T>> quantized;
};

// With so few rows each thread prepares all of them for itself, which takes less time than waiting.
constexpr int64_t ROWS_PREPARED_BY_EACH = 8;

template <typename T>
class Walk {
 public:
  // Takes memory, and keeps it for the next pass of the same thread.
  Walk(const Model& model, const Pass& pass)
      : model(model),
        pass(pass),
        plan(pass.places, pass.tokens, model.heads, model.kv_heads, window_of_all(model)),
        window_plan(
            model.window > window_of_all(model)
                ? new BlockPlan(pass.places, pass.tokens, model.heads, model.kv_heads, model.window)
                : nullptr),
        size(model.head_size),
        x((T*)pass.x) {
    const int64_t heads = model.heads + 2 * model.kv_heads, tokens = pass.tokens;
    int64_t widest = model.width, mlp_width = 0;
    for (int64_t i = 0; i < model.layers; i++) {
      const Layer& layer = model.layer[i];
      mlp_width = std::max(mlp_width, layer.down.inputs);
      widest = std::max({widest, layer.out.inputs, layer.down.inputs});
    }
    const int64_t threads = omp_get_max_threads(), few = ROWS_PREPARED_BY_EACH;
    normed_size = round_up(few * model.width * sizeof(T), 64);
    quantized_size = QuantizedRows<PARTS<T>>::bytes(few, round_up(widest, GROUP));
    const int64_t normed_bytes =
        std::max<int64_t>(tokens * model.width * sizeof(T), threads * normed_size);
    const int64_t quantized_bytes = std::max(
        QuantizedRows<PARTS<T>>::bytes(tokens, round_up(widest, GROUP)), threads * quantized_size);
    gate_size = round_up(tokens * PANELS * PANEL * sizeof(T), 64);
    const int64_t sizes[] = {
        tokens * heads * size * (int64_t)sizeof(T),
        tokens * model.heads * size * (int64_t)sizeof(T),
        tokens * mlp_width * (int64_t)sizeof(T),
        pass.wants_some() ? pass.wanted_count * model.width * (int64_t)sizeof(T) : 0,
        pass.wants_some() ? pass.wanted_count * model.heads * size * (int64_t)sizeof(T) : 0,
        normed_bytes,
        quantized_bytes,
        threads * gate_size,
        plan.partials * (int64_t)sizeof(Partial),
        tokens * model.width * (int64_t)sizeof(T)};
    char** const places[] = {(char**)&qkv,      (char**)&y,    (char**)&act, (char**)&wanted_x,
                             (char**)&wanted_y, &normed,       &quantized,   &gates,
                             (char**)&partial,  (char**)&added};
    int64_t total = 0;
    for (int64_t bytes : sizes) total += round_up(bytes, 64);
    thread_local Memory<char> memory;
    memory.reserve(total);
    char* next = memory.get();
    for (int i = 0; i < 10; i++) *places[i] = next, next += round_up(sizes[i], 64);
  }

  // All threads of a parallel region call it.
  void run() {
    T* rows_x = x;
    int64_t rows = pass.tokens, kept = 0;
    for (int64_t i = 0; i <= model.layers; i++) {
      if (kept < pass.kept_count && pass.kept[kept] == i) keep(rows_x, rows, kept++);
      if (i == model.layers) break;
      const Layer& layer = model.layer[i];
      attend(layer, i);
      const T* rows_y = y;
      if (i + 1 == model.layers && pass.wants_some()) {
        take_wanted();
        rows_x = wanted_x, rows_y = wanted_y, rows = pass.wanted_count;
      }
      add(layer.out, prepare(nullptr, rows_y, rows, layer.out), layer.attention_post_norm, rows_x);
      read_mlp(layer, prepare(&layer.mlp_norm, rows_x, rows, layer.up));
      wait();
      add(layer.down, prepare(nullptr, act, rows, layer.down), layer.mlp_post_norm, rows_x);
    }
    const auto [from, to] = share_of_thread(rows);
    for (int64_t row = from; row < to; row++)
      normalize(model.norm, rows_x + row * model.width,
                (T*)pass.states + row * (1 + pass.kept_count) * model.width);
  }

 private:
  const Model& model;
  const Pass& pass;
  const BlockPlan plan;
  const std::unique_ptr<const BlockPlan> window_plan;
  const int64_t size;  // of a head
  T *x, *qkv, *y, *act, *wanted_x, *wanted_y, *added;
  char *normed, *quantized, *gates;
  Partial* partial;
  int64_t normed_size, quantized_size, gate_size;  // bytes, of few rows, and of all, for a thread

  // The window, if all layers have it, else 0. Then `plan` is for them, and there is no other.
  static int64_t window_of_all(const Model& model) {
    for (int64_t i = 0; i < model.layers; i++)
      if (!model.layer[i].window) return 0;
    return model.window;
  }

  static void wait() {
#pragma omp barrier
  }

  // Normalizes rows of x (rows, inputs of the matrix), if there is a norm, and quantizes them, if
  // the matrix is quantized.
  Activations<T> prepare(const Norm* norm, const T* from, int64_t rows,
                         const Matrix& matrix) const {
    const bool by_each = rows <= ROWS_PREPARED_BY_EACH;
    const int64_t place = by_each ? omp_get_thread_num() : 0, inputs = matrix.inputs;
    T* const to = (T*)(normed + place * normed_size);
    Activations<T> result{norm ? to : from,
                          rows,
                          inputs,
                          {rows, inputs, (int8_t*)(quantized + place * quantized_size)}};
    if (!norm && matrix.panels) return result;
    const auto [first, last] = by_each ? Range{0, rows} : share_of_thread(rows);
    for (int64_t row = first; row < last; row++) {
      if (norm) normalize(*norm, from + row * inputs, to + row * inputs);
      if (!matrix.panels)
        for (int64_t group = 0; group < inputs / GROUP; group++)
          result.quantized.quantize(result.x, row * (inputs / GROUP) + group);
    }
    if (!by_each) wait();
    return result;
  }

  // Calls put(row, output, sums) for outputs 16 · from to 16 · to, for all rows, 16 outputs
  // of one row at a time.
  template <typename Put>
  static void multiply(const Matrix& matrix, const Activations<T>& x, int64_t from, int64_t to,
                       const Put& put) {
    const T* bias = (const T*)matrix.bias;
    if (matrix.panels) {
      const Panels<T> weights{(const int32_t*)matrix.panels, bias, matrix.inputs, matrix.outputs};
      return multiply_panels(x.x, x.rows, weights, from, to, put);
    }
    const IntegerRows rows = x.quantized.rows();
    int64_t start = 0;  // the block that a segment begins with
    for (const Segment& segment : matrix.segments) {
      const int64_t end = start + blocks_of(segment.outputs);
      const int64_t first = std::max(from, start), last = std::min(to, end);
      if (first < last) {
        const BlockProducts products = block_products(segment.format, PARTS<T>);
        const int64_t block_bytes = matrix.inputs / products.unit * products.unit_bytes;
        for (int64_t block = first; block < last; block++)
          multiply_by_block(products, rows,
                            (const uint8_t*)segment.weights + (block - start) * block_bytes, bias,
                            x.rows, block * BLOCK, matrix.outputs, put);
      }
      start = end;
    }
  }

  // The same for this thread's share of all outputs.
  template <typename Put>
  static void multiply(const Matrix& matrix, const Activations<T>& x, const Put& put) {
    const auto [from, to] = share_of_thread(blocks_of(matrix.outputs));
    multiply(matrix, x, from, to, put);
  }

  // to (rows, width) += the product, normalized if there is a norm.
  void add(const Matrix& matrix, const Activations<T>& from, const Norm& norm, T* to) const {
    const int64_t width = model.width;
    T* const sum_of = norm.weight ? added : to;
    multiply(matrix, from, [&](int64_t row, int64_t output, Floats sums) {
      T* at = sum_of + row * width + output;
      store(at, norm.weight ? sums : load(at) + rounded_as(at, sums));
    });
    wait();
    if (!norm.weight) return;
    const auto [first, last] = share_of_thread(from.rows);
    for (int64_t row = first; row < last; row++) {
      T *more = added + row * width, *stream = to + row * width;
      normalize(norm, more, more);
      for (int64_t i = 0; i < width; i += 16) store(stream + i, load(stream + i) + load(more + i));
    }
    wait();
  }

  void attend(const Layer& layer, int64_t index) const {
    const int64_t outputs = layer.qkv.outputs;
    multiply(layer.qkv, prepare(&layer.attention_norm, x, pass.tokens, layer.qkv),
             [&](int64_t row, int64_t output, Floats sums) {
               store_first(qkv + row * outputs + output, outputs - output, sums);
             });
    wait();
    const Blocks<T> blocks{pass.places.slabs,     pass.places.slab_bits,
                           2 * index * pass.half, (2 * index + 1) * pass.half,
                           model.kv_heads,        size};
    const auto [from, to] = share_of_thread(pass.tokens);
    for (int64_t token = from; token < to; token++) {
      T* head = qkv + token * outputs;
      for (int64_t i = 0; i < model.heads + model.kv_heads; i++, head += size) {
        const Norm& norm = i < model.heads ? layer.query_norm : layer.key_norm;
        if (norm.weight) normalize(norm, head, head);
        if (pass.angles && layer.rope) {
          const T* cosines = (const T*)pass.table +
                             (2 * (layer.rope - 1) * pass.angles + pass.positions[token]) * size;
          rotate_head(head, cosines, cosines + pass.angles * size, head, size);
        }
      }
      store_token(plan, blocks, qkv, token);
    }
    wait();
    attend_to_blocks(layer.window && window_plan ? *window_plan : plan, blocks, qkv, y, partial);
  }

  // act = the activations of the MLP's first layer.
  void read_mlp(const Layer& layer, const Activations<T>& from) const {
    const int64_t width = layer.down.inputs, panels = width / PANEL;
    if (model.activation == GELU)
      return multiply(layer.up, from, [&](int64_t row, int64_t output, Floats sums) {
        T* to = act + row * width + output;
        store(to, sums);
        gelu_row<false, T>(to, nullptr, to, PANEL);
      });
    T* const gates_here = (T*)(gates + omp_get_thread_num() * gate_size);
    const auto [first, last] = share_of_thread(panels);
    for (int64_t panel = first; panel < last; panel += PANELS) {
      const int64_t end = std::min(panel + PANELS, last), start = panel * PANEL;
      const auto gate = [&](int64_t row, int64_t output) {
        return gates_here + row * PANELS * PANEL + output - start;
      };
      multiply(layer.up, from, panel, end,
               [&](int64_t row, int64_t output, Floats sums) { store(gate(row, output), sums); });
      multiply(layer.up, from, panels + panel, panels + end,
               [&](int64_t row, int64_t output, Floats sums) {
                 alignas(64) T up[PANEL];
                 store(up, sums);
                 output -= width;
                 T *from_gate = gate(row, output), *to = act + row * width + output;
                 if (model.activation == SWIGLU) return swiglu_row(from_gate, up, to, PANEL);
                 gelu_row<false, T>(from_gate, nullptr, from_gate, PANEL);
                 store(to, load(from_gate) * load(up));
               });
    }
  }

  void keep(const T* from, int64_t rows, int64_t kept) const {
    const auto [first, last] = share_of_thread(pass.wants_some() ? pass.wanted_count : rows);
    for (int64_t row = first; row < last; row++)
      std::memcpy(
          (T*)pass.states + (row * (1 + pass.kept_count) + 1 + kept) * model.width,
          from + (rows == pass.tokens && pass.wants_some() ? pass.wanted[row] : row) * model.width,
          model.width * sizeof(T));
  }

  // wanted_x and wanted_y = the rows of x and y that are asked of.
  void take_wanted() const {
    const auto [first, last] = share_of_thread(pass.wanted_count);
    for (int64_t row = first; row < last; row++) {
      const int64_t token = pass.wanted[row], heads = model.heads * size;
      std::memcpy(wanted_x + row * model.width, x + token * model.width, model.width * sizeof(T));
      std::memcpy(wanted_y + row * heads, y + token * heads, heads * sizeof(T));
    }
    wait();
  }
};

// Reads the tokens of a pass.
template <typename T>
void walk(const Model& model, const Pass& pass) {
  pass.check(model);
  Walk<T> walk(model, pass);
#pragma omp parallel
  walk.run();
}

}  // namespace
