"""Several trainings side by side: each is, to the bit, the one that runs alone."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from common import threads
from test_checkpoint import same_state
from test_harvest import DOCUMENTS, WINDOW, causal, config, transformers
from test_harvest_sites import passes

from fastsae import SAE, checkpoint, cli, plan, suite
from fastsae.commands.suite import read_suite
from fastsae.commands.train import layered
from fastsae.harvest import harvest_sites
from fastsae.sae import SAEOutput
from fastsae.train import Trainer

COMMON = """
steps = 12
batch_size = 32
lr = 1e-2
holdout = 20
k = 3
d_sae = 24
checkpoint_every = 5
eval_every = 6
init_rows = 40
"""
SITES = ("residual-1", "mlp-1", "residual-3")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a stream's file and harvested sets of the same sites."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i}: {line}. " for i, line in enumerate(DOCUMENTS * 6)))
    transformers(monkeypatch, "LlamaForCausalLM", causal().net)
    (tmp_path / "model").mkdir()
    (tmp_path / "stream.toml").write_text(
        'model = "model"\ntext = ["text.txt"]\nlayer = [1, 3]\nsite = ["residual", "mlp"]\n'
        'window = 10\nbatch_size = 2\ndtype = "float32"\nbuffer_rows = 100\n'
    )
    options = config(layer=(1, 3), site=("residual", "mlp"), gradients=True)
    harvest_sites(causal(), [text], tmp_path / "sets", options)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(kind: str, site: str) -> str:
    return f"live:stream.toml:{site}" if kind == "live" else f"sets/{site}"


def members(kind: str) -> dict[str, dict[str, Any]]:
    """What each SAE has of its own: sites, widths, rules, orders, lengths, optimisers."""
    found: dict[str, dict[str, Any]] = {
        "small": {"data": data(kind, "residual-1")},
        "wide": {"data": data(kind, "residual-1"), "d_sae": 40, "k": 5, "ema": 0.9},
        "batch": {"data": data(kind, "mlp-1"), "selection": "batchtopk", "steps": 9},
        "transcoder": {"data": data(kind, "mlp-1"), "target": data(kind, "residual-3")},
        "lazy": {"data": data(kind, "residual-3"), "optimizer": "adam-lazy"},
        "seed": {"data": data(kind, "residual-1"), "seed": 1},
        "large": {"data": data(kind, "residual-1"), "batch_size": 48, "init_rows": 48},
    }
    if kind == "sets":
        found["guided"] = {"data": data(kind, "mlp-3"), "selection": "gradient-topk"}
    return found


def write_suite(path: Path, own: dict[str, dict[str, Any]]) -> None:
    tables = [
        "".join([f"[{name}]\n", *(f"{key} = {json.dumps(v)}\n" for key, v in options.items())])
        for name, options in own.items()
    ]
    path.write_text(COMMON + "\n".join(tables))


def train_alone(place: Path, name: str, own: dict[str, Any], out: str = "alone") -> None:
    (place / "one.toml").write_text(COMMON)
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in own.items()]
    cli.main(["train", "--config", "one.toml", *arguments, "--out", str(place / out / name)])


def assert_same_run(a: Path, b: Path) -> None:
    """All that is not a time is the same."""
    timed = ("seconds", "tokens_per_s", "train_seconds", "product_seconds", "step_ratio")
    checkpoints = sorted(path.name for path in a.glob("step-*"))
    assert checkpoints and checkpoints == sorted(path.name for path in b.glob("step-*"))
    for name in checkpoints:
        same_state(a / name, b / name)
    for name in ("run.json", "config.json", "sae.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    logs, figures = [], []
    for run in (a, b):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k not in timed} for line in lines])
        found = json.loads((run / "metrics.json").read_text())
        figures.append({k: v for k, v in found.items() if k not in timed})
    assert logs[0] == logs[1] and figures[0] == figures[1]
    assert (a / "report.html").exists() and (b / "report.html").exists()


@pytest.mark.parametrize("kind", ["live", "sets"])
def test_each_is_the_one_alone(kind: str, place: Path) -> None:
    write_suite(place / "suite.toml", members(kind))
    cli.main(["suite", "suite.toml", "--out", "out"])
    for name, own in members(kind).items():
        train_alone(place, name, own)
        assert_same_run(place / "out" / name, place / "alone" / name)
    assert sorted(path.name for path in (place / "out").iterdir()) == sorted(members(kind))


def test_one_forward_pass_feeds_them_all(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def windows(own: dict[str, dict[str, Any]], out: str) -> int:
        model = causal()
        transformers(monkeypatch, "LlamaForCausalLM", model.net)
        seen = passes(model, "embed")
        write_suite(place / "suite.toml", own)
        cli.main(["suite", "suite.toml", "--out", out])
        return sum(seen)

    same = {name: {"data": data("live", site)} for name, site in zip("abc", SITES, strict=True)}
    one, three = windows({"a": same["a"]}, "one"), windows(same, "three")
    first_look, held = 2, -(-20 // (WINDOW - 1))  # of a source: its first chunk, what is held out
    assert three == one + 2 * (first_look + held)
    again = {"a": same["a"], "b": {**same["a"], "d_sae": 9}}
    assert windows(again, "again") == one  # nor are held-out rows read twice
    rows = 12 * 32 + 40  # trained on, and measured at the start; each reads a buffer ahead
    assert one * (WINDOW - 1) < rows + 2 * 100 + 8 * WINDOW


def stop_in(
    monkeypatch: pytest.MonkeyPatch, d_sae: int, step: int, error: Exception | None
) -> None:
    """In the step of an SAE of that width the process is asked to end, or an error is raised."""
    real = Trainer.step

    def stopping(self: Trainer, batch: Any) -> SAEOutput:
        if self.sae.config.d_sae == d_sae and self.step_count + 1 == step:
            if error is not None:
                raise error
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    monkeypatch.setattr(Trainer, "step", stopping)


@pytest.mark.parametrize("kind", ["live", "sets"])
def test_a_stop_stops_all_and_all_go_on(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    own = {name: members(kind)[name] for name in ("small", "wide", "batch", "large")}
    write_suite(place / "suite.toml", own)
    for step in (3, 7, 11):
        with monkeypatch.context() as patched:
            stop_in(patched, d_sae=40, step=step, error=None)
            cli.main(["suite", "suite.toml", "--out", "out", "--resume"])
        said = capsys.readouterr().out
        assert f"stopped after step {step} of 12; go on with: fastsae suite suite.toml" in said
        for name in own:
            assert (place / "out" / name / "latest").is_dir()
    cli.main(["train", "--resume", "--out", "out/small"])  # one of them alone
    cli.main(["suite", "suite.toml", "--out", "out", "--resume"])
    for name, options in own.items():
        train_alone(place, name, options)
        same_state(place / "out" / name / "latest", place / "alone" / name / "latest")


def test_one_that_begins_later_catches_up(place: Path) -> None:
    own = {name: members("live")[name] for name in ("small", "wide", "batch")}
    write_suite(place / "suite.toml", {"small": own["small"]})
    cli.main(["suite", "suite.toml", "--out", "out"])
    write_suite(place / "suite.toml", own)
    cli.main(["suite", "suite.toml", "--out", "out", "--resume"])
    for name, options in own.items():
        train_alone(place, name, options)
        assert_same_run(place / "out" / name, place / "alone" / name)


@pytest.mark.parametrize("changes", [{"scale": False}, {"eval_every": 1}], ids=str)
def test_one_that_diverges_ends_alone(place: Path, changes: dict[str, Any]) -> None:
    """It is a step that finds it, or the rows held out."""
    own = {"small": members("live")["small"], "batch": members("live")["batch"]}
    bad = {**own["small"], "lr": 1e30, **changes}
    write_suite(place / "suite.toml", {"bad": bad, **own})
    message = r"1 of 3 SAEs diverged: bad: step \d+: expected .* a lower learning rate usually"
    with pytest.raises(SystemExit, match=message):
        cli.main(["suite", "suite.toml", "--out", "out"])
    assert not (place / "out" / "bad" / "metrics.json").exists()
    assert checkpoint.latest(place / "out" / "bad") is None
    for name, options in own.items():
        train_alone(place, name, options)
        assert_same_run(place / "out" / name, place / "alone" / name)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("mine")], ids=str)
def test_any_other_error_ends_all_after_they_saved(
    error: Exception, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: members("sets")[name] for name in ("small", "wide", "batch")}
    write_suite(place / "suite.toml", own)
    message = "wide: step 6: .*No space left; .*step-5 is whole" if error.args[0] == 28 else "mine"
    with monkeypatch.context() as patched:
        stop_in(patched, d_sae=40, step=7, error=error)
        with pytest.raises(SystemExit, match=message):
            cli.main(["suite", "suite.toml", "--out", "out"])
    steps = {name: os.readlink(place / "out" / name / "latest") for name in own}
    assert steps == {"small": "step-7", "wide": "step-5", "batch": "step-6"}
    cli.main(["suite", "suite.toml", "--out", "out", "--resume"])
    for name, options in own.items():
        train_alone(place, name, options)
        same_state(place / "out" / name / "latest", place / "alone" / name / "latest")


def test_memory_is_that_of_all_and_checked_first(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: members("live")[name] for name in ("small", "wide", "lazy")}
    write_suite(place / "suite.toml", own)
    asked: list[plan.Plan] = []
    monkeypatch.setattr(suite.plan, "check", lambda found, _: asked.append(found))
    cli.main(["suite", "suite.toml", "--out", "out"])
    for name, options in own.items():
        train_alone(place, name, options)
    whole, *each = asked
    assert whole.weights == sum(p.weights for p in each)
    assert whole.moments == sum(p.moments for p in each)
    assert whole.step == max(p.step for p in each) and whole.process == plan.PROCESS
    d = SAE.load(place / "alone" / "small").config.d_in
    assert each[0].shuffled == 3 * 100 * d * 4 and whole.shuffled == 3 * 100 * 2 * d * 4
    monkeypatch.undo()
    monkeypatch.chdir(place)
    lasting = whole.memory - whole.step
    transformers(monkeypatch, "LlamaForCausalLM", causal().net)
    monkeypatch.setattr(plan, "available", lambda: lasting - 1)
    monkeypatch.setattr(SAE, "__init__", lambda *_, **__: pytest.fail("an SAE was made"))
    with pytest.raises(SystemExit, match="expected a training that fits the memory"):
        cli.main(["suite", "suite.toml", "--out", "none"])
    assert not (place / "none").exists()


WRONG = {
    "none": ('data = "x.npy"\n', "expected a table for each SAE, got none"),
    "name": ('["a/b"]\nd_sae = 4\n', "expected names of folders, got 'a/b'"),
    "dots": ('[".."]\nd_sae = 4\n', r"expected names of folders, got '\.\.'"),
    "option": ("[a]\nd_sea = 4\n", "a: d_sea: there is no such option; did you mean d_sae"),
    "shared": ("stepps = 4\n[a]\nd_sae = 4\n", "stepps: there is no such option"),
    "type": ('[a]\nd_sae = "4"\n', "a: d_sae: expected an integer, got '4'"),
    "data": ("[a]\nd_sae = 4\n", "a: expected data, got none"),
    "d_sae": ('[a]\ndata = "x.npy"\n', "a: expected d_sae, got none"),
    "absent": ('[a]\ndata = "x.npy"\nd_sae = 4\n', "a: x.npy: no such file"),
    "value": (
        '[a]\ndata = "sets/mlp-1"\nd_sae = 4\nholdout = 9\nk = 9\n',
        "a: k: expected at most d_sae = 4",
    ),
    "wandb": (
        '[a]\ndata = "sets/mlp-1"\nd_sae = 64\nholdout = 9\nwandb = "p"\n',
        "wandb: expected ",
    ),
    "processes": ("[a]\nshard_latents = 2\n", "a: shard_latents: there is no such option"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(text: str, message: str, place: Path) -> None:
    (place / "suite.toml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        cli.main(["suite", "suite.toml", "--out", "out"])
    assert not (place / "out").exists()


def test_runs_that_are_there_are_not_begun_again(place: Path) -> None:
    own = {"small": members("sets")["small"], "batch": members("sets")["batch"]}
    write_suite(place / "suite.toml", own)
    cli.main(["suite", "suite.toml", "--out", "out"])
    shutil.rmtree(place / "out" / "small")
    with pytest.raises(SystemExit, match="out/batch: expected a new run directory"):
        cli.main(["suite", "suite.toml", "--out", "out"])
    own["batch"]["lr"] = 1e-3
    write_suite(place / "suite.toml", own)
    with pytest.raises(SystemExit, match=r"what it began with: expected lr 0\.01"):
        cli.main(["suite", "suite.toml", "--out", "out", "--resume"])
    assert not (place / "out" / "small").exists()


def test_a_rule_and_its_k_are_those_of_the_inner_table(tmp_path: Path) -> None:
    file = tmp_path / "suite.json"
    rule = {"name": "matryoshka", "k": 8}
    own = {"a": {"k": 4}, "b": {"selection": "topk"}}
    file.write_text(json.dumps({"data": "x", "d_sae": 9, "selection": rule, **own}))
    found = read_suite(file)
    assert list(found) == ["a", "b"] and found["a"][0]["selection"] == rule
    given, parameters = layered(found["a"])
    assert "--k=4" in given and "--selection=matryoshka" in given and parameters == {}
    assert layered(found["b"])[1] == {}
