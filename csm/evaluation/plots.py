"""Charts as inline SVG: lines and grouped bars. Colours are the page's CSS variables, so they follow light and dark.

Drawn on a canvas of 440 x 250 units and scaled by the page; every mark carries a `<title>`, which browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 12, 38
_PLOT_WIDTH, _PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


@dataclass(frozen=True)
class Series:
    """A named line, or the bars of one colour.

    Attributes:
        color: a CSS colour, usually `var(--...)`.
        points: (x, y) of a line; of bars, x is the category's index.
    """

    name: str
    color: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Lines over a common x axis; the y axis starts near the smallest value."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    x_ticks = nice_ticks(min(xs), max(xs), 5)
    y_ticks = nice_ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - x_low) / (x_high - x_low) * _PLOT_WIDTH, TOP + (y_high - y) / (y_high - y_low) * _PLOT_HEIGHT

    parts = _y_axis(y_ticks, lambda y: at(x_low, y)[1])
    for tick in (tick for tick in x_ticks if x_low <= tick <= x_high):
        x = at(tick, y_low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{_number(tick)}</text>')
    for line in series:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        dash = ' stroke-dasharray="5 4"' if line.is_dashed else ""
        parts.append(
            f'<polyline fill="none" stroke="{line.color}" stroke-width="2" stroke-linejoin="round"{dash} points="{path}">'
            f"<title>{escape(line.name)}: {line.points[-1][1]:.3f} at {_number(line.points[-1][0])}</title></polyline>"
        )
        if line.is_dashed:  # a line measured rarely: show where
            for point in line.points:
                x, y = at(*point)
                title = f"{escape(line.name)}: {point[1]:.3f} at {_number(point[0])}"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.color}"><title>{title}</title></circle>')
    return _svg(parts, x_label, y_label)


def bar_chart(
    categories: Sequence[str], series: Sequence[Series], *, x_label: str, y_label: str, percent: bool = False, show_values: bool = False
) -> str:
    """Bars of each series side by side in each category, from zero.

    Args:
        percent: write values as percentages.
        show_values: write each bar's value above it; for few bars.
    """
    top = max((y for group in series for _, y in group.points), default=0.0)
    y_ticks = nice_ticks(0.0, top if top > 0 else (0.01 if percent else 1.0), 4)
    y_high = max(y_ticks[-1], top)
    slot = _PLOT_WIDTH / len(categories)
    width = min(26.0, slot * 0.8 / len(series))

    def height(y: float) -> float:
        return y / y_high * _PLOT_HEIGHT

    def shown(y: float) -> str:
        return f"{100 * y:.1f}%" if percent else f"{y:.2f}"

    base = TOP + _PLOT_HEIGHT
    parts = _y_axis(y_ticks, lambda y: base - height(y), percent=percent)
    for index, category in enumerate(categories):
        x = LEFT + slot * (index + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{escape(category)}</text>')
    for group_index, group in enumerate(series):
        for category_index, y in group.points:
            x = LEFT + slot * (category_index + 0.5) + (group_index - len(series) / 2) * width
            tall = max(height(y), 1.5)  # a bar of zero is still seen
            title = f"{escape(group.name)}, {escape(categories[int(category_index)])}: {shown(y)}"
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{base - tall:.1f}" width="{width - 2:.1f}" height="{tall:.1f}" rx="2" fill="{group.color}">'
                f"<title>{title}</title></rect>"
            )
            if show_values:
                parts.append(f'<text x="{x + width / 2:.1f}" y="{base - tall - 4:.1f}" text-anchor="middle">{shown(y)}</text>')
    return _svg(parts, x_label, y_label)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that span [low, high]."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
    rough = span / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(magnitude * nice for nice in (1, 2, 2.5, 5, 10) if magnitude * nice >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, max(last, first + 1) + 1)]


def _y_axis(ticks: Sequence[float], at: Callable[[float], float], *, percent: bool = False) -> list[str]:
    parts = []
    for tick in ticks:
        y = at(tick)
        label = f"{100 * tick:g}%" if percent else _number(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    return parts


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 10_000 else f"{value / 1000:g}k"


def _svg(parts: Sequence[str], x_label: str, y_label: str) -> str:
    middle_x, middle_y = LEFT + _PLOT_WIDTH // 2, TOP + _PLOT_HEIGHT // 2
    labels = (
        f'<text x="{middle_x}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(11 {middle_y}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    title = f"{escape(y_label)} by {escape(x_label)}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}{labels}</svg>'
