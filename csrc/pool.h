// A small thread pool: `parallel_for(tasks, threads, f)` calls f(task, worker) once for each task.
//
// The threads are those of torch's OpenMP where there is one, else our own. No OpenMP is linked: a
// second copy of it would mean a second pool, and macOS's compiler has none. The number of threads
// is an argument: callers pass torch.get_num_threads(). Which worker runs which task is not
// deterministic, so results must depend on the task alone.
#pragma once
#include <cstdint>

namespace fastsae {

using TaskFn = void (*)(void* context, int64_t task, int worker);

// Runs tasks 0..n_tasks-1 on at most `threads` threads (the caller is worker 0) and waits for them.
// What a task throws ends the others early and is thrown again here.
// While another Python thread holds the pool, the caller does its tasks alone.
void run_tasks(int64_t n_tasks, int threads, TaskFn fn, void* context);

template <class F>
void parallel_for(int64_t n_tasks, int threads, F&& f) {
  run_tasks(
      n_tasks, threads,
      [](void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); },
      &f);
}

// The bounds of part `i` of `parts` equal parts of 0..n.
struct Range {
  int64_t begin, end;
};
inline Range part(int64_t n, int64_t parts, int64_t i) {
  return {n * i / parts, n * (i + 1) / parts};
}

}  // namespace fastsae
