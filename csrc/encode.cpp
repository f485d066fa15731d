// encode: vals, idx = the k largest positive h[n,i] = <x[n], W_enc[i]> + b_enc[i] of each token, in
// the order (value descending, latent ascending), without an (n, f) matrix in memory.
//
// Screen. Tokens lie in panels of P = 2·LANES, one token a vector lane; a tile multiplies a panel
// with R latents in registers, over the whole width d. Nothing of the product is ever stored: each
// lane's sum t is compared with what its token still accepts, in the register.
//
// Margin. A screened sum differs from the value we emit (simd.h `dot`) by at most a margin m, from
// the rounding of the inputs, of both summations and of underflow. A token keeps every pair whose
// t + m reaches its threshold: the k-th largest t - m it has seen, below which none is selected.
//
// Buffer. When a token's buffer is full its threshold rises and pairs fall out; when too many
// remain within the margin they are scored exactly, which always leaves k. So it never overflows.
//
// Selection. At the end the survivors are scored exactly, sorted and written: the exact top-k of the
// emitted values, whatever the screen was.
//
// The bf16 screen rounds W_enc's rows while it copies them to L1, so there is no bf16 copy of W_enc
// to keep fresh.
#include <cmath>

#include "kernels.h"
#include "pool.h"
#include "select.h"
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
struct Latent {
  float norm, residual, constant, bias;
};

// One encode call with one screen and one weight type.
template <class Screen, class T>
class Encoder {
  using X = typename Screen::X;
  using W = typename Screen::W;

 public:
  explicit Encoder(const EncodeArgs& args)
      : a(args),
        weights(static_cast<const T*>(args.w.data)),
        n_panels((a.n + P - 1) / P),
        steps(Screen::x_steps(a.d)),
        ldw((a.d + 31) / 32 * 32 +
            32),  // odd multiples of 64 bytes apart: rows must not share L1 sets
        slope(gamma(Screen::roundings(a.d)) + gamma(a.d / DOT_LANES + 8.0) + 4 * U),
        capacity(smaller(a.f + 1, 2 * a.k + 96)),
        x(n_panels * steps * P),
        by_norm(n_panels * P),
        by_residual(n_panels * P) {}

  NonFinite run() {
    for (int64_t i = 0; i < a.n * a.k; ++i) a.vals[i] = 0, a.idx[i] = -1;
    if (a.n == 0 || a.f == 0 || a.k == 0) return {};
    Buffer<W> group(a.threads * R * ldw);
    parallel_for(n_panels, a.threads, [&](int64_t panel, int worker) {
      pack_panel(panel, group.data + worker * R * ldw);
    });
    if (found.token >= 0) return found;
    for (int64_t n = 0; n < a.n; ++n)
      if (by_residual.data[n] > largest_norm) largest_norm = by_residual.data[n];

    // A block of tokens should stay in the L2 cache while the latents pass by, but still be worth
    // the copying of each latent. Where tokens are too few for all threads, the latents are divided
    // too.
    int64_t block = a.block_tokens;
    if (block <= 0) {
      const int64_t share = (a.n + 2 * a.threads - 1) / (2 * a.threads);
      block = (int64_t{3} << 19) / (larger(1, steps) * static_cast<int64_t>(sizeof(X)));
      block = smaller(512, block);
      block = smaller(block, (int64_t{4} << 20) / (capacity * Candidates::WORDS * 4));
      block = smaller(block, larger(share, 128));
    }
    block = smaller(block, a.n);
    panels_in_block = larger(1, (block + P - 1) / P);
    const int64_t n_blocks = (n_panels + panels_in_block - 1) / panels_in_block;
    const int64_t n_groups = (a.f + R - 1) / R;
    int64_t n_parts = 1;
    if (a.threads > 1 && n_blocks < 2 * a.threads)
      n_parts = (2 * a.threads + n_blocks - 1) / n_blocks;
    if (n_parts > n_groups) n_parts = n_groups;

    const int64_t tokens = panels_in_block * P;
    const int64_t slots = n_parts > 1 ? n_blocks * n_parts : a.threads;
    const int64_t words = capacity * Candidates::WORDS;
    Buffer<float> candidates(slots * tokens * words);
    Buffer<int64_t> counts(slots * tokens);
    Buffer<float> thresholds(slots * tokens);
    Buffer<uint64_t> keys(a.threads * 2 * capacity * n_parts);

    Buffer<uint8_t> too_coarse(n_blocks);
    for (int64_t block = 0; block < n_blocks; ++block) too_coarse.data[block] = 0;

    parallel_for(n_blocks * n_parts, a.threads, [&](int64_t task, int worker) {
      const int64_t slot = n_parts > 1 ? task : worker;
      Block b{task / n_parts * panels_in_block,
              candidates.data + slot * tokens * words,
              counts.data + slot * tokens,
              thresholds.data + slot * tokens,
              keys.data + worker * 2 * capacity * n_parts,
              0};
      if (!screen_block(b, part(n_groups, n_parts, task % n_parts), group.data + worker * R * ldw))
        __atomic_store_n(too_coarse.data + task / n_parts, 1, __ATOMIC_RELAXED);
      else if (n_parts == 1)
        for (int64_t t = 0; t < tokens && b.first_panel * P + t < a.n; ++t)
          emit(b.first_panel * P + t, b.of(t, capacity), b.counts[t], b.keys);
    });
    if (n_parts > 1 && !failed()) {
      // Each token's candidates lie in n_parts buffers: bring them together, then finish as above.
      Buffer<float> merged(a.threads * words * n_parts);
      parallel_for(a.n, a.threads, [&](int64_t n, int worker) {
        if (too_coarse.data[n / tokens]) return;
        Candidates all(merged.data + worker * words * n_parts, capacity * n_parts);
        int64_t count = 0;
        for (int64_t p = 0; p < n_parts; ++p) {
          const int64_t at = (n / tokens * n_parts + p) * tokens + n % tokens;
          const Candidates some(candidates.data + at * words, capacity);
          for (int64_t i = 0; i < counts.data[at]; ++i, ++count) {
            all.lower[count] = some.lower[i];
            all.upper[count] = some.upper[i];
            all.id[count] = some.id[i];
          }
        }
        emit(n, all, count, keys.data + worker * 2 * capacity * n_parts);
      });
    }
    for (int64_t block = 0; block < n_blocks && !failed(); ++block)
      if (too_coarse.data[block])
        encode_in_fp32(block * tokens, smaller(a.n, (block + 1) * tokens));
    return found;
  }

 private:
  struct Block {
    int64_t first_panel;
    float* candidates;
    int64_t* counts;
    float* thresholds;
    uint64_t* keys;  // room to sort twice a token's candidates
    int64_t scored;  // exactly, while screening
    Candidates of(int64_t t, int64_t capacity) const {
      return {candidates + t * capacity * Candidates::WORDS, capacity};
    }
  };

  const EncodeArgs& a;
  const T* weights;
  const int64_t n_panels, steps, ldw;
  const double slope;
  const int64_t capacity;
  int64_t panels_in_block = 0;
  double largest_norm = 0;  // of the tokens, rounded up
  Buffer<X> x;
  Buffer<float> by_norm, by_residual;
  NonFinite found;
  int found_lock = 0;

  int64_t latent_id(int64_t i) const { return a.latents ? a.latents[i] : i; }
  float bias(int64_t id) const { return a.bias ? a.bias[id] : 0.0f; }

  bool failed() { return __atomic_load_n(&found_lock, __ATOMIC_ACQUIRE) == 2; }
  void fail(int64_t token, int64_t latent) {
    int expected = 0;
    if (__atomic_compare_exchange_n(&found_lock, &expected, 1, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE)) {
      found = {token, latent};
      __atomic_store_n(&found_lock, 2, __ATOMIC_RELEASE);
    }
  }

  void pack_panel(int64_t panel, W* packed) {
    X* out = x.data + panel * steps * P;
    for (int lane = 0; lane < P; ++lane) {
      const int64_t n = panel * P + lane;
      if (n >= a.n) {
        for (int64_t i = 0; i < steps; ++i) out[i * P + lane] = 0;
        by_norm.data[n] = by_residual.data[n] = 0;
        continue;
      }
      const Norms row = pack_row<Screen>(a.x + n * a.ldx, a.d, packed);
      if (!std::isfinite(row.norm)) fail(n, -1);
      for (int64_t i = 0; i < steps; ++i) out[i * P + lane] = Screen::step_of(packed, i);
      const double residual = row.residual, norm = row.norm + residual;
      by_norm.data[n] = static_cast<float>(residual + slope * norm) * ROUND_UP;
      by_residual.data[n] = static_cast<float>(norm * (1 + slope)) * ROUND_UP;
    }
  }

  // Copies latent i into the group's L1 buffer and measures it.
  Latent pack_latent(int64_t i, W* out) {
    const int64_t id = latent_id(i);
    const float b = bias(id);
    const Norms row = pack_row<Screen>(weights + id * a.w.ld, a.d, out);
    if (!std::isfinite(row.norm) || !std::isfinite(b)) fail(-1, id);
    const double constant = 4 * U * std::fabs(double(b)) + 4.0 * a.d * TINY;
    // Where a sum could pass fp32's range no bound holds: every pair is kept and scored exactly.
    if (!(largest_norm * row.norm + std::fabs(double(b)) < 1e38 && row.norm < 1e38))
      return {INFINITY, INFINITY, INFINITY, b};
    return {upwards(row.norm), upwards(row.residual), upwards(constant), b};
  }
  static float upwards(double v) { return static_cast<float>(v) * ROUND_UP; }

  // Large rounding residuals (a few huge coordinates) leave too many pairs within a coarse screen's
  // margin. Once one in 32 pairs had to be scored exactly, the finer screen is the faster one.
  bool screen_block(Block& b, Range groups, W* group) {
    const int64_t tokens = smaller(panels_in_block * P, a.n - b.first_panel * P);
    const int64_t budget =
        Screen::COARSE ? tokens * (groups.end - groups.begin) * R / 32 : INT64_MAX;
    const int64_t end_panel =
        b.first_panel + panels_in_block < n_panels ? b.first_panel + panels_in_block : n_panels;
    for (int64_t t = 0; t < panels_in_block * P; ++t) {
      b.counts[t] = 0;
      // Only positive values are kept; no pair reaches the padding lanes' threshold.
      b.thresholds[t] = b.first_panel * P + t < a.n ? 0x1p-149f : INFINITY;
    }
    Latent latents[R];
    for (int64_t g = groups.begin; g < groups.end && !failed(); ++g) {
      if (b.scored > budget) return false;
      const int rows = a.f - g * R < R ? static_cast<int>(a.f - g * R) : R;
      for (int r = 0; r < R; ++r) {
        if (r < rows)
          latents[r] = pack_latent(g * R + r, group + r * ldw);
        else
          for (int64_t i = 0; i < ldw; ++i) group[r * ldw + i] = 0;
      }
      for (int64_t panel = b.first_panel; panel < end_panel; ++panel) {
        vec acc[R][2];
        Screen::tile(x.data + panel * steps * P, group, ldw, a.d, acc);
        const int64_t t0 = (panel - b.first_panel) * P;
        for (int half = 0; half < 2; ++half) {
          const int64_t n = panel * P + half * LANES, t = t0 + half * LANES;
          const vec pn = load(by_norm.data + n), pr = load(by_residual.data + n);
          const vec threshold = load(b.thresholds + t);
          for (int r = 0; r < rows; ++r) {
            const Latent& l = latents[r];
            const vec sum = acc[r][half] + splat(l.bias);
            const vec margin =
                fma(pn, splat(l.norm), fma(pr, splat(l.residual), splat(l.constant)));
            uint32_t hits = not_less(sum + margin, threshold);
            while (__builtin_expect(hits != 0, 0)) {
              const int lane = __builtin_ctz(hits);
              hits &= hits - 1;
              // A NaN threshold comparison lets the padding lanes of an overflowing latent through.
              if (n + lane < a.n)
                push(b, t + lane, sum[lane], margin[lane],
                     static_cast<int32_t>(latent_id(g * R + r)));
            }
          }
        }
      }
    }
    return true;
  }

  void push(Block& b, int64_t t, float sum, float margin, int32_t id) {
    const Candidates c = b.of(t, capacity);
    int64_t& count = b.counts[t];
    const float lower = sum - margin, upper = sum + margin;
    // An overflowed sum bounds nothing: the pair is kept and scored exactly.
    const bool finite = std::isfinite(lower) && std::isfinite(upper);
    c.lower[count] = finite ? lower : -INFINITY;
    c.upper[count] = finite ? upper : INFINITY;
    c.id[count] = id;
    if (++count < capacity) return;
    float& threshold = b.thresholds[t];
    threshold = raised(c.lower, count, a.k, threshold);
    count = drop_below(c, count, threshold);
    if (count <= a.k + (capacity - a.k) / 2) return;
    const uint64_t* best = b.keys + count;
    b.scored += count;
    count = select_exact(b.first_panel * P + t, c, count, b.keys);
    for (int64_t i = 0; i < count; ++i) {
      c.lower[i] = c.upper[i] = key_value(best[i]);
      c.id[i] = key_id(best[i]);
    }
    if (count == a.k && c.lower[count - 1] > threshold) threshold = c.lower[count - 1];
  }

  void encode_in_fp32(int64_t begin, int64_t end) {
    EncodeArgs rest = a;
    rest.x += begin * a.ldx;
    rest.vals += begin * a.k;
    rest.idx += begin * a.k;
    rest.n = end - begin;
    const NonFinite bad = Encoder<Fp32Screen, T>(rest).run();
    if (bad.token >= 0 || bad.latent >= 0) fail(bad.token < 0 ? -1 : begin + bad.token, bad.latent);
  }

  // Scores the candidates; best = keys + count gets the keys of the k best, in order. Returns how
  // many.
  int64_t select_exact(int64_t n, const Candidates& c, int64_t count, uint64_t* keys) {
    for (int64_t i = 0; i < count; ++i) {
      if (i + 1 < count) __builtin_prefetch(weights + int64_t(c.id[i + 1]) * a.w.ld);
      float value = c.lower[i];
      if (value != c.upper[i]) {
        value = dot(a.x + n * a.ldx, weights + int64_t(c.id[i]) * a.w.ld, a.d) + bias(c.id[i]);
        if (!std::isfinite(value)) {
          fail(n, c.id[i]);
          value = -INFINITY;
        }
      }
      keys[i] = order_key(value, c.id[i]);
    }
    return largest(keys, count, a.k, keys + count);
  }

  void emit(int64_t n, const Candidates& c, int64_t count, uint64_t* keys) {
    count = drop_below(c, count, raised(c.lower, count, a.k, 0x1p-149f));
    const uint64_t* best = keys + count;
    count = select_exact(n, c, count, keys);
    for (int64_t i = 0; i < count && key_value(best[i]) > 0; ++i) {
      a.vals[n * a.k + i] = key_value(best[i]);
      a.idx[n * a.k + i] = key_id(best[i]);
    }
  }
};

// Picks the weight type.
template <class Screen>
NonFinite encode_with(const EncodeArgs& args) {
  if (args.w.is_bf16) return Encoder<Screen, bf16>(args).run();
  if (args.rounded) return Encoder<Screen, rounded>(args).run();
  return Encoder<Screen, float>(args).run();
}

}  // namespace

NonFinite encode(const EncodeArgs& args) {
#if defined(__AVX512BF16__)
  if (args.bf16_screen) return encode_with<Bf16Screen>(args);
#endif
  return encode_with<Fp32Screen>(args);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
