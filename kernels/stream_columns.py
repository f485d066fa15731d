"""Stream a latent: its exact selection from all tokens, where it has more candidates than room.

kernels/stream.py says when. One program for each latent: a histogram of all values for each digit
of the last selected one, and once more to list the selected ones; of equal values those of the
lowest tokens. Programs of latents that had room end at once.

Shapes   budgets (F) int32; counts (F), ptr (F + 1) int64; row, col (room) int32.
Not finite  `bad` becomes 1 where a value is not finite.
Order    One writer of all.
Cost     4·2·N·D FLOPs without tensor cores for each such latent: rare, and slow.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.candidates import Pairs
from fastsae.kernels.checks import Variant
from fastsae.kernels.operands import Operands
from fastsae.kernels.radix import cut
from fastsae.kernels.stream import CONFIG, score_histogram, scores, store


@triton.jit
def _digit(
    x_ptr, W_ptr, bias_ptr, bad_ptr, i, prefix, wanted, N, D, stride_x, stride_W,
    ABOVE: tl.constexpr, SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As kernels/radix.py has it, of the values of one latent."""
    hist = score_histogram(
        x_ptr, W_ptr, bias_ptr, None, bad_ptr, i, prefix, N, D, stride_x, stride_W,
        ABOVE, SHIFT, True, HAS_BIAS, False, False, C,
    )  # fmt: skip
    return cut(hist, wanted)


@triton.jit
def _latent_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    bad_ptr,  # (out) (1) int32
    budget_ptr,  # (F) int32
    counts_ptr,  # (F) int64: candidates
    ptr_ptr,  # (F + 1) int64
    row_ptr,  # (out) (ROOM) int32
    col_ptr,  # (out) (ROOM) int32
    N,
    F,
    D,
    ROOM,
    stride_x,
    stride_W,
    HAS_BIAS: tl.constexpr,
    C: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    begin = tl.load(ptr_ptr + i)
    fits = tl.load(ptr_ptr + i + 1) - begin == tl.load(counts_ptr + i)
    if (fits == 0) & (tl.load(ptr_ptr + F) <= ROOM):
        first, wanted = _digit(
            x_ptr, W_ptr, bias_ptr, bad_ptr, i, 0, tl.load(budget_ptr + i), N, D,
            stride_x, stride_W, 31, 20, HAS_BIAS, C,
        )  # fmt: skip
        second, wanted = _digit(
            x_ptr, W_ptr, bias_ptr, bad_ptr, i, first << 20, wanted, N, D,
            stride_x, stride_W, 20, 9, HAS_BIAS, C,
        )  # fmt: skip
        last = (first << 20) + (second << 9)
        third, wanted = _digit(
            x_ptr, W_ptr, bias_ptr, bad_ptr, i, last, wanted, N, D,
            stride_x, stride_W, 9, 0, HAS_BIAS, C,
        )  # fmt: skip
        last += third
        n_listed, n_equal = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
        for start in range(0, N, C):
            bits = scores(
                x_ptr, W_ptr, bias_ptr, None, bad_ptr, i, start, N, D, stride_x, stride_W,
                True, HAS_BIAS, False, False, C,
            )  # fmt: skip
            n_listed, n_equal = store(
                bits, last, n_listed, n_equal, wanted, begin, i, start, row_ptr, col_ptr, C
            )


def stream_columns(of: Operands, budgets: Tensor, pairs: Pairs, counts: Tensor) -> None:
    """Lists the budgets[i] best tokens of each latent whose room is not what it counts."""
    (n, d), f = of.x.shape, len(of.W)
    _latent_kernel[(f,)](
        *(of.x, of.W, of.b, of.bad, budgets, counts, pairs.ptr, pairs.row, pairs.col),
        *(n, f, d, len(pairs.col), of.x.stride(0), of.W.stride(0)),
        HAS_BIAS=of.b is not None,
        **CONFIG,
    )


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name."""
    found = {}
    for w in ("bf16", "fp32"):
        for bias in (False, True):
            b = "*fp32:16" if bias else "None"
            pointers = f"*fp32:16, *{w}:16, {b}, *i32:16, *i32:16"
            lists = "*i64:16, *i64:16, *i32:16, *i32:16"
            found[f"latent-{w}" + "-bias" * bias] = Variant(
                _latent_kernel,
                f"{pointers}, {lists}" + ", i32:16" * 6,
                {"HAS_BIAS": bias} | CONFIG,
            )
    return found
