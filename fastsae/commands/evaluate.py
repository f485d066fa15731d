"""``fastsae eval | probe | report``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from fastsae import runs
from fastsae.commands.place import Place
from fastsae.contexts import vocabulary_of
from fastsae.files import appear, write_json
from fastsae.first_letter import absorption_in_model
from fastsae.in_model import Splice, evaluate_in_model
from fastsae.probing import KS, PER_CLASS, sparse_probing, token_labels


@dataclass(frozen=True)
class Eval:
    """Print the figures of a run's SAE on held-out rows, on other activations, or in its model."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    place: Place
    """Where the SAE sits."""
    data: str | None = None
    """Activations, as for train; None: the rows that the run held out."""
    target: str | None = None
    """Activations to predict, with data, for a transcoder."""
    model: str | None = None
    """A causal language model, as for harvest: put the reconstructions into it, on --text, and say
    what it loses. Writes in_model.json to the run directory."""
    splice: Splice = "rows"
    """Tokens to replace, with a model: rows (all but position 0 and special tokens), ordinary (of
    these those without massive activations) or all."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        if self.model is not None:
            return self._in_model(self.model)
        if self.place != Place() or self.splice != "rows":
            raise ValueError("model: expected one with text, a place or splice, got none")
        figures = runs.evaluate_run(self.run_directory, self.data, self.target)
        if self.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                if isinstance(value, float):
                    print(f"{name:20} {value:9.4f}")

    def _in_model(self, model: str) -> None:
        if self.data is not None or self.target is not None:
            raise ValueError("data: expected none with a model, whose activations they would be")
        sae = runs.sae_of(self.run_directory).to(self.place.device)
        opened = self.place.open(self.run_directory, model)
        windows = opened.windows()
        options: dict[str, Any] = {"splice": self.splice, "progress": True}
        figures = evaluate_in_model(sae, opened.model, windows, opened.at, **options)
        figures = opened.said(sae, windows) | figures
        appear(self.run_directory / "in_model.json", lambda path: write_json(path, figures))
        if self.json:
            print(json.dumps(figures))
        else:
            print(in_model_table(figures))


def in_model_table(figures: dict[str, Any]) -> str:
    """What evaluate_in_model found, for a person."""
    seen = figures["windows_seen"]
    lines = [
        f"{figures['model']}, {figures['site']} of layer {figures['layer']}; "
        f"{figures['n_tokens']:,} tokens of {figures['windows']:,} windows of "
        f"{', '.join(figures['text'])} replaced",
        f"windows that the SAE's data hold: {'not known' if seen is None else f'{seen:,}'}",
    ]
    if figures["weights_as_harvested"] is False:
        lines.append("the model's weights are not those that the SAE's data come from")
    hidden = ("windows_seen", "weights_as_harvested", "massive_above")
    for name, value in figures.items():
        if name not in hidden and isinstance(value, float | None):
            lines.append(f"{name:31} {_shown(value, 9)}")
    lines.append(f"a token is massive above a norm of {_shown(figures['massive_above'], 0)}")
    groups = figures["groups"]
    lines.append("".join([" " * 31, *(f" {name:>9}" for name in groups)]))
    for name in ("n_tokens", "l2_norm_in", "l2_ratio", "cossim", "fvu", "l0"):
        cells = (_shown(group.get(name), 9) for group in groups.values())
        lines.append(" ".join([f"{name:31}", *cells]))
    return "\n".join(lines)


def _shown(value: float | None, width: int) -> str:
    if value is None:
        return f"{'–':>{width}}"
    return f"{value:{width},}" if isinstance(value, int) else f"{value:{width}.4f}"


@dataclass(frozen=True)
class Probe:
    """Say what latents know: sparse probing on text, and first-letter absorption."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken. probes.json is written
    there."""
    model: str
    """A causal language model, as for harvest."""
    place: Place
    """Where the SAE sits. Without text only absorption is measured."""
    ks: tuple[int, ...] = KS
    """Numbers of latents that a probe may use."""
    per_class: int = PER_CLASS
    """Rows of each class that a probe is trained on, at most."""
    words: int | None = 10_000
    """Words of the model's vocabulary for absorption; None: all, 0: no absorption."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        if not self.place.text and self.words == 0:
            raise ValueError("text: expected a file, as there are no words either, got none")
        sae = runs.sae_of(self.run_directory).to(self.place.device)
        opened = self.place.open(self.run_directory, self.model)
        model, at = opened.model, opened.at
        figures: dict[str, Any] = {}
        windows = None
        if self.place.text:
            windows = opened.windows()
            rows = torch.from_numpy(windows.rows)
            x = torch.cat(
                [
                    batch[:, rows].flatten(0, 1).float().cpu()
                    for batch in at.activations(model, windows.ids)
                ]
            )
            numbers = torch.arange(len(windows.ids)).repeat_interleave(int(rows.sum()))
            texts = list(vocabulary_of(model.tokenizer).values())
            token = torch.from_numpy(windows.ids)[:, rows].flatten().long()
            file = torch.from_numpy(windows.file)[numbers]
            labels = token_labels(texts, token, file, windows.names)
            options: dict[str, Any] = {"ks": self.ks, "per_class": self.per_class}
            figures["sparse_probing"] = sparse_probing(sae, x, labels, numbers, **options)
        if self.words != 0:
            figures["absorption"] = absorption_in_model(sae, model, at, n_words=self.words)
        figures = opened.said(sae, windows) | figures
        appear(self.run_directory / "probes.json", lambda path: write_json(path, figures))
        print(json.dumps(figures) if self.json else probes_table(figures))


def probes_table(figures: dict[str, Any]) -> str:
    """What sparse probing and absorption found, for a person."""
    lines = []
    if "sparse_probing" in figures:
        found = figures["sparse_probing"]
        heads = [*(f"k={k}" for k in found["ks"]), "dense"]
        lines.append("".join([f"{'F1 of probes on test rows':26}", *(f"{h:>8}" for h in heads)]))
        for name, task in found["tasks"].items():
            cells = [task["k"][k]["f1"] for k in found["ks"]] + [task["dense"]["f1"]]
            lines.append("".join([f"{name:26}", *(f"{f1:8.3f}" for f1 in cells)]))
        if found["left_out"]:
            lines.append(f"too few rows: {', '.join(found['left_out'])}")
    if "absorption" in figures:
        found = figures["absorption"]
        for name, value in found.items():
            if name not in ("letters", "skipped"):
                lines.append(f"{name:31} {_shown(value, 9)}")
        lines.append(f"skipped letters: {', '.join(found['skipped']) or 'none'}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """Write a run's report.html again: curves, histograms and what latents respond to."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    data: str | None = None
    """Activations to look at, as for train; None: the run's, those held out first."""

    def run(self) -> None:
        print(runs.report_run(self.run_directory, self.data))
