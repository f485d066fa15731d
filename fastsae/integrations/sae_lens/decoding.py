"""SAELens's decoders and losses, in the place of its methods; see encoding.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import Step, calculate_pre_act_loss
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from fastsae import ops
from fastsae.blocked import row_norms
from fastsae.codes import Codes
from fastsae.integrations.lazy import Lazy
from fastsae.integrations.sae_lens.acts import Source, computable, pairs_of, scaled, source_of
from fastsae.integrations.sae_lens.encoding import Method
from fastsae.ops.backend import resolve
from fastsae.ops.encoding import EncodeFunction
from fastsae.selection.per_pair import pair_limit

BLOCK = 2**22
"""Elements of a block of dead latents' pre-activations."""
MIN_PRODUCT = 2**21
"""From how many multiplications on it pays to look for the nonzeros of a dense matrix."""


# ---- decode ----


def decode(original: Method, sae: Any, feature_acts: Tensor) -> Tensor:
    """The `decode` of every SAE: a sum over the active pairs, where these are few."""
    pairs = pairs_of(feature_acts)
    if pairs is None and not isinstance(feature_acts, Lazy) and computable(sae):
        pairs = _nonzeros(sae, feature_acts)
    if pairs is None:
        return original(sae, feature_acts)
    out = ops.decode(pairs.vals, pairs.idx, sae.W_dec, row_ptr=pairs.row_ptr) + sae.b_dec
    out = sae.hook_sae_recons(out.view(*feature_acts.shape[:-1], out.shape[1]))
    if isinstance(sae, Transcoder):
        return out
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(out), sae.d_head)


def _nonzeros(sae: Any, acts: Tensor) -> Codes | None:
    """The pairs of a plain matrix; None where they are many, or it wants a gradient."""
    d_sae = len(sae.W_dec)
    wants_gradient = torch.is_grad_enabled() and acts.requires_grad
    if wants_gradient or acts.layout != torch.strided or not acts.is_floating_point():
        return None
    if acts.ndim < 1 or acts.shape[-1] != d_sae or acts.device != sae.W_dec.device:
        return None
    matrix = acts.detach().reshape(-1, d_sae)
    if len(matrix) * sae.W_dec.numel() < MIN_PRODUCT:
        return None
    if int(matrix.count_nonzero()) > pair_limit(len(matrix), d_sae):
        return None
    codes = Codes.from_dense(matrix)
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return codes
    if len(codes.idx) < d_sae and not (torch.is_grad_enabled() and sae.W_dec.requires_grad):
        return replace(codes, vals=codes.vals / row_norms(sae.W_dec[codes.idx.long()]))
    return scaled(codes, 1 / row_norms(sae.W_dec), codes.vals.dtype)


# ---- AuxK ----


def topk_aux_loss(
    original: Method,
    sae: Any,
    sae_in: Tensor,
    sae_out: Tensor,
    hidden_pre: Tensor,
    dead_neuron_mask: Tensor | None,
) -> Tensor:
    """TopKTrainingSAE.calculate_topk_aux_loss."""
    source, k_aux = source_of(hidden_pre), sae_in.shape[-1] // 2
    dead = None if dead_neuron_mask is None else dead_neuron_mask.nonzero()[:, 0]
    refused = sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
    if source is None or dead is None or not len(dead) or refused or not k_aux:
        return original(sae, sae_in, sae_out, hidden_pre, dead_neuron_mask)
    recons = _dead_reconstruction(sae, source, dead, k_aux)
    recons = sae.reshape_fn_out(recons.view(*hidden_pre.shape[:-1], recons.shape[1]), sae.d_head)
    loss = (recons - (sae_in - sae_out).detach()).pow(2).sum(dim=-1).mean()
    return sae.cfg.aux_loss_coefficient * min(len(dead) / k_aux, 1.0) * loss


def matryoshka_aux_loss(
    original: Method,
    sae: Any,
    sae_in: Tensor,
    sae_out: Tensor,
    feature_acts: Tensor,
    hidden_pre: Tensor,
    dead_neuron_mask: Tensor | None,
) -> Tensor:
    """MatryoshkaBatchTopKTrainingSAE.calculate_matryoshka_aux_loss."""
    source, k_aux = source_of(hidden_pre), sae_in.shape[-1] // 2
    dead = None if dead_neuron_mask is None else dead_neuron_mask.nonzero()[:, 0]
    if source is None or dead is None or not len(dead) or not k_aux:
        return original(sae, sae_in, sae_out, feature_acts, hidden_pre, dead_neuron_mask)
    total, start = sae_out.new_zeros(()), 0
    for width, partial_out in sae._iterable_decode(feature_acts, include_outer_loss=True):
        level = dead[(dead >= start) & (dead < width)]
        start = width
        if len(level):
            recons = _dead_reconstruction(sae, source, level, k_aux)
            loss = (recons - (sae_in - partial_out).detach()).pow(2).sum(dim=-1).mean()
            total = total + min(len(level) / k_aux, 1.0) * loss
    return sae.cfg.aux_loss_coefficient * total


def _dead_reconstruction(sae: Any, source: Source, dead: Tensor, k_aux: int) -> Tensor:
    """Σ h W_dec over each token's k_aux dead latents of the largest (scaled) h: (N, D).

    As in SAELens h may be negative, which `ops.encode` does not choose.
    """
    vals, idx = _largest_dead(source, dead, min(k_aux, len(dead)))
    x, rows, b_enc, *_ = source
    backend = resolve(None, x, rows, b_enc)
    vals, idx = EncodeFunction.apply(x, rows, b_enc, None, backend, _given, vals, idx)
    return ops.decode(vals, idx, sae.W_dec)


def _given(x: Tensor, W: Tensor, b: Tensor, vals: Tensor, idx: Tensor, backend: str) -> Any:
    return vals, idx


@torch.no_grad()
def _largest_dead(source: Source, dead: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """h and latents (N, k); in blocks of tokens."""
    x, rows, b_enc, scale, _ = source
    rows, b_enc = rows[dead].float(), b_enc[dead].float()
    vals = x.new_empty(len(x), k, dtype=torch.float32)
    idx = vals.new_empty(len(x), k, dtype=torch.int32)
    size = max(1, BLOCK // len(dead))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), size):
            some = slice(start, start + size)
            h = x[some].float() @ rows.T + b_enc
            best = (h if scale is None else h * scale[dead]).topk(k, sorted=False).indices
            vals[some], idx[some] = h.gather(1, best), dead[best].to(torch.int32)
    return vals, idx


# ---- BatchTopK and Matryoshka ----


@torch.no_grad()
def update_topk_threshold(original: Method, sae: Any, acts_topk: Tensor) -> None:
    """BatchTopKTrainingSAE.update_topk_threshold."""
    codes = acts_topk.codes if isinstance(acts_topk, Lazy) else None
    if codes is None:
        return original(sae, acts_topk)
    positive = codes.vals[codes.vals > 0]
    if len(positive):
        lr, threshold = sae.cfg.topk_threshold_lr, sae.topk_threshold
        sae.topk_threshold = (1 - lr) * threshold + lr * positive.min().to(threshold.dtype)


def iterable_decode(
    original: Method, sae: Any, feature_acts: Tensor, include_outer_loss: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """MatryoshkaBatchTopKTrainingSAE._iterable_decode: what each level adds, in one decode."""
    pairs = pairs_of(feature_acts)
    if pairs is None or feature_acts.ndim != 2:
        yield from original(sae, feature_acts, include_outer_loss)
        return
    widths = sae.cfg.matryoshka_widths[: None if include_outer_loss else -1]
    if not widths:
        return
    order, idx, row_ptr = _by_level(pairs, widths, len(feature_acts))
    parts = ops.decode(pairs.vals.reshape(-1)[order], idx, sae.W_dec, row_ptr=row_ptr)
    parts, decoded = parts.view(len(feature_acts), len(widths), -1), sae.b_dec
    for level, width in enumerate(widths):
        decoded = parts[:, level] + decoded
        yield width, sae.run_time_activation_norm_fn_out(decoded)


def _by_level(pairs: Codes, widths: list[int], n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs' order by (token, level), their latents, and the bounds (N · levels + 1).

    Latents beyond the last width become padding.
    """
    idx, device = pairs.idx.reshape(-1), pairs.idx.device
    token = pairs.token_ids()
    ends = torch.tensor(widths, device=device)
    level = torch.searchsorted(ends, idx.long(), right=True).clamp(max=len(widths) - 1)
    order = (token * len(widths) + level).argsort(stable=True)
    row_ptr = torch.zeros(n_tokens * len(widths) + 1, dtype=torch.int64, device=device)
    counts = (token * len(widths) + level).bincount(minlength=n_tokens * len(widths))
    row_ptr[1:] = counts.cumsum(0)
    return order, idx.where(idx < widths[-1], -1)[order], row_ptr


# ---- JumpReLU ----


def jumprelu_aux_loss(
    original: Method,
    sae: Any,
    step_input: TrainStepInput,
    feature_acts: Tensor,
    hidden_pre: Tensor,
    sae_out: Tensor,
) -> dict[str, Tensor]:
    """JumpReLUTrainingSAE.calculate_aux_loss."""
    source, active, cfg = source_of(hidden_pre), pairs_of(feature_acts), sae.cfg
    known = cfg.jumprelu_sparsity_loss_mode in ("step", "tanh") or cfg.target_l0
    if source is None or source.near is None or active is None or not known:
        return original(sae, step_input, feature_acts, hidden_pre, sae_out)
    near = source.near
    theta = ops.of_latents(sae.threshold, near.idx, near.row_ptr)
    if cfg.jumprelu_sparsity_loss_mode == "tanh":
        norm = ops.of_latents(row_norms(sae.W_dec), near.idx, near.row_ptr)
        terms = torch.tanh(cfg.jumprelu_tanh_scale * active.vals * norm)
    else:
        terms = Step.apply(near.vals[None], theta, sae.bandwidth, cfg.jumprelu_ste_to_input)[0]
    token = near.token_ids()
    per_token = terms.new_zeros(len(source.x)).index_add(0, token, terms)
    if cfg.jumprelu_sparsity_loss_mode == "quadratic":
        per_token = 2 / cfg.target_l0 * (per_token - cfg.target_l0) ** 2
    losses = {"l0_loss": (step_input.coefficients["l0"] * per_token).mean()}
    if cfg.pre_act_loss_coefficient is not None:
        losses["pre_act_loss"] = _pre_act_loss(sae, source, step_input.dead_neuron_mask)
    return losses


def _pre_act_loss(sae: Any, source: Source, dead_neuron_mask: Tensor | None) -> Tensor:
    """SAELens's, of the dead latents alone."""
    dead = None if dead_neuron_mask is None else dead_neuron_mask.nonzero()[:, 0]
    if dead is None or not len(dead):
        return source.x.new_zeros(())
    return calculate_pre_act_loss(
        sae.cfg.pre_act_loss_coefficient,
        sae.threshold[dead],
        source.columns(dead),
        torch.ones_like(dead, dtype=torch.bool),
        row_norms(sae.W_dec)[dead],
    )
