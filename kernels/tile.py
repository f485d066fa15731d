"""What the selections over a batch share: checked operands and their bounds, the exact dot.

    |t + b[i] - h[n, i]| ≤ m[n, i] = x_bound[n]·W_bound[i] + 2⁻²¹·|b[i]|

h is the pre-activation in the fixed order of csrc/simd.h (`dots`), t what the screen makes of its
product: in bf16 where W_enc is bf16, in tf32 or ieee fp32 otherwise. kernels/encode.py says why m
bounds the difference.

Shapes   x (N, D), W_enc (F, D), b_enc (F), x_bound (N), W_bound (F).
Dtypes   x, W_enc, b_enc fp32, bf16 or fp16, each on its own; bounds fp32.
Order    Of `dots`: 64 running sums, product and sum rounded apart, then halves added to halves.
Bytes    x and W_enc once, for their norms.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import FLOATS, Cost, expect, has_tf32
from fastsae.kernels.norms import norms


@triton.jit
def tile_at(pid, R, n_tiles, BM: tl.constexpr, GROUP: tl.constexpr):
    """The row tile and the column tile of a program; GROUP row tiles share column tiles in L2."""
    first = pid // (GROUP * n_tiles) * GROUP
    group = min(tl.cdiv(R, BM) - first, GROUP)
    return first + pid % (GROUP * n_tiles) % group, pid % (GROUP * n_tiles) // group


@triton.jit
def dots(a_ptr, b_ptr, a_row, b_row, there, D, stride_a, stride_b, C: tl.constexpr):
    """<a[a_row], b[b_row]> of C pairs in the fixed order, with enable_fp_fusion=False."""
    lane = tl.arange(0, 64)
    a_rows = a_ptr + a_row.to(tl.int64) * stride_a
    b_rows = b_ptr + b_row.to(tl.int64) * stride_b
    sums = tl.zeros([C, 64], tl.float32)
    for d0 in range(0, D, 64):
        d = d0 + lane
        mask = there[:, None] & (d < D)[None, :]
        a = tl.load(a_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += a * b
    for level in tl.static_range(6):
        sums = tl.sum(tl.reshape(sums, [C, 2, 32 >> level]), axis=1)
    return tl.reshape(sums, [C])


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
        sizes = self.x.shape[1], self.seen.stride(0), self.W.stride(0)
        return all(size % 16 == 0 for size in sizes)


def check_inputs(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, precision: str) -> None:
    expect("W_enc", W_enc, ("F", "D"), FLOATS, W_enc)
    expect("x", x, ("N", W_enc.shape[1]), FLOATS, W_enc, any_stride=True)
    if b_enc is not None:
        expect("b_enc", b_enc, (len(W_enc),), FLOATS, W_enc)
    if precision not in ("screened", "fp32", "bf16"):
        raise ValueError(f"precision: expected screened, fp32 or bf16, got {precision!r}")


def operands(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, precision: str) -> Operands:
    """Of checked inputs; call it under their device."""
    if precision == "bf16":
        x, W_enc = x.bfloat16(), W_enc.bfloat16()
    x = x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
    multiply = "bf16" if W_enc.dtype == torch.bfloat16 else "tf32"
    if multiply == "tf32" and (precision == "fp32" or not has_tf32(x)):
        multiply = "ieee"
    d = x.shape[1]
    W_bound, _ = norms(W_enc)
    rounded = x.bfloat16() if multiply == "bf16" and x.dtype != torch.bfloat16 else None
    x_norm, lost = norms(x, None, rounded)
    slope = (5 * d / 8 + 64 + d / 64 + 8) * 2.0**-23 + (2.0**-9 if multiply == "tf32" else 0)
    x_bound = (x_norm * slope + (0 if lost is None else lost)) * (1 + 2.0**-10)
    bad = x_norm.isnan().any() | W_bound.isnan().any()
    if b_enc is not None:
        bad |= ~b_enc.isfinite().all()
    seen = x if rounded is None else rounded
    return Operands(x, W_enc, b_enc, seen, x_bound, W_bound, bad.int().view(1), multiply)


WIDE_FROM = 1024  # elements of a row


def tile_config(multiply: str, d: int, aligned: bool, may_be_wide: bool) -> dict[str, Any]:
    """Tiles as kernels/encode.py has them."""
    plain = aligned and multiply != "ieee"
    wide = may_be_wide and plain and d >= WIDE_FROM and torch.version.hip is None
    return {
        "MULTIPLY": multiply,
        "UPCAST": triton.knobs.runtime.interpret,
        "BM": 128 if plain else 64,
        "BN": 256 if wide else 128,
        "BK": (64 if multiply == "bf16" else 32) >> (not aligned),
        "GROUP": 8,
        "num_warps": 8,
        "num_stages": 3,
    }


def product_cost(
    r: int, c: int, d: int, itemsize: int, config: dict[str, Any], written: int
) -> Cost:
    """Of a screened product of r rows and c columns that writes so many bytes."""
    r_tiles, c_tiles = triton.cdiv(r, config["BM"]), triton.cdiv(c, config["BN"])
    tiles = r_tiles * c_tiles * (config["BM"] + config["BN"]) * d * itemsize
    once = (triton.cdiv(r_tiles, config["GROUP"]) * c + r) * d * itemsize
    return Cost(2 * r * c * d, tiles + written, once + written)


def norms_cost(n: int, d: int, f: int, itemsize: int) -> Cost:
    """Of x (n, d) fp32 and f latents of itemsize."""
    rows = f * d * itemsize + n * d * (4 if itemsize == 4 else 6)
    return Cost(3 * (n + f) * d, rows, rows)
