"""SAELens's encoders, in the place of its methods: each takes the method it stands for first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.jumprelu_sae import JumpReLU
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from fastsae import ops
from fastsae.blocked import row_norms
from fastsae.codes import Codes
from fastsae.integrations.sae_lens.acts import (
    Source,
    computable,
    coverable,
    hooked,
    is_left_out,
    latent_rows,
    lazy_acts,
    leaving_out,
    plain,
    scaled,
)
from fastsae.reference import NotFinite, TooManyPairs
from fastsae.selection.per_pair import pair_limit

Method = Callable[..., Any]
Choose = Callable[[Any, Source], Codes]


class Encoded(NamedTuple):
    pairs: Codes
    source: Source
    shape: torch.Size
    """Of feature_acts."""


def _encoded(sae: Any, x: Tensor, choose: Choose) -> Encoded | None:
    """The pairs of x (…, D); None where SAELens's own way is the better or the only one."""
    if hooked(sae.hook_sae_input):
        return None  # else its hooks would run twice where this ends with None below
    n_tokens = x.numel() // sae.cfg.d_in
    rows = latent_rows(sae, n_tokens)
    if rows is None or not x.is_floating_point():
        return None
    sae_in = sae.process_sae_in(x)
    rescale = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    scale = row_norms(sae.W_dec) if rescale else None
    source = Source(sae_in.reshape(-1, rows.shape[1]), rows, sae.b_enc, scale)
    shape = torch.Size([*sae_in.shape[:-1], len(rows)])
    try:
        return Encoded(choose(sae, source), source, shape)
    except TooManyPairs:
        return None
    except NotFinite:  # SAELens carries infinities and NaN on
        return None


# ---- the rules ----


def _has_budget(sae: Any) -> bool:
    rule, d_sae = sae.activation_fn, sae.cfg.d_sae
    if type(rule) is TopK:
        return rule.k <= d_sae and not rule.use_sparse_activations
    return type(rule) is BatchTopK and rule.k <= d_sae


def _best(sae: Any, source: Source) -> Codes:
    x, rows, b_enc, scale, _ = source
    rule = sae.activation_fn
    scale = None if scale is None else scale.detach()
    row_ptr = None
    if type(rule) is TopK:
        vals, idx = ops.encode(x, rows, b_enc, k=rule.k, scale=scale)
    else:
        vals, idx, row_ptr = ops.encode_batch(
            x, rows, b_enc, budget=int(rule.k * len(x)), scale=scale
        )
    return Codes(vals, idx, len(rows), row_ptr)


def _above(sae: Any, source: Source, thresholds: Tensor) -> Codes:
    x, rows, b_enc, *_ = source
    limit = pair_limit(len(x), len(rows))
    vals, idx, row_ptr = ops.encode_threshold(x, rows, b_enc, thresholds=thresholds, limit=limit)
    return Codes(vals, idx, len(rows), row_ptr)


def _active(sae: Any, source: Source) -> Codes:
    """ReLU, or JumpReLU at inference, whose threshold has no gradient."""
    theta = getattr(sae, "threshold", None)
    theta = source.x.new_zeros(()) if theta is None else theta.detach().clamp(min=0)
    return _above(sae, source, theta)


def _near(sae: Any, source: Source) -> Codes:
    """JumpReLU in training: also the pairs in the window below θ, which have a gradient."""
    return _above(sae, source, sae.threshold.detach() - 0.5001 * sae.bandwidth)


# ---- the methods ----


def _encode(original: Method, sae: Any, x: Tensor, choose: Choose) -> Tensor:
    if not is_left_out(sae) and (hooked(sae.hook_sae_acts_pre) or not computable(sae)):
        return original(sae, x)
    found = _encoded(sae, x, choose)
    if found is None:
        return original(sae, x)
    scale = found.source.scale
    if is_left_out(sae):
        return lazy_acts(found.pairs, scale, found.shape, sae.dtype)
    acts = scaled(found.pairs, scale, sae.dtype).to_dense().view(found.shape)
    return sae.hook_sae_acts_post(acts)


def encode_best(original: Method, sae: Any, x: Tensor) -> Tensor:
    """TopKSAE.encode."""
    return _encode(original, sae, x, _best) if _has_budget(sae) else original(sae, x)


def encode_active(original: Method, sae: Any, x: Tensor) -> Tensor:
    """The `encode` of StandardSAE, JumpReLUSAE, Transcoder and JumpReLUTranscoder."""
    is_relu = type(sae.activation_fn) is nn.ReLU
    return _encode(original, sae, x, _active) if is_relu else original(sae, x)


def encode_training(original: Method, sae: Any, x: Tensor) -> Tensor:
    """TrainingSAE.encode: no hidden_pre."""
    if is_left_out(sae) or not coverable(sae):
        return original(sae, x)
    with leaving_out(sae):
        acts, _ = sae.encode_with_hidden_pre(x)
    return plain(acts)


def encode_best_with_hidden_pre(original: Method, sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """TopKTrainingSAE.encode_with_hidden_pre, also that of BatchTopK and Matryoshka."""
    found = _encoded(sae, x, _best) if is_left_out(sae) and _has_budget(sae) else None
    if found is None:
        return original(sae, x)
    pairs, source, shape = found
    return lazy_acts(pairs, source.scale, shape, sae.dtype), source.matrix(shape)


def encode_near_with_hidden_pre(original: Method, sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """JumpReLUTrainingSAE.encode_with_hidden_pre."""
    found = _encoded(sae, x, _near) if is_left_out(sae) else None
    if found is None:
        return original(sae, x)
    near, source, shape = found
    theta = ops.of_latents(sae.threshold, near.idx, near.row_ptr)
    # One row: SAELens sums the gradient of θ over the rows, which here are the pairs' own.
    z = JumpReLU.apply(near.vals[None], theta, sae.bandwidth, sae.cfg.jumprelu_ste_to_input)[0]
    acts = lazy_acts(replace(near, vals=z), None, shape, sae.dtype)
    return acts, source._replace(near=near).matrix(shape)
