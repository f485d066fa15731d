"""Charts as HTML around an SVG: curves over steps, and bars of counts.

The SVG holds shapes only, in a square of UNITS that the page stretches to its width; lines keep
their thickness. All words and numbers are HTML at positions in percent, so they keep their size on
every screen. `data-x` and `data-t` of a plot are what the page's script reads out at a place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastsae.report.text import esc, short, tick

UNITS = 1000
_NOTHING = 1e-300  # a shorter axis has no ticks
MAX_POINTS = 240  # of a curve: more are drawn as means of neighbours, with their range


@dataclass(frozen=True)
class Scale:
    """Where values lie between the ends of an axis: `at` gives 0 to 1."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return 0.5 if high == low else min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, about: int = 4) -> list[float]:
        """Round values on the axis, about as many as asked for."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                found = [f * 10.0**d for d in decades for f in factors]
                found = [v for v in found if self.low <= v * (1 + 1e-9) and v <= self.high * 1.001]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / (about + 2))]
            return found or [self.low]
        if self.high - self.low < _NOTHING:
            return [self.low]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.75)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


@dataclass(frozen=True)
class Curve:
    """Values over steps; dots for measurements far apart, a line for the rest."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """A count on [low, high) of the axis, and what the reader is told there."""

    low: float
    high: float
    count: int
    text: str
    rest: bool = False
    """Whether it is a class of its own, apart from the axis, in another colour."""


@dataclass
class _Plot:
    """The pieces of a frame before they are put together; x and y in shares of it."""

    shapes: list[str] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    x_read: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def curves(
    title: str,
    lines: Sequence[Curve],
    caption: str,
    *,
    unit: str,
    level: tuple[str, float] | None = None,
    log: bool = False,
    from_zero: bool = False,
    top: float = 0.0,
    form: Callable[[float], str] = short,
    tick_form: Callable[[float], str] = tick,
) -> str:
    """A chart of curves over steps; level is a named horizontal line to compare with.

    The axis begins at 0 where it is to, and reaches at least to `top` where that is above 0.
    Non-positive values are left out of a logarithmic chart. "" where there is nothing to draw.
    """
    lines = [_positive(line) if log else line for line in lines]
    lines = [line for line in lines if len(line.steps)]
    if not lines:
        return ""
    values = [v for line in lines for v in line.values] + ([level[1]] if level else [])
    low, high = min(values), max(values)
    if not log:
        low, high = (min(low, 0.0) if from_zero else low), max(high, top or high)
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        low, high = (low if from_zero and low >= 0 else low - margin), high + margin
    y = Scale(low, high, log)
    x = Scale(0, max(max(line.steps) for line in lines))
    plot = _Plot(x_ticks=[(x.at(t), tick(t)) for t in x.ticks()])
    plot.y_ticks = [(y.at(t), tick_form(t)) for t in y.ticks()]
    legend = []
    if level is not None:
        plot.shapes.append(_path("level", [(0.0, y.at(level[1])), (1.0, y.at(level[1]))]))
        legend.append(f'<span class="key level">{esc(level[0])} {esc(form(level[1]))}</span>')
    for i, line in enumerate(lines):
        points = _thinned(line)
        means = [(x.at(step), y.at(mean)) for step, mean, _, _ in points]
        kind = f"c{i}"
        if any(top > bottom for _, _, bottom, top in points):
            upper = [(x.at(step), y.at(top)) for step, _, _, top in points]
            lower = [(x.at(step), y.at(bottom)) for step, _, bottom, _ in reversed(points)]
            plot.shapes.append(_path(f"band {kind}", [*upper, *lower]))
        if line.dots or len(means) == 1:
            dots = "".join(f"M{_at(px)} {_at(1 - py)}h0" for px, py in means)
            plot.shapes.append(f'<path class="dots {kind}" d="{dots}"/>')
        else:
            plot.shapes.append(_path(f"line {kind}", means))
        if len(lines) > 1 or level is not None:
            legend.append(f'<span class="key {kind}">{esc(line.name)}</span>')
        told = (
            (f"{line.name} {form(mean)} · step {short(step)}", step) for step, mean, *_ in points
        )
        for text, step in told:
            plot.texts.append(text)
            plot.x_read.append(x.at(step))
    return _figure(title, plot, caption, unit=unit, x_title="step", legend="".join(legend))


def histogram(
    title: str,
    counts: Sequence[Bar],
    caption: str,
    *,
    unit: str,
    x_title: str,
    ticks: Sequence[tuple[float, str]],
    marker: tuple[str, float] | None = None,
) -> str:
    """A histogram; marker is a named place on the axis. "" without counts."""
    if not counts:
        return ""
    x = Scale(min(bar.low for bar in counts), max(bar.high for bar in counts))
    y = Scale(0, max(1, max(bar.count for bar in counts)) * 1.06)
    plot = _Plot(x_ticks=[(x.at(value), label) for value, label in ticks])
    plot.y_ticks = [(y.at(t), tick(t)) for t in y.ticks() if t == int(t)]
    for bar in counts:
        left, right = x.at(bar.low), x.at(bar.high)
        gap = min(0.003, 0.1 * (right - left))
        if bar.count:  # a single one stays visible beside thousands
            height = max(y.at(bar.count), 0.006)
            plot.shapes.append(
                f'<rect class="{"rest" if bar.rest else "bar"}" x="{_at(left + gap)}" '
                f'y="{_at(1 - height)}" width="{_at(right - left - 2 * gap)}" '
                f'height="{_at(height)}"/>'
            )
        plot.x_read.append((left + right) / 2)
        plot.texts.append(bar.text)
    legend = ""
    if marker is not None:
        place = x.at(marker[1])
        plot.shapes.append(_path("level", [(place, 0.0), (place, 1.0)]))
        legend = f'<span class="key level">{esc(marker[0])}</span>'
    return _figure(title, plot, caption, unit=unit, x_title=x_title, legend=legend)


def _positive(line: Curve) -> Curve:
    kept = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if v > 0]
    return Curve(line.name, [s for s, _ in kept], [v for _, v in kept], line.dots)


def _thinned(line: Curve) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, largest) of at most MAX_POINTS groups of neighbouring points."""
    n = len(line.steps)
    size = math.ceil(n / MAX_POINTS)
    points = []
    for first in range(0, n, size):
        values = line.values[first : first + size]
        last = min(first + size, n) - 1
        points.append((line.steps[last], sum(values) / len(values), min(values), max(values)))
    return points


def _at(share: float) -> str:
    return f"{share * UNITS:.1f}".removesuffix(".0")


def _path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    places = "L".join(f"{_at(px)} {_at(1 - py)}" for px, py in points)
    return f'<path class="{kind}" d="M{places}"/>'


def _figure(title: str, plot: _Plot, caption: str, *, unit: str, x_title: str, legend: str) -> str:
    order = sorted(range(len(plot.x_read)), key=lambda i: plot.x_read[i])
    places = json.dumps([round(100 * plot.x_read[i], 2) for i in order])
    texts = json.dumps([plot.texts[i] for i in order], ensure_ascii=False)
    grid = "".join(_path("grid", [(0, py), (1, py)]) for py, _ in plot.y_ticks)
    y_labels = "".join(
        f'<span style="bottom:{100 * py:.2f}%">{esc(label)}</span>' for py, label in plot.y_ticks
    )
    x_labels = "".join(
        f'<span class="{_edge(px)}" style="left:{100 * px:.2f}%">{esc(label)}</span>'
        for px, label in plot.x_ticks
    )
    width = max((len(label) for _, label in plot.y_ticks), default=1)
    return f"""<figure class="chart">
<h3>{esc(title)}</h3>
<div class="head"><span class="unit">{esc(unit)}</span><span class="legend">{legend}</span></div>
<div class="frame" style="--digits:{width}">
<div class="y">{y_labels}</div>
<div class="plot" tabindex="0" data-x="{places}" data-t="{esc(texts)}">
<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" role="img" aria-label="{esc(title)}">
{grid}{"".join(plot.shapes)}</svg><i class="cursor"></i><output></output></div>
<div class="x">{x_labels}</div>
<div class="x-title">{esc(x_title)}</div>
</div>
<figcaption>{esc(caption)}</figcaption>
</figure>
"""


def _edge(place: float) -> str:
    """Labels at an end of the axis grow inwards, so that none leaves the page."""
    return "first" if place < 0.04 else "last" if place > 0.96 else "mid"
