// Prints a hash of the bits of every C++ kernel's results on fixed data, for the instruction set that
// it is compiled with (FASTSAE_ISA): `make neon` compares this machine's with those of an emulated
// ARM. Sizes leave a rest in every loop; weights are fp32 and bf16, the rows' norms spread.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace fastsae;
namespace isa = fastsae::FASTSAE_ISA;

namespace {

struct Numbers {  // a linear congruential generator; sums of four uniform numbers
  uint64_t state = 1;
  float next() {
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += static_cast<float>(state >> 40) * 0x1p-24f - 0.5f;
    }
    return sum;
  }
  std::vector<float> take(int64_t n) {
    std::vector<float> v(n);
    for (float& x : v) x = next();
    return v;
  }
};

struct Hash {  // FNV-1a
  uint64_t value = 14695981039346656037u;
  template <class T>
  void add(const std::vector<T>& v) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(v.data());
    for (size_t i = 0; i < v.size() * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211u;
  }
};

void print(const char* what, const Hash& hash) {
  std::printf("%-14s %016llx\n", what, static_cast<unsigned long long>(hash.value));
}

std::vector<uint16_t> in_bf16(const std::vector<float>& v) {
  std::vector<uint16_t> out(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    uint32_t u;
    std::memcpy(&u, &v[i], 4);
    out[i] = static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const int64_t n = 77, d = 203, f = 533, k = 9;
  Numbers numbers;
  std::vector<float> x = numbers.take(n * d), w = numbers.take(f * d), b = numbers.take(f);
  for (int64_t i = 0; i < f; ++i)
    for (int64_t j = 0; j < d; ++j) w[i * d + j] *= std::ldexp(1.0f, static_cast<int>(i % 5));
  const std::vector<uint16_t> half = in_bf16(w);
  std::vector<float> vals(n * k), error(n * d), xhat(n * d), dvals(n * k);
  std::vector<int32_t> idx(n * k);
  std::vector<float> scale = b;
  for (float& s : scale) s = std::fabs(s);
  for (const bool is_bf16 : {false, true}) {
    for (const bool rounded : {false, true}) {
      const Matrix weights{is_bf16 ? static_cast<const void*>(half.data()) : w.data(), d, is_bf16};
      Hash encoded, decoded;
      EncodeArgs a{};
      a.x = x.data(), a.n = n, a.d = d, a.ldx = d, a.w = weights, a.bias = b.data();
      a.f = f, a.k = k, a.vals = vals.data(), a.idx = idx.data();
      a.rounded = rounded && !is_bf16, a.threads = threads;
      isa::encode(a);
      encoded.add(vals);
      encoded.add(idx);
      print("encode", encoded);
      const DecodeArgs codes{
          {vals.data(), idx.data(), nullptr, n, k}, weights, nullptr, d, threads};
      const std::vector<double> sse{isa::decode_error(codes, {x.data(), d, false},
                                                      {error.data(), xhat.data(), dvals.data()})};
      decoded.add(sse);
      decoded.add(error);
      decoded.add(xhat);
      decoded.add(dvals);
      isa::decode_bwd_vals(codes, {x.data(), d, false}, dvals.data());
      decoded.add(dvals);
      isa::decode_fwd(codes, {xhat.data(), d, false});
      decoded.add(xhat);
      print("decode_error", decoded);
      Hash rest;
      std::vector<float> kept(n * k);
      std::vector<int32_t> ids(n * k);
      a.vals = kept.data(), a.idx = ids.data();
      for (const bool guided : {false, true}) {
        a.score = {scale.data(), true, guided ? x.data() : nullptr, d, d, weights};
        isa::encode(a);
        rest.add(kept);
        rest.add(ids);
      }
      std::vector<int64_t> row_ptr(n + 1);
      const RowOutputs out{kept.data(), ids.data(), row_ptr.data(), n * k};
      const auto add = [&] {
        rest.add(kept);
        rest.add(ids);
        rest.add(row_ptr);
      };
      BatchArgs batch{};
      static_cast<Encoding&>(batch) = a;
      batch.budget = n * k, batch.out = out;
      isa::encode_batch(batch);
      add();
      const std::vector<float> thresholds(f, *std::min_element(kept.begin(), kept.end()));
      const std::vector<int32_t> budgets(f, static_cast<int32_t>(n * k / f));
      ColumnArgs columns{};
      static_cast<Encoding&>(columns) = a;
      columns.budgets = budgets.data(), columns.out = out;
      isa::encode_columns(columns);
      add();
      RowOutputs found = out;
      ThresholdArgs above{};
      bool too_many;
      static_cast<Encoding&>(above) = a;
      above.thresholds = thresholds.data(), above.limit = n * k, above.too_many = &too_many;
      above.context = &found;
      above.allocate = [](void* rows, int64_t room) {
        auto* found = static_cast<RowOutputs*>(rows);
        found->room = room;
        return *found;
      };
      isa::encode_threshold(above);
      add();
      print(too_many || found.room < 50 ? "unexpected" : "encode_*", rest);
    }
  }

  std::vector<int64_t> latent_ptr(f + 1);
  std::vector<int32_t> token(n * k), entry(n * k), last(f, 1);
  isa::build_index({{nullptr, idx.data(), nullptr, n, k},
                    f,
                    latent_ptr.data(),
                    token.data(),
                    entry.data(),
                    threads});
  const Segment pairs{
      latent_ptr.data(), token.data(), entry.data(), vals.data(), {x.data(), d, false}};
  std::vector<float> rows(f * d), sums(f), columns(d), m(f * d), v(f * d, 1e-3f);
  isa::row_gradients({pairs, f, d, {rows.data(), d, false}, sums.data(), threads});
  isa::column_sum({w.data(), d, false}, sums.data(), f, d, columns.data(), threads);
  Hash gradients, updated;
  gradients.add(latent_ptr);
  gradients.add(rows);
  gradients.add(sums);
  gradients.add(columns);
  print("rows", gradients);
  isa::project_rows({rows.data(), d, false}, {w.data(), d, false}, f, d, threads);
  AdamArgs adam{};
  adam.p = {w.data(), d, false}, adam.n = f, adam.d = d;
  adam.m = m.data(), adam.v = v.data(), adam.last = last.data();
  adam.segments = &pairs, adam.n_segments = 1;
  adam.lr = 1e-3, adam.beta1 = 0.9, adam.beta2 = 0.999, adam.eps = 1e-8, adam.scale = 0.5;
  adam.step = 2, adam.project = adam.normalize = true, adam.threads = threads;
  updated.add(rows);
  updated.add(std::vector<double>{isa::gradient_square_norm(adam)});
  isa::adam(adam);
  updated.add(w);
  updated.add(m);
  updated.add(v);
  updated.add(last);
  isa::normalize_rows({rows.data(), d, false}, f, d, threads);
  updated.add(rows);
  print("adam", updated);
}
