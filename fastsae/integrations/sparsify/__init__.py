"""A backend for sparsify (eai-sparsify): its SparseCoder by codes, its two kernels replaced.

    from fastsae.integrations import sparsify as fast
    fast.accelerate()                    # until .restore(); or: with fast.accelerate(): ...

Forward values, files and what its Trainer reads stay as they are. The gradients are those of the
forward computation, where the library's encoder drops some: see `accelerate`. docs/sparsify.md has
the limits.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import ForwardOutput, SparseCoder
from torch import Tensor

from fastsae import ops
from fastsae.integrations.library import Accelerated, Replacement, Replacements, check_version
from fastsae.integrations.sparsify import coder, schedule_free
from fastsae.integrations.sparsify.functions import Activation, decoder_impl, fused_encoder

__all__ = ["PROVEN", "Accelerated", "accelerate", "decoder_impl", "fused_encoder"]

PROVEN = ("1.3.3",)
"""The versions of eai-sparsify that the tests ran with; others need force=True."""

_replacements = Replacements()


def accelerate(*, parity: bool = False, fused: bool = True, force: bool = False) -> Accelerated:
    """Makes every SparseCoder, existing ones too, faster until `restore` is called.

    Of several calls, which must agree, the last one's `restore` puts the library's own back.

    parity: the encoder gets the library's gradients instead: none from AuxK and Multi-TopK, and
    some for selected latents that are 0. (Its backward ignores the gradient of the pre-activations
    and does not apply the ReLU's.)
    fused: False replaces `fused_encoder` and `decoder_impl` alone, for a SparseCoder with a forward
    of its own; its AuxK and Multi-TopK then cost dense products. True replaces the SparseCoder's
    encode, forward and operations on unit rows too, and the step of the default optimiser.
    force: also with versions other than PROVEN.
    RuntimeError for those, and where a call with another parity or fused is in force.
    """
    check_version("eai-sparsify", PROVEN, force)
    check_version("schedulefree", schedule_free.PROVEN, force)

    return _replacements.add_owner(lambda: _replacing(parity, fused), parity=parity, fused=fused)


def _replacing(parity: bool, fused: bool) -> list[Replacement]:
    def library(name: str) -> Any:  # sparsify.fused_encoder is a module and what it holds
        return importlib.import_module(f"sparsify.{name}")

    own_encoder = library("fused_encoder").fused_encoder
    own_encode, own_decode = SparseCoder.encode, SparseCoder.decode
    own_forward = SparseCoder.forward

    def encoder(
        input: Tensor, weight: Tensor, bias: Tensor, k: int, activation: Activation
    ) -> EncoderOutput:
        if _autocast(input):
            return own_encoder(input, weight, bias, k, activation)
        return fused_encoder(input, weight, bias, k, activation, parity=parity)

    def encode(self: Any, x: Tensor) -> EncoderOutput:
        return own_encode(self, x) if _autocast(x) else coder.encode(self, x, parity)

    def forward(
        self: Any,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        whole = _method(self, "encode") is encode and _method(self, "decode") is own_decode
        if not whole or _autocast(x):
            options = {"dead_mask": dead_mask, "total_variance": total_variance}
            return own_forward(self, x, y, **options)
        return coder.forward(self, x, y, dead_mask, total_variance, parity)

    replacements = [
        (library("sparse_coder"), "fused_encoder", encoder),
        (library("fused_encoder"), "fused_encoder", encoder),
        (library("sparse_coder"), "decoder_impl", decoder_impl),
        (library("utils"), "decoder_impl", decoder_impl),
    ]
    if fused:
        step = schedule_free.faster(ScheduleFreeWrapper.step)
        replacements += [
            (SparseCoder, "encode", encode),
            (SparseCoder, "forward", forward),
            (SparseCoder, "set_decoder_norm_to_unit_norm", _normalize),
            (SparseCoder, "remove_gradient_parallel_to_decoder_directions", _project),
            (ScheduleFreeWrapper, "step", step),
        ]
    return replacements


def _autocast(x: Tensor) -> bool:
    """Whether the library would multiply in 16 bits. On a GPU its forward always does."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def _method(coder: Any, name: str) -> Any:
    """The function that coder.name() calls: its class's, or one given to this coder alone."""
    return getattr(getattr(coder, name), "__func__", None)


@torch.no_grad()
def _normalize(self: Any) -> None:
    ops.normalize_rows_(self.W_dec)


@torch.no_grad()
def _project(self: Any) -> None:
    ops.project_rows_(self.W_dec.grad, self.W_dec)
