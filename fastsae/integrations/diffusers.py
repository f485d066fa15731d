"""Steering a diffusion pipeline of diffusers through its text encoder, as Concept Steerers do.

    prompt             x + λ s        the text encoder's first call
    negative prompt    x − λ s        its second call, where guidance asks for one

Kim and Ghadiyaram (2025, arXiv 2501.19066), eq. 5 and their released code: s is an SAE's view of a
concept's states (`fastsae.steering.concept`), λ < 0 removes the concept. Classifier-free guidance
goes away from the second towards the first, so both changes push the image the same way.

Relied on is `encode_prompt`, which a pipeline calls once for each image or batch, and in it the
order of the text encoder's calls: the prompts first, then the negative prompts if it was called
with do_classifier_free_guidance. Any other number of calls, as where embeddings are given instead
of prompts, is an error. The encoder must have blocks that `fastsae.sites` finds: CLIP has.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.sites import Site, edited, find_module, output_of
from fastsae.steering import toward


@torch.no_grad()
def states(
    pipeline: Any,
    prompt: str,
    layer: int,
    *,
    site: Site = "residual",
    encoder: str = "text_encoder",
) -> Tensor:
    """What the layer (counted from 1) returns for a prompt, padding included: (L, D)."""
    module = _module(pipeline, encoder, site, layer)
    known = inspect.signature(pipeline.encode_prompt).parameters
    options = {
        "prompt": prompt,
        "device": next(module.parameters()).device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    given = {name: value for name, value in options.items() if name in known}
    return output_of(module, lambda: pipeline.encode_prompt(**given))[0]


@contextlib.contextmanager
def steered(
    pipeline: Any,
    layer: int,
    direction: Tensor,
    strength: float,
    *,
    site: Site = "residual",
    encoder: str = "text_encoder",
) -> Iterator[None]:
    """Within it, images are made with strength · direction added for the prompt, and subtracted for
    the negative prompt.

    direction (D) or (L, D), as of `fastsae.steering.concept` of `states`. encoder: the pipeline's
    attribute; enter it once for each where it has several. ValueError, before an image is made: the
    text encoder was not called as described above.
    """
    module = _module(pipeline, encoder, site, layer)
    changes = toward(direction, strength), toward(direction, -strength)
    encode_prompt = pipeline.encode_prompt
    signature = inspect.signature(encode_prompt)
    calls: int | None = None  # in this encode_prompt; None outside of it

    def change(x: Tensor) -> Tensor:
        nonlocal calls
        if calls is None:
            return x
        calls += 1
        return changes[min(calls, 2) - 1](x)

    @functools.wraps(encode_prompt)
    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        given = signature.bind(*args, **options)
        given.apply_defaults()
        guided = bool(given.arguments.get("do_classifier_free_guidance", False))
        calls = 0
        try:
            found = encode_prompt(*args, **options)
            if calls != 1 + guided:
                wanted = "2, for prompt and negative prompt" if guided else "1, without guidance"
                raise ValueError(
                    f"{encoder}: expected calls in encode_prompt: {wanted}; got {calls}; "
                    "give texts instead of embeddings, and negative_prompt='' instead of none"
                )
        finally:
            calls = None
        return found

    before = vars(pipeline).get("encode_prompt")
    pipeline.encode_prompt = counted
    try:
        with edited(module, change):
            yield
    finally:
        del pipeline.encode_prompt
        if before is not None:
            pipeline.encode_prompt = before


def _module(pipeline: Any, encoder: str, site: Site, layer: int) -> nn.Module:
    name = type(pipeline).__name__
    if not callable(getattr(pipeline, "encode_prompt", None)):
        raise TypeError(f"pipeline: expected one with encode_prompt, got {name}")
    net = getattr(pipeline, encoder, None)
    if not isinstance(net, nn.Module):
        raise ValueError(f"encoder: expected the name of a text encoder of {name}, got {encoder!r}")
    return find_module(net, site, layer)
