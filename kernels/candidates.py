"""Candidates: the pairs of kernels/keys.py whose upper bound reaches their row's threshold.

A bucket whose third key is below the threshold has kept all of its pairs that reach it; of any
other all G columns are taken. First they are counted, and after torch's scan a list is filled: a
row's pairs lie together, with holes (column -1) for columns that do not exist.

Room     A row whose room is not what it counts stays empty, and so do all where the list has too
         little: kernels/stream.py and stream_columns.py fill these.
Shapes   keys (R, 3, buckets) int32; threshold, bits of a score, (1) or one for each latent, int32;
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

from fastsae.kernels.checks import Variant
from fastsae.kernels.keys import Keys, bucket_variants


@triton.jit
def column_of(bucket, slot, n_tiles, BUCKETS: tl.constexpr):
    """Which column: the tile that the bucket is in, and the column there."""
    return bucket // BUCKETS + n_tiles * (slot * BUCKETS + bucket % BUCKETS)


@triton.jit
def lower_bounds(
    keys_ptr, bias_ptr, scale_ptr, b_bound_ptr, row, a_bound, bucket, mask, n_tiles,
    BY_LATENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BUCKETS: tl.constexpr, LOG2_G: tl.constexpr,
):  # fmt: skip
    """The bits of what the first pair of each bucket scores for certain; 0 for nothing."""
    G: tl.constexpr = 1 << LOG2_G
    key = tl.load(keys_ptr + bucket, mask=mask, other=0)
    taken = key > 0
    upper = (key & -G).to(tl.float32, bitcast=True)
    col = column_of(bucket, G - 1 - (key & (G - 1)), n_tiles, BUCKETS)
    m = a_bound * tl.load(b_bound_ptr + col, mask=taken, other=0.0)
    if HAS_BIAS:
        latent = col
        if BY_LATENT:
            latent = tl.zeros_like(col) + row
        m += tl.abs(tl.load(bias_ptr + latent, mask=taken, other=0.0).to(tl.float32)) * 2.0**-21
    if HAS_SCALE:
        m *= tl.load(scale_ptr + col, mask=taken, other=0.0)
    # 2⁻¹²⁰ is more than all that is rounded among denormals.
    lower = upper * (1 - G * 2.0**-21) - 2 * m * (1 + 2.0**-10) - 2.0**-120
    certain = taken & (lower > 0) & (lower < float("inf"))
    return tl.where(certain, lower, 0.0).to(tl.int32, bitcast=True)


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
    G: tl.constexpr = 1 << LOG2_G
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
        mask = bucket < n_buckets
        first = tl.load(keys_ptr + bucket, mask=mask, other=0)
        second = tl.load(keys_ptr + n_buckets + bucket, mask=mask, other=0)
        third = tl.load(keys_ptr + 2 * n_buckets + bucket, mask=mask, other=0)
        flagged = third >= bits
        kept = (first >= bits).to(tl.int32) + (second >= bits).to(tl.int32)
        entries = tl.where(flagged, G, kept)
        if FILL:
            at = begin + count + tl.cumsum(entries, 0) - entries
            for slot in range(tl.where(tl.max(flagged.to(tl.int32), 0) > 0, G, 2)):
                key = first if slot == 0 else second
                own = tl.where(flagged, slot, G - 1 - (key & (G - 1)))
                col = column_of(bucket, own, n_tiles, BUCKETS)
                stored = slot < entries
                tl.store(pair_col_ptr + at + slot, tl.where(col < C, col, -1), mask=stored)
                tl.store(pair_row_ptr + at + slot, row.to(tl.int32), mask=stored)
        count += tl.sum(entries, 0)
    if not FILL:
        tl.store(counts_ptr + row, count)


class Pairs(NamedTuple):
    """A list by row: the pairs of row r are those from ptr[r] to ptr[r + 1], which may be holes."""

    row: Tensor
    col: Tensor
    ptr: Tensor


def count_pairs(keys: Keys, threshold: Tensor, bad: Tensor, counts: Tensor) -> None:
    """Writes counts of the keys' rows. threshold: of all rows (1), or of each latent."""
    _launch(keys, threshold, bad, counts, None)


def fill_pairs(keys: Keys, threshold: Tensor, bad: Tensor, counts: Tensor, pairs: Pairs) -> None:
    """Writes the pairs of the keys' rows, where their room is what they count."""
    _launch(keys, threshold, bad, counts, pairs)


def _launch(
    keys: Keys, threshold: Tensor, bad: Tensor, counts: Tensor, pairs: Pairs | None
) -> None:
    r, _, n_buckets = keys.keys.shape
    row, col, ptr = pairs or (None, None, None)
    config = pairs_config(n_buckets, keys.by_latent, pairs is not None)
    room = 0 if col is None else len(col)
    sizes = len(keys.b_bound), len(counts), n_buckets, keys.n_tiles, room
    if keys.keys.numel():
        _pairs_kernel[(r,)](
            *(keys.keys, keys.which, threshold, bad, counts, ptr, row, col, *sizes),
            **config | keys.buckets(),
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
    for size, of_buckets in bucket_variants().items():
        for n_buckets in (256, 4096) if size == 32 else (4096,):
            for by_latent in (False, True):
                for fill in (False, True):
                    out = "*i64:16, *i32:16, *i32:16" if fill else "None, None, None"
                    name = f"{'fill' if fill else 'count'}-{n_buckets}-{size}"
                    found[name + "-latents" * by_latent] = Variant(
                        _pairs_kernel,
                        f"*i32:16, *i32:16, *i32:16, *i32:16, *i64:16, {out}" + ", i32:16" * 5,
                        pairs_config(n_buckets, by_latent, fill) | of_buckets,
                    )
    return found
