// encode_columns: for each latent i its budgets[i] largest positive h[n,i], as rows of tokens. What
// encode does for tokens, with the roles of tokens and latents swapped: a task is a chunk of
// latents, which all blocks of tokens pass by; every latent has a buffer and a threshold.
#include "encode.h"
#include "pairs.h"
#include "select.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

class Columns : public Tasks {
 public:
  Columns(const ColumnArgs& args, const Exact& e)
      : Tasks(smaller((args.f + R - 1) / R, larger(4 * args.threads, args.f / CHUNK))),
        found(n_tasks()),
        a(args),
        exact(e),
        plan(a, e.s, 1) {}

  PairLists found;  // of each task

  template <class Screen>
  void task(const Screener<Screen>& screener, int64_t task, int worker) {
    const Range groups = part(plan.n_groups, n_tasks(), task);
    const int64_t first = groups.begin * R, end = smaller(groups.end * R, a.f);
    Chunk chunk(*this, first, end, patience<Screen>(double(a.n) * (end - first)));
    for (int64_t block = 0; block < plan.n_blocks && chunk.patience >= 0; ++block)
      screener.template sweep<PLAIN>(groups, plan.panels(block), worker, chunk);
    if (chunk.patience < 0) return;
    for (int64_t i = first; i < end; ++i) chunk.emit(i, found.lists[task]);
    set_done(task);
  }

 private:
  static constexpr int64_t CHUNK = 256;  // latents

  int64_t budget(int64_t i) const { return smaller(a.budgets[i], a.n); }
  int64_t capacity(int64_t i) const { return smaller(a.n + 1, 2 * larger(1, budget(i)) + 32); }
  int64_t words(int64_t first, int64_t end) const {
    int64_t sum = 0;
    for (int64_t i = first; i < end; ++i) sum += capacity(i);
    return sum * Candidates::WORDS;
  }
  int64_t largest_capacity(int64_t first, int64_t end) const {
    int64_t most = 0;
    for (int64_t i = first; i < end; ++i) most = larger(most, capacity(i));
    return most;
  }

  struct Chunk {  // the sink of one task
    Columns& all;
    const int64_t first;
    int64_t patience;  // how many pairs more to score while screening
    Buffer<float> memory;
    Buffer<int64_t> starts, counts;
    Buffer<float> latent_thresholds;
    Buffer<uint64_t> keys;

    Chunk(Columns& columns, int64_t begin, int64_t end, int64_t patience)
        : all(columns),
          first(begin),
          patience(patience),
          memory(all.words(begin, end)),
          starts(end - begin),
          counts(end - begin),
          latent_thresholds(end - begin),
          keys(2 * all.largest_capacity(begin, end)) {
      int64_t start = 0;
      for (int64_t i = 0; i < end - begin; ++i) {
        starts.data[i] = start;
        start += all.capacity(begin + i) * Candidates::WORDS;
        counts.data[i] = 0;
        // Only positive values are kept; for a latent without a budget, only what may overflow.
        latent_thresholds.data[i] = all.budget(begin + i) > 0 ? 0x1p-149f : INFINITY;
      }
    }

    Candidates of(int64_t i) const {
      return {memory.data + starts.data[i - first], all.capacity(i)};
    }
    bool start(int64_t) const { return patience >= 0; }
    FASTSAE_INLINE int thresholds(int64_t) const { return 0; }
    FASTSAE_INLINE vec accepts(int, int64_t i) const {
      return splat(latent_thresholds.data[i - first]);
    }

    void hit(int64_t n, int64_t i, float lower, float upper) {
      const Candidates c = of(i);
      int64_t& count = counts.data[i - first];
      c.lower[count] = lower;
      c.upper[count] = upper;
      c.id[count] = static_cast<int32_t>(n);
      if (++count < all.capacity(i)) return;
      const int64_t k = larger(1, all.budget(i));
      float& threshold = latent_thresholds.data[i - first];
      threshold = raised(c.lower, count, k, threshold);
      count = drop_below(c, count, threshold);
      if (count <= k + (all.capacity(i) - k) / 2) return;
      patience -= count;
      score(i, c, count);
      const float lowest = keep_largest(c, count, k, keys.data);
      if (lowest > threshold) threshold = lowest;
    }

    void score(int64_t i, const Candidates& c, int64_t count) const {
      for (int64_t j = 0; j < count; ++j)
        if (c.lower[j] != c.upper[j]) c.lower[j] = c.upper[j] = all.exact.value(c.id[j], i);
    }

    void emit(int64_t i, PairList& found) const {
      const Candidates c = of(i);
      const int64_t k = all.budget(i), threshold_k = larger(1, k);
      int64_t count = counts.data[i - first];
      count = drop_below(c, count, raised(c.lower, count, threshold_k, 0x1p-149f));
      score(i, c, count);
      if (k == 0) return;
      keep_largest(c, count, k, keys.data);
      for (int64_t j = 0; j < count; ++j)
        if (c.lower[j] > 0 &&
            !found.push({c.id[j], static_cast<int32_t>(i), c.lower[j], c.lower[j]}))
          all.exact.failure.set(NonFinite::NO_MEMORY, -1, -1);
    }
  };

  const ColumnArgs& a;
  const Exact& exact;
  const Plan plan;
};

}  // namespace

NonFinite encode_columns(const ColumnArgs& a) {
  Failure failure;
  const Score score{};
  const Exact exact(a, score, failure);
  Columns op(a, exact);
  if (run_screens(exact, op)) write_rows(op.found, a.n, a.f, a.out, a.threads);
  return failure.found;
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
