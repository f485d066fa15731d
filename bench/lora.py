"""LoRA around a frozen SAE: the layers behind it learn to live with its reconstruction.

    python bench/lora.py --sae runs/smollm2_l11 --text data/corpus/*.jsonl \\
        --csv bench/results/lora-smollm2-l11.csv

The SAE is spliced into the model it was trained on (x → x̂ at its layer, but for the first position,
which it has not seen), and LoRA adapters go on every linear layer of the blocks behind it. They are
trained to make the spliced model's next-token distribution that of the model alone: the loss is
KL(model ‖ spliced model), mean over positions (Chen et al. 2025, arXiv 2501.19406: rank 64, α 32,
dropout 0.1, AdamW; they use a learning rate of 5e-5 over 15,000 to 100,000 examples of 1024
tokens). Neither the SAE nor the model changes.

A row says what held-out windows cost after so many training tokens: cross-entropy of the model,
of the spliced model, their difference (the gap), and KL, all in nats a token. Held-out windows are
the last in the harvest's order of windows, those before them are trained on: neither was read by a
harvest that stopped before (--text names the same files, in the same order).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from measure import Watch
from rows import Row, add_outputs, machine, outputs, say_busy
from torch import Tensor, nn

from fastsae import runs
from fastsae.data import permutation
from fastsae.harvest import cut_windows
from fastsae.models import load_model
from fastsae.sae import SAE
from fastsae.sites import find_module
from fastsae.steering import steered

_OF_WINDOWS = 3  # the permutation that fastsae.harvest orders windows by
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def spliced(module: nn.Module, sae: SAE) -> AbstractContextManager[None]:
    """Within it the module returns what the SAE makes of its output, but at the first position."""

    def reconstructed(x: Tensor) -> Tensor:
        found = sae(x).reconstruction
        assert found is not None
        return found

    return steered(module, reconstructed, positions=slice(1, None))


def log_probabilities(net: Any, ids: Tensor) -> Tensor:
    return net(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base ‖ other), mean over positions, of log-probabilities (n, L, vocabulary)."""
    return (base.exp() * (base - other)).sum(-1).mean()


@torch.no_grad()
def figures(net: Any, module: nn.Module, sae: SAE, windows: Tensor) -> Row:
    """Of held-out windows: the adapters off for the model alone, on for the spliced one."""
    net.eval()
    sums = dict.fromkeys(("ce_model", "ce_spliced", "kl"), 0.0)
    for ids in windows.split(2):
        with net.disable_adapter():
            base = log_probabilities(net, ids)
        with spliced(module, sae):
            other = log_probabilities(net, ids)
        for name, found in (("ce_model", base), ("ce_spliced", other)):
            sums[name] -= float(found.gather(-1, ids[:, 1:, None]).double().mean()) * len(ids)
        sums["kl"] += float(divergence(base, other)) * len(ids)
    row = {name: value / len(windows) for name, value in sums.items()}
    return row | {"gap": row["ce_spliced"] - row["ce_model"]}


def adapted(net: nn.Module, layer: int, rank: int, alpha: float, dropout: float) -> Any:
    """The model with adapters on the blocks behind `layer`, counted from 1."""
    try:
        import peft
    except ImportError as error:
        raise RuntimeError(f"{error}: pip install 'fastsae-engine[lora]'") from error
    options = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=list(PROJECTIONS),
        layers_to_transform=list(range(layer, net.config.num_hidden_layers)),
    )
    return peft.get_peft_model(net, options)


def training(
    net: Any, module: nn.Module, sae: SAE, windows: Tensor, batch: int, lr: float
) -> Iterator[tuple[int, float]]:
    """(tokens so far, loss) after each step on a batch of windows."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    tokens = 0
    for ids in windows.split(batch):
        net.train()
        with torch.no_grad(), net.disable_adapter():
            base = log_probabilities(net, ids)
        with spliced(module, sae):
            loss = divergence(base, log_probabilities(net, ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tokens += ids.numel()
        yield tokens, loss.item()


def measure(args: argparse.Namespace) -> Iterator[Row]:
    sae, index = runs.sae_of(args.sae).eval().requires_grad_(False), runs.harvested(args.sae)
    model = load_model(index["model"], args.cache.expanduser())
    module = find_module(model.net, index["site"], index["layer"])
    windows, _ = cut_windows(model.tokenizer, args.text, index["window"])
    n_train = args.steps * args.batch
    order = permutation(len(windows), index["seed"], _OF_WINDOWS)[-args.held_out - n_train :]
    if len(order) < args.held_out + n_train:
        raise ValueError(f"text: expected {args.held_out + n_train} windows, got {len(order)}")
    ids = torch.from_numpy(windows[order]).long()
    train, holdout = ids.split([n_train, args.held_out])
    torch.manual_seed(0)
    net = adapted(model.net, index["layer"], args.rank, args.alpha, args.dropout)
    shared = {
        "bench": "lora",
        "model": index["model"],
        "layer": index["layer"],
        "d_sae": sae.config.d_sae,
        "selection": str(sae.config.selection),
        "rank": args.rank,
        "lr": args.lr,
        "trained_parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "held_out_tokens": holdout.numel(),
        "threads": torch.get_num_threads(),
    }
    yield {**shared, "tokens": 0, "seconds": 0.0, **figures(net, module, sae, holdout)}
    seconds, begin, losses = 0.0, time.perf_counter(), []
    for tokens, loss in training(net, module, sae, train, args.batch, args.lr):
        losses.append(loss)
        if len(losses) % args.every == 0 or len(losses) == args.steps:
            seconds += time.perf_counter() - begin
            found = figures(net, module, sae, holdout)
            recent = sum(losses[-args.every :]) / len(losses[-args.every :])
            yield {**shared, "tokens": tokens, "seconds": seconds, "training_kl": recent, **found}
            begin = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sae", type=Path, required=True, help="a run on harvested activations")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2, help="windows a step, as long as harvested")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--held-out", type=int, default=12, help="windows")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fastsae"))
    add_outputs(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    with Watch() as watch:
        for row in measure(args):
            rows.append(row | machine())
            print(
                f"{row['tokens']:>8,} tokens  {row['seconds']:6.1f} s  gap {row['gap']:.4f}  "
                f"kl {row['kl']:.4f}",
                file=sys.stderr,
                flush=True,
            )
            outputs(rows, args)  # as far as it has come
    rows = [row | watch.columns() for row in rows]
    outputs(rows, args)
    say_busy(rows)


if __name__ == "__main__":
    main()
