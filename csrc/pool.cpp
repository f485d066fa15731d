#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace fastsae {
namespace {

// One call of run_tasks: whoever takes part in it fetches tasks until none is left.
struct Job {
  TaskFn fn;
  void* context;
  int64_t n_tasks;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_worker{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr failure;  // the first that a task threw
  std::fenv_t
      env{};  // the caller's rounding and flush-to-zero modes: bits must not depend on the thread

  Job(TaskFn f, void* c, int64_t n) : fn(f), context(c), n_tasks(n) { std::fegetenv(&env); }

  void take_part() {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&env);
    const int worker = next_worker.fetch_add(1);
    try {
      for (int64_t task; (task = next_task.fetch_add(1)) < n_tasks;) fn(context, task, worker);
    } catch (...) {  // an exception must not leave a thread that the caller waits for
      next_task = n_tasks;
      if (!failed.test_and_set()) failure = std::current_exception();
    }
    std::fesetenv(&own);
  }
};

// torch's own OpenMP threads, where torch brought GNU OpenMP (or a library with its entry point)
// into the process: a second pool beside it would compete with its spinning threads for the same
// cores.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel() {
  static const auto f = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return f;
}

// Threads of our own, for processes without it.
struct Pool {
  std::mutex busy;  // held by the caller whose job the threads do
  std::mutex mutex;
  std::condition_variable wake, done;
  Job* job = nullptr;
  uint64_t generation = 0;  // one for each job
  int n_threads = 0, wanted = 0, running = 0;

  void loop(int id, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return generation != seen; });
      seen = generation;
      if (id > wanted) continue;
      Job* mine = job;
      lock.unlock();
      mine->take_part();
      lock.lock();
      if (--running == 0) done.notify_one();
    }
  }

  void run(Job& next, int threads) {
    std::unique_lock<std::mutex> alone(busy, std::try_to_lock);
    if (!alone) return next.take_part();
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (; n_threads < threads - 1; ++n_threads)
        std::thread(&Pool::loop, this, n_threads + 1, generation).detach();
      job = &next;
      wanted = running = threads - 1;
      ++generation;
    }
    wake.notify_all();
    next.take_part();
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return running == 0; });
  }
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them: it
// gets a new one.
Pool* pool = new Pool;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void run_tasks(int64_t n_tasks, int threads, TaskFn fn, void* context) {
  if (threads > n_tasks) threads = static_cast<int>(n_tasks);
  Job job(fn, context, n_tasks);
  if (threads <= 1)
    job.take_part();
  else if (gomp_parallel())
    gomp_parallel()([](void* j) { static_cast<Job*>(j)->take_part(); }, &job,
                    static_cast<unsigned>(threads), 0);
  else
    pool->run(job, threads);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace fastsae
