// decode: x̂[n] = bias + Σ vals·W_dec[idx] over the pairs of token n in storage order, in fp32; the
// error of it against a target; and dvals = <g[n], W_dec[idx]>. One gather of each row of W_dec a
// pair.
#include "kernels.h"
#include "pool.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

constexpr int64_t TOKENS = 16;  // of one task

struct Entries {
  int64_t begin, end;
};
Entries entries(const Pairs& p, int64_t n) {
  if (p.row_ptr) return {p.row_ptr[n], p.row_ptr[n + 1]};
  return {n * p.k, (n + 1) * p.k};
}

template <class F>
void for_each_token(int64_t n_tokens, int threads, F&& f) {
  parallel_for((n_tokens + TOKENS - 1) / TOKENS, threads, [&](int64_t task, int worker) {
    for (int64_t n = task * TOKENS; n < n_tokens && n < (task + 1) * TOKENS; ++n) f(n, worker);
  });
}

template <class T>
void decode_row(const DecodeArgs& a, int64_t n, float* y) {
  for (int64_t i = 0; i < a.d; ++i) y[i] = a.bias ? a.bias[i] : 0.0f;
  RowSum<T> sum(y, a.d);
  const Entries e = entries(a.codes, n);
  for (int64_t i = e.begin; i < e.end; ++i)
    if (a.codes.idx[i] >= 0) sum.add(a.codes.vals[i], row<const T>(a.w, a.codes.idx[i]));
  sum.flush();
}

template <class T, class G>
void dot_rows(const DecodeArgs& a, int64_t n, const G* g, float* dvals) {
  const Entries e = entries(a.codes, n);
  for (int64_t i = e.begin; i < e.end; ++i) {
    const int32_t id = a.codes.idx[i];
    if (i + 1 < e.end && a.codes.idx[i + 1] >= 0)
      __builtin_prefetch(row<const T>(a.w, a.codes.idx[i + 1]));
    dvals[i] = id < 0 ? 0.0f : dot(g, row<const T>(a.w, id), a.d);
  }
}

template <class T, class Out>
void decode_as(const DecodeArgs& a, MutableMatrix out) {
  Buffer<float> rows(a.threads * a.d);
  for_each_token(a.codes.n, a.threads, [&](int64_t n, int worker) {
    float* y = rows.data + worker * a.d;
    decode_row<T>(a, n, y);
    round_row(y, row<Out>(out, n), a.d);
  });
}

template <class T, class Target>
double error_as(const DecodeArgs& a, Matrix target, const ErrorOutputs& out) {
  Buffer<float> squares(a.codes.n);
  for_each_token(a.codes.n, a.threads, [&](int64_t n, int) {
    float* e = out.error + n * a.d;
    decode_row<T>(a, n, e);
    if (out.reconstruction)
      for (int64_t i = 0; i < a.d; ++i) out.reconstruction[n * a.d + i] = e[i];
    const Target* t = row<const Target>(target, n);
    for (int64_t i = 0; i < a.d; ++i) e[i] -= to_float(t[i]);
    squares.data[n] = dot(e, e, a.d);
    if (out.dvals) dot_rows<T>(a, n, e, out.dvals);
  });
  double sum = 0;
  for (int64_t n = 0; n < a.codes.n; ++n) sum += squares.data[n];
  return sum;
}

template <class T, class G>
void dvals_as(const DecodeArgs& a, Matrix g, float* dvals) {
  for_each_token(a.codes.n, a.threads,
                 [&](int64_t n, int) { dot_rows<T>(a, n, row<const G>(g, n), dvals); });
}

}  // namespace

void decode_fwd(const DecodeArgs& a, MutableMatrix out) {
  if (a.w.is_bf16)
    out.is_bf16 ? decode_as<bf16, bf16>(a, out) : decode_as<bf16, float>(a, out);
  else
    out.is_bf16 ? decode_as<float, bf16>(a, out) : decode_as<float, float>(a, out);
}

double decode_error(const DecodeArgs& a, Matrix target, const ErrorOutputs& out) {
  if (a.w.is_bf16)
    return target.is_bf16 ? error_as<bf16, bf16>(a, target, out)
                          : error_as<bf16, float>(a, target, out);
  return target.is_bf16 ? error_as<float, bf16>(a, target, out)
                        : error_as<float, float>(a, target, out);
}

void decode_bwd_vals(const DecodeArgs& a, Matrix g, float* dvals) {
  if (a.w.is_bf16)
    g.is_bf16 ? dvals_as<bf16, bf16>(a, g, dvals) : dvals_as<bf16, float>(a, g, dvals);
  else
    g.is_bf16 ? dvals_as<float, bf16>(a, g, dvals) : dvals_as<float, float>(a, g, dvals);
}

}  // namespace FASTSAE_ISA
}  // namespace fastsae
