// select: which candidates of one token can still be among its k best, and which are. (For
// encode_columns, of one latent: the ids are then tokens.)
#pragma once
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// The buffer of one token. Pair i's score lies in [lower, upper]; it is the score where both are
// equal. Ids ascend.
struct Candidates {
  float* lower;
  float* upper;
  int32_t* id;

  static constexpr int64_t WORDS = 3;  // of 4 bytes, for each candidate
  Candidates(float* memory, int64_t capacity)
      : lower(memory),
        upper(memory + capacity),
        id(reinterpret_cast<int32_t*>(memory + 2 * capacity)) {}

  FASTSAE_INLINE void copy(int64_t i, const Candidates& to, int64_t at) const {
    to.lower[at] = lower[i];
    to.upper[at] = upper[i];
    to.id[at] = id[i];
  }
};

inline int64_t count_at_least(const float* v, int64_t n, float t) {
  const vec tv = splat(t);
  int64_t count = 0, i = 0;
  for (; i + LANES <= n; i += LANES) count += __builtin_popcount(at_least(load(v + i), tv));
  for (; i < n; ++i) count += v[i] >= t;
  return count;
}

// A threshold that at least k of the n lower bounds reach, close below the k-th largest of them;
// the old one where fewer than k reach it.
inline float raised(const float* lower, int64_t n, int64_t k, float threshold) {
  if (n < k || count_at_least(lower, n, threshold) < k) return threshold;
  float highest = threshold;
  for (int64_t i = 0; i < n; ++i) highest = lower[i] > highest ? lower[i] : highest;
  for (int round = 0; round < 16; ++round) {
    const float middle = threshold + (highest - threshold) * 0.5f;
    if (!(middle > threshold && middle < highest)) break;
    const int64_t count = count_at_least(lower, n, middle);
    if (count < k) {
      highest = middle;
      continue;
    }
    threshold = middle;
    if (count <= k + k / 16) break;
  }
  return threshold;
}

// Drops the candidates that cannot reach the threshold; returns how many remain, in their order.
inline int64_t drop_below(const Candidates& c, int64_t n, float threshold) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float upper = c.upper[i];
    c.copy(i, c, kept);
    kept += upper >= threshold;
  }
  return kept;
}

// ---- the total order: score descending, then id ascending, as one descending integer ----

FASTSAE_INLINE uint64_t order_key(float value, int32_t id) {
  uint32_t u;
  std::memcpy(&u, &value, sizeof u);
  u = u & 0x80000000u ? ~u : u | 0x80000000u;
  return static_cast<uint64_t>(u) << 32 | static_cast<uint32_t>(~id);
}
FASTSAE_INLINE float key_value(uint64_t key) {
  const uint32_t k = static_cast<uint32_t>(key >> 32), u = k & 0x80000000u ? k & 0x7fffffffu : ~k;
  float value;
  std::memcpy(&value, &u, sizeof value);
  return value;
}
FASTSAE_INLINE int32_t key_id(uint64_t key) { return ~static_cast<int32_t>(key); }

// Writes the largest min(n, k) of n distinct keys to out, descending; returns how many. out has room
// for n; keys is overwritten.
inline int64_t largest(uint64_t* keys, int64_t n, int64_t k, uint64_t* out) {
  const int64_t kept = n < k ? n : k;
  if (n <= 128) {  // every key's place is the number of keys above it
    for (int64_t i = 0; i < n; ++i) {
      int64_t place = 0;
      for (int64_t j = 0; j < n; ++j) place += keys[j] > keys[i];
      if (place < k) out[place] = keys[i];
    }
    return kept;
  }
  // A radix sort, lowest byte first; a byte that all keys share is passed over.
  constexpr int DIGITS = 8, BINS = 256;
  uint32_t counts[DIGITS][BINS] = {};
  for (int64_t i = 0; i < n; ++i)
    for (int digit = 0; digit < DIGITS; ++digit) ++counts[digit][keys[i] >> 8 * digit & 255];
  uint64_t *from = keys, *to = out;
  for (int digit = 0; digit < DIGITS; ++digit) {
    uint32_t* next = counts[digit];
    if (next[from[0] >> 8 * digit & 255] == n) continue;
    uint32_t place = 0;
    for (int bin = BINS - 1; bin >= 0; --bin) {
      const uint32_t count = next[bin];
      next[bin] = place;
      place += count;
    }
    for (int64_t i = 0; i < n; ++i) to[next[from[i] >> 8 * digit & 255]++] = from[i];
    uint64_t* const sorted = to;
    to = from;
    from = sorted;
  }
  if (from != out) std::memcpy(out, from, kept * sizeof *out);
  return kept;
}

// Keeps the k best of n candidates whose scores are known, in the order they had. Returns the least
// score kept, or -inf where there were fewer than k. keys has room for 2n.
inline float keep_largest(const Candidates& c, int64_t& n, int64_t k, uint64_t* keys) {
  if (n < k) return -INFINITY;
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(c.lower[i], static_cast<int32_t>(i));
  largest(keys, n, k, keys + n);
  const uint64_t last = keys[n + k - 1];
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t key = order_key(c.lower[i], static_cast<int32_t>(i));
    c.copy(i, c, kept);
    kept += key >= last;
  }
  n = kept;
  return key_value(last);
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
