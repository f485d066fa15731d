"""Gradient rows of W_enc and W_dec.

    row_gradients    rows[f, d] = Σ coef·src[token, d], sums[f] = Σ coef, over the pairs of latent f

Shapes   coef and idx (N, K), or (nnz) with row_ptr (N+1); src (N, D); rows (F, D); sums (F). Any of
         N, K, D, F may be 0.
Dtypes   sums fp32; rows of the dtype asked for, or fp32; coef and src fp32, bf16 or fp16, each on
         its own. Every load becomes fp32 at once, and so is all arithmetic.
Strides  src: any, 0 included.
Padding  idx < 0 marks an empty slot, whose coef (even NaN) is left out.

Order    Bits do not depend on other latents, the grid, the slice width, warps, alignment or target.
         A latent's pairs, ascending by entry, are cut into chunks of CHUNK = 64. A chunk's sum
         starts from 0 and takes its pairs ascending by fused multiply-adds; the chunks' sums are
         added, ascending, to 0. sums is the row of a src of ones. No atomics: one program writes an
         output, once.

Split    Where a latent has more than CHUNK pairs, its full chunks are summed beforehand, each by a
         program of its own, into partial (nnz // CHUNK, D): else one hot latent would be as slow as
         all others together. With s the place of its first pair, chunk c is in row s // CHUNK + c.
         Those rows are its own, as a full chunk takes CHUNK places; and since the chunk of row j
         holds the place (j + 1)·CHUNK - 1, the program of row j finds its latent by one look-up.

Bytes    Gradient rows gather N·K rows of src, a slice of D at a time, which stays in L2 while all
         latents pass, and write F·D once; partial is up to N·K·D / 64, written and read once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import FLOATS, OPTIONS, Variant, expect, expect_codes
from fastsae.kernels.index import inverse_index

CHUNK = 64  # part of the result's definition


@triton.jit
def _sum_chunk(
    begin,  # int64: the chunk's pairs are begin .. end
    end,
    d,  # the slice, as in sum_pairs; and so on
    D,
    token_ptr,
    entry_ptr,
    coef_ptr,
    src_ptr,
    stride_src_n,
    stride_src_d,
    UNROLL: tl.constexpr,
):
    acc = tl.zeros(d.shape, tl.float32)
    for i0 in range(begin, end, UNROLL):
        # Masked, not branched over: then the loads of all UNROLL rows are in flight together.
        for u in tl.static_range(UNROLL):
            i = i0 + u
            there = i < end
            entry = tl.load(entry_ptr + i, mask=there, other=0)
            coef = tl.load(coef_ptr + entry, mask=there, other=0.0).to(tl.float32)
            token = tl.load(token_ptr + i, mask=there, other=0).to(tl.int64)
            width = tl.where(there, D, 0)
            src_ptrs = src_ptr + token * stride_src_n + d.to(tl.int64) * stride_src_d
            acc = tl.fma(tl.load(src_ptrs, mask=d < width, other=0.0).to(tl.float32), coef, acc)
    return acc


@triton.jit
def sum_pairs(
    f,  # the latent
    d,  # (BLOCK_D) int32: the slice of D; what is outside gives 0
    D,
    latent_ptr_ptr,  # (F+1) int64; from here the fields of Segments
    token_ptr,  # (n_pairs) int32
    entry_ptr,  # (n_pairs) int32
    coef_ptr,  # (n_pairs) any of FLOATS
    src_ptr,  # (N, D) any of FLOATS
    partial_ptr,  # (n_pairs // CHUNK, D) fp32
    stride_src_n,
    stride_src_d,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,  # how many pairs are loaded together; changes no bit
):
    """Σ coef·src[token, d] over the pairs of latent f, (BLOCK_D) fp32, in the promised order."""
    begin = tl.load(latent_ptr_ptr + f)
    end = tl.load(latent_ptr_ptr + f + 1)
    n_partial = tl.where(end - begin > CHUNK, (end - begin) // CHUNK, 0)
    partial_begin = begin // CHUNK
    partial_end = partial_begin + n_partial
    total = tl.zeros(d.shape, tl.float32)
    for c0 in range(partial_begin, partial_end, UNROLL):
        for u in tl.static_range(UNROLL):
            c = tl.cast(c0 + u, tl.int64)
            width = tl.where(c < partial_end, D, 0)
            total += tl.load(partial_ptr + c * D + d, mask=d < width, other=0.0)
    pairs = token_ptr, entry_ptr, coef_ptr, src_ptr, stride_src_n, stride_src_d
    return total + _sum_chunk(begin + n_partial * CHUNK, end, d, D, *pairs, UNROLL)


@triton.jit
def _partial_kernel(
    idx_ptr,  # (n_pairs) int32, < 0 is padding
    latent_ptr_ptr,  # (F+1) int64
    token_ptr,  # (n_pairs) int32
    entry_ptr,  # (n_pairs) int32
    coef_ptr,  # (n_pairs) any of FLOATS
    src_ptr,  # (N, D) any of FLOATS
    partial_ptr,  # (out) (n_pairs // CHUNK, D) fp32
    F,
    D,
    stride_src_n,
    stride_src_d,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inside = row * CHUNK + CHUNK - 1
    if inside < tl.load(latent_ptr_ptr + F):
        latent = tl.load(idx_ptr + tl.load(entry_ptr + inside))
        first = tl.load(latent_ptr_ptr + latent)
        last = tl.load(latent_ptr_ptr + latent + 1)
        begin = first + (row - first // CHUNK) * CHUNK
        end = begin + CHUNK
        if (last - first > CHUNK) & (end <= last):
            d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            pairs = token_ptr, entry_ptr, coef_ptr, src_ptr, stride_src_n, stride_src_d
            acc = _sum_chunk(begin, end, d, D, *pairs, UNROLL)
            tl.store(partial_ptr + row * D + d, acc, mask=d < D)


@triton.jit
def _rows_kernel(
    latent_ptr_ptr,  # (F+1) int64
    token_ptr,  # (n_pairs) int32
    entry_ptr,  # (n_pairs) int32
    coef_ptr,  # (n_pairs) any of FLOATS
    src_ptr,  # (N, D) any of FLOATS
    partial_ptr,  # (n_pairs // CHUNK, D) fp32
    rows_ptr,  # (out) (F, D) any of FLOATS
    D,
    stride_src_n,
    stride_src_d,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    pairs = latent_ptr_ptr, token_ptr, entry_ptr, coef_ptr, src_ptr, partial_ptr
    row = sum_pairs(f, d, D, *pairs, stride_src_n, stride_src_d, CHUNK, UNROLL)
    tl.store(rows_ptr + f * D + d, row.to(rows_ptr.dtype.element_ty), mask=d < D)


class Segments(NamedTuple):
    """One gradient's pairs, as sum_pairs reads them."""

    latent_ptr: Tensor  # (F+1) int64
    token: Tensor  # (n_pairs) int32
    entry: Tensor  # (n_pairs) int32
    coef: Tensor  # (n_pairs) any of FLOATS
    src: Tensor  # (N, D) any of FLOATS
    partial: Tensor  # (n_pairs // CHUNK, D) fp32; rows that stand for no chunk are left unset


def segments(
    coef: Tensor,
    idx: Tensor,
    src: Tensor,
    index: tuple[Tensor, Tensor, Tensor],  # inverse_index(idx, n_latents, row_ptr)
    row_ptr: Tensor | None = None,
) -> Segments:
    """Σ coef·src made ready for sum_pairs: the full chunks of long segments are summed here."""
    _check_pairs(coef, idx, src, row_ptr)
    idx, coef = idx.reshape(-1), coef.reshape(-1)  # copies where rows are apart: small ones
    n_partial, d = idx.numel() // CHUNK, src.shape[1]
    partial = torch.empty(n_partial, d, dtype=torch.float32, device=src.device)
    found = Segments(*index, coef, src, partial)
    config = _pairs_config(src.element_size(), unroll=8)
    if partial.numel():
        n_latents, grid = len(index[0]) - 1, (n_partial, triton.cdiv(d, config["BLOCK_D"]))
        with torch.cuda.device_of(src):
            _partial_kernel[grid](idx, *found, n_latents, d, *src.stride(), **config)
    return found


def row_gradients(
    coef: Tensor,
    idx: Tensor,
    src: Tensor,
    n_latents: int,
    row_ptr: Tensor | None = None,
    dtype: torch.dtype | None = None,
    need_rows: bool = True,
) -> tuple[Tensor, Tensor]:
    """rows (F, D) in dtype or fp32, and sums (F) fp32; without need_rows, rows are (0, D)."""
    _check_pairs(coef, idx, src, row_ptr)
    shape = n_latents if need_rows else 0, src.shape[1]
    rows = torch.empty(shape, dtype=dtype or torch.float32, device=src.device)
    expect("dtype", rows, shape, FLOATS, idx)
    index = inverse_index(idx, n_latents, row_ptr)
    if rows.numel():
        _write_rows(rows, segments(coef, idx, src, index, row_ptr))
    sums = torch.empty(n_latents, 1, dtype=torch.float32, device=src.device)
    ones = torch.ones(1, 1, device=src.device).expand(len(src), 1)
    _write_rows(sums, segments(coef, idx, ones, index, row_ptr))
    return rows, sums[:, 0]


def _check_pairs(coef: Tensor, idx: Tensor, src: Tensor, row_ptr: Tensor | None) -> None:
    n_tokens, _ = expect_codes(idx, row_ptr, idx)
    expect("coef", coef, tuple(idx.shape), FLOATS, idx, any_stride=True)
    expect("src", src, (n_tokens, "D"), FLOATS, idx, any_stride=True)


def _write_rows(rows: Tensor, pairs: Segments) -> None:
    (n_latents, d), config = rows.shape, _pairs_config(pairs.src.element_size(), unroll=4)
    grid = n_latents, triton.cdiv(d, config["BLOCK_D"])
    if rows.numel():
        with torch.cuda.device_of(rows):
            _rows_kernel[grid](*pairs, rows, d, *pairs.src.stride(), **config)


def _pairs_config(itemsize: int, unroll: int) -> dict[str, Any]:
    """Of a row of src 512 bytes, loads of 16 in each thread."""
    return {"CHUNK": CHUNK, "BLOCK_D": 512 // itemsize, "UNROLL": unroll, **OPTIONS}


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name; ragged: no size or stride is a multiple of 16, or 1."""
    found = {}

    def pairs(w: str, out: str, name: str, sizes: str) -> None:
        itemsize = 4 if w == "fp32" else 2
        inputs = f"*i64:16, *i32:16, *i32:16, *fp32:16, *{w}:16, *fp32:16"
        found[f"partial-{w}{name}"] = Variant(
            _partial_kernel, f"*i32:16, {inputs}, i32, {sizes}", _pairs_config(itemsize, unroll=8)
        )
        found[f"rows-{w}-to-{out}{name}"] = Variant(
            _rows_kernel, f"{inputs}, *{out}:16, {sizes}", _pairs_config(itemsize, unroll=4)
        )

    pairs("fp32", "fp32", "-sums", "1, i32:16, 1")  # D, and the strides of ones
    for w in ("fp32", "bf16", "fp16"):
        for ragged, i32, one in (("", "i32:16", "1"), ("-ragged", "i32", "i32")):
            for out in sorted({w, "fp32"}):
                pairs(w, out, ragged, f"{i32}, {i32}, {one}")
    return found
