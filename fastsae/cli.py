"""The command line: ``fastsae demo | train | plan | eval | report | harvest | convert | compare |
encode | stitch | meta | bench | info``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import tyro

import fastsae
from fastsae import (
    SAEConfig,
    Selection,
    bench,
    consistency,
    corpus,
    cpu,
    formats,
    ops,
    plan,
    runs,
    stitching,
)
from fastsae.config import TrainConfig
from fastsae.data import open_source, split
from fastsae.harvest import HarvestConfig, harvest
from fastsae.models import load_model
from fastsae.options import as_arguments, read_options, rule_from, selection_parameters, typed
from fastsae.sharding import Shards

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
    """A .npy file of float16, float32 or float64 rows, a folder that harvest wrote, or
    sample:minilm_l3, sample:smollm2_l11."""
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

    def run(self, parameters: dict[str, Any] | None = None) -> None:
        settings = self.train.checked()
        rule = rule_from(self.selection, self.k, parameters or {})
        source = open_source(self.data, self.target, gradients=rule.needs_gradient)
        train, holdout = split(source, self.holdout)
        config = SAEConfig(
            d_in=source.d_in,
            d_sae=self.d_sae,
            selection=rule,
            d_out=None if self.target is None else source.d_out,
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
        shards, device = None, self.device
        if self.shard_latents * self.data_parallel != 1 or "WORLD_SIZE" in os.environ:
            if device not in ("cpu", "cuda"):  # which would be that of all of them
                raise ValueError(
                    f"device: expected cpu or cuda for several processes, got {device}"
                )
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
            shards = Shards.connect(self.shard_latents, self.data_parallel, device)
        figures = runs.train(
            config,
            train,
            holdout,
            settings,
            self.out,
            options,
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


@dataclass(frozen=True)
class Eval:
    """Print the figures of a run's SAE on held-out rows, or on other activations."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    data: str | None = None
    """Activations, as for train; None: the rows that the run held out."""
    target: str | None = None
    """Activations to predict, with data, for a transcoder."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        figures = runs.evaluate_run(self.run_directory, self.data, self.target)
        if self.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                if isinstance(value, float):
                    print(f"{name:20} {value:9.4f}")


@dataclass(frozen=True)
class Report:
    """Write a run's report.html again: curves, histograms and what latents respond to."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    data: str | None = None
    """Activations to look at, as for train; None: the run's, those held out first."""

    def run(self) -> None:
        print(runs.report_run(self.run_directory, self.data))


@dataclass(frozen=True)
class Harvest:
    """Store a Hugging Face model's activations over text, to train on; goes on where it stopped."""

    model: tyro.conf.Positional[str]
    """A name on the hub, a local folder, or one of the tested minilm and smollm2."""
    text: tuple[Path, ...]
    """Files to read: .txt, or .jsonl with a field "text"."""
    out: Path
    """Folder of the set: index.json and shards."""
    kept: HarvestConfig
    """What is kept."""
    cache: Path = Path("~/.cache/fastsae")
    """Where the dequantised weights of smollm2 are kept."""
    device: str = "cpu"
    """Where the model runs."""

    def run(self) -> None:
        self.kept.check()
        model = load_model(self.model, self.cache.expanduser(), self.device)
        harvest(model, self.text, self.out, self.kept)


@dataclass(frozen=True)
class Convert:
    """Write an SAE in another library's format."""

    src: tyro.conf.Positional[Path]
    """File or folder to read."""
    dst: tyro.conf.Positional[Path]
    """Folder to write; there must be nothing in it."""
    source: Annotated[
        str | None,
        tyro.conf.arg(
            name="from", help=f"Format of SRC, guessed if not given: {', '.join(formats.FORMATS)}."
        ),
    ] = None
    target: Annotated[
        str, tyro.conf.arg(name="to", help=f"Format of DST: {', '.join(formats.WRITABLE)}.")
    ] = "fastsae"
    normalized: bool = False
    """Read the SAE of a file that wants each token normalised: its inputs will be, already."""

    def run(self) -> None:
        source = self.source or formats.guess(self.src)
        sae = formats.read(self.src, source, normalized=self.normalized)
        formats.write(sae, self.dst, self.target)
        c = sae.config
        print(f"{self.src} ({source}) → {self.dst} ({self.target})")
        print(f"{c.selection}, D {c.d_in}, F {c.d_sae}, {c.dtype}")


@dataclass(frozen=True)
class Bench:
    """Run the benchmarks of a checkout: ops, step, peers, scaling, integrations."""

    arguments: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to run, and options: fastsae bench --help."""

    def run(self) -> None:
        sys.exit(bench.run(self.arguments))


@dataclass(frozen=True)
class Compare:
    """Say how much the dictionaries of runs have in common: PW-MCC, and shared latents."""

    run_directories: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more of what train wrote, of one shape; or one, with --truth."""
    truth: Path | None = None
    """A .npy file of true directions, a row each; prints GT-MCC, too."""
    method: str | None = None
    """exact (needs scipy) or sparse; None: exact up to 32,768 latents."""
    gap: float = 0.01
    """How far from the best a sparse matching may be."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        saes = [runs.sae_of(run) for run in self.run_directories]
        truth = None if self.truth is None else open_source(self.truth)
        figures = consistency.figures(saes, truth, method=self.method, gap=self.gap)
        print(json.dumps(figures) if self.json else consistency.table(figures))


@dataclass(frozen=True)
class Encode:
    """Store the codes of activations, and the contexts each latent responds to most."""

    data: tyro.conf.Positional[str]
    """Activations, as for train."""
    sae: Path
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    out: Path
    """Folder of the set; one that was not finished goes on."""
    contexts: int = 20
    """Rows kept of each latent, those with its largest activations."""
    shard_rows: int = 16384
    """Rows of a shard."""
    device: str = "cpu"
    """Where the SAE runs."""

    def run(self) -> None:
        sae, source = runs.sae_of(self.sae).to(self.device), open_source(self.data)
        options = {"contexts": self.contexts, "shard_rows": self.shard_rows}
        found = corpus.encode_corpus(sae, source, self.out, **options, progress=True)
        pairs, silent = int(found.counts.sum()), int((found.counts == 0).sum())
        print(f"{found.n_rows:,} rows, {pairs:,} pairs (L0 {pairs / found.n_rows:.2f})")
        print(f"{silent:,} of {found.n_latents:,} latents are silent")
        print(self.out)


@dataclass(frozen=True)
class Stitch:
    """Say what a larger SAE has that a smaller one of the same activations has not."""

    small: tyro.conf.Positional[Path]
    """What train wrote."""
    large: tyro.conf.Positional[Path]
    """The same, of an SAE with more latents."""
    data: str | None = None
    """Activations, as for train; None: the rows that the small one's run held out."""
    threshold: float = stitching.NOVEL_BELOW
    """The cosine up to which a latent is novel."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        rows = runs.held_out(self.small) if self.data is None else open_source(self.data)
        saes = runs.sae_of(self.small), runs.sae_of(self.large)
        figures = asdict(stitching.stitching_figures(*saes, rows, self.threshold))
        if self.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                shown = f"{value:.4f}" if isinstance(value, float) else value
                print(f"{name:27} {shown!s:>9}")


@dataclass(frozen=True)
class Meta:
    """Train a meta-SAE: one whose data are the decoder rows of a run's SAE."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote."""
    d_sae: int
    """Number of meta-latents."""
    out: Path
    """Run directory, as of train; train --resume goes on with it."""
    selection: str = "batchtopk"
    """The rule that selects meta-latents."""
    k: int = 4
    """Active meta-latents a row."""
    train: TrainOptions = TrainOptions(lr=2e-3)
    """How it is trained."""

    def run(self) -> None:
        data = f"decoder:{self.run_directory}"
        holdout = open_source(data).n_rows // 20
        options = {"selection": self.selection, "k": self.k, "holdout": holdout}
        Train(data, self.d_sae, self.out, **options, train=self.train).run()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Info:
    """Print versions and which backends work here."""

    def run(self) -> None:
        print(info())


def finish(figures: dict[str, Any], out: Path) -> None:
    """Says how a training ended; where nobody listens any more that is no error."""
    try:
        if figures["interrupted"]:
            print(
                f"stopped after step {figures['step']} of {figures['steps']}; "
                f"go on with: fastsae train --resume --out {out}"
            )
        else:
            runs.print_figures(figures, out)
        sys.stdout.flush()
    except OSError:  # a terminal that closed; Python would fail once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _absolute(data: str | None) -> str | None:
    if data is None or data.startswith("sample:"):
        return data
    kind = "decoder:" if data.startswith("decoder:") else ""
    return kind + str(Path(data.removeprefix(kind)).absolute())


def info() -> str:
    """Versions, threads and the state of each backend: what works, or why not and what to do."""
    lines = [
        f"fastsae   {fastsae.__version__}",
        f"python    {platform.python_version()} on {platform.platform()}",
        f"torch     {torch.__version__}, {torch.get_num_threads()} threads",
        "reference works: any device, float64, float32, bfloat16, float16",
    ]
    if cpu.available():
        lines.append(
            "cpu       works: float32 and bfloat16 (float16 and float64 run on reference), "
            f"instruction set {cpu.isas()[0]}, encoder screened in {cpu.screen()}"
        )
    else:
        lines.append(
            f"cpu       is missing: fastsae._C, {cpu.missing}; install a C++ compiler "
            "(gcc or clang) and reinstall fastsae-engine"
        )
    if importlib.util.find_spec("triton") is None:
        lines.append("triton    is missing: pip install 'fastsae-engine[gpu]'")
    elif not torch.cuda.is_available():
        lines.append(
            f"triton    {version('triton')} finds no CUDA or ROCm device; its kernels run here "
            "only in Triton's interpreter, as in the tests"
        )
    else:
        lines.append(
            f"triton    {version('triton')} works on {torch.cuda.get_device_name()}: "
            f"{', '.join(str(d).removeprefix('torch.') for d in ops.TRITON_DTYPES)}"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        lines = str(error) if isinstance(error, MemoryError) else " ".join(str(error).split())
        sys.exit(f"fastsae: error: {lines}")
    except KeyboardInterrupt:
        sys.exit(130)


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Harvest, tyro.conf.subcommand("harvest")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Stitch, tyro.conf.subcommand("stitch")]
    | Annotated[Meta, tyro.conf.subcommand("meta")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


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
    before: list[str] = []
    first: dict[str, Any] = {}
    for path in files:
        options = read_options(path, hints)
        given, of_rule = as_arguments(options)
        before += given
        if "selection" in options:  # another rule has other parameters
            first = of_rule
        elif "k" in options:
            first.pop(_k_name(typed(before, "selection")), None)
    name = typed(args, "selection")
    if name is not None and typed(before, "selection") != name:
        first = {}
    if typed(args, "k") is not None:  # what is typed overrides the table's
        first.pop(_k_name(name or typed(before, "selection")), None)
    return before + args, {**first, **parameters}


def main(args: list[str] | None = None) -> None:
    """Runs the command line; errors end it with one line on stderr and a status that is not 0.

    What is wrong with an argument itself is in the parser's own words, with status 2.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    with _errors_in_one_line():
        args = sys.argv[1:] if args is None else args
        parameters: dict[str, Any] = {}
        if args[:1] == ["bench"]:  # the options are bench/'s own
            Bench(tuple(args[1:])).run()
        if args[:1] == ["train"]:
            rest, parameters = with_files(args[1:])
            args = ["train", *rest]
        elif any(argument.startswith("--selection.") for argument in args):
            raise ValueError("--selection.PARAM: expected with train only")
        command: Any = tyro.cli(
            Command,
            prog="fastsae",
            description="Sparse autoencoders that do only the work that is there.",
            args=args,
            config=config,
        )
        if isinstance(command, Train):
            command.run(parameters)
        else:
            command.run()
