"""The page's histograms of the latents, and some latents up close."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsae.config import SAEConfig
from fastsae.matching import cosine_histogram
from fastsae.report.charts import Bar, Scale, histogram
from fastsae.report.examples import Example
from fastsae.report.portrait import GROUPS, Latent, Portrait
from fastsae.report.text import activation, clean, cut, esc, percent, short, tick

_NAME, _PIECE = 200, 40  # characters of a source's name and of a token
_PER_DECADE = 5  # bars of the firing frequencies
_L0_LEAST, _L0_BARS = 9, 40


def latents_about(source: str, portrait: Portrait) -> str:
    rows = f"{portrait.n_rows:,} rows of {cut(Path(source).name, _NAME)}"
    if len(portrait.rows) == 2 and min(portrait.rows):
        held_out, train = portrait.rows
        rows += f": {held_out:,} held out, {train:,} of those to train on"
    return f"Measured after training, as at inference, on {rows}."


def latent_charts(config: SAEConfig, portrait: Portrait) -> list[str]:
    return [_frequencies(portrait), _l0(portrait), _cosines(config, portrait)]


def frequency_bars(portrait: Portrait) -> list[Bar]:
    """Bars over log10 of the share of rows; those that never fire stand apart on the left."""
    n, counts = portrait.n_rows, portrait.counts
    low = min(-1, -math.ceil(math.log10(n) * _PER_DECADE))  # in fifths of a decade
    fired = counts[counts > 0]
    # A count of n is the upper end of the last bar, not a bar of its own.
    places = np.clip(np.floor(np.log10(fired / n) * _PER_DECADE + 1e-9), low, -1).astype(int)
    numbers = np.bincount(places - low, minlength=-low)
    bars = []
    for i, count in enumerate(numbers.tolist()):
        left, right = (low + i) / _PER_DECADE, (low + i + 1) / _PER_DECADE
        span = f"{percent(10**left)} to {percent(10**right)} of tokens"
        bars.append(Bar(left, right, count, f"{_latents(count)} on {span}"))
    silent = int((counts == 0).sum())
    if silent:
        left = (low - 2) / _PER_DECADE
        text = f"{_latents(silent)} never"
        bars.insert(0, Bar(left, left + 1 / _PER_DECADE, silent, text, rest=True))
    return bars


def _frequencies(portrait: Portrait) -> str:
    n, counts = portrait.n_rows, portrait.counts
    bars = frequency_bars(portrait)
    decades = range(math.ceil(-math.log10(n)), 1)
    ticks = [(float(d), f"10{str(d).translate(_SUPERSCRIPT)}" if d else "1") for d in decades]
    if bars and bars[0].rest:
        ticks = [
            ((bars[0].low + bars[0].high) / 2, "never"),
            *(t for t in ticks if t[0] > bars[1].low + 0.2),
        ]
    silent, often = int((counts == 0).sum()), int((counts > n / 10).sum())
    return histogram(
        "Firing frequency",
        bars,
        f"The median latent fires on {percent(float(np.median(counts)) / n)} of the tokens; "
        f"{silent:,} never fire, {often:,} on more than one in ten.",
        unit="latents",
        x_title="share of tokens a latent fires on (log10 scale)",
        ticks=ticks,
        marker=("mean", math.log10(float(counts.mean()) / n)) if counts.any() else None,
    )


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def l0_bars(portrait: Portrait) -> list[Bar]:
    """Bars over the number of latents a token; each holds as many numbers as the others."""
    low, high = int(portrait.l0.min()), int(portrait.l0.max())
    while high - low + 1 < _L0_LEAST:  # so that a fixed k is a bar and not a wall
        low, high = max(0, low - 1), high + 1
    width = math.ceil((high - low + 1) / _L0_BARS)
    numbers = np.bincount((portrait.l0 - low) // width, minlength=(high - low) // width + 1)
    bars = []
    for i, count in enumerate(numbers.tolist()):
        left = low + i * width
        span = short(left) if width == 1 else f"{left:,} to {left + width - 1:,}"
        bars.append(Bar(left, left + width, count, f"{count:,} tokens with {span}"))
    return bars


def _l0(portrait: Portrait) -> str:
    bars = l0_bars(portrait)
    low, median, high = np.percentile(portrait.l0, [5, 50, 95], method="nearest")
    if portrait.l0.min() == portrait.l0.max():
        caption = f"Every token has {portrait.l0[0]:,} active latents."
    elif low == high:
        caption = f"At least nine of ten tokens have exactly {median:,} active latents."
    else:
        caption = (
            f"The middle token has {median:,} active latents; nine of ten have {low:,} to {high:,}."
        )
    width = bars[0].high - bars[0].low
    scale = Scale(bars[0].low, bars[-1].high)
    return histogram(
        "L0",
        bars,
        caption,
        unit="tokens",
        x_title="active latents",
        ticks=[
            (t + min(width, 1) / 2, short(t))
            for t in scale.ticks(5)
            if t == int(t) and t < scale.high
        ],
    )


def cosine_bars(counts: Sequence[int]) -> list[Bar]:
    """Bars of a `cosine_histogram` from the first that holds a latent, 0 or below, to 1."""
    first = next((i for i, count in enumerate(counts) if count or i == 20), 20) - 20
    return [
        Bar(i / 20, (i + 1) / 20, count, f"{_latents(count)} at {i / 20:.2f} to {(i + 1) / 20:.2f}")
        for i, count in enumerate(counts[20 + first :], start=first)
    ]


def _cosines(config: SAEConfig, portrait: Portrait) -> str:
    n = len(portrait.cosines)
    if not n:
        return ""
    bars = cosine_bars(cosine_histogram(portrait.cosines))
    close = int((portrait.cosines > 0.9).sum())
    of = f"all {n:,}" if n == config.d_sae else f"{n:,} random"
    return histogram(
        "Nearest decoder neighbour",
        bars,
        f"For {of} latents, the cosine of their decoder row with the nearest of the other "
        f"{config.d_sae - 1:,}. Median {np.median(portrait.cosines):.2f}; {close:,} lie above 0.9, "
        "where two latents share one direction.",
        unit="latents",
        x_title="cosine",
        ticks=[(t, tick(t)) for t in Scale(bars[0].low, 1.0).ticks(5)],
    )


def _latents(count: int) -> str:
    return f"{count:,} latent" + ("" if count == 1 else "s")


# ---- latents up close ----


def examples_about(portrait: Portrait) -> str:
    if not portrait.latents:
        return ""
    if portrait.text == "none":
        return (
            "For some latents, the rows with the largest activations. The data carry no tokens, so "
            "rows are numbers: of the held-out rows or, after those, of the training rows."
        )
    about = (
        "For some latents, the tokens with the largest activations, in their text: the stronger "
        "the mark, the nearer to the latent's largest. Above them stand the tokens that it fires "
        "on most often, with their share. Read down the marks: a good latent has one theme."
    )
    if portrait.text == "ids":
        about += " The data have no vocabulary, so tokens are shown as ids."
    return about


def latent_cards(portrait: Portrait) -> str:
    if not portrait.latents:
        return '<p class="about">No latent fires on these rows.</p>\n'
    groups = []
    for group, _ in GROUPS:
        cards = [_card(latent, portrait) for latent in portrait.latents if latent.group == group]
        if cards:
            title = f'<h3 class="group">{esc(group.capitalize())}</h3>\n'
            groups.append(f'{title}<div class="latents">\n{"".join(cards)}</div>\n')
    return "".join(groups)


def _card(latent: Latent, portrait: Portrait) -> str:
    share = percent(latent.count / portrait.n_rows)
    times = "once" if latent.count == 1 else f"{latent.count:,} times"
    often = ""
    if latent.tokens and latent.count > 1:
        tokens = " ".join(
            f"<span><b>{esc(token_name(piece))}</b> {part:.0%}</span>"
            for piece, part in latent.tokens
        )
        often = f'<p class="often">{tokens}</p>\n'
    return (
        f'<article class="latent">\n<header><h4>{latent.latent}</h4>'
        f"<span>fires on {share} of tokens, {times}</span></header>\n{often}"
        f"{example_list(latent.examples)}</article>\n"
    )


def example_list(examples: Sequence[Example]) -> str:
    """The rows as a list; a mark is as strong as its activation beside the largest."""
    largest = max((abs(example.value) for example in examples), default=1.0)
    lines = (_line(example, largest) for example in examples)
    return f"<ol>\n{''.join(lines)}</ol>\n"


def _line(example: Example, largest: float) -> str:
    value = f'<span class="act">{esc(activation(example.value))}</span>'
    if example.token is None:
        return f'<li class="row"><span>row {example.row:,}</span>{value}</li>\n'
    heat = {at: abs(size) / largest for at, size in example.active}
    first = -len(example.before)
    before = [_text(piece, heat.get(at, 0)) for at, piece in enumerate(example.before, first)]
    after = [_text(piece, heat.get(at, 0)) for at, piece in enumerate(example.after, 1)]
    space = " " if example.token.startswith(" ") and before else ""
    mark = _marked(token_name(example.token), abs(example.value) / largest)
    return (
        f'<li><span class="text"><span class="before"><span>{"".join(before).lstrip()}{space}'
        f'</span></span>{mark}<span class="after"><span>{"".join(after)}</span></span></span>'
        f"{value}</li>\n"
    )


def _text(piece: str, heat: float) -> str:
    if heat:
        return (" " if piece.startswith(" ") else "") + _marked(token_name(piece), heat)
    return esc(cut(piece.replace("\n", "↵"), _PIECE))


def _marked(text: str, heat: float) -> str:
    return f'<mark style="--heat:{heat:.2f}">{esc(text)}</mark>'


def token_name(piece: str) -> str:
    """A token that stands alone: without the space that says that it begins a word."""
    return clean(cut(piece.strip(" ").replace("\n", "↵"), _PIECE)) or "␣"
