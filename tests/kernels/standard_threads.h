// OpenMP's functions by threads of C++, for ThreadSanitizer, which knows what these wait for and
// does not know what GNU's OpenMP does. Included before each source file of the kernels, see
// `make test-sanitized`. These are the functions that g++ calls for OpenMP's directives.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#define GPTK_OPENMP extern "C" __attribute__((used, weak, visibility("hidden")))

namespace standard_threads {

// A loop with a dynamic schedule: the threads take its parts in turn.
struct Loop {
  long next, end, step, chunk;
};

struct Team {
  unsigned size;
  std::mutex mutex;
  std::condition_variable arrived;
  unsigned waiting = 0;
  long barriers = 0;
  std::deque<Loop> loops;

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const long barrier = barriers;
    if (++waiting == size) {
      waiting = 0;
      barriers++;
      arrived.notify_all();
    }
    arrived.wait(lock, [&] { return barriers != barrier; });
  }
};

inline thread_local Team* team = nullptr;
inline thread_local int number = 0;
inline thread_local size_t loops = 0;  // that the thread has begun
inline std::recursive_mutex critical;

inline unsigned most_threads() {
  const char* threads = std::getenv("GPTK_TEST_THREADS");
  return threads ? (unsigned)std::atoi(threads) : 3;
}

inline void run(Team* in, int as, void (*region)(void*), void* data) {
  Team* const team_before = team;
  const int number_before = number;
  const size_t loops_before = loops;
  team = in;
  number = as;
  loops = 0;
  region(data);
  team = team_before;
  number = number_before;
  loops = loops_before;
}

inline bool take(long* from, long* to) {
  std::unique_lock<std::mutex> lock(team->mutex);
  Loop& loop = team->loops[loops - 1];
  if (loop.next >= loop.end) return false;
  *from = loop.next;
  *to = loop.next = std::min(loop.end, loop.next + loop.step * loop.chunk);
  return true;
}

inline bool start(long begin, long end, long step, long chunk, long* from, long* to) {
  {
    std::unique_lock<std::mutex> lock(team->mutex);
    if (team->loops.size() == loops++) team->loops.push_back({begin, end, step, chunk});
  }
  return take(from, to);
}

}  // namespace standard_threads

GPTK_OPENMP void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned) {
  using namespace standard_threads;
  if (team) threads = 1;  // within another region
  Team own{threads ? threads : most_threads(), {}, {}, 0, 0, {}};
  std::vector<std::thread> others;
  for (unsigned i = 1; i < own.size; i++) others.emplace_back(run, &own, i, region, data);
  run(&own, 0, region, data);
  for (std::thread& other : others) other.join();
}

GPTK_OPENMP void GOMP_barrier(void) {
  if (standard_threads::team) standard_threads::team->wait();
}

GPTK_OPENMP bool GOMP_loop_dynamic_start(long begin, long end, long step, long chunk, long* from,
                                         long* to) {
  return standard_threads::start(begin, end, step, chunk, from, to);
}
GPTK_OPENMP bool GOMP_loop_dynamic_next(long* from, long* to) {
  return standard_threads::take(from, to);
}
GPTK_OPENMP bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk,
                                                      long* from, long* to) {
  return standard_threads::start(begin, end, step, chunk, from, to);
}
GPTK_OPENMP bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) {
  return standard_threads::take(from, to);
}
GPTK_OPENMP void GOMP_loop_end_nowait(void) {}
GPTK_OPENMP void GOMP_loop_end(void) { GOMP_barrier(); }
GPTK_OPENMP void GOMP_critical_start(void) { standard_threads::critical.lock(); }
GPTK_OPENMP void GOMP_critical_end(void) { standard_threads::critical.unlock(); }
GPTK_OPENMP void GOMP_atomic_start(void) { standard_threads::critical.lock(); }
GPTK_OPENMP void GOMP_atomic_end(void) { standard_threads::critical.unlock(); }

GPTK_OPENMP int omp_get_max_threads(void) { return (int)standard_threads::most_threads(); }
GPTK_OPENMP int omp_get_num_threads(void) {
  return standard_threads::team ? (int)standard_threads::team->size : 1;
}
GPTK_OPENMP int omp_get_thread_num(void) { return standard_threads::number; }
