// The pass that all encoders share: h[n,i] = <x[n], W_enc[i]> + b_enc[i] of all pairs, screened in
// tiles of which nothing is stored. Each op (encode, encode_batch, encode_columns,
// encode_threshold) says with a `Sink` what a pair must reach, and takes the pairs that may.
//
// Screen. Tokens lie in panels of P = 2·LANES, one token a vector lane; a tile multiplies a panel
// with R latents in registers, over the whole width d. Each lane's sum t is compared with what is
// still accepted, in the register.
//
// Margin. A screened sum differs from the value we emit (simd.h `dot`) by at most a margin m, from
// the rounding of the inputs, of both summations and of underflow. So the value lies in
// [t - m, t + m], and a pair is kept while t + m reaches what its op asks for.
//
// Score. The bounds of h go through the operations of the score in their order: |·|, times
// scale[i], times 1 + |<guide[n], W_dec[i]>|. fp32 rounding is monotonic, so they bound the score.
// The second product is screened like the first, for the tiles where it can matter at all.
//
// The bf16 screen rounds W_enc's rows while it copies them to L1, so there is no bf16 copy of W_enc
// to keep fresh.
#pragma once
#include <cmath>

#include "kernels.h"
#include "pool.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// R·2 accumulators, two token vectors and one broadcast fill the registers.
#if defined(__AVX512F__)
constexpr int R = 14;
#elif defined(__aarch64__)
constexpr int R = 12;
#else
constexpr int R = 6;
#endif
constexpr int P = 2 * LANES;

constexpr double U = 0x1p-24;             // half an fp32 unit
constexpr double TINY = 0x1p-126;         // below it products and bf16 inputs may be flushed
constexpr float ROUND_UP = 1 + 0x1p-20f;  // covers the roundings of the margin itself

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

double gamma(double roundings) { return roundings * U / (1 - roundings * U); }

// ---- the two screens: how a panel and a latent are packed, and their product ----

struct Fp32Screen {
  static constexpr bool COARSE = false;
  using X = float;  // panel: [d][P]
  using W = float;
  static int64_t x_steps(int64_t d) { return d; }
  static double roundings(int64_t d) { return d + 2.0; }

  static X step_of(const W* row, int64_t i) { return row[i]; }

  template <class T>
  static void pack(const T* w, int64_t d, W* out, float* square, float*) {
    vec sum = {};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
      const vec v = load(w + i);
      store(out + i, v);
      sum = fma(v, v, sum);
    }
    for (; i < d; ++i) out[i] = to_float(w[i]), sum[0] += out[i] * out[i];
    for (int j = 0; j < LANES; ++j) *square += sum[j];
  }
  static FASTSAE_INLINE void tile(const X* panel, const W* w, int64_t ldw, int64_t d,
                                  vec (&acc)[R][2]) {
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = vec{};
    for (int64_t i = 0; i < d; ++i) {
      const vec x0 = load(panel + i * P), x1 = load(panel + i * P + LANES);
      for (int r = 0; r < R; ++r) {
        const vec s = splat(w[r * ldw + i]);
        acc[r][0] = fma(s, x0, acc[r][0]);
        acc[r][1] = fma(s, x1, acc[r][1]);
      }
    }
  }
};

#if defined(__AVX512BF16__)
struct Bf16Screen {
  static constexpr bool COARSE = true;
  using X = uint32_t;  // panel: [ceil(d/2)][P], two neighbouring values of a token in each word
  using W = bf16;
  static int64_t x_steps(int64_t d) { return (d + 1) / 2; }
  static double roundings(int64_t d) { return 2.0 * d + 4; }

  static X step_of(const W* row, int64_t i) {
    X pair;
    std::memcpy(&pair, row + 2 * i, sizeof pair);
    return pair;
  }

  template <class T>
  static void pack(const T* w, int64_t d, W* out, float* square, float* residual) {
    vec sum = {}, rest = {};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) {
      const vec v = load(w + i);
      const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
      std::memcpy(out + i, &h, sizeof h);
      const vec e = v - load(out + i);
      sum = fma(v, v, sum);
      rest = fma(e, e, rest);
    }
    for (; i < d; ++i) {
      const float v = to_float(w[i]);
      out[i] = to_bf16(v);
      const float e = v - to_float(out[i]);
      sum[0] += v * v;
      rest[0] += e * e;
    }
    if (d % 2) out[d] = 0;
    for (int j = 0; j < LANES; ++j) *square += sum[j], *residual += rest[j];
  }
  static FASTSAE_INLINE void tile(const X* panel, const W* w, int64_t ldw, int64_t d,
                                  vec (&acc)[R][2]) {
    __m512 a[R][2];
    for (int r = 0; r < R; ++r) a[r][0] = a[r][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < (d + 1) / 2; ++i) {
      const __m512bh x0 = (__m512bh)_mm512_load_si512(panel + i * P);
      const __m512bh x1 = (__m512bh)_mm512_load_si512(panel + i * P + LANES);
      for (int r = 0; r < R; ++r) {
        int pair;
        std::memcpy(&pair, w + r * ldw + 2 * i, sizeof pair);
        const __m512bh s = (__m512bh)_mm512_set1_epi32(pair);
        a[r][0] = _mm512_dpbf16_ps(a[r][0], s, x0);
        a[r][1] = _mm512_dpbf16_ps(a[r][1], s, x1);
      }
    }
    for (int r = 0; r < R; ++r) acc[r][0] = (vec)a[r][0], acc[r][1] = (vec)a[r][1];
  }
};
#endif

// A row of x or of W_enc as the screen sees it: its norm, and the norm of what rounding it lost,
// both rounded up; not finite if the row is not.
struct Norms {
  double norm, residual;
};

template <class Screen, class T>
Norms pack_row(const T* row, int64_t d, typename Screen::W* out) {
  float square = 0, lost = 0;
  Screen::pack(row, d, out, &square, &lost);
  double norm2 = square, lost2 = lost;
  if (!(norm2 < 1e37 && lost2 < 1e37)) {  // fp32 squares overflowed, or a value is not finite
    norm2 = lost2 = 0;
    for (int64_t i = 0; i < d; ++i) {
      const double v = to_float(row[i]);
      norm2 += v * v;
      // bf16 keeps 8 bits of a value, unless it rounds it to infinity.
      lost2 += std::fabs(v) > 0x1.fep127 ? INFINITY : v * v * 0x1p-16;
    }
  }
  // Squares below fp32's normal range may be flushed above: 2^-63 a value covers them.
  const double unseen = std::sqrt(double(d)) * 0x1p-63, grow = 1 + d * 2 * U;
  return {std::sqrt(norm2) * grow + unseen, std::sqrt(lost2) * grow + unseen};
}

// |t - value| <= by_norm[n]·norm[i] + by_residual[n]·residual[i] + constant[i], where residual is
// the norm of what the screen's rounding of W_enc[i] lost, and by_norm covers what it lost of x[n].
// by_residual is no less than the norm of x[n].
struct Latent {
  float norm, residual, constant, bias, scale;
};

// Rows that are read as they are, or as if they were stored in bf16.
struct Weights {
  Matrix m;
  bool as_bf16;

  template <class F>
  FASTSAE_INLINE auto with_row(int64_t i, F&& f) const {
    if (m.is_bf16) return f(row<const bf16>(m, i));
    if (as_bf16) return f(row<const rounded>(m, i));
    return f(row<const float>(m, i));
  }
};

// The first thing found that is not finite, by any thread.
class Failure {
 public:
  NonFinite found;

  bool any() { return __atomic_load_n(&state, __ATOMIC_ACQUIRE) == 2; }
  void set(NonFinite::What what, int64_t token, int64_t latent) {
    int expected = 0;
    if (__atomic_compare_exchange_n(&state, &expected, 1, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
      found = {what, token, latent};
      __atomic_store_n(&state, 2, __ATOMIC_RELEASE);
    }
  }

 private:
  int state = 0;
};

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

  struct Pair {
    float score, value;
  };
  Pair scored(int64_t n, int64_t id) const {
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
    if (s.guide) {
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

// ---- the products ----

// <left[n], right[i]> for all n, i: the left rows packed and measured, the right ones as they are.
template <class Screen>
class Product {
  using X = typename Screen::X;
  using W = typename Screen::W;

 public:
  const int64_t n, d, ldw;
  Buffer<float> by_norm, by_residual;

  Product(const float* left, int64_t n_rows, int64_t width, int64_t ld, const Weights& right)
      : n(n_rows),
        d(width),
        ldw((d + 31) / 32 * 32 + 32),  // odd multiples of 64 bytes: rows must not share L1 sets
        by_norm((n + P - 1) / P * P),
        by_residual((n + P - 1) / P * P),
        rows(left),
        ld_rows(ld),
        w(right),
        steps(Screen::x_steps(d)),
        slope(gamma(Screen::roundings(d)) + gamma(d / DOT_LANES + 8.0) + 4 * U),
        panels((n + P - 1) / P * steps * P) {}

  // scratch: ldw entries for each thread.
  void pack(int threads, W* scratch, Failure& failure, NonFinite::What what) {
    parallel_for((n + P - 1) / P, threads, [&](int64_t panel, int worker) {
      pack_panel(panel, scratch + worker * ldw, failure, what);
    });
    for (int64_t i = 0; i < n; ++i)
      if (by_residual.data[i] > largest_norm) largest_norm = by_residual.data[i];
  }

  // Copies right row `id` to L1 and measures it. Norms that are not finite say that the row is not.
  Latent pack_latent(int64_t id, float bias, W* out) const {
    const Norms r = w.with_row(id, [&](auto* latent) { return pack_row<Screen>(latent, d, out); });
    const double constant = 4 * U * std::fabs(double(bias)) + 4.0 * d * TINY;
    if (!std::isfinite(r.norm) || !std::isfinite(bias)) return {NAN, NAN, NAN, bias, 1};
    // Where a sum could pass fp32's range no bound holds: every pair is kept and scored exactly.
    if (!(largest_norm * r.norm + std::fabs(double(bias)) < 1e38 && r.norm < 1e38))
      return {INFINITY, INFINITY, INFINITY, bias, 1};
    return {upwards(r.norm), upwards(r.residual), upwards(constant), bias, 1};
  }

  FASTSAE_INLINE void tile(int64_t panel, const W* group, vec (&acc)[R][2]) const {
    Screen::tile(panels.data + panel * steps * P, group, ldw, d, acc);
  }

 private:
  const float* rows;
  const int64_t ld_rows;
  const Weights w;
  const int64_t steps;
  const double slope;
  Buffer<X> panels;
  double largest_norm = 0;  // of the left rows, rounded up

  static float upwards(double v) { return static_cast<float>(v) * ROUND_UP; }

  void pack_panel(int64_t panel, W* packed, Failure& failure, NonFinite::What what) {
    X* out = panels.data + panel * steps * P;
    for (int lane = 0; lane < P; ++lane) {
      const int64_t i = panel * P + lane;
      if (i >= n) {
        for (int64_t step = 0; step < steps; ++step) out[step * P + lane] = 0;
        by_norm.data[i] = by_residual.data[i] = 0;
        continue;
      }
      const Norms r = pack_row<Screen>(rows + i * ld_rows, d, packed);
      if (!std::isfinite(r.norm)) failure.set(what, i, -1);
      for (int64_t step = 0; step < steps; ++step)
        out[step * P + lane] = Screen::step_of(packed, step);
      const double norm = r.norm + r.residual;
      by_norm.data[i] = upwards(r.residual + slope * norm);
      by_residual.data[i] = upwards(norm * (1 + slope));
    }
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
