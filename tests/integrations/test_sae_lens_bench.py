"""The benchmark runs every case, and its figures and its gate are those of the two sides."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


def test_bench_measures_every_case() -> None:
    command = [sys.executable, "bench/integrations.py", "sae_lens", "--shape", "260,16,512,4"]
    done = subprocess.run(
        [*command, "--steps", "3", "--json", "-"], cwd=ROOT, stdout=-1, check=True
    )
    rows = json.loads(done.stdout)
    assert len(rows) == 7 and len({row["case"] for row in rows}) == 7
    for row in rows:
        assert [row[size] for size in "ndfk"] == [260, 16, 512, 4]
        for side in ("before", "after"):
            assert 0 < row[f"{side}_min_s"] <= row[f"{side}_s"] <= row[f"{side}_max_s"] < 10
        assert row["ratio"] > 0


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import integrations

    return integrations


def measure(bench: Any, seconds: tuple[float, float], off: float) -> dict[str, Any]:
    """The figures of a case whose sides sleep, and of which the second is off by so much."""

    def sides(shape: Any) -> Iterator[Any]:
        for s, error in zip(seconds, (0.0, off), strict=True):

            def step(batch: Tensor, s: float = s) -> None:
                time.sleep(s)

            def probe(batch: Tensor, error: float = error) -> Tensor:
                return batch.sum() + error

            yield bench.Side(step, probe)

    return bench.measure_case(sides, (8, 4, 16, 2), 3)


def test_figures_are_of_their_sides(bench: Any) -> None:
    row = measure(bench, (0.06, 0.02), 0.0)
    assert 0.06 <= row["before"]["min_s"] and 0.02 <= row["after"]["min_s"]
    assert row["ratio"] > 1


def test_sides_that_disagree_are_refused(bench: Any) -> None:
    with pytest.raises(AssertionError, match="not close"):
        measure(bench, (0.0, 0.0), 0.1)
