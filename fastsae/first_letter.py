"""The first-letter task of `fastsae.absorption` in a language model: its words, prompts, rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.absorption import LETTERS, Criteria, absorption
from fastsae.evaluation import At
from fastsae.models import LanguageModel
from fastsae.order import WORDS, permutation
from fastsae.sae import SAE
from fastsae.windows import Ids, special_tokens

QUESTION = " has the first letter:"
EXAMPLES = 10
"""Lines before the first word of a prompt that is read."""
READ = 30
"""Words of a prompt that are read."""
TRAIN_SHARE = 0.8


def letter_words(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The tokens that are words of ASCII letters, perhaps behind a space: ids and letters, [n]."""
    found = []
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).removeprefix(" ")
        if word.isascii() and word.isalpha():
            found.append((token, LETTERS.index(word[0].lower())))
    ids, letters = torch.tensor(found, dtype=torch.int64).reshape(-1, 2).T
    return ids, letters


def prompts(tokenizer: Any, words: Tensor, letter: Tensor) -> tuple[Ids, list[int]]:
    """Windows [m, L] that read the words [n] in order, and the READ positions where they stand.

    Each begins with EXAMPLES lines of the words before its own, going around; the last one goes on
    with the first words. ValueError: answers of several lengths in tokens, or fewer words than a
    prompt has lines.
    """
    if len(words) < EXAMPLES + READ:
        raise ValueError(f"words: expected at least {EXAMPLES + READ}, got {len(words)}")

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    question, end = ids(QUESTION), ids("\n")
    answers = [ids(f" {name.upper()}") for name in LETTERS]
    if len({len(answer) for answer in answers}) != 1:
        raise ValueError("tokenizer: expected answers ' A' to ' Z' of one length in tokens")
    lines = [
        [word, *question, *answers[of], *end]
        for word, of in zip(words.tolist(), letter.tolist(), strict=True)
    ]
    before = [*special_tokens(tokenizer)[0], *end]
    found = []
    for first in range(0, len(lines), READ):
        numbers = range(first - EXAMPLES, first + READ)
        found.append(before + [token for i in numbers for token in lines[i % len(lines)]])
    places = range(EXAMPLES, EXAMPLES + READ)
    return np.array(found, dtype=np.int32), [len(before) + i * len(lines[0]) for i in places]


def absorption_in_model(
    sae: SAE,
    model: LanguageModel,
    at: At,
    *,
    n_words: int | None = None,
    criteria: Criteria | None = None,
) -> dict[str, Any]:
    """`absorption` of an SAE at its site in a causal language model.

    n_words: so many of the vocabulary's words, at random but always the same; None: all.
    ValueError: too few words, or a model or site that does not fit.
    """
    if n_words is not None and n_words < 1:
        raise ValueError(f"n_words: expected at least 1, got {n_words}")
    words, letter = letter_words(model.tokenizer)
    order = torch.from_numpy(permutation(len(words), 0, WORDS))[:n_words]
    words, letter = words[order], letter[order]
    train = torch.arange(len(words)) < TRAIN_SHARE * len(words)
    x = torch.cat([_read(model, at, words[part], letter[part]) for part in (train, ~train)])
    return absorption(sae, x, letter, train, criteria=criteria)


def _read(model: LanguageModel, at: At, words: Tensor, letter: Tensor) -> Tensor:
    """x [n, D] at the words, each in a line of a prompt of them."""
    windows, places = prompts(model.tokenizer, words, letter)
    rows = [x[:, places].flatten(0, 1).float().cpu() for x in at.activations(model, windows)]
    return torch.cat(rows)[: len(words)]
