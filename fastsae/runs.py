"""Run directories: what `fastsae train` writes, and `fastsae eval` and `--resume` read.

    run.json                       the options, resolved; may be given to --config
    log.jsonl                      how it went
    step-N/, latest                checkpoints (`fastsae.checkpoint`)
    config.json, sae.safetensors   the SAE at the end
    metrics.json                   its figures
    report.html                    curves, histograms, what latents respond to (`fastsae.report`)

The last three lines appear when the training is finished.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fastsae import checkpoint, metrics, plan
from fastsae.config import SAEConfig, TrainConfig
from fastsae.data import Source, in_order, open_source, split
from fastsae.files import appear, read_json, write_json
from fastsae.log import find_wandb
from fastsae.report import write_report
from fastsae.sae import SAE
from fastsae.selection import Selection
from fastsae.sharding import Shards
from fastsae.shards import read_index
from fastsae.timing import product_seconds
from fastsae.train import Trainer, evaluate

FILES = ("run.json", "config.json", "sae.safetensors", "log.jsonl", "metrics.json", "report.html")
FIGURE_ROWS = 1 << 20
"""Training rows, at most, that the dead share and PCA are computed on: evenly spaced ones."""


def check_new(out: Path) -> None:
    """ValueError: the folder holds a run already."""
    there = [name for name in (*FILES, "latest") if (out / name).exists()]
    if there:
        raise ValueError(
            f"{out}: expected a new run directory, got one with {', '.join(there)}; "
            "with --resume a run goes on"
        )


def remove(out: Path) -> None:
    """Removes a run, and nothing else that may be in its folder."""
    for name in (*FILES, "latest"):
        (out / name).unlink(missing_ok=True)
    for folder in list(out.glob("step-*")):
        if checkpoint.step_of(folder) is not None:
            shutil.rmtree(folder)
    checkpoint.remove_leftovers(out)


def options_of(run: Path) -> dict[str, Any]:
    """What run.json says. ValueError: it is not there or not readable."""
    return read_json(run / "run.json")


def harvested(run: Path) -> dict[str, Any]:
    """The index of the set that a run was trained on. ValueError: its data are no such set."""
    data = options_of(run).get("data")
    if not isinstance(data, str) or not (Path(data) / "index.json").is_file():
        raise ValueError(f"{run}: expected a run on a set of fastsae harvest, got one on {data!r}")
    index = read_index(Path(data))
    for name, kind in (("model", str), ("layer", int), ("site", str)):
        if not isinstance(index.get(name), kind):
            got = repr(index.get(name))
            raise ValueError(f"{data}: {name}: expected it as harvest wrote it, got {got:.80}")
    return index


def check_same(run: Path, options: dict[str, Any]) -> None:
    """ValueError: a run would go on with other options than it began with.

    Where its data lie may change: that they are the same is checked by their rows.
    """
    began = options_of(run)
    for name in sorted(began.keys() - {*checkpoint.FREE, "data", "target"}):
        if began[name] != options.get(name):
            raise ValueError(
                f"{run / 'run.json'}: a run goes on with what it began with: expected {name} "
                f"{began.get(name)!r}, got {options.get(name)!r}"
            )


def train(
    config: SAEConfig,
    rows: Source,
    holdout: Source,
    settings: TrainConfig,
    out: Path,
    options: dict[str, Any],
    *,
    resume: bool = False,
    device: str = "cpu",
    shards: Shards | None = None,
) -> dict[str, Any]:
    """Trains, or goes on training, and returns the final figures, which are written, too.

    Where the training was interrupted it returns what `Trainer.run` does. shards: of the ranks that
    train together, all of which call this; the first one writes.
    """
    if resume and (out / "run.json").exists():
        check_same(out, options)
    else:
        check_new(out)
    if settings.wandb is not None:
        find_wandb()
    if device == "cpu":
        if shards is None:
            plan.check(plan.plan(config, settings), plan.available())
        else:
            each = plan.plan(config, settings, latents=shards.n_latent, data=shards.n_data)
            plan.check(each, plan.available() // shards.n_here)
            shards.barrier()  # no rank takes memory that another one has yet to count
    held = holdout if holdout.n_rows else None
    sae = SAE(config, seed=settings.seed, device=device, shards=shards)
    trainer = Trainer(sae, rows, settings, out=out, holdout=held)
    trainer.resume()
    first_step = trainer.step_count
    if shards is not None:
        shards.barrier()  # what is there was looked at by all
    if sae.writes:
        out.mkdir(parents=True, exist_ok=True)
        appear(out / "run.json", lambda partial: write_json(partial, options))
    try:
        figures: dict[str, Any] = trainer.run()
    except OSError as error:
        folder = checkpoint.latest(out)
        there = "there is no checkpoint yet" if folder is None else f"{folder} is whole"
        raise OSError(f"step {trainer.step_count}: {error}; {there}") from error
    if figures["interrupted"]:
        return {**figures, "step": trainer.step_count, "steps": settings.steps}
    with trainer.averaged():
        seconds = figures["train_seconds"]
        step, figured = trainer.evaluated
        if step != trainer.step_count:
            figured = evaluate(trainer.sae, holdout) if held else {}
        figures |= figured
        figures |= final_figures(trainer.sae, rows, holdout, settings, seconds)
        if shards is not None:
            figures["ranks"] = shards.n_ranks
            n_steps = max(trainer.step_count - first_step, 1)
            figures["exchanged_bytes_a_step"] = shards.received() / n_steps
        if sae.writes:
            appear(out / "metrics.json", lambda partial: write_json(partial, figures))
        if shards is None:  # a report looks at all latents: `report_run` of what was saved
            write_report(out, trainer.sae, holdout, rows)
    return figures


def final_figures(
    sae: SAE, rows: Source, holdout: Source, settings: TrainConfig, seconds: float
) -> dict[str, Any]:
    """PCA on held-out rows; the dead share on training rows; what a step cost."""
    figures: dict[str, Any] = {}
    # A quarter of what it was trained on: a pass that takes longer than the training helps nobody.
    n = min(rows.n_rows, FIGURE_ROWS, max(settings.steps * settings.batch_size // 4, 1 << 16))
    some = rows.select(np.arange(n) * rows.n_rows // n)
    if holdout.n_rows and rows.target is None:
        figures["pca_components"] = min(round(_l0_of(sae.config.selection)), rows.d_in)
        figures["pca_fvu"] = metrics.pca_fvu(
            (batch.x for batch in in_order(some, 4096)),
            (batch.x for batch in in_order(holdout, 4096)),
            figures["pca_components"],
        )
    figures["dead_share"] = evaluate(sae, some)["dead_share"]
    figures["dead_share_rows"] = n
    x = next(rows.batches(settings.batch_size, settings.seed)).x
    figures["product_seconds"] = product_seconds(x, sae.W_enc, most_bytes=2**26)
    figures["step_ratio"] = seconds / settings.steps / figures["product_seconds"]
    return figures


def evaluate_run(run: Path, data: str | None, target: str | None) -> dict[str, Any]:
    """Figures of a run's final SAE, or its newest checkpoint's, or any saved SAE.

    On all rows of data, or, where it is None, on the rows that the run held out. ValueError: there
    is none, or the data do not fit.
    """
    sae = sae_of(run)
    gradients = sae.config.selection.needs_gradient
    if data is not None:
        rows = open_source(data, target, gradients=gradients)
    else:
        rows = held_out(run, gradients)
    return evaluate(sae, rows)


def report_run(run: Path, data: str | None) -> Path:
    """Writes the report of a run's final SAE, or its newest checkpoint's, and returns its path.

    Latents are measured on rows of data, or, where it is None, on those that the run held out and
    then on those that it trained on. ValueError: as `evaluate_run`.
    """
    sae = sae_of(run)
    if data is not None:
        return write_report(run, sae, open_source(data))
    rows, holdout = _split_of(run, gradients=False)
    return write_report(run, sae, holdout, rows)


def sae_of(run: Path) -> SAE:
    """A run's final SAE, its newest checkpoint's, or a saved SAE. ValueError: there is none."""
    if (run / "sae.safetensors").exists():
        return SAE.load(run)
    return checkpoint.load_sae(checkpoint.latest(run) or run)


def held_out(run: Path, gradients: bool = False) -> Source:
    """The rows that a run held out. ValueError: there are none."""
    rows = _split_of(run, gradients)[1]
    if not rows.n_rows:
        raise ValueError(f"{run}: expected data, as the run held no rows out")
    return rows


def _split_of(run: Path, gradients: bool) -> tuple[Source, Source]:
    options = options_of(run)
    for name, kinds in (("data", (str,)), ("target", (str, type(None))), ("holdout", (int,))):
        if not isinstance(options.get(name), kinds):
            got = repr(options.get(name))
            raise ValueError(
                f"{run / 'run.json'}: {name}: expected it as train wrote it, got {got}"
            )
    whole = open_source(options["data"], options["target"], gradients=gradients)
    return split(whole, options["holdout"])


def print_figures(figures: dict[str, Any], out: Path) -> None:
    lines = [
        ("held-out FVU", "fvu", "{:.4f}", ""),
        ("held-out FVU of PCA", "pca_fvu", "{:.4f}", "with {pca_components} components"),
        ("L0", "l0", "{:.2f}", "active latents a token"),
        ("dead share", "dead_share", "{:.2%}", "latents silent on {dead_share_rows:,} rows"),
        ("training", "train_seconds", "{:.1f} s", "{tokens_per_s:,.0f} tokens/s"),
        ("step ÷ product", "step_ratio", "{:.2f}", "product: {product_seconds:.4f} s, dense, fp32"),
    ]
    for label, key, form, remark in lines:
        if key in figures:
            print(f"{label:20} {form.format(figures[key]):>9}  {remark.format(**figures)}")
    print(f"{'run directory':20} {out}")
    report = out / "report.html"
    print(f"{'report':20} {report if report.exists() else f'fastsae report {out}'}")


def _l0_of(rule: Selection) -> float:
    """The mean number of active latents a token that the rule aims at, 32 where it has no aim."""
    return (rule.k_name and getattr(rule, rule.k_name)) or 32
