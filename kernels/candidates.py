"""Candidates: the pairs of kernels/keys.py whose upper bound reaches their row's threshold.

First those that the buckets list (kernels/buckets.py) are counted, and after torch's scan a list is
filled: a row's pairs lie together, with holes (column -1) for columns that do not exist.

Room     A row whose room is not what it counts stays empty, and so do all where the list has too
         little: kernels/stream.py and stream_columns.py fill these.
Shapes   keys (R, 3, n_buckets), threshold, bits of a score, (1) or one for each latent, int32;
         counts (rows) int64; ptr (rows + 1) int64; row, col (room) int32. `rows` are all tokens or
         all latents, of which keys have some: `which`.
Order    One program a row, no atomics.
Bytes    Keys twice, 8 for a pair.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.buckets import KINDS, certain, column_of, listed, listed_column, most_listed
from fastsae.kernels.checks import Cost, Variant
from fastsae.kernels.keys import Keys, keys_cost
from fastsae.kernels.radix import histogram


@triton.jit
def _lower_bounds(
    keys_ptr, bias_ptr, scale_ptr, b_bound_ptr, row, a_bound, bucket, mask, n_tiles,
    BY_LATENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BUCKETS: tl.constexpr, LOG2_G: tl.constexpr,
):  # fmt: skip
    """The bits of what the first pair of each bucket scores for certain; 0 for nothing."""
    key = tl.load(keys_ptr + bucket, mask=mask, other=0)
    taken = key > 0
    col = column_of(key, bucket, n_tiles, BUCKETS, LOG2_G)
    m = a_bound * tl.load(b_bound_ptr + col, mask=taken, other=0.0)
    if HAS_BIAS:
        latent = col
        if BY_LATENT:
            latent = tl.zeros_like(col) + row
        m += tl.abs(tl.load(bias_ptr + latent, mask=taken, other=0.0).to(tl.float32)) * 2.0**-21
    if HAS_SCALE:
        m *= tl.load(scale_ptr + col, mask=taken, other=0.0)
    return certain(key, m, LOG2_G)


@triton.jit
def bound_histogram(
    keys_ptr, bias_ptr, scale_ptr, b_bound_ptr, row, a_bound, prefix, n_buckets, n_tiles,
    ABOVE: tl.constexpr, SHIFT: tl.constexpr, BY_LATENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, BUCKETS: tl.constexpr, LOG2_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As kernels/radix.py has it, of the lower bounds of a row."""
    hist = tl.zeros([2048], tl.int32)
    for start in range(0, n_buckets, BLOCK):
        bucket = start + tl.arange(0, BLOCK)
        bits = _lower_bounds(
            keys_ptr, bias_ptr, scale_ptr, b_bound_ptr, row, a_bound, bucket, bucket < n_buckets,
            n_tiles, BY_LATENT, HAS_BIAS, HAS_SCALE, BUCKETS, LOG2_G,
        )  # fmt: skip
        hist += histogram(bits, prefix, ABOVE, SHIFT)
    return hist


@triton.jit
def _pairs_kernel(
    keys_ptr,  # (R, 3, n_buckets) int32
    which_ptr,  # (R) int32
    threshold_ptr,  # by row, or one: int32 bits; 0: every key
    bad_ptr,  # (1) int32: if not 0 there are no pairs
    counts_ptr,  # (rows) int64: (out), with FILL (in)
    ptr_ptr,  # (rows + 1) int64, with FILL
    pair_row_ptr,  # (out) (ROOM) int32, with FILL
    pair_col_ptr,  # (out) (ROOM) int32, with FILL
    C,
    n_rows,  # ptr has so many, and one more
    n_buckets,
    n_tiles,
    ROOM,
    BY_LATENT: tl.constexpr,  # each row has a threshold
    FILL: tl.constexpr,
    BUCKETS: tl.constexpr,  # of a tile
    LOG2_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    keys_ptr += r * 3 * n_buckets
    row = tl.load(which_ptr + r).to(tl.int64)
    if BY_LATENT:
        threshold_ptr += row
    bits = tl.maximum(tl.load(threshold_ptr), 1)
    end = tl.where(tl.load(bad_ptr) == 0, n_buckets, 0)
    begin = tl.zeros([], tl.int64)
    if FILL:
        begin = tl.load(ptr_ptr + row)
        fits = tl.load(ptr_ptr + row + 1) - begin == tl.load(counts_ptr + row)
        end = tl.where(fits & (tl.load(ptr_ptr + n_rows) <= ROOM), end, 0)
    count = tl.zeros([], tl.int64)
    lane = tl.arange(0, BLOCK)
    for start in range(0, end, BLOCK):
        bucket = start + lane
        first, second, flagged, entries = listed(keys_ptr, bucket, n_buckets, bits, LOG2_G)
        if FILL:
            at = begin + count + tl.cumsum(entries, 0) - entries
            for which in range(most_listed(flagged, LOG2_G)):
                col = listed_column(
                    first, second, flagged, which, bucket, C, n_tiles, BUCKETS, LOG2_G
                )
                tl.store(pair_col_ptr + at + which, col, mask=which < entries)
                tl.store(pair_row_ptr + at + which, row.to(tl.int32), mask=which < entries)
        count += tl.sum(entries, 0)
    if not FILL:
        tl.store(counts_ptr + row, count)


class Pairs(NamedTuple):
    """A list by row: the pairs of row r are those from ptr[r] to ptr[r + 1], which may be holes."""

    row: Tensor
    col: Tensor
    ptr: Tensor


def count_pairs(parts: list[Keys], threshold: Tensor, bad: Tensor, counts: Tensor) -> None:
    """Writes counts of the parts' rows. threshold: of all rows (1), or of each latent."""
    for keys in parts:
        _launch(keys, threshold, bad, counts, None)


def list_pairs(
    parts: list[Keys], threshold: Tensor, bad: Tensor, counts: Tensor, ptr: Tensor, room: int
) -> Pairs:
    """The pairs of rows whose room is what they count, if all have `room` together."""
    most = sum(len(of.keys) * of.buckets.n_tiles * of.buckets.bn for of in parts)
    pairs = empty_pairs(min(most, room), ptr)
    for keys in parts:
        _launch(keys, threshold, bad, counts, pairs)
    return pairs


def _launch(
    keys: Keys, threshold: Tensor, bad: Tensor, counts: Tensor, pairs: Pairs | None
) -> None:
    r, _, n_buckets = keys.keys.shape
    row, col, ptr = pairs or (None, None, None)
    config = pairs_config(n_buckets, keys.by_latent, pairs is not None)
    room = 0 if col is None else len(col)
    sizes = len(keys.b_bound), len(counts), n_buckets, keys.buckets.n_tiles, room
    if keys.keys.numel():
        _pairs_kernel[(r,)](
            *(keys.keys, keys.which, threshold, bad, counts, ptr, row, col, *sizes),
            **config | keys.buckets.constexprs,
        )


def empty_pairs(room: int, ptr: Tensor) -> Pairs:
    """All holes; the kernels write no others than the pairs they have."""
    row = torch.zeros(room, dtype=torch.int32, device=ptr.device)
    return Pairs(row, torch.full_like(row, -1), ptr)


def pointers(counts: Tensor) -> Tensor:
    """(rows + 1) int64: where rows begin and the last one ends."""
    ptr = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=ptr[1:])
    return ptr


def pairs_config(n_buckets: int, by_latent: bool, fill: bool) -> dict[str, Any]:
    block = min(1024, triton.next_power_of_2(max(n_buckets, 16)))
    warps = max(2, min(8, block // 128))
    return {"BY_LATENT": by_latent, "FILL": fill, "BLOCK": block, "num_warps": warps}


def variants() -> dict[str, Variant]:
    """What the launchers ship, by name: the size of buckets, and how many there are."""
    found = {}
    for size, buckets in KINDS.items():
        for n_buckets in (256, 4096) if size == 32 else (4096,):
            for by_latent in (False, True):
                for fill in (False, True):
                    out = "*i64:16, *i32:16, *i32:16" if fill else "None, None, None"
                    name = f"{'fill' if fill else 'count'}-{n_buckets}-{size}"
                    found[name + "-latents" * by_latent] = Variant(
                        _pairs_kernel,
                        f"*i32:16, *i32:16, *i32:16, *i32:16, *i64:16, {out}" + ", i32:16" * 5,
                        pairs_config(n_buckets, by_latent, fill) | buckets.constexprs,
                    )
    return found


def candidates_cost(
    groups: tuple[tuple[int, float], ...], c: int, d: int, itemsize: int, listed: int, rest: int
) -> dict[str, Cost]:
    """By stage: groups of so many rows, of which k pairs are looked for; rest: bytes of a list."""
    screens = [keys_cost(r, c, d, k, itemsize) for r, k in groups]
    keys = sum(size for _, size in screens)
    firsts, lists = 2 * keys // 3, 2 * keys + 8 * listed
    return {
        "screen": Cost(*map(sum, zip(*(cost for cost, _ in screens), strict=True))),
        "bound": Cost(20 * firsts // 4, firsts, firsts),
        "list": Cost(5 * lists, lists + rest, lists + rest),
    }
