"""Sparse decode and the gradient of its values.

    decode_fwd       x̂[n, d]     = b_dec[d] + Σ_k vals[n, k] · W_dec[idx[n, k], d]
    decode_bwd_vals  dvals[n, k] = Σ_d g[n, d] · W_dec[idx[n, k], d]

Shapes   vals, idx, dvals (N, K); W_dec (F, D); b_dec (D); g, x̂ (N, D). Any of them may be 0.
Dtypes   W_dec fp32, bf16 or fp16, and x̂ is of its dtype; vals and b_dec likewise, each on its own;
         g any float; idx int32; dvals fp32. Every load becomes fp32 at once, and so is all
         arithmetic.
Strides  W_dec, vals and idx: any row stride, unit inner stride. g: any, 0 included.
Padding  idx < 0 marks an empty slot: its value (even NaN) and W_dec are left out of x̂, its dvals
         is 0. A stored pair whose value is 0 is a pair like any other. That idx < F is the
         caller's promise: a check would have to wait for the device.

Order    Bits depend on a row's own inputs alone: not on N, F, the grid, the slice width, warps,
         alignment or target. x̂ starts from b_dec and takes k ascending by fused multiply-adds.
         dvals has 128 lanes: lane j starts from 0 and takes d = j, j + 128, … ascending by fused
         multiply-adds; then neighbouring lanes are added in pairs, seven times. The fma is
         spelled out because whether a·b + c contracts is up to the compiler (the interpreter of
         Triton 3.6 alone rounds it twice). No atomics: one program writes an output, once.

Bytes    Both gather N·K rows of W_dec, and next to that all else is small: `decode_cost`. The
         forward grid runs over all tokens within one slice of D before the next slice: a slice
         of the whole dictionary stays in L2, so device memory is read about once. dvals takes a
         row in one piece, so that there are no partial sums to store.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _decode_fwd_kernel(
    vals_ptr,  # (N, K) any of FLOATS
    idx_ptr,  # (N, K) int32, < 0 is padding
    W_dec_ptr,  # (F, D) any of FLOATS
    b_dec_ptr,  # (D) any of FLOATS, or None
    xhat_ptr,  # (out) (N, D) the dtype of w_dec
    D,
    K,
    stride_vals,
    stride_idx,
    stride_W_dec,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    if HAS_BIAS:
        x = tl.load(b_dec_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    else:
        x = tl.zeros([BLOCK_D], tl.float32)
    for k0 in range(0, K, UNROLL):
        # Masked, not branched over: then the loads of all UNROLL rows are in flight together.
        for u in tl.static_range(UNROLL):
            k = k0 + u
            latent = tl.load(idx_ptr + n * stride_idx + k, mask=k < K, other=-1)
            stored = latent >= 0
            val = tl.load(vals_ptr + n * stride_vals + k, mask=stored, other=0.0).to(tl.float32)
            row_ptr = W_dec_ptr + latent.to(tl.int64) * stride_W_dec
            width = tl.where(stored, D, 0)
            row = tl.load(row_ptr + d, mask=d < width, other=0.0).to(tl.float32)
            x = tl.fma(row, val, x)
    tl.store(xhat_ptr + n * D + d, x.to(xhat_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _decode_bwd_vals_kernel(
    g_ptr,  # (N, D) any float
    idx_ptr,  # (N, K) int32, < 0 is padding
    W_dec_ptr,  # (F, D) any of FLOATS
    dvals_ptr,  # (out) (N, K) fp32
    D,
    K,
    stride_g_n,
    stride_g_d,
    stride_idx,
    stride_W_dec,
    BLOCK_K: tl.constexpr,
    LOG2_LANES: tl.constexpr,
):
    LANES: tl.constexpr = 1 << LOG2_LANES
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    latent = tl.load(idx_ptr + n * stride_idx + k, mask=k < K, other=-1)
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
    # A sum of two has one order in every layout; a sum of LANES has the layout's.
    for level in tl.static_range(LOG2_LANES):
        acc = tl.sum(tl.reshape(acc, [BLOCK_K, LANES >> (level + 1), 2]), axis=2)
    # Where g is inf or NaN, the zeros that stand for an empty slot's row make NaN.
    dvals = tl.where(stored, tl.reshape(acc, [BLOCK_K]), 0.0)
    tl.store(dvals_ptr + n * K + k, dvals, mask=k < K)


def decode_fwd(vals: Tensor, idx: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """x̂ (N, D) in W_dec's dtype, from vals and idx (N, K), W_dec (F, D) and b_dec (D)."""
    _expect("W_dec", W_dec, ("F", "D"), FLOATS, W_dec)
    _expect("idx", idx, ("N", "K"), (torch.int32,), W_dec)
    (n_tokens, k), (d_sae, d_out) = idx.shape, W_dec.shape
    _expect("vals", vals, (n_tokens, k), FLOATS, W_dec)
    if b_dec is not None:
        _expect("b_dec", b_dec, (d_out,), FLOATS, W_dec)
    xhat = torch.empty(n_tokens, d_out, dtype=W_dec.dtype, device=W_dec.device)
    config = _fwd_config(d_sae, W_dec.element_size(), b_dec is not None)
    grid = (n_tokens, triton.cdiv(d_out, config["BLOCK_D"]))
    strides = vals.stride(0), idx.stride(0), W_dec.stride(0)
    if xhat.numel():
        with torch.cuda.device_of(xhat):
            _decode_fwd_kernel[grid](vals, idx, W_dec, b_dec, xhat, d_out, k, *strides, **config)
    return xhat


def decode_bwd_vals(g: Tensor, idx: Tensor, W_dec: Tensor) -> Tensor:
    """dvals (N, K) fp32, from g = ∂L/∂x̂ (N, D), idx (N, K) and W_dec (F, D)."""
    _expect("W_dec", W_dec, ("F", "D"), FLOATS, W_dec)
    _expect("idx", idx, ("N", "K"), (torch.int32,), W_dec)
    (n_tokens, k), d_out = idx.shape, W_dec.shape[1]
    _expect("g", g, (n_tokens, d_out), (*FLOATS, torch.float64), W_dec, any_stride=True)
    dvals = torch.empty(n_tokens, k, dtype=torch.float32, device=W_dec.device)
    grid = (n_tokens, triton.cdiv(k, BWD_CONFIG["BLOCK_K"]))
    strides = *g.stride(), idx.stride(0), W_dec.stride(0)
    if dvals.numel():
        with torch.cuda.device_of(dvals):
            _decode_bwd_vals_kernel[grid](g, idx, W_dec, dvals, d_out, k, *strides, **BWD_CONFIG)
    return dvals


def _expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],  # a word stands for any size
    dtypes: tuple[torch.dtype, ...],
    beside: Tensor,
    any_stride: bool = False,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    sizes = zip(shape, tensor.shape, strict=False)
    if tensor.ndim != len(shape) or any(isinstance(a, int) and a != b for a, b in sizes):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.device != beside.device:
        raise ValueError(f"{name}: expected a tensor on {beside.device}, got {tensor.device}")
    if not any_stride and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected unit inner stride, got strides {tensor.stride()}")


# There is no a·b + c left to contract; saying so also keeps Triton's changing default out of it.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}

# How much of the dictionary one slice may hold: an H100 has 50 MB of L2, in two parts, and codes
# and outputs pass through it too.
SLICE_BYTES = 32 << 20
ROW_BYTES = (512, 256)  # of a row of W_dec in a slice: loads of 16 or 8 bytes in each thread

BWD_CONFIG = {"BLOCK_K": 8, "LOG2_LANES": 7, **OPTIONS}


def _fwd_config(d_sae: int, itemsize: int, has_bias: bool) -> dict[str, Any]:
    """The widest slice that fits. If none does, rows come from memory anyhow: the widest."""
    fitting = (size for size in ROW_BYTES if d_sae * size <= SLICE_BYTES)
    block_d = next(fitting, ROW_BYTES[0]) // itemsize
    return {"HAS_BIAS": has_bias, "BLOCK_D": block_d, "UNROLL": 8, **OPTIONS}


class Variant(NamedTuple):
    """One compiled form of a kernel."""

    kernel: Any
    signature: str  # its parameters, as triton.tools.compile has them: "*bf16:16, i32, 1, None"
    config: dict[str, Any]  # what the launcher passes by keyword


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name; ragged: no size or stride is a multiple of 16, or 1."""
    found = {}
    for w, itemsize in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        for ragged, i32, g_d in (("", "i32:16", "1"), ("-ragged", "i32", "i32")):
            for row_bytes in ROW_BYTES:
                for bias in ("", "-bias"):
                    b_dec = f"*{w}:16" if bias else "None"
                    pointers = f"*fp32:16, *i32:16, *{w}:16, {b_dec}, *{w}:16"
                    found[f"fwd-{w}-{row_bytes}{bias}{ragged}"] = Variant(
                        _decode_fwd_kernel,
                        f"{pointers}, {i32}, {i32}, {i32}, {i32}, {i32}",
                        _fwd_config(SLICE_BYTES // row_bytes, itemsize, bool(bias)),
                    )
            for g in sorted({w, "fp32"}):
                pointers = f"*{g}:16, *i32:16, *{w}:16, *fp32:16"
                found[f"bwd-{w}-g-{g}{ragged}"] = Variant(
                    _decode_bwd_vals_kernel,
                    f"{pointers}, {i32}, {i32}, {i32}, {g_d}, {i32}, {i32}",
                    BWD_CONFIG,
                )
    return found


class Cost(NamedTuple):
    flops: int
    bytes_gathered: int  # where every row of W_dec that is asked for comes from memory
    bytes_once: int  # where each comes once, the aim of the slices


def decode_cost(n_tokens: int, d_out: int, d_sae: int, k: int, itemsize: int) -> Cost:
    """Of either direction, where x̂ or g is of W_dec's itemsize: one is written, one is read."""
    pairs = n_tokens * k
    rest = n_tokens * d_out * itemsize + pairs * (4 + 4)
    row = d_out * itemsize
    return Cost(2 * pairs * d_out, pairs * row + rest, min(pairs, d_sae) * row + rest)
