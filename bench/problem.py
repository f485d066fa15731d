"""What an operation is, and the batch, weights and codes that it works on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from limits import Cost
from measure import Shape
from torch import Tensor
from torch.nn.functional import normalize

Run = Callable[[int], Any]
"""Does the work on the inputs of run i; they take turns, so that no cache is flattered."""
ROTATED = 3


class Op(NamedTuple):
    """An operation, in the ways of several providers, with its gate."""

    name: str
    providers: dict[str, Run]
    check: Callable[[Any], None]
    """Of the result of run 0."""
    cost: Cost
    note: str
    """What bounds fastsae, in a line."""


@dataclass
class Problem:
    """A batch, its weights and its codes."""

    shape: Shape
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        n, d, f, k = self.shape
        self.x, self.g = self.normal(n, d, seed=1), self.normal(n, d, seed=2)
        self.W = normalize(self.normal(f, d, seed=3))
        self.b = self.normal(f, seed=4) * 0.01
        h = self.x @ self.W.T + self.b
        top = h.topk(k)
        self.vals, self.idx = top.values.relu(), top.indices.int()

    def normal(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(100 * self.seed + seed)
        return torch.randn(*shape, generator=generator, device=self.device)

    def dense_codes(self) -> Tensor:
        n, _, f, _ = self.shape
        z = torch.zeros(n, f, device=self.device)
        return z.scatter_(1, self.idx.long(), self.vals)

    def sparse_codes(self) -> Tensor:
        n, _, f, k = self.shape
        rows = torch.arange(0, n * k + 1, k, device=self.device)
        order = self.idx.long().argsort(1)
        columns, values = self.idx.long().gather(1, order), self.vals.gather(1, order)
        with warnings.catch_warnings():  # that it is new
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(rows, columns.view(-1), values.view(-1), (n, f))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """AssertionError unless they agree relative to the largest expected value."""
    error = float((found - expected).abs().max())
    scale = float(expected.abs().max()) or 1.0
    assert error <= tolerance * scale, f"expected {tolerance * scale:.1e} at most, got {error:.1e}"
