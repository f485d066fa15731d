"""bench/consistency.py prints what it promises; its figures are not judged."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from common import randn
from test_bench_rules import bench


def numbers(text: str) -> list[float]:
    """A column with several figures."""
    return [float(word) for word in text.split("; ")]


def test_over_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", randn(1500, 16).numpy())
    options = ["tokens", "--data", str(tmp_path / "acts.npy"), "--svg", str(tmp_path / "f.svg")]
    options += "--d-sae 48 --k 3 --batch-size 100 --holdout 300 --tokens 500 2000".split()
    rows = bench("consistency", tmp_path, *options)
    rules = ["topk", "batchtopk", "jumprelu"]
    assert [(row["tokens"], row["rule"]) for row in rows] == [
        (tokens, rule) for tokens in (500, 2000) for rule in rules
    ]
    for row in rows:
        pairs = numbers(row["pairs"])
        assert len(pairs) == 3 and 0 < row["pw_mcc"] < 1
        assert row["pw_mcc"] == sum(pairs) / 3 and row["shared"] <= row["agreement"]
    drawn = ET.parse(tmp_path / "f.svg").getroot()
    words = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {*rules, "0.5k", "2k"} <= {*words}


def test_on_the_organism(tmp_path: Path) -> None:
    (row,) = bench("consistency", tmp_path, *"organism --tokens 20480 --rule topk".split())
    assert len(numbers(row["pairs"])) == 10 and len(numbers(row["gt_mccs"])) == 5
    assert 0 < row["gt_mcc"] < 1 and 0 < row["pw_mcc"] < 1


def test_at_scale(tmp_path: Path) -> None:
    (row,) = bench("consistency", tmp_path, *"scale --shape 500,32".split())
    assert 0 <= row["gap"] <= row["asked_gap"] == 0.01 and 0.3 < row["mcc"] <= row["upper"] < 0.9
    assert row["peak_bytes"] > 0 and row["seconds"] > 0
