// rows: gradient rows of W_enc and W_dec from the inverse index, and the row operations around a
// step. Threads own latents; a latent's tokens are summed in ascending order, so no bit depends on
// the threads.
#include "rows.h"
#include "kernels.h"
#include "pool.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t SUMMED_ROWS = 256;  // of one partial column sum: part of the result's definition

template <class T, class Out>
void gradients_as(const RowGradientArgs& a) {
  Buffer<float> sums(a.threads * a.d);
  for_each_row(a.n_latents, a.threads, [&](int64_t f, int worker) {
    float* y = sums.data + worker * a.d;
    if (a.rows.data) {
      for (int64_t i = 0; i < a.d; ++i) y[i] = 0;
      add_pairs<T>(a.pairs, f, y, a.d);
      round_row(y, row<Out>(a.rows, f), a.d);
    }
    if (a.coef_sums) {
      float sum = 0;
      for (int64_t i = a.pairs.latent_ptr[f]; i < a.pairs.latent_ptr[f + 1]; ++i)
        sum += a.pairs.coef[a.pairs.entry[i]];
      a.coef_sums[f] = sum;
    }
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
  for_each_row(n, threads,
               [&](int64_t i, int) { project_row(row<T>(grad, i), row<const T>(w, i), d); });
}

template <class T>
void normalize_as(MutableMatrix w, int64_t n, int64_t d, int threads) {
  for_each_row(n, threads, [&](int64_t i, int) { normalize_row(row<T>(w, i), d); });
}

}  // namespace

void row_gradients(const RowGradientArgs& a) {
  if (a.pairs.src.is_bf16)
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
