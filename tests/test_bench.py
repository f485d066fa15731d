"""The benchmarks print what they promise; their figures are not judged here."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import run

ROOT = Path(__file__).parent.parent
FIELDS = {
    "provider": str,
    "optimizer": str,
    "n": int,
    "d": int,
    "f": int,
    "k": int,
    "ms": float,
    "product_ms": float,
    "ratio": float,
    "peak_bytes": int,
    "load": float,
    "others": float,
}


def test_bench_prints_only_json_on_stdout_and_compares(tmp_path: Path) -> None:
    shape = (64, 32, 512, 8)
    before = {"bench": "step", "provider": "torch-dense", "optimizer": "torch-adam", "ms": 1e6}
    old = tmp_path / "old.json"
    old.write_text(json.dumps([before | dict(zip("ndfk", shape, strict=True))]))
    options = ("--shape", ",".join(map(str, shape)), "--threads", "1", "--compare", old)
    done = run("bench", "step", *options, "--json", "-")
    rows = json.loads(done.stdout)
    assert [row["provider"] for row in rows] == ["fastsae"] * 5 + ["torch-dense"]
    for row in rows:
        assert {name: type(row[name]) for name in FIELDS} == FIELDS
        assert tuple(row[size] for size in "ndfk") == shape and row["bench"] == "step"
        assert row["ratio"] == row["ms"] / row["product_ms"]
        assert row["min_ms"] <= row["ms"] <= row["max_ms"] and 3 <= row["runs"] <= 7
    assert "provider" in done.stderr and "6 rows in" in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "1000000.000" in line)
    assert line.startswith("step torch-dense") and line.endswith("faster")


def test_step_refuses_a_bad_shape() -> None:
    command = [sys.executable, "bench/step.py", "--shape", "64,32,8,9"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2
    assert "expected N,D,F,K" in done.stderr


def roofline(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "bench/roofline.py", *options]
    command += ["--json", str(tmp_path / "rows.json"), "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    with (tmp_path / "rows.csv").open() as file:
        assert [{k: str(v) for k, v in row.items()} for row in rows] == list(csv.DictReader(file))
    assert all(row["kernel"] in done.stdout for row in rows)
    return rows


def kernels_of(rows: list[dict[str, Any]], f: int, optimizer: str) -> dict[str, dict[str, Any]]:
    return {r["kernel"]: r for r in rows if (r["f"], r["optimizer"]) == (f, optimizer)}


def test_roofline_adds_up(tmp_path: Path) -> None:
    rows = roofline(tmp_path)
    groups = {(r["n"], r["d"], r["f"], r["k"], r["optimizer"]) for r in rows}
    assert len(groups) == 5 * 6
    for n, d, f, k, optimizer in groups:
        of = {
            r["kernel"]: r
            for r in rows
            if (r["n"], r["d"], r["f"], r["k"], r["optimizer"]) == (n, d, f, k, optimizer)
        }
        fp32 = "fp32" in optimizer and "bf16" not in optimizer
        assert of["product"]["flops"] == 2 * n * d * f
        # The product, 1.5 candidates for each of the k, the norms' 3 a weight, and comparisons.
        besides = of["encode"]["flops"] - 2 * n * d * f
        assert besides >= 2 * n * (3 * k // 2) * d + 3 * (n + f) * d
        assert besides < 0.02 * 2 * n * d * f
        assert of["encode.score"]["hbm_bytes"] >= n * (3 * k // 2) * d * (4 if fp32 else 2)
        assert of["encode.norms"]["hbm_bytes"] >= f * d * (4 if fp32 else 2)
        for what in ("flops", "hbm_bytes", "l2_bytes", "ms"):
            stages = [of[f"encode.{s}"][what] for s in ("norms", "screen", "select", "score")]
            assert of["encode"][what] == pytest.approx(sum(stages))
            rest = [of[name][what] for name in ("adam W_enc", "adam W_dec", "decode_error")]
            assert of["step"][what] >= of["encode"][what] + sum(rest)
        for row in of.values():
            assert row["ms"] >= 1e-9 * row["hbm_bytes"] / 3.0 * (1 - 1e-12)
            assert row["hbm_bytes"] <= row["l2_bytes"]
            assert row["ratio"] == pytest.approx(row["ms"] / of["product"]["ms"])
            assert row["ratio_merged"] <= row["ratio"]
        assert 1 < of["encode"]["ratio_merged"] < of["step"]["ratio_merged"]
    # 24 bytes an element of p, m and v, and of the pairs src: N rows, or each pair's where a row
    # is taken whole.
    n, d, f, k = 8192, 4096, 131072, 64
    of = kernels_of(rows, f, "exact fp32")
    assert of["adam W_enc"]["hbm_bytes"] == pytest.approx(24 * f * d + 4 * n * d, rel=0.01)
    assert of["adam W_dec"]["hbm_bytes"] == pytest.approx(24 * f * d + 4 * n * k * d, rel=0.01)
    # A batch of N·K even draws leaves e^(-NK/F) of the latents untouched.
    rows = roofline(tmp_path, "--shape", "8192,4096,1048576,64")
    lazy, all_ = (kernels_of(rows, 1 << 20, o) for o in ("bf16 p+m+v lazy", "bf16 p+m+v"))
    saved = all_["adam W_enc"]["hbm_bytes"] - lazy["adam W_enc"]["hbm_bytes"]
    assert saved == pytest.approx(12 * (1 << 20) * 4096 * 2.718281828**-0.5, rel=1e-6)


def test_roofline_takes_its_rates_from_the_command_line(tmp_path: Path) -> None:
    shape = ("--shape", "4096,768,24576,32")
    before = kernels_of(roofline(tmp_path, *shape), 24576, "bf16 p+m+v")
    rates = ("--bf16", "400", "--hbm", "1.5", "--l2", "2.75", "--vector", "15")
    after = kernels_of(roofline(tmp_path, *shape, *rates), 24576, "bf16 p+m+v")
    for name, row in before.items():
        assert after[name]["ms"] == pytest.approx(2 * row["ms"])
        assert (after[name]["bound"], after[name]["flops"]) == (row["bound"], row["flops"])
    more = kernels_of(roofline(tmp_path, *shape, "--candidates", "3"), 24576, "bf16 p+m+v")
    assert more["encode.score"]["flops"] == 2 * before["encode.score"]["flops"]


def gpu_check(out: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "bench/gpu_check.py", "--smoke", "--out", str(out), *options]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)
    assert (out / "gpu_check.json").exists(), done.stderr
    rows = json.loads((out / "gpu_check.json").read_text())
    with (out / "gpu_check.csv").open() as file:
        assert [r["name"] for r in rows] == [r["name"] for r in csv.DictReader(file)]
    return done.returncode, rows, done.stderr


def test_gpu_check_runs_every_part(tmp_path: Path) -> None:
    status, rows, stderr = gpu_check(tmp_path, "--test", "tests/test_kernels_index.py")
    assert [row["error"] for row in rows if row["error"]] == []
    assert status == 0, stderr
    tests, *rows = rows
    assert tests["name"] == "tests" and tests["skipped"] == "no test was selected"
    stages = ("", ".norms", ".screen", ".select", ".score", ".candidates")
    names = ["product", *(f"encode{s}" for s in stages)]
    names += ["encode_batch", "encode_columns", "encode_threshold", "decode_fwd", "decode_bwd_vals"]
    names += ["decode_error", "index", "row_sums", "row_gradients", "adam exact", "step bf16"]
    names += ["step bf16 lazy", "step bf16 beta1=0", *(f"encode{s}" for s in stages)]
    names += [f"encode fp32{s}" for s in stages]
    names += [f"adam {a}" for a in ("exact, unit rows", "lazy", "beta1=0", "bf16")]
    names += ["adam bf16, unit rows", "adam bf16 beta1=0"]
    names += [f"step {s}" for s in ("fp32", "fp32 lazy", "fp32 beta1=0")]
    names += ["eager dense", "eager sparse"]
    assert [row["name"] for row in rows] == names
    unit = rows[0]["ms"]
    for row in rows:
        assert (row["n"], row["d"], row["f"], row["k"]) == (3, 40, 16, 2)
        assert row["torch"] and row["triton"] and row["device"].startswith("cpu")
        if row["name"].endswith("candidates"):
            assert row["streamed"] == 0
        else:
            assert row["min_ms"] <= row["ms"] <= row["max_ms"]
            assert row["ratio"] == row["ms"] / unit
    assert {row["data"] for row in rows} == {"random", "real-like", None}
    assert "44 rows" in stderr


def test_gpu_check_goes_on_after_a_failed_part(tmp_path: Path) -> None:
    """With F < 8k, encode has no stages to time."""
    parts = [word for part in ("product", "encode", "adam lazy") for word in ("--part", part)]
    status, rows, _ = gpu_check(tmp_path, "--no-tests", "--shape", "3,40,16,4", *parts)
    assert status == 1
    assert [row["name"] for row in rows] == ["product", "encode", "encode", "adam lazy"]
    assert "expected 4 stages" in rows[2]["error"]
    assert all(row["ms"] and row["error"] is None for row in (*rows[:2], rows[3]))


DYING = """
import os, pathlib, sys, time
import torch
sys.path.insert(0, "bench")
import gpu_check

def die(problem, clock):
    yield {"name": "before"}
    os._exit(7)

gpu_check.PARTS["die"] = die
if __name__ == "__main__":
    report = gpu_check.Report(pathlib.Path(sys.argv[1]), torch.device("cpu"))
    jobs = [(gpu_check.SMOKE_SHAPE, part) for part in ("product", "die", "product")]
    gpu_check.run_jobs(report, jobs, "cpu", 1, time.monotonic() + 200)
"""


def test_gpu_check_goes_on_after_a_process_died(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    command = [sys.executable, str(tmp_path / "dying.py"), str(tmp_path)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["name"] for row in rows] == ["product", "before", "die", "product"]
    assert [row["error"] for row in rows] == [None, None, "the process ended with status 7", None]


def test_gpu_check_keeps_to_its_budget(tmp_path: Path) -> None:
    """And what was there before stays."""
    for runs in (1, 2):
        status, rows, _ = gpu_check(tmp_path, "--no-tests", "--budget", "0")
        assert status == 0
        assert [row["name"] for row in rows].count("step fp32") == runs
        assert {row["skipped"] for row in rows} == {"the budget is spent"}
