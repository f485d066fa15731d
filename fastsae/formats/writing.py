"""From an SAE to what other libraries can express: no scale, and one rule for inference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastsae.formats.reading import encoder_bias
from fastsae.sae import SAE
from fastsae.selection import GradientTopK, JumpReLU, Selection, TemporalMask, TopK


@torch.no_grad()
def unscaled(sae: SAE) -> SAE:
    """The SAE in evaluation mode with its scales folded in, in float32 at least where they are.

    It shares the parameters that stay as they are, such as both matrices of an autoencoder.
    """
    own: tuple[str, ...] = ()
    if bool(sae._out_scale != 1):
        own += ("b_enc", "b_dec")
    if bool(sae.input_scale != sae._out_scale):
        own += ("W_enc", "W_skip")
    return _sharing(sae, own).fold_scale_()


@torch.no_grad()
def with_unit_rows(sae: SAE) -> SAE:
    """A copy, in float32 at least, whose decoder rows have norm 1.

    ValueError where that would change the selection.
    """
    return _sharing(sae, own=("W_enc", "b_enc", "W_dec")).fold_decoder_norm_()


def form_of_inference(sae: SAE) -> tuple[Selection, Tensor | None]:
    """The rule that inference follows and, with JumpReLU, the thresholds of h (F) float32.

    A rule that tracks thresholds becomes JumpReLU. ValueError where it has not tracked any yet.
    """
    rule = sae.config.selection
    thresholds = rule.inference_thresholds(sae.selection_state, sae.W_dec)
    if thresholds is not None:
        return JumpReLU(), thresholds.detach().float().expand(sae.config.d_sae).contiguous()
    if isinstance(rule, GradientTopK) or (isinstance(rule, TemporalMask) and rule.base == "topk"):
        return TopK(rule.k), None
    if rule.has_inference_form or isinstance(rule, TemporalMask):
        raise ValueError(f"selection: expected trained thresholds, got a new {rule.name}")
    return rule, None


def bias_of(sae: SAE, centred: bool | None = None) -> Tensor:
    """The encoder's bias (F), zeros where there is none.

    centred: for an encoder that subtracts b_dec from its input, or does not (None: as sae's does).
    """
    if sae.b_enc is None:
        b_enc = torch.zeros(sae.config.d_sae, dtype=sae.W_enc.dtype, device=sae.W_enc.device)
    else:
        b_enc = sae.b_enc.detach()
    if centred is None or centred == sae.config.apply_b_dec_to_input:
        return b_enc
    shift = sae.b_dec.detach()
    moved = encoder_bias(sae.W_enc.detach(), b_enc, shift if centred else -shift)
    return moved.to(torch.promote_types(b_enc.dtype, torch.float32))


def cannot(format: str, sae: SAE, known: str) -> ValueError:
    """The error about an SAE that a format has no words for."""
    kind = "a transcoder" if sae.config.is_transcoder else "an autoencoder"
    return ValueError(
        f"selection: expected what {format} can express ({known}), got {kind} with "
        f"{sae.config.selection.name}"
    )


def _sharing(sae: SAE, own: tuple[str, ...]) -> SAE:
    new = SAE(sae.config, device="meta", precision=sae.precision, backend=sae.backend)
    for name, p in sae.named_parameters(recurse=False):
        setattr(new, name, nn.Parameter(p.detach()))
    for name, b in sae.named_buffers(recurse=False):
        setattr(new, name, b.clone())
    new.selection_state = copy.deepcopy(sae.selection_state)
    for name in own:
        p = getattr(new, name)
        if p is not None:
            wide = torch.promote_types(p.dtype, torch.float32)
            setattr(new, name, nn.Parameter(p.detach().to(wide, copy=True)))
    return new.eval()
