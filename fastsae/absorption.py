"""Feature absorption on the first-letter task (Chanin et al. 2024; SAEBench, Karvonen et al. 2025).

A latent for "begins with S" is absorbed where it stays silent on some words with S and a latent of
the word itself supplies the direction instead. The model reads lines `word has the first letter: X`
for single-token words of its vocabulary; x is the activation at the word, z its codes. Of the words
four fifths train and the others test. For each letter:

1. A logistic probe on x, of unit direction p. A letter whose F1 on the test words is below
   `probe_f1` is skipped.
2. Main latents: k-sparse probes on the latents with the largest difference of means; the next
   latent is added while the test F1 rises by more than `split_f1`, up to `main_latents`.
3. On each test word with the letter that the probe finds, latent i supplies s_i = z_i d_i·p of the
   projection x·p (d_i its decoder row; SAEBench takes z_i times the cosine, which is the same where
   rows have norm 1).
   *Full absorption*: all main latents are below `silent`, and the latent with the largest s has a
   cosine with p of at least `full_cosine` and s ≥ `share`·(x·p).
   *Absorption fraction*: A is the sum of the largest s > 0, at most `absorbers`, of other latents
   with a cosine of at least `fraction_cosine`, M the sum of s over main latents. 0 where M ≥ x·p
   or A < `share`·(x·p), else 1 where M ≤ 0, else a/(a + M) with a = min(A, x·p − M).

Scores of a letter are means over these words, scores of an SAE means over its letters.

What differs from SAEBench: probes are the optimum that `fit_probe` says, there 50 epochs of Adam,
so p and all cosines with it differ; main latents are ranked by difference of means, there by an
L1-regularised probe on all latents; the examples before a word are the ten lines or more before it,
there up to 10 drawn for each word. The paper's text has other constants for the fraction (share 0,
fraction_cosine −1, no bound on absorbers); these are the code's.

Caution. An SAE that is trained too little has few latents for single words, so nothing absorbs and
the score is low; so it is where main latents fire on everything. SAEBench advises models of at
least 2B parameters. A low score means little without the probes' and main latents' F1 beside it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.codes import Codes
from fastsae.corpus import codes_of
from fastsae.data import open_source
from fastsae.probing import columns, fit_probe, largest, mean_difference, scores
from fastsae.reference import padded
from fastsae.sae import SAE
from fastsae.sums import row_norms

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Criteria:
    """The constants of SAEBench's code; the module says what each does."""

    probe_f1: float = 0.6
    split_f1: float = 0.03
    main_latents: int = 10
    silent: float = 1e-8
    full_cosine: float = 0.025
    share: float = 0.4
    fraction_cosine: float = 0.1
    absorbers: int = 3


def absorption(
    sae: SAE,
    x: Tensor,
    letter: Tensor,
    train: Tensor,
    *,
    criteria: Criteria | None = None,
    l2: float = 1.0,
) -> dict[str, Any]:
    """Absorption scores from activations x [N, D] at words, by name as in SAEBench.

    letter int64 [N]: the place in the alphabet of each word's first letter; train bool [N]: the
    words that probes are fitted on, the others test. l2 is that of `fit_probe`. mean_… are None
    where all letters were skipped; "skipped" has the F1 of those letters' probes, None where the
    words were too few to fit and test one. ValueError: shapes that do not fit, or a transcoder.
    """
    if sae.config.is_transcoder:
        raise ValueError("sae: expected an autoencoder, got a transcoder")
    if x.ndim != 2 or x.shape[1] != sae.config.d_in:
        raise ValueError(f"x: expected [N, {sae.config.d_in}], got {list(x.shape)}")
    if letter.shape != x.shape[:1] or train.shape != x.shape[:1]:
        got = f"{list(letter.shape)} and {list(train.shape)}"
        raise ValueError(f"letter and train: expected [{len(x)}], got {got}")
    criteria = criteria or Criteria()
    codes = codes_of(sae, open_source(x))
    W_dec = sae.W_dec.detach().to(torch.promote_types(sae.W_dec.dtype, torch.float32))
    norms = row_norms(W_dec).double().cpu()
    letters: dict[str, Any] = {}
    skipped: dict[str, float | None] = {}
    for number, name in enumerate(LETTERS):
        y = letter == number
        if not (y[train].any() and (~y[train]).any() and y[~train].any()):
            skipped[name] = None
            continue
        probe = fit_probe(x[train], y[train], l2=l2)
        found = probe.scores(x[~train]) > 0
        f1 = scores(found, y[~train]).f1
        if f1 < criteria.probe_f1 or not f1:
            skipped[name] = f1
            continue
        main, main_f1 = _main_latents(codes, y, train, criteria, l2)
        words = (~train).nonzero()[:, 0][found & y[~train]]
        p = probe.weight / probe.weight.norm()
        supplied = (W_dec @ p.to(W_dec)).cpu().double()
        cosine = supplied / norms.where(norms > 0, 1)
        supplied /= float(sae.input_scale)  # a code is that of the scaled input
        projection = x[words].double() @ p
        full, fraction = _absorbed(projection, codes[words], supplied, cosine, main, criteria)
        letters[name] = {
            "probe_f1": f1,
            "main_latents": main.tolist(),
            "main_latents_f1": main_f1,
            "num_split_features": len(main),
            "num_probe_true_positives": len(words),
            "num_full_absorption": int(full.sum()),
            "full_absorption_rate": float(full.double().mean()),
            "mean_absorption_fraction": float(fraction.mean()),
        }

    def mean(name: str) -> float | None:
        return statistics.fmean(row[name] for row in letters.values()) if letters else None

    return {
        "mean_absorption_fraction_score": mean("mean_absorption_fraction"),
        "mean_full_absorption_score": mean("full_absorption_rate"),
        "mean_num_split_features": mean("num_split_features"),
        "mean_probe_f1": mean("probe_f1"),
        "mean_main_latents_f1": mean("main_latents_f1"),
        "n_words": len(x),
        "n_letters": len(letters),
        "n_skipped": len(skipped),
        "letters": letters,
        "skipped": skipped,
    }


def _main_latents(
    codes: Codes, y: Tensor, train: Tensor, criteria: Criteria, l2: float
) -> tuple[Tensor, float]:
    """The main latents of a label, best first, and the test F1 of the probe on them."""
    best = largest(mean_difference(codes[train], y[train]), criteria.main_latents)
    z_train, z_test = columns(codes[train], best), columns(codes[~train], best)
    n, reached = 0, -1.0
    for k in range(1, len(best) + 1):
        probe = fit_probe(z_train[:, :k], y[train], l2=l2)
        f1 = scores(probe.scores(z_test[:, :k]) > 0, y[~train]).f1
        if f1 <= reached + criteria.split_f1:
            break
        n, reached = k, f1
    return best[:n], reached


def _absorbed(
    projection: Tensor,
    codes: Codes,
    supplied: Tensor,
    cosine: Tensor,
    main: Tensor,
    criteria: Criteria,
) -> tuple[Tensor, Tensor]:
    """Full absorption (bool) and absorption fraction (float64) of words [n].

    projection x·p [n]; of each latent [F] supplied, d_i·p, and cosine, that of d_i and p.
    """
    assert codes.row_ptr is not None
    vals = padded(codes.vals, codes.row_ptr, 0).double()
    idx = padded(codes.idx, codes.row_ptr, -1).long()
    there, latent = idx >= 0, idx.clamp(min=0)
    cosine = cosine[latent].where(there, 0)
    s = vals * supplied[latent] * there
    is_main = torch.isin(latent, main) & there
    needed = criteria.share * projection

    top, where = torch.nn.functional.pad(s, (0, 1)).max(1)  # 0 where no latent is active
    top_cosine = torch.nn.functional.pad(cosine, (0, 1)).gather(1, where[:, None])[:, 0]
    silent = (vals.abs() * is_main < criteria.silent).all(1)
    found = (projection > 0) & (top >= needed)

    absorbs = there & ~is_main & (cosine >= criteria.fraction_cosine) & (s > 0)
    a = (s * absorbs).sort(dim=1, descending=True).values[:, : criteria.absorbers].sum(1)
    m = (s * is_main).sum(1)
    part = torch.minimum(a, projection - m)
    fraction = (part / (part + m)).clamp(0, 1).where(m > 0, 1.0)
    fraction = fraction.where((projection > 0) & (m < projection) & (a >= needed), 0.0)
    return silent & found & (top_cosine >= criteria.full_cosine), fraction
