"""How Adam keeps its moments: float32, bfloat16, or int8 codes of blocks; in plain torch.

What is narrower than the arithmetic is rounded up or down at random, by how near both are, so that
changes far below the spacing are not lost on average: v changes by 1/1000 of itself a step, and
bfloat16 numbers are 1/256 to 1/128 apart. Rounding to the nearest would hold v for ever, and would
lose a step of a bfloat16 parameter below 1/512 of it. Numbers for that are Philox4x32-7 (Salmon et
al. 2011) with key step and counter (⌊column/2⌋, row), so they depend on nothing else.

Codes. A block is up to 256 columns of one row, so rows stay independent, and its scale a float32:

    m = sign(q) q² / 127² · s    q in -127 … 127 (int8),  s = max |m| of the block
    √v =       c² / 255² · s    c in 0 … 255 (uint8),    s = max √v of the block

With t = |m| / max |m| neighbours are 2√t/127 of the largest apart, so an entry 100 times below it
is known to 16 %, where evenly spaced codes would know it to 80 %; √v to 8 %, and down to 1/65025 of
the largest. Columns of activations differ by such factors. m is rounded so that its mean is right,
v so that the mean of v is. A v above 0 has at least code 1, and decodes to at least 2⁻¹²⁶: it is
divided by. There an entry is too large, and its update m/√v too small, not too large. As m is known
to s/127² near 0, the random part of an update is at most 255²/127² = 4 max|m| / max√v of lr.

A block where all decays alike keeps its codes, and only its scale decays. Otherwise rounding makes
a v walk: by the variance of one step, 1/1000 of a spacing r at most, over the 1000 steps that v
forgets in, to a deviation of about √(r/2) of √v, as for bfloat16 (r = 1/180: 5 %): 6 % at the
block's largest, 20 % 100 times below it. Updates err by as much, with mean near 0.

Infinite moments count as the largest finite ones; a NaN makes its block NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

State = Literal["float32", "bfloat16", "int8"]
STATES = ("float32", "bfloat16", "int8")
BLOCK = 256
"""Columns of a row that share a scale."""
Scales = tuple[Tensor | None, Tensor | None]
"""Of m and of v (rows, ⌈D / BLOCK⌉) float32, where they are codes."""

_SMALLEST = 2.0**-126
_LARGEST = torch.finfo(torch.float32).max
_LARGEST_ROOT = 1.8446742974197924e19


def n_blocks(width: int) -> int:
    """Blocks of a row."""
    return -(-width // BLOCK)


def n_bytes(state: State, rows: int, width: int, wide: int = 4) -> int:
    """Bytes of one moment of a matrix; wide: of an element of the parameter's arithmetic."""
    if state == "int8":
        return rows * (width + 4 * n_blocks(width))
    return rows * width * (2 if state == "bfloat16" else wide)


def random_words(step: int, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """For each of some rows (int64) and column a word of 32 bits, in int64: (rows, width) twice.

    The first is of the moments (its low half of m, its high half of v), the second of the
    parameter.
    """
    mask = 0xFFFFFFFF
    halves = torch.arange(-(-width // 2), device=rows.device)
    c0, c1 = (t.contiguous() for t in torch.broadcast_tensors(halves, rows[:, None] & mask))
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = step & mask, 0
    for _ in range(7):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap to signed numbers with the same bits
        c0, c2 = (b >> 32) & mask ^ c1 ^ k0, (a >> 32) & mask ^ c3 ^ k1
        c1, c3 = b & mask, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    pairs = (torch.stack(two, 2).flatten(1)[:, :width] for two in ((c0, c1), (c2, c3)))
    of_moments, of_parameter = pairs
    return of_moments, of_parameter


def round_to(x: Tensor, dtype: torch.dtype, words: Tensor | None) -> Tensor:
    """x in a dtype; to bfloat16 at random by the low 16 bits of words, where there are some."""
    if dtype != torch.bfloat16 or words is None:
        return x.to(dtype)
    bits = x.float().view(torch.int32).long() + (words & 0xFFFF)  # a carry makes the exponent's
    rounded = (bits.to(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return rounded.where(x == x, torch.nan)


def root(x: Tensor) -> Tensor:
    """√x, correctly rounded, as torch's is not for float32 on every CPU."""
    return x.double().sqrt().to(x.dtype)


def read(t: Tensor, scale: Tensor | None) -> Tensor:
    """Rows of a moment (rows, D) in the dtype of the arithmetic."""
    if scale is None:
        return t.to(torch.promote_types(t.dtype, torch.float32))
    code = t.float()
    scale = scale.repeat_interleave(BLOCK, 1)[:, : t.shape[1]]
    if t.dtype == torch.int8:
        return code * code.abs() / (127 * 127) * scale
    r = code * code / (255 * 255) * scale
    return r.square().clamp(min=_SMALLEST).where((code > 0) | r.isnan(), r)


def write(x: Tensor, like: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows of a moment in the dtype of `like`, and their scales where those are codes."""
    if like.dtype not in (torch.int8, torch.uint8):
        return round_to(x, like.dtype, words), None
    assert words is not None
    signed = like.dtype == torch.int8
    size = x.abs().clamp(max=_LARGEST) if signed else root(x).clamp(max=_LARGEST_ROOT)
    width = x.shape[1]
    size = torch.nn.functional.pad(size, (0, -width % BLOCK)).view(len(x), -1, BLOCK)
    scale = size.amax(2)
    y = (size / scale[..., None] * ((127 if signed else 255) ** 2)).flatten(1)[:, :width]
    y = y.nan_to_num(nan=0.0)  # 0 / 0
    code = root(y).floor()
    low, gap = code * code, 2 * code + 1
    chance = ((words & 0xFFFF).float() + 0.5) * 2.0**-16
    if signed:
        code += chance * gap < y - low
        code = torch.where(x < 0, -code, code)
    else:
        code += chance * (gap * (low + low + gap)) < (y - low) * (y + low)
        code = code.clamp(min=1).where(y > 0, code)
    return code.to(like.dtype), scale
