"""Activations of a Hugging Face model over text, row by row, to a folder of shards.

    text files ──tokenise──▶ windows ──shuffle──▶ model up to one module ──▶ shards (fastsae.shards)

Site. ``layer`` counts blocks from 1: layer 3 is the third block. ``residual`` is what that block
returns, so it equals ``hidden_states[layer]`` of transformers (except after the last block, where
transformers may apply the final norm). ``mlp`` and ``attention`` are what the block's MLP and
attention give before anything is added to it or normalises it. Modules are found by structure: the
model must have one list of blocks, each with an attention and an MLP as in BERT, Llama or GPT-2.

Windows. A document is a .txt file, or the "text" of a line of a .jsonl file. Its tokens are cut
from its start into windows of equal length, without padding; what remains at its end is left out.
A window is what the model reads at once: ``window`` positions, among them the special tokens that
the tokenizer puts around a text. Rows are the window's other positions; for a causal model also
without position 0, where attention sinks lie. Windows come in an order that depends on their number
and the seed alone; rows of a window stay together and in order, so a trainer must shuffle.

Gradients. Row p of a window also gets ∂L/∂x_p, where L is the sum over the window's positions
t = 1 … window − 1 of −log P(token t | tokens before t), in nats, in float32: next-token
cross-entropy with reduction "sum", so neither the length of a window nor the batch scales it. x_p
is the activation at the site, and L depends on it through everything after the site. The last
position predicts nothing, its gradient is 0: it is left out.

Bits. A shard depends on the model, the text and the options alone, not on the other shards; a
harvest that was stopped goes on at the first missing shard and ends with the files that it would
have ended with. (On the same machine and number of threads: torch's products depend on both.)
Beside the model, the ids of all windows (int32) and one shard are in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastsae.data import permutation
from fastsae.files import alone, sha256
from fastsae.models import LanguageModel
from fastsae.shards import (
    DTYPES,
    FORMAT,
    LABELS,
    VERSION,
    ActivationSet,
    read_index,
    shard_path,
    write_index,
    write_shard,
)
from fastsae.sites import Site, edited, find_module

Dtype = Literal["float16", "bfloat16", "float32"]
Ids = npt.NDArray[np.int32]

_WINDOWS = 3  # what the permutation is for: see fastsae.data


@dataclass(frozen=True)
class HarvestConfig:
    """What is kept of a model's activations."""

    layer: int
    """The block, counted from 1."""
    site: Site = "residual"
    """Output of the block (residual), of its MLP or of its attention."""
    rows: int | None = None
    """Rows to keep, rounded up to whole windows; None: all that the text gives."""
    window: int = 128
    """Positions that the model reads at once, special tokens included."""
    batch_size: int = 32
    """Windows that the model reads at a time."""
    dtype: Dtype = "float16"
    """In which activations and gradients are stored."""
    gradients: bool = False
    """Store the gradient of the language model's loss too (causal models)."""
    seed: int = 0
    """Of the order of the windows."""
    bf16_model: bool = False
    """Run the model's products in bfloat16 (autocast)."""
    keep_special: bool = False
    """Keep the rows of special tokens."""
    keep_first: bool = False
    """Keep the row of position 0 of a causal model."""
    shard_rows: int = 65536
    """Rows of a shard, about."""

    def check(self) -> None:
        for name, values in (("site", get_args(Site)), ("dtype", get_args(Dtype))):
            if getattr(self, name) not in values:
                got = repr(getattr(self, name))
                raise ValueError(f"{name}: expected one of {', '.join(values)}, got {got}")
        for name in ("layer", "rows", "window", "batch_size", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


def harvest(
    model: LanguageModel, text: Sequence[Path], out: Path, config: HarvestConfig
) -> ActivationSet:
    """Writes the set, or what is missing of it, to the folder ``out`` and opens it.

    ValueError: options, text or a model that it cannot be made with, too little room on the disk,
    a folder with another set, and an activation that is not finite in the dtype of storage.
    """
    config.check()
    module = find_module(model.net, config.site, config.layer)
    if model.net.training:
        raise ValueError(f"{model.name}: expected a model in eval mode, got one in training mode")
    if config.gradients and not model.causal:
        raise ValueError(f"gradients: expected a causal language model, got {model.name}")
    limit = getattr(getattr(model.net, "config", None), "max_position_embeddings", None)
    if limit is not None and config.window > limit:
        raise ValueError(
            f"window: expected at most the {limit} of {model.name}, got {config.window}"
        )
    windows, special = cut_windows(model.tokenizer, text, config.window)
    positions = _kept_positions(config, special, model.causal)
    order = permutation(len(windows), config.seed, _WINDOWS)
    if config.rows is not None:
        if config.rows > len(windows) * len(positions):
            raise ValueError(
                f"rows: expected at most the {len(windows) * len(positions)} that the text gives, "
                f"got {config.rows}"
            )
        order = order[: -(-config.rows // len(positions))]
    batch = config.batch_size
    per_shard = max(1, config.shard_rows // (len(positions) * batch)) * batch
    parts = [order[first : first + per_shard] for first in range(0, len(order), per_shard)]
    with alone(out, "harvesting into"):
        runner = _Runner(model, module, config, windows, positions)
        index = {
            "format": FORMAT,
            "version": VERSION,
            "model": model.name,
            "weights": model.weights,
            "text": [{"file": path.name, "sha256": sha256(path)} for path in text],
            "d": runner.width(),
            **{name: value for name, value in asdict(config).items() if name != "rows"},
            "rows": len(order) * len(positions),
            "dropped_positions": sorted(set(range(config.window)) - set(positions.tolist())),
            "shards": [len(part) * len(positions) for part in parts],
        }
        if (out / "index.json").exists():
            _check_same(out, read_index(out), index)
        missing = [i for i in range(len(parts)) if not shard_path(out, i).exists()]
        _check_room(out, index, missing)
        write_index(out, index)
        runner.write(out, parts, missing)
    return ActivationSet(out)


def documents(path: Path) -> list[str]:
    """The documents of a .txt or .jsonl file."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected a .txt or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from error
    if path.suffix == ".txt":
        return [text]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            if not isinstance(document, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{path}: line {number}: expected an object with "text"') from None
        found.append(document)
    return found


def cut_windows(tokenizer: Any, text: Sequence[Path], window: int) -> tuple[Ids, tuple[int, int]]:
    """All windows of the text, int32 [n, window], and how many special tokens begin and end one."""
    plain, full = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    before = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    if not plain or before is None:
        raise ValueError(f"expected special tokens around those of the text, got {full}")
    prefix, suffix = full[:before], full[before + len(plain) :]
    n_text = window - len(prefix) - len(suffix)
    if n_text < 1:
        raise ValueError(f"window: expected more than {window - n_text} positions, got {window}")
    pieces = []
    for path in text:
        texts = documents(path)
        for first in range(0, len(texts), 64):
            for ids in tokenizer(texts[first : first + 64], add_special_tokens=False)["input_ids"]:
                n = len(ids) // n_text
                pieces.append(np.array(ids[: n * n_text], dtype=np.int32).reshape(n, n_text))
    inner = np.concatenate(pieces) if pieces else np.empty((0, n_text), np.int32)
    if not len(inner):
        raise ValueError(f"expected a document of at least {n_text} tokens, got none")
    windows = np.empty((len(inner), window), np.int32)
    windows[:, : len(prefix)] = prefix
    windows[:, len(prefix) : window - len(suffix)] = inner
    windows[:, window - len(suffix) :] = suffix
    return windows, (len(prefix), len(suffix))


def _kept_positions(config: HarvestConfig, special: tuple[int, int], causal: bool) -> Ids:
    before, after = (0, 0) if config.keep_special else special
    if causal and not config.keep_first:
        before = max(before, 1)
    if config.gradients:
        after = max(after, 1)
    if before + after >= config.window:
        raise ValueError(
            f"window: expected more than the {before + after} positions that are dropped, "
            f"got {config.window}"
        )
    return np.arange(before, config.window - after, dtype=np.int32)


class _Reached(Exception):
    """Ends a forward pass behind the module that was wanted."""


@dataclass(frozen=True)
class _Runner:
    """Runs the model on windows and writes their rows."""

    model: LanguageModel
    module: nn.Module
    config: HarvestConfig
    windows: Ids
    positions: Ids

    def width(self) -> int:
        """D, from a first look at the site; also sees that the module gives what is expected."""
        return self.activations(self.windows[:1])[0].shape[-1]

    def write(self, out: Path, parts: list[npt.NDArray[np.int64]], missing: list[int]) -> None:
        rows = [len(part) * len(self.positions) for part in parts]
        done = sum(rows) - sum(rows[i] for i in missing)
        with tqdm(total=sum(rows), initial=done, unit=" rows", unit_scale=True) as progress:
            for i in missing:
                write_shard(shard_path(out, i), self.shard(parts[i], sum(rows[:i]), progress))

    def shard(
        self, part: npt.NDArray[np.int64], first_row: int, progress: Any
    ) -> dict[str, Tensor]:
        """The tensors of the windows ``part``, whose rows are numbered from ``first_row``."""
        ids = self.windows[part]
        shape = (len(part), len(self.positions))
        numbers = {
            "token": ids[:, self.positions],
            "window": np.broadcast_to(part.astype(np.int32)[:, None], shape),
            "position": np.broadcast_to(self.positions, shape),
        }
        labels = {name: torch.from_numpy(numbers[name].flatten()) for name in LABELS}
        names = ("x", "gradient") if self.config.gradients else ("x",)
        batches: dict[str, list[Tensor]] = {name: [] for name in names}
        for first in range(0, len(ids), self.config.batch_size):
            tensors = self.activations(ids[first : first + self.config.batch_size])
            for name, tensor in zip(names, tensors, strict=True):
                rows = tensor[:, self.positions].flatten(0, 1).cpu()
                batches[name].append(self.stored(name, rows, labels, first * shape[1], first_row))
            progress.update(len(rows))
        return labels | {name: torch.cat(batches[name]) for name in names}

    def stored(
        self, name: str, rows: Tensor, labels: dict[str, Tensor], start: int, first_row: int
    ) -> Tensor:
        """Rows in the dtype of storage; those of a shard's labels from ``start``."""
        stored = rows.to(DTYPES[self.config.dtype])
        finite = torch.isfinite(stored)
        if not finite.all():
            row = int((~finite).any(dim=1).nonzero()[0])
            value = rows[row][~finite[row]][0].item()
            where = ", ".join(f"{label} {labels[label][start + row]}" for label in LABELS)
            wider = "; --dtype bfloat16 or float32 would hold it" if np.isfinite(value) else ""
            raise ValueError(
                f"row {first_row + start + row} ({where}): {name} holds {value}, "
                f"which is not finite in {self.config.dtype}{wider}"
            )
        return stored

    def activations(self, ids: Ids) -> tuple[Tensor, ...]:
        """(x,) or (x, gradient) of windows [n, window], each [n, window, D]."""
        net, gradients = self.model.net, self.config.gradients
        device = next(net.parameters()).device
        batch = torch.from_numpy(ids).long().to(device)
        found: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            if x.ndim != 3 or x.shape[:2] != batch.shape:
                expected = f"[{len(batch)}, {batch.shape[1]}, D]"
                name = type(self.module).__name__
                raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")
            found.append(x.detach().requires_grad_(gradients))
            if not gradients:
                raise _Reached
            return found[-1]

        try:
            with (
                edited(self.module, keep),
                torch.set_grad_enabled(gradients),
                torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16_model),
            ):
                options = {"use_cache": False} if self.model.causal else {}
                output = net(input_ids=batch, **options)
        except _Reached:
            return (found[0],)
        if not found:
            raise ValueError(f"{self.model.name} does not run its {type(self.module).__name__}")
        logits = output.logits[:, :-1].float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        return found[0].detach(), torch.autograd.grad(loss, found[0])[0]


def _check_same(out: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in wanted | there:
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"{out}: expected an empty folder or a harvest with the same options to go on "
                f"with, got one with {name} {there.get(name)!r:.60} instead of "
                f"{wanted.get(name)!r:.60}"
            )


def _check_room(out: Path, index: dict[str, Any], missing: list[int]) -> None:
    """Prints what will be written, and refuses what the disk has no room for."""
    matrices = 2 if index["gradients"] else 1
    row_bytes = matrices * index["d"] * DTYPES[index["dtype"]].itemsize + 4 * len(LABELS)
    needed = sum(index["shards"][i] for i in missing) * row_bytes
    free = shutil.disk_usage(out).free
    what = "activations and gradients" if index["gradients"] else "activations"
    print(
        f"{index['model']}, {index['site']} of layer {index['layer']}: {index['rows']:,} rows × "
        f"{index['d']} {index['dtype']}, {what}\n{out}: {len(missing)} of "
        f"{len(index['shards'])} shards to write, {needed / 1e6:,.1f} MB; "
        f"{free / 1e6:,.1f} MB free",
        flush=True,
    )
    if needed > free:
        raise ValueError(f"{out}: expected {needed} bytes of free space on the disk, got {free}")
