// moments: how Adam's moments and bf16 parameters are stored, a row at a time. fastsae/moments.py
// says what the codes are; the order of operations is the same there, so that bits are, too.
#pragma once
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint64_t lvec __attribute__((vector_size(4 * LANES)));

constexpr int64_t CODED = MOMENT_BLOCK;  // columns that share a scale
constexpr float M_UNIT = 127 * 127, V_UNIT = 255 * 255;
constexpr float LARGEST = 3.4028234663852886e38f, LARGEST_ROOT = 1.8446742974197924e19f;
constexpr float SMALLEST = 1.1754943508222875e-38f;  // that is normal

// A row's width with room for whole blocks.
FASTSAE_INLINE int64_t coded_width(int64_t d) { return (d + CODED - 1) / CODED * CODED; }

FASTSAE_INLINE vec to_vec(ivec i) { return __builtin_convertvector(i, vec); }
FASTSAE_INLINE ivec to_ivec(vec v) { return __builtin_convertvector(v, ivec); }
FASTSAE_INLINE vec larger(vec a, vec b) { return a > b ? a : b; }

// Of numbers below 2³², which a product of 64 bits would not use.
FASTSAE_INLINE lvec product(lvec a, uint32_t b) {
  const lvec by = lvec{} + b;
#if defined(__AVX512F__)
  return (lvec)_mm512_mul_epu32((__m512i)a, (__m512i)by);
#elif defined(__AVX2__)
  return (lvec)_mm256_mul_epu32((__m256i)a, (__m256i)by);
#elif defined(__x86_64__)
  return (lvec)_mm_mul_epu32((__m128i)a, (__m128i)by);
#else
  return a * by;
#endif
}

// Philox4x32-7 (Salmon et al. 2011) with key step and counter (⌊j/2⌋, row): for column j one word
// for the moments and one for the parameter. Writes whole vectors.
inline void random_row(int64_t step, int64_t row, int64_t d, uint32_t* of_moments,
                       uint32_t* of_parameter) {
  for (int64_t half = 0; 2 * half < d; half += LANES / 2) {
    lvec c0, c1 = lvec{} + static_cast<uint32_t>(row), c2{}, c3{};
    for (int i = 0; i < LANES / 2; ++i) c0[i] = half + i;
    uint32_t k0 = static_cast<uint32_t>(step), k1 = 0;
    for (int round = 0; round < 7; ++round) {
      const lvec a = product(c0, 0xD2511F53u), b = product(c2, 0xCD9E8D57u);
      c0 = (b >> 32) ^ c1 ^ uint64_t{k0};
      c2 = (a >> 32) ^ c3 ^ uint64_t{k1};
      c1 = b & 0xffffffffu;
      c3 = a & 0xffffffffu;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const lvec m = c0 | c1 << 32, p = c2 | c3 << 32;  // the even column's word first
    std::memcpy(of_moments + 2 * half, &m, sizeof m);
    std::memcpy(of_parameter + 2 * half, &p, sizeof p);
  }
}

// Up or down at random, by the 16 bits of each word from `shift` on.
inline void round_row_at_random(const float* in, bf16* out, int64_t d, const uint32_t* random,
                                int shift) {
  for (int64_t j = 0; j < d; ++j) {
    uint32_t u;
    std::memcpy(&u, in + j, sizeof u);
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    u += random[j] >> shift & 0xffffu;
    out[j] = is_nan ? 0x7fc0 : static_cast<bf16>(u >> 16);
  }
}

// The largest of 256 numbers ≥ 0; NaN if one of them is.
inline float block_maximum(const float* x) {
  vec most = {}, nan = {};
  for (int64_t j = 0; j < CODED; j += LANES) {
    most = larger(load(x + j), most);
    nan += load(x + j) - load(x + j);
  }
  float found = 0;
  for (int i = 0; i < LANES; ++i) found = (most[i] > found ? most[i] : found) + nan[i];
  return found;
}

FASTSAE_INLINE vec chance(const uint32_t* random, int shift) {
  ivec bits;
  std::memcpy(&bits, random, sizeof bits);
  return (to_vec(bits >> shift & 0xffff) + 0.5f) * 0x1p-16f;
}

// Where y ≥ 0 lies between squares: the root of the lower one. 0 for NaN, of a scale of 0 or NaN.
FASTSAE_INLINE vec lower_root(vec& y) {
  y = y == y ? y : vec{};
  return to_vec(to_ivec(root(y)));
}

// Sets x (coded_width(d), zeros beyond d) from a row of codes, and back; x is lost in the latter.
inline void decode_m(const int8_t* codes, const float* scales, int64_t d, float* x) {
  for (int64_t j = 0; j < d; ++j) {
    const float q = codes[j];
    x[j] = q * std::fabs(q) / M_UNIT * scales[j / CODED];
  }
}

inline void decode_v(const uint8_t* codes, const float* scales, int64_t d, float* x) {
  for (int64_t j = 0; j < d; ++j) {
    const float c = codes[j], r = c * c / V_UNIT * scales[j / CODED], v = r * r;
    x[j] = v < SMALLEST && c > 0 ? SMALLEST : v;
  }
}

inline void encode_m(float* x, int64_t d, const uint32_t* random, int8_t* codes, float* scales) {
  float size[CODED];
  for (int64_t start = 0; start < d; start += CODED) {
    float* block = x + start;
    for (int64_t j = 0; j < CODED; ++j) {
      const float a = std::fabs(block[j]);
      size[j] = a > LARGEST ? LARGEST : a;
    }
    const float scale = block_maximum(size);
    scales[start / CODED] = scale;
    for (int64_t j = 0; j < CODED; j += LANES) {
      vec y = load(size + j) / scale * M_UNIT;
      const vec c = lower_root(y);
      const vec q = chance(random + start + j, 0) * (2 * c + 1) < y - c * c ? c + 1 : c;
      store(block + j, load(block + j) < 0 ? -q : q);
    }
    for (int64_t j = start; j < d && j < start + CODED; ++j) codes[j] = static_cast<int8_t>(x[j]);
  }
}

inline void encode_v(float* x, int64_t d, const uint32_t* random, uint8_t* codes, float* scales) {
  for (int64_t start = 0; start < d; start += CODED) {
    float* block = x + start;
    for (int64_t j = 0; j < CODED; j += LANES) {
      const vec r = root(load(block + j));
      store(block + j, r > LARGEST_ROOT ? splat(LARGEST_ROOT) : r);
    }
    const float scale = block_maximum(block);
    scales[start / CODED] = scale;
    for (int64_t j = 0; j < CODED; j += LANES) {
      vec y = load(block + j) / scale * V_UNIT;
      const vec c = lower_root(y), low = c * c, gap = 2 * c + 1;
      const vec up = chance(random + start + j, 16) * (gap * (low + low + gap));
      const vec q = up < (y - low) * (y + low) ? c + 1 : c;
      store(block + j, q < 1 && y > 0 ? splat(1) : q);
    }
    for (int64_t j = start; j < d && j < start + CODED; ++j) codes[j] = static_cast<uint8_t>(x[j]);
  }
}

// A row of both moments as floats while it is updated: where it lies, or in the given room.
class Moments {
 public:
  // room: 2·coded_width(a.d)
  Moments(const AdamArgs& a, int64_t f, float* room) : a_(a), at_(f * a.d), d_(a.d) {
    const int64_t width = coded_width(d_), blocks = width / CODED;
    scales_at_ = f * blocks;
    m = room;
    v = room + width;
    if (a.stored == Stored::FLOAT) {
      if (a.m) m = static_cast<float*>(a.m) + at_;
      v = static_cast<float*>(a.v) + at_;
      return;
    }
    for (int64_t j = d_; j < width; ++j) m[j] = v[j] = 0;
    if (a.stored == Stored::BF16) {
      if (a.m) widen(static_cast<const bf16*>(a.m) + at_, m);
      widen(static_cast<const bf16*>(a.v) + at_, v);
    } else {
      if (a.m) decode_m(static_cast<const int8_t*>(a.m) + at_, a.m_scale + scales_at_, d_, m);
      decode_v(static_cast<const uint8_t*>(a.v) + at_, a.v_scale + scales_at_, d_, v);
    }
  }

  void write(const uint32_t* random) {
    if (a_.stored == Stored::BF16) {
      if (a_.m) narrow(m, static_cast<bf16*>(a_.m) + at_, random, 0);
      narrow(v, static_cast<bf16*>(a_.v) + at_, random, 16);
    } else if (a_.stored == Stored::INT8) {
      if (a_.m) encode_m(m, d_, random, static_cast<int8_t*>(a_.m) + at_, a_.m_scale + scales_at_);
      encode_v(v, d_, random, static_cast<uint8_t*>(a_.v) + at_, a_.v_scale + scales_at_);
    }
  }

  float *m, *v;

 private:
  void widen(const bf16* in, float* out) {
    for (int64_t j = 0; j < d_; ++j) out[j] = to_float(in[j]);
  }
  void narrow(const float* in, bf16* out, const uint32_t* random, int shift) {
    a_.stochastic ? round_row_at_random(in, out, d_, random, shift) : round_row(in, out, d_);
  }
  const AdamArgs& a_;
  int64_t at_, d_, scales_at_;
};

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
