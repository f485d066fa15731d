"""What bench/integrations.py measures of sparsify, in that library's environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else the library itself wants a GPU

import torch
from measure import Case, Shape, Side, tokens
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor

from fastsae.integrations.sparsify import accelerate


def _training(**options: Any) -> Case:
    """What Trainer.fit does with the activations that its hook sees, and its default optimiser."""

    def case(shape: Shape) -> Iterator[Side]:
        n, d, f, k = shape
        sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k))
        optimizer = ScheduleFreeWrapper(
            SignSGD(sae.parameters(), lr=5e-3 / (f / 2**14) ** 0.5), momentum=0.95
        )
        optimizer.train()
        did_fire = torch.zeros(f, dtype=torch.bool)
        since_fired = torch.zeros(f, dtype=torch.int64)

        def step(batch: Tensor) -> None:
            sae.set_decoder_norm_to_unit_norm()
            variance = (batch - batch.mean(0)).pow(2).sum()
            out = sae(x=batch, y=batch, total_variance=variance)
            did_fire[out.latent_indices.flatten()] = True
            out.fvu.backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            since_fired.add_(n)
            since_fired[did_fire] = 0
            did_fire.zero_()

        side = Side(step, lambda batch: sae(batch).fvu)
        yield side
        yield side._replace(on=lambda: accelerate(**options))

    return case


def _inference(n_tokens: int, whole: bool) -> Case:
    """A frozen SparseCoder: decode(encode(x)), or its forward as a whole."""

    def case(shape: Shape) -> Iterator[Side]:
        _, d, f, k = shape
        sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k)).eval()

        @torch.no_grad()
        def step(batch: Tensor) -> Tensor:
            x = tokens(batch, n_tokens)
            if whole:
                return sae(x).sae_out
            encoded = sae.encode(x)
            return sae.decode(encoded.top_acts, encoded.top_indices)

        side = Side(step, lambda batch: _error(step, batch))
        yield side
        yield side._replace(on=accelerate)

    return case


def _error(step: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Of reconstructions as a whole: in 4096 tokens, rounding decides a choice or two."""
    x_hat = step(batch)
    return (x_hat - tokens(batch, len(x_hat))).square().mean()


CASES: dict[str, Case] = {
    "Trainer's step, functions alone": _training(fused=False),
    "Trainer's step": _training(),
    "encode, then decode, 1 token": _inference(1, whole=False),
    "encode, then decode, 4096 tokens": _inference(4096, whole=False),
    "forward, 4096 tokens": _inference(4096, whole=True),
}
