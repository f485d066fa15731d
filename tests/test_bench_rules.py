"""bench/selection.py and bench/rules.py print what they promise; their figures are not judged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import randn

ROOT = Path(__file__).parent.parent


def bench(script: str, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    file = tmp_path / "rows.json"
    command = [sys.executable, f"bench/{script}.py", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_steps_of_rules_beside_topk(tmp_path: Path) -> None:
    options = "--shape 64,16,512,4 --steps 2 --rule gated --rule jumprelu --rule batchtopk".split()
    rows = bench("selection", tmp_path, *options)
    labels = ["topk", "gated", "gated, dense", "jumprelu", "jumprelu, dense", "batchtopk"]
    assert [row["rule"] for row in rows] == labels
    for row in rows:
        assert 150 < row["pairs"] < 300 if "dense" in row["rule"] else 2 < row["pairs"] < 15
        assert row["step_s"] > 0 and row["of_topk"] == row["step_s"] / rows[0]["step_s"]


def test_memory_of_rules(tmp_path: Path) -> None:
    options = "--memory --shape 64,16,512,4 --steps 1 --rule gradient-topk --rule relu".split()
    rows = bench("selection", tmp_path, *options)
    assert [row["rule"] for row in rows] == ["gradient-topk", "relu", "relu, dense"]
    for row in rows:
        assert row["state_bytes"] == 12 * (2 * 512 * 16 + 512 + 16)
        assert row["beside"] == row["peak_bytes"] - row["state_bytes"] > 0
        assert row["steps"] == 1


def test_what_rules_reach(tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", randn(3000, 16).numpy())
    options = ["--data", str(tmp_path / "acts.npy"), "--d-sae", "64", "--k", "3", "--seeds", "2"]
    options += "--rows 2000 --batch-size 100 --holdout 500 --rule topk --rule gated".split()
    rows = bench("rules", tmp_path, *options, "--set", "gated.l1_coef=0.02")
    assert [(row["rule"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("topk", "gated") for seed in (0, 1)
    ]
    assert rows[2]["parameters_l1_coef"] == "0.02"
    for row in rows:
        assert 0 < row["fvu"] < 1 and 0 <= row["dead_share"] < 1
        assert row["l0_5"] <= row["l0_50"] <= row["l0_95"]
    assert rows[0]["l0"] == rows[0]["l0_5"] == 3
