"""The benchmarks print what they promise; their figures are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIELDS = {
    "provider": str,
    "optimizer": str,
    "options": list,
    "n": int,
    "d": int,
    "f": int,
    "k": int,
    "step_s": float,
    "product_s": float,
    "ratio": float,
    "peak_bytes": int,
}


def test_step_prints_only_json_on_stdout() -> None:
    command = [sys.executable, "bench/step.py", "--shape", "64,32,512,8", "--json", "-"]
    command += ["--steps", "3", "--no-peers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["provider"] for row in rows} == {"fastsae", "torch-dense"}
    for row in rows:
        assert {name: type(row[name]) for name in FIELDS} == FIELDS
        assert (row["n"], row["d"], row["f"], row["k"]) == (64, 32, 512, 8)
        assert row["ratio"] == row["step_s"] / row["product_s"]
    assert "provider" in done.stderr


def test_step_refuses_a_bad_shape() -> None:
    command = [sys.executable, "bench/step.py", "--shape", "64,32,8,9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2
    assert "expected N,D,F,K" in done.stderr
