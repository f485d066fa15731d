"""Training from a live model: the rows of a harvest, without one."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import threads
from test_checkpoint import same_state
from test_harvest import DOCUMENTS, WINDOW, D, causal, config, everything, transformers
from test_harvest_sites import passes
from torch import Tensor

from fastsae import SAE, SAEConfig, TopK, cli, runs
from fastsae.harvest import harvest_sites
from fastsae.live import LiveSource, Stream, open_live
from fastsae.models import LanguageModel
from fastsae.options import read_table
from fastsae.train import TrainConfig, Trainer

OPTIONS = config(layer=(1, 3), site=("residual", "mlp"), rows=None)
SETTINGS = TrainConfig(steps=12, batch_size=32, lr=1e-2, checkpoint_every=4, log_every=5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}: {text}. " for i, text in enumerate(DOCUMENTS * 6)))
    return [path]


def stream(files: list[Path], model: LanguageModel | None = None, **changes: Any) -> Stream:
    buffer = changes.pop("buffer_rows", 100)
    options = replace(OPTIONS, **changes)
    return Stream(model or causal(), files, options, buffer_rows=buffer)


def stored(files: list[Path], folder: Path, **changes: Any) -> dict[str, dict[str, Tensor]]:
    sets = harvest_sites(causal(), files, folder, replace(OPTIONS, **changes))
    return {name: everything(found) for name, found in sets.items()}


def trained(data: LiveSource, out: Path, stop_at: int | None = None) -> Trainer:
    sae = SAE(SAEConfig(data.d_in, 24, TopK(3), d_out=D if data.target else None), seed=0)
    trainer = Trainer(sae, data, SETTINGS, out=out)
    trainer.resume()

    def stop(step: int, _: object) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.run(progress=False, on_step=stop)
    return trainer


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_those_of_a_harvest(dtype: str, files: list[Path], tmp_path: Path) -> None:
    expected = stored(files, tmp_path / "set", dtype=dtype)
    for site in expected:
        live, held = stream(files, dtype=dtype).split(site, None, 20)
        n_held = -(-20 // (WINDOW - 1)) * (WINDOW - 1)
        x = expected[site]["x"]
        rows = torch.cat([torch.as_tensor(chunk) for chunk in live.chunks])
        assert rows.dtype == x.dtype and torch.equal(rows, x[:-n_held])
        whole = held.rows(np.arange(held.n_rows))
        assert held.n_rows == 20 and torch.equal(whole, x[-n_held:][:20].float())
        token = expected[site]["token"][-n_held:]
        assert held.token_ids(np.arange(5), 1)[:, 1].tolist() == token[:5].tolist()
        assert held.token_ids(np.array([0]), 1)[0, 0] == -1  # nothing is known before it
        epoch = len(rows)
        batches = live.batches(epoch, seed=2)
        for _ in range(2):  # each pass is exact, shuffled, and from the same chunks
            x = next(batches).x
            assert not torch.equal(x, rows.float())
            assert torch.equal(x.sort(0).values, rows.float().sort(0).values)


def test_targets_are_rows_of_the_same_tokens(files: list[Path], tmp_path: Path) -> None:
    expected = stored(files, tmp_path / "set")
    live, held = stream(files).split("mlp-1", "residual-3", 9)
    assert (live.d_in, live.d_out) == (D, D) and held.target is not None
    x, target = (torch.cat(parts) for parts in zip(*live.chunks, strict=True))
    assert torch.equal(x, expected["mlp-1"]["x"][:-9])
    assert torch.equal(target, expected["residual-3"]["x"][:-9])
    assert torch.equal(held.target.rows(np.arange(9)), expected["residual-3"]["x"][-9:])


def test_what_is_harvested_first_is_less_of_it(files: list[Path]) -> None:
    live, held = stream(files, rows=50).split("mlp-1", None, 20)
    whole, same = stream(files).split("mlp-1", None, 20)
    n = -(-50 // (WINDOW - 1)) * (WINDOW - 1)
    rows = [torch.cat([torch.as_tensor(c) for c in source.chunks]) for source in (live, whole)]
    assert len(rows[0]) == n and torch.equal(rows[0], rows[1][:n])
    assert torch.equal(held.rows(np.arange(20)), same.rows(np.arange(20)))


@pytest.mark.parametrize("start", [0, 1, 37, 200, 505, 1300])
def test_it_goes_on_after_any_row_with_little_of_the_model(start: int, files: list[Path]) -> None:
    live, _ = stream(files).split("residual-1", None, 20)
    rows = live.batches(1)
    whole = torch.cat([next(rows).x for _ in range(start + 64)])
    model = causal()
    again, _ = stream(files, model).split("residual-1", None, 20)
    seen = passes(model, "embed")
    found = next(again.batches(64, start=start)).x
    assert torch.equal(found, whole[start:])
    assert sum(seen) * (WINDOW - 1) < 100 * 5 + 64  # whatever lies before, five buffers


@pytest.mark.parametrize("target", [None, "residual-3"])
def test_a_training_that_is_stopped_goes_on_to_the_same_bits(
    target: str | None, files: list[Path], tmp_path: Path
) -> None:
    def rows() -> LiveSource:
        return stream(files).split("mlp-1", target, 20)[0]

    trained(rows(), tmp_path / "whole")
    for stop_at in (3, 9, None):
        trained(rows(), tmp_path / "parts", stop_at)
    same_state(tmp_path / "whole" / "step-12", tmp_path / "parts" / "step-12")


def test_another_stream_does_not_go_on(files: list[Path], tmp_path: Path) -> None:
    trained(stream(files).split("mlp-1", None, 20)[0], tmp_path, stop_at=4)
    for other, what in (
        (stream(files, seed=1).split("mlp-1", None, 20), "stream.seed 0 as it began, got 1"),
        (stream(files).split("mlp-3", None, 20), "stream.sites "),
        (stream(files).split("mlp-1", None, 40), "stream.held_windows "),
        (stream(files, buffer_rows=101).split("mlp-1", None, 20), "buffer_rows 100 "),
        (stream(files, batch_size=3).split("mlp-1", None, 20), "stream.batch_size "),
    ):
        with pytest.raises(ValueError, match=f"goes on with what it began with: expected {what}"):
            trained(other[0], tmp_path)
    files[0].write_text(files[0].read_text().replace("fox", "cat"))
    with pytest.raises(ValueError, match=r"what it began with: expected stream\.text "):
        trained(stream(files).split("mlp-1", None, 20)[0], tmp_path)


def test_several_sites_side_by_side(files: list[Path]) -> None:
    opened = stream(files)
    parts = [
        opened.split("mlp-1", None, 20)[0],
        opened.split("residual-3", "mlp-1", 20)[0],
        opened.split("residual-1", None, 20)[0],
    ]
    shared = LiveSource.of_all(parts)
    assert shared.sites == ("mlp-1", "residual-3", "residual-1") and shared.d_in == 3 * D
    batch = next(shared.batches(50, seed=1, start=30))
    for part in parts:
        own = next(part.batches(50, seed=1, start=30))
        found = shared.part(batch, part)
        assert torch.equal(found.x, own.x) and found.x.is_contiguous()
        assert (found.target is None) == (own.target is None)
        if own.target is not None and found.target is not None:
            assert torch.equal(found.target, own.target)


# ---- on the command line ----


@pytest.fixture
def place(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and a stream's file, which names both beside it."""
    transformers(monkeypatch, "LlamaForCausalLM", causal().net)
    (tmp_path / "model").mkdir()
    options = 'model = "model"\ntext = ["text.txt"]\nlayer = [1, 3]\nsite = ["residual", "mlp"]\n'
    options += 'window = 10\nbatch_size = 2\ndtype = "float32"\nbuffer_rows = 100\n'
    (tmp_path / "stream.toml").write_text(options)
    return tmp_path


def train_args(place: Path, name: str, *more: str, site: str = "residual-3") -> list[str]:
    out = ["--out", str(place / name), "--data", f"live:{place / 'stream.toml'}:{site}"]
    size = "--d-sae 24 --k 3 --steps 12 --batch-size 32 --lr 1e-2 --holdout 20".split()
    return ["train", *out, *size, *more]


def test_a_run_from_a_live_model(
    place: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(place)
    cli.main(
        [
            "train",
            *train_args(place, "run")[3:],
            "--out",
            "run",
            "--data",
            "live:stream.toml:residual-3",
        ]
    )
    said = capsys.readouterr().out
    assert "held-out FVU" in said and "latents silent on 20 rows" in said and "PCA" not in said
    monkeypatch.chdir("/")
    options = runs.options_of(place / "run")
    assert options["data"] == f"live:{place / 'stream.toml'}:residual-3"
    figures = json.loads((place / "run" / "metrics.json").read_text())
    cli.main(["eval", str(place / "run"), "--json"])
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["fvu"] == figures["fvu"] and figures["step_ratio"] > 0
    page = (place / "run" / "report.html").read_text()
    assert "silent on 20 rows" in page
    (place / "run" / "report.html").unlink()
    cli.main(["report", str(place / "run")])
    assert (place / "run" / "report.html").read_text() == page
    cli.main(["train", "--resume", "--out", str(place / "run")])
    # The same through the library.
    sae = SAE(SAEConfig(D, 24, TopK(3)), seed=0)
    rows, held = open_live(options["data"], None, 20)
    settings = TrainConfig(steps=12, batch_size=32, lr=1e-2)
    Trainer(sae, rows, settings, holdout=held).run(progress=False)
    assert torch.equal(sae.W_dec, SAE.load(place / "run").W_dec)


WRONG = {
    "no-site": ("live:stream.toml", {}, "expected one of live:.*stream.toml:residual-1, "),
    "site": ("live:stream.toml:mlp-2", {}, "expected one of residual-1, mlp-1, .* got mlp-2"),
    "name": ("live:stream", {}, "expected live:FILE.toml:SITE, got 'live:stream'"),
    "absent": ("live:other.toml:mlp-1", {}, "other.toml: no such file"),
    "option": ("live:stream.toml:mlp-1", {"layr": 1}, "layr: there is no such option; did you"),
    "type": ("live:stream.toml:mlp-1", {"layer": ["1"]}, "layer: expected an integer or a list"),
    "gradients": ("live:stream.toml:mlp-1", {"gradients": True}, "gradients: there is no such opt"),
    "value": ("live:stream.toml:mlp-1", {"layer": [0]}, "layer: expected at least 1, got 0"),
    "buffer": ("live:stream.toml:mlp-1", {"buffer_rows": 1}, "buffer_rows: expected at least 2"),
    "text": ("live:stream.toml:mlp-1", {"text": ["no.txt"]}, "no.txt: cannot be read"),
    "model": ("live:stream.toml:mlp-1", {"model": None}, "model: expected a text, got None"),
    "missing": ("live:stream.toml:mlp-1", {"text": ...}, "stream.toml.json: expected text, got no"),
}


@pytest.mark.parametrize(("data", "changes", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(
    data: str, changes: dict[str, Any], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = read_table(place / "stream.toml") | changes
    kept = {name: value for name, value in options.items() if value is not ...}
    (place / "stream.toml.json").write_text(json.dumps(kept))
    monkeypatch.chdir(place)
    data = data.replace("stream.toml", "stream.toml.json") if changes else data
    with pytest.raises((ValueError, SystemExit), match=message):
        cli.main([*train_args(place, "run"), "--data", data])
    assert not (place / "run").exists()


def test_what_a_live_model_cannot_give_is_refused(place: Path) -> None:
    with pytest.raises(SystemExit, match=r"holdout: expected 1 to .* rows of a live model, got 0"):
        cli.main(train_args(place, "run", "--holdout", "0"))
    with pytest.raises(SystemExit, match=r"holdout: expected 1 to .*, got 100000"):
        cli.main(train_args(place, "run", "--holdout", "100000"))
    with pytest.raises(SystemExit, match="expected stored gradients, got none: harvest them"):
        cli.main(train_args(place, "run", "--selection", "gradient-topk"))
    with pytest.raises(SystemExit, match=r"target: expected live:.*stream.toml:SITE, got live:"):
        cli.main(train_args(place, "run", "--target", "live:other.toml:mlp-1"))
    stored = r"live:.*residual-3: expected rows that are stored, got a live model's: harvest them"
    SAE(SAEConfig(D, 24, TopK(3))).save(place / "saved")
    saved, codes = str(place / "saved"), str(place / "codes")
    for command in (["eval", saved, "--data"], ["encode", "--sae", saved, "--out", codes]):
        with pytest.raises(SystemExit, match=stored):
            cli.main([*command, f"live:{place / 'stream.toml'}:residual-3"])
    with pytest.raises(ValueError, match="gradients: expected False of a live model, got True"):
        stream([place / "text.txt"], gradients=True)
    assert not (place / "run").exists()
