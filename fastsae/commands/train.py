"""``fastsae demo | train | plan``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fastsae import plan, runs
from fastsae.config import SAEConfig, TrainConfig
from fastsae.options import as_arguments, read_options, rule_from, selection_parameters, typed
from fastsae.selection import Selection
from fastsae.sharding import Shards
from fastsae.suite import Member

OF_THE_COMMAND = ("out", "config", "resume", "device", "shard_latents", "data_parallel")
"""Options of train that a run does not have: it may go on elsewhere, in other processes."""


@dataclass(frozen=True)
class TrainOptions(TrainConfig):
    """TrainConfig not yet checked: the parser would wrap the error in words of its own."""

    def __post_init__(self) -> None:
        pass

    def checked(self) -> TrainConfig:
        return TrainConfig(**asdict(self))


@dataclass(frozen=True)
class Demo:
    """Train an SAE with 3072 latents on the embedded MiniLM activations and print its figures."""

    out: Path = Path("runs/demo")
    """Run directory; a run that is in the default one is replaced."""
    train: TrainOptions = TrainOptions(steps=600, batch_size=1024, lr=5e-3)
    """How it is trained."""

    def run(self) -> None:
        print("activations: all-MiniLM-L6-v2, residual stream after block 3 (fastsae/samples)")
        if self.out == Demo.out:
            runs.remove(self.out)
        Train("sample:minilm_l3", 3072, self.out, train=self.train).run()


@dataclass(frozen=True)
class Train:
    """Train an SAE on activations."""

    data: str
    """A .npy file of float16, float32 or float64 rows, a folder that harvest wrote, a model's rows
    as it makes them (live:FILE.toml:SITE), or sample:minilm_l3, sample:smollm2_l11."""
    d_sae: int
    """Number of latents."""
    out: Path
    """Run directory: options, log, checkpoints, weights, figures."""
    config: Path | None = None
    """A .toml or .json file with options, named as here but with underscores."""
    resume: bool = False
    """Go on with the run in the run directory, with its options; begin it where there is none."""
    selection: str = "topk"
    """The rule that selects latents; its parameters as --selection.PARAM VALUE. The names, and each
    rule's parameters, are in the error about a wrong one."""
    k: int = 32
    """Active latents a token: the rule's budget, or what its penalty is steered to."""
    target: str | None = None
    """Activations to predict, row for row (a transcoder); None: the data themselves."""
    skip: bool = False
    """Give the transcoder a linear skip connection."""
    decoder_norm: str = "unit"
    """Rows of the decoder: unit (norm 1) or free."""
    dtype: str = "float32"
    """Of the parameters: float32, bfloat16; float16 and float64 run on the reference backend."""
    auxk: str = "dictionary_learning"
    """Whose AuxK loss on dead latents: dictionary_learning, openai, bussmann, sparsify, saelens."""
    auxk_coef: float = 1 / 32
    """Weight of the AuxK loss on dead latents; 0 turns it off."""
    k_aux: int | None = None
    """Dead latents a token in the AuxK loss; None: half the width of the data."""
    dead_after: int = 10_000_000
    """Tokens without firing after which a latent is dead."""
    multi_topk_coef: float = 0.0
    """Weight of the loss with 4k latents (Multi-TopK); 0 turns it off."""
    holdout: int = 2048
    """Rows held out for the final figures, the same ones for every seed."""
    device: str = "cpu"
    """Where it trains: cpu, cuda, cuda:1 …"""
    shard_latents: int = 1
    """Processes that the latents are divided between; torchrun starts them."""
    data_parallel: int = 1
    """Copies of each shard that see disjoint tokens: shard_latents times as many processes."""
    train: TrainOptions = TrainOptions()
    """How it is trained."""

    def prepared(self, parameters: dict[str, Any], opened: runs.Opened | None = None) -> Member:
        """The run that the options say, its data open. opened: as for `runs.open_split`."""
        settings = self.train.checked()
        rule = rule_from(self.selection, self.k, parameters)
        rows, holdout = runs.open_split(
            self.data,
            self.target,
            self.holdout,
            gradients=rule.needs_gradient,
            opened=opened,
        )
        config = SAEConfig(
            d_in=rows.d_in,
            d_sae=self.d_sae,
            selection=rule,
            d_out=None if self.target is None else rows.d_out,
            skip=self.skip,
            decoder_norm=self.decoder_norm,  # type: ignore[arg-type]  # SAEConfig checks it
            dtype=self.dtype,  # type: ignore[arg-type]
            auxk=self.auxk,  # type: ignore[arg-type]
            auxk_coef=self.auxk_coef,
            k_aux=self.k_aux,
            dead_after=self.dead_after,
            multi_topk_coef=self.multi_topk_coef,
        )
        options = {**asdict(self), **asdict(settings), "selection": rule.to_dict()}
        for name in ("train", *OF_THE_COMMAND):
            del options[name]
        for name in ("data", "target"):  # a run may be resumed from another folder
            options[name] = _absolute(options[name])
        options = json.loads(json.dumps(options))
        return Member(config, rows, holdout, settings, options, self.device)

    def run(self, parameters: dict[str, Any] | None = None) -> None:
        of = self.prepared(parameters or {})
        shards, device = None, self.device
        if self.shard_latents * self.data_parallel != 1 or "WORLD_SIZE" in os.environ:
            if device not in ("cpu", "cuda"):  # which would be that of all of them
                raise ValueError(
                    f"device: expected cpu or cuda for several processes, got {device}"
                )
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
            shards = Shards.connect(self.shard_latents, self.data_parallel, device)
        figures = runs.train(
            of.config,
            of.rows,
            of.holdout,
            of.settings,
            self.out,
            of.options,
            resume=self.resume,
            device=device,
            shards=shards,
        )
        if shards is None or shards.first:
            finish(figures, self.out)
        if shards is not None:
            shards.close()


@dataclass(frozen=True)
class Plan:
    """Print what a training will need of memory and disk; allocates nothing."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    d_out: int | None = None
    """Width of a transcoder's target."""
    selection: str = "topk"
    """The rule that selects latents."""
    k: int = 32
    """Active latents a token."""
    dtype: str = "float32"
    """Of the parameters."""
    shard_latents: int = 1
    """Processes that the latents are divided between."""
    data_parallel: int = 1
    """Copies of each shard that see disjoint tokens. The plan is that of one process."""
    memory_gb: float | None = None
    """Memory to fit, in 10⁹ bytes, of a GPU for example; None: what this machine has free."""
    json: bool = False
    """Print one JSON object, in bytes."""
    train: TrainOptions = TrainOptions()
    """How it is trained."""

    def run(self) -> None:
        config = SAEConfig(
            self.d_in,
            self.d_sae,
            rule_from(self.selection, self.k, {}),
            d_out=self.d_out,
            dtype=self.dtype,  # type: ignore[arg-type]
        )
        found = plan.plan(
            config,
            self.train.checked(),
            latents=self.shard_latents,
            data=self.data_parallel,
        )
        memory = plan.available() if self.memory_gb is None else int(self.memory_gb * 1e9)
        if self.json:
            total = {"memory": found.memory, "available": memory}
            print(json.dumps({**asdict(found), **total, "fits": found.memory <= memory}))
        else:
            print(plan.table(found, memory))


def finish(figures: dict[str, Any], out: Path, go_on: str | None = None) -> None:
    """Says how a training ended; where nobody listens any more that is no error."""
    try:
        if figures["interrupted"]:
            print(
                f"stopped after step {figures['step']} of {figures['steps']}; "
                f"go on with: {go_on or f'fastsae train --resume --out {out}'}"
            )
        else:
            runs.print_figures(figures, out)
        sys.stdout.flush()
    except OSError:  # a terminal that closed; Python would fail once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _absolute(data: str | None) -> str | None:
    if data is None or data.startswith("sample:"):
        return data
    kind = next((kind for kind in ("decoder:", "live:") if data.startswith(kind)), "")
    return kind + str(Path(data.removeprefix(kind)).absolute())


def train_options() -> dict[str, Any]:
    """The types of the options of `fastsae train` by name, those that a file may hold."""
    hints = {**get_type_hints(Train), **get_type_hints(TrainConfig)}
    own = ("train", *OF_THE_COMMAND)
    return {name: hint for name, hint in hints.items() if name not in own or name == "device"}


def _k_name(selection: str | None) -> str:
    """Which parameter of a rule --k is."""
    return Selection.named(selection or Train.selection).k_name or ""


def with_files(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments of train with what --resume and --config say put first, and rule parameters."""
    args, parameters = selection_parameters(args)
    hints = train_options()
    files = []
    out, config = typed(args, "out"), typed(args, "config")
    if "--resume" in args and out is not None and (Path(out) / "run.json").exists():
        files.append(Path(out) / "run.json")
    if config is not None:
        files.append(Path(config))
    before, first = layered([read_options(path, hints) for path in files])
    name = typed(args, "selection")
    if name is not None and typed(before, "selection") != name:
        first = {}
    if typed(args, "k") is not None:  # what is typed overrides the table's
        first.pop(_k_name(name or typed(before, "selection")), None)
    return before + args, {**first, **parameters}


def layered(layers: Sequence[dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """Options as arguments, later layers over earlier ones, and the parameters of the rule."""
    before: list[str] = []
    first: dict[str, Any] = {}
    for options in layers:
        given, of_rule = as_arguments(options)
        before += given
        if "selection" in options:  # another rule has other parameters
            first = of_rule
        elif "k" in options:
            first.pop(_k_name(typed(before, "selection")), None)
    return before, first
