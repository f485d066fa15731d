// index: the inverse of a batch's pairs: for each latent its tokens, ascending (a stable counting
// sort). Each thread owns a range of latents and reads all pairs, so there are no atomics and one
// order for any number of threads. latent_ptr's differences are the firing counts.
#include "kernels.h"
#include "pool.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

template <class F>
void for_each_pair(const Pairs& p, F&& f) {
  for (int64_t n = 0; n < p.n; ++n) {
    const int64_t begin = p.row_ptr ? p.row_ptr[n] : n * p.k;
    const int64_t end = p.row_ptr ? p.row_ptr[n + 1] : (n + 1) * p.k;
    for (int64_t i = begin; i < end; ++i) f(n, i, p.idx[i]);
  }
}

}  // namespace

void build_index(const IndexArgs& a) {
  int64_t* next = a.latent_ptr + 1;  // counts, then starts, then (after the scatter) ends
  const int64_t parts = a.threads;
  parallel_for(parts, a.threads, [&](int64_t task, int) {
    const Range own = part(a.n_latents, parts, task);
    for (int64_t f = own.begin; f < own.end; ++f) next[f] = 0;
    for_each_pair(a.codes, [&](int64_t, int64_t, int32_t f) {
      if (f >= own.begin && f < own.end) ++next[f];
    });
  });
  int64_t start = 0;
  a.latent_ptr[0] = 0;
  for (int64_t f = 0; f < a.n_latents; ++f) {
    const int64_t count = next[f];
    next[f] = start;
    start += count;
  }
  parallel_for(parts, a.threads, [&](int64_t task, int) {
    const Range own = part(a.n_latents, parts, task);
    for_each_pair(a.codes, [&](int64_t n, int64_t i, int32_t f) {
      if (f < own.begin || f >= own.end) return;
      const int64_t at = next[f]++;
      a.token[at] = static_cast<int32_t>(n);
      a.entry[at] = static_cast<int32_t>(i);
    });
  });
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
