"""Norms of rows, from which kernels/encode.py bounds what its screen may err.

    norms[r] ≥ ‖row‖, and lost[r] ≥ ‖row - screened‖, closely

Shapes   rows and screened (R, D), or rows (F, D) and latents (R), which to take; norms, lost (R).
Dtypes   rows and screened fp32, bf16 or fp16; norms, lost fp32.
Range    Squares are of the row divided by its largest magnitude, so they neither overflow nor
         vanish. A row of zeros has norm 0; any other one gets 2⁻⁴⁰ more, for what flushed denormals
         may do to products. A row that is not finite has norm NaN.
Order    The sum's is the compiler's: a bound is never a result.
Bytes    Each row once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Variant


@triton.jit
def _norms_kernel(
    rows_ptr,  # (R, D) float
    screened_ptr,  # (R, D) what the screen sees of them, or None
    latents_ptr,  # (R) int32: which rows, or None for all
    norms_ptr,  # (out) (R) fp32 ‖row‖ rounded up, NaN where the row is not finite
    lost_ptr,  # (out) (R) fp32 ‖row - screened‖ rounded up; None without screened
    D,
    stride_rows,
    stride_screened,
    HAS_LATENTS: tl.constexpr,
    HAS_SCREENED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    source = r
    if HAS_LATENTS:
        source = tl.load(latents_ptr + r).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + source * stride_rows + d, mask=d < D, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(row), 0)
    scale = tl.where(largest > 0, largest, 1.0)  # squares must neither overflow nor vanish
    norm = scale * tl.sqrt(tl.sum((row / scale) * (row / scale), 0)) * (1 + 2.0**-10)
    # Denormal inputs and products may be flushed; a row of zeros has no error.
    norm = tl.where(largest > 0, norm + 2.0**-40, 0.0)
    # Whether max returns a NaN is up to the target, so ask the row.
    finite = tl.min((tl.abs(row) < float("inf")).to(tl.int32), 0) == 1
    tl.store(norms_ptr + r, tl.where(finite, norm, float("nan")))
    if HAS_SCREENED:
        screened = tl.load(screened_ptr + r * stride_screened + d, mask=d < D, other=0.0)
        lost = tl.abs(row - screened.to(tl.float32)) / scale
        lost = scale * tl.sqrt(tl.sum(lost * lost, 0)) * (1 + 2.0**-10)
        tl.store(lost_ptr + r, tl.where(largest > 0, lost, 0.0))


def norms(
    rows: Tensor, latents: Tensor | None = None, screened: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """norms, and lost where there is `screened`."""
    n, d = len(rows) if latents is None else len(latents), rows.shape[1]
    out = torch.empty(n, dtype=torch.float32, device=rows.device)
    lost = None if screened is None else torch.empty_like(out)
    strides = rows.stride(0), 0 if screened is None else screened.stride(0)
    config = norms_config(d, latents is not None, screened is not None)
    if n:
        _norms_kernel[(n,)](rows, screened, latents, out, lost, d, *strides, **config)
    return out, lost


def norms_config(d: int, has_latents: bool, has_screened: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(max(d, 16))
    return {
        "HAS_LATENTS": has_latents,
        "HAS_SCREENED": has_screened,
        "BLOCK_D": block,
        "num_warps": min(16, max(1, block // 1024)),
    }


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name, at the widths that a program holds in one block."""
    found = {}
    for d in (768, 4096, 16384):
        for of, rows in (("W", "bf16"), ("W", "fp32"), ("latents", "bf16"), ("x", "fp32")):
            latents = "*i32:16" if of == "latents" else "None"
            screened, lost = ("*bf16:16", "*fp32:16") if of == "x" else ("None", "None")
            found[f"norms-{of}-{rows}-{d}"] = Variant(
                _norms_kernel,
                f"*{rows}:16, {screened}, {latents}, *fp32:16, {lost}, i32:16, i32:16, i32:16",
                norms_config(d, of == "latents", of == "x"),
            )
    return found
