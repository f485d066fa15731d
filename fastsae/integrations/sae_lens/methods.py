"""Which of SAELens's methods have a stand-in, and how one takes a method's place."""

from __future__ import annotations

import functools
from typing import Any

import torch
from sae_lens.saes import (
    batchtopk_sae,
    jumprelu_sae,
    matryoshka_batchtopk_sae,
    standard_sae,
    topk_sae,
    transcoder,
)
from sae_lens.saes.sae import SAE, TrainingSAE

from fastsae.integrations.library import Replacements
from fastsae.integrations.sae_lens import decoding, encoding
from fastsae.integrations.sae_lens.acts import coverable, leaving_out
from fastsae.integrations.sae_lens.encoding import Method

PROVEN = ("6.54.12",)
"""The versions of SAELens that the tests ran with."""


def _left_out(original: Method, sae: Any, *args: Any, **kwargs: Any) -> Any:
    """`forward` and `training_forward_pass`: as they are, without the matrices (N, F)."""
    if not coverable(sae):
        return original(sae, *args, **kwargs)
    with leaving_out(sae):
        return original(sae, *args, **kwargs)


METHODS: tuple[tuple[type, str, Method], ...] = (
    (SAE, "forward", _left_out),
    (topk_sae.TopKTrainingSAE, "forward", _left_out),
    (transcoder.Transcoder, "forward", _left_out),
    (transcoder.SkipTranscoder, "forward", _left_out),
    (TrainingSAE, "training_forward_pass", _left_out),
    (TrainingSAE, "encode", encoding.encode_training),
    (topk_sae.TopKSAE, "encode", encoding.encode_best),
    (jumprelu_sae.JumpReLUSAE, "encode", encoding.encode_active),
    (standard_sae.StandardSAE, "encode", encoding.encode_active),
    (transcoder.Transcoder, "encode", encoding.encode_active),
    (transcoder.JumpReLUTranscoder, "encode", encoding.encode_active),
    (topk_sae.TopKTrainingSAE, "encode_with_hidden_pre", encoding.encode_best_with_hidden_pre),
    (
        jumprelu_sae.JumpReLUTrainingSAE,
        "encode_with_hidden_pre",
        encoding.encode_near_with_hidden_pre,
    ),
    (TrainingSAE, "decode", decoding.decode),
    (topk_sae.TopKTrainingSAE, "decode", decoding.decode),
    (topk_sae.TopKSAE, "decode", decoding.decode),
    (jumprelu_sae.JumpReLUSAE, "decode", decoding.decode),
    (standard_sae.StandardSAE, "decode", decoding.decode),
    (transcoder.Transcoder, "decode", decoding.decode),
    (topk_sae.TopKTrainingSAE, "calculate_topk_aux_loss", decoding.topk_aux_loss),
    (
        batchtopk_sae.BatchTopKTrainingSAE,
        "update_topk_threshold",
        decoding.update_topk_threshold,
    ),
    (
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
        "_iterable_decode",
        decoding.iterable_decode,
    ),
    (
        matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE,
        "calculate_matryoshka_aux_loss",
        decoding.matryoshka_aux_loss,
    ),
    (jumprelu_sae.JumpReLUTrainingSAE, "calculate_aux_loss", decoding.jumprelu_aux_loss),
)
"""(class, method, what stands in its place, which gets the method it replaces first)."""
COVERED = (
    topk_sae.TopKSAE,
    topk_sae.TopKTrainingSAE,
    jumprelu_sae.JumpReLUSAE,
    jumprelu_sae.JumpReLUTrainingSAE,
    standard_sae.StandardSAE,
    transcoder.Transcoder,
)
"""SAEs of other classes, which share some of the methods, keep them."""

replacements = Replacements()
"""What the classes had before `accelerate`, and have instead."""


def instead_of(original: Method, stand_in: Method) -> Method:
    """A method that calls the stand-in with the original.

    torch.compile leaves it out, but not the methods of SAEs that keep them.
    """
    fast = torch.compiler.disable(functools.partial(stand_in, original))

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, SAE) and not isinstance(self, COVERED):
            return original(self, *args, **kwargs)
        return fast(self, *args, **kwargs)

    return method


def inherited(cls: type, name: str) -> Method:
    """SAELens's own method of this name, accelerated or not."""
    owner = next(c for c in cls.__mro__ if name in c.__dict__)
    return replacements.originals.get((owner, name), owner.__dict__[name])
