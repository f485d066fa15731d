"""From a rule that looks at a batch or ranks, to thresholds that look at one pair at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastsae import ops
from fastsae.sae import SAE
from fastsae.selection import JumpReLU, TopK
from fastsae.selection.base import score_scale


def log_thresholds(thresholds: Tensor, d_sae: int) -> Tensor:
    """What JumpReLU's state holds of thresholds (F) or 0-d: (F) float32, at least log 2⁻¹²⁶."""
    return thresholds.float().expand(d_sae).clamp(min=2.0**-126).log()


@torch.no_grad()
def to_jumprelu(sae: SAE, x: Tensor | None = None) -> SAE:
    """A JumpReLU SAE with the scale of the data and the decoder's norms folded into the weights.

    A rule that tracks thresholds (BatchTopK, Mutual Choice, Matryoshka, Feature Choice) keeps them.
    TopK gets one for all latents, the k·n-th largest value among the n tokens of x, the post-hoc
    conversion of Llama Scope (He et al. 2024, 2410.20526), which takes n = 32768; ValueError
    without x. The result is in evaluation mode; sae stays as it is. A threshold below 2⁻¹²⁶ becomes
    that; a latent that its rule shut out has the threshold inf.
    """
    rule, config = sae.config.selection, sae.config
    thresholds = rule.inference_thresholds(sae.selection_state, sae.W_dec)
    if thresholds is None and not isinstance(rule, TopK):
        raise ValueError(f"selection: expected TopK or a rule with thresholds, got {rule}")
    if thresholds is None and x is None:
        raise ValueError("x: expected tokens to choose the threshold on, got None")
    jump = JumpReLU()
    new = SAE(
        replace(config, selection=jump, multi_topk_coef=0.0),
        device=sae.W_dec.device,
        precision=sae.precision,
        backend=sae.backend,
    )
    own = dict(new.named_parameters()) | dict(new.named_buffers())
    for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
        if not name.startswith("selection_state."):
            own[name].copy_(tensor)
    if thresholds is None:
        assert isinstance(rule, TopK) and x is not None
        call = sae._call(sae._scaled(x), None)
        scale = score_scale(call, rule.score)
        budget = rule.k * len(call.x)
        vals, idx, _ = ops.encode_batch(*call.encoder, budget=budget, scale=scale, **call.options)
        there = idx >= 0
        if not bool(there.any()):
            raise ValueError("x: expected tokens with a positive pre-activation, got none")
        scores = vals if scale is None else vals * scale[idx.clamp(min=0).long()]
        thresholds = scores[there].min()
        thresholds = thresholds if scale is None else thresholds / scale
    log_threshold = log_thresholds(thresholds, config.d_sae)
    new.selection_state.log_threshold.copy_(log_threshold)  # type: ignore[operator]
    new.fold_scale_()
    if config.decoder_norm == "free":
        new.fold_decoder_norm_()
    return new.eval()
