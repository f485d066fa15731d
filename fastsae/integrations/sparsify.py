"""A backend for sparsify (eai-sparsify): its SparseCoder by codes, its two kernels replaced.

    from fastsae.integrations import sparsify as fast
    fast.accelerate()                    # until .restore(); or: with fast.accelerate(): ...

Forward values, files and what its Trainer reads stay as they are. The gradients are those of the
forward computation, where the library's encoder drops some: see `accelerate`. docs/sparsify.md has
the limits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import ForwardOutput, SparseCoder
from torch import Tensor
from torch.nn import functional as F

from fastsae import ops
from fastsae.integrations.library import Accelerated, check_version
from fastsae.ops.encoding import EncodeFunction

PROVEN = ("1.3.3",)
"""The versions of eai-sparsify that the tests ran with; others need force=True."""

Activation = Literal["topk", "groupmax"]


def accelerate(*, parity: bool = False, fused: bool = True, force: bool = False) -> Accelerated:
    """Makes every SparseCoder, existing ones too, faster until `restore` is called.

    parity: the encoder gets the library's gradients instead: none from AuxK and Multi-TopK, and
    some for selected latents that are 0. (Its backward ignores the gradient of the pre-activations
    and does not apply the ReLU's.)
    fused: False replaces `fused_encoder` and `decoder_impl` alone, as a SparseCoder with a forward
    of its own needs it; all pre-activations are then computed and kept.
    force: also with versions other than PROVEN.
    RuntimeError for those, and where it is accelerated already.
    """
    check_version("eai-sparsify", PROVEN, force)

    def encoder(
        input: Tensor, weight: Tensor, bias: Tensor, k: int, activation: Activation
    ) -> EncoderOutput:
        return fused_encoder(input, weight, bias, k, activation, parity=parity)

    def encode(self: Any, x: Tensor) -> EncoderOutput:
        return _encode(self, x, parity)

    def forward(
        self: Any,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        return _forward(self, x, y, dead_mask, total_variance, parity)

    # The package binds the name of the module fused_encoder to the module, so import it by name.
    coder, utils = (importlib.import_module(f"sparsify.{m}") for m in ("sparse_coder", "utils"))
    replacements = [
        (coder, "fused_encoder", encoder),
        (importlib.import_module("sparsify.fused_encoder"), "fused_encoder", encoder),
        (coder, "decoder_impl", decoder_impl),
        (utils, "decoder_impl", decoder_impl),
    ]
    if fused:
        replacements += [
            (SparseCoder, "encode", encode),
            (SparseCoder, "forward", forward),
            (SparseCoder, "set_decoder_norm_to_unit_norm", _normalize),
            (SparseCoder, "remove_gradient_parallel_to_decoder_directions", _project),
        ]
    return Accelerated(replacements)


# ---- the library's two functions ----


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
    vals, idx = _best(pre_acts.detach(), k, activation)
    vals = _with_gradient(vals, idx, input, weight, bias, None, parity)
    return EncoderOutput(vals, idx, pre_acts)


def decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """Σ top_acts·W_dec[:, top_indices] a token: (N, D). top_* (N, k), W_dec (D, F)."""
    return ops.decode(top_acts, top_indices.to(torch.int32), W_dec.mT)


def _best(pre_acts: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """Values and int64 ids of what the activation selects; with "topk", by value descending."""
    if activation == "topk":
        return pre_acts.topk(k)
    if activation == "groupmax":
        vals, within = pre_acts.unflatten(-1, (k, -1)).max(-1)
        return vals, within + torch.arange(k, device=within.device) * (pre_acts.shape[-1] // k)
    raise ValueError(f"activation: expected topk or groupmax, got {activation!r}")


def _with_gradient(
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


# ---- the whole SparseCoder ----


def _encoder(coder: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    encoder = coder.encoder
    return encoder.weight, encoder.bias, None if coder.cfg.transcode else coder.b_dec


def _pre_acts(coder: Any, x: Tensor) -> Tensor:
    W_enc, b_enc, pre_bias = _encoder(coder)
    return F.linear(x if pre_bias is None else x - pre_bias, W_enc, b_enc).relu_()


@torch.no_grad()
def _select(coder: Any, x: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """As `_best` of all pre-activations of x (N, D), which are not made.

    Tokens with fewer than k positive ones are left to `_best`: the library completes a token with
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
        best = _best(_pre_acts(coder, x[short]), k, activation)
        vals[short], idx[short] = best[0].to(vals.dtype), best[1]
    return vals, idx


def _codes(coder: Any, x: Tensor, k: int, activation: str, parity: bool) -> tuple[Tensor, Tensor]:
    """`_select`, with gradients."""
    vals, idx = _select(coder, x, k, activation)
    return _with_gradient(vals, idx, x, *_encoder(coder), parity), idx


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


def _encode(coder: Any, x: Tensor, parity: bool) -> EncoderOutput:
    cfg, shape = coder.cfg, x.shape[:-1]
    vals, idx = _codes(coder, x.reshape(-1, x.shape[-1]), cfg.k, cfg.activation, parity)

    def pre_acts() -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not parity):
            return _pre_acts(coder, x)

    return _LazyOutput(vals.to(coder.dtype).view(*shape, -1), idx.view(*shape, -1), pre_acts)


def _forward(
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


@torch.no_grad()
def _normalize(self: Any) -> None:
    ops.normalize_rows_(self.W_dec)


@torch.no_grad()
def _project(self: Any) -> None:
    ops.project_rows_(self.W_dec.grad, self.W_dec)
