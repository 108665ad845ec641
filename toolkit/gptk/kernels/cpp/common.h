// What all of gptk's kernels use: vectors, memory for a call, and what a call returns.
//
// Numbers in memory are float32, or bfloat16 held as uint16_t; sums are float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "openmp.h"
#include "vectors.h"

// Runs a statement with the type T set to uint16_t (bfloat16) or float.
#define DISPATCH_DTYPE(is_bfloat16, ...) \
  if (is_bfloat16) {                     \
    using T = uint16_t;                  \
    __VA_ARGS__;                         \
  } else {                               \
    using T = float;                     \
    __VA_ARGS__;                         \
  }

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 15;  // numbers; with fewer a second thread does not pay

// What an exported function returns; Python raises an exception for all but OK, see
// kernels/door.py.
enum Status : int32_t {
  OK = 0,
  OUT_OF_MEMORY = 1,
  // An argument with a number out of range.
  BAD_CODES = 2,
  BAD_TARGETS = 3,
  BAD_SEQUENCES = 4,
  BAD_TABLES = 5,
  BAD_POSITIONS = 6,
  BAD_WANTED = 7,
  BAD_KEPT = 8,
  BAD_OUTPUTS = 9,
};

// Throws what `status_of` returns unless a condition holds.
inline void require(bool condition, Status otherwise) {
  if (!condition) throw otherwise;
}

// Runs a kernel. Kernels take memory, and throw, outside of parallel regions only: an exception
// that leaves one ends the process.
template <typename Run>
int32_t status_of(const Run& run) {
  try {
    run();
    return OK;
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  } catch (const std::length_error&) {  // of a std::vector
    return OUT_OF_MEMORY;
  } catch (Status status) {
    return status;
  }
}

// `count`, rounded up to a multiple of `unit`.
inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Numbers `from` to `to`, without `to`.
struct Range {
  int64_t from, to;
};

// The part of 0 to `count` that this thread of a parallel region has.
inline Range share_of_thread(int64_t count) {
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Memory for the intermediate numbers of a call, uninitialized, from the start of a cache line on.
// It is for numbers and structs of these: no constructors run.
template <typename T>
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t count) { reserve(count); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data); }

  // Makes it hold at least `count`; what it held is lost. Throws std::bad_alloc.
  void reserve(int64_t count) {
    if (count <= capacity) return;
    std::free(data);
    capacity = 0;
    data = (T*)std::aligned_alloc(64, round_up(count * sizeof(T), 64));
    if (!data) throw std::bad_alloc();
    capacity = count;
  }
  T* get() const { return data; }
  T& operator[](int64_t index) const { return data[index]; }

 private:
  T* data = nullptr;
  int64_t capacity = 0;
};

}  // namespace
