"""A model's activations over text, window by window: what ``fastsae harvest`` stores and a live
training learns from.

    text ──cut──▶ windows ──shuffle──▶ model up to the deepest site ──▶ rows of each site

Sites. ``layer`` counts blocks from 1: layer 3 is the third block. ``residual`` is what that block
returns, so it equals ``hidden_states[layer]`` of transformers (except after the last block, where
transformers may apply the final norm). ``mlp`` and ``attention`` are what the block's MLP and
attention give before anything is added to it or normalises it. Modules are found by structure: the
model must have one list of blocks, each with an attention and an MLP as in BERT, Llama or GPT-2.
With several layers or sites each layer has each site, named "residual-3", and one forward pass
gives them all; it ends behind the last of them.

Windows (`fastsae.windows`). A window is what the model reads at once: ``window`` positions, among
them the special tokens that the tokenizer puts around a text. Rows are the window's other
positions; for a causal model also without position 0, where attention sinks lie. Windows come in an
order that depends on their number and the seed alone; rows of a window stay together and in order,
so a trainer must shuffle.

Gradients. Row p of a window also gets ∂L/∂x_p, where L is the sum over the window's positions
t = 1 … window − 1 of −log P(token t | tokens before t), in nats, in float32: next-token
cross-entropy with reduction "sum", so neither the length of a window nor the batch scales it. x_p
is the activation at the site, and L depends on it through everything after the site. The last
position predicts nothing, its gradient is 0: it is left out.

Bits. A row depends on the model, the text and the options alone, not on the other sites that are
read with it. (On the same machine and number of threads: torch's products depend on both.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastsae.models import LanguageModel, check_window
from fastsae.order import RowIndex
from fastsae.shards import DTYPES, LABELS
from fastsae.sites import Reached, Site, edited, find_module
from fastsae.windows import Ids, cut_windows, window_order

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class HarvestConfig:
    """What is kept of a model's activations."""

    layer: int | tuple[int, ...]
    """Blocks, counted from 1."""
    site: Site | tuple[Site, ...] = "residual"
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

    @property
    def sites(self) -> dict[str, tuple[Site, int]]:
        """The sites by name: each site of each layer."""
        return {
            f"{site}-{layer}": (site, layer)
            for layer in _all(self.layer)
            for site in _all(self.site)
        }

    def check(self) -> None:
        """ValueError: a value that is none of the possible ones, or one given twice."""
        for name, values in (("site", get_args(Site)), ("dtype", get_args(Dtype))):
            for value in _all(getattr(self, name)):
                if value not in values:
                    expected = ", ".join(values)
                    raise ValueError(f"{name}: expected one of {expected}, got {value!r}")
        for name in ("layer", "rows", "window", "batch_size", "shard_rows"):
            for value in _all(getattr(self, name)):
                if value is not None and value < 1:
                    raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("layer", "site"):
            given = _all(getattr(self, name))
            if not given or len(set(given)) < len(given):
                found = " ".join(map(str, given)) or "none"
                raise ValueError(f"{name}: expected at least one, each of them once, got {found}")


def _all(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


class SiteReader:
    """Runs a model on windows of text and gives the rows of the config's sites.

    Beside the model, the ids of all windows (int32) are in memory. ValueError: options, text or a
    model that it cannot be made with.
    """

    def __init__(self, model: LanguageModel, text: Sequence[Path], config: HarvestConfig) -> None:
        config.check()
        self.model, self.config = model, config
        self.modules = {
            name: find_module(model.net, site, layer)
            for name, (site, layer) in config.sites.items()
        }
        if model.net.training:
            raise ValueError(
                f"{model.name}: expected a model in eval mode, got one in training mode"
            )
        if config.gradients and not model.causal:
            raise ValueError(f"gradients: expected a causal language model, got {model.name}")
        check_window(model, config.window)
        self.windows, special = cut_windows(model.tokenizer, text, config.window)
        self.positions = _kept_positions(config, special, model.causal)
        """Those of a window that give rows, int32."""
        self.order = window_order(len(self.windows), config.seed)
        """The numbers of all windows, in the order in which they are read."""

    def chosen(self, but_for: int = 0) -> RowIndex:
        """The windows of the config's rows, in order; the last `but_for` of all are left out."""
        order, n = self.order[: len(self.order) - but_for], len(self.positions)
        rows = self.config.rows
        if rows is None:
            return order
        if rows > len(order) * n:
            raise ValueError(
                f"rows: expected at most the {len(order) * n} that the text gives, got {rows}"
            )
        return order[: -(-rows // n)]

    def widths(self) -> dict[str, int]:
        """D of each site, from a first look; also sees that modules give what is expected."""
        found = self._forward(self.windows[:1], list(self.modules))
        return {site: tensors["x"].shape[-1] for site, tensors in found.items()}

    def labels(self, part: RowIndex) -> dict[str, Tensor]:
        """token, window and position of the rows of windows `part`, int32 [rows]."""
        shape = (len(part), len(self.positions))
        numbers = {
            "token": self.windows[part][:, self.positions],
            "window": np.broadcast_to(part.astype(np.int32)[:, None], shape),
            "position": np.broadcast_to(self.positions, shape),
        }
        return {name: torch.from_numpy(numbers[name].flatten()) for name in LABELS}

    def read(
        self, part: RowIndex, first_row: int, sites: Sequence[str]
    ) -> dict[str, dict[str, Tensor]]:
        """x, and gradient where asked for, of each of the sites: [rows, D] in the config's dtype.

        part: windows that the model reads at once; first_row: the number of their first row, for
        the ValueError about a value that is not finite in that dtype.
        """
        labels, several = self.labels(part), len(self.modules) > 1
        found = self._forward(self.windows[part], sites)
        for site, tensors in found.items():
            for name, rows in tensors.items():
                told = f"{name} of {site}" if several else name
                tensors[name] = self._stored(told, rows, labels, first_row)
        return found

    def _stored(self, name: str, rows: Tensor, labels: dict[str, Tensor], first_row: int) -> Tensor:
        stored = rows.to(DTYPES[self.config.dtype])
        finite = torch.isfinite(stored)
        if not finite.all():
            row = int((~finite).any(dim=1).nonzero()[0])
            value = rows[row][~finite[row]][0].item()
            where = ", ".join(f"{label} {labels[label][row]}" for label in LABELS)
            wider = "; --dtype bfloat16 or float32 would hold it" if np.isfinite(value) else ""
            raise ValueError(
                f"row {first_row + row} ({where}): {name} holds {value}, "
                f"which is not finite in {self.config.dtype}{wider}"
            )
        return stored

    def _forward(self, ids: Ids, sites: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Of windows [n, window]: x, perhaps gradient [rows, D] of each of the sites."""
        found = activations(
            self.model,
            {site: self.modules[site] for site in sites},
            ids,
            positions=self.positions,
            gradients=self.config.gradients,
            bf16_model=self.config.bf16_model,
        )
        return {
            site: {name: t.flatten(0, 1).cpu() for name, t in tensors.items()}
            for site, tensors in found.items()
        }


def activations(
    model: LanguageModel,
    modules: Mapping[str, nn.Module],
    ids: Ids,
    *,
    positions: Ids | None = None,
    gradients: bool = False,
    bf16_model: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """What modules give for windows [n, window], in one pass: for each name x, and gradient where
    asked for, [n, positions, D] on the model's device.

    positions: of a window; None: all. The modules are named in the order in which they run; without
    gradients the model runs no further than the last. ValueError: a module gives something else, or
    the model does not run it.
    """
    device = next(model.net.parameters()).device
    batch = torch.from_numpy(ids).long().to(device)
    kept = np.arange(ids.shape[1]) if positions is None else positions
    inputs: dict[str, Tensor] = {}  # what L is differentiated by
    found: dict[str, dict[str, Tensor]] = {}

    def rows(x: Tensor) -> Tensor:  # a copy: modules behind may write into what x is made of
        return x.detach()[:, torch.from_numpy(kept).to(device)]

    def keep(name: str, x: Tensor) -> Tensor:
        if name in found:
            return x
        if x.ndim != 3 or x.shape[:2] != batch.shape:
            expected = f"[{len(batch)}, {batch.shape[1]}, D]"
            kind = type(modules[name]).__name__
            raise ValueError(f"{kind}: expected {expected}, got {list(x.shape)}")
        found[name] = {"x": rows(x)}
        if not gradients:
            if len(found) == len(modules):
                raise Reached
            return x
        # What a site gives depends on the site before it, or begins here.
        inputs[name] = x if inputs and x.requires_grad else x.detach().requires_grad_()
        return inputs[name]

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            keeps: Callable[[Tensor], Tensor] = partial(keep, name)
            stack.enter_context(edited(module, keeps))
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16_model))
        stack.enter_context(contextlib.suppress(Reached))
        output = model.net(input_ids=batch, **({"use_cache": False} if model.causal else {}))
    for name, module in modules.items():
        if name not in found:
            raise ValueError(f"{model.name} does not run its {type(module).__name__}")
    if gradients:
        logits = output.logits[:, :-1].float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        by = torch.autograd.grad(loss, [inputs[name] for name in modules])
        for name, gradient in zip(modules, by, strict=True):
            found[name]["gradient"] = rows(gradient)
    return {name: found[name] for name in modules}


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
