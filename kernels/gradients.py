"""The gradient of a parameter's rows as Adam applies it, made in the kernel that uses it.

    g[f] ← dense[f] + Σ coef·src[token]      over the pairs of row f, if there are any
    g[f] ← g[f] - <g[f], p[f]> p[f] / ‖p[f]‖²     with project, where p[f] is not all zeros
    gradient_square_norm = Σ ‖g[f]‖²

Shapes   p and dense (F, D) or (D), a vector being one row; pairs as in rows.py; the norm 0-d. F
         may be 0. With project, D ≤ 16384.
Dtypes   p, dense and pairs fp32, bf16 or fp16; all arithmetic and the norm fp32.
Strides  p contiguous; dense any.

Order    Bits do not depend on the grid, warps or target: every operation is rounded on its own.
         Several gradients of one parameter are one list of pairs, in their order, as several
         batches would be; a row's sum is `rows.sum_pairs`, added to dense. <g, p>, ‖p‖² and ‖g‖² of
         a row add neighbours in pairs over d, zeros up to a power of two; p is scaled by a power of
         two, so no square overflows or vanishes. Without project ‖g‖² is taken of slices of 1024.
         Rows, or slices, are added by `sums.vector_sum`. No atomics.

Bytes    Of the norm: the pairs' rows of src, dense, with project p, and 4 bytes a row. No (F, D)
         gradient exists; several gradients are copied together, (N, D) each.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import FLOATS, OPTIONS, Cost, Variant, expect
from fastsae.kernels.decode import SLICE_BYTES
from fastsae.kernels.index import inverse_index
from fastsae.kernels.rows import CHUNK, Segments, segments, sum_pairs
from fastsae.kernels.sums import add_neighbours, scale_to_one, vector_sum
from fastsae.reference import as_rows

if TYPE_CHECKING:
    from fastsae.ops import RowGradient

STATE_DTYPES = (torch.float32, torch.bfloat16)
MAX_PROJECTED = 16384


@triton.jit
def scaled_row(r, LOG2_D: tl.constexpr):
    """r times the power of two that brings its largest |element| near 1, and ‖that‖²."""
    scale, _ = scale_to_one(tl.max(tl.abs(r), axis=0))
    r = r * scale
    return r, tl.sum(add_neighbours((r * r)[None, :], LOG2_D), axis=0)


@triton.jit
def is_touched(f, dense_ptr, latent_ptr_ptr):
    if dense_ptr is not None:
        return f >= 0
    elif latent_ptr_ptr is not None:
        return tl.load(latent_ptr_ptr + f) < tl.load(latent_ptr_ptr + f + 1)
    else:
        return f < 0


@triton.jit
def row_gradient(
    f,
    d,
    D,
    p_ptr,  # (F, D)
    dense_ptr,
    stride_dense_f,
    stride_dense_d,
    pairs,  # the fields of Segments
    stride_src_n,
    stride_src_d,
    PROJECT: tl.constexpr,
    LOG2_D: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    g = tl.zeros(d.shape, tl.float32)
    if dense_ptr is not None:
        dense_ptrs = dense_ptr + f * stride_dense_f + d.to(tl.int64) * stride_dense_d
        g = tl.load(dense_ptrs, mask=d < D, other=0.0).to(tl.float32)
    if pairs[0] is not None:
        g += sum_pairs(f, d, D, *pairs, stride_src_n, stride_src_d, CHUNK, UNROLL)
    if PROJECT:
        p = tl.load(p_ptr + f * D + d, mask=d < D, other=0.0).to(tl.float32)
        unit, square = scaled_row(p, LOG2_D)
        along = tl.sum(add_neighbours((g * unit)[None, :], LOG2_D), axis=0)
        g -= tl.where(square > 0, tl.div_rn(along, square), 0.0) * unit
    return g


@triton.jit
def _square_kernel(
    p_ptr,  # (F, D) any of FLOATS
    square_ptr,  # (out) (F, slices) fp32
    dense_ptr,  # (F, D) any of FLOATS, or None
    latent_ptr_ptr,  # (F+1) int64; this and the next five are Segments, or all None
    token_ptr,
    entry_ptr,
    coef_ptr,
    src_ptr,
    partial_ptr,
    D,
    stride_dense_f,
    stride_dense_d,
    stride_src_n,
    stride_src_d,
    PROJECT: tl.constexpr,
    LOG2_D: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    square_ptr += f * tl.num_programs(1) + tl.program_id(1)
    if not is_touched(f, dense_ptr, latent_ptr_ptr):
        tl.store(square_ptr, 0.0)
        return
    d = tl.program_id(1) * (1 << LOG2_D) + tl.arange(0, 1 << LOG2_D)
    pairs = latent_ptr_ptr, token_ptr, entry_ptr, coef_ptr, src_ptr, partial_ptr
    strides = stride_src_n, stride_src_d
    dense = dense_ptr, stride_dense_f, stride_dense_d
    g = row_gradient(f, d, D, p_ptr, *dense, pairs, *strides, PROJECT, LOG2_D, CHUNK, UNROLL)
    tl.store(square_ptr, tl.sum(add_neighbours((g * g)[None, :], LOG2_D), axis=0))


def gradient_square_norm(
    p: Tensor, dense: Tensor | None, gradients: "list[RowGradient]", project: bool
) -> Tensor:
    """‖g‖² (0-d, fp32, on the device) of the gradient that `adam_` scales and applies."""
    rows, inputs, config = row_inputs(p, dense, gradients, project)
    n_slices = triton.cdiv(rows.shape[1], 1 << config["LOG2_D"])
    squares = torch.empty(len(rows) * n_slices, dtype=torch.float32, device=p.device)
    if squares.numel():
        with torch.cuda.device_of(p):
            _square_kernel[len(rows), n_slices](rows, squares, *inputs, **config)
    return vector_sum(squares)[0]


def row_inputs(
    p: Tensor, dense: Tensor | None, gradients: "list[RowGradient]", project: bool
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """p as rows; dense, the pairs, D and strides as the kernels take them; their constants."""
    expect("p", p, tuple(p.shape), FLOATS, p)
    expect_contiguous("p", p)
    rows = as_rows(p.detach())
    n_rows, d = rows.shape
    if project and d > MAX_PROJECTED:
        raise ValueError(f"p: expected rows of at most {MAX_PROJECTED} with project, got {d}")
    dense_strides: tuple[int, ...] = (0, 0)
    src_strides: tuple[int, ...] = (0, 0)
    if dense is not None:
        expect("dense", dense, tuple(p.shape), FLOATS, p, any_stride=True)
        dense = as_rows(dense)
        dense_strides = dense.stride()
    pairs: Segments | tuple[None, ...] = (None,) * len(Segments._fields)
    if gradients:
        coef, idx, src, row_ptr = _together(gradients)
        expect("src", src, ("N", d), FLOATS, p, any_stride=True)
        known = gradients[0].inverse if len(gradients) == 1 else None
        pairs = segments(coef, idx, src, known or inverse_index(idx, n_rows, row_ptr), row_ptr)
        src_strides = src.stride()
    return rows, (dense, *pairs, d, *dense_strides, *src_strides), row_config(d, project)


def _together(gradients: "list[RowGradient]") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Several gradients as one: their pairs and their tokens in a row."""
    if len(gradients) == 1:
        return gradients[0][:4]
    ends: list[Tensor] = []
    n_pairs = 0
    for _, idx, src, row_ptr, _ in gradients:
        if row_ptr is None:
            row_ptr = torch.arange(len(src) + 1, device=idx.device) * idx.shape[1]
        ends.append(row_ptr[1 if ends else 0 :] + n_pairs)
        n_pairs += idx.numel()
    coef = torch.cat([g.coef.reshape(-1) for g in gradients])
    idx = torch.cat([g.idx.reshape(-1) for g in gradients])
    return coef, idx, torch.cat([g.src for g in gradients]), torch.cat(ends)


def expect_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {t.stride()}")


def row_config(d: int, project: bool) -> dict[str, Any]:
    """With project a program has a row, else a slice of at most 1024."""
    log2_d = max((d - 1).bit_length(), 5)
    log2_d = log2_d if project else min(log2_d, 10)
    num_warps = min(max(1 << log2_d >> 8, 1), 16)
    wide = (1 << log2_d) // (32 * num_warps) > 8
    return {
        "PROJECT": project,
        "LOG2_D": log2_d,
        "CHUNK": CHUNK,
        "UNROLL": 1 if wide else 4,
        **OPTIONS,
        "num_warps": num_warps,
    }


FORMS = (  # name, dense, src, ragged, D, project
    ("dense", "fp32", None, False, 16384, False),
    ("both", "bf16", "fp32", False, 1024, False),
    ("ragged", "fp32", "fp32", True, 999, False),
    ("768-project", None, "fp32", False, 768, True),
    ("4096-project", "fp32", "fp32", False, 4096, True),
    ("8192-project", None, "bf16", False, 8192, True),
    ("16384-project", None, "fp32", False, 16384, True),
    ("ragged-project", "fp32", "fp32", True, 999, True),
)


def inputs_signature(dense: str | None, src: str | None, ragged: bool) -> str:
    """What `row_inputs` gives the kernels, as triton.tools.compile has it."""
    i32, one = ("i32", "i32") if ragged else ("i32:16", "1")
    dense_words = f"*{dense}:16" if dense else "None"
    pairs = f"*i64:16, *i32:16, *i32:16, *fp32:16, *{src}:16, *fp32:16"
    strides = f"{i32}, {one}" if dense else "i32:16, i32:16"
    src_strides = f"{i32}, {one}" if src else "i32:16, i32:16"
    words = dense_words, pairs if src else ", ".join(["None"] * 6), i32, strides, src_strides
    return ", ".join(words)


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name; ragged: no size or stride is a multiple of 16, or 1."""
    found = {}
    for p in ("fp32", "bf16", "fp16"):
        for name, dense, src, ragged, d, project in FORMS[:: 4 if p == "fp16" else 1]:
            found[f"square-{p}-{name}"] = Variant(
                _square_kernel,
                f"*{p}:16, *fp32:16, {inputs_signature(dense, src, ragged)}",
                row_config(d, project),
            )
    return found


def gradient_cost(n_tokens: int, d: int, n_pairs: int, width: int) -> Cost:
    """Of all rows, in slices of src (fp32) of this width: all of d with project."""
    rows, ids = n_pairs * d * 4, n_pairs * 12 * triton.cdiv(d, width)
    sliced = n_tokens * width * 4 <= SLICE_BYTES
    once = n_tokens * d * 4 if sliced else rows
    return Cost(2 * n_pairs * d, rows + ids, once + ids)
