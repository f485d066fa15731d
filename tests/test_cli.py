"""The command line, as a person meets it: in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsae import SAE, SAEConfig, TopK
from fastsae.cli import main
from fastsae.data import open_source
from fastsae.train import evaluate


def run(*args: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastsae", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("acts") / "acts.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.standard_normal((3000, 24)).astype(np.float32))
    return path


def test_train_writes_a_run_that_loads(acts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--k", 4, "--batch-size", 128, "--steps", 60, "--lr", 1e-3, "--seed", 3)
    done = run("train", "--data", acts, "--d-sae", 96, "--out", out, "--holdout", 500, *options)
    figures = json.loads((out / "metrics.json").read_text())
    for name in ("fvu", "pca_fvu", "l0", "dead_share", "train_seconds", "tokens_per_s"):
        assert np.isfinite(figures[name]), name
    assert figures["step_ratio"] > 0
    assert 0 < figures["fvu"] < 1
    assert figures["l0"] == 4
    assert f"{figures['fvu']:.4f}" in done.stdout
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["sae"]["d_sae"] == 96
    assert lines[0]["config"]["train"]["seed"] == 3
    assert [line["step"] for line in lines if "loss" in line] == [50, 60]
    assert [line["step"] for line in lines if "eval" in line] == list(range(6, 61, 6))
    assert lines[-1]["eval"]["fvu"] == figures["fvu"]
    sae = SAE.load(out)
    assert sae.config.selection.to_dict()["k"] == 4
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(96))


def test_selection_and_its_parameters(acts: Path, tmp_path: Path) -> None:
    options = ("--data", acts, "--d-sae", 96, "--batch-size", 64, "--steps", 6, "--holdout", 100)
    out = tmp_path / "run"
    parameters = ("--k", 4, "--selection.groups", "[0.5, 0.5]", "--selection.bias-term=false")
    run("train", *options, "--out", out, "--selection", "matryoshka", *parameters)
    selection = json.loads((out / "config.json").read_text())["selection"]
    assert selection["name"] == "matryoshka" and selection["k"] == 4
    assert selection["groups"] == [0.5, 0.5] and selection["bias_term"] is False
    assert "training_l0" in json.loads((out / "metrics.json").read_text())

    wrong = [
        (("--selection", "bottomk"), "expected one of abs-topk, batchtopk"),
        (("--selection", "topk", "--selection.depth", "3"), "topk has the parameters k, score"),
        (("--selection.anneal",), "--selection.anneal: expected a value after it"),
        (("--selection", "topk", "--selection.score", "norm"), "score: expected activation or"),
        (("--selection", "gradient-topk"), "expected stored gradients, got none"),
    ]
    for extra, message in wrong:
        done = run("train", *options, "--out", tmp_path / "no", *extra, code=1)
        assert message in done.stderr and not (tmp_path / "no").exists()
    assert "expected with train only" in run("info", "--selection.k", 3, code=1).stderr
    assert "expected a file" in run("eval", tmp_path / "no", code=1).stderr


def test_same_seed_same_weights(acts: Path, tmp_path: Path) -> None:
    options = ("--d-sae", 64, "--k", 4, "--batch-size", 64, "--steps", 20, "--holdout", 100)
    for name in ("a", "b"):
        run("train", "--data", acts, "--out", tmp_path / name, *options)
    a, b = (tmp_path / name / "sae.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_transcoder(acts: Path, tmp_path: Path) -> None:
    x = np.load(acts)
    np.save(tmp_path / "y.npy", (x @ np.ones((24, 7), np.float32)).astype(np.float16))
    out = tmp_path / "run"
    options = ("--d-sae", 64, "--k", 4, "--steps", 20, "--batch-size", 64, "--skip")
    run("train", "--data", acts, "--target", tmp_path / "y.npy", "--out", out, *options)
    sae = SAE.load(out)
    assert sae.config.d_out == 7
    assert sae.W_skip is not None and sae.W_skip.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "missing.npy"), "missing.npy"),
        (("--data", "sample:nothing"), "minilm_l3"),
        (("--k", 97), "k: expected at most d_sae = 96, got 97"),
        (("--steps", 0), "steps: expected at least 1, got 0"),
        (("--lr", -1), "lr: expected a finite number above 0"),
        (("--holdout", 3000), "3000"),
        (("--dtype", "int8"), "dtype: expected one of"),
        (("--decoder-norm", "long"), "decoder_norm: expected unit or free"),
        (("--skip",), "skip: expected d_out"),
        (("--lr", 1e30, "--no-scale"), "expected"),
    ],
)
def test_bad_input_is_one_line(
    acts: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    out = tmp_path / "run"
    defaults = {"--data": acts, "--d-sae": 96, "--k": 4, "--steps": 60, "--out": out}
    given = [x for name, x in defaults.items() if name not in options for x in (name, x)]
    done = run("train", *given, *options, code=1)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (out / "sae.safetensors").exists()
    assert not (out / "metrics.json").exists()


def test_a_run_is_interrupted_resumed_and_evaluated(acts: Path, tmp_path: Path) -> None:
    options = ("--d-sae", 64, "--k", 4, "--batch-size", 64, "--lr", 1e-3, "--holdout", 100)
    whole, out = tmp_path / "whole", tmp_path / "run"
    data = ("--data", acts.name)  # a name that means something in this folder only
    run("train", *data, "--steps", 3000, "--out", whole, *options, cwd=acts.parent)
    command = [sys.executable, "-m", "fastsae", "train", "--steps", "3000", *map(str, options)]
    process = subprocess.Popen(
        [*command, *data, "--out", str(out)], cwd=acts.parent, stdout=subprocess.PIPE, text=True
    )
    while not ((out / "log.jsonl").exists() and b'"step": 50' in (out / "log.jsonl").read_bytes()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"go on with: fastsae train --resume --out {out}" in said
    assert not (out / "metrics.json").exists()
    unfinished = json.loads(run("eval", out, "--json").stdout)
    run("train", "--resume", "--out", out)  # from another folder
    assert (out / "sae.safetensors").read_bytes() == (whole / "sae.safetensors").read_bytes()
    figures = json.loads((out / "metrics.json").read_text())
    again = json.loads(run("eval", out, "--json").stdout)
    assert again["fvu"] == figures["fvu"] < unfinished["fvu"]
    assert f"{again['fvu']:.4f}" in run("eval", out).stdout
    everything = json.loads(run("eval", out, "--data", acts, "--json").stdout)
    assert everything["fvu"] == evaluate(SAE.load(out), open_source(acts))["fvu"]

    moved = tmp_path / "moved.npy"
    shutil.copy(acts, moved)
    run("train", "--resume", "--out", out, "--data", moved)
    assert json.loads((out / "run.json").read_text())["data"] == str(moved)
    np.save(tmp_path / "other.npy", np.load(acts)[::-1])
    done = run("train", "--resume", "--out", out, "--data", tmp_path / "other.npy", code=1)
    assert "a run goes on with what it began with: expected rows" in done.stderr

    done = run("train", "--resume", "--out", out, "--k", 5, code=1)
    assert "a run goes on with what it began with: expected k 4, got 5" in done.stderr
    for folder, message in ((tmp_path, "expected a file config.json"), (acts, "expected a file")):
        assert message in run("eval", folder, code=1).stderr
    # --resume where there is nothing yet begins: one command line serves for every start of a job.
    run(
        "train",
        *data,
        "--steps",
        2,
        "--resume",
        "--out",
        tmp_path / "new",
        *options,
        cwd=acts.parent,
    )
    assert SAE.load(tmp_path / "new").config.d_sae == 64


def test_nobody_listens(acts: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastsae", "train", "--data", str(acts), "--d-sae", "64"]
    command += ["--k", "4", "--steps", "3", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").exists()


def test_run_json_of_someone_else(acts: Path, tmp_path: Path) -> None:
    run("train", "--data", acts, "--d-sae", 64, "--k", 4, "--steps", 2, "--out", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    for text, message in (("{}", "data: expected it as train wrote it, got None"), ("[", "JSON")):
        path.write_text(text)
        for command in ("eval", "report"):
            assert message in run(command, tmp_path / "run", code=1).stderr


def test_plan(tmp_path: Path) -> None:
    options = ("--d-in", 2688, "--d-sae", 2**20, "--k", 32)
    found = json.loads(run("plan", *options, "--memory-gb", 80, "--json").stdout)
    assert found["weights"] == 4 * (2 * 2688 * 2**20 + 2**20 + 2688)
    assert 2 * found["weights"] < found["moments"] < 2.01 * found["weights"]
    assert found["gradients"] == 0 and found["fits"] and 67e9 < found["memory"] < 70e9
    dense = json.loads(run("plan", *options, "--optimizer", "torch-adam", "--json").stdout)
    assert dense["gradients"] == found["weights"]
    text = run("plan", *options, "--memory-gb", 60).stdout
    assert "does not fit" in text and "60.00 GB are there" in text
    assert not list(tmp_path.iterdir())


def test_a_training_that_cannot_fit_is_refused_early(acts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("train", "--data", acts, "--d-sae", 2**31 - 1, "--out", out, code=1)
    assert "expected a training that fits the memory" in done.stderr and not out.exists()
    assert "weights" in done.stderr and "does not fit" in done.stderr


def test_a_finished_run_is_not_overwritten(acts: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("precious\n")
    done = run("train", "--data", acts, "--d-sae", 64, "--out", tmp_path, "--k", 4, code=1)
    assert "expected a new run directory, got one with log.jsonl" in done.stderr
    assert (tmp_path / "log.jsonl").read_text() == "precious\n"


def test_demo_reaches_its_figures(tmp_path: Path) -> None:
    done = run("demo", cwd=tmp_path)
    figures = json.loads((tmp_path / "runs/demo/metrics.json").read_text())
    assert figures["fvu"] <= 0.212
    assert 0.53 <= figures["pca_fvu"] <= 0.57
    assert figures["l0"] == 32
    assert figures["dead_share"] < 0.01
    assert f"{figures['fvu']:.4f}" in done.stdout
    assert SAE.load(tmp_path / "runs/demo").config.d_sae == 3072


def test_help_says_what_options_mean() -> None:
    text = run("train", "--help").stdout
    for words in ("--d-sae", "Number of latents.", "(default: 32)", "Tokens a step."):
        assert words in text
    assert all(name in run("--help").stdout for name in ("demo", "train", "info"))


def test_info_names_every_backend() -> None:
    text = run("info").stdout
    assert torch.__version__ in text
    for backend in ("reference", "cpu", "triton"):
        assert any(line.startswith(backend) for line in text.splitlines())
    assert "instruction set" in text


def test_what_compares_runs_refuses_in_one_line(acts: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    SAE(SAEConfig(24, 32, TopK(3))).save(small)
    SAE(SAEConfig(24, 48, TopK(3))).save(large)
    codes, meta = tmp_path / "codes", tmp_path / "meta"
    cases = (
        (("compare", small), "expected at least two runs to compare, got 1"),
        (("compare", small, large), "expected runs of one shape, (32, 24), got (48, 24)"),
        (("compare", small, tmp_path), "expected a file config.json, got none"),
        (("stitch", small, large), "run.json: no such file"),
        (("stitch", small, large, "--data", acts, "--threshold", 2), "threshold: expected"),
        (("encode", "no.npy", "--sae", small, "--out", codes), "no.npy: no such file"),
        (("encode", acts, "--sae", small, "--out", codes, "--contexts", 0), "contexts"),
        (("meta", small, "--d-sae", 8, "--k", 9, "--out", meta), "expected at most d_sae = 8"),
        (("meta", acts.parent, "--d-sae", 8, "--out", meta), "sae.safetensors: no such file"),
    )
    for arguments, message in cases:
        with pytest.raises(SystemExit) as refused:
            main([*map(str, arguments)])
        said = str(refused.value.code)
        assert said.startswith("fastsae: error: ") and message in said and "\n" not in said
    assert not codes.exists() and not meta.exists()
