"""The library's two functions by codes."""

from __future__ import annotations

from typing import Literal

import torch
from sparsify.fused_encoder import EncoderOutput
from torch import Tensor
from torch.nn import functional as F

from fastsae import ops
from fastsae.integrations.lazy import lazy
from fastsae.ops.encoding import EncodeFunction

Activation = Literal["topk", "groupmax"]


def fused_encoder(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    activation: Activation,
    *,
    pre_bias: Tensor | None = None,
    parity: bool = False,
) -> EncoderOutput:
    """The k latents of (input - pre_bias) @ weightᵀ + bias that the activation selects.

    input (…, D), weight (F, D), bias (F), pre_bias (D); top_acts (…, k), top_indices (…, k) int64.
    pre_acts (…, F), after the ReLU, are computed when something uses them; RuntimeError if input or
    weights were written to before. parity: as `accelerate`. ValueError for numbers that are not
    finite.
    """
    tokens, shape = input.reshape(-1, input.shape[-1]), input.shape[:-1]
    vals, idx = codes(tokens, weight, bias, pre_bias, k, activation, parity)
    given = [t if t is None or not parity else t.detach() for t in (weight, bias, input, pre_bias)]
    pre_acts = lazy(
        _pre_acts, torch.Size([*shape, len(weight)]), *(t for t in given if t is not None)
    )
    return EncoderOutput(vals.to(weight.dtype).view(*shape, k), idx.view(*shape, k), pre_acts)


def decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """Σ top_acts·W_dec[:, top_indices] a token: (N, D). top_* (N, k), W_dec (D, F)."""
    return ops.decode(top_acts, top_indices.to(torch.int32), W_dec.mT)


def codes(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    pre_bias: Tensor | None,
    k: int,
    activation: str,
    parity: bool,
) -> tuple[Tensor, Tensor]:
    """top_acts, float32 or wider, and top_indices of x (N, D), with the gradients of the encoder.

    Of selected zeros only with parity, as the library has them.
    """
    inputs = x, W_enc, b_enc, pre_bias
    vals, idx = _select(*inputs, k, activation)
    chosen = idx.to(torch.int32)
    chosen = chosen if parity else chosen.where(vals > 0, -1)
    backend = ops.choose_backend(*inputs)
    return EncodeFunction.apply(*inputs, backend, lambda *_: (vals, chosen))[0], idx


@torch.no_grad()
def _select(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, pre_bias: Tensor | None, k: int, activation: str
) -> tuple[Tensor, Tensor]:
    """Values and ids (N, k): by value descending with "topk", by group with "groupmax".

    Dense where that is as fast, for one token or more than a tenth of the latents, and where a
    token has fewer than k positive pre-activations: the library completes it with latents that are
    0, and other code may expect k different ones.
    """
    inputs = x, W_enc, b_enc, pre_bias
    if activation not in ("topk", "groupmax"):
        raise ValueError(f"activation: expected topk or groupmax, got {activation!r}")
    if len(x) == 1 or 10 * k > len(W_enc):
        return _best(_pre_acts(W_enc, b_enc, x, pre_bias), k, activation)
    if activation == "topk":
        vals, small = ops.encode(*inputs, k=k)
        idx = small.long()
    else:
        vals, small = ops.encode_groups(*inputs, groups=k)
        idx, order = small.long().sort(dim=1)
        vals = vals.gather(1, order)
    short = (idx < 0).any(1)
    if short.any():
        best, idx[short] = _best(_pre_acts(W_enc, b_enc, x[short], pre_bias), k, activation)
        vals[short] = best.to(vals.dtype)
    return vals, idx


def _best(pre_acts: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "topk":
        return pre_acts.topk(k)
    n_latents = pre_acts.shape[1]
    vals, within = pre_acts.unflatten(1, (k, -1)).max(-1)
    return vals, within + torch.arange(0, n_latents, n_latents // k, device=within.device)


def _pre_acts(W_enc: Tensor, b_enc: Tensor, x: Tensor, pre_bias: Tensor | None = None) -> Tensor:
    return F.linear(x if pre_bias is None else x - pre_bias, W_enc, b_enc).relu_()
