// What clang calls for OpenMP's directives, by means of GNU's OpenMP library.
//
// PyTorch has GNU's on Linux, whose functions clang does not call; its own library would start
// threads beside PyTorch's. These are the functions of LLVM's interface (openmp/runtime/src/kmp.h)
// that the kernels' directives come to: parallel regions, loops with a static or dynamic schedule,
// barriers, and reductions. On macOS PyTorch has LLVM's library.
#if defined(__clang__) && defined(__linux__)

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <utility>

#include "openmp.h"

extern "C" {
void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
void GOMP_critical_start(void);
void GOMP_critical_end(void);
bool GOMP_loop_dynamic_start(long start, long end, long step, long chunk, long* from, long* to);
bool GOMP_loop_dynamic_next(long* from, long* to);
void GOMP_loop_end_nowait(void);
}

namespace {

struct Location;  // where in the source

constexpr int MOST_ARGUMENTS = 32;

struct Region {
  void (*function)(...);
  int32_t count;
  void* arguments[MOST_ARGUMENTS];
};

// In a region that is not parallel, as its `if` is false: how many of them contain each other.
thread_local int serialized = 0;

int32_t thread_number() { return serialized ? 0 : omp_get_thread_num(); }
int64_t thread_count() { return serialized ? 1 : omp_get_num_threads(); }

template <size_t... i>
void call(const Region& region, int32_t* thread, std::index_sequence<i...>) {
  int32_t bound = 0;
  // The function takes `count` arguments after the first two, and does not read the others.
  using Function = void (*)(int32_t*, int32_t*, decltype((void)i, (void*)nullptr)...);
  ((Function)region.function)(thread, &bound, region.arguments[i]...);
}

void run_region(void* data) {
  int32_t thread = omp_get_thread_num();
  call(*(const Region*)data, &thread, std::make_index_sequence<MOST_ARGUMENTS>());
}

// The part of a loop from *from to *to, the last one included, that the thread gets.
template <typename Index, typename Step>
void take_part(int32_t* last, Index* from, Index* to, Step* stride, Step step) {
  const int64_t begin = (int64_t)*from, end = (int64_t)*to;
  const int64_t count = std::max<int64_t>((end - begin + step) / step, 0);
  const int64_t threads = thread_count(), thread = thread_number();
  const int64_t each = count / threads, rest = count % threads;
  const int64_t first = thread * each + std::min(thread, rest);
  const int64_t part = each + (thread < rest);
  *from = (Index)(begin + first * step);
  *to = (Index)(begin + (first + part - 1) * step);
  *stride = (Step)(count * step);
  *last = part > 0 && first + part == count;
}

// A loop with a dynamic schedule that the thread is in.
struct DynamicLoop {
  int64_t from, to, step, chunk;
  bool started;
};
thread_local DynamicLoop loop;

}  // namespace

extern "C" {

int32_t __kmpc_global_thread_num(Location*) { return thread_number(); }

void __kmpc_fork_call(Location*, int32_t count, void (*function)(...), ...) {
  Region region{function, count, {}};
  if (count > MOST_ARGUMENTS) std::abort();
  va_list arguments;
  va_start(arguments, function);
  for (int i = 0; i < count; i++) region.arguments[i] = va_arg(arguments, void*);
  va_end(arguments);
  GOMP_parallel(run_region, &region, 0, 0);
}

void __kmpc_serialized_parallel(Location*, int32_t) { serialized++; }
void __kmpc_end_serialized_parallel(Location*, int32_t) { serialized--; }

void __kmpc_barrier(Location*, int32_t) {
  if (!serialized) GOMP_barrier();
}

void __kmpc_for_static_init_8(Location*, int32_t, int32_t, int32_t* last, int64_t* from,
                              int64_t* to, int64_t* stride, int64_t step, int64_t) {
  take_part(last, from, to, stride, step);
}

void __kmpc_for_static_init_8u(Location*, int32_t, int32_t, int32_t* last, uint64_t* from,
                               uint64_t* to, int64_t* stride, int64_t step, int64_t) {
  take_part(last, from, to, stride, step);
}

void __kmpc_for_static_init_4(Location*, int32_t, int32_t, int32_t* last, int32_t* from,
                              int32_t* to, int32_t* stride, int32_t step, int32_t) {
  take_part(last, from, to, stride, step);
}

void __kmpc_for_static_init_4u(Location*, int32_t, int32_t, int32_t* last, uint32_t* from,
                               uint32_t* to, int32_t* stride, int32_t step, int32_t) {
  take_part(last, from, to, stride, step);
}

void __kmpc_for_static_fini(Location*, int32_t) {}

void __kmpc_dispatch_init_8(Location*, int32_t, int32_t, int64_t from, int64_t to, int64_t step,
                            int64_t chunk) {
  loop = {from, to + 1, step, std::max<int64_t>(chunk, 1), false};
}

// The next part of a loop, the last one included; 0 if there is none left.
int32_t __kmpc_dispatch_next_8(Location*, int32_t, int32_t* last, int64_t* from, int64_t* to,
                               int64_t* stride) {
  bool found;
  long begin = loop.from, end = loop.to;
  if (serialized)
    found = !loop.started && begin < end;
  else if (loop.started)
    found = GOMP_loop_dynamic_next(&begin, &end);
  else
    found = GOMP_loop_dynamic_start(loop.from, loop.to, loop.step, loop.chunk, &begin, &end);
  loop.started = true;
  if (!found) {
    if (!serialized) GOMP_loop_end_nowait();
    return 0;
  }
  *from = begin;
  *to = end - 1;
  *stride = loop.step;
  *last = end == loop.to;
  return 1;
}

void __kmpc_dispatch_deinit(Location*, int32_t) {}

// 1: the thread adds its part, and calls __kmpc_end_reduce(_nowait).
int32_t __kmpc_reduce(Location*, int32_t, int32_t, size_t, void*, void (*)(void*, void*), void*) {
  if (!serialized) GOMP_critical_start();
  return 1;
}

void __kmpc_end_reduce(Location*, int32_t, void*) {
  if (serialized) return;
  GOMP_critical_end();
  GOMP_barrier();
}

int32_t __kmpc_reduce_nowait(Location*, int32_t, int32_t, size_t, void*, void (*)(void*, void*),
                             void*) {
  if (!serialized) GOMP_critical_start();
  return 1;
}

void __kmpc_end_reduce_nowait(Location*, int32_t, void*) {
  if (!serialized) GOMP_critical_end();
}
}
#endif
