// adam: Adam on the rows of a parameter, the gradient of a row summed from the pairs that touched
// it while the row is in cache. No gradient matrix exists. Around the update, in the same visit:
// the gradient's part along the row is removed (project), the whole gradient is scaled (clipping),
// the row gets norm 1.
//
// A row that no pair touches still moves while its first moment lives; one that was never touched
// cannot. With beta1 = 0 an untouched row does not move at all, so its second moment is caught up
// when it is next touched, which is exact. `lazy` leaves untouched rows alone with any beta1, which
// is not Adam but what torch.optim.SparseAdam does.
//
// Moments that are not fp32 are widened for the visit, a row in the cache.
#include <cmath>

#include "kernels.h"
#include "moments.h"
#include "pool.h"
#include "rows.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// The gradient of row f in g, projected but not scaled; false where nothing touched it.
template <class T>
bool gradient(const AdamArgs& a, int64_t f, float* g) {
  bool touched = a.dense.data != nullptr;
  for (int64_t i = 0; i < a.n_segments; ++i)
    touched |= a.segments[i].latent_ptr[f] < a.segments[i].latent_ptr[f + 1];
  if (!touched) return false;
  for (int64_t j = 0; j < a.d; ++j)
    g[j] = !a.dense.data     ? 0
           : a.dense.is_bf16 ? to_float(row<const bf16>(a.dense, f)[j])
                             : row<const float>(a.dense, f)[j];
  for (int64_t i = 0; i < a.n_segments; ++i)
    a.segments[i].src.is_bf16 ? add_pairs<bf16>(a.segments[i], f, g, a.d)
                              : add_pairs<float>(a.segments[i], f, g, a.d);
  if (a.project) project_row(g, row<const T>(a.p, f), a.d);
  return true;
}

struct Constants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps, keep,
      scale;
};

template <class V>
FASTSAE_INLINE V adam_step(V g, V w, V& m, V& v, const Constants& c, V root(V)) {
  g = g * c.scale;
  m = m * c.beta1 + g * c.one_minus_beta1;
  v = v * c.beta2 + g * g * c.one_minus_beta2;
  return w * c.keep - m * c.step_size / (root(v) / c.root_correction + c.eps);
}
FASTSAE_INLINE float scalar_root(float x) { return std::sqrt(x); }

void round_parameter(const float* w, float* p, int64_t d, const uint32_t*) { round_row(w, p, d); }
void round_parameter(const float* w, bf16* p, int64_t d, const uint32_t* random) {
  random ? round_row_at_random(w, p, d, random, 0) : round_row(w, p, d);
}

template <class T>
void update_as(const AdamArgs& a) {
  const double c1 = 1 - std::pow(a.beta1, double(a.step)),
               c2 = 1 - std::pow(a.beta2, double(a.step));
  const Constants c{
      float(a.beta1),   float(1 - a.beta1),   float(a.beta2), float(1 - a.beta2),
      float(a.lr / c1), float(std::sqrt(c2)), float(a.eps),   float(1 - a.lr * a.weight_decay),
      float(a.scale)};
  const bool catch_up = a.m == nullptr;  // beta1 = 0
  const bool rounds_p = a.stochastic && a.p.is_bf16;
  const bool draws =
      rounds_p || a.stored == Stored::INT8 || (a.stochastic && a.stored == Stored::BF16);
  const int64_t width = coded_width(a.d);
  Buffer<float> rows(a.threads * 4 * width);
  Buffer<uint32_t> words(draws ? a.threads * 2 * width : 0);
  for_each_row(a.n, a.threads, [&](int64_t f, int worker) {
    float* g = rows.data + worker * 4 * width;
    float* w = g + width;
    uint32_t* random = words.data + worker * 2 * width;
    if (!gradient<T>(a, f, g)) {
      const bool still = a.lazy || catch_up || a.last[f] == 0;
      if (still && a.weight_decay == 0) return;
      for (int64_t j = 0; j < a.d; ++j) g[j] = 0;
    }
    Moments moments(a, f, w + width);
    float *m = moments.m, *v = moments.v;
    if (catch_up) {
      const float decay = float(std::pow(a.beta2, double(a.step - 1 - a.last[f])));
      for (int64_t j = 0; j < a.d; ++j) m[j] = 0, v[j] *= decay;
    }
    a.last[f] = static_cast<int32_t>(a.step);
    T* p = row<T>(a.p, f);
    int64_t j = 0;
    for (; j + LANES <= a.d; j += LANES) {
      vec mv = load(m + j), vv = load(v + j);
      store(w + j, adam_step<vec>(load(g + j), load(p + j), mv, vv, c, root));
      store(m + j, mv);
      store(v + j, vv);
    }
    for (; j < a.d; ++j) w[j] = adam_step<float>(g[j], to_float(p[j]), m[j], v[j], c, scalar_root);
    if (a.normalize) normalize_row(w, a.d);
    if (draws) random_row(a.step, a.first_row + f, width, random, random + width);
    moments.write(random);
    round_parameter(w, p, a.d, rounds_p ? random + width : nullptr);
  });
}

template <class T>
double square_norm_as(const AdamArgs& a) {
  Buffer<float> rows(a.threads * a.d);
  Buffer<double> squares(a.n);
  for_each_row(a.n, a.threads, [&](int64_t f, int worker) {
    float* g = rows.data + worker * a.d;
    squares.data[f] = gradient<T>(a, f, g) ? square_norm(g, a.d) : 0;
  });
  double sum = 0;
  for (int64_t f = 0; f < a.n; ++f) sum += squares.data[f];
  return sum;
}

}  // namespace

void adam(const AdamArgs& a) { a.p.is_bf16 ? update_as<bf16>(a) : update_as<float>(a); }

double gradient_square_norm(const AdamArgs& a) {
  return a.p.is_bf16 ? square_norm_as<bf16>(a) : square_norm_as<float>(a);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
