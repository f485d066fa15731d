"""Tile: one of a screen's tensor-core product, a program's part of it.

    t = a bᵀ        a (R, D), b (C, D)

Order    GROUP row tiles share column tiles in L2. The sums are the tensor cores': t is screened by
         bounds (kernels/operands.py), and never a result.
Sizes    Two small tiles share an SM, so that the end of one hides behind the other's products.
         Where rows are long there is little to hide, and a wide tile, for which an MI300 has too
         little shared memory, reads a third less from L2. Unaligned rows need registers for
         addresses, sums of products of fp32 for factors.
Bytes    A tile's rows of a and of b through L2: `product_cost`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastsae.kernels.checks import Cost


@triton.jit
def tile_at(pid, R, n_tiles, BM: tl.constexpr, GROUP: tl.constexpr):
    """The row tile and the column tile of a program; GROUP row tiles share column tiles in L2."""
    first = pid // (GROUP * n_tiles) * GROUP
    group = min(tl.cdiv(R, BM) - first, GROUP)
    return first + pid % (GROUP * n_tiles) % group, pid % (GROUP * n_tiles) // group


@triton.jit
def products(
    a_ptr, row, in_rows, stride_a, b_ptr, column, there, stride_b, D,
    MULTIPLY: tl.constexpr,  # what of: "bf16", "tf32" or "ieee"
    UPCAST: tl.constexpr,  # the interpreter multiplies the bits of bf16 numbers
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(BM, BN): rows `row` of a times rows `column` of b, 0 for rows that are not there."""
    d = tl.arange(0, BK)
    a_ptrs = a_ptr + row.to(tl.int64)[:, None] * stride_a + d[None, :]
    b_ptrs = b_ptr + column.to(tl.int64)[:, None] * stride_b + d[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for d0 in range(0, D, BK):
        in_row = d[None, :] < D - d0
        a = tl.load(a_ptrs + d0, mask=in_row & in_rows[:, None], other=0.0)
        b = tl.load(b_ptrs + d0, mask=in_row & there[:, None], other=0.0)
        if MULTIPLY != "bf16" or UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="tf32" if MULTIPLY == "tf32" else "ieee")
    return acc


WIDE_FROM = 1024  # elements of a row


def is_long(d: int) -> bool:
    return d >= WIDE_FROM and torch.version.hip is None


def tile_config(
    multiply: str, d: int, aligned: bool, large: bool = True, wide: bool = True
) -> dict[str, Any]:
    """large, wide: where what a kernel does with its tile leaves registers for that."""
    plain = aligned and multiply != "ieee"
    return {
        "MULTIPLY": multiply,
        "UPCAST": triton.knobs.runtime.interpret,
        "BM": 128 if plain and large else 64,
        "BN": 256 if plain and wide and is_long(d) else 128,
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
