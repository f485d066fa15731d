"""The selection rules as operations: from tokens to codes, in the form that is trained.

The oracle is the reference backend, torch's product and a rule's plain form, which is timed, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from limits import Cost
from measure import Shape
from problem import ROTATED, Op, Run

from fastsae import SAE, Codes, SAEConfig, Selection
from fastsae.options import rule_from


class RuleOperations:
    """One operation for each rule, at a shape."""

    def __init__(self, shape: Shape, device: torch.device, backends: list[str]) -> None:
        self.shape, self.device, self.backends = shape, device, backends
        n, d = shape[:2]
        generator = torch.Generator(device).manual_seed(7)

        def tokens() -> torch.Tensor:
            return torch.randn(n, d, generator=generator, device=device)

        self.x = [tokens() for _ in range(ROTATED)]
        self.gradient = [tokens() for _ in range(ROTATED)]

    def __iter__(self) -> Iterator[Op]:
        for name in sorted(Selection.rules):
            yield self.operation(name)

    @torch.no_grad()
    def operation(self, name: str) -> Op:
        n, d, f, k = self.shape
        config = SAEConfig(d, f, rule_from(name, k, {}))
        saes = {b: SAE(config, device=self.device, backend=b) for b in self.backends}
        reference = saes.get("reference") or SAE(config, device=self.device, backend="reference")
        first, *others = saes.values()
        first.initialize_from_(self.x[0], b_dec="mean")
        for sae in (*others, reference):
            sae.load_state_dict(first.state_dict())
        needs_gradient = config.selection.needs_gradient

        def provider(sae: SAE) -> Run:
            @torch.no_grad()
            def run(i: int) -> Any:
                i %= ROTATED
                gradient = self.gradient[i] if needs_gradient else None
                return sae.encode(self.x[i], gradient, training=True)

            return run

        oracle: list[Codes] = []

        def check(found: Codes) -> None:
            """Every token's pairs, but for ties that rounding decides."""
            if not oracle:
                oracle.append(provider(reference)(0))
            expected = oracle[0]
            wrong = sum(_differences(found[part], expected[part]) for part in _parts(n))
            least = 1e-4 * expected.idx.numel() + 2
            assert wrong <= least, f"expected the pairs of the oracle, got {wrong} others"

        products = 2 if needs_gradient else 1
        cost = Cost(2 * n * d * f * products, "bf16", 4 * d * (products * f + n))
        providers = {f"fastsae {backend}": provider(sae) for backend, sae in saes.items()}
        return Op(f"encode, {name}", providers, check, cost, "as encode")


def _parts(n: int) -> list[slice]:
    """Tokens whose dense codes fit in memory at a time."""
    return [slice(start, start + 64) for start in range(0, n, 64)]


def _differences(found: Codes, expected: Codes) -> int:
    a, b = found.to_dense().float(), expected.to_dense().float()
    return int(((a - b).abs() > 1e-3 * float(b.abs().max())).sum())
