"""Sparse decode and the gradient of its values.

    decode_fwd       x̂[n, d]     = b_dec[d] + Σ_k vals[n, k] · W_dec[idx[n, k], d]
    decode_bwd_vals  dvals[n, k] = Σ_d g[n, d] · W_dec[idx[n, k], d]

Shapes   vals, idx, dvals (N, K), or (nnz) with row_ptr (N + 1): token n has the entries row_ptr[n]
         .. row_ptr[n + 1], none or thousands. W_dec (F, D); b_dec (D); g, x̂ (N, D). Any may be 0.
Dtypes   W_dec fp32, bf16 or fp16, and x̂ is of its dtype or of `dtype`; vals and b_dec likewise,
         each on its own; g any float; idx int32; row_ptr int64; dvals fp32. Every load becomes
         fp32 at once, and so is all arithmetic.
Strides  W_dec, vals and idx: any row stride, unit inner stride. g: any, 0 included.
Padding  idx < 0 marks an empty slot: its value (even NaN) and W_dec are left out of x̂, its dvals
         is 0. A stored pair whose value is 0 is a pair like any other. That idx < F and that
         row_ptr ascends is the caller's promise: a check would have to wait for the device.

Order    Bits depend on a row's own inputs alone: not on N, F, the layout of codes, the grid, the
         slice width, warps, alignment or target. x̂ starts from b_dec and takes k ascending by
         fused multiply-adds. dvals has 128 lanes: lane j starts from 0 and takes d = j, j + 128, …
         ascending by fused multiply-adds; then neighbouring lanes are added in pairs, seven times.
         The fma is spelled out because whether a·b + c contracts is up to the compiler. No
         atomics: one program writes an output, once.

Bytes    Both gather N·K rows of W_dec, and next to that all else is small: `decode_cost`. The
         forward grid runs over all tokens within one slice of D before the next slice: a slice
         of the whole dictionary stays in L2, so device memory is read about once. dvals takes a
         row in one piece, so that there are no partial sums to store.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels import checks
from fastsae.kernels.checks import ANY_FLOAT, FLOATS, OPTIONS, Cost, Variant, expect
from fastsae.kernels.sums import add_neighbours


@triton.jit
def codes_of(n, row_ptr_ptr, K):
    """Where token n's codes begin, in units of their stride(0), and how many they are."""
    if row_ptr_ptr is None:
        return n, K
    else:
        first = tl.load(row_ptr_ptr + n)
        return first, (tl.load(row_ptr_ptr + n + 1) - first).to(tl.int32)


@triton.jit
def decode_slice(
    vals_ptr,  # (K) the token's
    idx_ptr,  # (K) the token's
    W_dec_ptr,
    b_dec_ptr,
    d,  # [BLOCK_D]
    D,
    K,
    stride_W_dec,
    UNROLL: tl.constexpr,
):
    """x̂[n, d] (fp32)."""
    if b_dec_ptr is None:
        x = d.to(tl.float32) * 0
    else:
        x = tl.load(b_dec_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    for k0 in range(0, K, UNROLL):
        # Masked, not branched over: then the loads of all UNROLL rows are in flight together.
        for u in tl.static_range(UNROLL):
            k = k0 + u
            latent = tl.load(idx_ptr + k, mask=k < K, other=-1)
            stored = latent >= 0
            val = tl.load(vals_ptr + k, mask=stored, other=0.0).to(tl.float32)
            row_ptr = W_dec_ptr + latent.to(tl.int64) * stride_W_dec
            width = tl.where(stored, D, 0)
            row = tl.load(row_ptr + d, mask=d < width, other=0.0).to(tl.float32)
            x = tl.fma(row, val, x)
    return x


@triton.jit
def _decode_fwd_kernel(
    vals_ptr,  # (N, K) or (nnz) any of FLOATS
    idx_ptr,  # (N, K) or (nnz) int32, < 0 is padding
    W_dec_ptr,  # (F, D) any of FLOATS
    b_dec_ptr,  # (D) any of FLOATS, or None
    row_ptr_ptr,  # (N + 1) int64, or None
    xhat_ptr,  # (out) (N, D) any of FLOATS
    D,
    K,
    stride_vals,
    stride_idx,
    stride_W_dec,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, count = codes_of(n, row_ptr_ptr, K)
    vals_ptr += first * stride_vals
    idx_ptr += first * stride_idx
    x = decode_slice(vals_ptr, idx_ptr, W_dec_ptr, b_dec_ptr, d, D, count, stride_W_dec, UNROLL)
    tl.store(xhat_ptr + n * D + d, x.to(xhat_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _decode_bwd_vals_kernel(
    g_ptr,  # (N, D) any float
    idx_ptr,  # (N, K) or (nnz) int32, < 0 is padding
    W_dec_ptr,  # (F, D) any of FLOATS
    row_ptr_ptr,  # (N + 1) int64, or None
    dvals_ptr,  # (out) (N, K) or (nnz) fp32
    D,
    K,
    stride_g_n,
    stride_g_d,
    stride_idx,
    stride_W_dec,
    stride_dvals,
    BLOCK_K: tl.constexpr,
    LOG2_LANES: tl.constexpr,
):
    LANES: tl.constexpr = 1 << LOG2_LANES
    n = tl.program_id(0).to(tl.int64)
    first, count = codes_of(n, row_ptr_ptr, K)
    idx_ptr += first * stride_idx
    dvals_ptr += first * stride_dvals
    # One turn, but for rows longer than the mean.
    for k0 in range(tl.program_id(1) * BLOCK_K, count, tl.num_programs(1) * BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        latent = tl.load(idx_ptr + k, mask=k < count, other=-1)
        stored = latent >= 0
        row_ptr = W_dec_ptr + latent.to(tl.int64) * stride_W_dec
        acc = tl.zeros([BLOCK_K, LANES], tl.float32)
        for d0 in range(0, D, LANES):
            d = d0 + tl.arange(0, LANES)
            in_row = d < D
            g_ptrs = g_ptr + n * stride_g_n + d.to(tl.int64) * stride_g_d
            g = tl.load(g_ptrs, mask=in_row, other=0.0).to(tl.float32)
            mask = stored[:, None] & in_row[None, :]
            row = tl.load(row_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            acc = tl.fma(row, g[None, :], acc)
        # Where g is inf or NaN, the zeros that stand for an empty slot's row make NaN.
        dvals = tl.where(stored, add_neighbours(acc, LOG2_LANES), 0.0)
        tl.store(dvals_ptr + k, dvals, mask=k < count)


def decode_fwd(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_ptr: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x̂ (N, D) in `dtype`, or W_dec's, from vals and idx, W_dec (F, D) and b_dec (D)."""
    n_tokens, k = checks.expect_decoder(vals, idx, W_dec, b_dec, row_ptr)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected {' or '.join(map(str, FLOATS))}, got {dtype}")
    d_sae, d_out = W_dec.shape
    xhat = torch.empty(n_tokens, d_out, dtype=dtype or W_dec.dtype, device=W_dec.device)
    config = _fwd_config(d_sae, W_dec.element_size())
    grid = (n_tokens, triton.cdiv(d_out, config["BLOCK_D"]))
    strides = vals.stride(0), idx.stride(0), W_dec.stride(0)
    if xhat.numel():
        with torch.cuda.device_of(xhat):
            _decode_fwd_kernel[grid](
                vals, idx, W_dec, b_dec, row_ptr, xhat, d_out, k, *strides, **config
            )
    return xhat


def decode_bwd_vals(g: Tensor, idx: Tensor, W_dec: Tensor, row_ptr: Tensor | None = None) -> Tensor:
    """dvals fp32 as idx, from g = ∂L/∂x̂ (N, D), idx and W_dec (F, D)."""
    expect("W_dec", W_dec, ("F", "D"), FLOATS, W_dec)
    n_tokens, k = checks.expect_codes(idx, row_ptr, W_dec)
    d_out = W_dec.shape[1]
    expect("g", g, (n_tokens, d_out), ANY_FLOAT, W_dec, any_stride=True)
    dvals = torch.empty(idx.shape, dtype=torch.float32, device=W_dec.device)
    grid = (n_tokens, triton.cdiv(k, BWD_CONFIG["BLOCK_K"]))
    strides = *g.stride(), idx.stride(0), W_dec.stride(0), dvals.stride(0)
    if dvals.numel():
        with torch.cuda.device_of(dvals):
            _decode_bwd_vals_kernel[grid](
                g, idx, W_dec, row_ptr, dvals, d_out, k, *strides, **BWD_CONFIG
            )
    return dvals


# How much of the dictionary one slice may hold: an H100 has 50 MB of L2, in two parts, and codes
# and outputs pass through it too.
SLICE_BYTES = 32 << 20
ROW_BYTES = (512, 256)  # of a row of W_dec in a slice: loads of 16 or 8 bytes in each thread

BWD_CONFIG = {"BLOCK_K": 8, "LOG2_LANES": 7, **OPTIONS}


def _fwd_config(d_sae: int, itemsize: int) -> dict[str, Any]:
    """The widest slice that fits. If none does, rows come from memory anyhow: the widest."""
    fitting = (size for size in ROW_BYTES if d_sae * size <= SLICE_BYTES)
    return {"BLOCK_D": next(fitting, ROW_BYTES[0]) // itemsize, "UNROLL": 8, **OPTIONS}


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name; ragged: no size or stride is a multiple of 16, or 1."""
    found = {
        "fwd-bf16-csr": Variant(
            _decode_fwd_kernel,
            "*fp32:16, *i32:16, *bf16:16, *bf16:16, *i64:16, *fp32:16, i32:16, i32, 1, 1, i32:16",
            _fwd_config(0, 2),
        ),
        "bwd-bf16-csr": Variant(
            _decode_bwd_vals_kernel,
            "*fp32:16, *i32:16, *bf16:16, *i64:16, *fp32:16, i32:16, i32, i32:16, 1, 1, i32:16, 1",
            BWD_CONFIG,
        ),
    }
    for w, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        for ragged, i32, g_d in (("", "i32:16", "1"), ("-ragged", "i32", "i32")):
            for row_bytes in ROW_BYTES:
                for bias in ("", "-bias"):
                    found[f"fwd-{w}-{row_bytes}{bias}{ragged}"] = Variant(
                        _decode_fwd_kernel,
                        f"*fp32:16, *i32:16, *{w}:16, {f'*{w}:16' if bias else 'None'}, None, "
                        f"*{w}:16, {i32}, {i32}, {i32}, {i32}, {i32}",
                        _fwd_config(SLICE_BYTES // row_bytes, itemsize),
                    )
            for g in sorted({w, "fp32"}):
                found[f"bwd-{w}-g-{g}{ragged}"] = Variant(
                    _decode_bwd_vals_kernel,
                    f"*{g}:16, *i32:16, *{w}:16, None, *fp32:16, "
                    f"{i32}, {i32}, {i32}, {g_d}, {i32}, {i32}, {i32}",
                    BWD_CONFIG,
                )
    return found


def decode_cost(n_tokens: int, d_out: int, d_sae: int, k: int, itemsize: int) -> Cost:
    """Of either direction, where x̂ or g is of W_dec's itemsize: one is written, one is read."""
    pairs = n_tokens * k
    rest = n_tokens * d_out * itemsize + pairs * (4 + 4)
    row = d_out * itemsize
    return Cost(2 * pairs * d_out, pairs * row + rest, min(pairs, d_sae) * row + rest)
