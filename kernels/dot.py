"""Dot: the fixed-order dot product, of which every value that is emitted is one.

    h = Σ_d a[row, d] · b[column, d] + bias[column]

Order    That of csrc/simd.h, so that all backends emit the same bits: 64 running sums, product and
         sum rounded apart, then halves added to halves, then the bias.
Options  enable_fp_fusion=False, which keeps the two roundings apart.
"""

import triton
import triton.language as tl


@triton.jit
def dots(
    a_ptr, b_ptr, bias_ptr, a_row, b_row, D, stride_a, stride_b,
    HAS_BIAS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """h (C) of C rows of a and of b, or of one row (1) with all; of no meaning for row -1."""
    lane = tl.arange(0, 64)
    a_rows = (a_ptr + a_row.to(tl.int64) * stride_a)[:, None]
    b_rows = (b_ptr + b_row.to(tl.int64) * stride_b)[:, None]
    there = ((a_row >= 0) & (b_row >= 0))[:, None]
    sums = tl.zeros([C, 64], tl.float32)
    for d0 in range(0, D, 64):
        d = (d0 + lane)[None, :]
        mask = there & (d < D)
        a_mask = d < D if a_row.shape[0] == 1 else mask
        b_mask = d < D if b_row.shape[0] == 1 else mask
        a = tl.load(a_rows + d, mask=a_mask, other=0.0).to(tl.float32)
        b = tl.load(b_rows + d, mask=b_mask, other=0.0).to(tl.float32)
        sums += a * b
    for level in tl.static_range(6):
        sums = tl.sum(tl.reshape(sums, [C, 2, 32 >> level]), axis=1)
    h = tl.reshape(sums, [C])
    if HAS_BIAS:
        h += tl.load(bias_ptr + b_row, mask=b_row >= 0, other=0.0).to(tl.float32)
    return h
