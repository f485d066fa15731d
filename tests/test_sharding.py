"""A training on shards is that of one process: selections to the bit, the rest to the rounding."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from common import randint, randn
from ranks import run_ranks
from torch import Tensor

from fastsae import SAE, SAEConfig, SAEOutput, checkpoint, tensors
from fastsae.config import TrainConfig
from fastsae.data import open_source
from fastsae.iterable import IterableSource
from fastsae.selection import AbsTopK, BatchTopK, Matryoshka, MutualChoice, Selection, TopK
from fastsae.sharding import LostRank, Shards, exchanged
from fastsae.train import Trainer, evaluate

D, F, N = 12, 48, 32
MESHES = [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]
meshes = pytest.mark.parametrize(("latents", "data"), MESHES, ids=[f"{p}x{q}" for p, q in MESHES])

RULES: dict[str, Selection] = {
    "topk": TopK(5),
    "weighted": TopK(5, score="activation·decoder_norm"),
    "annealed": TopK(3, anneal=0.9, k_start=9),
    "abs-topk": AbsTopK(5),
    "batchtopk": BatchTopK(5),
    "weighted-batch": BatchTopK(4, score="activation·decoder_norm"),
    "mutual-choice": MutualChoice(4.5),
}


def rows_of_rank(shards: Shards | None, x: Tensor) -> Tensor:
    """What a row of ranks sees of a batch."""
    return x if shards is None else x.chunk(shards.n_data)[shards.at_data]


# ---- selection ----


def select(shards: Shards | None, name: str, kind: str) -> dict[str, Tensor]:
    """Codes and their gradients of tokens and weights with, or without, very many equal scores."""
    rule = dataclasses.replace(RULES[name])
    sae = SAE(SAEConfig(D, F, rule, decoder_norm="free"), seed=3, shards=shards).train()
    own = slice(sae.latents.start, sae.latents.stop)
    x = randn(N, D, seed=1)
    if kind == "ties":
        x = randint(2, N, D, low=-1, seed=1)
        with torch.no_grad():
            sae.W_enc.copy_(randint(2, F, D, low=-1, seed=2)[own])
            sae.W_dec.copy_(randint(3, F, D, low=1, seed=4)[own])
    if kind == "few":  # hardly anything is positive
        with torch.no_grad():
            sae.b_enc.fill_(-4.5)
    if kind == "one shard":
        with torch.no_grad():
            sae.b_enc.copy_(torch.full((F,), -30.0).index_fill(0, torch.arange(6, 12), 9.0)[own])
    sae.progress = 0.5
    x = rows_of_rank(shards, x)
    codes = sae.encode(x)
    codes.validate()
    (codes.vals * codes.vals.detach()).sum().backward()
    return {
        "dense": codes.to_dense().detach(),
        "n_stored": (codes.idx >= 0).sum(),
        "W_enc": sae.W_enc.grad,
        "b_enc": sae.b_enc.grad,
    }


KINDS = ("random", "ties", "few", "one shard")


def select_all(shards: Shards | None) -> dict[str, dict[str, Tensor]]:
    return {f"{n} {k}": select(shards, n, k) for n in RULES for k in KINDS}


@meshes
def test_selection_is_that_of_one_process(latents: int, data: int) -> None:
    whole = select_all(None)
    ranks = run_ranks(latents, data, select_all)
    for case, expected in whole.items():
        rows = [
            torch.cat([ranks[q * latents + p][case]["dense"] for p in range(latents)], 1)
            for q in range(data)
        ]
        assert torch.equal(torch.cat(rows), expected["dense"]), case
        n_stored = sum(int(rank[case]["n_stored"]) for rank in ranks)
        assert n_stored == int(expected["n_stored"]), case
        for name in ("W_enc", "b_enc"):
            parts = [
                sum(ranks[q * latents + p][case][name] for q in range(data)) for p in range(latents)
            ]
            torch.testing.assert_close(torch.cat(parts), expected[name], rtol=1e-5, atol=1e-5)
    assert len({int(v["n_stored"]) for v in whole.values()}) > 3


def select_more_than_a_shard_has(shards: Shards | None) -> Tensor:
    """TopK's k as training starts, the width of the data, is above F/P here."""
    sae = SAE(SAEConfig(D, 16, TopK(3, anneal=0.9)), seed=3, shards=shards).train()
    with torch.no_grad():
        assert sae.b_enc is not None
        sae.b_enc.fill_(9.0)  # all are positive
    sae.progress = 0.0
    return sae.encode(randn(N, D, seed=1)).to_dense().detach()


def select_by_rounded_norms(shards: Shards | None) -> Tensor:
    """Norms of a float64 decoder that are equal in float32, in which pairs are chosen."""
    rule = TopK(1, score="activation·decoder_norm")
    sae = SAE(SAEConfig(D, 4, rule, decoder_norm="free", dtype="float64"), shards=shards).train()
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        norms = torch.tensor([1.0, 1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)
        sae.W_dec.zero_()[:, 0] = norms[sae.latents.start : sae.latents.stop]
    return sae.encode(randn(N, D, seed=1).abs()).to_dense().detach()


def test_selection_at_the_limits() -> None:
    for work in (select_more_than_a_shard_has, select_by_rounded_norms):
        whole = work(None)
        assert torch.equal(torch.cat(run_ranks(2, 1, work), 1), whole)
        assert bool((whole > 0).any())


# ---- training ----

TRAININGS = {
    "topk": (SAEConfig(D, F, TopK(5)), {}),
    "dead": (SAEConfig(D, F, TopK(2), dead_after=64, k_aux=4), {}),
    "bussmann": (SAEConfig(D, F, TopK(2), dead_after=64, k_aux=4, auxk="bussmann"), {}),
    "openai": (SAEConfig(D, F, TopK(2), dead_after=64, k_aux=40, auxk="openai"), {}),
    "clip": (SAEConfig(D, F, TopK(5)), {"clip": 0.01}),
    "lazy": (SAEConfig(D, F, TopK(5)), {"optimizer": "adam-lazy"}),
    "no momentum": (SAEConfig(D, F, TopK(5)), {"beta1": 0.0}),
    "batchtopk": (SAEConfig(D, F, BatchTopK(5), decoder_norm="free"), {"ema": 0.99}),
    "accumulate": (SAEConfig(D, F, TopK(5), encoder_bias=False), {"accumulate": 2}),
    "transcoder": (SAEConfig(D, F, TopK(5), d_out=7, skip=True), {}),
    # So many more tokens than latents that data-parallel ranks sum matrices.
    "narrow": (SAEConfig(D, 16, TopK(2), dead_after=64, k_aux=3), {}),
}


def trainer_of(name: str, run: Path | None, shards: Shards | None) -> Trainer:
    config, options = TRAININGS[name]
    # With a small eps Adam would make a step of a gradient that is rounding.
    options = {"steps": 12, "batch_size": N, "lr": 1e-2, "eps": 1e-3, **options}
    settings = TrainConfig(log_every=5, keep=9, **options)
    target = None if config.d_out is None else randn(300, config.d_out, seed=8)
    source = open_source(randn(300, D, seed=7) ** 3, target)
    return Trainer(SAE(config, shards=shards), source, settings, out=run)


def steps_from(shards: Shards | None, runs: str) -> dict[str, dict[str, Tensor]]:
    """One step from each checkpoint of each training."""
    found = {}
    for name in TRAININGS:
        for step in (0, 4, 8):
            trainer = trainer_of(name, None, shards)
            if step:
                checkpoint.restore(trainer, Path(runs) / name / f"step-{step}")
            else:
                trainer.initialize()
            part = (0, 1) if shards is None else (shards.rank, shards.n_ranks)
            batches = trainer.source.batches(N, 0, step * N, part)
            output = trainer.step(trainer._read(batches))
            figures = {**output.losses, **output.metrics, "loss": output.loss}
            found[f"{name} {step}"] = {
                **{k: torch.tensor(trainer._mean(v.float())) for k, v in figures.items()},
                **{k: v.clone() for k, v in trainer.sae.state_dict().items()},
                **checkpoint._tensors(trainer),
                "part": torch.tensor([trainer.sae.latents.start, trainer.sae.latents.stop]),
            }
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in TRAININGS:
        trainer = trainer_of(name, folder / name, None)
        trainer.config = dataclasses.replace(trainer.config, checkpoint_every=4)
        trainer.run(progress=False)
    return folder


@meshes
def test_a_step_is_that_of_one_process(latents: int, data: int, runs: Path) -> None:
    whole = steps_from(None, str(runs))
    ranks = run_ranks(latents, data, steps_from, str(runs))
    n_auxk = 0
    for case, expected in whole.items():
        n_auxk += "auxk" in expected
        for rank in ranks:
            got = rank[case]
            assert got.keys() == expected.keys()
            own = slice(*got["part"].tolist())
            for name, t in got.items():
                if name in ("part", "random/cpu"):
                    continue
                # Figures are of the last part, and which tokens that has depends on the ranks.
                if case.startswith("accumulate") and (t.ndim == 0 or name == "tokens_since_fired"):
                    continue
                # A row that nothing touched may be caught up now or later.
                if name.endswith("/last") and not case.startswith("lazy"):
                    continue
                if name.endswith("/exp_avg_sq") and case.startswith("no momentum"):
                    continue
                want = expected[name]
                if t.ndim and t.shape != want.shape:
                    want = want[own]
                torch.testing.assert_close(
                    t, want, rtol=1e-4, atol=1e-6, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
                )
    assert n_auxk >= 3


def evaluate_ties(shards: Shards | None) -> dict[str, Any]:
    """Of an untrained SAE, which selects as in training, with scores that are equal."""
    sae = SAE(SAEConfig(D, F, MutualChoice(4.5)), seed=3, shards=shards)
    with torch.no_grad():
        own = slice(sae.latents.start, sae.latents.stop)
        sae.W_enc.copy_(randint(2, F, D, low=-1, seed=2)[own])
    figures = evaluate(sae, open_source(randint(2, 33, D, low=-1, seed=1).float()), 11)
    assert sae.shards is shards
    return {k: torch.as_tensor(v) for k, v in figures.items() if k != "firing_frequency"}


def test_an_evaluation_is_that_of_one_process() -> None:
    """Also where all data-parallel ranks see the same rows."""
    whole = evaluate_ties(None)
    for rank in run_ranks(2, 2, evaluate_ties):
        torch.testing.assert_close(rank, whole, rtol=1e-5, atol=1e-6)


def a_loss_of_one_rank(shards: Shards) -> tuple[list[bool], bool, bool]:
    fired = torch.arange(4) == shards.rank
    every, all_finite = shards.fired(fired, torch.tensor(shards.rank != 1))
    return every.tolist(), bool(all_finite), bool(shards.fired(fired, torch.tensor(True))[1])


def test_all_ranks_count_as_the_one_whose_loss_is_not_finite() -> None:
    """Else some would have dead latents, and exchange what others do not."""
    for rank in run_ranks(1, 2, a_loss_of_one_rank):
        assert rank == ([True, True, False, False], False, True)


def train(shards: Shards | None, name: str, run: str, steps: int, every: int = 4) -> dict:
    trainer = trainer_of(name, Path(run), shards)
    trainer.config = dataclasses.replace(trainer.config, checkpoint_every=every)
    trainer.resume()
    if steps < 12:
        real = trainer._stops
        trainer._stops = lambda stop: trainer.step_count >= steps or real(stop)
    trainer.run(progress=False)
    return {"step": trainer.step_count, **trainer.sae.state_dict()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("name", ["dead", "batchtopk"])
def test_any_number_of_shards_goes_on_from_a_checkpoint(
    name: str, tmp_path: Path, runs: Path
) -> None:
    """1 → 4 → 2·2 → 1 processes; what is loaded and saved again has the same bytes."""
    run = tmp_path / "run"
    shutil.copytree(runs / name, run, symlinks=True)
    for later in ("step-8", "step-12", "sae.safetensors", "config.json"):
        path = run / later
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "latest").unlink()
    (run / "latest").symlink_to("step-4")
    run_ranks(4, 1, train, name, str(run), 8)
    run_ranks(2, 2, resave, name, str(run), str(tmp_path / "again"))
    first, again = files_of(run / "step-8"), files_of(tmp_path / "again" / "step-8")
    assert first.keys() == again.keys()
    for file in ("sae.safetensors", "training.safetensors", "config.json"):
        assert first[file] == again[file], file
    whole, own = SAE.load(runs / name / "step-8"), SAE.load(run / "step-8")
    for key, t in whole.state_dict().items():
        torch.testing.assert_close(own.state_dict()[key], t, rtol=1e-2, atol=3e-4)
    run_ranks(2, 2, train, name, str(run), 10)
    end = train(None, name, str(run), 12)
    assert end["step"] == 12
    log = (run / "log.jsonl").read_text().splitlines()
    assert [line.count('"fvu"') for line in log].count(1) == 3  # steps 5, 10, 12
    final = SAE.load(run)
    for key, t in end.items():
        if key != "step":
            assert torch.equal(t, final.state_dict()[key]) or name == "batchtopk"  # averaged


def resave(shards: Shards | None, name: str, run: str, to: str) -> int:
    trainer = trainer_of(name, Path(run), shards)
    assert trainer.resume()
    trainer.out = Path(to)
    trainer.save()
    return trainer.step_count


# ---- stops and failures ----


def stop_at_5(shards: Shards, run: str) -> tuple[int, bool]:
    trainer = trainer_of("topk", Path(run), shards)

    def on_step(step: int, _: SAEOutput) -> None:
        if step == 5 and shards.rank == 1:
            signal.raise_signal(signal.SIGTERM)

    figures = trainer.run(progress=False, on_step=on_step)
    return trainer.step_count, bool(figures["interrupted"])


def test_a_stop_of_one_rank_is_that_of_all(tmp_path: Path) -> None:
    assert run_ranks(2, 2, stop_at_5, str(tmp_path)) == [(5, True)] * 4
    assert checkpoint.latest(tmp_path) == tmp_path / "step-5"
    assert train(None, "topk", str(tmp_path), 12)["step"] == 12


def save_where_rank_1_cannot(shards: Shards, run: str, where: str) -> str:
    trainer = trainer_of("topk", Path(run), shards)
    assert trainer.resume()
    trainer.step(trainer._read(trainer._batches()))
    real = tensors._write

    def full(file: BinaryIO, t: Tensor) -> None:
        if shards.rank == int(where):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, t)

    tensors._write = full
    with pytest.raises(OSError) as caught:
        trainer.save()
    tensors._write = real
    shards.barrier()
    assert sorted(p.name for p in Path(run).glob("step-*")) == ["step-4"]
    trainer.save()  # there is room again
    return str(caught.value)


@pytest.mark.parametrize("where", ["0", "1"])
def test_a_rank_that_cannot_write_lets_none_save(where: str, tmp_path: Path, runs: Path) -> None:
    shutil.copytree(runs / "topk" / "step-4", tmp_path / "step-4")
    errors = run_ranks(2, 1, save_where_rank_1_cannot, str(tmp_path), where)
    assert "No space left" in errors[int(where)]
    assert "another rank could not write" in errors[1 - int(where)]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-5"


def save_where_rank_1_gives_up(shards: Shards, run: str) -> str:
    trainer = trainer_of("topk", Path(run), shards)
    assert trainer.resume()
    trainer.step(trainer._read(trainer._batches()))
    real_tensors, real_json = checkpoint.write_tensors, checkpoint.write_json

    def lost(*args: Any) -> None:
        real_tensors(*args)
        raise LostRank("an answer of the others was lost")

    def late(*args: Any) -> None:
        shards.barrier()  # rank 1 is out
        real_json(*args)

    if shards.first:
        checkpoint.write_json = late
        trainer.save()
    else:
        checkpoint.write_tensors = lost
        with pytest.raises(LostRank):
            trainer.save()
        shards.barrier()
    checkpoint.write_tensors, checkpoint.write_json = real_tensors, real_json
    shards.barrier()
    return str(trainer.resume() and trainer.step_count)


def test_a_rank_that_gives_up_leaves_what_the_first_one_finishes(
    tmp_path: Path, runs: Path
) -> None:
    shutil.copytree(runs / "topk" / "step-4", tmp_path / "step-4")
    assert run_ranks(2, 1, save_where_rank_1_gives_up, str(tmp_path)) == ["5", "5"]


def resume_from_another(shards: Shards, runs: str) -> str:
    trainer = trainer_of("topk", Path(runs) / ("topk" if shards.first else "nothing"), shards)
    with pytest.raises(ValueError) as caught:
        trainer.resume()
    return str(caught.value)


def test_ranks_that_see_other_checkpoints_do_not_go_on(runs: Path) -> None:
    first, second = run_ranks(2, 1, resume_from_another, str(runs))
    expected = "step of the newest checkpoint: expected the same on all ranks"
    assert expected in first and "got 0 to 12, here 12" in first
    assert expected in second and "got 0 to 12, here 0" in second


REFUSED = {
    "d_sae: expected a multiple of the 2 shards, got 47": lambda s: SAE(SAEConfig(D, 47), shards=s),
    "a shard has d_sae = 24 latents: k: expected at most": lambda s: SAE(
        SAEConfig(D, F, TopK(30)), shards=s
    ),
    "selection: expected one of abs-topk": lambda s: SAE(SAEConfig(D, F, Matryoshka(4)), shards=s),
    "got topk with nested budgets": lambda s: SAE(SAEConfig(D, F, TopK(4, nested=(2,))), shards=s),
    "multi_topk_coef: expected 0": lambda s: SAE(
        SAEConfig(D, F, TopK(4), multi_topk_coef=0.1), shards=s
    ),
    "auxk: expected a variant with a ReLU": lambda s: SAE(
        SAEConfig(D, F, TopK(4), auxk="saelens"), shards=s
    ),
    "batch_size: expected a multiple of 2 ranks, got 31": lambda s: trained(s, batch_size=31),
    "expected adam or adam-lazy on shards, got torch-adam": lambda s: trained(
        s, optimizer="torch-adam"
    ),
    "resample_every: expected 0 on shards, got 5": lambda s: trained(s, resample_every=5),
    "expected rows by number": lambda s: Trainer(
        SAE(SAEConfig(D, F, TopK(4)), shards=s),
        IterableSource([randn(9, D)]),
        TrainConfig(),
    ),
    "expected latents · data = 3 · 1 = 3 processes, got 2": lambda s: Shards(3, 1),
    "latents: expected an integer of at least 1, got 0": lambda s: Shards(0, 2),
}


def trained(shards: Shards, **options: Any) -> Trainer:
    sae = SAE(SAEConfig(D, F, TopK(4)), shards=shards)
    return Trainer(sae, open_source(randn(64, D)), TrainConfig(**options))


def refusals_of(shards: Shards) -> dict[str, str]:
    found = {}
    for expected, make in REFUSED.items():
        with pytest.raises(ValueError) as caught:
            make(shards)
        found[expected] = str(caught.value)
    return found


def test_what_shards_cannot_do_is_refused() -> None:
    for rank in run_ranks(2, 1, refusals_of):
        for expected, got in rank.items():
            assert expected in got


# ---- what is exchanged ----

EXCHANGES = {
    "topk": (SAEConfig(D, F, TopK(5)), "adam"),
    "lazy": (SAEConfig(D, F, TopK(5), auxk_coef=0), "adam-lazy"),
    "wide": (SAEConfig(D, 2400, TopK(5)), "adam"),
    "batchtopk": (SAEConfig(D, F, BatchTopK(5)), "adam"),
    "transcoder": (SAEConfig(D, F, TopK(5), d_out=7, skip=True), "adam"),
}


def exchange(shards: Shards, name: str) -> dict[str, float]:
    config, optimizer = EXCHANGES[name]
    target = None if config.d_out is None else randn(300, config.d_out, seed=8)
    source = open_source(randn(300, D, seed=7), target)
    settings = TrainConfig(steps=9, batch_size=N, optimizer=optimizer)  # type: ignore[arg-type]
    trainer = Trainer(SAE(config, shards=shards), source, settings)
    trainer.initialize()
    batches, stop = trainer._batches(), threading.Event()
    shards.traffic.clear()
    for _ in range(3):
        assert not trainer._stops(stop)
        trainer.step(trainer._read(batches))
    assert all(seconds > 0 for _, seconds in shards.traffic.values())
    return {what: n_bytes / 3 for what, (n_bytes, _) in shards.traffic.items()}


def exchange_all(shards: Shards) -> dict[str, dict[str, float]]:
    return {name: exchange(shards, name) for name in EXCHANGES}


@meshes
def test_what_is_exchanged_is_what_is_said(latents: int, data: int) -> None:
    for rank in run_ranks(latents, data, exchange_all):
        for name, (config, optimizer) in EXCHANGES.items():
            settings = TrainConfig(batch_size=N, optimizer=optimizer)  # type: ignore[arg-type]
            expected = exchanged(config, settings, latents, data)
            for what, n_bytes in expected.items():
                assert rank[name].get(what, 0) == pytest.approx(n_bytes), (name, what)


def test_pairs_or_matrices_are_merged_whichever_are_less() -> None:
    def merged(d_sae: int, **options: Any) -> float:
        config = SAEConfig(64, d_sae, TopK(8), dtype=options.pop("dtype", "float32"))
        return exchanged(config, TrainConfig(batch_size=1024, **options), 1, 2)["gradients"]

    bias = 4 * 64  # of b_dec
    assert merged(1 << 14) == bias + 512 * (4 * 128 + 12 * 8)
    assert merged(16) == bias + 4 * 16 * 129
    assert merged(16, optimizer="adam-lazy") == merged(16, dtype="bfloat16") == merged(1 << 14)


# ---- the command ----


def test_killed_rank_then_a_stop_then_one_process(tmp_path: Path) -> None:
    """torchrun: a rank is killed; two go on from the checkpoint and are stopped; one ends it."""
    run = tmp_path / "run"
    data = tmp_path / "x.npy"
    np.save(data, randn(2000, D).numpy())
    options = ["--data", str(data), "--out", str(run), "--d-sae", "48", "--k", "4"]
    options += ["--steps", "4000", "--batch-size", "64", "--checkpoint-every", "50", "--keep", "2"]
    options += ["--eval-every", "4000", "--holdout", "128", "--resume"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--standalone", "-m", "fastsae", "train", *options, "--shard-latents", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def wait_for_a_checkpoint(process: subprocess.Popen[str], after: int) -> int:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            folder = checkpoint.latest(run)
            step = 0 if folder is None else checkpoint.step_of(folder)
            if step is not None and step > after:
                return step
            time.sleep(0.1)
        process.kill()
        raise AssertionError(f"no checkpoint after step {after}: {process.communicate()[0]}")

    first = start()
    step = wait_for_a_checkpoint(first, 0)
    workers = workers_of(first.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    begun = time.monotonic()
    output, _ = first.communicate(timeout=60)
    assert first.returncode != 0 and time.monotonic() - begun < 40
    assert "rank 0 of 2 lost another one" in output, output
    assert not list(run.glob("*.tmp"))
    kept = checkpoint.latest(run)
    assert kept is not None and (checkpoint.step_of(kept) or 0) >= step

    second = start()
    step = wait_for_a_checkpoint(second, checkpoint.step_of(kept) or 0)
    second.send_signal(signal.SIGTERM)
    output, _ = second.communicate(timeout=90)
    assert "stopped after step" in output, output
    saved = checkpoint.latest(run)
    assert saved is not None and (checkpoint.step_of(saved) or 0) >= step
    SAE.load(saved)

    fewer = [sys.executable, "-m", "fastsae", "train", *options]
    third = subprocess.run(fewer, capture_output=True, text=True, env=environment, timeout=300)
    assert third.returncode == 0 and "held-out FVU" in third.stdout, third.stderr
    one_gpu = [*fewer, "--shard-latents", "2", "--device", "cuda:1"]
    refused = subprocess.run(one_gpu, capture_output=True, text=True, env=environment)
    assert "expected cpu or cuda for several processes, got cuda:1" in refused.stderr
    without = subprocess.run(
        [*fewer, "--shard-latents", "2"], capture_output=True, text=True, env=environment
    )
    assert without.returncode == 1
    assert "expected 2 processes, got one: start it with torchrun" in without.stderr


def workers_of(pid: int) -> list[int]:
    """The processes that a process started, by rank."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for task in tasks for child in task.read_text().split())
