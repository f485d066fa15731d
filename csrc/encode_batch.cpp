// encode_batch: the `budget` pairs of the whole batch with the largest positive score, as rows of
// tokens.
//
// All threads share one pool of candidates and one threshold below which no pair is selected: close
// below the budget-th largest lower bound seen so far. A thread collects hits and brings them to
// the pool together; when the pool is full the threshold rises and pairs fall out, and when too many
// remain within the margin they are scored exactly, which always leaves `budget`. So memory is
// O(budget), and no result depends on timing: the threshold only drops what cannot be selected.
#include <pthread.h>

#include "encode.h"
#include "pairs.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

float from_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// A threshold above 0 that at least k of n scores or lower bounds reach: the k-th largest, or where
// more than k may reach it, one close below. `low`, the least there is, where fewer than k reach it.
float kth_largest(const float* v, int64_t n, int64_t k, float low, int64_t more) {
  if (n < k || count_at_least(v, n, low) < k) return low;
  uint32_t least, beyond = 0x7f800001;  // infinity is a score too
  std::memcpy(&least, &low, sizeof least);
  while (beyond - least > 1) {
    const uint32_t middle = least + (beyond - least) / 2;
    const int64_t count = count_at_least(v, n, from_bits(middle));
    (count < k ? beyond : least) = middle;
    if (count >= k && count <= k + more) break;
  }
  return from_bits(least);
}

// The k-th smallest of n distinct numbers below 2^62.
int64_t kth_smallest(const int64_t* v, int64_t n, int64_t k) {
  int64_t low = 0, high = int64_t{1} << 62;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += v[i] <= middle;
    if (count < k)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

struct Lock {
  explicit Lock(pthread_mutex_t& m) : mutex(m) { pthread_mutex_lock(&mutex); }
  ~Lock() { pthread_mutex_unlock(&mutex); }
  pthread_mutex_t& mutex;
};

class Pool {
 public:
  Pool(int64_t k, int64_t n_pairs, const Exact& e)
      : budget(k),
        capacity(smaller(n_pairs, 2 * k + BATCH) + BATCH),
        exact(e),
        lower(capacity),
        upper(capacity),
        value(capacity),
        token(capacity),
        latent(capacity) {}
  ~Pool() { pthread_mutex_destroy(&mutex); }

  static constexpr int64_t BATCH = 4096;  // the most that a thread brings at once

  FASTSAE_INLINE float threshold() const {
    float t;
    __atomic_load(&threshold_, &t, __ATOMIC_RELAXED);
    return t;
  }
  int64_t scored() const { return __atomic_load_n(&scored_, __ATOMIC_RELAXED); }
  void clear() { count = scored_ = 0; }

  struct Hits {
    float lower[BATCH], upper[BATCH];
    int32_t token[BATCH], latent[BATCH];
    int64_t count;
  };
  void take(Hits& hits) {
    const Lock lock(mutex);
    if (count + hits.count > capacity) make_room();
    const float least = threshold();
    for (int64_t i = 0; i < hits.count; ++i) {
      lower.data[count] = hits.lower[i];
      upper.data[count] = hits.upper[i];
      value.data[count] = NAN;
      token.data[count] = hits.token[i];
      latent.data[count] = hits.latent[i];
      count += hits.upper[i] >= least;
    }
    hits.count = 0;
  }

  // The selected pairs; once, after all have been taken.
  void finish(PairList& out, int threads) {
    raise_threshold();
    drop();
    score(threads);
    keep_budget();
    for (int64_t i = 0; i < count; ++i)
      if (lower.data[i] > 0 &&
          !out.push({token.data[i], latent.data[i], lower.data[i], value.data[i]}))
        throw std::bad_alloc();
  }

 private:
  const int64_t budget, capacity;
  const Exact& exact;
  Buffer<float> lower, upper;
  Buffer<float> value;  // NaN until scored; lower and upper are then the score
  Buffer<int32_t> token, latent;
  int64_t count = 0, scored_ = 0;
  float threshold_ = 0x1p-149f;  // only positive scores are kept
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

  void raise_to(float t) {
    if (t > threshold_) __atomic_store(&threshold_, &t, __ATOMIC_RELAXED);
  }
  void raise_threshold() {
    raise_to(kth_largest(lower.data, count, budget, threshold_, budget / 16));
  }

  template <class Keep>
  void keep(Keep&& wanted) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool stays = wanted(i);
      lower.data[kept] = lower.data[i];
      upper.data[kept] = upper.data[i];
      value.data[kept] = value.data[i];
      token.data[kept] = token.data[i];
      latent.data[kept] = latent.data[i];
      kept += stays;
    }
    count = kept;
  }
  void drop() {
    const float least = threshold_;
    keep([&](int64_t i) { return upper.data[i] >= least; });
  }

  void make_room() {
    raise_threshold();
    drop();
    if (count <= budget + (capacity - BATCH - budget) / 2) return;
    __atomic_store_n(&scored_, scored_ + count, __ATOMIC_RELAXED);
    score(1);
    keep_budget();
  }

  void score(int threads) {
    constexpr int64_t SOME = 256;
    parallel_for((count + SOME - 1) / SOME, threads, [&](int64_t task, int) {
      const int64_t end = smaller(count, (task + 1) * SOME);
      for (int64_t i = task * SOME; i < end; ++i) {
        if (!std::isnan(value.data[i])) continue;
        if (i + 1 < end) exact.prefetch(latent.data[i + 1]);
        const auto pair = exact.scored(token.data[i], latent.data[i]);
        value.data[i] = pair.value;
        lower.data[i] = upper.data[i] = pair.score;
      }
    });
  }

  // Of scored pairs; equal scores by token, then latent, ascending.
  void keep_budget() {
    if (count <= budget) return;
    raise_to(kth_largest(lower.data, count, budget, threshold_, 0));
    drop();
    if (count <= budget) return;
    const float last = threshold_;
    Buffer<int64_t> places(count);
    int64_t equal = 0;
    for (int64_t i = 0; i < count; ++i)
      if (lower.data[i] == last) places.data[equal++] = place(i);
    const int64_t end = kth_smallest(places.data, equal, budget - (count - equal));
    keep([&](int64_t i) { return lower.data[i] > last || place(i) <= end; });
  }
  int64_t place(int64_t i) const { return int64_t{token.data[i]} << 31 | latent.data[i]; }
};

template <Form FORM>
class Batch : public Tasks {
 public:
  Batch(const BatchArgs& args, const Exact& e) : Batch(args, e, Plan(args, args.score, 1)) {}

  void finish(PairList& out) { pool.finish(out, a.threads); }

  // Where the screen was too coarse, forgets all but the threshold.
  template <class Screen>
  bool finished() {
    for (int i = 0; i < a.threads; ++i) pool.take(hits.data[i]);
    const bool fine = pool.scored() <= patience<Screen>(double(a.n) * a.f);
    if (!fine) pool.clear();
    return fine;
  }

  template <class Screen>
  void task(const Screener<Screen>& screener, int64_t task, int worker) {
    Sink sink{pool, hits.data[worker], patience<Screen>(double(a.n) * a.f)};
    screener.template sweep<FORM>(plan.groups(task), plan.panels(task / plan.n_parts), worker,
                                  sink);
  }

 private:
  struct Sink {
    Pool& pool;
    Pool::Hits& hits;
    int64_t patience;  // how many pairs to score while screening

    bool start(int64_t) const { return pool.scored() <= patience; }
    FASTSAE_INLINE vec thresholds(int64_t) const { return splat(pool.threshold()); }
    FASTSAE_INLINE vec accepts(vec thresholds, int64_t) const { return thresholds; }
    void hit(int64_t n, int64_t i, float lower, float upper) {
      hits.lower[hits.count] = lower;
      hits.upper[hits.count] = upper;
      hits.token[hits.count] = static_cast<int32_t>(n);
      hits.latent[hits.count] = static_cast<int32_t>(i);
      if (++hits.count == Pool::BATCH) pool.take(hits);
    }
  };

  const BatchArgs& a;
  const Plan plan;
  Pool pool;
  Buffer<Pool::Hits> hits;

  Batch(const BatchArgs& args, const Exact& e, const Plan& p)
      : Tasks(p.n_tasks()), a(args), plan(p), pool(a.budget, a.n * a.f, e), hits(a.threads) {
    for (int i = 0; i < a.threads; ++i) hits.data[i].count = 0;
  }
};

template <Form FORM>
void batch_form(const BatchArgs& a, const Exact& exact, PairList& out) {
  Batch<FORM> op(a, exact);
  if (run_screens(exact, op)) op.finish(out);
}

}  // namespace

NonFinite encode_batch(const BatchArgs& a) {
  Failure failure;
  const Exact exact(a, a.score, failure);
  PairLists found(1);
  if (a.budget > 0 && a.n > 0 && a.f > 0) {
    if (exact.form() == PLAIN)
      batch_form<PLAIN>(a, exact, found.lists[0]);
    else
      batch_form<SCALED>(a, exact, found.lists[0]);
  }
  if (!failure.any()) write_rows(found, a.n, a.f, a.out, a.threads);
  return failure.found;
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
