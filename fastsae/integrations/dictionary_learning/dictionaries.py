"""The library's dictionaries, which encode, decode and reconstruct by codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
from torch import Tensor, nn

from fastsae import ops
from fastsae.codes import Codes
from fastsae.integrations.library import check_version
from fastsae.reference import TooManyPairs
from fastsae.selection.per_pair import pair_limit

PROVEN = ("0.1.0",)
"""The versions of dictionary-learning that the tests ran with; others need force=True."""

Rows = Sequence[Tensor]
"""W_enc (F, D), b_enc (F), W_dec (F, D), b_dec (D)."""


def _rows(p: nn.Parameter, transposed: bool) -> Tensor:
    """p, or pᵀ: (F, D), contiguous; p is laid out anew where a file was assigned to it."""
    if not (p.T if transposed else p).is_contiguous():
        with torch.inference_mode(False):
            moved = (p.data.T if transposed else p.data).contiguous()
            p.data = moved.T if transposed else moved
    return p.T if transposed else p


class Sparse(dictionary.Dictionary):
    """What the dictionaries share: theirs where the work is dense by nature or by its outputs."""

    theirs: ClassVar[Any]
    """The library's class."""
    use_threshold: ClassVar[bool]
    """Whether `forward` selects by the threshold."""

    def __init__(self, *args: Any, force: bool = False, **kwargs: Any) -> None:
        check_version("dictionary-learning", PROVEN, force)
        super().__init__(*args, **kwargs)
        self.rows()

    @classmethod
    def sharing(cls, dictionary: nn.Module, *, force: bool = False) -> Any:
        """A dictionary of this class with the very parameters of one of the library's."""
        check_version("dictionary-learning", PROVEN, force)
        ours = cls.__new__(cls)
        ours.__dict__.update(dictionary.__dict__)
        ours.rows()
        return ours

    @classmethod
    def from_pretrained(cls, *args: Any, force: bool = False, **kwargs: Any) -> Any:
        """As the library's."""
        return cls.sharing(cls.theirs.from_pretrained(*args, **kwargs), force=force)

    def rows(self) -> Rows:
        """The parameters as the kernels read them: views, so that gradients reach them."""
        if hasattr(self, "encoder"):
            W_enc, W_dec = _rows(self.encoder.weight, False), _rows(self.decoder.weight, True)
            return [W_enc, self.encoder.bias, W_dec, self.b_dec]
        return [_rows(self.W_enc, True), self.b_enc, _rows(self.W_dec, False), self.b_dec]

    # ---- what is left to the library; in a trace of nnsight x is no tensor ----

    def _takes(self, x: Any) -> bool:
        """Whether the kernels give what the library's layers would give for x."""
        return (
            isinstance(x, Tensor)
            and x.ndim > 0
            and self.is_plain("encoder")
            and self.is_plain("decoder")
            and torch.promote_types(x.dtype, self.b_dec.dtype) == self.b_dec.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not torch._C._are_functorch_transforms_active()
            and not nn.modules.module._has_any_global_hook()
        )

    def _encodes(self, x: Any) -> bool:
        """As _takes; one token is encoded as fast by a dense product."""
        return self._takes(x) and x.numel() > x.shape[-1]

    def is_plain(self, name: str) -> bool:
        """Whether a method or layer is as in this module: not overridden, replaced or hooked."""
        own = getattr(self, name, None)
        if isinstance(own, nn.Module):
            hooks = [own._forward_hooks, own._forward_pre_hooks]
            hooks += [own._backward_hooks, own._backward_pre_hooks]
            return type(own) is nn.Linear and not any(hooks)
        return own is None or getattr(own, "__module__", None) == __name__

    # ---- codes, of leading dimensions flattened ----

    def choose(self, x: Tensor, rows: Rows) -> Codes:
        """The codes of x (…, D) in the form of training, of parameters that may not be its own."""
        raise NotImplementedError

    def codes(self, x: Tensor, use_threshold: bool) -> Codes | None:
        """The codes of x (…, D); None where they are too dense."""
        if not use_threshold:
            return self.choose(x, self.rows())
        if not self.threshold >= 0:
            return None  # not learned yet: every positive pre-activation passes; NaN: none
        return self.above(x, self.threshold, self.b_dec)

    def above(self, x: Tensor, thresholds: Tensor, pre_bias: Tensor | None) -> Codes | None:
        """The codes of the pairs above thresholds (0-d or F) of at least 0; None if too many."""
        W_enc, b_enc, _, _ = self.rows()
        tokens, f = x.reshape(-1, x.shape[-1]), len(W_enc)
        limit = pair_limit(len(tokens), f)
        try:
            vals, idx, row_ptr = ops.encode_threshold(
                tokens, W_enc, b_enc, pre_bias, thresholds=thresholds, limit=limit
            )
        except TooManyPairs:
            return None
        return Codes(vals, idx, f, row_ptr)

    # ---- what the library's users call ----

    def features(self, x: Any, use_threshold: bool) -> Tensor | None:
        """The dense features (…, F) of x (…, D), or None where the library must make them."""
        codes = self.codes(x, use_threshold) if self._encodes(x) else None
        return None if codes is None else self._dense(codes, x)

    def decode(self, f: Any) -> Any:
        """As the library's; sparse where f is and needs no gradient."""
        fits = self._takes(f) and f.shape[-1] == self.dict_size
        fits = fits and f.dtype == self.b_dec.dtype  # others the library refuses
        if fits and not (f.requires_grad and torch.is_grad_enabled()):
            flat = f.reshape(-1, f.shape[-1])
            if int(flat.count_nonzero()) <= pair_limit(*flat.shape):
                return self._decode(Codes.from_dense(flat), f)
        return super().decode(f)

    def forward(self, x: Any, output_features: bool = False) -> Any:
        """As the library's: x̂ (…, D), or x̂ and the dense features (…, F)."""
        whole = self.is_plain("encode") and self.is_plain("decode")
        codes = self.codes(x, self.use_threshold) if whole and self._encodes(x) else None
        if codes is None:
            return super().forward(x, output_features)
        x_hat = self._decode(codes, x)
        return (x_hat, self._dense(codes, x)) if output_features else x_hat

    def _decode(self, codes: Codes, like: Tensor) -> Tensor:
        _, _, W_dec, b_dec = self.rows()
        x_hat = ops.decode(codes.vals, codes.idx, W_dec, b_dec, row_ptr=codes.row_ptr)
        return x_hat.view(*like.shape[:-1], len(b_dec))

    def _dense(self, codes: Codes, like: Tensor) -> Tensor:
        return codes.to_dense().to(self.b_dec.dtype).view(*like.shape[:-1], codes.n_latents)


class AutoEncoderTopK(Sparse, top_k.AutoEncoderTopK):
    """The library's, by codes."""

    theirs = top_k.AutoEncoderTopK
    use_threshold = False

    def choose(self, x: Tensor, rows: Rows) -> Codes:
        W_enc, b_enc, _, b_dec = rows
        tokens = x.reshape(-1, x.shape[-1])
        vals, idx = ops.encode(tokens, W_enc, b_enc, b_dec, k=int(self.k))
        return Codes(vals, idx, len(W_enc))

    def encode(self, x: Any, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """As the library's, which is called where its dense pre-activations are asked for."""
        f = None if return_topk else self.features(x, use_threshold)
        return super().encode(x, return_topk, use_threshold) if f is None else f


class BatchBudget(Sparse):
    """What the dictionaries with one budget for the batch share."""

    use_threshold = True

    def choose(self, x: Tensor, rows: Rows) -> Codes:
        W_enc, b_enc, _, b_dec = rows
        tokens, budget = x.reshape(-1, x.shape[-1]), int(self.k) * len(x)
        vals, idx, row_ptr = ops.encode_batch(tokens, W_enc, b_enc, b_dec, budget=budget)
        return Codes(vals, idx, len(W_enc), row_ptr)

    def encode(self, x: Any, return_active: bool = False, use_threshold: bool = True) -> Any:
        """As the library's, which is called where its dense pre-activations are asked for."""
        f = None if return_active else self.features(x, use_threshold)
        return super().encode(x, return_active, use_threshold) if f is None else f


class BatchTopKSAE(BatchBudget, batch_top_k.BatchTopKSAE):
    """The library's, by codes."""

    theirs = batch_top_k.BatchTopKSAE


class MatryoshkaBatchTopKSAE(BatchBudget, matryoshka_batch_top_k.MatryoshkaBatchTopKSAE):
    """The library's, by codes."""

    theirs = matryoshka_batch_top_k.MatryoshkaBatchTopKSAE

    def codes(self, x: Tensor, use_threshold: bool) -> Codes | None:
        if x.ndim != 2 and self.active_groups < len(self.group_sizes):
            return None  # the library silences the wrong dimension
        return super().codes(x, use_threshold)

    def choose(self, x: Tensor, rows: Rows) -> Codes:
        return self._active(super().choose(x, rows))

    def above(self, x: Tensor, thresholds: Tensor, pre_bias: Tensor | None) -> Codes | None:
        codes = super().above(x, thresholds, pre_bias)
        return None if codes is None else self._active(codes)

    def _active(self, codes: Codes) -> Codes:
        return codes.only(codes.idx < int(self.group_indices[self.active_groups]))


class JumpReluAutoEncoder(Sparse, dictionary.JumpReluAutoEncoder):
    """The library's, by codes; its trainer makes the features itself."""

    theirs = dictionary.JumpReluAutoEncoder
    use_threshold = True

    def codes(self, x: Tensor, use_threshold: bool) -> Codes | None:
        pre_bias = self.b_dec if self.apply_b_dec_to_input else None
        if bool(self.threshold.isnan().any()):
            return None
        return self.above(x, self.threshold.clamp(min=0), pre_bias)

    def encode(self, x: Any, output_pre_jump: bool = False) -> Any:
        """As the library's, which is called where its dense pre-activations are asked for."""
        f = None if output_pre_jump else self.features(x, True)
        return super().encode(x, output_pre_jump) if f is None else f


def accelerated(dictionary: nn.Module, *, force: bool = False) -> Any:
    """A dictionary of this module that shares the parameters of one of the library's.

    TypeError for a class that has no faster form here.
    """
    for cls in (AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder):
        if type(dictionary) is cls.theirs:
            return cls.sharing(dictionary, force=force)
    raise TypeError(
        "dictionary: expected an AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE or "
        f"JumpReluAutoEncoder of dictionary_learning, got {type(dictionary).__qualname__}"
    )
