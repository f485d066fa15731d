"""Sums in an order of our own, on one device: of a vector, and of neighbours inside a kernel.

    vector_sum  out = Σ_i x[i]

Shapes   x (R), out (1). R may be 0.      Dtypes  fp32.

Order    x is cut into parts of PART = 16384. A part has 1024 lanes: lane j adds x[j], x[j + 1024],
         … ascending, starting from 0; then neighbouring lanes are added in pairs, ten times. The
         parts' sums are summed likewise. No atomics.

Bytes    x is read once; no host synchronisation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import OPTIONS, Cost, Variant

PART = 16384


@triton.jit
def add_neighbours(x, LOG2: tl.constexpr):
    """The sums (ROWS) of a matrix [ROWS, 2^LOG2], neighbours added in pairs, LOG2 times."""
    # A sum of two has one order in every layout; a sum of more has the layout's.
    ROWS: tl.constexpr = x.shape[0]
    for level in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, [ROWS, (1 << LOG2) >> (level + 1), 2]), axis=2)
    return tl.reshape(x, [ROWS])


@triton.jit
def scale_to_one(largest):
    """The power of two that brings `largest` near 1, so that no square overflows or vanishes, and
    its inverse."""
    # By the bits of the exponent. Clamped, so that both are normal numbers.
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(254 - exponent, 1), 253)
    scale, inverse = exponent << 23, (254 - exponent) << 23
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _vector_sum_kernel(
    x_ptr,  # (R) fp32
    out_ptr,  # (out) (parts) fp32
    R,
    PART: tl.constexpr,
    LOG2_LANES: tl.constexpr,
):
    LANES: tl.constexpr = 1 << LOG2_LANES
    part = tl.program_id(0).to(tl.int64)
    end = tl.minimum((part + 1) * PART, R)
    lanes = tl.zeros([1, LANES], tl.float32)
    for i0 in range(part * PART, end, LANES):
        i = i0 + tl.arange(0, LANES)[None, :]
        lanes += tl.load(x_ptr + i, mask=i < end, other=0.0)
    tl.store(out_ptr + part + tl.arange(0, 1), add_neighbours(lanes, LOG2_LANES))


def vector_sum(x: Tensor) -> Tensor:
    """Σ x (1), of a contiguous vector."""
    while True:
        n_parts = max(triton.cdiv(len(x), PART), 1)
        out = torch.empty(n_parts, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _vector_sum_kernel[n_parts,](x, out, len(x), **CONFIG)
        if n_parts == 1:
            return out
        x = out


CONFIG = {"PART": PART, "LOG2_LANES": 10, **OPTIONS, "num_warps": 4}


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name."""
    return {"vector": Variant(_vector_sum_kernel, "*fp32, *fp32:16, i32", CONFIG)}


def vector_sum_cost(n: int) -> Cost:
    return Cost(n, 4 * n, 4 * n)
