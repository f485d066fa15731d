"""Encode with thresholds: all pairs above their latent's threshold, without an (N, F) matrix.

    h[n, i] = <x[n], W_enc[i]> + b_enc[i]
    vals, idx, row_ptr = all pairs (n, i) with h[n, i] > thresholds[i], as rows of tokens

Shapes   x (N, D), W_enc (F, D), b_enc, thresholds (F); vals, idx (nnz); row_ptr (N + 1).
Dtypes   x, W_enc, b_enc fp32, bf16 or fp16; thresholds, vals fp32; idx int32; row_ptr int64.
Order    In a row by value descending, then by latent. The values are fixed-order dot products
         (kernels/dot.py), so results have the same bits as the CPU's.

Screen   One product, of which a bit for each pair stays: whether its upper bound t + b + m exceeds
         the threshold. Word j of a token holds the latents 32j … 32j + 31, which a tile has in
         pairs of columns 8 apart: on an H100 a thread packs what it holds. Bits become a list of
         pairs, in order; those get their exact values, and are sorted if above their thresholds.
Sync     Two: how many bits are set, and nnz, which both size tensors. Where more than 2·limit +
         SLACK are set, so many are tried first: nearly all are above their thresholds.
Not finite  If a number or a value is not, the one value is NaN, so that the loss is.

Bytes    x, W_enc, twice a bit for each pair, D elements for each listed one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.candidates import Pairs, empty_pairs, pointers
from fastsae.kernels.checks import Cost, Variant, expect
from fastsae.kernels.operands import Operands, check_inputs, norms_cost, operands
from fastsae.kernels.pairs import as_rows, mark, pairs_cost, values
from fastsae.kernels.tile import product_cost, products, tile_at, tile_config
from fastsae.reference import TooManyPairs

SLACK = 1 << 16


@triton.jit
def _bits_kernel(
    x_ptr,  # (N, D) what the screen multiplies
    W_ptr,  # (F, D) likewise
    offset_ptr,  # (F) fp32: b - threshold, and what that and the sums may err
    x_bound_ptr,  # (N) fp32
    W_bound_ptr,  # (F) fp32
    words_ptr,  # (out) (N, n_words) int32
    N,
    D,
    F,
    n_tiles,
    stride_x,
    stride_W,
    MULTIPLY: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    WORDS: tl.constexpr = BN // 32
    tile_n, tile = tile_at(tl.program_id(0), N, n_tiles, BM, GROUP)
    n = tile_n * BM + tl.arange(0, BM)
    column = tl.arange(0, BN)
    bit = column % 128 // 8 * 2 + column % 2
    latent = tile * BN + (column // 128 * 4 + column // 2 % 4) * 32 + bit
    there = latent < F
    u = products(
        x_ptr, n, n < N, stride_x, W_ptr, latent, there, stride_W, D, MULTIPLY, UPCAST, BM, BN, BK
    )
    x_bound = tl.load(x_bound_ptr + n, mask=n < N, other=0.0)
    W_bound = tl.load(W_bound_ptr + latent, mask=there, other=0.0)
    u += x_bound[:, None] * W_bound[None, :]
    u += tl.load(offset_ptr + latent, mask=there, other=0.0)[None, :]
    # Also where that is not finite: the exact value will tell.
    words = tl.where((u <= 0) & (u > -float("inf")), 0, 1 << bit[None, :])
    words = tl.sum(tl.reshape(words, [BM, BN // 128, 16, 4, 2]), axis=4)
    words = tl.reshape(tl.sum(words, axis=2), [BM, WORDS])
    word = tile * WORDS + tl.arange(0, WORDS)
    left = tl.maximum(F - 32 * word, 0)  # a token that is infinite in bf16 sets bits beyond F too
    words &= tl.where(left < 32, (1 << tl.minimum(left, 31)) - 1, -1)[None, :]
    at = words_ptr + n.to(tl.int64)[:, None] * (n_tiles * WORDS) + word[None, :]
    tl.store(at, words, mask=(n < N)[:, None] & (word >= 0)[None, :])


@triton.jit
def _list_kernel(
    words_ptr,  # (N, n_words) int32
    counts_ptr,  # (out) (N) int64, without FILL
    ptr_ptr,  # (N + 1) int64, with FILL
    row_ptr,  # (out) (room) int32, with FILL
    col_ptr,  # (out) (room) int32, with FILL
    n_words,
    room,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    words_ptr += n * n_words
    count = tl.zeros([], tl.int64)
    if FILL:
        count += tl.load(ptr_ptr + n)
    for start in range(0, n_words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        words = tl.load(words_ptr + word, mask=word < n_words, other=0)
        bits = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
        if FILL:
            bits = tl.reshape(bits, [32 * BLOCK])
            at = count + tl.cumsum(bits, 0) - bits
            latent = 32 * start + tl.arange(0, 32 * BLOCK)
            tl.store(col_ptr + at, latent, mask=(bits > 0) & (at < room))
            tl.store(
                row_ptr + at, tl.zeros_like(latent) + n.to(tl.int32), mask=(bits > 0) & (at < room)
            )
            count += tl.sum(bits, 0)
        else:
            count += tl.sum(tl.sum(bits, 1), 0)
    if not FILL:
        tl.store(counts_ptr + n, count)


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    thresholds: Tensor,
    limit: int | None = None,
    precision: str = "screened",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastsae.reference.encode_threshold`, but for what it does about non-finite numbers."""
    check_inputs(x, W_enc, b_enc, precision)
    expect("thresholds", thresholds, (len(W_enc),), (torch.float32,), W_enc)
    with torch.cuda.device_of(x):
        of = operands(x, W_enc, b_enc, precision)
        words = _bits(of, thresholds)
        ptr = pointers(_count(words))
        seen = torch.cat([ptr[-1:], of.bad, thresholds.isnan().any().view(1)])
        total, bad, no_number = seen.tolist()
        if no_number:
            raise ValueError("thresholds: expected numbers, got a NaN")
        total = 0 if bad else total
        room = total if limit is None else min(total, 2 * limit + SLACK)
        while True:
            pairs = _fill(words, room, ptr)
            value = values(of, pairs, by_latent=False)
            kept = value > thresholds[pairs.col]
            finite = value.isfinite().all()
            nnz, fine = torch.stack([kept.sum(), finite]).tolist()
            if limit is not None and nnz > limit and fine:
                raise TooManyPairs(f"more than {limit} pairs pass their thresholds")
            if room == total or not fine:
                break
            room = total
        token, latent, score = pairs.row, pairs.col, value.where(kept, -torch.inf)
        if len(x) and (bad or not fine):
            value = score = torch.zeros(1, device=x.device)
            token, latent, nnz = value.int(), value.int(), 1
        rows = as_rows(token, latent, value, score, len(x), nnz)
        return mark(rows, value, of.bad | ~finite)


def _bits(of: Operands, thresholds: Tensor) -> Tensor:
    """(N, n_words) int32: which pairs may be above their thresholds."""
    (n, d), f = of.x.shape, len(of.W)
    config = tile_config(of.multiply, d, of.aligned())
    n_tiles = triton.cdiv(f, config["BN"])
    words = torch.empty(n, n_tiles * config["BN"] // 32, dtype=torch.int32, device=of.x.device)
    theta = thresholds.double()
    b = torch.zeros_like(theta) if of.b is None else of.b.double()
    offset = b - theta + (b.abs() + theta.abs()) * 2.0**-21
    offset = offset.where(theta.isfinite(), -theta).clamp(min=-3e38)
    if words.numel():
        _bits_kernel[(triton.cdiv(n, config["BM"]) * n_tiles,)](
            *(of.seen, of.W, offset.float(), of.x_bound, of.W_bound, words),
            *(n, d, f, n_tiles, of.seen.stride(0), of.W.stride(0)),
            **config,
        )
    return words


def _count(words: Tensor) -> Tensor:
    """(N) int64: the bits that are set."""
    n, n_words = words.shape
    counts = torch.zeros(n, dtype=torch.int64, device=words.device)
    if words.numel():
        config = list_config(n_words, fill=False)
        _list_kernel[(n,)](words, counts, None, None, None, n_words, 0, **config)
    return counts


def _fill(words: Tensor, room: int, ptr: Tensor) -> Pairs:
    """The first `room` pairs whose bits are set, by token and latent."""
    n, n_words = words.shape
    pairs = empty_pairs(room, ptr)
    if room:
        config = list_config(n_words, fill=True)
        _list_kernel[(n,)](words, None, ptr, *pairs[:2], n_words, room, **config)
    return pairs


def list_config(n_words: int, fill: bool) -> dict[str, Any]:
    return {"FILL": fill, "BLOCK": min(64, triton.next_power_of_2(n_words)), "num_warps": 4}


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name; ragged: no size or stride is a multiple of 16."""
    found = {}
    for w, multiply in (("bf16", "bf16"), ("fp32", "tf32"), ("fp32", "ieee")):
        for kind, d, i32 in (("", 768, "i32:16"), ("-wide", 4096, "i32:16"), ("-ragged", 3, "i32")):
            config = tile_config(multiply, d, kind != "-ragged") | {"UPCAST": False}
            if kind == "-wide" and config["BN"] == 128:
                continue
            pointers = f"*{w}:16, *{w}:16, *fp32:16, *fp32:16, *fp32:16, *i32:16"
            found[f"bits-{multiply}{kind}"] = Variant(
                _bits_kernel, pointers + f", {i32}" * 6, config
            )
    out = {"count": "*i64:16, None, None, None", "fill": "None, *i64:16, *i32:16, *i32:16"}
    for name, pointers in out.items():
        found[f"list-{name}"] = Variant(
            _list_kernel,
            f"*i32:16, {pointers}, i32:16, i32:16",
            list_config(4096, name == "fill"),
        )
    return found


def encode_threshold_cost(
    n: int, d: int, f: int, nnz: int, itemsize: int, candidates: float
) -> dict[str, Cost]:
    """By stage: x (n, d) fp32, f latents of itemsize, `candidates` for each pair above."""
    config = tile_config("bf16" if itemsize == 2 else "tf32", d, d % 16 == 0)
    words, listed = n * triton.cdiv(f, config["BN"]) * config["BN"] // 8, round(candidates * nnz)
    lists = 2 * words + 8 * listed
    return {
        "norms": norms_cost(n, d, f, itemsize),
        "screen": product_cost(n, f, d, itemsize, config, words),
        "list": Cost(2 * 3 * n * f, lists, lists),
        **pairs_cost(listed, listed, nnz, d, itemsize, 4),
    }
