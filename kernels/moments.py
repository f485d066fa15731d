"""How moments and bf16 numbers are stored: rounding at random, and codes of blocks.

Helpers of adam.py, which interpret `fastsae.moments` to the bit: codes are int8 (m) and uint8 (v)
with an fp32 scale for each BLOCK columns of a row, and a tile begins where a block does.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import expect
from fastsae.kernels.gradients import STATE_DTYPES, expect_contiguous

if TYPE_CHECKING:
    from fastsae.moments import Scales

BLOCK = tl.constexpr(256)
M_UNIT = tl.constexpr(127.0 * 127.0)
V_UNIT = tl.constexpr(255.0 * 255.0)
SMALLEST = tl.constexpr(2.0**-126)
LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_ROOT = tl.constexpr(1.8446742974197924e19)


@triton.jit
def random_words(step, half, row, N: tl.constexpr):
    """For N columns, from 2·half[0] on, a word of the moments and one of the parameter."""
    even_mv, odd_mv, even_p, odd_p = tl.philox(step, half, row, 0, 0, 7)  # four for two columns
    of_moments = tl.reshape(tl.join(even_mv, odd_mv), [N])
    return of_moments, tl.reshape(tl.join(even_p, odd_p), [N])


@triton.jit
def store_rounded(ptrs, x, mask, random, STOCHASTIC: tl.constexpr):
    if ptrs.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            bits += random & 0xFFFF
        else:
            bits += 0x7FFF + ((bits >> 16) & 1)
        # A NaN's bits could run over.
        bits = tl.where(x == x, bits >> 16, 0x7FC0)
        x = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(ptrs, x, mask=mask)


@triton.jit
def load_moment(ptrs, scale_ptr, f, d, D, mask):
    x = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + f * tl.cdiv(D, BLOCK) + d // BLOCK, mask=mask, other=0.0)
        if ptrs.dtype.element_ty == tl.int8:
            x = tl.div_rn(x * tl.abs(x), x * 0 + M_UNIT) * scale
        else:
            root = tl.div_rn(x * x, x * 0 + V_UNIT) * scale
            v = root * root
            x = tl.where((v < SMALLEST) & (x > 0), SMALLEST, v)
    return x


@triton.jit
def store_moment(
    ptrs, scale_ptr, x, f, d, D, mask, random, STOCHASTIC: tl.constexpr, LOG2_D: tl.constexpr
):
    if scale_ptr is None:
        store_rounded(ptrs, x, mask, random, STOCHASTIC)
    else:
        tl.debug_barrier()  # a warp would write a scale that another has still to read
        SIGNED: tl.constexpr = ptrs.dtype.element_ty == tl.int8
        size = tl.abs(x) if SIGNED else tl.sqrt_rn(x)
        size = tl.where(mask, size, 0.0)
        most = LARGEST if SIGNED else LARGEST_ROOT
        size = tl.where(size > most, most, size)  # a NaN stays
        scale, block = _block_maximum(size, d, LOG2_D)
        tl.store(scale_ptr + f * tl.cdiv(D, BLOCK) + block, scale, mask=block * BLOCK < D)
        of_each = tl.broadcast_to(scale[:, None], [scale.shape[0], (1 << LOG2_D) // scale.shape[0]])
        of_each = tl.reshape(of_each, [1 << LOG2_D])
        y = tl.div_rn(size, tl.where(of_each == 0, 1.0, of_each)) * (M_UNIT if SIGNED else V_UNIT)
        y = tl.where(y == y, y, 0.0)
        code = tl.floor(tl.sqrt_rn(y))
        low, gap = code * code, 2 * code + 1
        chance = ((random & 0xFFFF).to(tl.float32) + 0.5) * (1.0 / 65536)
        if SIGNED:
            code = tl.where(chance * gap < y - low, code + 1, code)
            code = tl.where(x < 0, -code, code)
        else:
            code = tl.where(
                chance * (gap * (low + low + gap)) < (y - low) * (y + low), code + 1, code
            )
            code = tl.where((code < 1) & (y > 0), 1.0, code)
        tl.store(ptrs, code.to(tl.int32).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _block_maximum(size, d, LOG2_D: tl.constexpr):
    """The largest number of each block of a tile, NaN where it has one, and the blocks' numbers."""
    LOG2_N: tl.constexpr = LOG2_D - 8 if LOG2_D > 8 else 0
    blocks = tl.reshape(size, [1 << LOG2_N, 1 << LOG2_D - LOG2_N])
    has_nan = tl.max((blocks != blocks).to(tl.int32), axis=1) > 0
    found = tl.where(has_nan, float("nan"), tl.max(blocks, axis=1))
    return found, tl.min(d, axis=0) // BLOCK + tl.arange(0, 1 << LOG2_N)


def check_moments(p: Tensor, m: Tensor | None, v: Tensor, scales: "Scales") -> None:
    """TypeError, ValueError: not moments of p; m and v are codes, with scales, or neither is."""
    coded = v.dtype == torch.uint8
    for name, t, scale, code in zip("mv", (m, v), scales, (torch.int8, torch.uint8), strict=True):
        if t is not None:
            expect(name, t, tuple(p.shape), (code,) if coded else STATE_DTYPES, p)
            expect_contiguous(name, t)
        if (scale is None) == (coded and t is not None):
            wanted, got = ("a tensor", "None") if scale is None else ("None", "a tensor")
            raise ValueError(f"{name}_scale: expected {wanted} with v of {v.dtype}, got {got}")
        if t is not None and scale is not None:
            blocks = triton.cdiv(p.shape[-1], BLOCK.value)
            expect(f"{name}_scale", scale, (p.numel() // p.shape[-1], blocks), (torch.float32,), p)
            expect_contiguous(f"{name}_scale", scale)
