// encode_threshold: all pairs with h[n,i] > thresholds[i], as rows of tokens. A pair that the screen
// cannot rule out is scored exactly at once, while its latent's row is in the cache. Memory: the
// pairs, and while they become rows up to 56 bytes for each.
#include "encode.h"
#include "pairs.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

class Thresholder : public Tasks {
 public:
  Thresholder(const ThresholdArgs& args, const Exact& e)
      : Thresholder(args, e, Plan(args, e.s, 1)) {}

  PairLists found;  // of each task

  bool too_many() const { return __atomic_load_n(&total, __ATOMIC_RELAXED) > a.limit; }

  template <class Screen>
  void task(const Screener<Screen>& screener, int64_t task, int worker) {
    const Range panels = plan.panels(task / plan.n_parts), groups = plan.groups(task);
    const double pairs = double(plan.block_tokens()) * (groups.end - groups.begin) * R;
    Sink sink{*this, found.lists[task], 0, patience<Screen>(pairs)};
    screener.template sweep<PLAIN>(groups, panels, worker, sink);
    if (sink.patience < 0) {
      __atomic_fetch_sub(&total, sink.counted, __ATOMIC_RELAXED);
      sink.list.count = 0;
    } else {
      sink.count();
      set_done(task);
    }
  }

 private:
  struct Sink {
    Thresholder& all;
    PairList& list;
    int64_t counted;   // of the list, in the total
    int64_t patience;  // how many pairs more to score in vain

    void count() {
      __atomic_fetch_add(&all.total, list.count - counted, __ATOMIC_RELAXED);
      counted = list.count;
    }
    bool start(int64_t) {
      count();
      return patience >= 0 && !all.too_many();
    }
    FASTSAE_INLINE int thresholds(int64_t) const { return 0; }
    FASTSAE_INLINE vec accepts(int, int64_t i) const { return splat(all.a.thresholds[i]); }

    void hit(int64_t n, int64_t i, float, float) {
      const float value = all.exact.value(n, i);
      if (!(value > all.a.thresholds[i]))
        --patience;
      else if (!list.push({static_cast<int32_t>(n), static_cast<int32_t>(i), value, value}))
        all.exact.failure.set(NonFinite::NO_MEMORY, -1, -1);
    }
  };

  const ThresholdArgs& a;
  const Exact& exact;
  const Plan plan;
  int64_t total = 0;

  Thresholder(const ThresholdArgs& args, const Exact& e, const Plan& p)
      : Tasks(p.n_tasks()), found(n_tasks()), a(args), exact(e), plan(p) {}
};

}  // namespace

NonFinite encode_threshold(const ThresholdArgs& a) {
  Failure failure;
  const Score score{};
  const Exact exact(a, score, failure);
  Thresholder op(a, exact);
  *a.too_many = false;
  if (!run_screens(exact, op)) return failure.found;
  *a.too_many = op.too_many();
  if (!*a.too_many)
    write_rows(op.found, a.n, a.f, a.allocate(a.context, op.found.n_pairs()), a.threads);
  return {};
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
