// pairs: what an encoder found, in any order, as rows of tokens.
#pragma once
#include <cstdlib>

#include "kernels.h"
#include "pool.h"
#include "select.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

struct Pair {
  int32_t token, latent;
  float score, value;
};

class PairList {  // grows; used by worker threads, which may not throw
 public:
  Pair* data = nullptr;
  int64_t count = 0;

  PairList() = default;
  ~PairList() { std::free(data); }
  PairList(const PairList&) = delete;
  PairList& operator=(const PairList&) = delete;

  // False where there is no memory.
  bool push(const Pair& pair) {
    if (count == room_ && !grow()) return false;
    data[count++] = pair;
    return true;
  }

 private:
  int64_t room_ = 0;

  bool grow() {
    const int64_t room = room_ ? 2 * room_ : 256;
    void* const grown = std::realloc(data, room * sizeof(Pair));
    if (!grown) return false;
    data = static_cast<Pair*>(grown);
    room_ = room;
    return true;
  }
};

struct PairLists {
  PairList* lists;
  int64_t count;
  explicit PairLists(int64_t n) : lists(new PairList[n]), count(n) {}
  ~PairLists() { delete[] lists; }
  PairLists(const PairLists&) = delete;
  PairLists& operator=(const PairLists&) = delete;

  int64_t n_pairs() const {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += lists[i].count;
    return total;
  }
};

// Writes all pairs: by token, then score descending, then latent. They are counted into latents,
// then into tokens, so that each row's lie by latent and only the scores are left to be sorted.
void write_rows(const PairLists& found, int64_t n, int64_t n_latents, const RowOutputs& out,
                int threads) {
  const int64_t n_pairs = found.n_pairs();
  Buffer<int64_t> next_of_latent(n_latents + 1);
  for (int64_t i = 0; i <= n_latents; ++i) next_of_latent.data[i] = 0;
  for (int64_t i = 0; i <= n; ++i) out.row_ptr[i] = 0;
  const auto each = [&](auto f) {
    for (int64_t l = 0; l < found.count; ++l)
      for (int64_t i = 0; i < found.lists[l].count; ++i) f(found.lists[l].data[i]);
  };
  each([&](const Pair& p) { ++next_of_latent.data[p.latent + 1], ++out.row_ptr[p.token + 1]; });
  for (int64_t i = 0; i < n_latents; ++i) next_of_latent.data[i + 1] += next_of_latent.data[i];
  int64_t longest = 0;
  for (int64_t i = 0; i < n; ++i) {
    longest = out.row_ptr[i + 1] > longest ? out.row_ptr[i + 1] : longest;
    out.row_ptr[i + 1] += out.row_ptr[i];
  }

  Buffer<Pair> by_latent(n_pairs), by_token(n_pairs);
  each([&](const Pair& p) { by_latent.data[next_of_latent.data[p.latent]++] = p; });
  Buffer<int64_t> next_of_token(n);
  for (int64_t i = 0; i < n; ++i) next_of_token.data[i] = out.row_ptr[i];
  for (int64_t i = 0; i < n_pairs; ++i)
    by_token.data[next_of_token.data[by_latent.data[i].token]++] = by_latent.data[i];

  Buffer<uint64_t> keys(threads * 2 * longest);
  const int64_t parts = n < 4 * threads ? n : 4 * threads;
  parallel_for(parts, threads, [&](int64_t task, int worker) {
    uint64_t *const unsorted = keys.data + worker * 2 * longest, *const sorted = unsorted + longest;
    const Range tokens = part(n, parts, task);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) {
      const int64_t first = out.row_ptr[t], length = out.row_ptr[t + 1] - first;
      const Pair* const row = by_token.data + first;
      // -0 ranks as 0.
      for (int64_t i = 0; i < length; ++i)
        unsorted[i] = order_key(row[i].score + 0.0f, static_cast<int32_t>(i));
      if (length > 0) largest(unsorted, length, length, sorted);
      for (int64_t i = 0; i < length; ++i) {
        const Pair& p = row[key_id(sorted[i])];
        out.vals[first + i] = p.value;
        out.idx[first + i] = p.latent;
      }
    }
  });
  for (int64_t i = n_pairs; i < out.room; ++i) out.vals[i] = 0, out.idx[i] = -1;
  out.row_ptr[n] = out.room;
}

}  // namespace
}  // namespace FASTSAE_ISA
}  // namespace fastsae
