"""Where a training says how it goes, when what listens is full, broken or absent."""

import json
import os
import resource
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from test_train import log_lines, make, source, train

from fastsae import log as log_module
from fastsae.log import RunLog, Terminal
from fastsae.train import TrainConfig, Trainer


def test_a_full_pipe_does_not_hold_a_training_up() -> None:
    reader, writer = os.pipe()
    stream = Terminal(os.fdopen(writer, "w"))
    for _ in range(100):
        assert stream.write("x" * 9999) == 9999  # far more than a pipe holds; nobody reads
    held = os.read(reader, 1 << 20)
    assert 4096 <= len(held) <= 1 << 16 and set(held) == {ord("x")}
    assert stream.write("y") == 1 and os.read(reader, 9) == b"y"  # what has room goes through
    os.close(reader)
    for _ in range(3):
        stream.write("z")  # nobody will ever read it
    assert stream.broken


def test_a_stream_without_a_descriptor(capsys: pytest.CaptureFixture[str]) -> None:
    class Notebook:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

    notebook = Notebook()
    Terminal(notebook).write("50 %")  # type: ignore[arg-type]
    assert notebook.text == "50 %"
    closed = open(os.devnull, "w")
    closed.close()
    assert Terminal(closed).isatty() is False
    assert Terminal(closed).write("x") == 1


def test_lines_are_strict_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, steps=1, progress=False) as log:
        log.write({"step": 1, "loss": float("nan"), "eval": {"fvu": [float("inf"), 0.5]}})
        size = log.n_bytes
    text = (tmp_path / "log.jsonl").read_text()
    assert len(text) == size
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"step": 1, "loss": None, "eval": {"fvu": [None, 0.5]}}


def test_what_came_after_a_checkpoint_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    with RunLog(tmp_path, keep_bytes=12, steps=3, progress=False) as log:
        log.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError, match=r"File too large.*log\.jsonl|bytes written"):
            train(make(), source(), out=tmp_path, steps=30, log_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_weights_and_biases_get_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda line, step: calls.append((step, line)),
        finish=lambda exit_code: calls.append(exit_code),
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init = lambda **options: calls.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    out = tmp_path / "mine"
    settings = TrainConfig(steps=4, batch_size=32, log_every=2, wandb="saes", eval_every=4)
    Trainer(make(), source(), settings, out=out, holdout=source(40)).run(progress=False)
    options, *lines, code = calls
    assert (options["project"], options["name"], options["resume"]) == ("saes", "mine", "allow")
    assert len(options["id"]) == 16
    assert options["config"]["train"]["steps"] == 4 and code == 0
    assert [step for step, _ in lines] == [2, 4, 4]
    *_, last = log_lines(out)
    assert lines[-1][1]["eval/fvu"] == last["eval"]["fvu"]


def test_weights_and_biases_that_fail_do_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(line: Any, step: int) -> None:
        raise RuntimeError("no network")

    run = types.SimpleNamespace(log=fail, finish=lambda exit_code: None)
    monkeypatch.setattr(log_module, "start_wandb", lambda *_: run)
    with pytest.warns(UserWarning, match="gets no more lines: no network"):
        train(make(), source(), out=tmp_path, steps=4, log_every=1, wandb="saes")
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == [1, 2, 3, 4]


def test_weights_and_biases_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wandb: expected the package, got none: pip install"):
        train(make(), source(), out=tmp_path / "run", wandb="saes")
