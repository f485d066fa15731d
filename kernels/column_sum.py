"""Sums of columns.

    column_sum  out[d] = Σ_r coef[r]·m[r, d], coef = 1 where it is None

Shapes   m (R, D); coef (R); out (D). Any of them may be 0.
Dtypes   out fp32; m and coef fp32, bf16 or fp16, each on its own. All arithmetic is fp32.
Strides  m: any, 0 included.

Order    Bits do not depend on the grid, the slice width, warps, alignment or target. The rows are
         cut into parts of SUMMED_ROWS = 256. A part's sum starts from 0 and takes its rows
         ascending by fused multiply-adds; the parts' sums are added, ascending, to 0. No atomics.
Bytes    m is read once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import FLOATS, OPTIONS, Cost, Variant, expect

SUMMED_ROWS = 256  # part of the result's definition


@triton.jit
def _column_sum_kernel(
    m_ptr,  # (R, D) any of FLOATS
    coef_ptr,  # (R) any of FLOATS, or None
    out_ptr,  # (out) (parts, D) fp32
    R,
    D,
    PART,  # rows of a part
    stride_m_r,
    stride_m_d,
    HAS_COEF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.minimum((part + 1) * PART, R)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for r0 in range(part * PART, end, UNROLL):
        for u in tl.static_range(UNROLL):
            r = tl.cast(r0 + u, tl.int64)
            m_ptrs = m_ptr + r * stride_m_r + d.to(tl.int64) * stride_m_d
            row = tl.load(m_ptrs, mask=d < tl.where(r < end, D, 0), other=0.0).to(tl.float32)
            if HAS_COEF:
                coef = tl.load(coef_ptr + r, mask=r < end, other=0.0).to(tl.float32)
                acc = tl.fma(row, coef, acc)
            else:
                acc += row
    tl.store(out_ptr + part * D + d, acc, mask=d < D)


def column_sum(m: Tensor, coef: Tensor | None = None) -> Tensor:
    """out (D) fp32, from m (R, D) and coef (R)."""
    expect("m", m, ("R", "D"), FLOATS, m, any_stride=True)
    if coef is not None:
        expect("coef", coef, (len(m),), FLOATS, m)
    n_parts, d = triton.cdiv(len(m), SUMMED_ROWS), m.shape[1]
    parts = torch.empty(n_parts, d, dtype=torch.float32, device=m.device)
    out = torch.empty(d, dtype=torch.float32, device=m.device)
    n_slices = triton.cdiv(d, _sum_config(False)["BLOCK_D"])
    with torch.cuda.device_of(m):
        if parts.numel():
            sizes, config = (len(m), d, SUMMED_ROWS, *m.stride()), _sum_config(coef is not None)
            _column_sum_kernel[n_parts, n_slices](m, coef, parts, *sizes, **config)
        if out.numel():
            sizes, config = (n_parts, d, n_parts, *parts.stride()), _sum_config(False)
            _column_sum_kernel[1, n_slices](parts, None, out, *sizes, **config)
    return out


def _sum_config(has_coef: bool) -> dict[str, Any]:
    return {"HAS_COEF": has_coef, "BLOCK_D": 128, "UNROLL": 16, **OPTIONS}


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name; ragged: no size or stride is a multiple of 16, or 1."""
    found = {}
    for w in ("fp32", "bf16", "fp16"):
        for ragged, i32, one in (("", "i32:16", "1"), ("-ragged", "i32", "i32")):
            for coef, pointer in (("", "None"), ("-coef", "*fp32:16")):
                found[f"column-sum-{w}{coef}{ragged}"] = Variant(
                    _column_sum_kernel,
                    f"*{w}:16, {pointer}, *fp32:16, {i32}, {i32}, {i32}, {i32}, {one}",
                    _sum_config(bool(coef)),
                )
    return found


def column_sum_cost(n_rows: int, d: int, itemsize: int) -> Cost:
    size = n_rows * d * itemsize + 8 * triton.cdiv(n_rows, SUMMED_ROWS) * d
    return Cost(2 * n_rows * d, size, size)
