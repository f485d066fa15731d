"""A latent's facts as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastsae.report.facts import Effect, Facts
from fastsae.report.latents import example_list, token_name
from fastsae.report.text import activation, esc, percent

PER_PAGE = 128  # latents


def file_name(latent: int) -> str:
    """The page that shows a latent."""
    return f"latents-{latent // PER_PAGE:05}.html"


def label(found: Facts) -> str:
    """A latent in a few words: the tokens of its largest activations."""
    return " · ".join(dict.fromkeys(token_name(piece) for piece, _ in found.tokens))


def card(found: Facts) -> str:
    parts = [
        _part("Sizes where it is active, in deciles", _deciles(found.deciles)),
        _part("Promotes", _chips(_of_effects(found.promoted))),
        _part("Suppresses", _chips(_of_effects(found.suppressed))),
        _part("Nearest latents", _nearest(found.nearest)),
    ]
    if not found.count:
        about, parts = "never active", parts[1:]
    else:
        times = "once" if found.count == 1 else f"{found.count:,} times"
        about = (
            f"active on {percent(found.density)} of rows, {times}; largest "
            f"{activation(found.largest)}, mean {activation(found.mean)}"
        )
    tokens = _chips((token_name(piece), f"× {number:,}") for piece, number in found.tokens)
    contexts = example_list(found.contexts) if found.contexts else ""
    return (
        f'<article class="latent" id="{found.latent}">\n<header><h4>{found.latent}</h4>'
        f'<span>{esc(about)}</span></header>\n<div class="halves">\n<div>{tokens}{contexts}</div>\n'
        f'<div class="facts">{"".join(parts)}</div>\n</div>\n</article>\n'
    )


def _part(title: str, content: str) -> str:
    return f"<h5>{esc(title)}</h5>\n{content}" if content else ""


def _chips(pairs: Iterable[tuple[str, str]]) -> str:
    chips = [f"<span><b>{esc(name)}</b> {esc(number)}</span>" for name, number in pairs]
    return f'<p class="often">{" ".join(chips)}</p>\n' if chips else ""


def _of_effects(effects: Sequence[Effect]) -> Iterable[tuple[str, str]]:
    return ((token_name(text), activation(value)) for _, text, value in effects)


def _nearest(nearest: Sequence[tuple[int, float]]) -> str:
    links = [
        f'<span><a href="{file_name(other)}#{other}">{other}</a> {esc(activation(cosine))}</span>'
        for other, cosine in nearest
    ]
    return f'<p class="often">{" ".join(links)}</p>\n' if links else ""


def _deciles(sizes: Sequence[float]) -> str:
    largest = max(sizes, default=0) or 1.0
    bars = "".join(
        f'<span style="--share:{size / largest:.3f}">{esc(activation(size))}</span>'
        for size in sizes
    )
    return f'<p class="deciles">{bars}</p>\n'
