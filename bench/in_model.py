"""Rows of what `fastsae eval --model` and `fastsae probe` found of an SAE.

    python bench/in_model.py runs/a/in_model.json runs/a/probes.json --csv FILE

A row for each evaluation, for each label of sparse probing, for each letter of absorption and for
their means; docs/evaluation.md shows them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rows import Row, add_outputs, machine, outputs
from tables import results, table

from fastsae.files import read_json

SET = "smollm2-l11"
SAID = ("sae", "model", "layer", "site", "text", "window", "windows", "windows_seen", "bf16_model")
"""What figures of a file are read with."""


def rows_of(found: dict[str, Any]) -> list[Row]:
    """Of one file. ValueError: neither command wrote it."""
    said = {name: found[name] for name in SAID if name in found}
    rows: list[Row] = []
    if "ce_loss_score" in found:
        known = {*said, "weights", "weights_as_harvested"}
        rows.append({"op": "eval", **{n: v for n, v in found.items() if n not in known}})
    if "sparse_probing" in found:
        for name, task in found["sparse_probing"]["tasks"].items():
            rows.append({"op": "sparse probing", "label": name, **task})
    if "absorption" in found:
        means = dict(found["absorption"])
        letters, skipped = means.pop("letters"), means.pop("skipped")
        rows.append({"op": "absorption", "letter": "mean", **means})
        rows += [{"op": "absorption", "letter": n, **letter} for n, letter in letters.items()]
        rows += [{"op": "absorption", "letter": n, "skipped_f1": f1} for n, f1 in skipped.items()]
    if not rows:
        raise ValueError("expected what eval --model or probe wrote")
    return [{"bench": "in_model", **row, **said} for row in rows]


def evaluations() -> list[Row]:
    return [row for row in results("in-model", SET) if row["op"] == "eval"]


def eval_table() -> str:
    """Every figure, a column for each choice of tokens that are replaced."""
    rows = evaluations()
    names = (
        *("n_tokens", "ce_loss_without_sae", "ce_loss_with_sae", "delta_ce_loss"),
        *("ce_loss_with_ablation", "ce_loss_with_mean_ablation"),
        *("ce_loss_score", "ce_loss_score_mean_ablation", "kl_div_with_sae", "kl_div_score"),
        *("kl_div_score_mean_ablation", "fvu", "frac_variance_explained", "cossim", "l2_ratio"),
        *("relative_reconstruction_bias", "l0"),
    )
    return table(
        ["", *(f"`--splice {row['splice']}`" for row in rows)],
        [[name, *(_cell(row.get(name)) for row in rows)] for name in names],
    )


def groups_table() -> str:
    """Reconstruction by group of tokens."""
    row = evaluations()[0]
    groups = ("ordinary", "massive", "first")
    names = ("n_tokens", "l2_norm_in", "l2_ratio", "cossim", "fvu", "l0")
    lines = [[n, *(_cell(row.get(f"groups_{group}_{n}")) for group in groups)] for n in names]
    return table(["", *groups], lines)


def probing_table() -> str:
    """F1 of each label's probes."""
    rows = [row for row in results("in-model", SET) if row["op"] == "sparse probing"]
    ks = [name[2:-3] for name in rows[0] if name.startswith("k_") and name.endswith("_f1")]
    lines = [
        [row["label"], str(row["n_train"])]
        + [_cell(row[f"{name}_f1"], 2) for name in (*(f"k_{k}" for k in ks), "dense")]
        for row in rows
    ]
    return table(["label", "rows", *(f"k = {k}" for k in ks), "all activations"], lines)


def absorption_table() -> str:
    """Absorption by letter."""
    names = ("probe_f1", "main_latents_f1", "num_split_features", "num_probe_true_positives")
    names += ("full_absorption_rate", "mean_absorption_fraction")
    means = {
        "num_split_features": "mean_num_split_features",
        "full_absorption_rate": "mean_full_absorption_score",
        "mean_absorption_fraction": "mean_absorption_fraction_score",
        "probe_f1": "mean_probe_f1",
        "main_latents_f1": "mean_main_latents_f1",
    }
    lines = []
    for row in results("in-model", SET):
        if row["op"] == "absorption" and "probe_f1" in row:
            lines.append([row["letter"], *(_cell(row[name], 2) for name in names)])
        elif row["op"] == "absorption" and row["letter"] == "mean":
            mean = ["**mean**", *(_cell(row.get(means.get(name, "")), 3) for name in names)]
    heads = ("probe F1", "main latents' F1", "main latents", "test words", "full", "fraction")
    return table(["letter", *heads], [mean, *lines])


def _cell(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


TABLES = {
    "evaluation": eval_table,
    "evaluation by group": groups_table,
    "sparse probing": probing_table,
    "absorption": absorption_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="+", type=Path)
    add_outputs(parser)
    args = parser.parse_args()
    here = machine()
    outputs([row | here for file in args.file for row in rows_of(read_json(file))], args)


if __name__ == "__main__":
    main()
