"""A SparseCoder's encode and forward by codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import ForwardOutput
from torch import Tensor
from torch.nn import functional as F

from fastsae import ops
from fastsae.integrations.sparsify.functions import best, with_gradient


def _encoder(coder: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    encoder = coder.encoder
    return encoder.weight, encoder.bias, None if coder.cfg.transcode else coder.b_dec


def _pre_acts(coder: Any, x: Tensor) -> Tensor:
    W_enc, b_enc, pre_bias = _encoder(coder)
    return F.linear(x if pre_bias is None else x - pre_bias, W_enc, b_enc).relu_()


@torch.no_grad()
def _select(coder: Any, x: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """As `best` of all pre-activations of x (N, D), which are not made.

    Tokens with fewer than k positive ones are left to `best`: the library completes a token with
    latents that are 0, and other code may expect k different ones.
    """
    inputs = x, *_encoder(coder)
    if activation == "topk":
        vals, idx = ops.encode(*inputs, k=k)
        idx = idx.long()
    elif activation == "groupmax":
        vals, idx = ops.encode_groups(*inputs, groups=k)
        idx, order = idx.long().sort(dim=1)
        vals = vals.gather(1, order)
    else:
        raise ValueError(f"activation: expected topk or groupmax, got {activation!r}")
    short = (idx < 0).any(1)
    if short.any():
        values, idx[short] = best(_pre_acts(coder, x[short]), k, activation)
        vals[short] = values.to(vals.dtype)
    return vals, idx


def _codes(coder: Any, x: Tensor, k: int, activation: str, parity: bool) -> tuple[Tensor, Tensor]:
    """`_select`, with gradients."""
    vals, idx = _select(coder, x, k, activation)
    return with_gradient(vals, idx, x, *_encoder(coder), parity), idx


class _LazyOutput(EncoderOutput):
    """An EncoderOutput that computes the dense pre_acts when they are read."""

    def __new__(cls, top_acts: Tensor, top_indices: Tensor, pre_acts: Callable[[], Tensor]) -> Any:
        return super().__new__(cls, top_acts, top_indices, pre_acts)

    def __getitem__(self, item: Any) -> Any:
        return tuple(self)[item]

    def __iter__(self) -> Iterator[Tensor]:
        yield self.top_acts
        yield self.top_indices
        yield self.pre_acts

    @property
    def pre_acts(self) -> Tensor:
        return tuple.__getitem__(self, 2)()


def encode(coder: Any, x: Tensor, parity: bool) -> EncoderOutput:
    cfg, shape = coder.cfg, x.shape[:-1]
    vals, idx = _codes(coder, x.reshape(-1, x.shape[-1]), cfg.k, cfg.activation, parity)

    def pre_acts() -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not parity):
            return _pre_acts(coder, x)

    return _LazyOutput(vals.to(coder.dtype).view(*shape, -1), idx.view(*shape, -1), pre_acts)


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
    vals, idx = _codes(coder, x, cfg.k, cfg.activation, parity)
    sse, error, out = error_of(vals, idx, b_dec, y_wide if skip is None else y_wide - skip)
    assert out is not None
    out = out if skip is None else out + skip

    auxk_loss = multi_topk_fvu = sse.new_zeros(())
    if dead_mask is not None and (n_dead := int(dead_mask.sum())) > 0:
        k_aux = y.shape[-1] // 2
        latents = dead_mask.nonzero()[:, 0].to(torch.int32)
        acts, ids = ops.encode(x, *_encoder(coder), k=min(k_aux, n_dead), latents=latents)
        square = error_of(detached(acts), ids, None, -error.detach())[0]
        auxk_loss = min(n_dead / k_aux, 1.0) * square / total_variance
    if cfg.multi_topk:  # replaces the outputs, too, and leaves the skip connection out
        vals, idx = _codes(coder, x, 4 * cfg.k, "topk", parity)
        square, _, out = error_of(detached(vals), idx, b_dec, y_wide)
        multi_topk_fvu = square / total_variance
        assert out is not None
    out, vals = out.to(coder.dtype), vals.to(coder.dtype)
    return ForwardOutput(out, vals, idx, sse / total_variance, auxk_loss, multi_topk_fvu)
