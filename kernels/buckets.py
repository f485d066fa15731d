"""Buckets: the columns of a product in groups of G, of each of which a row keeps its three best.

    key[r, bucket] = the bits of u, rounded up to a multiple of G, + (G - 1 - slot)

u > 0 is at least what the pair of a row and a column scores, and slot says which of the bucket's
columns it is. Bits order positive floats; of equal ones the lower slot has the larger key, and 0 is
no key. A row is a token and a column a latent, or the other way round.

Columns  Tile j of T holds the columns j, j + T, j + 2T, …, so that neighbours, which are alike
         where a dictionary is sorted, share no bucket. The tile's columns that are equal modulo its
         number of buckets are one bucket.
List     Of a bucket whose third key is below a threshold, the keys that reach it are all that do.
         Any other is flagged, and all its G columns are listed.
Shapes   keys (R, planes, n_buckets) int32: the largest keys, the second ones, the third ones, and
         what else a kernel stores.
Order    No atomics. Keys bound what is exact; their own bits are the tensor cores'.
"""

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def _halves(m, BM: tl.constexpr, HALF: tl.constexpr, BUCKETS: tl.constexpr):
    """The first and the second half of each bucket of m (BM, 2·HALF, BUCKETS)."""
    return tl.split(tl.permute(tl.reshape(m, [BM, 2, HALF, BUCKETS]), [0, 2, 3, 1]))


@triton.jit
def store_keys(
    keys_ptr, u, there, r, in_r, tile, n_tiles,
    PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LOG2_G: tl.constexpr,
):  # fmt: skip
    """Writes the keys of a tile u (BM, BN); there (BN), in_r (BM). Returns where they are."""
    G: tl.constexpr = 1 << LOG2_G
    BUCKETS: tl.constexpr = BN // G
    slot = (G - 1 - tl.arange(0, BN) // BUCKETS).to(tl.int32)[None, :]
    # First what is there: other orders that were tried spill registers of wide tiles on an H100.
    u = tl.where(there[None, :], u, 0.0)
    m1 = (u.to(tl.int32, bitcast=True) + (G - 1)) & -G
    m1 = tl.where(u > 0, m1 | slot, 0)

    # The three largest of each bucket, by merging sorted triples.
    m1 = tl.reshape(m1, [BM, G, BUCKETS])
    a, b = _halves(m1, BM, G // 2, BUCKETS)
    m1, m2, m3 = tl.maximum(a, b), tl.minimum(a, b), tl.zeros_like(a)
    for level in tl.static_range(2, LOG2_G + 1):
        a1, b1 = _halves(m1, BM, G >> level, BUCKETS)
        a2, b2 = _halves(m2, BM, G >> level, BUCKETS)
        a3, b3 = _halves(m3, BM, G >> level, BUCKETS)
        low, high = tl.minimum(a1, b1), tl.maximum(a2, b2)
        m1, m2 = tl.maximum(a1, b1), tl.maximum(low, high)
        rest = tl.maximum(tl.maximum(a3, b3), tl.minimum(a2, b2))
        m3 = tl.maximum(tl.minimum(low, high), rest)

    n_buckets = n_tiles * BUCKETS
    bucket = tile * BUCKETS + tl.arange(0, BUCKETS)
    at = keys_ptr + r.to(tl.int64)[:, None] * PLANES * n_buckets + bucket[None, :]
    mask = in_r[:, None] & (bucket >= 0)[None, :]
    tl.store(at, tl.reshape(m1, [BM, BUCKETS]), mask=mask)
    tl.store(at + n_buckets, tl.reshape(m2, [BM, BUCKETS]), mask=mask)
    tl.store(at + 2 * n_buckets, tl.reshape(m3, [BM, BUCKETS]), mask=mask)
    return at, mask


@triton.jit
def _column(bucket, slot, n_tiles, BUCKETS: tl.constexpr):
    return bucket // BUCKETS + n_tiles * (slot * BUCKETS + bucket % BUCKETS)


@triton.jit
def _slot(key, LOG2_G: tl.constexpr):
    return (1 << LOG2_G) - 1 - (key & ((1 << LOG2_G) - 1))


@triton.jit
def column_of(key, bucket, n_tiles, BUCKETS: tl.constexpr, LOG2_G: tl.constexpr):
    """The column of a key of this bucket."""
    return _column(bucket, _slot(key, LOG2_G), n_tiles, BUCKETS)


@triton.jit
def certain(key, m, LOG2_G: tl.constexpr):
    """The bits of what the pair of a key scores for certain, where u - 2m does; 0 for nothing."""
    G: tl.constexpr = 1 << LOG2_G
    upper = (key & -G).to(tl.float32, bitcast=True)
    # 2⁻¹²⁰ is more than all that is rounded among denormals.
    lower = upper * (1 - G * 2.0**-21) - 2 * m * (1 + 2.0**-10) - 2.0**-120
    lower = tl.where((key > 0) & (lower > 0) & (lower < float("inf")), lower, 0.0)
    return lower.to(tl.int32, bitcast=True)


@triton.jit
def listed(keys_ptr, bucket, n_buckets, bits, LOG2_G: tl.constexpr):
    """Of each bucket: its first two keys, whether it is flagged, and how many pairs it lists."""
    mask = bucket < n_buckets
    first = tl.load(keys_ptr + bucket, mask=mask, other=0)
    second = tl.load(keys_ptr + n_buckets + bucket, mask=mask, other=0)
    third = tl.load(keys_ptr + 2 * n_buckets + bucket, mask=mask, other=0)
    flagged = third >= bits
    kept = (first >= bits).to(tl.int32) + (second >= bits).to(tl.int32)
    return first, second, flagged, tl.where(flagged, 1 << LOG2_G, kept)


@triton.jit
def most_listed(flagged, LOG2_G: tl.constexpr):
    """How many pairs a bucket lists at most."""
    return tl.where(tl.max(flagged.to(tl.int32), 0) > 0, 1 << LOG2_G, 2)


@triton.jit
def listed_column(
    first, second, flagged, which, bucket, n_columns, n_tiles,
    BUCKETS: tl.constexpr, LOG2_G: tl.constexpr,
):  # fmt: skip
    """The `which`-th column that a bucket lists; -1 for one that does not exist."""
    key = first if which == 0 else second
    slot = tl.where(flagged, which, _slot(key, LOG2_G))
    column = _column(bucket, slot, n_tiles, BUCKETS)
    return tl.where(column < n_columns, column, -1)


class Buckets(NamedTuple):
    """How the columns of a product lie in buckets."""

    n_columns: int
    bn: int  # columns of a tile
    log2_g: int

    @property
    def n_tiles(self) -> int:
        return triton.cdiv(self.n_columns, self.bn)

    @property
    def n_buckets(self) -> int:
        return self.n_tiles * self.bn >> self.log2_g

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BUCKETS": self.bn >> self.log2_g, "LOG2_G": self.log2_g}


def log2_bucket(n_columns: int, k: float, most: int) -> int:
    """Buckets so large that a row has 2k of them or more; above 32 only beyond `most` of them."""
    log2_g = 2
    while log2_g < 7 and n_columns >> (log2_g + 1) >= 2 * k:
        if log2_g >= 5 and n_columns >> log2_g <= most:
            break
        log2_g += 1
    return log2_g


# By size: kinds of buckets that are shipped, for kernels that read keys.
KINDS = {32: Buckets(1 << 17, 256, 5), 128: Buckets(1 << 20, 128, 7), 4: Buckets(4096, 128, 2)}
