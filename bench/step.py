"""The headline ratio: seconds of a whole training step ÷ seconds of one dense encoder product.

    python bench/step.py --shape 2048,768,24576,32 --json -

Step: the Trainer's own: centring, encode, loss, backward, unit norm with projected gradient,
biases, dead tracking, Adam. The dense provider does the same in plain torch. Product:
`fastsae.timing.product_seconds`, before and after the steps, in the same process. Each provider
runs in a process of its own, so that peak_bytes, the most memory resident during a step over what
was resident before the model was made, is its own. Before it is timed, a provider's loss and
gradients are compared with the float64 reference. The peer libraries (peers.py) follow where
`make peers` has installed them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import peers
import torch
from measure import Shape, Step, Weights, measure, parse_shape, write_json

from fastsae import SAE, SAEConfig, TopK, cpu
from fastsae.data import Batch, open_source
from fastsae.train import TrainConfig, Trainer

SHAPES = ((2048, 768, 24576, 32), (1024, 384, 131072, 32))


def trainer_step(
    shape: Shape,
    x: torch.Tensor,
    optimizer: Any,
    options: list[str],
    dtype: Literal["float32", "float64"] = "float32",
    backend: str | None = None,
) -> tuple[Step, SAE]:
    """fastsae's own step. "auxk": a tenth of the latents counts as dead (see below)."""
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
    )
    trainer = Trainer(sae, open_source(x), settings)
    return lambda batch: trainer.step(Batch(batch, None)).losses["mse"].detach(), sae


def dense_step(
    shape: Shape, x: torch.Tensor, optimizer: str, options: list[str]
) -> tuple[Step, SAE]:
    """The same step as a careful user writes it in torch: dense products and torch.topk."""
    _, d, f, k = shape
    sae = SAE(SAEConfig(d, f, TopK(k)))
    assert sae.b_enc is not None
    adam = torch.optim.Adam(
        sae.parameters(), lr=2e-4 / (f / 2**14) ** 0.5, eps=TrainConfig.eps, fused=True
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


PROVIDERS = {"fastsae": trainer_step, "torch-dense": dense_step}
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
) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(threads)
    check(provider, optimizer, options)

    def build(shape: Shape, x: torch.Tensor) -> tuple[Step, Weights]:
        step, sae = PROVIDERS[provider](shape, x, optimizer, options)
        return step, lambda: sae.W_enc.detach()

    figures = measure(build, shape, steps)
    return {"provider": provider, "optimizer": optimizer, "options": options} | figures


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("model name", "CPU part"))
        ),
        platform.processor(),
    )
    try:
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(
            git, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout
    except OSError:
        commit = ""
    return {
        "cpu": name,
        "isa": cpu.isas()[0] if cpu.available() else "none",
        "torch": torch.__version__,
        "fastsae": importlib.metadata.version("fastsae-engine"),
        "commit": commit.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 2),
    }


def print_row(row: dict[str, Any], options: str) -> None:
    """A line of the table."""
    shape = ",".join(str(row[size]) for size in "ndfk")
    line = f"{row['provider']:20} {row['optimizer']:11} {options or '-':8} {shape:22} "
    if "error" in row:
        line += row["error"]
    else:
        line += f"{row['step_s']:8.3f} {row['product_s']:9.3f} {row['ratio']:6.2f} "
        line += f"{row['peak_bytes'] / 1e6:8.0f}"
    print(line, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument(
        "--steps", type=int, default=7, help="timed steps, the median counts (default 7)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: torch's"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave the peer libraries out")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON; - for stdout")
    args = parser.parse_args()
    rows = []
    header = (
        "provider",
        "optimizer",
        "options",
        "n,d,f,k",
        "step s",
        "product s",
        "ratio",
        "peak MB",
    )
    print("{:20} {:11} {:8} {:22} {:>8} {:>9} {:>6} {:>8}".format(*header), file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    for shape in args.shape or SHAPES:
        for provider, optimizer, options in ROWS:
            with context.Pool(1) as child:
                row = child.apply(
                    measure_row, (shape, provider, optimizer, options, args.steps, args.threads)
                )
            rows.append(row | machine())
            print_row(row, ",".join(options))
        for peer in () if args.no_peers else peers.PEERS:
            if not peers.installed(peer):
                print(f"{peer:20} not installed: make peers", file=sys.stderr)
                continue
            row = peers.run(peer, shape, args.steps, args.threads)
            rows.append(machine() | row)
            print_row(row, "defaults")
    write_json(rows, args.json)


if __name__ == "__main__":
    main()
