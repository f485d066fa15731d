"""Activations from iterables: every row once a pass, in an order that a seed and a count decide."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import make, train
from torch import Tensor

from fastsae.iterable import IterableSource


def numbered(n: int, d: int = 3) -> Tensor:
    """Rows that say which they are."""
    return torch.arange(n, dtype=torch.float32)[:, None].repeat(1, d)


def drawn(
    source: IterableSource, n_batches: int, size: int, seed: int = 0, start: int = 0
) -> Tensor:
    batches = source.batches(size, seed, start)
    taken = [next(batches) for _ in range(n_batches)]
    assert all(len(batch.x) == size for batch in taken)
    return torch.cat([batch.x[:, 0] for batch in taken])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    chunk=st.integers(1, 70),
    buffer=st.integers(2, 80),
    size=st.integers(1, 50),
    seed=st.integers(0, 3),
)
def test_every_row_once_a_pass(n: int, chunk: int, buffer: int, size: int, seed: int) -> None:
    source = IterableSource(list(numbered(n).split(chunk)), buffer_rows=buffer)
    rows = drawn(source, 3 * n, size, seed)[: 3 * n]
    for epoch in rows.split(n):
        assert torch.equal(epoch.sort().values, torch.arange(n).float())
    again = drawn(source, 3 * n, size, seed)[: 3 * n]
    assert torch.equal(rows, again)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 130), size=st.integers(1, 40))
def test_it_goes_on_after_any_row(start: int, size: int) -> None:
    source = IterableSource(list(numbered(50).split(7)), buffer_rows=20)
    whole = drawn(source, 220, 1)
    assert torch.equal(drawn(source, 2, size, start=start), whole[start : start + 2 * size])


def test_rows_are_shuffled_within_the_buffer_and_by_the_seed() -> None:
    chunks = list(numbered(1000).split(100))
    whole, small = (IterableSource(chunks, buffer_rows=n) for n in (1000, 50))
    rows, near = drawn(whole, 10, 100), drawn(small, 10, 100)
    places = torch.arange(1000).float()
    assert float((rows - places).abs().mean()) > 250  # a third of 1000, where all are shuffled
    assert 5 < float((near - places).abs().mean()) < 50
    assert not torch.equal(rows, drawn(whole, 10, 100, seed=1))
    epochs = drawn(whole, 20, 100).split(1000)
    assert not torch.equal(*epochs)


class Stream:
    """What a user may write: rows and targets that are made as they are asked for."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        rng = np.random.default_rng(0)
        for n in (5, 0, 90, 33):
            x = rng.standard_normal((n, 16)).astype(np.float16)
            yield x, torch.from_numpy(x[:, :4].astype(np.float32)) * 2


def test_pairs_stay_together_and_a_transcoder_trains() -> None:
    source = IterableSource(Stream(), buffer_rows=30)
    assert (source.d_in, source.d_out) == (16, 4)
    batches = source.batches(64)
    for _ in range(5):
        x, target, gradient = next(batches)
        assert gradient is None and target is not None
        assert torch.equal(x[:, :4] * 2, target) and x.dtype == torch.float32
    outputs = train(make(d_out=4), source, steps=60, lr=1e-2)
    assert float(outputs[-1].loss.detach()) < 0.5 * float(outputs[0].loss.detach())


good = torch.ones(4, 3)
WRONG: dict[str, tuple[list[Any], type[Exception], str]] = {
    "empty": ([], ValueError, "mine: expected at least one chunk, got none"),
    "width": ([good, torch.ones(4, 5)], ValueError, "mine: chunk 1: x: expected width 3, got 5"),
    "ndim": ([torch.ones(4)], ValueError, r"mine: chunk 0: x: .*expected 2 dimensions"),
    "dtype": ([torch.ones(4, 3, dtype=torch.int64)], TypeError, "expected float16, bfloat16"),
    "kind": ([["a", "b", "c"]], TypeError, "mine: chunk 0: x: expected a tensor or an array, got"),
    "nan": ([good, good * torch.nan], ValueError, "mine: chunk 1: x: row 0 holds a NaN"),
    "target-missing": ([(good, good), good], ValueError, "chunk 1: expected all chunks with a tar"),
    "target-rows": ([(good, good[1:])], ValueError, "expected a target for each of 4 rows, got 3"),
    "target-width": ([(good, good), (good, good[:, :2])], ValueError, "target: expected width 3"),
}


@pytest.mark.parametrize(("chunks", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(chunks: list[Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        batches = IterableSource(chunks, name="mine").batches(8)
        next(batches)


def test_what_cannot_start_anew_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an iterable that starts anew .* a generator"):
        IterableSource(x for x in [good])

    class Once:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            return iter([good] if self.passes < 3 else [])

    batches = IterableSource(Once()).batches(3)
    next(batches)
    with pytest.raises(ValueError, match="expected rows in a pass over it, got none"):
        next(batches)
    for wrong in ({"batch_size": 0}, {"batch_size": 3, "start": -1}):
        with pytest.raises(ValueError, match="expected at least"):
            IterableSource([good]).batches(**wrong)
    with pytest.raises(ValueError, match="buffer_rows: expected at least 2, got 1"):
        IterableSource([good], buffer_rows=1)


class Numbered:
    """Chunks that count how often each was asked for."""

    def __init__(self, chunks: list[Any]) -> None:
        self.chunks, self.asked = chunks, [0] * len(chunks)

    @property
    def sizes(self) -> list[int]:
        return [len(c[0] if isinstance(c, tuple) else c) for c in self.chunks]

    def __getitem__(self, number: int) -> Any:
        self.asked[number] += 1
        return self.chunks[number]

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self.chunks)))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    chunk=st.integers(1, 30),
    buffer=st.integers(2, 80),
    start=st.integers(0, 200),
    seed=st.integers(0, 2),
)
def test_numbered_chunks_give_the_same_stream(
    n: int, chunk: int, buffer: int, start: int, seed: int
) -> None:
    chunks = [(part, part[:, :1] * 2) for part in numbered(n).split(chunk)]
    plain, source = (IterableSource(c, buffer_rows=buffer) for c in (chunks, Numbered(chunks)))
    expected, found = (s.batches(7, seed, start) for s in (plain, source))
    for _ in range(2 * n // 7 + 2):
        a, b = next(expected), next(found)
        assert a.target is not None and b.target is not None
        assert torch.equal(a.x, b.x) and torch.equal(a.target, b.target)


def test_of_numbered_chunks_only_those_that_wait_are_read_again() -> None:
    chunks = Numbered(list(numbered(10_000).split(10)))
    source = IterableSource(chunks, buffer_rows=100)
    next(source.batches(10, start=29_500))
    assert sum(chunks.asked) < 60 and max(chunks.asked[1:]) == 1
    chunks.chunks[4] = chunks.chunks[4][1:]
    sizes = [10] * 1000
    chunks.__class__ = type("Wrong", (Numbered,), {"sizes": sizes})
    with pytest.raises(ValueError, match="iterable: chunk 4: expected 10 rows, got 9"):
        next(source.batches(10))
