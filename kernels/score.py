"""Score: the values of a token's candidates, and what the selection compares.

    h[n, i] = dot(x[n], W_enc[i]) + b_enc[i]
    score[n, i] = h or |h|  ·  scale[i]  ·  (1 + |dot(guide[n], W_dec[i])|)

kernels/dot.py has the dot product. A score is rounded at each of its factors from left to right.

Shapes   x (N, D), W_enc (F, D), b_enc (F), latents (n_latents) or None; scale (F), guide
         (N, D_out), W_dec (F, D_out); places (N, room), counts (N) as kernels/select.py gives
         them.
Dtypes   x, W_enc, b_enc, W_dec fp32, bf16 or fp16, each on its own; scale, guide, values, scores
         fp32; the rest int32.
Not finite  A candidate whose product with the guide is not finite has NaN as its value.
Order    No atomics; a program reads nothing that it wrote.
Bytes    D·itemsize for each candidate, with a guide also D_out·itemsize: those of k and a few more;
         all else is small.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsae.kernels.checks import Variant
from fastsae.kernels.dot import dots


class Score(NamedTuple):
    """What makes the score, where that is not h."""

    scale: Tensor | None = None
    absolute: bool = False
    guide: Tensor | None = None
    W_dec: Tensor | None = None

    @property
    def constexprs(self) -> dict[str, bool]:
        has_scale, has_guide = self.scale is not None, self.guide is not None
        return {"HAS_SCALE": has_scale, "ABSOLUTE": self.absolute, "HAS_GUIDE": has_guide}

    @property
    def changes(self) -> bool:
        """Whether scores are other numbers than values."""
        return any(self.constexprs.values())

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """A kernel's pointers, size and strides."""
        if self.guide is None or self.W_dec is None:
            return self.scale, None, None, None, None, None
        guide, W_dec = self.guide, self.W_dec
        return self.scale, guide, W_dec, guide.shape[1], guide.stride(0), W_dec.stride(0)


@triton.jit
def scores(
    x_ptr, W_ptr, bias_ptr, latents_ptr, scale_ptr, guide_ptr, W_dec_ptr, n, place,
    D, D_out, stride_x, stride_W, stride_guide, stride_W_dec,
    HAS_BIAS: tl.constexpr, HAS_LATENTS: tl.constexpr, HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr, HAS_GUIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """h and score of token n and the latents at C places; of no meaning for place -1."""
    token = tl.zeros([1], tl.int64) + n
    latent = place
    if HAS_LATENTS:
        latent = tl.load(latents_ptr + place, mask=place >= 0, other=-1)
    h = dots(x_ptr, W_ptr, bias_ptr, token, latent, D, stride_x, stride_W, HAS_BIAS, C)
    score = tl.abs(h) if ABSOLUTE else h
    if HAS_SCALE:
        score *= tl.load(scale_ptr + latent, mask=latent >= 0, other=0.0)
    if HAS_GUIDE:
        along = tl.abs(dots(
            guide_ptr, W_dec_ptr, None, token, latent, D_out, stride_guide, stride_W_dec, False, C
        ))  # fmt: skip
        score *= 1 + along
        h = tl.where(along < float("inf"), h, float("nan"))
    return h, score


@triton.jit
def _score_kernel(
    x_ptr,  # (N, D) any float
    W_ptr,  # (F, D) any float
    bias_ptr,  # (F) any float, or None
    latents_ptr,  # (n_latents) int32, or None
    places_ptr,  # (N, ROOM) int32
    counts_ptr,  # (N) int32
    values_ptr,  # (out) (N, ROOM) fp32
    scores_ptr,  # (out) (N, ROOM) fp32, or None where they are the values
    D,
    ROOM,
    stride_x,
    stride_W,
    scale_ptr,  # (F) fp32, or None
    guide_ptr,  # (N, D_out) fp32, or None
    W_dec_ptr,  # (F, D_out) any float, or None
    D_out,
    stride_guide,
    stride_W_dec,
    HAS_BIAS: tl.constexpr,
    HAS_LATENTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    HAS_GUIDE: tl.constexpr,
    C: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + n)
    for start in range(0, count, C):
        at = start + tl.arange(0, C)
        place = tl.load(places_ptr + n * ROOM + at, mask=at < count, other=-1)
        h, score = scores(
            x_ptr, W_ptr, bias_ptr, latents_ptr, scale_ptr, guide_ptr, W_dec_ptr, n, place,
            D, D_out, stride_x, stride_W, stride_guide, stride_W_dec,
            HAS_BIAS, HAS_LATENTS, HAS_SCALE, ABSOLUTE, HAS_GUIDE, C,
        )  # fmt: skip
        tl.store(values_ptr + n * ROOM + at, tl.where(place >= 0, h, 0.0), mask=at < count)
        if HAS_SCALE or ABSOLUTE or HAS_GUIDE:
            score = tl.where(place >= 0, score, 0.0)
            tl.store(scores_ptr + n * ROOM + at, score, mask=at < count)


def score_candidates(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    places: Tensor,
    counts: Tensor,
    score: Score,
) -> tuple[Tensor, Tensor | None]:
    """values and scores (N, room) of the candidates; None for scores that are the values."""
    values = torch.empty(places.shape, dtype=torch.float32, device=x.device)
    scores = torch.empty_like(values) if score.changes else None
    has = {"HAS_BIAS": b_enc is not None, "HAS_LATENTS": latents is not None} | score.constexprs
    _score_kernel[(len(x),)](
        *(x, W_enc, b_enc, latents, places, counts, values, scores, x.shape[1], places.shape[1]),
        *(x.stride(0), W_enc.stride(0), *score.arguments),
        **has,
        **SCORE_CONFIG,
    )
    return values, scores


# Every product is rounded before it is added.
SCORE_CONFIG = {"C": 16, "num_warps": 4, "enable_fp_fusion": False}


PLAIN = Score()
# By name; what tests compile, of the eight that there are.
FORMS: dict[str, dict[str, bool]] = {
    "": PLAIN.constexprs,
    "-absolute": {"HAS_SCALE": True, "ABSOLUTE": True, "HAS_GUIDE": False},
    "-guide": {"HAS_SCALE": True, "ABSOLUTE": True, "HAS_GUIDE": True},
}


def forms() -> Iterator[tuple[str, str, str, dict[str, bool]]]:
    """Of the inputs: name, signature before and after the sizes, constexprs."""
    for w in ("bf16", "fp32", "fp16"):
        for form, score in FORMS.items():
            for bias, latents in ((False, False), (True, False), (True, True)):
                if latents != bias and (form or w == "fp16"):
                    continue
                b, ids = "*fp32:16" if bias else "None", "*i32:16" if latents else "None"
                scale = "*fp32:16" if score["HAS_SCALE"] else "None"
                guide = f"*fp32:16, *{w}:16, i32:16, i32:16, i32:16"
                guide = guide if score["HAS_GUIDE"] else "None, None, None, None, None"
                name = w + "-bias" * bias + "-latents" * latents + form
                config = {"HAS_BIAS": bias, "HAS_LATENTS": latents} | score
                yield name, f"*fp32:16, *{w}:16, {b}, {ids}", f"{scale}, {guide}", config


def variants() -> dict[str, Variant]:
    """What the launcher ships, by name."""
    found = {}
    for name, inputs, score, config in forms():
        scores = "*fp32:16" if any(config[what] for what in PLAIN.constexprs) else "None"
        found[f"score-{name}"] = Variant(
            _score_kernel,
            f"{inputs}, *i32:16, *i32:16, *fp32:16, {scores}, i32:16, i32:16, i32:16, i32:16, "
            + score,
            config | SCORE_CONFIG,
        )
    return found
