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
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsae.config import SAEConfig
from fastsae.files import read_json, sync_folder, write_json
from fastsae.moments import n_blocks
from fastsae.optim import Adam
from fastsae.sae import SAE
from fastsae.tensors import own_rows, read_tensors, write_tensors

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
    Shards write one checkpoint together, and any number of them can go on from it.
    """
    folder = run / f"step-{trainer.step_count}"
    shards = trainer.sae.shards
    run.mkdir(parents=True, exist_ok=True)
    there = latest(run) == folder
    if shards is not None:
        there = not shards.any(not there)  # asked by all before the first one changes it
    if trainer.sae.writes:
        remove_leftovers(run)
    if not there:
        _write(trainer, folder, log_bytes)
    if not trainer.sae.writes:
        return folder
    if not there:
        _link(run, folder)
    steps = [(step_of(f) or 0, f) for f in _steps(run)]
    older = [f for step, f in steps if step < trainer.step_count]
    newer = [f for step, f in steps if step > trainer.step_count]  # of a run that went back
    for old in older[: max(len(older) - (keep - 1), 0)] + newer:
        _remove(old)
    return folder


def _write(trainer: Trainer, folder: Path, log_bytes: int) -> None:
    partial = folder.with_name(f"{folder.name}.tmp")
    shards = trainer.sae.shards
    if shards is not None:
        shards.barrier()  # leftovers are removed
    try:
        trainer.sae.save(partial)
        tensors = _tensors(trainer)
        write_tensors(partial / "training.safetensors", tensors, trainer.sae.part)
        if not trainer.sae.writes:
            return
        more = {"log_bytes": log_bytes, "tensors": sorted(tensors)}
        write_json(partial / "training.json", {**_facts(trainer), **more})
        sync_folder(partial)
        if folder.exists():  # whole, but the link never came to lead to it
            _remove(folder)
        partial.rename(folder)
    except BaseException as error:
        # The first rank alone removes it: it may be renaming what another one believes lost.
        if trainer.sae.writes:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(folder)) from None
        raise
    sync_folder(folder.parent)


def _link(run: Path, folder: Path) -> None:
    latest = run / "latest"
    if latest.is_dir() and not latest.is_symlink():  # a copy of the run was made, links followed
        _remove(latest)
    link = run / "latest.tmp"
    try:
        link.symlink_to(folder.name)
    except OSError:  # a file system without links: the highest step is the newest
        return
    link.replace(latest)
    sync_folder(run)


def remove_leftovers(run: Path) -> None:
    """Removes what a process that was killed had not finished writing or removing."""
    for path in run.glob("*.tmp"):
        if re.fullmatch(r"(step-\d+|latest)(\.old)?\.tmp", path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f"{folder.name}.old.tmp")
    folder.rename(doomed)
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink()


def restore(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Puts the trainer into the state of a checkpoint; returns what training.json says.

    ValueError: it is not whole, or of another SAE, other settings (but for FREE) or other data; the
    trainer is then as it was, or not to be used where the message is about training.safetensors.
    """
    facts = read_json(folder / "training.json")
    _check_facts(folder / "training.json", facts, trainer)
    if step_of(folder) not in (facts["step"], None):
        raise ValueError(f"{folder / 'training.json'}: step: expected that of the folder's name")
    config = SAEConfig.read(folder / "config.json")
    if config != trainer.sae.config:
        differing = _differing(trainer.sae.config.to_dict(), config.to_dict())
        raise ValueError(f"{folder / 'config.json'}: {differing}")
    tensors = read_tensors(folder / "training.safetensors")
    try:
        tensors = own_rows(tensors, trainer.sae.part)
    except ValueError as error:
        raise ValueError(f"{folder / 'training.safetensors'}: {error}") from None
    _check_tensors(folder / "training.safetensors", tensors, facts, trainer)
    try:
        weights = read_tensors(folder / "sae.safetensors")
        trainer.sae.load_state_dict(own_rows(weights, trainer.sae.part))
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


def load_sae(folder: Path) -> SAE:
    """The SAE of a checkpoint, with the averaged weights where the run keeps an average."""
    sae = SAE.load(folder)
    if (folder / "training.safetensors").exists():
        tensors = read_tensors(folder / "training.safetensors")
        with torch.no_grad():
            for name, p in sae.named_parameters():
                if f"{name}/ema" in tensors:
                    p.copy_(tensors[f"{name}/ema"])
    return sae


def _facts(trainer: Trainer) -> dict[str, Any]:
    return {
        "step": trainer.step_count,
        "seconds": trainer.seconds,
        "train": asdict(trainer.config),
        "data": trainer.data,
    }


def _check_facts(path: Path, facts: dict[str, Any], trainer: Trainer) -> None:
    try:
        own = _facts(trainer)
        counts = {name: facts[name] for name in ("step", "log_bytes", "seconds")}
        # A setting that is newer than the run has its default there.
        theirs = {f.name: f.default for f in fields(trainer.config)} | facts["train"]
        data, tensors = dict(facts["data"]), facts["tensors"]
    except (KeyError, AttributeError, TypeError, ValueError):
        names = "step, seconds, log_bytes, train, data and tensors"
        raise ValueError(f"{path}: expected {names}") from None
    for name, value in counts.items():
        kinds = (int, float) if name == "seconds" else (int,)
        top = own["train"]["steps"] if name == "step" else 2**62
        if type(value) not in kinds or not 0 <= value <= top:
            raise ValueError(f"{path}: {name}: expected 0 to {top}, got {value!r:.80}")
    if not isinstance(tensors, list):
        raise ValueError(f"{path}: tensors: expected their names, got {tensors!r:.80}")
    theirs = {name: v for name, v in theirs.items() if name not in FREE}
    settings = {name: v for name, v in own["train"].items() if name not in FREE}
    for ours, there in ((settings, theirs), (own["data"], data)):
        if ours != there:
            raise ValueError(f"{path}: {_differing(ours, there)}")


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return f"a run goes on with what it began with: expected {'; '.join(_parts(ours, theirs))}"


def _parts(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    parts: list[str] = []
    for name in sorted({*ours, *theirs}):
        own, there = ours.get(name), theirs.get(name)
        if isinstance(own, dict) and isinstance(there, dict):
            parts += _parts(own, there, f"{prefix}{name}.")
        elif own != there:
            parts.append(f"{prefix}{name} {there!r:.200} as it began, got {own!r:.200}")
    return parts


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


def _check_tensors(
    path: Path, tensors: dict[str, Tensor], facts: dict[str, Any], trainer: Trainer
) -> None:
    """ValueError: not the tensors that were written, or not of the SAE's shapes."""
    if sorted(tensors) != facts["tensors"]:
        wrong = sorted({*tensors} ^ {*map(str, facts["tensors"])})
        raise ValueError(f"{path}: expected the tensors that training.json names, not so: {wrong}")
    shapes = {"tokens_since_fired": tuple(trainer.sae.tokens_since_fired.shape)}
    shapes["random/cpu"] = tuple(torch.get_rng_state().shape)
    for name, p in trainer.sae.named_parameters():
        if facts["step"] and name == "W_dec":
            shapes[f"{name}/exp_avg_sq"] = tuple(p.shape)
        if trainer.ema is not None:
            shapes[f"{name}/ema"] = tuple(p.shape)
        for moment in (n for n in tensors if n.startswith(f"{name}/exp_avg")):
            scales = moment.endswith("_scale")
            shapes[moment] = (len(p), n_blocks(p.shape[-1])) if scales else tuple(p.shape)
        last = tensors.get(f"{name}/last")
        if last is not None and last.numel() and int(last.max()) > facts["step"]:
            raise ValueError(f"{path}: {name}/last: expected steps up to {facts['step']}")
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape) if name in tensors else "none"
            raise ValueError(f"{path}: {name}: expected shape {shape}, got {got}")


def _load_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    optimizer = trainer.optimizer
    kept = not isinstance(optimizer, Adam)  # torch's keeps the tensors that it is given
    names = {id(p): name for name, p in trainer.sae.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = {names[id(p)]: place for place, p in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for name, t in tensors.items():
        parameter, _, key = name.rpartition("/")
        if parameter in places and key != "ema":
            state.setdefault(places[parameter], {})[key] = t.clone() if kept else t
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
