// rows: gradient rows of W_enc and W_dec from the inverse index, and the row operations around a
// step. Threads own latents; a latent's tokens are summed in ascending order, so no bit depends on
// the threads.
#include <cmath>

#include "kernels.h"
#include "pool.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t LATENTS = 32;       // of one task
constexpr int64_t SUMMED_ROWS = 256;  // of one partial column sum: part of the result's definition

template <class F>
void for_each_row(int64_t n, int threads, F&& f) {
  parallel_for((n + LATENTS - 1) / LATENTS, threads, [&](int64_t task, int worker) {
    for (int64_t i = task * LATENTS; i < n && i < (task + 1) * LATENTS; ++i) f(i, worker);
  });
}

// ||r||²; in double where fp32 squares could overflow or vanish.
template <class T>
double square_norm(const T* r, int64_t d) {
  double square = dot(r, r, d);
  if (square > 1e-30 && square < 1e30) return square;
  square = 0;
  for (int64_t i = 0; i < d; ++i) square += double(to_float(r[i])) * to_float(r[i]);
  return square;
}

template <class T, class Out>
void gradients_as(const RowGradientArgs& a) {
  Buffer<float> sums(a.threads * a.d);
  for_each_row(a.n_latents, a.threads, [&](int64_t f, int worker) {
    float* y = sums.data + worker * a.d;
    float coef_sum = 0;
    for (int64_t i = 0; i < a.d; ++i) y[i] = 0;
    RowSum<T> sum(y, a.d);
    for (int64_t p = a.latent_ptr[f]; p < a.latent_ptr[f + 1]; ++p) {
      const float c = a.coef[a.entry[p]];
      coef_sum += c;
      if (a.rows.data) sum.add(c, row<const T>(a.src, a.token[p]));
    }
    sum.flush();
    if (a.rows.data) round_row(y, row<Out>(a.rows, f), a.d);
    if (a.coef_sums) a.coef_sums[f] = coef_sum;
  });
}

template <class T>
void column_sum_as(Matrix m, const float* coef, int64_t n, int64_t d, float* out, int threads) {
  const int64_t parts = (n + SUMMED_ROWS - 1) / SUMMED_ROWS;
  Buffer<float> sums(parts * d);
  parallel_for(parts, threads, [&](int64_t part, int) {
    float* y = sums.data + part * d;
    for (int64_t i = 0; i < d; ++i) y[i] = 0;
    RowSum<T> sum(y, d);
    for (int64_t r = part * SUMMED_ROWS; r < n && r < (part + 1) * SUMMED_ROWS; ++r) {
      const float c = coef ? coef[r] : 1.0f;
      if (c != 0) sum.add(c, row<const T>(m, r));
    }
    sum.flush();
  });
  for (int64_t i = 0; i < d; ++i) out[i] = 0;
  RowSum<float> total(out, d);
  for (int64_t part = 0; part < parts; ++part) total.add(1.0f, sums.data + part * d);
  total.flush();
}

template <class T>
void project_as(MutableMatrix grad, Matrix w, int64_t n, int64_t d, int threads) {
  for_each_row(n, threads, [&](int64_t i, int) {
    T* g = row<T>(grad, i);
    const T* r = row<const T>(w, i);
    const double square = square_norm(r, d);
    if (!(square > 0)) return;
    const float c = static_cast<float>(dot(g, r, d) / square);
    if (c == 0) return;
    for (int64_t j = 0; j < d; ++j) assign(g[j], to_float(g[j]) - c * to_float(r[j]));
  });
}

template <class T>
void normalize_as(MutableMatrix w, int64_t n, int64_t d, int threads) {
  for_each_row(n, threads, [&](int64_t i, int) {
    T* r = row<T>(w, i);
    const double square = square_norm(r, d);
    if (!(square > 0)) return;
    const double inverse = 1 / std::sqrt(square);
    for (int64_t j = 0; j < d; ++j) assign(r[j], static_cast<float>(to_float(r[j]) * inverse));
  });
}

}  // namespace

void row_gradients(const RowGradientArgs& a) {
  if (a.src.is_bf16)
    a.rows.is_bf16 ? gradients_as<bf16, bf16>(a) : gradients_as<bf16, float>(a);
  else
    a.rows.is_bf16 ? gradients_as<float, bf16>(a) : gradients_as<float, float>(a);
}

void column_sum(Matrix m, const float* coef, int64_t n, int64_t d, float* out, int threads) {
  m.is_bf16 ? column_sum_as<bf16>(m, coef, n, d, out, threads)
            : column_sum_as<float>(m, coef, n, d, out, threads);
}

void project_rows(MutableMatrix grad, Matrix w, int64_t n, int64_t d, int threads) {
  w.is_bf16 ? project_as<bf16>(grad, w, n, d, threads) : project_as<float>(grad, w, n, d, threads);
}

void normalize_rows(MutableMatrix w, int64_t n, int64_t d, int threads) {
  w.is_bf16 ? normalize_as<bf16>(w, n, d, threads) : normalize_as<float>(w, n, d, threads);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
