"""What is done to the rows of a unit-norm decoder around an optimiser's step.

    project_rows_    g[f] -= <g[f], r[f]> r[f] / ‖r[f]‖², where r[f] is not all zeros
    normalize_rows_  r[f] /= ‖r[f]‖, where r[f] is not all zeros

Shapes   g and r (F, D). F or D may be 0.
Dtypes   fp32, bf16 or fp16, each on its own. All arithmetic is fp32.
Strides  any row stride, unit inner stride.

Order    Bits do not depend on the grid, warps, alignment or target. A row has 256 lanes: lane j
         starts from 0 and takes d = j, j + 256, … ascending by fused multiply-adds; neighbouring
         lanes are added in pairs, eight times. Rows are first scaled by the power of two that
         brings the largest |element| to [1, 2), so no square overflows or vanishes, and scaled
         back, which is exact. Roots and quotients are rounded right. No atomics.
Bytes    A row is read from memory once and written once; in between it is found in L1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from fastsae.kernels.checks import FLOATS, OPTIONS, Cost, Variant, expect
from fastsae.kernels.sums import add_neighbours, scale_to_one


@triton.jit
def _scales(row_ptr, D, LANES: tl.constexpr):
    """The power of two that brings the row's largest |element| near 1, and its inverse."""
    largest = tl.zeros([LANES], tl.float32)
    for d0 in range(0, D, LANES):
        d = d0 + tl.arange(0, LANES)
        row = tl.load(row_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(row))
    return scale_to_one(tl.max(largest, axis=0))


@triton.jit
def _project_kernel(
    g_ptr,  # (in, out) (F, D) any of FLOATS
    r_ptr,  # (F, D) any of FLOATS
    D,
    stride_g,
    stride_r,
    LOG2_LANES: tl.constexpr,
):
    LANES: tl.constexpr = 1 << LOG2_LANES
    f = tl.program_id(0).to(tl.int64)
    g_ptr += f * stride_g
    r_ptr += f * stride_r
    g_scale, g_inverse = _scales(g_ptr, D, LANES)
    r_scale, _ = _scales(r_ptr, D, LANES)
    along = tl.zeros([LANES], tl.float32)
    square = tl.zeros([LANES], tl.float32)
    for d0 in range(0, D, LANES):
        d = d0 + tl.arange(0, LANES)
        g = tl.load(g_ptr + d, mask=d < D, other=0.0).to(tl.float32) * g_scale
        r = tl.load(r_ptr + d, mask=d < D, other=0.0).to(tl.float32) * r_scale
        along = tl.fma(g, r, along)
        square = tl.fma(r, r, square)
    total = tl.sum(add_neighbours(square[None, :], LOG2_LANES), 0)
    if total > 0:
        product = tl.sum(add_neighbours(along[None, :], LOG2_LANES), 0)
        coef = tl.div_rn(product, total) * g_inverse
        for d0 in range(0, D, LANES):
            d = d0 + tl.arange(0, LANES)
            g = tl.load(g_ptr + d, mask=d < D, other=0.0).to(tl.float32)
            r = tl.load(r_ptr + d, mask=d < D, other=0.0).to(tl.float32) * r_scale
            g = tl.fma(r, -coef, g)
            tl.store(g_ptr + d, g.to(g_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _normalize_kernel(
    r_ptr,  # (in, out) (F, D) any of FLOATS
    D,
    stride_r,
    LOG2_LANES: tl.constexpr,
):
    LANES: tl.constexpr = 1 << LOG2_LANES
    r_ptr += tl.program_id(0).to(tl.int64) * stride_r
    scale, _ = _scales(r_ptr, D, LANES)
    square = tl.zeros([LANES], tl.float32)
    for d0 in range(0, D, LANES):
        d = d0 + tl.arange(0, LANES)
        r = tl.load(r_ptr + d, mask=d < D, other=0.0).to(tl.float32) * scale
        square = tl.fma(r, r, square)
    total = tl.sum(add_neighbours(square[None, :], LOG2_LANES), 0)
    if total > 0:
        norm = tl.sqrt_rn(total)
        for d0 in range(0, D, LANES):
            d = d0 + tl.arange(0, LANES)
            r = tl.load(r_ptr + d, mask=d < D, other=0.0).to(tl.float32) * scale
            tl.store(r_ptr + d, tl.div_rn(r, norm).to(r_ptr.dtype.element_ty), mask=d < D)


def project_rows_(grad: Tensor, W_dec: Tensor) -> None:
    """grad (F, D) loses its part along W_dec (F, D), row by row; written over."""
    expect("W_dec", W_dec, ("F", "D"), FLOATS, W_dec)
    _expect_rows("grad", grad, tuple(W_dec.shape), W_dec)
    if grad.numel():
        strides = grad.stride(0), W_dec.stride(0)
        with torch.cuda.device_of(grad):
            _project_kernel[len(grad),](grad, W_dec, grad.shape[1], *strides, **LANES_CONFIG)
    increment_version(grad)


def normalize_rows_(W_dec: Tensor) -> None:
    """Every row of W_dec (F, D) gets norm 1; written over."""
    _expect_rows("W_dec", W_dec, ("F", "D"), W_dec)
    if W_dec.numel():
        with torch.cuda.device_of(W_dec):
            sizes = W_dec.shape[1], W_dec.stride(0)
            _normalize_kernel[len(W_dec),](W_dec, *sizes, **LANES_CONFIG)
    increment_version(W_dec)


def _expect_rows(name: str, rows: Tensor, shape: tuple[int | str, ...], beside: Tensor) -> None:
    expect(name, rows, shape, FLOATS, beside)
    if len(rows) > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"{name}: expected rows that do not overlap, got strides {rows.stride()}")


LANES_CONFIG = {"LOG2_LANES": 8, **OPTIONS}


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name; ragged: no size or stride is a multiple of 16."""
    found = {}
    for w in ("fp32", "bf16", "fp16"):
        for ragged, i32 in (("", "i32:16"), ("-ragged", "i32")):
            for out in sorted({w, "fp32"}):
                found[f"project-{out}-{w}{ragged}"] = Variant(
                    _project_kernel, f"*{out}:16, *{w}:16, {i32}, {i32}, {i32}", LANES_CONFIG
                )
            found[f"normalize-{w}{ragged}"] = Variant(
                _normalize_kernel, f"*{w}:16, {i32}, {i32}", LANES_CONFIG
            )
    return found


def unit_rows_cost(n_rows: int, d: int, itemsize: int) -> dict[str, Cost]:
    """A gradient of the rows' own itemsize."""
    row = n_rows * d * itemsize
    return {
        "project": Cost(6 * n_rows * d, 3 * row, 3 * row),
        "normalize": Cost(3 * n_rows * d, 2 * row, 2 * row),
    }
