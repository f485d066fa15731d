// rows: what is done to one row of a parameter or of its gradient.
#pragma once
#include <cmath>

#include "kernels.h"
#include "pool.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t LATENTS = 32;  // of one task

template <class F>
void for_each_row(int64_t n, int threads, F&& f) {
  parallel_for((n + LATENTS - 1) / LATENTS, threads, [&](int64_t task, int worker) {
    for (int64_t i = task * LATENTS; i < n && i < (task + 1) * LATENTS; ++i) f(i, worker);
  });
}

// Whether fp32 arithmetic on a row of this ||r||² neither overflows nor vanishes.
FASTSAE_INLINE bool is_plain(double square) { return square > 1e-30 && square < 1e30; }

// ||r||²; in double where it is not plain.
template <class T>
double square_norm(const T* r, int64_t d) {
  double square = dot(r, r, d);
  if (is_plain(square)) return square;
  square = 0;
  for (int64_t i = 0; i < d; ++i) square += double(to_float(r[i])) * to_float(r[i]);
  return square;
}

// y += Σ coef·src[token] over the pairs of latent f, tokens ascending.
template <class T>
void add_pairs(const Segment& s, int64_t f, float* y, int64_t d) {
  RowSum<T> sum(y, d);
  for (int64_t i = s.latent_ptr[f]; i < s.latent_ptr[f + 1]; ++i)
    sum.add(s.coef[s.entry[i]], row<const T>(s.src, s.token[i]));
  sum.flush();
}

// g -= <g, r> r / ||r||²
template <class G, class T>
void project_row(G* g, const T* r, int64_t d) {
  const double square = square_norm(r, d);
  if (!(square > 0)) return;
  if (is_plain(square)) {
    const float c = static_cast<float>(dot(g, r, d) / square);
    if (c == 0) return;
    for (int64_t j = 0; j < d; ++j) assign(g[j], to_float(g[j]) - c * to_float(r[j]));
    return;
  }
  double along = 0;
  for (int64_t j = 0; j < d; ++j) along += double(to_float(g[j])) * to_float(r[j]);
  const double c = along / square;
  for (int64_t j = 0; j < d; ++j)
    assign(g[j], static_cast<float>(to_float(g[j]) - c * to_float(r[j])));
}

// r /= ||r||; zeros stay.
template <class T>
void normalize_row(T* r, int64_t d) {
  const double square = square_norm(r, d);
  if (!(square > 0)) return;
  const double inverse = 1 / std::sqrt(square);
  for (int64_t j = 0; j < d; ++j) assign(r[j], static_cast<float>(to_float(r[j]) * inverse));
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
