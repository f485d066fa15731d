"""Pairs: a list of candidates, their exact values, and rows of the ones that are selected.

    value[p] = dot(x[token[p]], W_enc[latent[p]]) + b_enc[latent[p]]

_value_kernel  The fixed-order dot of kernels/dot.py.
_rank_kernel   A pair's place in its row by (score descending, column ascending): 64 pairs a program
               are compared with all of their rows, which costs len² for a long one, spread over
               len/64 programs.
as_rows        By torch: a stable sort by score, the first `room`, a stable sort by token.

Shapes   room: what the list holds at most, also the size of its tensors; ptr (rows + 1), counts
         (rows) int64; row, col (room) int32; value, score (room) fp32; a score of -inf is none.
Order    No atomics: (score, token, latent) is a total order, so the rows are the same everywhere.
Bytes    Of a pair D elements, those of its row once for 16 pairs: `pairs_cost`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.candidates import Pairs
from fastsae.kernels.checks import Cost, Variant
from fastsae.kernels.dot import dots
from fastsae.kernels.operands import Operands


@triton.jit
def _value_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    row_ptr,  # (ROOM) int32
    col_ptr,  # (ROOM) int32, -1: no pair
    value_ptr,  # (out) (ROOM) fp32, 0 for no pair
    D,
    ROOM,
    stride_x,
    stride_W,
    BY_LATENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    C: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    col = tl.load(col_ptr + at, mask=at < ROOM, other=-1)
    there = col >= 0
    value = tl.zeros([C], tl.float32)
    if tl.max(col, 0) >= 0:
        row = tl.load(row_ptr + at, mask=there, other=-1)
        token, latent = row, col
        if BY_LATENT:
            token, latent = col, row
        value = dots(x_ptr, W_ptr, bias_ptr, token, latent, D, stride_x, stride_W, HAS_BIAS, C)
    tl.store(value_ptr + at, tl.where(there, value, 0.0), mask=at < ROOM)


@triton.jit
def _rank_kernel(
    row_ptr,  # (ROOM) int32
    col_ptr,  # (ROOM) int32
    score_ptr,  # (ROOM) fp32
    ptr_ptr,  # (n_rows + 1) int64
    rank_ptr,  # (out) (ROOM) int32; unspecified where there is no pair
    n_rows,
    ROOM,
    BLOCK: tl.constexpr,
):
    total = tl.minimum(tl.load(ptr_ptr + n_rows), ROOM)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    if begin < total:
        i = begin + tl.arange(0, BLOCK)
        row = tl.load(row_ptr + i, mask=i < total, other=-1)[:, None]
        col = tl.load(col_ptr + i, mask=i < total, other=-1)[:, None]
        score = tl.load(score_ptr + i, mask=i < total, other=0.0)[:, None]
        first = tl.load(row_ptr + begin)
        last = tl.load(row_ptr + tl.minimum(begin + BLOCK, total) - 1)
        above = tl.zeros([BLOCK, BLOCK], tl.int32)
        rows_end = tl.minimum(tl.load(ptr_ptr + last + 1), total)
        for start in range(tl.load(ptr_ptr + first), rows_end, BLOCK):
            j = start + tl.arange(0, BLOCK)
            rival_row = tl.load(row_ptr + j, mask=j < rows_end, other=-2)[None, :]
            rival_col = tl.load(col_ptr + j, mask=j < rows_end, other=0)[None, :]
            rival = tl.load(score_ptr + j, mask=j < rows_end, other=0.0)[None, :]
            wins = (rival > score) | ((rival == score) & (rival_col < col))
            above += ((rival_row == row) & wins).to(tl.int32)
        tl.store(rank_ptr + i, tl.sum(above, 1), mask=i < total)


def values(of: Operands, pairs: Pairs, by_latent: bool) -> Tensor:
    """The fixed-order value of each pair, 0 of a hole."""
    room = len(pairs.col)
    value = torch.empty(room, dtype=torch.float32, device=pairs.col.device)
    sizes = of.x.shape[1], room, of.x.stride(0), of.W.stride(0)
    if room:
        _value_kernel[(triton.cdiv(room, VALUE_CONFIG["C"]),)](
            *(of.x, of.W, of.b, pairs.row, pairs.col, value, *sizes),
            BY_LATENT=by_latent,
            HAS_BIAS=of.b is not None,
            **VALUE_CONFIG,
        )
    return value


def ranks(pairs: Pairs, score: Tensor) -> Tensor:
    """(room) int32: the place of each pair in its row; unspecified for -inf."""
    rank = torch.zeros_like(pairs.col)
    if len(rank):
        _rank_kernel[(triton.cdiv(len(rank), RANK_CONFIG["BLOCK"]),)](
            *(*pairs[:2], score, pairs.ptr, rank, len(pairs.ptr) - 1, len(rank)), **RANK_CONFIG
        )
    return rank


def place(at: Tensor, kept: Tensor, source: Tensor, room: int, fill: float) -> Tensor:
    """out (room) with out[at] = source where kept, `fill` elsewhere."""
    out = torch.full((room + 1,), fill, dtype=source.dtype, device=source.device)
    out[at.where(kept & (at < room), room)] = source
    return out[:room]


def as_rows(
    token: Tensor, latent: Tensor, value: Tensor, score: Tensor, n_tokens: int, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """vals, idx (room) and row_ptr (N+1) of the best `room` pairs; -inf is none.

    Pairs of equal score come by token, then by latent; of one latent or token at least.
    """
    best = score.sort(descending=True, stable=True).indices[:room]
    token = token[best].where(score[best] > -torch.inf, n_tokens)
    token, order = token.sort(stable=True)
    best, kept = best[order], token < n_tokens
    bounds = torch.arange(n_tokens + 1, dtype=token.dtype, device=token.device)
    row_ptr = torch.searchsorted(token, bounds)
    row_ptr[-1] = room
    return value[best].where(kept, 0.0), latent[best].where(kept, -1), row_ptr


def no_rows(n_tokens: int, room: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Padding only."""
    none = torch.zeros(room, device=device)
    return as_rows(none.int(), none.int(), none, none - torch.inf, n_tokens, room)


def mark(
    rows: tuple[Tensor, Tensor, Tensor], value: Tensor, bad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, whose first value becomes NaN where `bad` is 1 or a value is not finite."""
    vals, idx, _ = rows
    wrong = (bad != 0) | ~value.isfinite().all()
    vals[:1] = vals[:1].where(~wrong, torch.nan)
    idx[:1] = idx[:1].where(~wrong, 0)
    return rows


# Every product is rounded before it is added.
VALUE_CONFIG = {"C": 16, "num_warps": 4, "enable_fp_fusion": False}
RANK_CONFIG = {"BLOCK": 64, "num_warps": 8}


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name."""
    found = {}
    lists = "*i32:16, *i32:16"
    for w in ("bf16", "fp32"):
        for bias in (False, True):
            for by_latent in (False, True):
                b = "*fp32:16" if bias else "None"
                found[f"value-{w}" + "-bias" * bias + "-latents" * by_latent] = Variant(
                    _value_kernel,
                    f"*fp32:16, *{w}:16, {b}, {lists}, *fp32:16" + ", i32:16" * 4,
                    {"BY_LATENT": by_latent, "HAS_BIAS": bias} | VALUE_CONFIG,
                )
    found["rank"] = Variant(
        _rank_kernel, f"{lists}, *fp32:16, *i64:16, *i32:16, i32, i32:16", RANK_CONFIG
    )
    return found


def pairs_cost(listed: int, room: int, kept: int, d: int, col: int, row: int) -> dict[str, Cost]:
    """Of a list with `listed` pairs in a room, of which some are kept; col and row: itemsizes.

    A program reads its rows once, if its pairs are of one. A stable sort reads and writes a key and
    an index of 8 bytes for each 8 bits of the key.
    """
    size = listed * (d * col + d * row // VALUE_CONFIG["C"] + 4) + 12 * room
    once = listed * (d * col + 4) + 12 * room
    ranks = listed * 16 + 64 * listed
    sorts = 4 * 2 * 12 * (room + kept) + 40 * room + 40 * kept
    return {
        "score": Cost(2 * listed * d, size, once),
        "sort": Cost(4 * 64 * listed, ranks + sorts, ranks + sorts),
    }
