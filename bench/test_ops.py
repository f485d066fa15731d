"""The operations under pytest-benchmark: pytest bench/ --benchmark-only

One benchmark for each provider, in groups by operation and shape; pytest-benchmark's
`--benchmark-save NAME` and `--benchmark-compare` keep and compare them. A provider that does not
pass the gate of ops.py fails. --bench-shape N,D,F,K, which may be repeated, chooses the shapes.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from measure import Shape
from operations import Operations
from ops import SHAPES, backends_of, gate, keep_memory
from problem import Op

CPU = torch.device("cpu")
TINY: Shape = (8, 8, 64, 2)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every provider of every operation; a tiny problem says which there are."""
    cases = [
        (shape, name, provider)
        for shape in metafunc.config.getoption("--bench-shape") or SHAPES
        for name, make in Operations(TINY, CPU, backends_of(CPU)).makers().items()
        for provider in make().providers
    ]
    ids = [f"{name}-{provider}-{','.join(map(str, shape))}" for shape, name, provider in cases]
    metafunc.parametrize(("shape", "name", "provider"), cases, ids=ids)


class Latest:
    """The problem and the operation made last: one of each is in memory at a time."""

    def __init__(self) -> None:
        keep_memory()
        self.shape: Shape | None = None
        self.op: Op | None = None

    def operation(self, shape: Shape, name: str) -> Op:
        if self.shape != shape:
            self.operations = Operations(shape, CPU, backends_of(CPU))
            self.shape, self.op = shape, None
        if self.op is None or self.op.name != name:
            torch.compiler.reset()
            self.op = self.operations.makers()[name]()
        return self.op


@pytest.fixture(scope="session")
def latest() -> Latest:
    return Latest()


def test_operation(benchmark: Any, latest: Latest, shape: Shape, name: str, provider: str) -> None:
    op = latest.operation(shape, name)
    run = op.providers[provider]
    error = gate(op, run)
    assert error is None, error
    benchmark.group = f"{name} {','.join(map(str, shape))}"
    numbers = itertools.count()
    benchmark.pedantic(lambda: run(next(numbers)), rounds=5, warmup_rounds=1)
