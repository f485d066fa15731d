"""The inverse index of a batch's codes: for each latent its pairs, ascending.

    pairs of latent f = token[latent_ptr[f] : latent_ptr[f+1]], entry[the same]

An entry is a pair's place in the flattened idx, and token the row it is in. Within a latent both
ascend. The differences of latent_ptr are the firing counts.

Shapes   idx (N, K), or (nnz) with row_ptr (N+1); latent_ptr (F+1); token, entry (idx.numel()),
         which end in unused room where there was padding. Any of N, K, F may be 0.
Dtypes   idx, token, entry int32; row_ptr, latent_ptr int64. Fewer than 2³¹ pairs.
Padding  idx < 0 marks an empty slot, left out. That idx < F is the caller's promise: a check would
         have to wait for the device.

Order    A counting sort in four launches: count the pairs of each latent; scan; scatter each pair,
         as the key (latent, entry), into any free slot of its segment; order. The atomics of count
         and scatter are of integers, and only the order inside a segment depends on them, which the
         last launch settles: a pair's place is the number of smaller keys. So the result is one.

Cost     The last launch takes BLOCK = 64 pairs a program and compares each with all keys of the
         segments they are in: under 64 and those of the first and last of these segments. For a
         long one that is len², spread over len / 64 programs: a latent in all of 8192 tokens is 128
         programs of 128 steps. One latent with all pairs of a batch is the worst case: nnz².
Bytes    For a pair 4 + 4 + 8 + 8 + 8 and twice an atomic of 4, and 16 for a latent; keys of a
         segment read again come from the cache.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import OPTIONS, Cost, Variant, expect_codes


@triton.jit
def _count_kernel(
    idx_ptr,  # (n_pairs) int32, < 0 is padding
    count_ptr,  # (in, out) (F+1) int32: from 0, the pairs of latent f in count[f+1]
    n_pairs,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(idx_ptr + entry, mask=entry < n_pairs, other=-1).to(tl.int64)
    tl.atomic_add(count_ptr + latent + 1, 1, mask=latent >= 0, sem="relaxed")


@triton.jit
def _scatter_kernel(
    idx_ptr,  # (n_pairs) int32, < 0 is padding
    latent_ptr_ptr,  # (F+1) int64
    count_ptr,  # (in, out) (F+1) int32: as counted; counts down to 0
    key_ptr,  # (out) (n_pairs) int64: latent·2³² + entry, by latent
    n_pairs,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(idx_ptr + entry, mask=entry < n_pairs, other=-1).to(tl.int64)
    stored = latent >= 0
    free = tl.atomic_add(count_ptr + latent + 1, -1, mask=stored, sem="relaxed")
    slot = tl.load(latent_ptr_ptr + latent, mask=stored, other=0) + free - 1
    tl.store(key_ptr + slot, (latent << 32) + entry, mask=stored)


@triton.jit
def _order_kernel(
    key_ptr,  # (n_pairs) int64: latent·2³² + entry, by latent
    latent_ptr_ptr,  # (F+1) int64
    row_ptr_ptr,  # (N+1) int64, or None
    token_ptr,  # (out) (n_pairs) int32
    entry_ptr,  # (out) (n_pairs) int32
    F,
    N,
    K,
    STEPS,  # of the search for a token: the bits of N
    HAS_ROW_PTR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n_stored = tl.load(latent_ptr_ptr + F)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    if begin < n_stored:
        place = begin + tl.arange(0, BLOCK)
        stored = place < n_stored
        key = tl.load(key_ptr + place, mask=stored, other=0)
        # The segments of these pairs: smaller keys lie in them or before them.
        first = tl.load(key_ptr + begin) >> 32
        last = tl.load(key_ptr + tl.minimum(begin + BLOCK, n_stored) - 1) >> 32
        segments_begin = tl.load(latent_ptr_ptr + first)
        segments_end = tl.load(latent_ptr_ptr + last + 1)
        smaller = tl.zeros([BLOCK, BLOCK], tl.int32)
        for i0 in range(segments_begin, segments_end, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            other = tl.load(key_ptr + i, mask=i < segments_end, other=2**63 - 1)
            smaller += (other[None, :] < key[:, None]).to(tl.int32)
        place = segments_begin + tl.sum(smaller, axis=1)
        entry = (key & 0xFFFFFFFF).to(tl.int32)
        if HAS_ROW_PTR:
            # row_ptr[low] <= entry < row_ptr[high]
            low = tl.zeros([BLOCK], tl.int32)
            high = low + N
            for _ in range(STEPS):
                middle = low + (high - low) // 2
                begins = tl.load(row_ptr_ptr + middle, mask=stored, other=0)
                low = tl.where(begins <= entry, middle, low)
                high = tl.where(begins <= entry, high, middle)
            token = low
        else:
            token = entry // K
        tl.store(token_ptr + place, token, mask=stored)
        tl.store(entry_ptr + place, entry, mask=stored)


def inverse_index(
    idx: Tensor, n_latents: int, row_ptr: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """latent_ptr (F+1) int64, token and entry (idx.numel()) int32, from idx (N, K) or (nnz)."""
    n_tokens, k = expect_codes(idx, row_ptr, idx)
    n_pairs = idx.numel()
    if n_pairs >= 2**31:
        raise ValueError(f"idx: expected fewer than 2³¹ pairs, got {n_pairs}")
    idx = idx.reshape(-1)  # a copy where rows are apart: small next to what it indexes
    token, entry = torch.empty_like(idx), torch.empty_like(idx)
    key = torch.empty(n_pairs, dtype=torch.int64, device=idx.device)
    with torch.cuda.device_of(idx):
        count = torch.zeros(n_latents + 1, dtype=torch.int32, device=idx.device)
        grid = (triton.cdiv(n_pairs, PAIR_CONFIG["BLOCK"]),)
        if n_pairs:
            _count_kernel[grid](idx, count, n_pairs, **PAIR_CONFIG)
        latent_ptr = count.cumsum(0, dtype=torch.int64)
        if n_pairs:
            _scatter_kernel[grid](idx, latent_ptr, count, key, n_pairs, **PAIR_CONFIG)
            config = _order_config(row_ptr is not None)
            grid = (triton.cdiv(n_pairs, config["BLOCK"]),)
            sizes = n_latents, n_tokens, k, n_tokens.bit_length()
            _order_kernel[grid](key, latent_ptr, row_ptr, token, entry, *sizes, **config)
    return latent_ptr, token, entry


PAIR_CONFIG = {"BLOCK": 512, **OPTIONS, "num_warps": 4}


def _order_config(has_row_ptr: bool) -> dict[str, Any]:
    return {"HAS_ROW_PTR": has_row_ptr, "BLOCK": 64, **OPTIONS, "num_warps": 8}


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name; ragged: no size is a multiple of 16."""
    found = {}
    for ragged, i32 in (("", "i32:16"), ("-ragged", "i32")):
        pointers = "*i32:16, *i32:16"
        found[f"count{ragged}"] = Variant(_count_kernel, f"{pointers}, {i32}", PAIR_CONFIG)
        pointers = "*i32:16, *i64:16, *i32:16, *i64:16"
        found[f"scatter{ragged}"] = Variant(_scatter_kernel, f"{pointers}, {i32}", PAIR_CONFIG)
        for rows, row_ptr, k in (("", "None", i32), ("-rows", "*i64:16", "1")):
            pointers = f"*i64:16, *i64:16, {row_ptr}, *i32:16, *i32:16"
            sizes = f"{i32}, {i32}, {k}, i32"
            config = _order_config(bool(rows))
            found[f"order{rows}{ragged}"] = Variant(_order_kernel, f"{pointers}, {sizes}", config)
    return found


def index_cost(n_pairs: int, n_latents: int) -> Cost:
    """Where segments are short."""
    size = n_pairs * (2 * 4 + 3 * 8 + 2 * 4) + n_latents * 16
    return Cost(2 * 64 * n_pairs, size, size)
