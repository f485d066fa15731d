"""Runs that stop in every way there is, and go on to the same bits."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_train import make, rows

from fastsae import SAE, TopK, checkpoint, cli, runs
from fastsae.data import Source, open_source, split
from fastsae.files import alone
from fastsae.iterable import IterableSource
from fastsae.sae import SAEOutput
from fastsae.selection import Selection
from fastsae.shards import write_index, write_shard
from fastsae.train import TrainConfig, Trainer, evaluate

SETTINGS = TrainConfig(steps=21, batch_size=32, lr=1e-2, checkpoint_every=4, log_every=5, keep=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def same_state(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits; times and torch's own random state apart."""
    for name in ("sae.safetensors", "config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    left, right = (checkpoint.read_tensors(f / "training.safetensors") for f in (a, b))
    assert left.keys() == right.keys()
    for name, t in left.items():
        assert name.startswith("random/") or torch.equal(t, right[name]), name


# ---- every source, every optimiser: stopped at every step ----


def tensor_source(folder: Path) -> Source:
    return open_source(rows(100, 16))


def npy_source(folder: Path) -> Source:
    np.save(folder / "x.npy", rows(100, 16).numpy())
    return open_source(folder / "x.npy")


def shard_source(folder: Path) -> Source:
    out = folder / "set"
    out.mkdir(exist_ok=True)
    x, labels = rows(100, 16), torch.arange(100, dtype=torch.int32)
    for number, part in enumerate((slice(0, 30), slice(30, 100))):
        named = {"token": labels[part], "window": labels[part], "position": labels[part]}
        path = out / f"shard-{number:05}.safetensors"
        write_shard(path, {"x": x[part], "gradient": x[part] / 9, **named})
    index = {"format": "fastsae-activations", "version": 1, "d": 16, "dtype": "float32"}
    write_index(out, {**index, "gradients": True, "shards": [30, 70]})
    return open_source(out)


def holdout_source(folder: Path) -> Source:
    return split(open_source(rows(130, 16)), 30)[0]


def iterable_source(folder: Path) -> IterableSource:
    return IterableSource(list(rows(100, 16).split(17)), buffer_rows=40)


SOURCES = {f.__name__: f for f in (tensor_source, npy_source, shard_source, holdout_source)}
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {},
    "lazy": {"optimizer": "adam-lazy"},
    "torch": {"optimizer": "torch-adam", "clip": 0.1},
    "beta1-0": {"beta1": 0.0, "clip": 0.1},
    "ema": {"ema": 0.9, "accumulate": 3},
    "resample": {"resample_every": 3},
}


def trained(
    folder: Path, data: Source | IterableSource, stop_at: int | None = None, **options: Any
) -> Trainer:
    """A run of SETTINGS in `folder`, resumed if it is there; ends after step stop_at as by kill."""
    options = {"rule": TopK(4), **options}
    sae = make(selection=options.pop("rule"), dead_after=60)
    trainer = Trainer(sae, data, replace(SETTINGS, **options), out=folder)
    trainer.resume()

    def stop(step: int, _: SAEOutput) -> None:
        if step == stop_at:
            raise Killed

    try:
        trainer.run(progress=False, on_step=stop)
    except Killed:
        pass
    return trainer


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", [*SOURCES, "iterable_source"])
def test_every_source_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    make_source = SOURCES.get(name, iterable_source)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(whole, make_source(tmp_path))
    for stop_at in (3, 4, 9, 18, None):  # before the first checkpoint, at one, between, in an epoch
        trained(parts, make_source(tmp_path), stop_at)
    same_state(whole / "step-21", parts / "step-21")
    assert (whole / "sae.safetensors").read_bytes() == (parts / "sae.safetensors").read_bytes()
    logs = [
        [json.loads(x) for x in (f / "log.jsonl").read_text().splitlines()] for f in (whole, parts)
    ]
    for line in logs[0] + logs[1]:
        line.pop("seconds", None), line.pop("tokens_per_s", None)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", ["tensor_source", "npy_source", "shard_source"])
def test_rows_shuffled_by_blocks_resume_to_the_same_bits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsae.order.POOL_ROWS", 24)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(whole, SOURCES[name](tmp_path), shuffle_block=8)
    for stop_at in (3, 9, 18, None):
        trained(parts, SOURCES[name](tmp_path), stop_at, shuffle_block=8)
    same_state(whole / "step-21", parts / "step-21")
    with pytest.raises(ValueError, match="shuffle_block"):
        trained(parts, SOURCES[name](tmp_path), shuffle_block=4)


def test_an_iterable_has_a_buffer_instead_of_blocks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shuffle_block: expected 1 with an iterable, got 8"):
        trained(tmp_path, iterable_source(tmp_path), shuffle_block=8)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_optimiser_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    data, whole, parts = open_source(rows(100, 16)), tmp_path / "whole", tmp_path / "parts"
    trained(whole, data, **OPTIONS[name])
    for stop_at in (6, 13, None):
        trained(parts, data, stop_at, **OPTIONS[name])
    same_state(whole / "step-21", parts / "step-21")


RULES = sorted(set(Selection.rules) - {"gradient-topk"})


@pytest.mark.parametrize("name", [name for name in RULES if "-test" not in name])
def test_every_rule_resumes_to_the_same_bits(tmp_path: Path, name: str) -> None:
    kind = Selection.rules[name]
    k_name = kind.k_name  # type: ignore[attr-defined]
    rule = kind(**({k_name: 4} if k_name else {}))
    data, whole, parts = open_source(rows(100, 16)), tmp_path / "whole", tmp_path / "parts"
    trained(whole, data, rule=rule)
    for stop_at in (10, None):
        trained(parts, data, stop_at, rule=rule)
    same_state(whole / "step-21", parts / "step-21")


# ---- folders ----


def test_keep_and_latest(tmp_path: Path) -> None:
    data = open_source(rows(100, 16))
    for keep, kept in ((1, ["step-21"]), (3, ["step-16", "step-20", "step-21"])):
        out = tmp_path / str(keep)
        trained(out, data, keep=keep)
        assert sorted(f.name for f in out.glob("step-*")) == kept
        assert os.readlink(out / "latest") == "step-21"
        assert SAE.load(out / "latest").W_dec.shape == (64, 16)
        assert checkpoint.latest(out) == out / "step-21"
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "no") is None


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    data, whole = open_source(rows(100, 16)), tmp_path / "whole"
    trained(whole, data)
    for link in (False, True):
        out = tmp_path / f"run-{link}"
        trained(out, data, 13)
        shutil.copytree(out / "step-8", out / "step-20.tmp")  # cut in the middle of being written
        (out / "step-20.tmp" / "training.json").unlink()
        shutil.copytree(out / "step-8", out / "step-4.old.tmp")  # half removed
        os.symlink("nowhere", out / "latest.tmp")
        if not link:  # renamed, but the link not there yet: the highest step is taken
            (out / "latest").unlink()
        trained(out, data)
        same_state(whole / "step-21", out / "step-21")
        assert not list(out.glob("*.tmp"))


def test_a_run_can_go_back(tmp_path: Path) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trained(out, data, keep=9)
    expected = contents(out / "step-12")
    (out / "latest").unlink()
    os.symlink("step-8", out / "latest")
    trainer = trained(out, data, 12, keep=9)
    assert trainer.step_count == 12
    trainer.save()
    names = sorted(int(f.name[5:]) for f in out.glob("step-*"))
    assert names == [4, 8, 12] and os.readlink(out / "latest") == "step-12"
    for name, data_ in contents(out / "step-12").items():
        assert data_ == expected[name] or name.startswith("training."), name


@pytest.mark.parametrize("stage", ["sae.safetensors", "training.safetensors", "training.json"])
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trained(out, data, 6)
    before = contents(out / "step-4")
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(stage):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            trained(out, data)
    assert sorted(os.listdir(out)) == ["latest", "log.jsonl", "step-4"]
    assert contents(out / "step-4") == before
    trained(out, data)
    trained(tmp_path / "whole", data)
    same_state(tmp_path / "whole" / "step-21", out / "step-21")


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trained(out, data, 6)
    wrong = [
        ({"lr": 2e-2}, data, "train|lr 0.01 as it began, got 0.02"),
        ({"batch_size": 16}, data, "batch_size 32 as it began, got 16"),
        ({"ema": 0.9}, data, "ema None as it began, got 0.9"),
        ({"rule": TopK(5)}, data, "config.json: .*expected selection.k 4 as it began, got 5"),
        ({}, open_source(rows(99, 16)), "n_rows 100 as it began, got 99"),
        ({}, open_source(rows(100, 16, seed=1)), "rows '.*' as it began, got '"),
    ]
    for options, other, message in wrong:
        with pytest.raises(ValueError, match=message):
            trained(out, other, **options)
    assert trained(out, data, log_every=1, keep=5, checkpoint_every=2).step_count == 21


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no-json": ("training.json", None, "no such file"),
    "cut-json": ("training.json", b'{"step": 4', "not readable as JSON"),
    "empty-json": ("training.json", b"{}", "expected step, seconds, log_bytes, train, data and"),
    "list": ("training.json", b"[]", "expected a JSON object, got list"),
    "no-tensors": ("training.safetensors", None, "no such file"),
    "cut-tensors": ("training.safetensors", 0.7, "training.safetensors: "),
    "cut-weights": ("sae.safetensors", 0.7, "sae.safetensors: "),
    "noise": ("training.safetensors", os.urandom(999), "training.safetensors: "),
    "no-config": ("config.json", None, "no such file"),
}


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trained(out, data, 6)
    path = out / "step-4" / name
    if change is None:
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: int(change * len(whole))] if isinstance(change, float) else change)
    with pytest.raises(ValueError, match=message):
        trained(out, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc/exp_avg": torch.zeros(3, 4)}, r"W_enc/exp_avg: expected shape \(64, 16\), got"),
        (
            {"W_dec/exp_avg_sq": None},
            r"tensors that training.json names, not so: \['W_dec/exp_avg_",
        ),
        ({"W_enc/last": torch.full((64,), 99, dtype=torch.int32)}, "W_enc/last: expected steps up"),
        ({"more": torch.zeros(3)}, r"not so: \['more'\]"),
        ({"tokens_since_fired": torch.zeros(3, dtype=torch.int64)}, "tokens_since_fired: expected"),
        ({"random/cpu": None}, r"not so: \['random/cpu'\]"),
        (
            {"random/cpu": torch.zeros(3, dtype=torch.uint8)},
            r"random/cpu: expected shape \(5056,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trained(out, data, 6)
    path = out / "step-4" / "training.safetensors"
    tensors = {name: t.clone() for name, t in checkpoint.read_tensors(path).items()} | change
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    with pytest.raises(ValueError, match=message):
        trained(out, data)


def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(tmp_path: Path) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trainer = trained(out, data, 6)
    with torch.no_grad():
        trainer.sae.W_dec[3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="step 6: expected a finite W_dec"):
        trainer.save()
    assert sorted(f.name for f in out.glob("step-*")) == ["step-4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 10**18}, "step: expected 0 to 21, got 1000000000000000000"),
        ({"step": True}, "step: expected 0 to 21, got True"),
        ({"step": 7}, "step: expected that of the folder's name"),
        ({"seconds": float("nan")}, "seconds: expected 0 to"),
        ({"log_bytes": -1}, "log_bytes: expected 0 to"),
        ({"tensors": None}, "tensors: expected their names, got None"),
        ({"train": [1]}, "expected step, seconds, log_bytes, train"),
    ],
)
def test_facts_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trained(out, data, 6)
    path = out / "step-4" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        trained(out, data)


def test_a_setting_that_is_newer_than_a_run_had_its_default(tmp_path: Path) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"
    trained(out, data, 6)
    path = out / "step-4" / "training.json"
    facts = json.loads(path.read_text())
    del facts["train"]["decay"]
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="decay 'linear' as it began, got 'cosine'"):
        trained(out, data, decay="cosine")
    assert trained(out, data).step_count == 21


def test_a_run_is_not_begun_over_another_one(tmp_path: Path) -> None:
    data = open_source(rows(100, 16))
    trained(tmp_path, data, 6)
    before = contents(tmp_path / "step-4")
    trainer = Trainer(make(), data, SETTINGS, out=tmp_path)
    with pytest.raises(ValueError, match="expected a new run directory, or resume"):
        trainer.run(progress=False)
    assert contents(tmp_path / "step-4") == before


def test_two_processes_do_not_train_into_one_folder(tmp_path: Path) -> None:
    data = open_source(rows(100, 16))
    with alone(tmp_path, "training into"):
        with pytest.raises(ValueError, match="another process is training into this folder"):
            trained(tmp_path, data)
    assert trained(tmp_path, data).step_count == 21


def test_a_copy_whose_links_were_followed_goes_on(tmp_path: Path) -> None:
    data, out, copy = open_source(rows(100, 16)), tmp_path / "run", tmp_path / "copy"
    trained(out, data, 6)
    shutil.copytree(out, copy)  # follows links: `latest` is a folder now
    assert not (copy / "latest").is_symlink()
    trained(copy, data)
    trained(out, data)
    same_state(out / "step-21", copy / "step-21")
    assert os.readlink(copy / "latest") == "step-21"


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = open_source(rows(100, 16)), tmp_path / "run"

    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "symlink_to", refused)
    trained(out, data, 13)
    assert not (out / "latest").exists()
    trained(out, data)
    assert checkpoint.latest(out) == out / "step-21"
    trained(tmp_path / "whole", data)
    same_state(tmp_path / "whole" / "step-21", out / "step-21")


def test_foreign_files_stay(tmp_path: Path) -> None:
    (tmp_path / "step-mine.tmp").mkdir()
    (tmp_path / "notes.tmp").write_text("mine")
    (tmp_path / "step-03x").write_text("no checkpoint")
    trained(tmp_path, open_source(rows(100, 16)))
    assert (tmp_path / "step-mine.tmp").is_dir() and (tmp_path / "notes.tmp").exists()
    assert (tmp_path / "step-03x").exists() and not list(tmp_path.glob("*.old.tmp"))


def test_torchs_random_state_goes_on(tmp_path: Path) -> None:
    data = open_source(rows(100, 16))
    trainer = trained(tmp_path, data, 4)
    torch.manual_seed(5)
    trainer.step_count += 1
    trainer.save()
    expected = torch.rand(3)
    again = Trainer(make(selection=TopK(4), dead_after=60), data, SETTINGS, out=tmp_path)
    assert again.resume() and torch.equal(torch.rand(3), expected)


def test_the_average_is_what_is_evaluated(tmp_path: Path) -> None:
    data = open_source(rows(100, 16))
    trained(tmp_path, data, 9, ema=0.9)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-8"
    trainer = Trainer(make(dead_after=60), data, replace(SETTINGS, ema=0.9), out=tmp_path)
    assert trainer.resume()
    assert trainer.evaluate(data) == evaluate(checkpoint.load_sae(tmp_path / "step-8"), data)
    assert evaluate(trainer.sae, data)["fvu"] != trainer.evaluate(data)["fvu"]


def test_a_stop_request_in_an_evaluation(tmp_path: Path) -> None:
    data = open_source(rows(100, 16))
    settings = replace(SETTINGS, eval_every=5)
    trainer = Trainer(make(), data, settings, out=tmp_path, holdout=data)

    def stop(step: int, _: SAEOutput) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    assert trainer.run(progress=False, on_step=stop)["interrupted"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == [5] and "loss" in lines[-1]
    assert os.readlink(tmp_path / "latest") == "step-5"


def test_the_last_evaluation_is_not_made_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []

    def counted(sae: SAE, source: Source) -> dict[str, Any]:
        evaluated.append(source.n_rows)
        return evaluate(sae, source)

    monkeypatch.setattr(runs, "evaluate", counted)
    monkeypatch.setattr(runs, "write_report", lambda *_: None)
    data, holdout = split(open_source(rows(100, 16)), 30)
    for resume in (False, True):
        figures = runs.train(make().config, data, holdout, SETTINGS, tmp_path, {}, resume=resume)
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        logged = [line for line in log if "eval" in line][-1]
        assert logged["step"] == SETTINGS.steps
        assert {name: figures[name] for name in ("fvu", "l0")} == {
            name: logged["eval"][name] for name in ("fvu", "l0")
        }
    assert evaluated == [70, 30, 70]  # what was held out only where nothing was trained


@pytest.mark.parametrize("end", ["done", "stopped", "failed"])
def test_no_run_leaves_the_thread_that_reads(tmp_path: Path, end: str) -> None:
    np.save(tmp_path / "x.npy", rows(100, 16).numpy())
    trainer = Trainer(make(), open_source(tmp_path / "x.npy"), SETTINGS, out=tmp_path / "run")
    threads = []

    def on_step(step: int, _: SAEOutput) -> None:
        threads.append(threading.active_count())
        if step == 5 and end == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 5 and end == "failed":
            raise RuntimeError("mine")

    before = threading.active_count()
    with pytest.raises(RuntimeError) if end == "failed" else contextlib.nullcontext():
        trainer.run(progress=False, on_step=on_step)
    assert threads[4] == before + 1 and threading.active_count() == before
    assert trainer.step_count == (SETTINGS.steps if end == "done" else 5)


# ---- real processes ----

ARGUMENTS = "--d-sae 64 --k 4 --batch-size 32 --lr 1e-2 --holdout 20 --log-every 7 --seed 1".split()


def fastsae_train(acts: str, out: str, *more: str) -> None:
    """A process of its own, forked from one in which everything is imported."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored in the background and under nohup
        signal.signal(number, signal.SIG_DFL)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    cli.main(["train", "--data", acts, "--out", out, "--resume", *ARGUMENTS, *more])


def started(*args: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "fastsae.cli", "test_checkpoint"])
    process = context.Process(target=fastsae_train, args=args)
    process.start()
    return process


@pytest.fixture
def acts(tmp_path: Path) -> str:
    np.save(tmp_path / "acts.npy", rows(500, 16).numpy())
    return str(tmp_path / "acts.npy")


def test_kill_at_random_moments(tmp_path: Path, acts: str) -> None:
    more = ("--steps", "2000", "--checkpoint-every", "10")
    whole = tmp_path / "whole"
    process = started(acts, str(whole), *more)
    process.join(300)
    assert process.exitcode == 0
    rng = random.Random(0)
    kills, steps = 0, set()
    while kills < 50:  # several runs, where the machine is so fast that one ends before
        out = tmp_path / f"run-{kills}"
        newest, folder = 0, None
        while True:
            process = started(acts, str(out), *more)
            if kills % 2:  # at any moment, at the start too
                process.join(rng.uniform(0.02, 0.4))
            elif kills < 50:  # soon after it came further
                deadline = time.monotonic() + 120
                while process.exitcode is None and checkpoint.latest(out) == folder:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                process.join(rng.uniform(0, 0.05))
            else:
                process.join(300)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            folder = checkpoint.latest(out)
            if folder is not None:  # always loadable, and never an older one than before
                SAE.load(folder)
                step = checkpoint.step_of(folder)
                assert step >= newest
                newest = step
                steps.add(step)
        assert process.exitcode == 0
        same_state(whole / "latest", out / "latest")
        assert (whole / "sae.safetensors").read_bytes() == (out / "sae.safetensors").read_bytes()
        assert (out / "metrics.json").exists() and not list(out.glob("*.tmp"))
    assert len(steps) > 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stop_request_saves_and_exits_with_0(tmp_path: Path, acts: str, number: int) -> None:
    out = tmp_path / "run"
    process = started(acts, str(out), "--steps", "1000000", "--checkpoint-every", "1000000")
    log = out / "log.jsonl"
    deadline = time.monotonic() + 60
    try:
        while not (log.exists() and log.read_bytes().count(b"\n") > 3):
            assert time.monotonic() < deadline and process.exitcode is None
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()  # nothing else would end it
    folder = checkpoint.latest(out)
    assert folder is not None and checkpoint.step_of(folder) >= 7
    assert not (out / "metrics.json").exists() and not (out / "sae.safetensors").exists()
    SAE.load(folder)


@pytest.mark.parametrize("evaluates", [False, True])
def test_data_that_shrink_in_the_middle_of_a_run(
    tmp_path: Path, acts: str, evaluates: bool
) -> None:
    data, out = open_source(acts), tmp_path / "run"
    settings = replace(SETTINGS, checkpoint_every=1000, eval_every=9)
    trainer = Trainer(make(), data, settings, out=out, holdout=data if evaluates else None)

    def cut(step: int, _: SAEOutput) -> None:
        if step == 9:
            os.truncate(acts, 1000)

    with pytest.raises(ValueError, match=r"acts\.npy: cut short while in use: 1000 of"):
        trainer.run(progress=False, on_step=cut)
    # Up to two batches were read before the cut; an evaluation begins to read after it.
    assert 9 <= trainer.step_count <= (9 if evaluates else 11)
    assert os.readlink(out / "latest") == f"step-{trainer.step_count}"
    np.save(acts, rows(500, 16).numpy())
    again = Trainer(make(), open_source(acts), SETTINGS, out=out)
    assert again.resume() and again.run(progress=False)["interrupted"] is False
    trained_whole = Trainer(make(), open_source(acts), SETTINGS, out=tmp_path / "whole")
    trained_whole.run(progress=False)
    same_state(tmp_path / "whole" / "step-21", out / "step-21")


def test_data_that_vanish_in_the_middle_of_a_run_are_still_open(tmp_path: Path, acts: str) -> None:
    trainer = Trainer(make(), open_source(acts), SETTINGS, out=tmp_path / "run")
    trainer.run(progress=False, on_step=lambda step, _: os.unlink(acts) if step == 5 else None)
    assert trainer.step_count == 21
