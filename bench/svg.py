"""Figures as SVG files by hand: bars, and curves over a logarithmic x. Ticks are the report's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastsae.report.charts import Scale
from fastsae.report.text import esc, tick

COLOURS = ("#0f6fbf", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#0e7490", "#be185d")
INK, GREY = "#1f2937", "#9ca3af"
WIDTH = 760
ROW = 20  # of a bar


class Bar(NamedTuple):
    label: str
    value: float
    text: str
    """What stands behind the bar."""
    colour: str = COLOURS[0]


def bars(title: str, groups: Mapping[str, Sequence[Bar]], x_title: str) -> str:
    """Horizontal bars from 0 in named groups, one scale for all."""
    left, right, y = 240, 150, 44
    scale = Scale(0, max(bar.value for group in groups.values() for bar in group))
    span = WIDTH - left - right
    shapes = []
    for name, group in groups.items():
        shapes.append(_text(12, y + 4, name, weight="bold"))
        y += ROW
        for bar in group:
            width = max(span * scale.at(bar.value), 1)
            shapes += [
                _text(left - 8, y + 4, bar.label, anchor="end"),
                f'<rect x="{left}" y="{y - 7}" width="{width:.1f}" height="14" '
                f'fill="{bar.colour}"/>',
                _text(left + width + 6, y + 4, bar.text),
            ]
            y += ROW
        y += 8
    shapes.append(_text(left, y + 6, x_title, fill=GREY))
    return _file(title, y + 20, shapes)


def curves(
    title: str, lines: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str
) -> str:
    """Curves over a logarithmic x, with y from 0; their names stand at their ends."""
    left, right, top, height = 60, 190, 60, 360
    points = [point for line in lines.values() for point in line]
    x = Scale(min(p[0] for p in points), max(p[0] for p in points), log=True)
    y = Scale(0, max(p[1] for p in points))
    span, bottom = WIDTH - left - right, top + height

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return left + span * x.at(point[0]), bottom - height * y.at(point[1])

    shapes = [_text(left, top - 14, y_title, fill=GREY)]
    for value in x.ticks(8):
        place = at((value, y.low))[0]
        shapes += [
            _line((place, top), (place, bottom)),
            _text(place, bottom + 18, tick(value), anchor="middle"),
        ]
    for value in y.ticks(6):
        place = at((x.low, value))[1]
        shapes += [
            _line((left, place), (left + span, place)),
            _text(left - 8, place + 4, tick(value), anchor="end"),
        ]
    ends = sorted((at(line[-1])[1], i) for i, line in enumerate(lines.values()))
    places, last = {}, 0.0
    for end, i in ends:  # names below each other where curves end together
        last = places[i] = max(end, last + 16)
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in map(at, line))
        shapes.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes.append(_text(at(line[-1])[0] + 8, places[i] + 4, name, fill=colour))
    shapes.append(_text(left + span / 2, bottom + 38, x_title, anchor="middle", fill=GREY))
    return _file(title, bottom + 52, shapes)


def _text(
    x: float, y: float, text: str, anchor: str = "start", fill: str = INK, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}">{esc(text)}</text>'
    )


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    return f'<path d="M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}" stroke="#e5e7eb"/>'


def _file(title: str, height: float, shapes: Sequence[str]) -> str:
    body = "\n".join(shapes)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" \
font-family="system-ui, sans-serif" font-size="13" role="img" aria-label="{esc(title)}">
<rect width="100%" height="100%" fill="#ffffff"/>
{_text(12, 22, title, weight="bold")}
{body}
</svg>
"""
