// A program that calls kernels for a test in another process, perhaps on an emulated processor.
//
// A request on stdin is the name of an exported function in a line, and then its arguments: numbers
// as they are in memory, and for a pointer the count of its bytes as int64, -1 for null, and the
// bytes. The answer on stdout is the status, then for each pointer that is not const the index of
// the argument as int64 and the bytes, and then -1. A tensor begins at a multiple of 64 bytes, and
// is followed by memory that must not be written.

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "attention.cpp"
#include "formats.cpp"
#include "kernels.cpp"
#include "walk.cpp"

// It is compiled without OpenMP, whose functions these are for one thread.
extern "C" {
int omp_get_max_threads(void) { return 1; }
int omp_get_num_threads(void) { return 1; }
int omp_get_thread_num(void) { return 0; }
}

namespace {

constexpr unsigned char CANARY = 0xa5;

void read_bytes(void* to, size_t count) {
  if (count && fread(to, 1, count, stdin) != count) exit(3);
}

void write_bytes(const void* from, size_t count) {
  if (count && fwrite(from, 1, count, stdout) != count) exit(4);
}

// An argument of a type that is no pointer, read from a stream.
template <typename T>
struct Argument {
  T value;

  explicit Argument(FILE*) { read_bytes(&value, sizeof value); }
  void answer(int64_t) const {}
};

template <typename T>
struct Argument<T*> {
  int64_t count;
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, std::free};
  T* value = nullptr;

  explicit Argument(FILE*) {
    read_bytes(&count, sizeof count);
    if (count < 0) return;
    memory.reset((unsigned char*)std::aligned_alloc(64, round_up(count + 64, 64)));
    std::memset(memory.get(), CANARY, round_up(count + 64, 64));
    read_bytes(memory.get(), count);
    value = (T*)memory.get();
  }
  void answer(int64_t index) const {
    if (!value) return;
    for (int64_t i = count; i < round_up(count + 64, 64); i++)
      if (memory.get()[i] != CANARY) exit(5);
    if (std::is_const<T>::value) return;
    write_bytes(&index, sizeof index);
    write_bytes(value, count);
  }
};

template <typename... Types>
void serve(int32_t (*function)(Types...)) {
  // In braces, so that they are read from the first to the last.
  std::tuple<Argument<Types>...> arguments{Argument<Types>(stdin)...};
  std::apply(
      [&](auto&... argument) {
        const int32_t status = function(argument.value...);
        write_bytes(&status, sizeof status);
        int64_t index = 0;
        (argument.answer(index++), ...);
        index = -1;
        write_bytes(&index, sizeof index);
      },
      arguments);
  fflush(stdout);
}

}  // namespace

// gptk_attend_blocks with all blocks in one slab, which is among the tensors.
int32_t attend_blocks_in_slab(int64_t is_bfloat16, const void* qkv, void* y,
                              const int64_t* sequences, const int32_t* tables, void* slab,
                              int64_t tokens, int64_t count, int64_t entries, int64_t slab_count,
                              int64_t slab_bits, int64_t heads, int64_t kv_heads, int64_t size,
                              int64_t keys_from, int64_t values_from, int64_t window) {
  const int64_t slabs[1] = {(int64_t)slab};
  return gptk_attend_blocks(is_bfloat16, qkv, y, sequences, tables, slabs, tokens, count, entries,
                            slab_count, slab_bits, heads, kv_heads, size, keys_from, values_from,
                            window);
}

// gptk_pack_stored with the blocks of all outputs in one tensor, row_bytes apart.
int32_t pack_rows(int64_t format, const uint8_t* blocks, int64_t row_bytes, void* weights,
                  int64_t outputs, int64_t inputs) {
  std::vector<const uint8_t*> rows(outputs);
  for (int64_t i = 0; i < outputs; i++) rows[i] = blocks + i * row_bytes;
  return gptk_pack_stored(format, rows.data(), weights, outputs, inputs);
}

#define KERNEL(name) {#name, [] { serve(name); }}

int main() {
  const std::map<std::string, void (*)()> kernels = {
      KERNEL(gptk_quantized_linear),
      KERNEL(gptk_linear),
      KERNEL(gptk_pack),
      KERNEL(gptk_dequantize),
      KERNEL(gptk_dequantize_packed),
      KERNEL(gptk_dequantize_rows),
      KERNEL(pack_rows),
      KERNEL(gptk_product),
      KERNEL(gptk_rms_norm),
      KERNEL(gptk_swiglu),
      KERNEL(gptk_gelu),
      KERNEL(gptk_rotate),
      KERNEL(gptk_exponential),
      KERNEL(gptk_softmax_sums),
      KERNEL(gptk_last_key),
      KERNEL(gptk_keep_from),
      KERNEL(gptk_top),
      KERNEL(gptk_draw),
      KERNEL(gptk_column_sums),
      KERNEL(gptk_cross_entropy),
      KERNEL(gptk_permutation),
      KERNEL(gptk_attend),
      KERNEL(gptk_attend_causally),
      KERNEL(gptk_attend_causally_backward),
      KERNEL(attend_blocks_in_slab),
      KERNEL(gptk_layer_norm),
      KERNEL(gptk_linear_in_panels),
      KERNEL(gptk_to_panels),
      KERNEL(gptk_from_panels),
  };
  char line[64];
  while (fgets(line, sizeof line, stdin)) {
    line[std::strcspn(line, "\n")] = 0;
    const auto found = kernels.find(line);
    if (found == kernels.end()) return 2;
    found->second();
  }
}
