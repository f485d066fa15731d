// The products that screen pre-activations, and their margins.
//
// Tokens lie in panels of P = 2·LANES, one token a vector lane; a tile multiplies a panel with R
// latents in registers, over the whole width d. A sum differs from the value we emit (simd.h `dot`)
// by at most a margin, from the rounding of the inputs, of both summations and of underflow.
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

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
