"""Which tokens a direction of the residual stream makes likelier, read off a model's weights.

The direct logit effect of a direction d on token v is

    Σ_j U[v, j] γ[j] d[j]

U (V, D): the unembedding, γ (D): the scale of the final norm. That is how far the logit of v moves
along d where the final norm divides by 1. Left out: what the norm divides by, a factor above 0 that
differs from token to token; the mean that a LayerNorm subtracts; biases; and all that blocks after
the direction make of it. So effects rank tokens, and compare directions of one norm; they are no
logits. No matrix of directions times V exists: the streaming encoder keeps the largest few.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.models import LanguageModel

_BLOCK_ROWS = 4096  # directions that are encoded in one call


class Effects(NamedTuple):
    """Tokens and the effects on them; a row a direction, the largest |effect| first."""

    ids: Tensor
    """(F, n) int32; -1 pads where fewer tokens have an effect of that sign."""
    values: Tensor
    """(F, n) float32; 0 pads."""


@torch.no_grad()
def folded_unembedding(model: LanguageModel) -> Tensor:
    """U·γ (V, D) float32: rows of the unembedding times the final norm's scale.

    The final norm is the module without parts, and with "norm" in its class's name, whose output
    the unembedding reads: found in a run on one token. ValueError: a model that is not causal, that
    names no unembedding, or whose unembedding reads no norm's output.
    """
    if not model.causal:
        raise ValueError(f"{model.name}: expected a causal language model, got an encoder")
    named = getattr(model.net, "get_output_embeddings", lambda: None)()
    if not isinstance(named, nn.Module) or not isinstance(named.weight, Tensor):
        raise ValueError(
            f"{model.name}: expected an unembedding from get_output_embeddings(), got "
            f"{type(named).__name__}"
        )
    U = named.weight.detach().float()
    return U * _scale_of(_final_norm(model, named), U.shape[1], U.device)


@torch.no_grad()
def logit_effects(unembedding: Tensor, directions: Tensor, n: int) -> tuple[Effects, Effects]:
    """The n tokens that each direction promotes and suppresses most: (promoted, suppressed).

    unembedding (V, D) as `folded_unembedding` gives it, directions (F, D), as the rows of a W_dec.
    Promoted are effects above 0, suppressed those below; equal ones by id. ValueError: other
    widths, n < 1, numbers that are not finite.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if directions.ndim != 2 or directions.shape[1] != unembedding.shape[1]:
        raise ValueError(
            f"directions: expected shape (rows, {unembedding.shape[1]}), as the unembedding is "
            f"wide, got {tuple(directions.shape)}"
        )
    n = min(n, len(unembedding))
    rows = directions.detach().float().to(unembedding.device).split(_BLOCK_ROWS)
    found = []
    for sign in (1, -1):
        blocks = [ops.encode(sign * some, unembedding, k=n) for some in rows]
        values, ids = (torch.cat(column) for column in zip(*blocks, strict=True))
        found.append(Effects(ids.cpu(), sign * values.cpu()))
    return found[0], found[1]


def _final_norm(model: LanguageModel, unembedding: nn.Module) -> nn.Module:
    outputs: list[tuple[nn.Module, Tensor]] = []  # kept, so that no two lie in the same memory
    read: list[Tensor] = []

    def keep(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output))

    modules = [m for m in model.net.modules() if not any(m.children())]
    norms = [m for m in modules if "norm" in type(m).__name__.lower()]
    handles = [norm.register_forward_hook(keep) for norm in norms]
    handles.append(unembedding.register_forward_pre_hook(lambda _, args: read.extend(args[:1])))
    try:
        first = torch.zeros(1, 1, dtype=torch.int64, device=next(model.net.parameters()).device)
        model.net(input_ids=first, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for norm, output in outputs:
        if read and output.data_ptr() == read[-1].data_ptr():
            return norm
    raise ValueError(
        f"{model.name}: expected an unembedding that reads the output of a norm, got none among "
        f"the {len(norms)} norms of {type(model.net).__name__}"
    )


def _scale_of(norm: nn.Module, width: int, device: torch.device) -> Tensor:
    """γ (width), measured: norms store it in several ways, Gemma's as γ - 1.

    On ±x of mean 0 an RMSNorm and a LayerNorm both give ±γ x / rms(x), plus a bias; x is so large
    that what they add to its square, for safety, is lost.
    """
    signs = 1.0 - 2.0 * (torch.arange(width, device=device) % 2)
    x = 1024 * (signs - signs.mean())
    norm = copy.deepcopy(norm).float()
    there, back = norm(x[None, None]), norm(-x[None, None])
    return (there - back)[0, 0] / 2 / (x / x.square().mean().sqrt())
