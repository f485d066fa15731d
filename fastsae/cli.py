"""The command line: ``fastsae demo``, ``fastsae train``, ``fastsae harvest``, ``fastsae info``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import fastsae
from fastsae import SAE, SAEConfig, Selection, TopK, cpu, metrics, ops
from fastsae.data import Batches, Source, in_order, open_source, split
from fastsae.harvest import HarvestConfig, harvest, load_model
from fastsae.timing import product_seconds
from fastsae.train import TrainConfig, Trainer, evaluate

RUN_FILES = ("config.json", "sae.safetensors", "log.jsonl", "metrics.json")


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
    """Run directory: config.json, sae.safetensors, log.jsonl, metrics.json."""
    train: TrainOptions = TrainOptions(steps=1200, batch_size=1024, lr=5e-3)
    """How it is trained."""

    def run(self) -> None:
        train, holdout = split(open_source("sample:minilm_l3"), 2048)
        config = SAEConfig(d_in=train.d_in, d_sae=3072, selection=TopK(32))
        print("activations: all-MiniLM-L6-v2, residual stream after block 3 (fastsae/samples)")
        settings = self.train.checked()
        overwrite = self.out == Demo.out
        figures = run_training(config, train, holdout, settings, self.out, overwrite=overwrite)
        print_figures(figures, self.out)


@dataclass(frozen=True)
class Train:
    """Train an SAE on activations."""

    data: str
    """A .npy file of float16, float32 or float64 rows, a folder that harvest wrote, or
    sample:minilm_l3, sample:smollm2_l11."""
    d_sae: int
    """Number of latents."""
    out: Path
    """Run directory: config.json, sae.safetensors, log.jsonl, metrics.json."""
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
    train: TrainOptions = TrainOptions()
    """How it is trained."""

    def run(self, parameters: dict[str, str] | None = None) -> None:
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
        print_figures(run_training(config, train, holdout, settings, self.out), self.out)


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
class Info:
    """Print versions and which backends work here."""

    def run(self) -> None:
        print(info())


def rule_from(name: str, k: int, parameters: dict[str, str]) -> Selection:
    """The rule of that name; parameters by name, as JSON or, if they are not, as strings."""
    rule = Selection.named(name)
    known = [f.name for f in fields(rule)]
    values: dict[str, Any] = {rule.k_name: k} if rule.k_name else {}
    if "l0_target" in parameters:  # the other way to steer JumpReLU
        values.pop("l0", None)
    for parameter, text in parameters.items():
        if parameter not in known:
            raise ValueError(
                f"selection.{parameter}: {name} has the parameters {', '.join(known)}, no such one"
            )
        try:
            values[parameter] = json.loads(text)
        except ValueError:
            values[parameter] = text
    return Selection.from_dict({"name": name, **values})


def _selection_parameters(args: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes --selection.PARAM VALUE and --selection.PARAM=VALUE out of the arguments."""
    rest: list[str] = []
    found: dict[str, str] = {}
    arguments = iter(args)
    for argument in arguments:
        if not argument.startswith("--selection."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--selection.").partition("=")
        text = value if equals else next(arguments, None)
        if text is None:
            raise ValueError(f"--selection.{name}: expected a value after it, got none")
        found[name.replace("-", "_")] = text
    return rest, found


def l0_of(rule: Selection) -> float:
    """The mean number of active latents a token that the rule aims at, 32 where it has no aim."""
    return (rule.k_name and getattr(rule, rule.k_name)) or 32


def run_training(
    config: SAEConfig,
    train: Source,
    holdout: Source,
    settings: TrainConfig,
    out: Path,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains, evaluates on the held-out rows beside PCA, and writes the run directory."""
    there = [name for name in RUN_FILES if (out / name).exists()]
    if there and not overwrite:
        raise ValueError(f"{out}: expected a new run directory, got one with {', '.join(there)}")
    for name in there:
        (out / name).unlink()
    sae = SAE(config, seed=settings.seed)
    trainer = Trainer(sae, train, settings, out=out)
    figures: dict[str, Any] = trainer.run()
    if holdout.n_rows:
        figures.update(evaluate(sae, holdout))
    if holdout.n_rows and train.target is None:
        figures["pca_components"] = min(round(l0_of(config.selection)), train.d_in)
        figures["pca_fvu"] = metrics.pca_fvu(
            (batch.x for batch in in_order(train, 4096)),
            (batch.x for batch in in_order(holdout, 4096)),
            figures["pca_components"],
        )
    figures["dead_share"] = evaluate(sae, train)["dead_share"]
    x = next(Batches(train, settings.batch_size, settings.seed)).x
    figures["product_seconds"] = product_seconds(x, sae.W_enc)
    step_seconds = figures["train_seconds"] / settings.steps
    figures["step_ratio"] = step_seconds / figures["product_seconds"]
    (out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def print_figures(figures: dict[str, Any], out: Path) -> None:
    lines = [
        ("held-out FVU", "fvu", "{:.4f}", ""),
        ("held-out FVU of PCA", "pca_fvu", "{:.4f}", "with {pca_components} components"),
        ("L0", "l0", "{:.2f}", "active latents a token"),
        ("dead share", "dead_share", "{:.2%}", "latents silent on every training row"),
        ("training", "train_seconds", "{:.1f} s", "{tokens_per_s:,.0f} tokens/s"),
        ("step ÷ product", "step_ratio", "{:.2f}", "product: {product_seconds:.4f} s, dense, fp32"),
    ]
    for label, key, form, remark in lines:
        if key in figures:
            print(f"{label:20} {form.format(figures[key]):>9}  {remark.format(**figures)}")
    print(f"{'run directory':20} {out}")


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
        sys.exit(f"fastsae: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Harvest, tyro.conf.subcommand("harvest")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(args: list[str] | None = None) -> None:
    """Runs the command line; errors end it with one line on stderr and a status that is not 0."""
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    with _errors_in_one_line():
        args, parameters = _selection_parameters(sys.argv[1:] if args is None else args)
        command: Demo | Train | Harvest | Info = tyro.cli(
            Command,
            prog="fastsae",
            description="Sparse autoencoders that do only the work that is there.",
            args=args,
            config=config,
        )
        if isinstance(command, Train):
            command.run(parameters)
        elif parameters:
            raise ValueError(f"--selection.{next(iter(parameters))}: expected with train only")
        else:
            command.run()
