"""Sparse probing: how much of a label a few latents of an SAE know.

Of a binary label's F latents, the k with the largest difference of means between both classes are
chosen on the training part (Gurnee et al. 2023; SAEBench, Karvonen et al. 2025), and a logistic
regression on these k alone predicts the label on the other part. Beside it stands the same on all D
activations, which is what could be known.

Only the k chosen columns of the codes are ever dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.codes import Codes
from fastsae.corpus import codes_of
from fastsae.data import open_source
from fastsae.order import PROBE_ROWS, PROBE_SPLIT, permutation
from fastsae.sae import SAE

KS = (1, 2, 5, 10, 20)
PER_CLASS = 1000
"""Rows of each class that a probe is trained on, at most; a quarter as many test it."""
TRAIN_SHARE = 0.8
LEAST = 20
"""Test rows of each class below which a label is left out."""


@dataclass(frozen=True)
class Probe:
    """A logistic regression: the label is likely where w·x + b > 0."""

    weight: Tensor
    """float64 [m]."""
    bias: float

    def scores(self, x: Tensor) -> Tensor:
        """w·x + b of rows [n, m]; float64 [n]."""
        return x.double() @ self.weight + self.bias


def fit_probe(x: Tensor, y: Tensor, *, l2: float = 1.0) -> Probe:
    """The logistic regression of y (bool, [n]) on rows x [n, m]:

        minimise  Σ_n c_n log(1 + exp(∓(v·x̃_n + b))) + l2/2 ‖v‖²

    x̃ are the columns at mean 0 and variance 1 (constant ones at 0); c_n weighs both classes alike,
    n/2 each. The minimum is unique, and found by L-BFGS in float64 from 0, so a probe depends on
    its arguments alone. ValueError: a class is missing, shapes or values that do not fit.
    """
    if x.ndim != 2 or y.shape != x.shape[:1] or y.dtype != torch.bool:
        got = f"{list(x.shape)} and {y.dtype} {list(y.shape)}"
        raise ValueError(f"expected x [n, m] and y bool [n], got {got}")
    n, n_true = len(y), int(y.sum())
    if not 0 < n_true < n:
        raise ValueError(f"y: expected rows of both classes, got {n_true} of {n}")
    x = x.detach().double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    if not torch.isfinite(deviation).all():
        raise ValueError("x: expected finite values")
    deviation = deviation.where(deviation > 0, 1)
    x = (x - mean) / deviation
    sign = y.double() * 2 - 1
    weights = 0.5 * y.double() / n_true + 0.5 * (~y).double() / (n - n_true)  # c_n / n
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        v, b = parameters[:-1], parameters[-1]
        losses = torch.nn.functional.softplus(-sign * (x @ v + b))
        found = (weights * losses).sum() + l2 / (2 * n) * v.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)
    weight = parameters.detach()[:-1] / deviation
    return Probe(weight, float(parameters.detach()[-1] - weight @ mean))


class Scores(NamedTuple):
    accuracy: float
    f1: float
    """2 TP / (2 TP + FP + FN); 0 where there is no true positive."""


def scores(predicted: Tensor, y: Tensor) -> Scores:
    """Of predictions and labels, both bool [n]."""
    both = int((predicted & y).sum())
    return Scores(
        float((predicted == y).double().mean()),
        2 * both / max(int(predicted.sum()) + int(y.sum()), 1),
    )


def mean_difference(codes: Codes, y: Tensor) -> Tensor:
    """E[z_i | y] − E[z_i | not y] of each latent: float64 [F]; y bool [n]."""
    active = (codes.idx >= 0).reshape(-1)
    latent, values = codes.idx.reshape(-1)[active].long(), codes.vals.reshape(-1)[active].double()
    of_true = y[codes.token_ids()[active]]

    def mean(which: Tensor, n: int) -> Tensor:
        return latent[which].bincount(values[which], codes.n_latents) / max(n, 1)

    n_true = int(y.sum())
    return mean(of_true, n_true) - mean(~of_true, len(y) - n_true)


def columns(codes: Codes, latents: Tensor) -> Tensor:
    """The values of some latents [k] in all rows: dense float64 [n, k]."""
    place = torch.full((codes.n_latents + 1,), -1)
    place[latents] = torch.arange(len(latents))
    place = place[codes.idx.reshape(-1).long()]  # padding, -1, is the last entry: nowhere
    kept = place >= 0
    dense = torch.zeros(codes.n_tokens, len(latents), dtype=torch.float64)
    dense[codes.token_ids()[kept], place[kept]] = codes.vals.reshape(-1)[kept].double()
    return dense


def largest(values: Tensor, k: int) -> Tensor:
    """The numbers of the k largest values [F], largest first, of equals the first; int64 [k]."""
    return values.sort(descending=True, stable=True).indices[:k]


def sparse_probing(
    sae: SAE,
    x: Tensor,
    labels: Mapping[str, Tensor],
    window: Tensor,
    *,
    ks: Sequence[int] = KS,
    per_class: int = PER_CLASS,
    l2: float = 1.0,
) -> dict[str, Any]:
    """Accuracy and F1 of k-sparse probes for binary labels, beside probes on the activations.

    x [N, D]; each label is bool [N]; window [N] int64 says which rows belong together: a random
    TRAIN_SHARE of the windows trains, the others test. Both parts have as many rows of either
    class, so guessing reaches an accuracy of 0.5. Labels with too few rows are named as left out.
    ValueError: x, ks or per_class that do not fit.
    """
    if x.ndim != 2 or x.shape[1] != sae.config.d_in:
        raise ValueError(f"x: expected [N, {sae.config.d_in}], got {list(x.shape)}")
    if not ks or min(ks) < 1 or max(ks) > sae.config.d_sae:
        raise ValueError(f"ks: expected numbers in [1, {sae.config.d_sae}], got {list(ks)}")
    if per_class < 4 * LEAST:
        raise ValueError(f"per_class: expected at least {4 * LEAST}, got {per_class}")
    codes = codes_of(sae, open_source(x))
    numbers, of_row = window.unique(return_inverse=True)
    order = torch.from_numpy(permutation(len(numbers), 0, PROBE_SPLIT))
    trains = torch.zeros(len(numbers), dtype=torch.bool)
    trains[order[: round(TRAIN_SHARE * len(numbers))]] = True
    in_train = trains[of_row]
    tasks, left_out = {}, []
    for number, (name, y) in enumerate(labels.items()):
        train = _balanced(y, in_train, per_class, number)
        test = _balanced(y, ~in_train, per_class // 4, number)
        if len(test) < 2 * LEAST or not len(train):
            left_out.append(name)
            continue
        tasks[name] = _probed(x, codes, y, train, test, ks, l2)
    return {"ks": list(ks), "tasks": tasks, "left_out": left_out}


def _balanced(y: Tensor, part: Tensor, per_class: int, seed: int) -> Tensor:
    """Rows of a part, as many of one class as of the other: int64, ascending."""
    of_both = [(part & (y == value)).nonzero()[:, 0] for value in (False, True)]
    n = min(per_class, *(len(rows) for rows in of_both))
    chosen = [
        rows[torch.from_numpy(permutation(len(rows), seed, PROBE_ROWS)[:n])] for rows in of_both
    ]
    return torch.cat(chosen).sort().values


def _probed(
    x: Tensor,
    codes: Codes,
    y: Tensor,
    train: Tensor,
    test: Tensor,
    ks: Sequence[int],
    l2: float,
) -> dict[str, Any]:
    own = codes[train], codes[test]
    best = largest(mean_difference(own[0], y[train]).abs(), max(ks))
    z_train, z_test = (columns(part, best) for part in own)
    dense = fit_probe(x[train], y[train], l2=l2)
    found: dict[str, Any] = {
        "n_train": len(train),
        "n_test": len(test),
        "dense": scores(dense.scores(x[test]) > 0, y[test])._asdict(),
        "latents": best.tolist(),
        "k": {},
    }
    for k in ks:
        probe = fit_probe(z_train[:, :k], y[train], l2=l2)
        found["k"][k] = scores(probe.scores(z_test[:, :k]) > 0, y[test])._asdict()
    return found


def token_labels(
    texts: Sequence[str], token: Tensor, file: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Binary labels that a text gives by itself (ours; SAEBench has 35 data sets of others).

    texts: of each id of the vocabulary; token, file [N] int64: of each row, file by its place in
    names. "in NAME" is the file (where there are several); the others look at the row's own token:
    whether it begins a word, is capitalised, has a digit, is punctuation, its first letter.
    """
    stripped = [text.strip() for text in texts]
    of_text = {
        "begins a word": [
            text[:1] == " " and word[:1].isalpha()
            for text, word in zip(texts, stripped, strict=True)
        ],
        "capitalised": [word[:1].isupper() for word in stripped],
        "has a digit": [any(c.isdigit() for c in word) for word in stripped],
        "punctuation": [word != "" and not any(map(str.isalnum, word)) for word in stripped],
    }
    for letter in "abcdefghijklmnopqrstuvwxyz":
        of_text[f"first letter {letter}"] = [word[:1].lower() == letter for word in stripped]
    labels = {f"in {name}": file == i for i, name in enumerate(names)} if len(names) > 1 else {}
    return labels | {name: torch.tensor(values)[token] for name, values in of_text.items()}
