// The few vector operations the kernels are written in, for the instruction set of this translation
// unit.
//
// Every op file is compiled once for each instruction set (setup.py), inside namespace
// fastsae::FASTSAE_ISA. So these files use nothing of the standard library but small functions
// of <cmath>: the linker keeps one copy of an inline function, and setup.py's link order makes it
// the one that runs anywhere.
//
// `dot` has one summation order on every CPU: 64 running sums, product and sum rounded apart (no
// FMA), then a halving tree. It is where every value that leaves the library comes from, so no bit
// of a result depends on the instruction set, the block size or the number of threads.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

using bf16 = uint16_t;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

#define FASTSAE_INLINE inline __attribute__((always_inline))

FASTSAE_INLINE vec splat(float a) { return vec{} + a; }

FASTSAE_INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTSAE_INLINE vec load(const bf16* p) {
  hvec h;
  std::memcpy(&h, p, sizeof h);
  const uvec u = __builtin_convertvector(h, uvec) << 16;
  vec v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

FASTSAE_INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

FASTSAE_INLINE float to_float(float v) { return v; }
FASTSAE_INLINE float to_float(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// Round to nearest even; NaN stays NaN.
FASTSAE_INLINE bf16 to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((u >> 16) | 0x40);
  return static_cast<bf16>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

// An fp32 number that is read as if it had been stored in bf16.
struct rounded {
  float value;
};
FASTSAE_INLINE float to_float(rounded v) { return to_float(to_bf16(v.value)); }
FASTSAE_INLINE vec load(const rounded* p) {
  uvec u;
  std::memcpy(&u, p, sizeof u);
  const uvec nearest = (u + 0x7fffu + (u >> 16 & 1)) & 0xffff0000u;
  const uvec bits = (u & 0x7fffffffu) > 0x7f800000u ? u : nearest;  // NaN stays NaN
  vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

FASTSAE_INLINE void assign(float& out, float v) { out = v; }
FASTSAE_INLINE void assign(bf16& out, float v) { out = to_bf16(v); }

// a·b + c in one rounding where the CPU has it. Only for screening, whose error bound covers both
// ways.
FASTSAE_INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

FASTSAE_INLINE vec root(vec a) {  // correctly rounded square roots
#if defined(__AVX512F__)
  return (vec)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vec)_mm256_sqrt_ps((__m256)a);
#elif defined(__x86_64__)
  return (vec)_mm_sqrt_ps((__m128)a);
#elif defined(__aarch64__)
  return (vec)vsqrtq_f32((float32x4_t)a);
#else
  vec r;
  for (int i = 0; i < LANES; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
#endif
}

// Bit i is set unless a[i] < b[i]: a NaN counts as "not less".
FASTSAE_INLINE uint32_t not_less(vec a, vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpnlt_ps((__m128)a, (__m128)b)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(!(a[i] < b[i])) << i;
  return bits;
#endif
}

// Bit i is set if a[i] >= b[i].
FASTSAE_INLINE uint32_t at_least(vec a, vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
  return bits;
#endif
}

// Lane i of the result is lane i + by of v; the lanes beyond are of no interest.
template <int BY>
FASTSAE_INLINE vec shift_lanes(vec v) {
  typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
  ivec from;
  for (int i = 0; i < LANES; ++i) from[i] = (i + BY) % LANES;
#if defined(__clang__)
  vec out;
  for (int i = 0; i < LANES; ++i) out[i] = v[from[i]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

constexpr int DOT_LANES = 64;

template <class A, class B>
float dot(const A* a, const B* b, int64_t n) {
  constexpr int NV = DOT_LANES / LANES;
  vec acc[NV] = {};
  int64_t i = 0;
  for (; i + DOT_LANES <= n; i += DOT_LANES)
    for (int v = 0; v < NV; ++v) acc[v] += load(a + i + v * LANES) * load(b + i + v * LANES);
  if (i < n) {
    float ta[DOT_LANES] = {}, tb[DOT_LANES] = {};
    for (int j = 0; i + j < n; ++j) ta[j] = to_float(a[i + j]), tb[j] = to_float(b[i + j]);
    for (int v = 0; v < NV; ++v) acc[v] += load(ta + v * LANES) * load(tb + v * LANES);
  }
  for (int half = NV / 2; half > 0; half /= 2)
    for (int v = 0; v < half; ++v) acc[v] += acc[v + half];
  vec sum = acc[0];
  if (LANES > 8) sum += shift_lanes<8 % LANES>(sum);
  if (LANES > 4) sum += shift_lanes<4 % LANES>(sum);
  sum += shift_lanes<2>(sum);
  sum += shift_lanes<1>(sum);
  return sum[0];
}

// y += c0·row0, then c1·row1, … in the order they are added; four rows are read in one pass over y.
template <class T>
class RowSum {
 public:
  RowSum(float* y, int64_t n) : y_(y), n_(n) {}
  FASTSAE_INLINE void add(float c, const T* row) {
    c_[count_] = c;
    row_[count_] = row;
    if (++count_ == 4) flush();
  }
  void flush() {
    if (count_ == 4)
      sweep<4>();
    else if (count_ == 3)
      sweep<3>();
    else if (count_ == 2)
      sweep<2>();
    else if (count_ == 1)
      sweep<1>();
    count_ = 0;
  }

 private:
  template <int M>
  FASTSAE_INLINE void sweep() {
    int64_t i = 0;
    for (; i + LANES <= n_; i += LANES) {
      vec v = load(y_ + i);
      for (int m = 0; m < M; ++m) v += splat(c_[m]) * load(row_[m] + i);
      store(y_ + i, v);
    }
    for (; i < n_; ++i)
      for (int m = 0; m < M; ++m) y_[i] += c_[m] * to_float(row_[m][i]);
  }
  float* y_;
  int64_t n_;
  float c_[4];
  const T* row_[4];
  int count_ = 0;
};

template <class T>
struct Buffer {  // uninitialised, aligned to a cache line
  T* data;
  explicit Buffer(int64_t n)
      : data(static_cast<T*>(::operator new(sizeof(T) * (n > 0 ? n : 1), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <class T, class M>
FASTSAE_INLINE T* row(const M& m, int64_t i) {  // row i of a Matrix or MutableMatrix
  return static_cast<T*>(m.data) + i * m.ld;
}

template <class T>
FASTSAE_INLINE void round_row(const float* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) assign(out[i], in[i]);
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
