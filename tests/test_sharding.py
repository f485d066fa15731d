"""A training on shards is that of one process: selections to the bit, the rest to the rounding."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from common import randint, randn
from ranks import run_ranks
from torch import Tensor

from fastsae import SAE, SAEConfig, checkpoint
from fastsae.config import TrainConfig
from fastsae.data import open_source
from fastsae.selection import AbsTopK, BatchTopK, MutualChoice, Selection, TopK
from fastsae.sharding import Shards
from fastsae.train import Trainer

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
