"""What bench/integrations.py measures of dictionary_learning, in that library's environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
from measure import Case, Shape, Side, tokens
from torch import Tensor

from fastsae.integrations import dictionary_learning as fast

GROUPS = {"group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]}


def _update(theirs: type, ours: type, **options: Any) -> Case:
    """The trainer's `update`, which trainSAE calls with each batch; defaults, clipping included."""

    def case(shape: Shape) -> Iterator[Side]:
        _, d, f, k = shape

        def side(cls: type, state: dict[str, Tensor] | None) -> tuple[Side, Any]:
            trainer = cls(10**6, d, f, k, 0, "none", device="cpu", **options)
            if state is not None:
                trainer.ae.load_state_dict(state)
            steps = iter(range(1, 10**6))  # step 0 would look for a geometric median
            step = lambda batch: trainer.update(next(steps), batch)  # noqa: E731
            return Side(step, lambda batch: trainer.loss(batch, step=0)), trainer.ae

        before, ae = side(theirs, None)
        yield before
        state = ae.state_dict()
        del before, ae
        yield side(ours, state)[0]

    return case


def _inference(n_tokens: int, whole: bool) -> Case:
    """A frozen AutoEncoderTopK: decode(encode(x)), or its forward as a whole."""

    def case(shape: Shape) -> Iterator[Side]:
        _, d, f, k = shape
        ae = top_k.AutoEncoderTopK(d, f, k).eval()

        def side(ae: Any) -> Side:
            @torch.no_grad()
            def step(batch: Tensor) -> Tensor:
                x = tokens(batch, n_tokens)
                return ae(x) if whole else ae.decode(ae.encode(x))

            return Side(step, lambda batch: _error(step, batch))

        yield side(ae)
        yield side(fast.accelerated(ae))

    return case


def _error(step: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Of reconstructions as a whole: in 4096 tokens, rounding decides a choice or two."""
    x_hat = step(batch)
    return (x_hat - tokens(batch, len(x_hat))).square().mean()


CASES: dict[str, Case] = {
    "TopKTrainer": _update(top_k.TopKTrainer, fast.FastTopKTrainer),
    "BatchTopKTrainer": _update(batch_top_k.BatchTopKTrainer, fast.FastBatchTopKTrainer),
    "MatryoshkaBatchTopKTrainer": _update(
        matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        fast.FastMatryoshkaBatchTopKTrainer,
        **GROUPS,
    ),
    "encode, then decode, 1 token": _inference(1, whole=False),
    "encode, then decode, 4096 tokens": _inference(4096, whole=False),
    "forward, 4096 tokens": _inference(4096, whole=True),
}
