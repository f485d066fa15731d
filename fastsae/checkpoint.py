"""Checkpoints of a training: RUN/step-N/, and RUN/latest, a link to the newest one.

    config.json, sae.safetensors   the SAE, as `SAE.save` writes it
    training.json                  step, seconds, length of the log; the settings and the data
    training.safetensors           the optimiser's tensors ("W_enc/exp_avg", …), moving averages
                                   ("W_enc/ema"), tokens_since_fired, torch's random states

A checkpoint is written as step-N.tmp, brought to the disk and renamed; then the link is replaced;
then older ones are removed, renamed first. So at every moment what has the name of a checkpoint is
a whole one, and the link leads to one. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae.config import SAEConfig
from fastsae.files import read_json, sync_folder, write_json
from fastsae.optim import Adam
from fastsae.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from fastsae.train import Trainer

# Settings that may change when a run is resumed: no weight depends on them.
FREE = ("log_every", "eval_every", "checkpoint_every", "keep", "wandb")


def step_of(folder: Path) -> int | None:
    """N of a folder named step-N; None for any other name."""
    prefix, _, number = folder.name.partition("-")
    return int(number) if prefix == "step" and number.isascii() and number.isdigit() else None


def latest(run: str | Path) -> Path | None:
    """The newest checkpoint of a run: where `latest` leads, or the one of the highest step."""
    run = Path(run)
    link = run / "latest"
    if link.is_dir():
        return run / os.readlink(link) if link.is_symlink() else link
    whole = [folder for folder in _steps(run) if folder.is_dir()]
    return whole[-1] if whole else None


def _steps(run: Path) -> list[Path]:
    """All checkpoints, by step."""
    if not run.is_dir():
        return []
    folders = [folder for folder in run.iterdir() if step_of(folder) is not None]
    return sorted(folders, key=lambda folder: step_of(folder) or 0)


def save(trainer: Trainer, run: Path, *, keep: int, log_bytes: int) -> Path:
    """Writes the trainer's state as the newest checkpoint of a run; keeps the newest `keep`.

    A checkpoint of this step that is there already stays as it is. OSError: nothing has changed.
    """
    folder = run / f"step-{trainer.step_count}"
    if latest(run) == folder:
        return folder
    run.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run)
    partial = run / f"{folder.name}.tmp"
    try:
        trainer.sae.save(partial)
        write_tensors(partial / "training.safetensors", _tensors(trainer))
        write_json(partial / "training.json", {**_facts(trainer), "log_bytes": log_bytes})
        sync_folder(partial)
        if folder.exists():  # whole, but the link never came to lead to it
            _remove(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(run)
    link = run / "latest.tmp"
    link.symlink_to(folder.name)
    link.replace(run / "latest")
    sync_folder(run)
    older = [f for f in _steps(run) if (step_of(f) or 0) < trainer.step_count]
    newer = [f for f in _steps(run) if (step_of(f) or 0) > trainer.step_count]
    for old in older[: max(len(older) - (keep - 1), 0)] + newer:  # newer: of a run that went back
        _remove(old)
    return folder


def remove_leftovers(run: Path) -> None:
    """Removes what a process that was killed had not finished writing or removing."""
    for path in run.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    (run / "latest.tmp").unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def restore(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Puts the trainer into the state of a checkpoint; returns what training.json says.

    ValueError: it is not whole, or of another SAE, other settings (but for FREE) or other data; the
    trainer is then as it was, or not to be used where the message is about training.safetensors.
    """
    facts = read_json(folder / "training.json")
    own = _facts(trainer)
    _check_facts(folder / "training.json", facts, own)
    config = SAEConfig.from_dict(read_json(folder / "config.json"))
    if config != trainer.sae.config:
        differing = _differing(trainer.sae.config.to_dict(), config.to_dict())
        raise ValueError(f"{folder / 'config.json'}: {differing}")
    tensors = read_tensors(folder / "training.safetensors")
    expected = _shapes(trainer, facts["step"])
    for name, t in tensors.items():
        shape = expected.pop(name, None)
        if shape is not None and tuple(t.shape) != shape:
            raise ValueError(
                f"{folder / 'training.safetensors'}: {name}: expected shape {shape}, "
                f"got {tuple(t.shape)}"
            )
    if expected:
        raise ValueError(
            f"{folder / 'training.safetensors'}: expected {', '.join(sorted(expected))}, got none"
        )
    try:
        trainer.sae.load_state_dict(read_tensors(folder / "sae.safetensors"))
        _load_optimizer(trainer, tensors)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from None
    with torch.no_grad():
        trainer.sae.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        if trainer.ema is not None:
            for name, average in trainer.ema.averages.items():
                average.copy_(tensors[f"{name}/ema"])
    torch.set_rng_state(tensors["random/cpu"].clone())
    if "random/cuda" in tensors and trainer.sae.W_dec.is_cuda:
        torch.cuda.set_rng_state(tensors["random/cuda"].clone(), trainer.sae.W_dec.device)
    trainer.step_count, trainer.seconds = facts["step"], facts["seconds"]
    return facts


def _facts(trainer: Trainer) -> dict[str, Any]:
    source = trainer.source
    return {
        "step": trainer.step_count,
        "seconds": trainer.seconds,
        "train": asdict(trainer.config),
        "data": {"n_rows": source.n_rows, "d_in": source.d_in, "d_out": source.d_out},
    }


def _check_facts(path: Path, facts: dict[str, Any], own: dict[str, Any]) -> None:
    try:
        for name, kind in (("step", int), ("log_bytes", int), ("seconds", (int, float))):
            if not isinstance(facts[name], kind) or facts[name] < 0:
                raise ValueError(f"{path}: {name}: expected a count, got {facts[name]!r:.80}")
        theirs = {name: v for name, v in facts["train"].items() if name not in FREE}
        data = dict(facts["data"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: expected step, seconds, log_bytes, train and data") from None
    settings = {name: v for name, v in own["train"].items() if name not in FREE}
    for ours, there in ((settings, theirs), (own["data"], data)):
        if ours != there:
            raise ValueError(f"{path}: {_differing(ours, there)}")


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    names = [n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
    parts = [f"{n} {theirs.get(n)!r} as it began, got {ours.get(n)!r}" for n in names]
    return f"a run goes on with what it began with: expected {'; '.join(parts)}"


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {"tokens_since_fired": trainer.sae.tokens_since_fired}
    for name, p in trainer.sae.named_parameters():
        for key, value in trainer.optimizer.state.get(p, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
        if trainer.ema is not None:
            tensors[f"{name}/ema"] = trainer.ema.averages[name]
    tensors["random/cpu"] = torch.get_rng_state()
    if trainer.sae.W_dec.is_cuda:
        tensors["random/cuda"] = torch.cuda.get_rng_state(trainer.sae.W_dec.device)
    return tensors


def _shapes(trainer: Trainer, step: int) -> dict[str, tuple[int, ...]]:
    """What training.safetensors must have; a parameter without a gradient has no moments."""
    shapes = {"tokens_since_fired": tuple(trainer.sae.tokens_since_fired.shape)}
    shapes["random/cpu"] = tuple(torch.get_rng_state().shape)
    if step:
        shapes["W_dec/exp_avg_sq"] = tuple(trainer.sae.W_dec.shape)
    if trainer.ema is not None:
        averages = trainer.ema.averages.items()
        shapes |= {f"{name}/ema": tuple(average.shape) for name, average in averages}
    return shapes


def _load_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    optimizer = trainer.optimizer
    kept = not isinstance(optimizer, Adam)  # torch's keeps the tensors that it is given
    names = {id(p): name for name, p in trainer.sae.named_parameters()}
    state: dict[int, dict[str, Any]] = {}
    n = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            prefix = f"{names[id(p)]}/"
            for name, t in tensors.items():
                key = name.removeprefix(prefix)
                if not name.startswith(prefix) or key == "ema":
                    continue
                if key.startswith("exp_avg") and t.shape != p.shape:
                    expected = tuple(p.shape)
                    raise ValueError(f"{name}: expected shape {expected}, got {tuple(t.shape)}")
                state.setdefault(n, {})[key] = t.clone() if kept else t
            n += 1
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
