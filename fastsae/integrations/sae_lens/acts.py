"""What stands for SAELens's feature_acts and hidden_pre inside of an accelerated call.

An accelerated call (`leaving_out`) is SAELens's own forward or training_forward_pass, whose
`encode` returns Lazy matrices (N…, F) that carry what they are made of:

    feature_acts.origin   Acts: the selected pairs
    hidden_pre.origin     Source: the encoder's inputs and, for JumpReLU, the pairs near θ

`encode` outside of such a call returns plain matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.codes import Codes
from fastsae.integrations.lazy import Lazy, lazy, lazy_codes

MIN_TOKENS = 256
"""From how many tokens on a copy of W_enc by latents pays for itself."""
MIN_TOKENS_IN_PLACE = 8
"""From how many on the encoder is faster where W_enc is stored so."""


class Acts(NamedTuple):
    """Where feature_acts come from, differentiable."""

    pairs: Codes
    """What W_dec is multiplied with."""
    scaled: Codes
    """What SAELens calls so: times the scale of their latents."""


class Source(NamedTuple):
    """What pre-activations are made of: (x rowsᵀ + b_enc), times scale (F) where given."""

    x: Tensor
    """(N, D), centred."""
    rows: Tensor
    """(F, D): W_enc by latents."""
    b_enc: Tensor
    scale: Tensor | None
    near: Codes | None = None
    """JumpReLU's pairs of which the loss may depend on h or θ."""

    def columns(self, latents: Tensor) -> Tensor:
        """Pre-activations of some latents (n), not scaled: (N, n), differentiable."""
        return self.x @ self.rows[latents].T + self.b_enc[latents]

    def matrix(self, shape: torch.Size) -> Lazy:
        """All of them, made if somebody looks."""

        def make(x: Tensor, rows: Tensor, b_enc: Tensor, *scale: Tensor) -> Tensor:
            h = x @ rows.T + b_enc
            return (h * scale[0]).to(h.dtype) if scale else h

        inputs = [self.x, self.rows, self.b_enc.clone()]  # b_enc as it is now
        hidden_pre = lazy(make, shape, *inputs, *([] if self.scale is None else [self.scale]))
        hidden_pre.origin = self
        return hidden_pre


def scaled(pairs: Codes, scale: Tensor | None, dtype: torch.dtype) -> Codes:
    """Pairs times the scale (F) of their latents."""
    vals = pairs.vals
    if scale is not None:
        vals = vals * ops.of_latents(scale, pairs.idx, pairs.row_ptr)
    return replace(pairs, vals=vals.to(dtype))


def lazy_acts(pairs: Codes, scale: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Lazy:
    """feature_acts of this shape."""
    codes = scaled(pairs, scale, dtype)
    acts = lazy_codes(codes, shape)
    acts.origin = Acts(pairs, codes)
    return acts


def plain(acts: Tensor) -> Tensor:
    """feature_acts as a plain tensor, differentiable."""
    if not isinstance(acts, Lazy):
        return acts
    return acts.clone() if acts.codes is None else acts.origin.scaled.to_dense().view(acts.shape)


def pairs_of(acts: Tensor) -> Codes | None:
    """The pairs of feature_acts, unless somebody may have written to the matrix."""
    if not isinstance(acts, Lazy) or acts.codes is None or not isinstance(acts.origin, Acts):
        return None
    return acts.origin.pairs


def source_of(hidden_pre: Tensor) -> Source | None:
    """Where hidden_pre comes from, unless somebody may have written to the matrix."""
    if not isinstance(hidden_pre, Lazy) or hidden_pre.state.made is not None:
        return None
    return hidden_pre.origin if isinstance(hidden_pre.origin, Source) else None


# ---- whether a call can be accelerated ----

_owner: ContextVar[Any] = ContextVar("_owner", default=None)


@contextmanager
def leaving_out(sae: Any) -> Iterator[None]:
    """Inside, `encode` of this SAE leaves out matrices (N, F)."""
    token = _owner.set(sae)
    try:
        yield
    finally:
        _owner.reset(token)


def is_left_out(sae: Any) -> bool:
    return _owner.get() is sae


def hooked(*points: nn.Module) -> bool:
    """Whether something looks at what passes here."""
    if nn.modules.module._has_any_global_hook():
        return True
    return any(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
        or type(point).__name__ not in ("HookPoint", "SparseHookPoint", "Identity")
        for point in points
    )


def computable(sae: Any) -> bool:
    """Whether fastsae has kernels for these parameters where they are."""
    tensors = (sae.W_enc, sae.W_dec, sae.b_dec, sae.b_enc)
    if ops.choose_backend(*tensors) == "reference":
        return False
    return not torch._C._are_functorch_transforms_active()


def coverable(sae: Any) -> bool:
    """Whether nothing needs the matrices (N, F) of a forward."""
    return not hooked(sae.hook_sae_acts_pre, sae.hook_sae_acts_post) and computable(sae)


def latent_rows(sae: Any, n_tokens: int) -> Tensor | None:
    """W_enc (D, F) as (F, D), differentiable; None where making it costs more than it saves."""
    bound = sae.__dict__.get("bound_rows")  # in a fused step
    if bound is not None:
        return bound
    rows = sae.W_enc.T
    least = MIN_TOKENS_IN_PLACE if rows.is_contiguous() else MIN_TOKENS
    return rows.contiguous() if n_tokens >= least else None
