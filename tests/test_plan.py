"""The plan of a training against what a training takes, in a process of its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import run_child

from fastsae import SAE, SAEConfig, TopK, runs
from fastsae.data import open_source
from fastsae.moments import STATES
from fastsae.plan import available, check, plan, table
from fastsae.train import TrainConfig, Trainer

N, D, F = 256, 128, 65536
RUN = """
import sys
from pathlib import Path
from fastsae.cli import main
main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""
CASES = {
    "adam": {},
    "ema": {"ema": 0.9},
    "beta1-0": {"beta1": 0.0},
    "torch-adam": {"optimizer": "torch-adam"},
    "bfloat16": {"state": "bfloat16"},
    "int8": {"state": "int8"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_memory(tmp_path: Path, options: dict) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((1024, D), np.float32))
    arguments = ["--data", str(tmp_path / "x.npy"), "--d-sae", str(F), "--out", f"{tmp_path}/run"]
    arguments += ["--batch-size", str(N), "--steps", "2", "--holdout", "0"]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    peak = json.loads(run_child(RUN, "train", *arguments).splitlines()[-1])
    found = plan(SAEConfig(D, F, TopK(32)), TrainConfig(steps=2, batch_size=N, **options))
    # "At most", but for what differs between machines: threads' stacks and buffers, libraries.
    assert peak - (64 << 20) < found.memory < peak + (200 << 20)
    used = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
    # Here is one checkpoint; the plan has those that are kept and one more.
    one = found.weights + found.moments + found.average + found.counters
    assert used == pytest.approx(one + found.weights, rel=0.02)
    assert found.checkpoints == (2 + 1) * one + found.weights
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("skip", [False, True], ids=["sae", "skip"])
@pytest.mark.parametrize("state", STATES)
def test_moments_are_exact(state: str, skip: bool, beta1: float) -> None:
    """To the byte what the optimiser of a training holds."""
    config = SAEConfig(300, 500, TopK(4), d_out=40, skip=skip, dead_after=10**6)
    train = TrainConfig(steps=2, batch_size=16, state=state, beta1=beta1)
    x = torch.randn(64, 300)
    trainer = Trainer(SAE(config), open_source(x, x[:, :40].contiguous()), train)
    trainer.run(progress=False)
    held = [t for s in trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert plan(config, train).moments == sum(t.nbytes for t in held)


def test_narrow_moments_and_weights() -> None:
    config = SAEConfig(D, F, TopK(32), dtype="bfloat16")
    wide, narrow, codes = (plan(config, TrainConfig(state=state)) for state in STATES)
    assert wide.weights * 2 == plan(SAEConfig(D, F, TopK(32)), TrainConfig()).weights
    assert 1.9 < wide.moments / narrow.moments < 2
    assert 3.6 < wide.moments / codes.moments < 4


def test_what_does_not_fit_is_refused_with_the_table() -> None:
    found = plan(SAEConfig(D, F, TopK(32)), TrainConfig())
    check(found, found.memory)
    with pytest.raises(MemoryError, match=r"(?s)fits the memory, got\nweights .*does not fit"):
        check(found, found.memory - found.step - 1)
    assert table(found, found.memory).endswith("fits")


def test_available_is_some_of_the_machines() -> None:
    assert 1 << 20 < available() < 1 << 50


@pytest.mark.parametrize(("n_rows", "block", "pooled"), [(100, 8, 100), (70_000, 256, 65_536)])
def test_pools_of_rows_in_files_are_counted(
    tmp_path: Path, n_rows: int, block: int, pooled: int
) -> None:
    rows = np.ones((n_rows, 3), np.float16)
    np.save(tmp_path / "x.npy", rows)
    in_file, held = open_source(tmp_path / "x.npy"), open_source(torch.from_numpy(rows))
    paired = open_source(tmp_path / "x.npy", tmp_path / "x.npy")
    for source, row_bytes in ((in_file, 6), (paired, 12), (held, 0)):
        settings = TrainConfig(shuffle_block=block)
        assert runs.buffer_bytes(source, settings) == 2 * pooled * row_bytes
        assert runs.buffer_bytes(source, TrainConfig()) == 0
