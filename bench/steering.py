"""What steering does to a language model: how likely a concept's words become, and at what cost.

    python bench/steering.py --sae runs/smollm2_l11 --text data/corpus \\
        --csv bench/results/steering-smollm2-l11.csv

A concept has a book that is about it, a book that is not, and words. Directions are made of states
at the SAE's layer in some windows of these books, by each of `WAYS`, and brought to one length: a
strength s is ‖shift‖ ÷ the mean ‖x‖ there, so that ways are compared at equal displacement. The
shift is added at every position but the first, while the model reads held-out windows of a third
book. A row has, for them:

    gain        mean log-probability of the concept's words together (any of them comes next), in
                nats, over that without steering, and the standard error of windows
    perplexity  of the text itself, and `ratio`, over that without steering
    text        at one strength, how the model goes on with a prompt
    factor      what the way's own direction was multiplied with: λ, or a latent's activation

The SAE may have been trained on windows of all three books; directions are not made of the third.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measure import Watch
from rows import Row, add_outputs, machine, outputs, say_busy
from torch import Tensor, nn

from fastsae import runs
from fastsae.generation import continued, logits, states
from fastsae.models import LanguageModel, load_model
from fastsae.sae import SAE
from fastsae.sites import find_module
from fastsae.steering import concept, contrast, directions, steered, toward
from fastsae.windows import cut_windows

AFTER_THE_FIRST = slice(1, None)
WINDOW = 128
NEUTRAL = "austen"


class Concept(NamedTuple):
    about: str
    """The book that is about it."""
    other: str
    """One that is not."""
    words: tuple[str, ...]
    """A token each in SmolLM2's vocabulary."""


CONCEPTS = {
    "sea": Concept(
        "moby", "sotu", (" whale", " whales", " sea", " ship", " boat", " deck", " sailors")
    ),
    "computers": Concept(
        "jargon",
        "kjv",
        (" computer", " software", " code", " program", " hackers", " users", " machine"),
    ),
}
WAYS = {
    "relu": "ReLU form (eq. 5)",
    "relu, contrast": "ReLU form, minus the other book's",
    "selection": "TopK form",
    "16 latents": "16 latents that differ most",
    "1 latent": "the latent that differs most",
    "means": "difference of mean activations",
    "random": "random direction",
}
"""The last two use no SAE."""


def ways(sae: SAE, about: Tensor, other: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Directions (D), given states (N, D) in the book about a concept and in the other one."""
    yield "relu", concept(sae, about).mean(0)
    yield "relu, contrast", concept(sae, about).mean(0) - concept(sae, other).mean(0)
    yield "selection", concept(sae, about, "selection").mean(0)
    for m, name in ((16, "16 latents"), (1, "1 latent")):
        latents, difference = contrast(sae, about, other, m)
        yield name, difference @ directions(sae, latents)
    yield "means", about.mean(0) - other.mean(0)
    yield "random", torch.randn(about.shape[1], generator=torch.Generator().manual_seed(0))


def word_ids(model: LanguageModel, words: tuple[str, ...]) -> Tensor:
    """Each word's one token. ValueError: it has several."""
    found = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for word, ids in zip(words, found, strict=True):
        if len(ids) != 1:
            raise ValueError(f"words: expected one token each, got {len(ids)} for {word!r}")
    return torch.tensor([ids[0] for ids in found])


def windows_of(model: LanguageModel, file: Path, n: int) -> Tensor:
    """n windows at equal distances in the book: (n, WINDOW)."""
    windows, _ = cut_windows(model.tokenizer, [file], WINDOW)
    if len(windows) < n:
        raise ValueError(f"{file}: expected at least {n} windows of {WINDOW}, got {len(windows)}")
    return torch.from_numpy(windows[np.arange(n) * len(windows) // n]).long()


def states_in(model: LanguageModel, module: nn.Module, windows: Tensor) -> Tensor:
    """(N, D), without first positions."""
    found = [states(model, module, part)[:, 1:] for part in windows.split(8)]
    return torch.cat(found).flatten(0, 1)


class Measured(NamedTuple):
    """Of each window (n), float64: means over its positions, in nats."""

    log_probability: Tensor
    """That one of the words is next."""
    loss: Tensor
    """Of the text's own next token."""

    def over(self, plain: Measured) -> Row:
        """This, and what it is over that without steering; error: the standard one of windows."""
        gain = self.log_probability - plain.log_probability
        return {
            "log_probability": float(self.log_probability.mean()),
            "perplexity": float(self.loss.mean().exp()),
            "gain": float(gain.mean()),
            "gain_error": float(gain.std()) / len(gain) ** 0.5,
            "ratio": float((self.loss.mean() - plain.loss.mean()).exp()),
        }


def measured(model: LanguageModel, windows: Tensor, words: Tensor) -> Measured:
    mass, loss = [], []
    for part in windows.split(2):
        found = logits(model, part)[:, :-1].log_softmax(-1)
        mass.append(found[..., words].logsumexp(-1).double().mean(1))
        loss.append(-found.gather(-1, part[:, 1:, None])[..., 0].double().mean(1))
    return Measured(torch.cat(mass), torch.cat(loss))


def measure(
    model: LanguageModel, module: nn.Module, sae: SAE, name: str, args: argparse.Namespace
) -> Iterator[Row]:
    of, books = CONCEPTS[name], Path(args.text)
    windows = windows_of(model, books / f"{NEUTRAL}.jsonl", args.windows)
    about, other = (
        states_in(model, module, windows_of(model, books / f"{book}.jsonl", args.windows))
        for book in (of.about, of.other)
    )
    norm = float(states_in(model, module, windows).norm(dim=1).mean())
    words = word_ids(model, of.words)
    plain = measured(model, windows, words)
    shared = {"bench": "steering", "concept": name, "mean_norm": norm, "tokens": windows.numel()}
    shared["prompt"] = args.prompt

    def text() -> str:
        written = continued(model, args.prompt, 40, temperature=args.temperature)
        return " ".join(written.split())

    yield {**shared, "way": "none", "strength": 0.0, **plain.over(plain), "text": text()}
    for way, direction in ways(sae, about, other):
        for strength in args.strengths:
            factor = strength * norm / float(direction.norm())
            row = {**shared, "way": way, "strength": strength, "factor": factor}
            with steered(module, toward(direction, factor), positions=AFTER_THE_FIRST):
                row |= measured(model, windows, words).over(plain)
                if strength == args.write_at:
                    row["text"] = text()
            print(
                f"{name:10} {way:16} {strength:5.2f}  gain {row['gain']:6.3f} nats  "
                f"perplexity × {row['ratio']:8.3f}  {row.get('text', '')!r}",
                file=sys.stderr,
                flush=True,
            )
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sae", type=Path, required=True, help="a run on harvested activations")
    parser.add_argument("--text", required=True, help="the folder that bench/corpus.py wrote")
    parser.add_argument("--concept", action="append", choices=sorted(CONCEPTS))
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.8])
    parser.add_argument("--windows", type=int, default=10, help="of each book")
    parser.add_argument("--prompt", default="In the morning I went out and saw")
    parser.add_argument("--write-at", type=float, default=0.2, help="the strength of the texts")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the texts; seed 0")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fastsae"))
    add_outputs(parser)
    args = parser.parse_args()
    sae, index = runs.sae_of(args.sae), runs.harvest_of(args.sae)
    if index is None:
        parser.error(f"SAE: expected a run on a set of fastsae harvest, got {args.sae}")
    model = load_model(index["model"], args.cache.expanduser())
    module = find_module(model.net, index["site"], index["layer"])
    where = {"model": index["model"], "layer": index["layer"], "site": index["site"]}
    where |= {"d_sae": sae.config.d_sae, "selection": str(sae.config.selection)}
    where["threads"] = torch.get_num_threads()
    rows: list[Row] = []
    for name in args.concept or CONCEPTS:
        with Watch() as watch:
            found = list(measure(model, module, sae, name, args))
        rows += [row | where | machine() | watch.columns() for row in found]
        outputs(rows, args)
    say_busy(rows)


if __name__ == "__main__":
    main()
