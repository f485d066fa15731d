"""Other libraries before and after fastsae stands behind them: one process, one model, one machine.

    make test-integrations                                           # makes the environments
    .peers/saelens/bin/python bench/integrations.py sae_lens --json -

Each case is the library's own code on the same batches: first as it is, then with fastsae. Seconds
are medians; peak is the most memory resident while a case runs over what was resident before its
model was made. Both must make the same of a batch.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import Case, Shape, Side, Watch, memory, parse_shape, tokens
from rows import add_outputs, machine, outputs, say_busy
from torch import Tensor

SHAPES: tuple[Shape, ...] = ((2048, 768, 24576, 32), (1024, 384, 131072, 32))


# ---- SAELens: its defaults ----


def _sae_lens_loop(dead_share: float) -> Case:
    def case(shape: Shape) -> Iterator[Side]:
        """A loop of one's own: forward, backward, clip, torch's Adam."""
        from sae_lens import TopKTrainingSAE

        from fastsae.integrations.sae_lens import accelerate

        sae = TopKTrainingSAE(_sae_lens_config(shape))
        adam = torch.optim.Adam(sae.parameters(), lr=3e-4)
        dead = torch.arange(shape[2]) < dead_share * shape[2]

        def step(batch: Tensor) -> None:
            adam.zero_grad()
            _sae_lens_loss(sae, batch, dead).backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            adam.step()

        side = Side(step, lambda batch: _sae_lens_loss(sae, batch, dead))
        yield side
        yield side._replace(on=accelerate)

    return case


def _sae_lens_in_trainer(shape: Shape) -> Iterator[Side]:
    """SAETrainer.step."""
    from sae_lens import SAETrainer, TopKTrainingSAE

    from fastsae.integrations.sae_lens import accelerate

    side = _sae_lens_trainer(shape, TopKTrainingSAE(_sae_lens_config(shape)), SAETrainer)
    yield side
    yield side._replace(on=accelerate)


def _sae_lens_fused(shape: Shape) -> Iterator[Side]:
    """SAETrainer.step, and FastSAETrainer's with a FastTopKTrainingSAE of the same weights."""
    from sae_lens import SAETrainer, TopKTrainingSAE

    from fastsae.integrations.sae_lens import FastSAETrainer, FastTopKTrainingSAE

    sae = TopKTrainingSAE(_sae_lens_config(shape))
    yield _sae_lens_trainer(shape, sae, SAETrainer)
    fast = FastTopKTrainingSAE(_sae_lens_config(shape))
    fast.load_state_dict(sae.state_dict())
    del sae
    yield _sae_lens_trainer(shape, fast, FastSAETrainer)


def _sae_lens_inference(n_tokens: int, whole: bool) -> Case:
    def case(shape: Shape) -> Iterator[Side]:
        """A frozen SAE: decode(encode(x)), or its forward as a whole."""
        from sae_lens import TopKSAE, TopKSAEConfig

        from fastsae.integrations.sae_lens import accelerate

        _, d, f, k = shape
        config = TopKSAEConfig(d_in=d, d_sae=f, k=k, rescale_acts_by_decoder_norm=True)
        sae = TopKSAE(config).eval()

        @torch.no_grad()
        def step(batch: Tensor) -> Tensor:
            x = tokens(batch, n_tokens)
            return sae(x) if whole else sae.decode(sae.encode(x))

        yield Side(step, step)
        yield Side(step, step, accelerate)

    return case


def _sae_lens_config(shape: Shape) -> Any:
    from sae_lens import TopKTrainingSAEConfig

    _, d, f, k = shape
    return TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k)


def _sae_lens_loss(sae: Any, batch: Tensor, dead: Tensor | None = None) -> Tensor:
    from sae_lens.saes.sae import TrainStepInput

    return sae.training_forward_pass(TrainStepInput(batch, {}, dead, 0, False)).loss


def _sae_lens_trainer(shape: Shape, sae: Any, trainer_class: Any) -> Side:
    from sae_lens.config import SAETrainerConfig

    n = shape[0]
    cfg = SAETrainerConfig(
        total_training_samples=n * 10**6, train_batch_size_samples=n, lr_end=3e-5
    )
    trainer = trainer_class(cfg=cfg, sae=sae, data_provider=iter(()))
    output: Any = None

    def step(batch: Tensor) -> None:
        nonlocal output  # fit() too holds a step's output until the next one has been computed
        output = trainer.step(batch)
        trainer.n_training_steps += 1

    return Side(step, lambda batch: _sae_lens_loss(sae, batch))


SAE_LENS: dict[str, Case] = {
    "forward + backward + clip + Adam": _sae_lens_loop(0),
    "the same, 10 % of latents dead": _sae_lens_loop(0.1),
    "in its SAETrainer": _sae_lens_in_trainer,
    "in its SAETrainer, fused": _sae_lens_fused,
    "encode, then decode, 1 token": _sae_lens_inference(1, whole=False),
    "encode, then decode, 4096 tokens": _sae_lens_inference(4096, whole=False),
    "forward, 4096 tokens": _sae_lens_inference(4096, whole=True),
}
LIBRARIES = {
    "sae_lens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
}
"""module → what pip calls it."""


def cases_of(library: str) -> dict[str, Case]:
    """The others' cases are in files of their own, which import their library."""
    if library == "sae_lens":
        return SAE_LENS
    return importlib.import_module(f"integrations_{library}").CASES


# ---- measuring ----


def resident() -> int:
    gc.collect()
    return memory("VmRSS")


def time_side(side: Side, batches: list[Tensor], steps: int, before: int) -> dict[str, float]:
    with side.on():
        side.step(batches[0])
        side.step(batches[1])
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
        seconds = []
        for i in range(steps):
            start = time.perf_counter()
            side.step(batches[i % len(batches)])
            seconds.append(time.perf_counter() - start)
        return {
            "s": statistics.median(seconds),
            "min_s": min(seconds),
            "max_s": max(seconds),
            "peak_bytes": memory("VmHWM") - before,
        }


@torch.no_grad()
def probe(side: Side, batch: Tensor) -> Tensor:
    with side.on():
        return side.probe(batch)


def measure_case(case: Case, shape: Shape, steps: int) -> dict[str, Any]:
    torch.manual_seed(1)
    batches = [torch.randn(shape[0], shape[1]) for _ in range(4)]
    start = resident()
    sides = case(shape)
    side = next(sides)
    before = time_side(side, batches, steps, start)
    expected = probe(side, batches[0])
    del side
    gc.collect()
    side = next(sides)
    torch.testing.assert_close(probe(side, batches[0]), expected, rtol=1e-4, atol=1e-5)
    del expected
    after = time_side(side, batches, steps, start)
    return {"before": before, "after": after, "ratio": before["s"] / after["s"]}


def rows_of(library: str, shapes: list[Shape], only: str, steps: int) -> Iterator[dict[str, Any]]:
    for shape in shapes:
        for name, case in cases_of(library).items():
            if only in name:
                with Watch() as watch:
                    figures = measure_case(case, shape, steps)
                yield {
                    "bench": "integrations",
                    "library": library,
                    "version": importlib.metadata.version(LIBRARIES[library]),
                    "case": name,
                    **dict(zip("ndfk", shape, strict=True)),
                    "threads": torch.get_num_threads(),
                    **watch.columns(),
                    **figures,
                    **machine(),
                }


def print_row(row: dict[str, Any]) -> None:
    shape = ",".join(str(row[size]) for size in "ndfk")
    before, after = row["before"], row["after"]
    print(
        f"{row['case']:34} {shape:20} {before['s']:9.4f} {after['s']:9.4f} {row['ratio']:7.2f} "
        f"{before['peak_bytes'] / 1e6:9.0f} {after['peak_bytes'] / 1e6:9.0f}",
        file=sys.stderr,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="N,D,F,K", help="may be repeated"
    )
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_outputs(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    titles = ("case", "n,d,f,k", "before s", "after s", "ratio", "MB", "MB")
    print("{:34} {:20} {:>9} {:>9} {:>7} {:>9} {:>9}".format(*titles), file=sys.stderr)
    rows = []
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print
        for row in rows_of(args.library, args.shape or list(SHAPES), args.case, args.steps):
            rows.append(row)
            print_row(row)
    say_busy(rows)
    outputs(rows, args)


if __name__ == "__main__":
    main()
