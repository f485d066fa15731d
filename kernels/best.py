"""Best: the k best of a token's candidates, in order.

A candidate's rank is the number of candidates above it in the order (score descending, latent
ascending). Those with rank < k and score > 0 are stored at their rank.

Shapes   places (N, room), counts (N), latents (n_latents) or None, as kernels/score.py has them;
         values and scores (N, room); vals, idx (N, k).
Dtypes   values, scores, vals fp32; the rest int32.
Not finite  A token with a value that is not finite, or counts = -1, gets NaN as its first one.
Order    No atomics; a program reads nothing that it wrote.
Bytes    A token's candidates once for each BLOCK of them, from L1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Variant
from fastsae.kernels.rescan import rescan
from fastsae.kernels.score import PLAIN, Score, score_candidates

MAX_K = 1024


@triton.jit
def _finish_kernel(
    places_ptr,  # (N, ROOM) int32
    values_ptr,  # (N, ROOM) fp32
    scores_ptr,  # (N, ROOM) fp32, or None where they are the values
    counts_ptr,  # (N) int32
    latents_ptr,  # (n_latents) int32, or None
    vals_ptr,  # (out) (N, K) fp32, zeros before
    idx_ptr,  # (out) (N, K) int32, -1 before
    K,
    ROOM,
    HAS_LATENTS: tl.constexpr,
    SCORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + n)
    finite = tl.where(count >= 0, 1, 0)
    places_ptr += n * ROOM
    values_ptr += n * ROOM
    ranked_ptr = values_ptr
    if SCORED:
        ranked_ptr = scores_ptr + n * ROOM
    for start in range(0, count, BLOCK):
        j = start + tl.arange(0, BLOCK)
        h = tl.load(values_ptr + j, mask=j < count, other=0.0)
        finite &= tl.min((tl.abs(h) < float("inf")).to(tl.int32), 0)
    room = tl.where(finite == 1, K, 0)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = tl.load(ranked_ptr + i, mask=i < count, other=0.0)
        place = tl.load(places_ptr + i, mask=i < count, other=0)
        rank = tl.zeros([BLOCK], tl.int32)
        for other in range(0, count, BLOCK):
            j = other + tl.arange(0, BLOCK)
            rival = tl.load(ranked_ptr + j, mask=j < count, other=0.0)[None, :]
            rival_place = tl.load(places_ptr + j, mask=j < count, other=0)[None, :]
            equal = (rival == score[:, None]) & (rival_place < place[:, None])
            rank += tl.sum(((rival > score[:, None]) | equal).to(tl.int32), 1)
        latent = place
        if HAS_LATENTS:
            latent = tl.load(latents_ptr + place, mask=(i < count) & (place >= 0), other=0)
        stored = (score > 0) & (rank < room)
        h = score
        if SCORED:
            h = tl.load(values_ptr + i, mask=stored, other=0.0)
        tl.store(vals_ptr + n * K + rank, h, mask=stored)
        tl.store(idx_ptr + n * K + rank, latent, mask=stored)
    if finite == 0:
        tl.store(vals_ptr + n * K, float("nan"))
        tl.store(idx_ptr + n * K, 0)


def best(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    places: Tensor,
    counts: Tensor,
    k: int,
    n_latents: int,
    score: Score = PLAIN,
) -> tuple[Tensor, Tensor]:
    """vals and idx; 0 and -1 pad where fewer than k scores are positive. k ≤ MAX_K."""
    rescan(x, W_enc, b_enc, latents, places, counts, k, n_latents, score)
    values, scores = score_candidates(x, W_enc, b_enc, latents, places, counts, score)
    vals = torch.zeros(len(x), k, dtype=torch.float32, device=x.device)
    idx = torch.full((len(x), k), -1, dtype=torch.int32, device=x.device)
    _finish_kernel[(len(x),)](
        *(places, values, scores, counts, latents, vals, idx, k, places.shape[1]),
        HAS_LATENTS=latents is not None,
        SCORED=scores is not None,
        **FINISH_CONFIG,
    )
    return vals, idx


FINISH_CONFIG = {"BLOCK": 64, "num_warps": 4}


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name."""
    return {
        "finish" + "-latents" * latents + "-scored" * scored: Variant(
            _finish_kernel,
            f"*i32:16, *fp32:16, {'*fp32:16' if scored else 'None'}, *i32:16, "
            f"{'*i32:16' if latents else 'None'}, *fp32:16, *i32:16, i32:16, i32:16",
            {"HAS_LATENTS": latents, "SCORED": scored} | FINISH_CONFIG,
        )
        for latents in (False, True)
        for scored in (False, True)
    }
