"""``fastsae steer``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from torch import Tensor, nn

from fastsae import runs, steering
from fastsae.generation import continued, states_of_texts
from fastsae.models import CACHE, LanguageModel, load_model
from fastsae.sae import SAE
from fastsae.sites import Site, find_module

AFTER_THE_FIRST = slice(1, None)
"""The first position of a text is harvested for no causal model: an SAE does not know it."""


@dataclass(frozen=True)
class Steer:
    """Print how a language model goes on with a prompt, without and with a change by an SAE."""

    run_directory: tyro.conf.Positional[Path]
    """What train wrote; of an unfinished run the newest checkpoint is taken."""
    prompt: str
    """What is to be continued."""
    strength: float | None = None
    """What is added, in units of activation; for clamp, the value; for a concept, the λ of its
    direction, negative to remove it. ablate has none."""
    latents: tuple[int, ...] = ()
    """Latents to change."""
    change: Literal["add", "ablate", "clamp"] = "add"
    """What is done to them."""
    concept: tuple[str, ...] = ()
    """In their place: texts about a concept."""
    against: tuple[str, ...] = ()
    """Texts without it, whose direction is subtracted."""
    form: Literal["relu", "selection", "contrast"] = "relu"
    """How texts become a direction: all pre-activations through a ReLU (Concept Steerers), the
    SAE's selection, each a mean over positions; or the latents that differ most from against."""
    top: int = 16
    """How many these are."""
    model: str | None = None
    """As for harvest; None: the one that the run's activations are of."""
    layer: int | None = None
    """The block, counted from 1; None: that of the run's activations."""
    site: Site | None = None
    """Output of the block, its MLP or its attention; None: that of the run's activations."""
    tokens: int = 40
    """Tokens to write, at most."""
    temperature: float = 0.0
    """0: always the most likely token."""
    seed: int = 0
    """Of the draws at a temperature above 0."""
    cache: Path = CACHE
    """Where the dequantised weights of smollm2 are kept."""
    device: str = "cpu"
    """Where the model and the SAE run."""

    def run(self) -> None:
        self._check()
        sae = runs.sae_of(self.run_directory).to(self.device)
        name, layer, site = self._where()
        model = load_model(name, self.cache.expanduser(), self.device)
        module = find_module(model.net, site, layer)

        def written() -> str:
            options = {"temperature": self.temperature}
            return continued(model, self.prompt, self.tokens, seed=self.seed, **options)

        what, change = self._change(sae, model, module)
        print(f"{name}, {site} of layer {layer}: {what}")
        texts = {"prompt": self.prompt, "before": written()}
        with steering.steered(module, change, positions=AFTER_THE_FIRST):
            texts["after"] = written()
        for label, text in texts.items():
            print(f"{label:8}{text!r}")

    def _where(self) -> tuple[str, int, Site]:
        """Model, layer and site, those of the run's activations where an option is not given."""
        if self.model is not None and self.layer is not None and self.site is not None:
            return self.model, self.layer, self.site
        index = runs.harvest_of(self.run_directory)
        if index is None:
            raise ValueError(
                f"{self.run_directory}: expected --model, --layer and --site, or a run on a set of "
                "fastsae harvest"
            )
        layer = index["layer"] if self.layer is None else self.layer
        return self.model or index["model"], layer, self.site or index["site"]

    def _check(self) -> None:
        if bool(self.latents) == bool(self.concept):
            raise ValueError("expected either --latents or --concept")
        if self.concept and self.change != "add":
            raise ValueError(f"change: expected add for a concept, got {self.change}")
        if (self.strength is None) != (self.change == "ablate"):
            raise ValueError(f"strength: expected {_needed(self.change)}, got {self.strength}")
        if self.against and not self.concept:
            raise ValueError("against: expected --concept with it")
        if self.form == "contrast" and not self.against:
            raise ValueError("against: expected texts for --form contrast, got none")

    def _change(
        self, sae: SAE, model: LanguageModel, module: nn.Module
    ) -> tuple[str, steering.Change]:
        """What is done, in words, and the change."""
        if self.latents:
            latents, ids = list(self.latents), ", ".join(map(str, self.latents))
            if self.strength is None:
                return f"ablate {ids}", steering.ablate(sae, latents)
            make = steering.clamp if self.change == "clamp" else steering.add
            what = f"{self.change} {ids} {'to' if self.change == 'clamp' else 'by'} "
            return what + f"{self.strength:g}", make(sae, latents, self.strength)
        assert self.strength is not None
        if self.form == "contrast":
            positive, negative = (
                states_of_texts(model, module, texts) for texts in (self.concept, self.against)
            )
            latents_of, difference = steering.contrast(sae, positive, negative, self.top)
            found = ", ".join(map(str, latents_of.tolist()))
            return (
                f"latents {found} by their difference × {self.strength:g}",
                steering.add(sae, latents_of, self.strength * difference),
            )
        direction = self._direction(sae, model, module, self.concept)
        if self.against:
            direction = direction - self._direction(sae, model, module, self.against)
        what = f"concept ({self.form}) × {self.strength:g}, norm {float(direction.norm()):.4g}"
        return what, steering.toward(direction, self.strength)

    def _direction(
        self, sae: SAE, model: LanguageModel, module: nn.Module, texts: tuple[str, ...]
    ) -> Tensor:
        assert self.form != "contrast"
        return steering.concept(sae, states_of_texts(model, module, texts), self.form).mean(0)


def _needed(change: str) -> str:
    return "none for ablate" if change == "ablate" else f"a number for {change}"
