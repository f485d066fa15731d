"""Rows, limits, gates and tables of bench/, and its front; no figures are judged."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run

ROOT = Path(__file__).parent.parent
SHAPE = (48, 24, 384, 6)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")


def row(**figures: Any) -> dict[str, Any]:
    return {"bench": "ops", "op": "decode", "provider": "ours", "n": 4, "d": 3, "f": 2, **figures}


# ---- rows ----


def test_rows_come_back_from_csv_and_json(tmp_path: Path) -> None:
    from rows import read, write

    rows = [
        row(ms=1.25, options=["a", "b"], commit="1234", note=None),
        row(ms=3, before={"s": 0.5}, error="killed, by 9"),
    ]
    expected = [
        row(ms=1.25, options="a; b", commit="1234"),
        row(ms=3, before_s=0.5, error="killed, by 9"),
    ]
    for name in ("rows.csv", "rows.json"):
        write(rows, tmp_path / name)
        found = read(tmp_path / name)
        assert found == expected
        assert type(found[0]["commit"]) is str and type(found[1]["ms"]) is int
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.json"]


def test_compare_marks_ranges_that_part() -> None:
    from rows import compare

    old = [row(ms=2.0, min_ms=1.9, max_ms=2.1), row(provider="other", ms=1.0)]
    cases = {(2.2, 2.05, 2.4): "", (4.0, 3.9, 4.1): "slower", (1.0, 0.9, 1.1): "faster"}
    for (ms, low, high), mark in cases.items():
        (line,) = compare([row(ms=ms, min_ms=low, max_ms=high)], old)
        assert f"{2.0:10.3f} {ms:10.3f} ms {ms / 2:6.2f}" in line
        assert line.endswith(mark) and ("er" in line.split()[-1]) == bool(mark)
    assert compare([row(op="encode", ms=1.0), row(error="WRONG")], old) == []


def test_names_of_outputs_are_checked_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rows import add_outputs

    parser = argparse.ArgumentParser()
    add_outputs(parser)
    assert parser.parse_args(["--json", "-", "--csv", "a.csv"]).json == "-"
    for option, file in (("--json", "a.csv"), ("--csv", "-")):
        with pytest.raises(SystemExit):
            parser.parse_args([option, file])
        assert f"expected a name ending in .{option[2:]}, got '{file}'" in capsys.readouterr().err


# ---- method ----


def test_a_watch_counts_others_and_not_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from measure import Watch

    work, own = iter([100.0, 102.0]), iter([10.0, 10.8])
    now = iter([5.0, 6.0])
    monkeypatch.setattr(Watch, "_busy", staticmethod(lambda: next(work)))
    monkeypatch.setattr(Watch, "_own", staticmethod(lambda: next(own)))
    monkeypatch.setattr("measure.time.perf_counter", lambda: next(now))
    with Watch() as watch:
        pass
    monkeypatch.undo()
    assert watch.columns()["others"] == 1.2
    assert watch.columns()["load"] >= 0


def test_work_of_this_process_and_its_children_is_its_own() -> None:
    from measure import Watch

    own, work = Watch._own(), Watch._busy()
    subprocess.run([sys.executable, "-c", "sum(range(10**6 * 5))"], check=True)
    mine = Watch._own() - own
    assert 0.02 < mine < Watch._busy() - work + 0.1


def test_the_clock_takes_turns_and_keeps_to_its_time() -> None:
    from clock import Clock

    calls: list[tuple[str, int]] = []

    def work(name: str, seconds: float) -> Any:
        def run(i: int) -> None:
            calls.append((name, i))
            time.sleep(seconds)

        return run

    clock = Clock(torch.device("cpu"), repeats=5, seconds=0.05)
    times = clock.turns({"slow": work("slow", 0.03), "quick": work("quick", 0.0)})
    assert [len(ms) for ms in times.values()] == [3, 5]
    assert calls[:4] == [("slow", 0), ("quick", 0), ("slow", 1), ("quick", 1)]
    assert min(times["slow"]) >= 30


def test_a_limit_is_the_longest_of_its_parts() -> None:
    from limits import Cost, Rates

    rates = Rates(memory=2e9, flops={"fp32": 1e9, "bf16": 4e9})
    for cost, expected, uncached in (
        (Cost(10**9, "fp32", 10**9), (1000.0, "fp32 products"), 1000.0),
        (Cost(10**9, "bf16", 10**9, 3 * 10**9), (500.0, "memory"), 1500.0),
    ):
        assert rates.limit(cost) == expected and rates.uncached(cost) == uncached
    assert rates.columns()["bf16_gflop_s"] == 4.0


def test_measured_rates_are_finite() -> None:
    from limits import measure_rates

    rates = measure_rates(torch.device("cpu"), repeats=1, small=True)
    assert all(0 < rate < 1e6 for rate in rates.columns().values())


# ---- gates ----


def operations(tiny: tuple[int, int, int, int] = SHAPE) -> Any:
    from operations import Operations

    return Operations(tiny, torch.device("cpu"), ["cpu", "reference"])


def spoiled(result: Any, by: float) -> Any:
    """The result with one number of its last tensor that holds fractions, or ids, changed."""
    parts = list(result) if isinstance(result, tuple) else [result]
    part = next(i for i in (2, 0) if i < len(parts))
    parts[part] = parts[part].clone()
    flat = parts[part].view(-1)
    flat[0] = flat[0] + (by if flat.is_floating_point() else 1)
    return tuple(parts) if isinstance(result, tuple) else parts[0]


NAMES = (
    *("encode", "encode, one token", "select", "decode", "decode, loss, dvals"),
    *("inverse index", "row gradients", "gradient + Adam", "gradient + lazy Adam"),
)


@pytest.mark.parametrize("name", NAMES)
def test_every_provider_passes_its_gate_and_a_wrong_one_does_not(name: str) -> None:
    from ops import gate

    op = operations().makers()[name]()
    runs = {who: run for who, run in op.providers.items() if who != "torch compiled"}
    assert {who: gate(op, run) for who, run in runs.items()} == dict.fromkeys(runs)
    wrong = {who: gate(op, lambda i, run=run: spoiled(run(i), 0.01)) for who, run in runs.items()}
    if "Adam" in name:  # what is wrong with a step is small, as the step is
        runs = {who: run for who, run in operations().makers()[name]().providers.items()}
        wrong = {who: gate(op, lambda i, run=run: run(i) + 1e-5) for who, run in runs.items()}
    assert all(str(error).startswith("WRONG: expected") for error in wrong.values()), wrong

    def fails(i: int) -> None:
        raise RuntimeError("no\nkernel")

    assert gate(op, fails) == "RuntimeError: no kernel"


def test_a_rule_with_other_pairs_is_wrong() -> None:
    from ops import gate
    from rule_operations import RuleOperations

    op = RuleOperations(SHAPE, torch.device("cpu"), ["cpu"]).operation("batchtopk")
    run = op.providers["fastsae cpu"]
    assert gate(op, run) is None
    assert str(gate(op, lambda i: run(i + 1))).startswith("WRONG: expected the pairs")


def test_a_wrong_provider_has_no_time() -> None:
    from clock import Clock
    from limits import Rates
    from ops import measure_op

    op = operations().decode()
    right = op.providers["fastsae cpu"]
    op = op._replace(providers={"right": right, "wrong": lambda i: right(i) * 1.01})
    rates = Rates(1e9, {"fp32": 1e9, "bf16": 1e9})
    good, bad = measure_op(op, Clock(torch.device("cpu"), 3, 1.0), rates, 2.0)
    assert good["ratio"] == good["ms"] / 2 and good["runs"] == 3
    assert good["of_limit"] == good["limit_ms"] / good["ms"]
    assert bad["error"].startswith("WRONG") and "ms" not in bad


def test_a_wrong_step_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import step

    def off(*args: Any, **options: Any) -> Any:
        run, sae = step.dense_step(*args, **options)
        return lambda batch: run(batch) * 1.0001, sae

    monkeypatch.setitem(step.PROVIDERS, "torch-dense", off)
    row = step.measure_row(SHAPE, "torch-dense", "torch-adam", [], 3, torch.get_num_threads())
    assert row["error"].startswith("WRONG: ") and "ms" not in row
    assert (row["n"], row["bench"]) == (SHAPE[0], "step")


# ---- the front ----


def test_bench_says_what_it_cannot_run() -> None:
    done = run("bench", "nothing", code=2)
    assert "expected one of ops, step, peers, scaling, integrations, got 'nothing'" in done.stderr


def test_triton_needs_a_gpu() -> None:
    command = [sys.executable, "bench/ops.py", "--backend", "triton"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=env)
    assert done.returncode == 2
    assert "--backend triton: expected a GPU that torch can use, got none" in done.stderr


def test_bench_needs_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "fastsae"
    package.mkdir()
    shutil.copy(ROOT / "fastsae" / "bench.py", package)
    code = "import bench; bench.run([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True)
    assert "FileNotFoundError: bench: expected a checkout with the folder bench/" in done.stderr


def test_a_peer_that_is_missing_or_fails_has_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peers

    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    assert peers.run("saelens", SHAPE)["error"] == "not installed: make peers"
    (tmp_path / "saelens" / "bin").mkdir(parents=True)
    (tmp_path / "saelens" / "installed").touch()
    python = tmp_path / "saelens" / "bin" / "python"
    for script, error in (
        ("echo a >&2; echo 'ImportError: no torch' >&2; exit 1", "ImportError: no torch"),
        ("kill -9 $$", "killed by SIGKILL"),
    ):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        assert peers.run("saelens", SHAPE)["error"] == error
    python.write_text("#!/bin/sh\necho '{\"ms\": 2.5}'\n")
    found = peers.run("saelens", SHAPE, "--steps", 1)
    assert found["ms"] == 2.5 and found["provider"] == "saelens" and found["n"] == SHAPE[0]


def test_quality_starts_everyone_alike(tmp_path: Path) -> None:
    command = [sys.executable, "bench/quality.py", "--data", "sample:minilm_l3", "--seconds", "0.3"]
    command += ["--d-sae", "512", "--k", "8", "--batch-size", "256", "--threads", "1"]
    command += ["--provider", "fastsae", "--provider", "torch-dense", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    curves: dict[str, list[dict[str, Any]]] = {}
    for point in json.loads(done.stdout):
        curves.setdefault(point["provider"], []).append(point)
    ours, dense = curves["fastsae"], curves["torch-dense"]
    assert ours[0]["fvu"] == pytest.approx(dense[0]["fvu"], rel=1e-5)
    for curve in (ours, dense):
        assert curve[0]["seconds"] == 0 and curve[-1]["seconds"] >= 0.3
        assert curve[-1]["fvu"] < curve[0]["fvu"] and curve[-1]["steps"] >= 1


# ---- tables and figures ----


def test_pages_and_figures_are_what_the_rows_say() -> None:
    import plots

    for path, text in plots.wanted().items():
        assert path.read_text() == text, f"{path.name}: run python bench/plots.py"


def test_a_table_follows_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import plots
    import tables

    page = "before\n<!-- table: step -->\nold\n<!-- end -->\nafter\n"
    step = {"bench": "step", "provider": "fastsae", "optimizer": "adam", "k": 1}
    rows = [
        {**step, "n": 1, "d": 2, "f": 3, "ratio": 0.4062, "peak_bytes": 5e8},
        {**step, "n": 4, "d": 5, "f": 6, "error": "MemoryError"},
    ]
    monkeypatch.setattr(tables, "results", lambda part: rows if part == "step" else [])
    assert plots.filled(page) == (
        "before\n<!-- table: step -->\n| | N 1, D 2, F 3 | | N 4, D 5, F 6 | |\n"
        "|---|---|---|---|---|\n| fastsae, exact Adam | 0.41 | 500 MB | MemoryError | |\n"
        "<!-- end -->\nafter\n"
    )
    with pytest.raises(ValueError, match=r"table: expected one of .*, got 'nothing'"):
        plots.filled(page.replace("step", "nothing"))


def test_a_busy_machine_is_in_the_machine_line() -> None:
    from tables import measured_on

    rows = [{"cpu": "X", "threads": 2, "load": 0.5, "others": 0.0}, {"load": 3.0, "others": 1.25}]
    assert "BUSY: other processes took up to 1.2 cores" in measured_on(rows)
    assert "BUSY" not in measured_on(rows[:1])


def test_figures_draw_what_they_are_given() -> None:
    from svg import Bar, bars, curves

    drawn = bars("T", {"g": [Bar("a & b", 1.0, "one"), Bar("c", 2.0, "two")]}, "x")
    widths = [float(part.split('"')[0]) for part in drawn.split('width="')[2:]]
    assert widths[1] == pytest.approx(2 * widths[0]) and "a &amp; b" in drawn
    drawn = curves("T", {"u": [(1, 0.5), (10, 0.1)], "v": [(1, 0.5), (10, 0.1)]}, "s", "fvu")
    assert drawn.count('fill="none"') == 2
    places = [line.split('y="')[1].split('"')[0] for line in drawn.splitlines() if ">u<" in line]
    places += [line.split('y="')[1].split('"')[0] for line in drawn.splitlines() if ">v<" in line]
    assert abs(float(places[0]) - float(places[1])) >= 16  # names do not cover each other


# ---- counts ----


def test_counts_are_held_to_five_percent() -> None:
    from counts import compare

    expected = {"encode": 1000, "decode": 1000}
    assert compare({"encode": 1049, "decode": 951}, expected) == []
    assert compare({"encode": 1051, "decode": 1000}, expected) == [
        "encode: expected 1000 ±5%, got 1051"
    ]
    assert compare({"encode": 1000, "new": 5}, expected) == [
        "decode: no longer counted",
        "new: not among the committed counts",
    ]


def test_counts_of_another_compiler_or_without_valgrind_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import counts

    binary = tmp_path / "bits"
    binary.write_bytes(b"\0GCC: (Other 1) 99.1.0\0")
    assert counts.compiler_of(binary) == "GCC: (Other 1) 99.1.0"
    monkeypatch.setattr(sys, "argv", ["counts.py", str(binary)])
    with pytest.raises(SystemExit, match=r"expected GCC: .*, got GCC: \(Other 1\) 99\.1\.0"):
        counts.main()
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit, match=r"expected valgrind \(Debian.*\), got none"):
        counts.count(binary)


def test_pytest_benchmark_runs_every_provider() -> None:
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-q"]
    command += ["--bench-shape", "16,8,128,2", "-k", "decode and not compiled"]
    # As if it were not a worker of the session, beside which nothing is timed.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout and "benchmark 'decode 16,8,128,2': 5 tests" in done.stdout
