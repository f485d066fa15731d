"""Sparse decode, its squared error, and the gradient of its values in one visit of W_dec's rows.

    x̂ = b_dec + Σ_k vals · W_dec[idx]    error = x̂ - target    sse = Σ_{n,d} error²
    dvals[n, k] = Σ_d error[n, d] · W_dec[idx[n, k], d]         (half of ∂sse/∂vals)

Shapes, dtypes, strides, padding: as in decode.py; target (N, D) any float, any strides; sse (0-d),
         error, x̂ and dvals are fp32.

Order    As in decode.py, bits depend on a row's own inputs alone. x̂: the same bits as decode_fwd's.
         dvals: the D products, each rounded, with zeros up to a power of two, are the leaves of a
         complete binary tree over d: neighbours are added in pairs until one is left. So any width
         of a slice that is a power of two gives the same bits. ‖error[n]‖²: the same tree over
         error². sse: `sums.vector_sum` of them.

Bytes    A program is a token and a slice of D. It decodes the slice, which brings N·K rows of W_dec
         through the caches as in decode_fwd, and reads the same bytes again for dvals: K slices of
         256 bytes, 16 KB at K = 64, meant to be in L1 or L2 still. (Keeping them in registers while
         x̂ takes k in order needs every row unrolled: it spilled.) Partial sums, a float for a pair
         or a token and a slice, are written and read once: 3 % of the gather.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels import checks
from fastsae.kernels.checks import ANY_FLOAT, OPTIONS, Cost, Variant, expect
from fastsae.kernels.decode import SLICE_BYTES, codes_of, decode_slice
from fastsae.kernels.sums import add_neighbours, vector_sum


@triton.jit
def _decode_error_kernel(
    vals_ptr,  # (N, K) or (nnz) any of FLOATS
    idx_ptr,  # (N, K) or (nnz) int32, < 0 is padding
    W_dec_ptr,  # (F, D) any of FLOATS
    b_dec_ptr,  # (D) any of FLOATS, or None
    target_ptr,  # (N, D) any float
    row_ptr_ptr,  # (N + 1) int64, or None
    error_ptr,  # (out) (N, D) fp32
    xhat_ptr,  # (out) (N, D) fp32, or None
    partial_ptr,  # (out) (slices, nnz + N) fp32: of dvals, then of ‖error‖²
    D,
    K,
    nnz,
    stride_vals,
    stride_idx,
    stride_W_dec,
    stride_target_n,
    stride_target_d,
    stride_pairs,
    LOG2_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    BLOCK_D: tl.constexpr = 1 << LOG2_D
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, count = codes_of(n, row_ptr_ptr, K)
    vals_ptr += first * stride_vals
    idx_ptr += first * stride_idx
    x = decode_slice(vals_ptr, idx_ptr, W_dec_ptr, b_dec_ptr, d, D, count, stride_W_dec, UNROLL)
    in_row = d < D
    if xhat_ptr is not None:
        tl.store(xhat_ptr + n * D + d, x, mask=in_row)
    target_ptrs = target_ptr + n * stride_target_n + d.to(tl.int64) * stride_target_d
    error = x - tl.load(target_ptrs, mask=in_row, other=0.0).to(tl.float32)
    tl.store(error_ptr + n * D + d, error, mask=in_row)

    partial_ptr += tl.program_id(1).to(tl.int64) * (nnz + tl.num_programs(0))
    square = add_neighbours((error * error)[None, :], LOG2_D)
    tl.store(partial_ptr + nnz + n + tl.arange(0, 1), square)
    for k0 in range(0, count, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        latent = tl.load(idx_ptr + k, mask=k < count, other=-1)
        stored = latent >= 0
        row_ptr = W_dec_ptr + latent.to(tl.int64) * stride_W_dec
        mask = stored[:, None] & in_row[None, :]
        row = tl.load(row_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dvals = add_neighbours(row * error[None, :], LOG2_D)
        # Where the error is inf or NaN, the zeros that stand for an empty slot's row make NaN.
        pair = first * stride_pairs + k
        tl.store(partial_ptr + pair, tl.where(stored, dvals, 0.0), mask=k < count)


@triton.jit
def _add_slices_kernel(
    partial_ptr,  # (slices, n_sums) fp32
    sums_ptr,  # (out) (n_sums) fp32
    n_sums,
    n_slices,
    LOG2_SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, 1 << LOG2_SLICES)
    mask = (i < n_sums)[:, None] & (s < n_slices)[None, :]
    partial_ptrs = partial_ptr + i[:, None] + s.to(tl.int64)[None, :] * n_sums
    sums = add_neighbours(tl.load(partial_ptrs, mask=mask, other=0.0), LOG2_SLICES)
    tl.store(sums_ptr + i, sums, mask=i < n_sums)


def decode_error(
    vals: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    row_ptr: Tensor | None = None,
    reconstruct: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sse (0-d), error (N, D), x̂ (N, D) or without `reconstruct` (0, D), and dvals as idx; fp32."""
    n_tokens, k = checks.expect_decoder(vals, idx, W_dec, b_dec, row_ptr)
    d_sae, d_out = W_dec.shape
    expect("target", target, (n_tokens, d_out), ANY_FLOAT, W_dec, any_stride=True)
    config = _config(d_sae, W_dec.element_size())
    n_slices = max(triton.cdiv(d_out, 1 << config["LOG2_D"]), 1)
    nnz = idx.numel()
    n_sums = nnz + n_tokens
    new: dict[str, Any] = {"dtype": torch.float32, "device": W_dec.device}
    error = torch.empty(n_tokens, d_out, **new)
    xhat = torch.empty(n_tokens if reconstruct else 0, d_out, **new)
    partial, sums = torch.empty(n_slices * n_sums, **new), torch.empty(n_sums, **new)
    dvals = sums[:nnz].view(idx.shape)
    strides = vals.stride(0), idx.stride(0), W_dec.stride(0), *target.stride(), dvals.stride(0)
    if n_tokens:
        with torch.cuda.device_of(sums):
            _decode_error_kernel[n_tokens, n_slices](
                *(vals, idx, W_dec, b_dec, target, row_ptr),
                *(error, xhat if reconstruct else None, partial),
                *(d_out, k, nnz, *strides),
                **config,
            )
            config = _slices_config(n_slices)
            grid = (triton.cdiv(n_sums, config["BLOCK"]),)
            _add_slices_kernel[grid](partial, sums, n_sums, n_slices, **config)
    return vector_sum(sums[nnz:])[0], error, xhat, dvals


ROW_BYTES = (256, 128)  # of a row of W_dec in a slice


def _config(d_sae: int, itemsize: int) -> dict[str, Any]:
    """The widest slice that fits. If none does: the narrowest, so that what the running programs
    have read is still in L2 when they read it again."""
    fitting = (size for size in ROW_BYTES if d_sae * size <= SLICE_BYTES)
    width = next(fitting, ROW_BYTES[-1]) // itemsize
    return {"LOG2_D": width.bit_length() - 1, "BLOCK_K": 8, "UNROLL": 8, **OPTIONS}


def _slices_config(n_slices: int) -> dict[str, Any]:
    log2 = (n_slices - 1).bit_length()
    return {"LOG2_SLICES": log2, "BLOCK": max(4096 >> log2, 8), **OPTIONS, "num_warps": 4}


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name; ragged: no size or stride is a multiple of 16, or 1."""
    found = {
        "error-bf16-csr": Variant(
            _decode_error_kernel,
            "*fp32:16, *i32:16, *bf16:16, *bf16:16, *bf16:16, *i64:16, *fp32:16, None, *fp32:16, "
            "i32:16, i32, i32, 1, 1, i32:16, i32:16, 1, 1",
            _config(0, 2),
        ),
    }
    for n_slices in (1, 32, 256):
        found[f"slices-{n_slices}"] = Variant(
            _add_slices_kernel, "*fp32:16, *fp32:16, i32, i32", _slices_config(n_slices)
        )
    for w, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        for ragged, i32, d in (("", "i32:16", "1"), ("-ragged", "i32", "i32")):
            for row_bytes in ROW_BYTES:
                for bias, xhat in ((f"*{w}:16", "*fp32:16"), ("None", "None")):
                    name = "" if bias == "None" else "-bias"
                    found[f"error-{w}-{row_bytes}{name}{ragged}"] = Variant(
                        _decode_error_kernel,
                        f"*fp32:16, *i32:16, *{w}:16, {bias}, *{w}:16, None, *fp32:16, {xhat}, "
                        f"*fp32:16, {i32}, {i32}, {i32}, {i32}, {i32}, {i32}, {i32}, {d}, {i32}",
                        _config(SLICE_BYTES // row_bytes, itemsize),
                    )
    return found


def decode_error_cost(n_tokens: int, d_out: int, d_sae: int, k: int, itemsize: int) -> Cost:
    """Without x̂, target fp32. The second visit of a row comes from L2 at worst."""
    pairs, slices = n_tokens * k, triton.cdiv(d_out, 1 << _config(d_sae, itemsize)["LOG2_D"])
    row = d_out * itemsize
    rest = n_tokens * d_out * 8 + pairs * 8 + (2 * slices + 1) * (pairs + n_tokens) * 4
    return Cost(4 * pairs * d_out, 2 * pairs * row + rest, min(pairs, d_sae) * row + rest)
