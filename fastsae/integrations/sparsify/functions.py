"""The library's two functions, and what its encoder and ours share."""

from __future__ import annotations

from typing import Literal

import torch
from sparsify.fused_encoder import EncoderOutput
from torch import Tensor
from torch.nn import functional as F

from fastsae import ops
from fastsae.ops.encoding import EncodeFunction

Activation = Literal["topk", "groupmax"]


def fused_encoder(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    activation: Activation,
    *,
    parity: bool = False,
) -> EncoderOutput:
    """The k latents of input (N, D) @ weight (F, D)ᵀ + bias (F) that the activation selects.

    top_acts (N, k), top_indices (N, k) int64 and pre_acts (N, F), after the ReLU. parity: as
    `accelerate`.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not parity):
        pre_acts = F.linear(input, weight, bias).relu_()
    vals, idx = best(pre_acts.detach(), k, activation)
    vals = with_gradient(vals, idx, input, weight, bias, None, parity)
    return EncoderOutput(vals, idx, pre_acts)


def decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """Σ top_acts·W_dec[:, top_indices] a token: (N, D). top_* (N, k), W_dec (D, F)."""
    return ops.decode(top_acts, top_indices.to(torch.int32), W_dec.mT)


def best(pre_acts: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """Values and int64 ids of what the activation selects; with "topk", by value descending."""
    if activation == "topk":
        return pre_acts.topk(k)
    if activation == "groupmax":
        vals, within = pre_acts.unflatten(-1, (k, -1)).max(-1)
        return vals, within + torch.arange(k, device=within.device) * (pre_acts.shape[-1] // k)
    raise ValueError(f"activation: expected topk or groupmax, got {activation!r}")


def with_gradient(
    vals: Tensor,
    idx: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    pre_bias: Tensor | None,
    parity: bool,
) -> Tensor:
    """vals, with the gradients of the encoder: for selected zeros only as the library has them."""
    chosen = idx.to(torch.int32)
    chosen = chosen if parity else chosen.where(vals > 0, -1)
    backend = ops.choose_backend(x, W_enc, b_enc, pre_bias)
    inputs = x, W_enc, b_enc, pre_bias, backend
    return EncodeFunction.apply(*inputs, lambda *_: (vals, chosen))[0]
