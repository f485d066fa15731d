// What the op files compute: argument structs and, for each instruction set, the functions.
// Shapes and names are those of fastsae/reference.py, which says what every function computes.
// A matrix has unit column stride and `ld` elements from row to row. Pointers are checked by
// bindings.cpp.
#pragma once
#include <cstdint>

namespace fastsae {

struct Matrix {  // fp32 or bf16 (as uint16_t)
  const void* data;
  int64_t ld;
  bool is_bf16;
};

struct MutableMatrix {
  void* data;
  int64_t ld;
  bool is_bf16;
};

struct Encoding {  // the pre-activations that an encoder chooses from
  const float* x;  // (n, d) centred tokens
  int64_t n, d, ldx;
  Matrix w;                // (n_latents, d)
  const float* bias;       // (n_latents) or null
  const int32_t* latents;  // (f) ascending latent ids to choose from, or null for all
  int64_t f;               // how many latents to choose from
  bool bf16_screen;
  bool rounded;          // W_enc counts as rounded to bf16; x is
  int64_t block_tokens;  // 0: chosen here
  int threads;
};

struct Score {         // what encode and encode_batch compare: h, unless something is set
  const float* scale;  // (n_latents) or null
  bool absolute;
  const float* guide;  // (n, d_out) or null
  int64_t ldg, d_out;
  Matrix dec;  // (n_latents, d_out), with guide
};

// What an encoder found instead of a result: a row of x (token) or guide (token), W_enc or b_enc
// (latent) or W_dec (latent) that is not finite, a pre-activation or a product with guide that
// overflows fp32 (both); or that there is no memory for the pairs.
struct NonFinite {
  enum What { NOTHING, TOKEN, LATENT, VALUE, GUIDE, DECODER, SCORE, NO_MEMORY } what = NOTHING;
  int64_t token = -1, latent = -1;
};

struct EncodeArgs : Encoding {
  Score score;
  int64_t k;
  float* vals;   // (n, k) out
  int32_t* idx;  // (n, k) out
};

struct RowOutputs {  // contiguous; entries that no pair takes are padding
  float* vals;       // (room)
  int32_t* idx;      // (room)
  int64_t* row_ptr;  // (n + 1)
  int64_t room;
};

struct BatchArgs : Encoding {
  Score score;  // no guide
  int64_t budget;
  RowOutputs out;
};

struct ColumnArgs : Encoding {
  const int32_t* budgets;  // (n_latents)
  RowOutputs out;
};

struct ThresholdArgs : Encoding {
  const float* thresholds;  // (n_latents)
  int64_t limit;            // the largest number of pairs
  // Returns the outputs for `room` pairs; called once, on the calling thread, unless there are too
  // many.
  RowOutputs (*allocate)(void* context, int64_t room);
  void* context;
  bool* too_many;  // out
};

// The stored pairs of a batch: row i of (n, k), or entries row_ptr[i] .. row_ptr[i+1] where row_ptr
// is given.
struct Pairs {
  const float* vals;
  const int32_t* idx;  // -1 pads
  const int64_t* row_ptr;
  int64_t n, k;
};

struct DecodeArgs {
  Pairs codes;
  Matrix w;           // (n_latents, d)
  const float* bias;  // (d) or null
  int64_t d;
  int threads;
};

struct ErrorOutputs {     // contiguous
  float* error;           // (n, d) x̂ - target
  float* reconstruction;  // (n, d) x̂, or null
  float* dvals;           // as codes.vals: <error[n], W_dec[idx]>, or null
};

struct IndexArgs {
  Pairs codes;  // vals unused
  int64_t n_latents;
  int64_t* latent_ptr;  // (n_latents + 1) out
  int32_t* token;  // (nnz) out: tokens of latent f at latent_ptr[f] .. latent_ptr[f+1], ascending
  int32_t* entry;  // (nnz) out: where in vals the pair is
  int threads;
};

struct Segment {  // some pairs' share of a gradient: Σ coef·src[token] for each latent
  const int64_t* latent_ptr;
  const int32_t* token;
  const int32_t* entry;
  const float* coef;
  Matrix src;  // (tokens, d)
};

struct RowGradientArgs {
  Segment pairs;
  int64_t n_latents, d;
  MutableMatrix rows;  // (n_latents, d) out, or data null
  float* coef_sums;    // (n_latents) out, or null
  int threads;
};

constexpr int64_t MOMENT_BLOCK = 256;  // columns of a row whose INT8 codes share a scale
enum class Stored { FLOAT, BF16, INT8 };

struct AdamArgs {
  MutableMatrix p;  // (n, d) parameter, updated
  int64_t n, d;
  Stored stored;   // how both moments are: fp32, bf16 or codes (int8 and uint8)
  void* m;         // (n, d) first moment, updated; null where beta1 is 0
  void* v;         // (n, d) second moment, updated
  float* m_scale;  // (n, ⌈d / MOMENT_BLOCK⌉) of codes, else null; updated
  float* v_scale;
  int32_t* last;  // (n) the step that last updated a row, 0 for none; updated
  Matrix dense;   // (n, d) gradient besides the segments', or data null
  const Segment* segments;
  int64_t n_segments;
  double lr, beta1, beta2, eps, weight_decay, scale;
  int64_t step;       // from 1
  int64_t first_row;  // what row 0 counts as where numbers are drawn
  bool lazy, project, normalize;
  bool stochastic;  // bf16 is rounded at random, not to nearest
  int threads;
};

#define FASTSAE_DECLARE_KERNELS(ISA)                                                           \
  namespace ISA {                                                                              \
  NonFinite encode(const EncodeArgs&);                                                         \
  NonFinite encode_batch(const BatchArgs&);                                                    \
  NonFinite encode_columns(const ColumnArgs&);                                                 \
  NonFinite encode_threshold(const ThresholdArgs&);                                            \
  void decode_fwd(const DecodeArgs&, MutableMatrix out);                                       \
  double decode_error(const DecodeArgs&, Matrix target, const ErrorOutputs&);                  \
  void decode_bwd_vals(const DecodeArgs&, Matrix g, float* dvals);                             \
  void build_index(const IndexArgs&);                                                          \
  void row_gradients(const RowGradientArgs&);                                                  \
  void column_sum(Matrix m, const float* coef, int64_t n, int64_t d, float* out, int threads); \
  void project_rows(MutableMatrix grad, Matrix w, int64_t n, int64_t d, int threads);          \
  void normalize_rows(MutableMatrix w, int64_t n, int64_t d, int threads);                     \
  void adam(const AdamArgs&);                                                                  \
  double gradient_square_norm(const AdamArgs&);                                                \
  }

FASTSAE_DECLARE_KERNELS(base)
#ifdef FASTSAE_HAS_X86_ISAS
FASTSAE_DECLARE_KERNELS(avx2)
FASTSAE_DECLARE_KERNELS(avx512)
FASTSAE_DECLARE_KERNELS(avx512bf16)
#endif

}  // namespace fastsae
