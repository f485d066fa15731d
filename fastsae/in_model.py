"""What a language model loses when an SAE's reconstructions take the place of its activations.

At one site x̂ = SAE(x) replaces the activations x of the tokens of a window, and the model runs on
from there. Beside it stand the model as it is, and two ablations of the same tokens, by zero and by
the mean of x over them:

    ce_loss_score = (CE_ablation − CE_sae) / (CE_ablation − CE)     CE: of the next token
    kl_div_score  = (KL_ablation − KL_sae) / KL_ablation            KL(original ‖ replaced)

Massive activations. At position 0 and at few other tokens the residual stream of a language model
has norms far beyond the others' (Sun et al. 2024). A few of them can outweigh all others in FVU,
and an SAE that never saw position 0 rebuilds nothing there. So tokens come in three groups, each
with figures of its own: "first", position 0 and special tokens, which `fastsae harvest` leaves out;
"massive", others with a norm above MASSIVE times the median norm of those that are not first (our
rule); "ordinary", the rest. `splice` says which groups are replaced; others stay as they are.

A pass up to the site finds the median, another one the mean; then each batch takes one whole pass
for each of the four variants. Beside the model, a norm a token and the logits of two variants of a
batch are in memory.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from fastsae.evaluation import At, Windows
from fastsae.fidelity import Prediction, Reconstruction
from fastsae.models import LanguageModel
from fastsae.sae import SAE
from fastsae.sites import edited

MASSIVE = 10.0
"""Times the median norm: above it a token is massive."""

Splice = Literal["rows", "ordinary", "all"]
SPLICED: dict[str, tuple[str, ...]] = {
    "rows": ("ordinary", "massive"),
    "ordinary": ("ordinary",),
    "all": ("ordinary", "massive", "first"),
}
"""Which groups of tokens are replaced: those that a harvest keeps, only ordinary ones, or all."""


@torch.no_grad()
def evaluate_in_model(
    sae: SAE,
    model: LanguageModel,
    windows: Windows,
    at: At,
    *,
    splice: Splice = "rows",
    mean: Tensor | None = None,
    massive: float = MASSIVE,
    progress: bool = False,
) -> dict[str, Any]:
    """Figures of an SAE inside a causal language model, on all of the windows.

    Those of `Prediction` and of `Reconstruction`, at the replaced tokens; "groups" holds the latter
    of each group. Names are SAELens's where they mean the same; delta_ce_loss = CE_sae − CE and all
    that name the mean ablation are ours. SAELens replaces what special tokens do not exclude, in
    the ablation all positions: with splice "all" and no special tokens that is the same.

    mean [D]: what the mean ablation puts there, instead of the mean of the replaced tokens.
    ValueError: a model, a site or an SAE that do not fit, or no token to replace.
    """
    if splice not in SPLICED:
        raise ValueError(f"splice: expected one of {', '.join(get_args(Splice))}, got {splice!r}")
    if sae.config.is_transcoder:
        raise ValueError("sae: expected an autoencoder, got a transcoder")
    module, device = at.module(model), next(model.net.parameters()).device
    limit, members = _members(sae, model, windows, at, massive)
    replaced = torch.stack([members[name] for name in SPLICED[splice]]).any(0)
    if not replaced.any():
        raise ValueError("windows: expected tokens to replace, got none")
    mean = _mean(model, windows, at, replaced) if mean is None else mean
    if mean.shape != (sae.config.d_in,):
        raise ValueError(f"mean: expected [{sae.config.d_in}], got {list(mean.shape)}")

    def logits(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=at.bf16_model):
            found: Tensor = model.net(input_ids=ids, use_cache=False).logits
        return found

    prediction, spliced = Prediction(), Reconstruction()
    groups = {name: Reconstruction() for name in members}
    was_training, done = sae.training, 0
    sae.eval()
    bar = tqdm(total=windows.ids.size, unit=" tokens", unit_scale=True, disable=not progress)
    try:
        for batch in at.batches(windows.ids):
            own = slice(done, done + len(batch))
            ids, here = torch.from_numpy(batch).long().to(device), replaced[own].to(device)
            seen: list[Tensor] = []

            def keep(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(x)
                return x

            with edited(module, keep):
                original = logits(ids)
            (x,) = seen
            prediction.add("without_sae", ids, here, original)
            x_hat = torch.zeros_like(x)
            for name, group in groups.items():
                if (there := members[name][own]).any():
                    output = sae(x[there].to(sae.W_dec.device))
                    assert output.reconstruction is not None
                    x_hat[there] = output.reconstruction.to(x)
                    figures = x[there], x_hat[there], float(output.metrics["l0"])
                    group.update(*figures)
                    if name in SPLICED[splice]:
                        spliced.update(*figures)
            for variant, value in (
                ("with_sae", x_hat),
                ("with_ablation", x.new_zeros(())),
                ("with_mean_ablation", mean.to(x)),
            ):
                put = value.where(here[:, :, None], x)
                with edited(module, lambda _, put=put: put):  # type: ignore[misc]
                    prediction.add(variant, ids, here, logits(ids), original)
            done += len(batch)
            bar.update(batch.size)
    finally:
        sae.train(was_training)
        bar.close()
    return {
        **prediction.figures(),
        **spliced.figures(),
        "splice": splice,
        "massive_above": limit,
        "groups": {name: group.figures() for name, group in groups.items()},
    }


def _members(
    sae: SAE, model: LanguageModel, windows: Windows, at: At, massive: float
) -> tuple[float, dict[str, Tensor]]:
    """The norm above which a token is massive, and which tokens [n, window] are in which group."""
    norms, d = [], sae.config.d_in
    for x in at.activations(model, windows.ids):
        if x.shape[-1] != d:
            raise ValueError(f"sae: expected d_in {x.shape[-1]}, the site's width, got {d}")
        norms.append(x.double().norm(dim=-1).cpu())
    norm, rows = torch.cat(norms), torch.from_numpy(windows.rows)
    if not rows.any():
        raise ValueError("window: expected positions beside special and first ones, got none")
    limit = massive * float(norm[:, rows].median())
    above = rows & (norm > limit)
    return limit, {"ordinary": rows & ~above, "massive": above, "first": ~rows.expand_as(norm)}


def _mean(model: LanguageModel, windows: Windows, at: At, which: Tensor) -> Tensor:
    """The mean of x over the tokens `which` [n, window]; float64 [D]."""
    total, done = torch.zeros((), dtype=torch.float64), 0
    for x in at.activations(model, windows.ids):
        total = total + x[which[done : done + len(x)]].sum(0, dtype=torch.float64)
        done += len(x)
    return total / int(which.sum())
