"""A whole training step of the peer libraries, each in its own interpreter (`make peers`).

    .peers/saelens/bin/python bench/peers.py saelens --shape 2048,768,24576,32

prints one row of bench/step.py, which runs this for every peer that is installed. A step is what a
library's own trainer does with a batch of activations, with its TopK model, its default settings
and its default optimiser, in fp32. No latent is dead within these few steps, so no auxiliary loss
adds to anybody's time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Build, Shape, Step, Weights, measure, parse_shape

ENVIRONMENTS = Path(__file__).resolve().parent.parent / ".peers"


def saelens(shape: Shape, x: torch.Tensor) -> tuple[Step, Weights]:
    """SAETrainer.step, which fit() calls with the next batch of its data provider."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    n, d, f, k = shape
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k))
    settings = SAETrainerConfig(
        total_training_samples=n * 10**6,
        train_batch_size_samples=n,
        lr_end=3e-5,  # what its runner sets by default; a constant schedule does not use it
    )
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter(()))
    output: Any = None

    def step(batch: torch.Tensor) -> torch.Tensor:
        nonlocal output  # fit() too holds a step's output until the next one has been computed
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        return output.loss.detach()

    return step, lambda: sae.W_enc.detach().T


def dictionary_learning(shape: Shape, x: torch.Tensor) -> tuple[Step, Weights]:
    """TopKTrainer.update, which trainSAE() calls with the next batch of its buffer."""
    from dictionary_learning.trainers import TopKTrainer

    _, d, f, k = shape
    # A layer and a model must be named, but do not matter here. The default device is a GPU's.
    trainer = TopKTrainer(10**6, d, f, k, layer=0, lm_name="none", device="cpu")
    steps = 0

    def step(batch: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        loss = trainer.update(steps, batch)
        steps += 1
        return torch.tensor(loss)

    return step, lambda: trainer.ae.encoder.weight.detach()


def sparsify(shape: Shape, x: torch.Tensor) -> tuple[Step, Weights]:
    """What Trainer.fit does with the activations that its hook on a language model sees."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    n, d, f, k = shape
    sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k))
    sae.b_dec.data = x.mean(0)
    optimizer = ScheduleFreeWrapper(
        SignSGD(sae.parameters(), lr=5e-3 / (f / 2**14) ** 0.5), momentum=0.95
    )
    optimizer.train()
    did_fire = torch.zeros(f, dtype=torch.bool)
    since_fired = torch.zeros(f, dtype=torch.int64)

    def step(batch: torch.Tensor) -> torch.Tensor:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=batch, y=batch, total_variance=(batch - batch.mean(0)).pow(2).sum())
        did_fire[out.latent_indices.flatten()] = True
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(n)
        since_fired[did_fire] = 0
        did_fire.zero_()
        return out.fvu.detach()

    return step, lambda: sae.encoder.weight.detach()


class Peer(NamedTuple):
    distribution: str
    """What pip calls it."""
    module: str
    """Imported before memory is read, so that a library's own size is not counted as a step's."""
    build: Build
    optimizer: str
    options: list[str]
    """The defaults that shape a step."""


PEERS = {
    "saelens": Peer(
        "sae-lens",
        "sae_lens",
        saelens,
        "torch-adam",
        [
            "lr=3e-4",
            "clip=1.0",
            "rescale_acts_by_decoder_norm=True",
            "use_sparse_activations=False",
            "aux_loss_coefficient=1.0",
        ],
    ),
    "dictionary_learning": Peer(
        "dictionary-learning",
        "dictionary_learning.trainers",
        dictionary_learning,
        "torch-adam",
        [
            "lr=2e-4/sqrt(F/2**14)",
            "warmup_steps=1000",
            "clip=1.0",
            "unit decoder",
            "auxk_alpha=1/32",
        ],
    ),
    "sparsify": Peer(
        "eai-sparsify",
        "sparsify",
        sparsify,
        "signum",
        [
            "lr=5e-3/sqrt(F/2**14)",
            "schedule-free",
            "momentum=0.95",
            "normalize_decoder=True",
            "auxk_alpha=0",
            "multi_topk=False",
        ],
    ),
}


def installed(name: str) -> bool:
    return (ENVIRONMENTS / name / "installed").exists()


def run(name: str, shape: Shape, steps: int, threads: int) -> dict[str, Any]:
    """The row of a peer, measured in a process of its environment, or a row with its error."""
    command = [str(ENVIRONMENTS / name / "bin" / "python"), __file__, name]
    command += ["--shape", ",".join(map(str, shape)), "--steps", str(steps)]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode < 0:  # as when memory runs out
        error = f"killed by {signal.Signals(-done.returncode).name}"
    else:
        lines = done.stderr.strip().splitlines()
        error = lines[-1] if lines else f"exit status {done.returncode}"
    row = {"provider": name, "optimizer": PEERS[name].optimizer, "options": PEERS[name].options}
    return row | dict(zip("ndfk", shape, strict=True)) | {"threads": threads, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--shape", type=parse_shape, required=True, metavar="N,D,F,K")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    peer = PEERS[args.name]
    if args.name == "sparsify":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it looks for a GPU
    torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr):  # some of them print
        importlib.import_module(peer.module)
        figures = measure(peer.build, args.shape, args.steps)
    row = {
        "provider": args.name,
        "version": importlib.metadata.version(peer.distribution),
        "optimizer": peer.optimizer,
        "options": peer.options,
        **figures,
        "torch": torch.__version__,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
