// fastsae._C: the kernels of this CPU, on torch tensors. No torch headers: a tensor is asked for
// its dtype, shape, strides and address through Python, checked here, and used as a raw pointer
// with the GIL released. Every function takes its outputs as arguments and writes nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "auction.h"
#include "kernels.h"

namespace py = pybind11;

namespace fastsae {
namespace {

struct Kernels {
  const char* isa;
  decltype(&base::encode) encode;
  decltype(&base::encode_batch) encode_batch;
  decltype(&base::encode_columns) encode_columns;
  decltype(&base::encode_threshold) encode_threshold;
  decltype(&base::decode_fwd) decode_fwd;
  decltype(&base::decode_error) decode_error;
  decltype(&base::decode_bwd_vals) decode_bwd_vals;
  decltype(&base::build_index) build_index;
  decltype(&base::row_gradients) row_gradients;
  decltype(&base::column_sum) column_sum;
  decltype(&base::project_rows) project_rows;
  decltype(&base::normalize_rows) normalize_rows;
  decltype(&base::adam) adam;
  decltype(&base::gradient_square_norm) gradient_square_norm;
};

#define FASTSAE_KERNELS(ISA)                                                                    \
  Kernels {                                                                                     \
    #ISA, ISA::encode, ISA::encode_batch, ISA::encode_columns, ISA::encode_threshold,           \
        ISA::decode_fwd, ISA::decode_error, ISA::decode_bwd_vals, ISA::build_index,             \
        ISA::row_gradients, ISA::column_sum, ISA::project_rows, ISA::normalize_rows, ISA::adam, \
        ISA::gradient_square_norm                                                               \
  }

// What this CPU can run, best first.
const std::vector<Kernels>& available() {
  static const std::vector<Kernels> kernels = [] {
    std::vector<Kernels> v;
#ifdef FASTSAE_HAS_X86_ISAS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) v.push_back(FASTSAE_KERNELS(avx512bf16));
    if (avx512) v.push_back(FASTSAE_KERNELS(avx512));
    if (avx2) v.push_back(FASTSAE_KERNELS(avx2));
#endif
    v.push_back(FASTSAE_KERNELS(base));
    return v;
  }();
  return kernels;
}

const Kernels& kernels_for(const std::string& isa) {
  if (isa.empty()) return available().front();
  std::string names;
  for (const Kernels& k : available()) {
    if (isa == k.isa) return k;
    names += std::string(names.empty() ? "" : ", ") + k.isa;
  }
  throw py::value_error("isa: expected one of " + names + ", got " + isa);
}

// ---- tensors ----

struct View {
  void* data = nullptr;
  int64_t rows = 1, cols = 0, ld = 0;  // a vector is one row
  bool is_bf16 = false;
  std::string dtype;
  Matrix matrix() const { return {data, ld, is_bf16}; }
  MutableMatrix mutable_matrix() const { return {data, ld, is_bf16}; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

constexpr int64_t ANY = -1;
enum Access { IN, OUT };

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i)
    s += (i ? ", " : "") + (shape[i] == ANY ? std::string("*") : std::to_string(shape[i]));
  return s + ")";
}

// A CPU tensor of one of `dtypes` ("float32 bfloat16") and of `shape`, with unit stride inside a
// row; an output's rows are apart.
View view(const py::handle& t, const std::string& name, const std::string& dtypes,
          const std::vector<int64_t>& shape, Access access = IN) {
  if (!py::hasattr(t, "data_ptr") || !py::hasattr(t, "is_cpu") || !py::hasattr(t, "dtype"))
    throw py::type_error(name + ": expected a torch.Tensor, got " +
                         std::string(py::str(py::type::of(t))));
  std::string dtype = py::str(t.attr("dtype"));
  dtype = dtype.substr(dtype.rfind('.') + 1);
  if ((" " + dtypes + " ").find(" " + dtype + " ") == std::string::npos)
    throw py::type_error(name + ": expected dtype " + dtypes + ", got " + dtype);
  if (!t.attr("is_cpu").cast<bool>())
    throw py::value_error(name + ": expected a CPU tensor, got one on " +
                          std::string(py::str(t.attr("device"))));
  const auto got = t.attr("shape").cast<std::vector<int64_t>>();
  bool fits = got.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == ANY || shape[i] == got[i];
  if (!fits)
    throw py::value_error(name + ": expected shape " + shape_text(shape) + ", got " +
                          shape_text(got));
  const auto stride = t.attr("stride")().cast<std::vector<int64_t>>();
  if (stride.size() != got.size())
    throw py::value_error(name + ": expected as many strides as sizes, got " + shape_text(stride));
  View v;
  v.rows = got.size() == 2 ? got[0] : 1;
  v.cols = got.back();
  v.ld = got.size() == 2 ? stride[0] : v.cols;
  v.is_bf16 = dtype == "bfloat16";
  v.dtype = dtype;
  if (v.rows > 0 && v.cols > 1 && stride.back() != 1)
    throw py::value_error(name + ": expected unit stride inside a row, got strides " +
                          shape_text(stride));
  if (access == OUT && v.rows > 1 && v.ld < v.cols)
    throw py::value_error(name + ": expected an output whose rows do not overlap, got strides " +
                          shape_text(stride));
  v.data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
  return v;
}

View optional_view(const py::handle& t, const std::string& name, const std::string& dtypes,
                   const std::vector<int64_t>& shape, Access access = IN) {
  return t.is_none() ? View{} : view(t, name, dtypes, shape, access);
}

// The kernels index (n, k) arrays as one run of entries.
View packed(const View& v, const std::string& name) {
  if (v.rows > 1 && v.cols > 0 && v.ld != v.cols)
    throw py::value_error(name + ": expected a contiguous tensor");
  return v;
}

void check_range(const int32_t* p, int64_t n, int64_t low, int64_t high, const std::string& name) {
  for (int64_t i = 0; i < n; ++i)
    if (p[i] < low || p[i] >= high)
      throw py::index_error(name + ": expected values in [" + std::to_string(low) + ", " +
                            std::to_string(high) + "), got " + std::to_string(p[i]) +
                            " at position " + std::to_string(i));
}

void check_threads(int threads) {
  if (threads < 1 || threads > 1024)
    throw py::value_error("threads: expected 1 to 1024, got " + std::to_string(threads));
}

// vals (float32; null where none are wanted) and idx (int32) of (n, k), or of (nnz) with row_ptr
// (n + 1) int64; ids in [-1, n_latents).
Pairs pairs(const py::object* vals, const py::handle& idx, const py::handle& row_ptr, int64_t n,
            int64_t n_latents) {
  if (n >= int64_t{1} << 31)
    throw py::value_error("expected fewer than 2**31 tokens, got " + std::to_string(n));
  Pairs p{};
  p.n = n;
  View i;
  if (row_ptr.is_none()) {
    i = packed(view(idx, "idx", "int32", {n, ANY}), "idx");
    p.k = i.cols;
    if (vals) p.vals = packed(view(*vals, "vals", "float32", {n, p.k}), "vals").as<float>();
  } else {
    i = view(idx, "idx", "int32", {ANY});
    if (vals) p.vals = view(*vals, "vals", "float32", {i.cols}).as<float>();
    p.row_ptr = view(row_ptr, "row_ptr", "int64", {n + 1}).as<int64_t>();
    bool ascending = p.row_ptr[0] == 0 && p.row_ptr[n] == i.cols;
    for (int64_t r = 0; ascending && r < n; ++r) ascending = p.row_ptr[r] <= p.row_ptr[r + 1];
    if (!ascending)
      throw py::value_error("row_ptr: expected an ascending sequence from 0 to nnz = " +
                            std::to_string(i.cols));
  }
  const int64_t nnz = i.rows * i.cols;
  if (nnz >= int64_t{1} << 31)
    throw py::value_error("idx: expected fewer than 2**31 entries, got " + std::to_string(nnz));
  p.idx = i.as<int32_t>();
  check_range(p.idx, nnz, -1, n_latents, "idx");
  return p;
}

const char* const FLOATS = "float32 bfloat16";

void check_latents(int64_t n) {
  if (n >= int64_t{1} << 31)
    throw py::value_error("expected fewer than 2**31 latents, got " + std::to_string(n));
}

void check_width(const View& v, const std::string& name) {
  if (v.cols >= int64_t{1} << 20)
    throw py::value_error(name + ": expected a width below 2**20, got " + std::to_string(v.cols));
}

// ---- the functions ----

// What all encoders are given.
Encoding encoding(const py::object& x, const py::object& w, const py::object& bias,
                  const std::string& screen, bool rounded, int threads, int64_t block_tokens) {
  check_threads(threads);
  const View xv = view(x, "x", "float32", {ANY, ANY});
  const View wv = view(w, "W_enc", FLOATS, {ANY, xv.cols});
  check_latents(wv.rows);
  const View bv = optional_view(bias, "b_enc", "float32", {wv.rows});
  check_width(xv, "x");
  if (xv.rows >= int64_t{1} << 31)
    throw py::value_error("x: expected fewer than 2**31 tokens, got " + std::to_string(xv.rows));
  if (screen != "fp32" && screen != "bf16")
    throw py::value_error("screen: expected fp32 or bf16, got " + screen);
  Encoding a{};
  a.x = xv.as<float>();
  a.n = xv.rows;
  a.d = xv.cols;
  a.ldx = xv.ld;
  a.w = wv.matrix();
  a.bias = bv.as<float>();
  a.f = wv.rows;
  a.bf16_screen = screen == "bf16";
  a.rounded = rounded;
  a.block_tokens = block_tokens;
  a.threads = threads;
  return a;
}

[[noreturn]] void not_finite(const std::string& message) {
  py::set_error(py::module_::import("fastsae.reference").attr("NotFinite"), message.c_str());
  throw py::error_already_set();
}

const float* scale_of(const py::object& scale, int64_t n_latents) {
  const View v = optional_view(scale, "scale", "float32", {n_latents});
  for (int64_t i = 0; i < v.cols; ++i)
    if (const float s = v.as<float>()[i]; !(s >= 0 && std::isfinite(s)))
      not_finite("scale: expected finite numbers of at least 0, got " +
                 std::string(py::str(py::float_(s))) + " at position " + std::to_string(i));
  return v.as<float>();
}

void raise_if_found(const NonFinite& found) {
  const std::string token = std::to_string(found.token), latent = std::to_string(found.latent);
  const std::string one = ": expected finite values, got a non-finite one in ";
  switch (found.what) {
    case NonFinite::NOTHING:
      return;
    case NonFinite::TOKEN:
      not_finite("x" + one + "row " + token);
    case NonFinite::LATENT:
      not_finite("W_enc, b_enc" + one + "latent " + latent);
    case NonFinite::GUIDE:
      not_finite("guide" + one + "row " + token);
    case NonFinite::DECODER:
      not_finite("W_dec" + one + "latent " + latent);
    case NonFinite::VALUE:
      not_finite("expected finite pre-activations, got an overflow at token " + token +
                 ", latent " + latent);
    case NonFinite::NO_MEMORY:
      throw std::bad_alloc();
    case NonFinite::SCORE:
      not_finite("expected finite products of guide and W_dec, got an overflow at token " + token +
                 ", latent " + latent);
  }
}

template <class Args>
void run(NonFinite (*kernel)(const Args&), const Args& a) {
  NonFinite found;
  {
    py::gil_scoped_release release;
    found = kernel(a);
  }
  raise_if_found(found);
}

void encode(py::object x, py::object w, py::object bias, py::object latents, py::object scale,
            bool absolute, py::object guide, py::object dec, py::object vals, py::object idx,
            const std::string& screen, bool rounded, int threads, int64_t block_tokens,
            const std::string& isa) {
  EncodeArgs a{};
  static_cast<Encoding&>(a) = encoding(x, w, bias, screen, rounded, threads, block_tokens);
  const int64_t n_latents = a.f;
  const View lv = optional_view(latents, "latents", "int32", {ANY});
  const View out = packed(view(vals, "vals", "float32", {a.n, ANY}, OUT), "vals");
  const View ids = packed(view(idx, "idx", "int32", {a.n, out.cols}, OUT), "idx");
  if (!latents.is_none()) {
    check_range(lv.as<int32_t>(), lv.cols, 0, n_latents, "latents");
    for (int64_t i = 1; i < lv.cols; ++i)
      if (lv.as<int32_t>()[i] <= lv.as<int32_t>()[i - 1])
        throw py::value_error("latents: expected strictly ascending ids, got " +
                              std::to_string(lv.as<int32_t>()[i]) + " at position " +
                              std::to_string(i));
    a.latents = lv.as<int32_t>();
    a.f = lv.cols;
  }
  a.score.scale = scale_of(scale, n_latents);
  a.score.absolute = absolute;
  if (guide.is_none() != dec.is_none())
    throw py::value_error("guide: expected W_dec with it and only with it");
  if (!guide.is_none()) {
    const View gv = view(guide, "guide", "float32", {a.n, ANY});
    check_width(gv, "guide");
    a.score.guide = gv.as<float>();
    a.score.ldg = gv.ld;
    a.score.d_out = gv.cols;
    a.score.dec = view(dec, "W_dec", FLOATS, {n_latents, gv.cols}).matrix();
  }
  a.k = out.cols;
  a.vals = out.as<float>();
  a.idx = ids.as<int32_t>();
  run(kernels_for(isa).encode, a);
}

RowOutputs row_outputs(const py::handle& vals, const py::handle& idx, const py::handle& row_ptr,
                       int64_t n, int64_t room) {
  const View vv = view(vals, "vals", "float32", {room}, OUT);
  const View iv = view(idx, "idx", "int32", {vv.cols}, OUT);
  const View pv = view(row_ptr, "row_ptr", "int64", {n + 1}, OUT);
  return {vv.as<float>(), iv.as<int32_t>(), pv.as<int64_t>(), vv.cols};
}

void encode_batch(py::object x, py::object w, py::object bias, py::object scale, bool absolute,
                  py::object vals, py::object idx, py::object row_ptr, const std::string& screen,
                  bool rounded, int threads, int64_t block_tokens, const std::string& isa) {
  BatchArgs a{};
  static_cast<Encoding&>(a) = encoding(x, w, bias, screen, rounded, threads, block_tokens);
  a.score.scale = scale_of(scale, a.f);
  a.score.absolute = absolute;
  a.out = row_outputs(vals, idx, row_ptr, a.n, ANY);
  a.budget = a.out.room;
  if (a.budget > a.n * a.f)
    throw py::value_error("vals: expected at most N·F = " + std::to_string(a.n * a.f) +
                          " entries, got " + std::to_string(a.budget));
  run(kernels_for(isa).encode_batch, a);
}

void encode_columns(py::object x, py::object w, py::object bias, py::object budgets,
                    py::object vals, py::object idx, py::object row_ptr, const std::string& screen,
                    bool rounded, int threads, int64_t block_tokens, const std::string& isa) {
  ColumnArgs a{};
  static_cast<Encoding&>(a) = encoding(x, w, bias, screen, rounded, threads, block_tokens);
  a.budgets = view(budgets, "budgets", "int32", {a.f}).as<int32_t>();
  a.out = row_outputs(vals, idx, row_ptr, a.n, ANY);
  int64_t least = 0, needed = 0;
  for (int64_t i = 0; i < a.f; ++i) {
    if (a.budgets[i] < least) least = a.budgets[i];
    needed += a.budgets[i] < a.n ? a.budgets[i] : a.n;
  }
  if (least < 0)
    throw py::value_error("budgets: expected at least 0, got " + std::to_string(least));
  if (a.out.room < needed)
    throw py::value_error("room: expected at least Σ min(budgets, N) = " + std::to_string(needed) +
                          ", got " + std::to_string(a.out.room));
  run(kernels_for(isa).encode_columns, a);
}

// Calls allocate(nnz) for vals and idx once nnz is known, and returns them; None where more than
// limit pairs pass.
py::object encode_threshold(py::object x, py::object w, py::object bias, py::object thresholds,
                            std::optional<int64_t> limit, py::object allocate, py::object row_ptr,
                            const std::string& screen, bool rounded, int threads,
                            int64_t block_tokens, const std::string& isa) {
  struct Allocate {
    py::object call, row_ptr, given;
    int64_t n;
  };
  bool too_many = false;
  ThresholdArgs a{};
  static_cast<Encoding&>(a) = encoding(x, w, bias, screen, rounded, threads, block_tokens);
  a.thresholds = view(thresholds, "thresholds", "float32", {a.f}).as<float>();
  for (int64_t i = 0; i < a.f; ++i)
    if (std::isnan(a.thresholds[i]))
      throw py::value_error("thresholds: expected numbers, got a NaN at position " +
                            std::to_string(i));
  view(row_ptr, "row_ptr", "int64", {a.n + 1}, OUT);
  if (!PyCallable_Check(allocate.ptr()))
    throw py::type_error("allocate: expected a function, got " +
                         std::string(py::str(py::type::of(allocate))));
  Allocate context{allocate, row_ptr, py::none(), a.n};
  a.limit = limit.value_or(INT64_MAX);
  a.too_many = &too_many;
  a.context = &context;
  a.allocate = [](void* p, int64_t room) {
    py::gil_scoped_acquire acquire;
    Allocate& c = *static_cast<Allocate*>(p);
    c.given = c.call(room);
    const auto outputs = c.given.cast<py::tuple>();
    if (outputs.size() != 2)
      throw py::value_error("allocate: expected it to return vals and idx, got " +
                            std::to_string(outputs.size()) + " objects");
    return row_outputs(outputs[0], outputs[1], c.row_ptr, c.n, room);
  };
  run(kernels_for(isa).encode_threshold, a);
  return context.given;
}

DecodeArgs decode_args(const Pairs& codes, const View& w, const View& bias, int threads) {
  return {codes, w.matrix(), bias.as<float>(), w.cols, threads};
}

void decode_fwd(py::object vals, py::object idx, py::object row_ptr, py::object w, py::object bias,
                py::object out, int threads, const std::string& isa) {
  check_threads(threads);
  const View wv = view(w, "W_dec", FLOATS, {ANY, ANY});
  const View ov = view(out, "out", FLOATS, {ANY, wv.cols}, OUT);
  const View bv = optional_view(bias, "b_dec", "float32", {wv.cols});
  check_latents(wv.rows);
  const DecodeArgs a = decode_args(pairs(&vals, idx, row_ptr, ov.rows, wv.rows), wv, bv, threads);
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.decode_fwd(a, ov.mutable_matrix());
}

double decode_error(py::object vals, py::object idx, py::object row_ptr, py::object w,
                    py::object bias, py::object target, py::object error, py::object reconstruction,
                    py::object dvals, int threads, const std::string& isa) {
  check_threads(threads);
  const View wv = view(w, "W_dec", FLOATS, {ANY, ANY});
  const View tv = view(target, "target", FLOATS, {ANY, wv.cols});
  const View bv = optional_view(bias, "b_dec", "float32", {wv.cols});
  const View ev = packed(view(error, "error", "float32", {tv.rows, wv.cols}, OUT), "error");
  const View rv =
      packed(optional_view(reconstruction, "reconstruction", "float32", {tv.rows, wv.cols}, OUT),
             "reconstruction");
  check_latents(wv.rows);
  const DecodeArgs a = decode_args(pairs(&vals, idx, row_ptr, tv.rows, wv.rows), wv, bv, threads);
  ErrorOutputs out{ev.as<float>(), rv.as<float>(), nullptr};
  if (!dvals.is_none())
    out.dvals = const_cast<float*>(pairs(&dvals, idx, row_ptr, tv.rows, wv.rows).vals);
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  return k.decode_error(a, tv.matrix(), out);
}

void decode_bwd_vals(py::object g, py::object idx, py::object row_ptr, py::object w,
                     py::object dvals, int threads, const std::string& isa) {
  check_threads(threads);
  const View wv = view(w, "W_dec", FLOATS, {ANY, ANY});
  const View gv = view(g, "g", FLOATS, {ANY, wv.cols});
  check_latents(wv.rows);
  const Pairs codes = pairs(&dvals, idx, row_ptr, gv.rows, wv.rows);
  const DecodeArgs a = decode_args(codes, wv, View{}, threads);
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.decode_bwd_vals(a, gv.matrix(), const_cast<float*>(codes.vals));
}

void build_index(py::object idx, py::object row_ptr, int64_t n_tokens, py::object latent_ptr,
                 py::object token, py::object entry, int threads, const std::string& isa) {
  check_threads(threads);
  const View ptr = view(latent_ptr, "latent_ptr", "int64", {ANY}, OUT);
  if (ptr.cols < 1) throw py::value_error("latent_ptr: expected n_latents + 1 entries, got 0");
  check_latents(ptr.cols - 1);
  if (n_tokens < 0)
    throw py::value_error("n_tokens: expected at least 0, got " + std::to_string(n_tokens));
  const Pairs codes = pairs(nullptr, idx, row_ptr, n_tokens, ptr.cols - 1);
  const int64_t nnz = codes.row_ptr ? codes.row_ptr[n_tokens] : n_tokens * codes.k;
  const View tv = view(token, "token", "int32", {nnz}, OUT),
             ev = view(entry, "entry", "int32", {nnz}, OUT);
  const IndexArgs a{codes,  ptr.cols - 1, ptr.as<int64_t>(), tv.as<int32_t>(), ev.as<int32_t>(),
                    threads};
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.build_index(a);
}

// An inverse index with coefficients (flattened entries) and the rows they weigh.
Segment segment(const py::handle& latent_ptr, const py::handle& token, const py::handle& entry,
                const py::handle& coef, const View& src, int64_t n_latents) {
  const View ptr = view(latent_ptr, "latent_ptr", "int64", {n_latents + 1});
  const View tv = view(token, "token", "int32", {ANY}),
             ev = view(entry, "entry", "int32", {tv.cols});
  const View cv = view(coef, "coef", "float32", {ANY});
  const int64_t* p = ptr.as<int64_t>();
  bool ascending = p[0] == 0 && p[n_latents] <= tv.cols;
  for (int64_t f = 0; ascending && f < n_latents; ++f) ascending = p[f] <= p[f + 1];
  if (!ascending)
    throw py::value_error("latent_ptr: expected an ascending sequence from 0 to at most nnz");
  check_range(tv.as<int32_t>(), p[n_latents], 0, src.rows, "token");
  check_range(ev.as<int32_t>(), p[n_latents], 0, cv.cols, "entry");
  return {p, tv.as<int32_t>(), ev.as<int32_t>(), cv.as<float>(), src.matrix()};
}

void row_gradients(py::object latent_ptr, py::object token, py::object entry, py::object coef,
                   py::object src, py::object rows, py::object coef_sums, int threads,
                   const std::string& isa) {
  check_threads(threads);
  const int64_t n_latents = view(latent_ptr, "latent_ptr", "int64", {ANY}).cols - 1;
  if (n_latents < 0) throw py::value_error("latent_ptr: expected n_latents + 1 entries, got 0");
  const View sv = view(src, "src", FLOATS, {ANY, ANY});
  const Segment s = segment(latent_ptr, token, entry, coef, sv, n_latents);
  const View rv = optional_view(rows, "rows", FLOATS, {n_latents, sv.cols}, OUT);
  const View sums = optional_view(coef_sums, "coef_sums", "float32", {n_latents}, OUT);
  const RowGradientArgs a{s, n_latents, sv.cols, rv.mutable_matrix(), sums.as<float>(), threads};
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.row_gradients(a);
}

void column_sum(py::object m, py::object coef, py::object out, int threads,
                const std::string& isa) {
  check_threads(threads);
  const View mv = view(m, "m", FLOATS, {ANY, ANY});
  const View cv = optional_view(coef, "coef", "float32", {mv.rows});
  const View ov = view(out, "out", "float32", {mv.cols}, OUT);
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.column_sum(mv.matrix(), cv.as<float>(), mv.rows, mv.cols, ov.as<float>(), threads);
}

void project_rows(py::object grad, py::object w, int threads, const std::string& isa) {
  check_threads(threads);
  const View wv = view(w, "W_dec", FLOATS, {ANY, ANY});
  const View gv = view(grad, "grad", wv.is_bf16 ? "bfloat16" : "float32", {wv.rows, wv.cols}, OUT);
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.project_rows(gv.mutable_matrix(), wv.matrix(), wv.rows, wv.cols, threads);
}

void normalize_rows(py::object w, int threads, const std::string& isa) {
  check_threads(threads);
  const View wv = view(w, "W_dec", FLOATS, {ANY, ANY}, OUT);
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.normalize_rows(wv.mutable_matrix(), wv.rows, wv.cols, threads);
}

// Everything about one parameter's step. segments: tuples (latent_ptr, token, entry, coef, src).
struct AdamCall {
  std::vector<Segment> segments;
  AdamArgs args{};

  AdamCall(const py::handle& p, const py::handle& dense, const py::list& pairs, bool project,
           int threads) {
    check_threads(threads);
    const View pv = view(p, "p", FLOATS, {ANY, ANY}, OUT);
    check_latents(pv.rows);
    args.dense = optional_view(dense, "dense", FLOATS, {pv.rows, pv.cols}).matrix();
    for (const py::handle& item : pairs) {
      const auto s = item.cast<py::tuple>();
      if (s.size() != 5)
        throw py::value_error("segments: expected tuples of 5, got one of " +
                              std::to_string(s.size()));
      segments.push_back(
          segment(s[0], s[1], s[2], s[3], view(s[4], "src", FLOATS, {ANY, pv.cols}), pv.rows));
    }
    args.p = pv.mutable_matrix();
    args.n = pv.rows;
    args.d = pv.cols;
    args.segments = segments.data();
    args.n_segments = static_cast<int64_t>(segments.size());
    args.project = project;
    args.threads = threads;
  }
};

double gradient_square_norm(py::object p, py::object dense, py::list segments, bool project,
                            int threads, const std::string& isa) {
  const AdamCall call(p, dense, segments, project, threads);
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  return k.gradient_square_norm(call.args);
}

// Both moments are stored the same way, which v's dtype says.
void set_moments(AdamArgs& a, const py::handle& m, const py::handle& v, const py::handle& m_scale,
                 const py::handle& v_scale) {
  const View vv = packed(view(v, "v", "float32 bfloat16 uint8", {a.n, a.d}, OUT), "v");
  const bool coded = vv.dtype == "uint8";
  const std::string of_m = coded ? "int8" : vv.dtype;
  a.stored = coded ? Stored::INT8 : vv.is_bf16 ? Stored::BF16 : Stored::FLOAT;
  a.m = packed(optional_view(m, "m", of_m, {a.n, a.d}, OUT), "m").data;
  a.v = vv.data;
  if (!coded) {
    if (!m_scale.is_none() || !v_scale.is_none())
      throw py::value_error("m_scale, v_scale: expected None with moments of " + vv.dtype);
    return;
  }
  const int64_t blocks = (a.d + MOMENT_BLOCK - 1) / MOMENT_BLOCK;
  a.v_scale =
      packed(view(v_scale, "v_scale", "float32", {a.n, blocks}, OUT), "v_scale").as<float>();
  if (a.m)
    a.m_scale =
        packed(view(m_scale, "m_scale", "float32", {a.n, blocks}, OUT), "m_scale").as<float>();
}

void adam(py::object p, py::object m, py::object v, py::object m_scale, py::object v_scale,
          py::object last, py::object dense, py::list segments, double lr, double beta1,
          double beta2, double eps, double weight_decay, double scale, int64_t step,
          int64_t first_row, bool lazy, bool project, bool normalize, bool stochastic_rounding,
          int threads, const std::string& isa) {
  AdamCall call(p, dense, segments, project, threads);
  AdamArgs& a = call.args;
  set_moments(a, m, v, m_scale, v_scale);
  a.last = view(last, "last", "int32", {a.n}, OUT).as<int32_t>();
  if (!a.m && beta1 != 0)
    throw py::value_error("m: expected a first moment with beta1 above 0, got None");
  if (a.m && beta1 == 0) throw py::value_error("m: expected None with beta1 of 0, got a tensor");
  if (step < 1 || step >= int64_t{1} << 31)
    throw py::value_error("step: expected 1 to 2**31 - 1, got " + std::to_string(step));
  a.lr = lr;
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.eps = eps;
  a.weight_decay = weight_decay;
  a.scale = scale;
  a.step = step;
  a.first_row = first_row;
  a.lazy = lazy;
  a.normalize = normalize;
  a.stochastic = stochastic_rounding;
  const Kernels& k = kernels_for(isa);
  py::gil_scoped_release release;
  k.adam(a);
}

void match_by_auction(py::object values, py::object columns, double step, py::object partners,
                      py::object prices) {
  const View vv = packed(view(values, "values", "float64", {ANY, ANY}), "values");
  const View cv = packed(view(columns, "columns", "int32", {vv.rows, vv.cols}), "columns");
  const View pv = view(partners, "partners", "int64", {vv.rows}, OUT);
  const View qv = view(prices, "prices", "float64", {ANY}, OUT);
  // So that every bid raises a price, and few enough do.
  if (!(step >= 1e-6 && step <= 1))
    throw py::value_error("step: expected 1e-6 to 1, got " + std::to_string(step));
  for (int64_t i = 0; i < vv.rows * vv.cols; ++i)
    if (!(vv.as<double>()[i] <= 4))
      throw py::value_error("values: expected at most 4, got " +
                            std::to_string(vv.as<double>()[i]));
  check_range(cv.as<int32_t>(), vv.rows * vv.cols, 0, qv.cols, "columns");
  const AuctionArgs a{vv.as<double>(),  cv.as<int32_t>(), vv.rows, vv.cols, qv.cols, step,
                      pv.as<int64_t>(), qv.as<double>()};
  py::gil_scoped_release release;
  auction(a);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels& k : available()) names.push_back(k.isa);
  return names;
}

}  // namespace
}  // namespace fastsae

PYBIND11_MODULE(_C, m) {
  using namespace fastsae;
  using py::arg;
  m.doc() = "C++ kernels of fastsae; called by fastsae/cpu.py, which documents them.";
  m.def("isas", &isas, "Instruction sets compiled in that this CPU can run, best first.");
  m.def("encode", &encode, arg("x"), arg("W_enc"), arg("b_enc"), arg("latents"), arg("scale"),
        arg("absolute").noconvert(), arg("guide"), arg("W_dec"), arg("vals"), arg("idx"),
        arg("screen"), arg("rounded").noconvert(), arg("threads"), arg("block_tokens") = 0,
        arg("isa") = "");
  m.def("encode_batch", &encode_batch, arg("x"), arg("W_enc"), arg("b_enc"), arg("scale"),
        arg("absolute").noconvert(), arg("vals"), arg("idx"), arg("row_ptr"), arg("screen"),
        arg("rounded").noconvert(), arg("threads"), arg("block_tokens") = 0, arg("isa") = "");
  m.def("encode_columns", &encode_columns, arg("x"), arg("W_enc"), arg("b_enc"), arg("budgets"),
        arg("vals"), arg("idx"), arg("row_ptr"), arg("screen"), arg("rounded").noconvert(),
        arg("threads"), arg("block_tokens") = 0, arg("isa") = "");
  m.def("encode_threshold", &encode_threshold, arg("x"), arg("W_enc"), arg("b_enc"),
        arg("thresholds"), arg("limit"), arg("allocate"), arg("row_ptr"), arg("screen"),
        arg("rounded").noconvert(), arg("threads"), arg("block_tokens") = 0, arg("isa") = "");
  m.def("decode_fwd", &decode_fwd, arg("vals"), arg("idx"), arg("row_ptr"), arg("W_dec"),
        arg("b_dec"), arg("out"), arg("threads"), arg("isa") = "");
  m.def("decode_error", &decode_error, arg("vals"), arg("idx"), arg("row_ptr"), arg("W_dec"),
        arg("b_dec"), arg("target"), arg("error"), arg("reconstruction"), arg("dvals"),
        arg("threads"), arg("isa") = "");
  m.def("decode_bwd_vals", &decode_bwd_vals, arg("g"), arg("idx"), arg("row_ptr"), arg("W_dec"),
        arg("dvals"), arg("threads"), arg("isa") = "");
  m.def("build_index", &build_index, arg("idx"), arg("row_ptr"), arg("n_tokens"), arg("latent_ptr"),
        arg("token"), arg("entry"), arg("threads"), arg("isa") = "");
  m.def("row_gradients", &row_gradients, arg("latent_ptr"), arg("token"), arg("entry"), arg("coef"),
        arg("src"), arg("rows"), arg("coef_sums"), arg("threads"), arg("isa") = "");
  m.def("column_sum", &column_sum, arg("m"), arg("coef"), arg("out"), arg("threads"),
        arg("isa") = "");
  m.def("project_rows", &project_rows, arg("grad"), arg("W_dec"), arg("threads"), arg("isa") = "");
  m.def("normalize_rows", &normalize_rows, arg("W_dec"), arg("threads"), arg("isa") = "");
  m.def("gradient_square_norm", &gradient_square_norm, arg("p"), arg("dense"), arg("segments"),
        arg("project"), arg("threads"), arg("isa") = "");
  m.def("auction", &match_by_auction, arg("values"), arg("columns"), arg("step"), arg("partners"),
        arg("prices"));
  m.def("adam", &adam, arg("p"), arg("m"), arg("v"), arg("m_scale"), arg("v_scale"), arg("last"),
        arg("dense"), arg("segments"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
        arg("weight_decay"), arg("scale"), arg("step"), arg("first_row"), arg("lazy"),
        arg("project"), arg("normalize"), arg("stochastic_rounding"), arg("threads"),
        arg("isa") = "");
}
