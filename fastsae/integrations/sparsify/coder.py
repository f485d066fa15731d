"""A SparseCoder's encode and forward by codes."""

from __future__ import annotations

from typing import Any

import torch
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import ForwardOutput
from torch import Tensor

from fastsae import ops
from fastsae.integrations.sparsify.functions import codes, fused_encoder


def _encoder(coder: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    encoder = coder.encoder
    return encoder.weight, encoder.bias, None if coder.cfg.transcode else coder.b_dec


def encode(coder: Any, x: Tensor, parity: bool) -> EncoderOutput:
    """SparseCoder.encode."""
    weight, bias, pre_bias = _encoder(coder)
    k, activation = coder.cfg.k, coder.cfg.activation
    return fused_encoder(x, weight, bias, k, activation, pre_bias=pre_bias, parity=parity)


def forward(
    coder: Any,
    x: Tensor,
    y: Tensor | None,
    dead_mask: Tensor | None,
    total_variance: Tensor | None,
    parity: bool,
) -> ForwardOutput:
    cfg, W_dec, b_dec = coder.cfg, coder.W_dec, coder.b_dec
    y = x if y is None else y
    y_wide = y.to(torch.promote_types(W_dec.dtype, torch.float32))
    skip = None if coder.W_skip is None else x.to(coder.dtype) @ coder.W_skip.mT

    def error_of(
        vals: Tensor, idx: Tensor, bias: Tensor | None, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return ops.reconstruction_error(vals, idx.to(torch.int32), W_dec, bias, target)

    def detached(vals: Tensor) -> Tensor:
        return vals.detach() if parity else vals

    if total_variance is None:
        total_variance = (y - y.mean(0)).pow(2).sum()

    def share_of_variance(square: Tensor) -> Tensor:
        share = square / total_variance
        narrow = torch.promote_types(y.dtype, coder.dtype)  # of the library's squares
        return share.to(torch.promote_types(narrow, total_variance.dtype))

    encoder = _encoder(coder)
    vals, idx = codes(x, *encoder, cfg.k, cfg.activation, parity)
    sse, error, out = error_of(vals, idx, b_dec, y_wide if skip is None else y_wide - skip)
    assert out is not None
    out = out if skip is None else out + skip

    auxk_loss = multi_topk_fvu = W_dec.new_zeros(())
    if dead_mask is not None and (n_dead := int(dead_mask.sum())) > 0:
        k_aux = y.shape[-1] // 2
        latents = dead_mask.nonzero()[:, 0].to(torch.int32)
        acts, ids = ops.encode(x, *encoder, k=min(k_aux, n_dead), latents=latents)
        square = error_of(detached(acts), ids, None, -error.detach())[0]
        auxk_loss = share_of_variance(min(n_dead / k_aux, 1.0) * square)
    if cfg.multi_topk:  # replaces the outputs, too, and leaves the skip connection out
        vals, idx = codes(x, *encoder, 4 * cfg.k, "topk", parity)
        square, _, out = error_of(detached(vals), idx, b_dec, y_wide)
        multi_topk_fvu = share_of_variance(square)
        assert out is not None
    out, vals = out.to(coder.dtype), vals.to(coder.dtype)
    return ForwardOutput(out, vals, idx, share_of_variance(sse), auxk_loss, multi_topk_fvu)
