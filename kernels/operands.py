"""Operands: checked tokens and latents, and bounds of what the screen errs in their products.

    |t + b[i] - h[n, i]| ≤ m[n, i] = x_bound[n]·W_bound[i] + 2⁻²¹·|b[i]|

h is the pre-activation in the fixed order of kernels/dot.py, t what the screen makes of its
product: in bf16 where W_enc is bf16, in tf32 or ieee fp32 otherwise. kernels/encode.py says why m
bounds the difference.

Shapes   x (N, D), W_enc (F, D), b_enc (F), x_bound (N), W_bound (F).
Dtypes   x, W_enc, b_enc fp32, bf16 or fp16, each on its own; bounds fp32.
Not finite  The bound of a row that is not is NaN.
Bytes    x and W_enc once, for their norms.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.kernels.checks import FLOATS, Cost, expect, has_tf32
from fastsae.kernels.norms import norms


class Operands(NamedTuple):
    """Tokens and latents as the kernels take them."""

    x: Tensor  # (N, D) unit inner stride
    W: Tensor  # (F, D)
    b: Tensor | None  # (F)
    seen: Tensor  # (N, D) what the screen multiplies of x
    x_bound: Tensor  # (N) fp32
    W_bound: Tensor  # (F) fp32
    bad: Tensor  # (1) int32: 1 where a number of x, W or b is not finite
    multiply: str  # "bf16", "tf32" or "ieee"

    def aligned(self) -> bool:
        return aligned(self.x.shape[1], self.seen.stride(0), self.W.stride(0))


def check_inputs(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, precision: str) -> None:
    expect("W_enc", W_enc, ("F", "D"), FLOATS, W_enc)
    expect("x", x, ("N", W_enc.shape[1]), FLOATS, W_enc, any_stride=True)
    if b_enc is not None:
        expect("b_enc", b_enc, (len(W_enc),), FLOATS, W_enc)
    if precision not in ("screened", "fp32", "bf16"):
        raise ValueError(f"precision: expected screened, fp32 or bf16, got {precision!r}")


def rounded_inputs(x: Tensor, W_enc: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Checked x and W_enc as their exact product is taken of them; x with unit inner stride."""
    if precision == "bf16":
        x, W_enc = x.bfloat16(), W_enc.bfloat16()
    return unit_stride(x), W_enc


def operands(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, precision: str) -> Operands:
    """Of checked inputs; call it under their device."""
    x, W_enc = rounded_inputs(x, W_enc, precision)
    multiply = multiplied_in(x, precision, W_enc)
    seen, x_bound, W_bound = screened(x, W_enc, None, multiply)
    bad = x_bound.isnan().any() | W_bound.isnan().any()
    if b_enc is not None:
        bad |= ~b_enc.isfinite().all()
    return Operands(x, W_enc, b_enc, seen, x_bound, W_bound, bad.int().view(1), multiply)


def multiplied_in(x: Tensor, precision: str, *weights: Tensor | None) -> str:
    """What the screen multiplies in."""
    if {W.dtype for W in weights if W is not None} == {torch.bfloat16}:
        return "bf16"
    return "ieee" if precision == "fp32" or not has_tf32(x) else "tf32"


def screened(
    rows: Tensor, W: Tensor, latents: Tensor | None, multiply: str
) -> tuple[Tensor, Tensor, Tensor]:
    """rows as the screen multiplies them, their bounds, and those of the latents of W."""
    d = rows.shape[1]
    W_bound, _ = norms(W, latents)
    rounded = rows.bfloat16() if multiply == "bf16" and rows.dtype != torch.bfloat16 else None
    norm, lost = norms(rows, None, rounded)
    slope = (5 * d / 8 + 64 + d / 64 + 8) * 2.0**-23 + (2.0**-9 if multiply == "tf32" else 0)
    bound = (norm * slope + (0 if lost is None else lost)) * (1 + 2.0**-10)
    return rows if rounded is None else rounded, bound, W_bound


def unit_stride(t: Tensor) -> Tensor:
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def aligned(*sizes: int) -> bool:
    return all(size % 16 == 0 for size in sizes)


def norms_cost(n: int, d: int, f: int, itemsize: int) -> Cost:
    """Of x (n, d) fp32 and f latents of itemsize."""
    rows = f * d * itemsize + n * d * (4 if itemsize == 4 else 6)
    return Cost(3 * (n + f) * d, rows, rows)
