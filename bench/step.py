"""The headline ratio: seconds of a whole training step ÷ seconds of one dense encoder product.

    python bench/step.py --shape 2048,768,24576,32 --json -

Step: the Trainer's own: centring, encode, loss, backward, unit norm with projected gradient,
biases, dead tracking, Adam. The dense provider does the same in plain torch. Product:
`fastsae.timing.product_seconds`, before and after the steps, in the same process. Each provider
runs in a process of its own, so that peak_bytes, the most memory resident during a step over what
was resident before the model was made, is its own. Before it is timed, a provider's loss and
gradients are compared with the float64 reference: one that is wrong says WRONG and has no time.
peers.py measures other libraries in the same way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from typing import Any, Literal

import torch
from measure import Build, Model, Shape, Start, Step, measure, parse_shape
from ops import SHAPES
from rows import Row, add_outputs, machine, outputs, say_busy

from fastsae import SAE, SAEConfig, TopK
from fastsae.batches import Batch
from fastsae.data import open_source
from fastsae.train import TrainConfig, Trainer


def new_trainer(
    shape: Shape,
    x: torch.Tensor,
    optimizer: Any,
    options: list[str],
    dtype: Literal["float32", "float64"] = "float32",
    backend: str | None = None,
    lr: float | None = None,
) -> Trainer:
    """A Trainer of rows x. "auxk": a tenth of the latents counts as dead (see below)."""
    _, d, f, k = shape
    config = SAEConfig(d, f, TopK(k), dtype=dtype, dead_after=10**9)
    sae = SAE(config, backend=backend)
    if "auxk" in options:
        assert sae.b_enc is not None
        # Their bias keeps nearly all of them below the k-th value, yet leaves them about D/2
        # positive pre-activations a token at the first shape, so that the auxiliary selection is
        # full.
        sae.b_enc.data[: f // 10] = -1
        sae.tokens_since_fired[: f // 10] = 10**9
    settings = TrainConfig(
        steps=10**9,
        warmup_steps=0,
        optimizer=optimizer,
        clip=1.0 if "clip" in options else None,
        lr=lr,
    )
    return Trainer(sae, open_source(x), settings)


def step_of(trainer: Trainer) -> Step:
    return lambda batch: trainer.step(Batch(batch, None)).losses["mse"].detach()


def trainer_step(*args: Any, **kwargs: Any) -> tuple[Step, SAE]:
    """fastsae's own step; what it takes is that of `new_trainer`."""
    trainer = new_trainer(*args, **kwargs)
    return step_of(trainer), trainer.sae


def dense_step(
    shape: Shape, x: torch.Tensor, optimizer: str, options: list[str], lr: float | None = None
) -> tuple[Step, SAE]:
    """The same step as a careful user writes it in torch: dense products and torch.topk."""
    _, d, f, k = shape
    sae = SAE(SAEConfig(d, f, TopK(k)))
    assert sae.b_enc is not None
    adam = torch.optim.Adam(
        sae.parameters(), lr=lr or 2e-4 / (f / 2**14) ** 0.5, eps=TrainConfig.eps, fused=True
    )
    since_fired = torch.zeros(f, dtype=torch.int64)

    def step(batch: torch.Tensor) -> torch.Tensor:
        h = torch.relu((batch - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        top = h.topk(k)
        z = torch.zeros_like(h).scatter(1, top.indices, top.values)
        loss = (z @ sae.W_dec + sae.b_dec - batch).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            since_fired.add_(len(batch))
            since_fired[top.indices[top.values > 0]] = 0
            grad = sae.W_dec.grad
            assert grad is not None
            grad -= (grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
            adam.step()
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        return loss.detach()

    return step, sae


PROVIDERS: dict[str, Any] = {"fastsae": trainer_step, "torch-dense": dense_step}
ROWS: tuple[tuple[str, str, list[str]], ...] = (
    ("fastsae", "adam", []),
    ("fastsae", "adam-lazy", []),
    ("fastsae", "adam", ["clip"]),
    ("fastsae", "adam", ["auxk"]),
    ("fastsae", "torch-adam", []),
    ("torch-dense", "torch-adam", []),
)


def check(provider: str, optimizer: str, options: list[str]) -> None:
    """Raises unless three steps on a small problem follow fastsae's reference in float64."""
    shape = (96, 40, 512, 8)
    torch.manual_seed(1)
    batches = torch.randn(3, *shape[:2])
    step, sae = PROVIDERS[provider](shape, batches[0], optimizer, options)
    oracle_step, oracle = trainer_step(
        shape, batches[0], optimizer, options, dtype="float64", backend="reference"
    )
    oracle.load_state_dict(sae.state_dict())
    for batch in batches:
        expected = oracle_step(batch.double())
        torch.testing.assert_close(step(batch).double(), expected, rtol=1e-5, atol=0)
    for (name, p), q in zip(sae.named_parameters(), oracle.parameters(), strict=True):
        # Adam's first steps are sign-like, so a few tiny gradients may go the other way.
        lr = 2e-4 / (shape[2] / 2**14) ** 0.5
        assert float((p.detach().double() - q.detach()).abs().mean()) < 1e-3 * lr, name


def measure_row(
    shape: Shape, provider: str, optimizer: str, options: list[str], steps: int, threads: int
) -> Row:
    """One row of the table."""
    torch.set_num_threads(threads)
    row: Row = {"bench": "step", "provider": provider, "optimizer": optimizer, "options": options}
    try:
        check(provider, optimizer, options)
    except AssertionError as error:
        lines = " ".join(str(error).split())[:200]
        return row | dict(zip("ndfk", shape, strict=True)) | {"error": f"WRONG: {lines}"}

    return row | measure(build_of(provider, optimizer, options), shape, steps)


def build_of(provider: str, optimizer: str, options: list[str]) -> Build:
    def build(shape: Shape, x: torch.Tensor, lr: float | None) -> Model:
        step, sae = PROVIDERS[provider](shape, x, optimizer, options, lr=lr)

        def load(start: Start) -> None:
            sae.W_enc.data.copy_(start.W_enc)
            sae.W_dec.data.copy_(start.W_dec)

        def reconstruct(batch: torch.Tensor) -> torch.Tensor:
            return sae.decode(sae.encode(batch))

        return Model(step, lambda: sae.W_enc.detach(), load, reconstruct)

    return build


def print_row(row: Row) -> None:
    """A line of the table."""
    shape = ",".join(str(row[size]) for size in "ndfk")
    options = "defaults" if row["bench"] == "peers" else ",".join(row["options"])
    line = f"{row['provider']:20} {row['optimizer']:11} {options or '-':8} {shape:22} "
    if "error" in row:
        line += row["error"]
    else:
        line += f"{row['ms']:9.1f} {row['min_ms']:8.1f}–{row['max_ms']:<8.1f} "
        line += f"{row['product_ms']:8.1f} {row['ratio']:6.2f} {row['peak_bytes'] / 1e6:8.0f}"
    print(line, file=sys.stderr, flush=True)


HEADER = ("provider", "optimizer", "options", "n,d,f,k", "ms", "(range)", "product", "ratio", "MB")


def print_header() -> None:
    line = "{:20} {:11} {:8} {:22} {:>9} {:>17} {:>8} {:>6} {:>8}".format(*HEADER)
    print(line, file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What step.py and peers.py have in common."""
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument(
        "--steps", type=int, default=7, help="timed steps at most, the median counts (default 7)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: torch's"
    )
    add_outputs(parser)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()
    rows = []
    print_header()
    context = multiprocessing.get_context("spawn")
    for shape in args.shape or SHAPES:
        for provider, optimizer, options in ROWS:
            with context.Pool(1) as child:
                row = child.apply(
                    measure_row, (shape, provider, optimizer, options, args.steps, args.threads)
                )
            rows.append(row | machine())
            print_row(row)
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
