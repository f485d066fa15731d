"""A whole training step of a peer library, in that library's own interpreter (`make peers`).

    .peers/saelens/bin/python bench/peer.py saelens --shape 2048,768,24576,32

prints one row of peers.py, which runs this for every peer that is installed. A step is what a
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
import sys
from typing import Any, NamedTuple

import torch
from curve import curve
from measure import Build, Model, Shape, Start, measure, parse_shape
from no_torchvision import NoTorchvision


def saelens(shape: Shape, x: torch.Tensor, lr: float | None) -> Model:
    """SAETrainer.step, which fit() calls with the next batch of its data provider."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    n, d, f, k = shape
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k))
    settings = SAETrainerConfig(
        total_training_samples=n * 10**6,
        train_batch_size_samples=n,
        lr_end=3e-5,  # what its runner sets by default; a constant schedule does not use it
        **({} if lr is None else {"lr": lr}),
    )
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter(()))
    output: Any = None

    def step(batch: torch.Tensor) -> torch.Tensor:
        nonlocal output  # fit() too holds a step's output until the next one has been computed
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        return output.loss.detach()

    def load(start: Start) -> None:
        sae.W_enc.data.copy_(start.W_enc.T)
        sae.W_dec.data.copy_(start.W_dec)

    return Model(
        step, lambda: sae.W_enc.detach().T, load, lambda batch: sae.decode(sae.encode(batch))
    )


def dictionary_learning(shape: Shape, x: torch.Tensor, lr: float | None) -> Model:
    """TopKTrainer.update, which trainSAE() calls with the next batch of its buffer."""
    from dictionary_learning.trainers import TopKTrainer

    _, d, f, k = shape
    schedule = {} if lr is None else {"lr": lr, "warmup_steps": 0}
    # A layer and a model must be named, but do not matter here. The default device is a GPU's.
    trainer = TopKTrainer(10**6, d, f, k, layer=0, lm_name="none", device="cpu", **schedule)
    steps = 0

    def step(batch: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        loss = trainer.update(steps, batch)
        steps += 1
        return torch.tensor(loss)

    def load(start: Start) -> None:
        trainer.ae.encoder.weight.data.copy_(start.W_enc)
        trainer.ae.decoder.weight.data.copy_(start.W_dec.T)

    return Model(step, lambda: trainer.ae.encoder.weight.detach(), load, trainer.ae)


def sparsify(shape: Shape, x: torch.Tensor, lr: float | None) -> Model:
    """What Trainer.fit does with the activations that its hook on a language model sees."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    n, d, f, k = shape
    sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k))
    sae.b_dec.data = x.mean(0)
    # A rate of signs is none of Adam's: it keeps its default, which has no schedule.
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

    def load(start: Start) -> None:
        sae.encoder.weight.data.copy_(start.W_enc)
        sae.W_dec.data.copy_(start.W_dec)

    def reconstruct(batch: torch.Tensor) -> torch.Tensor:
        optimizer.eval()  # its average of the weights
        found = sae(x=batch, y=batch).sae_out
        optimizer.train()
        return found

    return Model(step, lambda: sae.encoder.weight.detach(), load, reconstruct)


def overcomplete(shape: Shape, x: torch.Tensor, lr: float | None) -> Model:
    """train_sae, with an epoch of one batch a step; mse, and the Adam of its documentation."""
    from overcomplete.sae import TopKSAE, train_sae

    _, d, f, k = shape
    sae = TopKSAE(d, f, top_k=k)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4 if lr is None else lr)
    linear = sae.encoder.final_block[0]

    def mse(x: torch.Tensor, x_hat: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return (x - x_hat).square().mean()

    def step(batch: torch.Tensor) -> torch.Tensor:
        with contextlib.redirect_stdout(None):  # it prints a line
            logs = train_sae(sae, [batch], mse, optimizer, nb_epochs=1)
        return torch.tensor(logs["step_loss"][-1])

    def load(start: Start) -> None:
        linear.weight.data.copy_(start.W_enc)
        linear.bias.data.zero_()
        sae.dictionary._weights.data.copy_(start.W_dec)

    def reconstruct(batch: torch.Tensor) -> torch.Tensor:
        sae.eval()
        return sae(batch)[2]

    return Model(step, lambda: linear.weight.detach(), load, reconstruct)


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
    "overcomplete": Peer(
        "overcomplete",
        "overcomplete.sae",
        overcomplete,
        "torch-adam",
        ["lr=5e-4", "clip=1.0", "monitoring=1", "linear encoder", "no b_dec"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--shape", type=parse_shape, required=True, metavar="N,D,F,K")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--curve", metavar="FOLDER", help="train on what quality.py put there")
    args = parser.parse_args()
    peer = PEERS[args.name]
    if args.name == "sparsify":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # else it looks for a GPU
    if args.name == "overcomplete":
        sys.meta_path.insert(0, NoTorchvision())
    torch.set_num_threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr):  # some of them print
        importlib.import_module(peer.module)
        if args.curve:
            found: Any = curve(peer.build, args.shape, args.curve)
        else:
            found = measure(peer.build, args.shape, args.steps)
    row = {
        "provider": args.name,
        "version": importlib.metadata.version(peer.distribution),
        "optimizer": peer.optimizer,
        "options": peer.options,
        "torch": torch.__version__,
    }
    print(json.dumps(row | ({"curve": found} if args.curve else found)))


if __name__ == "__main__":
    main()
