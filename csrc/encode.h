// The pass that all encoders share: h[n,i] = <x[n], W_enc[i]> + b_enc[i] of all pairs, screened in
// tiles (screen.h) of which nothing is stored. Each op (encode, encode_batch, encode_columns,
// encode_threshold) says with a `Sink` what a pair must reach, and takes the pairs that may.
//
// Screen. A sum t with margin m says that the value lies in [t - m, t + m]. Each lane's t + m is
// compared with what is still accepted, in the register.
//
// Score. The bounds of h go through the operations of the score in their order: |·|, times
// scale[i], times 1 + |<guide[n], W_dec[i]>|. fp32 rounding is monotonic, so they bound the score.
// The second product is screened like the first, for the tiles where it can matter at all.
#pragma once
#include "screen.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// ---- exact values ----

enum Form { PLAIN, SCALED, GUIDED };  // the score is h; or |h| or scaled; or has a guide too

// The values that leave the library, of one pair at a time.
struct Exact {
  const Encoding& a;
  const Score& s;
  Failure& failure;
  const Weights w, dec;

  Exact(const Encoding& encoding, const Score& score, Failure& f)
      : a(encoding), s(score), failure(f), w{a.w, a.rounded}, dec{s.dec, false} {}

  Form form() const { return s.guide ? GUIDED : s.scale || s.absolute ? SCALED : PLAIN; }
  int64_t id(int64_t i) const { return a.latents ? a.latents[i] : i; }
  float bias(int64_t id) const { return a.bias ? a.bias[id] : 0.0f; }

  float value(int64_t n, int64_t id) const {
    const float* token = a.x + n * a.ldx;
    const float h =
        w.with_row(id, [&](auto* latent) { return dot(token, latent, a.d); }) + bias(id);
    if (std::isfinite(h)) return h;
    failure.set(NonFinite::VALUE, n, id);
    return -INFINITY;
  }

  struct Scored {
    float score, value;
  };
  Scored scored(int64_t n, int64_t id) const {
    const float h = value(n, id);
    return {score(n, id, h), h};
  }

  void prefetch(int64_t id) const {
    w.with_row(id, [](auto* latent) { __builtin_prefetch(latent); });
  }

 private:
  float score(int64_t n, int64_t id, float value) const {
    float score = s.absolute ? std::fabs(value) : value;
    if (s.scale) score *= s.scale[id];
    if (s.guide && score > 0) {
      const float* guide = s.guide + n * s.ldg;
      const float g = dec.with_row(id, [&](auto* latent) { return dot(guide, latent, s.d_out); });
      if (!std::isfinite(g)) {
        failure.set(NonFinite::SCORE, n, id);
        return -INFINITY;
      }
      score *= 1 + std::fabs(g);
    }
    return score;
  }
};

FASTSAE_INLINE vec clear_signs(vec v, bool all) {
  return (vec)((uvec)v & (all ? 0x7fffffffu : 0xffffffffu));
}

// One call's products, in one screen.
template <class Screen>
class Screener {
  using W = typename Screen::W;

 public:
  const Exact& exact;

  explicit Screener(const Exact& e)
      : exact(e),
        a(e.a),
        product(a.x, a.n, a.d, a.ldx, e.w),
        guide(e.s.guide, e.s.guide ? a.n : 0, e.s.guide ? e.s.d_out : 0, e.s.ldg, e.dec),
        group_size(R * (product.ldw + guide.ldw)),
        groups(a.threads * group_size) {
    product.pack(a.threads, groups.data, e.failure, NonFinite::TOKEN);
    if (e.s.guide) guide.pack(a.threads, groups.data, e.failure, NonFinite::GUIDE);
  }

  // Meets all pairs of some groups of R latents with those of some panels. The sink's
  // `thresholds(n)` are those of the tokens from n on, `accepts(thresholds, i)` those of the same
  // tokens with latent i; hit(n, i, lower, upper) gets each pair whose score may reach them, between
  // lower and upper: a token's latents in ascending order. start(i) precedes the group of latent i,
  // and stops the sweep where it returns false.
  template <Form FORM, class Sink>
  void sweep(Range group_range, Range panels, int worker, Sink& sink) const {
    W* const group = groups.data + worker * group_size;
    W* const decoders = group + R * product.ldw;
    Latent latents[R], guided[R];
    for (int64_t g = group_range.begin; g < group_range.end && !exact.failure.any(); ++g) {
      if (!sink.start(g * R)) return;
      const int rows = a.f - g * R < R ? static_cast<int>(a.f - g * R) : R;
      for (int r = 0; r < R; ++r)
        pack<FORM>(g * R + r, r < rows, r, group, latents, decoders, guided);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        vec acc[R][2], other[R][2];
        product.tile(panel, group, acc);
        if (FORM == GUIDED) {
          if (!guide_matters(panel, g * R, rows, acc, latents, guided, sink)) continue;
          guide.tile(panel, decoders, other);
        }
        for (int half = 0; half < 2; ++half) {
          const int64_t n = panel * P + half * LANES;
          const Measures m = measures(product, n), gm = FORM == GUIDED ? measures(guide, n) : m;
          const auto thresholds = sink.thresholds(n);
          for (int r = 0; r < rows; ++r) {
            const Latent& l = latents[r];
            const vec margin = m.margin(l);
            const vec sum = signless<FORM>(acc[r][half] + splat(l.bias));
            vec upper = sum + margin, factor = {}, factor_margin = {};
            if (FORM != PLAIN) upper *= splat(l.scale);
            if (FORM == GUIDED) {
              factor = clear_signs(other[r][half], true), factor_margin = gm.margin(guided[r]);
              upper *= 1.0f + (factor + factor_margin);
            }
            uint32_t hits = not_less(upper, sink.accepts(thresholds, g * R + r));
            while (__builtin_expect(hits != 0, 0)) {
              const int lane = __builtin_ctz(hits);
              hits &= hits - 1;
              // Padding lanes and NaN, of an overflow, come here too.
              if (n + lane >= a.n) continue;
              float lower = sum[lane] - margin[lane];
              if (FORM != PLAIN) lower *= l.scale;
              if (FORM == GUIDED) {
                const float least = factor[lane] - factor_margin[lane];
                lower *= least > 0 ? 1 + least : 1;
              }
              // An overflowed sum bounds nothing: the pair is kept and scored exactly.
              if (std::isfinite(lower) && std::isfinite(upper[lane]))
                sink.hit(n + lane, g * R + r, lower, upper[lane]);
              else
                sink.hit(n + lane, g * R + r, -INFINITY, INFINITY);
            }
          }
        }
      }
    }
  }

 private:
  const Encoding& a;
  Product<Screen> product, guide;
  const int64_t group_size;
  Buffer<W> groups;

  struct Measures {
    vec by_norm, by_residual;
    FASTSAE_INLINE vec margin(const Latent& l) const {
      return fma(by_norm, splat(l.norm), fma(by_residual, splat(l.residual), splat(l.constant)));
    }
  };
  static FASTSAE_INLINE Measures measures(const Product<Screen>& p, int64_t n) {
    return {load(p.by_norm.data + n), load(p.by_residual.data + n)};
  }

  template <Form FORM>
  FASTSAE_INLINE vec signless(vec sum) const {
    return FORM == PLAIN ? sum : clear_signs(sum, exact.s.absolute);
  }

  template <Form FORM>
  void pack(int64_t i, bool there, int r, W* group, Latent* latents, W* decoders,
            Latent* guided) const {
    if (!there) {
      for (int64_t j = 0; j < product.ldw; ++j) group[r * product.ldw + j] = 0;
      for (int64_t j = 0; j < guide.ldw; ++j) decoders[r * guide.ldw + j] = 0;
      return;
    }
    const int64_t id = exact.id(i);
    latents[r] = product.pack_latent(id, exact.bias(id), group + r * product.ldw);
    if (std::isnan(latents[r].norm)) exact.failure.set(NonFinite::LATENT, -1, id);
    if (FORM != PLAIN && exact.s.scale) latents[r].scale = exact.s.scale[id];
    if (FORM != GUIDED) return;
    guided[r] = guide.pack_latent(id, 0, decoders + r * guide.ldw);
    if (std::isnan(guided[r].norm)) exact.failure.set(NonFinite::DECODER, -1, id);
  }

  // Whether any pair of a tile can be hit, for |<guide, W_dec[i]>| <= the product of the norms.
  template <class Sink>
  bool guide_matters(int64_t panel, int64_t first, int rows, const vec (&acc)[R][2],
                     const Latent* latents, const Latent* guided, const Sink& sink) const {
    uint32_t hits = 0;
    for (int half = 0; half < 2; ++half) {
      const int64_t n = panel * P + half * LANES;
      const Measures m = measures(product, n);
      const vec norms = load(guide.by_residual.data + n);
      const auto thresholds = sink.thresholds(n);
      for (int r = 0; r < rows; ++r) {
        const Latent& l = latents[r];
        const vec upper =
            (signless<GUIDED>(acc[r][half] + splat(l.bias)) + m.margin(l)) * splat(l.scale);
        const vec factor = 1.0f + fma(norms, splat(guided[r].norm), splat(guided[r].constant));
        hits |= not_less(upper * factor, sink.accepts(thresholds, first + r));
      }
    }
    return hits != 0;
  }
};

// ---- dividing the work ----

// Tasks are blocks of tokens, or blocks times parts of the latents. A block of tokens should stay
// in the L2 cache while the latents pass by, but still be worth the copying of each latent. Where
// tokens are too few for all threads, the latents are divided too.
struct Plan {
  int64_t n_panels, n_groups, panels_in_block = 1, n_blocks = 0, n_parts = 1;

  // token_bytes: what an op keeps for each token of a block.
  Plan(const Encoding& a, const Score& s, int64_t token_bytes)
      : n_panels((a.n + P - 1) / P), n_groups((a.f + R - 1) / R) {
    int64_t block = a.block_tokens;
    if (block <= 0) {
      const int64_t width = a.d + (s.guide ? s.d_out : 0);
      const int64_t share = (a.n + 2 * a.threads - 1) / (2 * a.threads);
      block = (int64_t{3} << 19) / (larger(1, width) * (a.bf16_screen ? 2 : 4));
      block = smaller(512, block);
      block = smaller(block, (int64_t{4} << 20) / larger(1, token_bytes));
      block = smaller(block, larger(share, 128));
    }
    block = smaller(block, a.n);
    panels_in_block = larger(1, (block + P - 1) / P);
    n_blocks = (n_panels + panels_in_block - 1) / panels_in_block;
    if (a.threads > 1 && n_blocks > 0 && n_blocks < 2 * a.threads)
      n_parts = (2 * a.threads + n_blocks - 1) / n_blocks;
    if (n_parts > n_groups) n_parts = n_groups;
  }

  int64_t n_tasks() const { return n_blocks * n_parts; }
  int64_t block_tokens() const { return panels_in_block * P; }
  Range panels(int64_t block) const {
    return {block * panels_in_block, smaller((block + 1) * panels_in_block, n_panels)};
  }
  Range groups(int64_t task) const { return part(n_groups, n_parts, task % n_parts); }
};

// Large rounding residuals (a few huge coordinates) leave too many pairs within a coarse screen's
// margin. Once one in 32 of `pairs` had to be scored exactly, the finer screen is the faster one.
template <class Screen>
int64_t patience(double pairs) {
  return Screen::COARSE ? static_cast<int64_t>(pairs / 32) : INT64_MAX;
}

// What an op is made of; task(screener, task, worker) does one, and marks it unless the screen was too
// coarse for it.
class Tasks {
 public:
  explicit Tasks(int64_t n) : n_(n), done_(n) {
    for (int64_t task = 0; task < n; ++task) done_.data[task] = 0;
  }
  int64_t n_tasks() const { return n_; }
  bool to_do(int64_t task) const { return !done_.data[task]; }
  void set_done(int64_t task) { done_.data[task] = 1; }
  template <class Screen>
  bool finished() const {
    int64_t left = 0;
    for (int64_t task = 0; task < n_; ++task) left += to_do(task);
    return left == 0;
  }

 private:
  int64_t n_;
  Buffer<uint8_t> done_;
};

template <class Screen, class Op>
bool run_screen(const Exact& exact, Op& op) {
  const Screener<Screen> screener(exact);
  if (exact.failure.any()) return true;
  parallel_for(op.n_tasks(), exact.a.threads, [&](int64_t task, int worker) {
    if (op.to_do(task) && !exact.failure.any()) op.task(screener, task, worker);
  });
  return exact.failure.any() || op.template finished<Screen>();
}

// With the screen asked for; what was too coarse for it, with the fp32 screen. False where
// something is not finite.
template <class Op>
bool run_screens(const Exact& exact, Op& op) {
#if defined(__AVX512BF16__)
  if (exact.a.bf16_screen && run_screen<Bf16Screen>(exact, op)) return !exact.failure.any();
#endif
  run_screen<Fp32Screen>(exact, op);
  return !exact.failure.any();
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
