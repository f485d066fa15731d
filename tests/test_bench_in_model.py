"""bench/in_model.py: the rows of what eval --model and probe wrote, and their tables."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_bench_rules import ROOT, bench

SAID = {"sae": "ab", "model": "tiny", "layer": 2, "text": ["a.txt", "b.txt"], "windows_seen": 0}
EVAL = {"splice": "rows", "ce_loss_score": 0.9, "groups": {"ordinary": {"n_tokens": 7}}}
TASK = {"n_train": 40, "dense": {"f1": 0.75}, "latents": [3, 1], "k": {"1": {"f1": 0.5}}}
LETTER = {"probe_f1": 0.875, "main_latents": [5], "full_absorption_rate": 0.25}
LETTER |= {"main_latents_f1": 0.5, "num_split_features": 1, "mean_absorption_fraction": 0.5}
LETTER |= {"num_probe_true_positives": 8}
MEAN = {"mean_full_absorption_score": 0.25, "mean_probe_f1": 0.875, "n_letters": 1}
PROBES = {
    "sparse_probing": {"tasks": {"capitalised": TASK}, "left_out": ["in b"]},
    "absorption": {**MEAN, "letters": {"s": LETTER}, "skipped": {"q": 0.5, "x": None}},
}


def test_rows_of_files(tmp_path: Path) -> None:
    for name, found in (("in_model", EVAL), ("probes", PROBES)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**SAID, "weights": {"w": "1"}, **found}))
    files = [str(tmp_path / f"{name}.json") for name in ("in_model", "probes")]
    rows = bench("in_model", tmp_path, *files)
    assert [row["op"] for row in rows] == ["eval", "sparse probing"] + 4 * ["absorption"]
    assert all(row["sae"] == "ab" and row["text"] == "a.txt; b.txt" for row in rows)
    assert not any(name.startswith("weights") for row in rows for name in row)
    first, probing, *letters = rows
    assert first["ce_loss_score"] == 0.9 and first["groups_ordinary_n_tokens"] == 7
    assert (probing["label"], probing["k_1_f1"], probing["dense_f1"]) == ("capitalised", 0.5, 0.75)
    assert [row["letter"] for row in letters] == ["mean", "s", "q", "x"]
    assert letters[0]["mean_full_absorption_score"] == letters[1]["full_absorption_rate"] == 0.25
    assert letters[2]["skipped_f1"] == 0.5 and "skipped_f1" not in letters[3]


def test_tables_show_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import in_model
    from rows import flat

    rows = [
        flat(row)
        for found in (EVAL, PROBES)
        for row in in_model.rows_of(json.loads(json.dumps(found)))
    ]
    monkeypatch.setattr(in_model, "results", lambda part, of: rows)

    def lines(make: Any) -> list[str]:
        return make().splitlines()

    assert lines(in_model.eval_table)[0] == "| | `--splice rows` |"
    assert "| ce_loss_score | 0.9000 |" in lines(in_model.eval_table)
    assert "| n_tokens | 7 | – | – |" in lines(in_model.groups_table)
    assert lines(in_model.probing_table)[0] == "| label | rows | k = 1 | all activations |"
    assert lines(in_model.probing_table)[2:] == ["| capitalised | 40 | 0.50 | 0.75 |"]
    found = lines(in_model.absorption_table)
    assert [line.split(" | ")[0] for line in found[2:]] == ["| **mean**", "| s"]
    assert "0.25" in found[3] and "0.250" in found[2]


def test_other_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    from in_model import rows_of

    with pytest.raises(ValueError, match="expected what eval --model or probe wrote"):
        rows_of({"fvu": 1.0})
