"""Small SVG charts for reports: lines, stacked bars, one bar of shares.

A chart is a piece of HTML (an inline `<svg>` and its legend) without scripts. Colours are CSS variables that `STYLE`
sets for light, dark and paper, so that a page follows the reader's setting. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from statistics import fmean

WIDTH, HEIGHT = 560, 290
LEFT, RIGHT, TOP, BOTTOM = 64, 26, 26, 42
MAX_POINTS = 600  # a line of a report is about this many pixels wide: more points would only make the file larger
MAX_HOVER = 500  # series of at least this many points get no hover titles
MAX_DOTS = 60  # series up to this many points show each as a dot

# Okabe and Ito's palette, told apart by colour-blind readers; lighter on dark ground. The last one is for "the rest".
STYLE = """
:root { --c0:#0072b2; --c1:#d55e00; --c2:#009e73; --c3:#cc79a7;
  --c4:#e69f00; --c5:#56b4e9; --c6:#8c6bb1; --c7:#9a9a9a; }
@media screen and (prefers-color-scheme: dark) {
  :root { --c0:#4da6e0; --c1:#f08a4b; --c2:#2fc49a; --c3:#e39cc4;
    --c4:#f0b93a; --c5:#9bd6f7; --c6:#b39ddb; --c7:#8a8a8a; }
}
.c0{--c:var(--c0)} .c1{--c:var(--c1)} .c2{--c:var(--c2)} .c3{--c:var(--c3)}
.c4{--c:var(--c4)} .c5{--c:var(--c5)} .c6{--c:var(--c6)} .c7{--c:var(--c7)}
svg { display:block; width:100%; height:auto; font:11px system-ui, sans-serif; }
svg text { fill:var(--soft); }
svg .grid { stroke:var(--rule); stroke-width:1; }
svg .reference { stroke:var(--text); stroke-width:1.2; stroke-dasharray:6 4; }
svg .strong { fill:var(--text); }
svg .line { fill:none; stroke:var(--c); stroke-width:1.7; stroke-linejoin:round; }
svg .d1 { stroke-dasharray:7 4; } svg .d2 { stroke-dasharray:2 3; } svg .d3 { stroke-dasharray:9 3 2 3; }
svg .area { fill:var(--c); }
svg .share { fill:var(--c); stroke:var(--ground); stroke-width:1.5; }
svg .dot { fill:var(--c); }
svg .spot { fill:transparent; }
svg .spot:hover { fill:var(--c); }
svg .column { fill:transparent; }
svg .column:hover { fill:var(--text); fill-opacity:.15; }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:.15rem 1rem; margin:.3rem 0 0; padding:0;
  font-size:.8rem; }
.legend i { display:inline-block; width:.8em; height:.8em; margin-right:.4em; border-radius:2px; background:var(--c);
  print-color-adjust:exact; -webkit-print-color-adjust:exact; }
.legend i:is(.d1, .d2, .d3) { width:1.7em; height:.25em; vertical-align:middle; }
.legend .d1 { background:repeating-linear-gradient(90deg, var(--c) 0 .5em, transparent .5em .7em); }
.legend .d2 { background:repeating-linear-gradient(90deg, var(--c) 0 .2em, transparent .2em .4em); }
.legend .d3 { background:repeating-linear-gradient(90deg, var(--c) 0 .5em,
  transparent .5em .7em, var(--c) .7em .9em, transparent .9em 1.1em); }
"""

Point = tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """One line of a chart: (x, y) points in the order of x, a colour 0 to 7, and a dash 0 (a whole line) to 3."""

    name: str
    points: Sequence[Point]
    colour: int
    dash: int = 0

    @property
    def style(self) -> str:
        """Its classes in the page's style."""
        return f"c{self.colour} d{self.dash}" if self.dash else f"c{self.colour}"


@dataclass(frozen=True)
class Share:
    """One part of a whole."""

    name: str
    value: float
    colour: int


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover low to high in about `count` steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high - low <= 1e-9 * abs(high):  # one value: without room around it, steps would be rounding noise
        room = 0.1 * abs(high) or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick's label with just the digits that tell it from its neighbour."""
    decimals = next((d for d in range(8) if abs(round(step, d) - step) < 1e-6 * step), 8)
    if decimals > 6 or abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.{decimals}f}"


def number(value: float) -> str:
    """A value for hover titles and captions."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}"


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: the first and the last as they are, means of equal buckets between them."""
    if len(points) <= limit:
        return list(points)
    inner, buckets = points[1:-1], limit - 2
    edges = [len(inner) * i // buckets for i in range(buckets + 1)]
    means = [tuple(fmean(column) for column in zip(*inner[a:b], strict=True)) for a, b in pairwise(edges)]
    return [points[0], *means, points[-1]]


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    reference: tuple[str, float] | None = None,
    from_zero: bool = False,
    robust: bool = False,
) -> str:
    """Lines over a common axis, x from 0.

    Args:
        reference: label and height of a dashed line across the chart.
        from_zero: the y axis starts at 0 instead of the lowest value.
        robust: a few values far above all others are drawn at the upper edge and noted: the rest stays readable.
    """
    drawn = [replace(s, points=thin([p for p in s.points if all(map(math.isfinite, p))])) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return _empty()
    heights = [y for s in drawn for _, y in s.points]
    top, note = _top(heights, robust)
    goal = [reference[1]] if reference else []
    low = 0.0 if from_zero else min([*heights, *goal])
    frame = _Frame(max(s.points[-1][0] for s in drawn), low, max([top, *goal]))
    body = "".join(_line(s, frame, x_label) for s in drawn)
    if reference:
        y = frame.y(reference[1])
        body += f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        label_y = y + 14 if y < TOP + 16 else y - 5  # below a line at the upper edge: the axis label stands there
        body += f'<text class="strong" x="{LEFT + 5}" y="{label_y:.1f}">{escape(reference[0])}</text>'
    return frame.svg(body, x_label, y_label, note) + _legend([(s.name, s.style) for s in drawn])


def stacked_bars(
    rows: Sequence[Point], layers: Sequence[tuple[str, int]], x_label: str, y_label: str, *, robust: bool = True
) -> str:
    """Bars side by side without gaps; a row (x, height of each layer) reaches from the row before it to its own x.

    Args:
        layers: name and colour of each layer, the lowest first.
        robust: as for `line_chart`.
    """
    kept = thin([row for row in rows if all(map(math.isfinite, row))])
    if not kept:
        return _empty()
    top, note = _top([sum(row[1:]) for row in kept], robust)
    frame = _Frame(kept[-1][0], 0.0, top)
    starts = [0.0, *(row[0] for row in kept[:-1])]
    body = ""
    for layer, (_, colour) in enumerate(layers):
        edges = [
            (frame.x(start), frame.x(row[0]), frame.y(sum(row[1 : layer + 1])), frame.y(sum(row[1 : layer + 2])))
            for start, row in zip(starts, kept, strict=True)
        ]
        there = "".join(f"V{upper}H{right}" for _, right, _, upper in edges)
        back = "".join(f"V{lower}H{left}" for left, _, lower, _ in reversed(edges))
        body += f'<path class="area c{colour}" d="M{edges[0][0]} {edges[0][2]}{there}{back}Z"/>'
    if len(kept) < MAX_HOVER:
        for start, row in zip(starts, kept, strict=True):
            texts = [f"{name}: {number(height)}" for (name, _), height in zip(layers, row[1:], strict=True)]
            title = escape(f"{x_label} {number(row[0])}, {y_label}\n" + "\n".join(texts))
            left = frame.x(start)
            body += (
                f'<rect class="column" x="{left}" y="{TOP}" width="{frame.x(row[0]) - left:.1f}" '
                f'height="{HEIGHT - TOP - BOTTOM}"><title>{title}</title></rect>'
            )
    return frame.svg(body, x_label, y_label, note) + _legend([(name, f"c{colour}") for name, colour in layers])


def shares_bar(shares: Sequence[Share], unit: str) -> str:
    """A whole as one horizontal bar; the legend holds values and percentages."""
    kept = [share for share in shares if math.isfinite(share.value) and share.value > 0]
    total = sum(share.value for share in kept)
    if not kept:
        return _empty()
    width, height, left, body, entries = 2 * WIDTH, 40, 0.0, "", []
    for share in kept:
        text = f"{share.name} {100 * share.value / total:.1f} % ({share.value:,.1f} {unit})"
        part = width * share.value / total
        body += (
            f'<rect class="share c{share.colour}" x="{left:.1f}" y="0" width="{part:.1f}" height="{height}">'
            f"<title>{escape(text)}</title></rect>"
        )
        left += part
        entries.append((text, f"c{share.colour}"))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="shares">{body}</svg>{_legend(entries)}'


def figure(title: str, chart: str, caption: str) -> str:
    """A chart with its title above and its caption below."""
    return f"<figure><h3>{escape(title)}</h3>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


class _Frame:
    """Axes of a chart: from values to places, and the drawing around the curves."""

    def __init__(self, right: float, low: float, high: float) -> None:
        self._right = right if right > 0 else 1.0
        self._ticks = nice_ticks(low, high)

    def x(self, value: float) -> float:
        """Where a value of the x axis lies."""
        return round(LEFT + value / self._right * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        """Where a value of the y axis lies; those above the axis lie on its upper edge."""
        low, high = self._ticks[0], self._ticks[-1]
        return round(HEIGHT - BOTTOM - (min(value, high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def svg(self, body: str, x_label: str, y_label: str, note: str) -> str:
        """The whole drawing: grid behind, curves before it."""
        subject = escape(f"{y_label} against {x_label}")
        parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{subject}">']
        step = self._ticks[1] - self._ticks[0]
        for tick in self._ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick_text(tick, step)}</text>')
        ticks = nice_ticks(0.0, self._right)
        bottom = HEIGHT - BOTTOM
        for tick in ticks:
            if tick <= self._right * (1 + 1e-9):
                x = self.x(tick)
                parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
                label = tick_text(tick, ticks[1] - ticks[0])
                parts.append(f'<text text-anchor="middle" x="{x}" y="{bottom + 16}">{label}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text text-anchor="middle" x="{middle}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
        parts.append(f'<text x="4" y="12">{escape(y_label)}</text>')
        if note:
            parts.append(f'<text text-anchor="end" x="{WIDTH - RIGHT}" y="12">{escape(note)}</text>')
        return "".join([*parts, body, "</svg>"])


def _line(series: Series, frame: _Frame, x_label: str) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    drawn = f'<path class="line {series.style}" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>'
    if len(places) >= MAX_HOVER:
        return drawn
    kind, radius = ("dot", 2.6) if len(places) <= MAX_DOTS else ("spot", 4)
    kind += f" c{series.colour}"
    for (x, y), (px, py) in zip(series.points, places, strict=True):
        title = escape(f"{series.name}: {number(y)} at {x_label} {number(x)}")
        drawn += f'<circle class="{kind}" cx="{px}" cy="{py}" r="{radius}"><title>{title}</title></circle>'
    return drawn


def _top(heights: list[float], robust: bool) -> tuple[float, str]:
    """Upper end of the y axis, and a note on the values above it."""
    highest = max(heights)
    usual = sorted(heights)[int(0.98 * (len(heights) - 1))]
    if not robust or len(heights) < 10 or highest <= 3 * usual or usual <= 0:
        return highest, ""
    limit = nice_ticks(0.0, 1.3 * usual)[-1]
    return limit, f"{sum(h > limit for h in heights)} above the axis, up to {number(highest)}"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{style}"></i>{escape(name)}</li>' for name, style in entries)
    return f'<ul class="legend">{items}</ul>'


def _empty() -> str:
    return '<p class="empty">No values were logged.</p>'
