// encode: vals, idx = the k pairs of each token with the largest positive score, in the order
// (score descending, latent ascending), without an (n, f) matrix in memory.
//
// A token keeps every pair whose upper bound reaches its threshold: the k-th largest lower bound it
// has seen, below which none is selected.
//
// Buffer. When a token's buffer is full its threshold rises and pairs fall out; when too many
// remain within the margin they are scored exactly, which always leaves k. So it never overflows.
//
// Selection. At the end the survivors are scored exactly, sorted and written: the exact top-k of the
// emitted values, whatever the screen was.
#include "encode.h"

#include "select.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <Form FORM>
class Encoder : public Tasks {
 public:
  Encoder(const EncodeArgs& args, const Exact& e)
      : Encoder(args, e, smaller(args.f + 1, 2 * args.k + 96)) {}

  template <class Screen>
  void task(const Screener<Screen>& screener, int64_t task, int worker) {
    const int64_t slot = plan.n_parts > 1 ? task : worker;
    const Range panels = plan.panels(task / plan.n_parts), groups = plan.groups(task);
    const int64_t first = panels.begin * P, end = smaller(panels.end * P, a.n);
    Block b{*this,
            first,
            candidates.data + slot * tokens * words,
            counts.data + slot * tokens,
            thresholds.data + slot * tokens,
            worker_keys(worker),
            patience<Screen>(double(end - first) * (groups.end - groups.begin) * R)};
    for (int64_t t = 0; t < tokens; ++t) {
      b.counts[t] = 0;
      // Only positive scores are kept; no pair reaches the padding lanes' threshold.
      b.token_thresholds[t] = first + t < end ? 0x1p-149f : INFINITY;
    }
    screener.template sweep<FORM>(groups, panels, worker, b);
    if (b.patience < 0) return;
    set_done(task);
    if (plan.n_parts > 1) return;
    for (int64_t n = first; n < end; ++n)
      emit(n, b.of(n - first), b.counts[n - first], worker_keys(worker));
  }

  // Where the latents were divided, each token's candidates lie in n_parts buffers.
  void merge() {
    if (plan.n_parts == 1) return;
    Buffer<float> merged(a.threads * words * plan.n_parts);
    parallel_for(a.n, a.threads, [&](int64_t n, int worker) {
      const Candidates all(merged.data + worker * words * plan.n_parts, capacity * plan.n_parts);
      int64_t count = 0;
      for (int64_t p = 0; p < plan.n_parts; ++p) {
        const int64_t at = (n / tokens * plan.n_parts + p) * tokens + n % tokens;
        const Candidates some(candidates.data + at * words, capacity);
        for (int64_t i = 0; i < counts.data[at]; ++i) some.copy(i, all, count++);
      }
      emit(n, all, count, worker_keys(worker));
    });
  }

 private:
  struct Block {  // the sink of one task
    Encoder& encoder;
    int64_t first;  // token
    float* candidates;
    int64_t* counts;
    float* token_thresholds;
    uint64_t* keys;    // room to sort twice a token's candidates
    int64_t patience;  // how many pairs more to score while screening

    Candidates of(int64_t t) const { return {candidates + t * encoder.words, encoder.capacity}; }
    bool start(int64_t) const { return patience >= 0; }
    FASTSAE_INLINE vec thresholds(int64_t n) const { return load(token_thresholds + (n - first)); }
    FASTSAE_INLINE vec accepts(vec thresholds, int64_t) const { return thresholds; }

    void hit(int64_t n, int64_t i, float lower, float upper) {
      const int64_t t = n - first;
      const Candidates c = of(t);
      c.lower[counts[t]] = lower;
      c.upper[counts[t]] = upper;
      c.id[counts[t]] = static_cast<int32_t>(encoder.exact.id(i));
      if (++counts[t] == encoder.capacity) make_room(n, c, counts[t], token_thresholds[t]);
    }

    void make_room(int64_t n, const Candidates& c, int64_t& count, float& threshold) {
      const int64_t k = encoder.a.k;
      threshold = raised(c.lower, count, k, threshold);
      count = drop_below(c, count, threshold);
      if (count <= k + (encoder.capacity - k) / 2) return;
      patience -= count;
      for (int64_t i = 0; i < count; ++i)
        if (c.lower[i] != c.upper[i])
          c.lower[i] = c.upper[i] = encoder.exact.scored(n, c.id[i]).score;
      const float lowest = keep_largest(c, count, k, keys);
      if (lowest > threshold) threshold = lowest;
    }
  };

  const EncodeArgs& a;
  const Exact& exact;
  const int64_t capacity, words;
  const Plan plan;
  const int64_t tokens, slots;
  Buffer<float> candidates;
  Buffer<int64_t> counts;
  Buffer<float> thresholds;
  Buffer<uint64_t> keys;

  Encoder(const EncodeArgs& args, const Exact& e, int64_t c)
      : Encoder(args, e, c, Plan(args, args.score, 4 * c * Candidates::WORDS)) {}
  Encoder(const EncodeArgs& args, const Exact& e, int64_t c, const Plan& p)
      : Tasks(p.n_tasks()),
        a(args),
        exact(e),
        capacity(c),
        words(c * Candidates::WORDS),
        plan(p),
        tokens(plan.block_tokens()),
        slots(plan.n_parts > 1 ? n_tasks() : a.threads),
        candidates(slots * tokens * words),
        counts(slots * tokens),
        thresholds(slots * tokens),
        keys(a.threads * 2 * capacity * plan.n_parts) {}

  uint64_t* worker_keys(int worker) const {
    return keys.data + worker * 2 * capacity * plan.n_parts;
  }

  void emit(int64_t n, const Candidates& c, int64_t count, uint64_t* keys) {
    count = drop_below(c, count, raised(c.lower, count, a.k, 0x1p-149f));
    for (int64_t i = 0; i < count; ++i) {
      if (i + 1 < count) exact.prefetch(c.id[i + 1]);
      // A plain score is the value. From here on `lower` holds the value.
      if (FORM == PLAIN && c.lower[i] == c.upper[i]) {
        keys[i] = order_key(c.lower[i], static_cast<int32_t>(i));
        continue;
      }
      const auto pair = exact.scored(n, c.id[i]);
      keys[i] = order_key(pair.score, static_cast<int32_t>(i));
      c.lower[i] = pair.value;
    }
    const uint64_t* best = keys + count;
    count = largest(keys, count, a.k, keys + count);
    for (int64_t i = 0; i < count && key_value(best[i]) > 0; ++i) {
      a.vals[n * a.k + i] = c.lower[key_id(best[i])];
      a.idx[n * a.k + i] = c.id[key_id(best[i])];
    }
  }
};

template <Form FORM>
void encode_form(const EncodeArgs& args, const Exact& exact) {
  Encoder<FORM> encoder(args, exact);
  if (run_screens(exact, encoder)) encoder.merge();
}

}  // namespace

NonFinite encode(const EncodeArgs& a) {
  for (int64_t i = 0; i < a.n * a.k; ++i) a.vals[i] = 0, a.idx[i] = -1;
  if (a.n == 0 || a.f == 0 || a.k == 0) return {};
  Failure failure;
  const Exact exact(a, a.score, failure);
  if (exact.form() == PLAIN)
    encode_form<PLAIN>(a, exact);
  else if (exact.form() == SCALED)
    encode_form<SCALED>(a, exact);
  else
    encode_form<GUIDED>(a, exact);
  return failure.found;
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
