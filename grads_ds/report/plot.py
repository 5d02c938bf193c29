"""Axes and marks as inline SVG text. Pure. Colours are CSS classes, so that one drawing serves the
light and the dark scheme.

Every figure is a `<svg>` with a viewBox and no ids and no references: any number of them can stand
in one page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `end`, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value, rounded to a tenth."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return round(
            self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start), 1
        )

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the scale, some `about` of them."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
                found = [
                    s * 10.0**e
                    for e in range(first, last + 1)
                    for s in steps
                    if self.low <= s * 10.0**e <= self.high
                ]
                if len(found) >= 3:
                    return found[:: max(1, math.ceil(len(found) / (about + 3)))]
        span = (self.high - self.low) or 1.0
        raw = span / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
        first_tick = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first_tick + 1
        return [round((first_tick + i) * step, 12) for i in range(max(0, count))]


@dataclass(frozen=True)
class Frame:
    """The plotting area of a figure: its pixel box and its two scales."""

    width: int
    height: int
    x: Scale
    y: Scale

    @property
    def box(self) -> tuple[float, float, float, float]:
        """left, right, top, bottom in pixels."""
        return self.x.start, self.x.end, self.y.end, self.y.start


def frame(
    width: int,
    height: int,
    xs: tuple[float, float],
    ys: tuple[float, float],
    log_x: bool = False,
    log_y: bool = False,
    left: int = 62,
    right: int = 14,
    top: int = 14,
    bottom: int = 48,
) -> Frame:
    """A frame for values in `xs` and `ys` (low, high); an empty range is widened."""
    (x0, x1), (y0, y1) = _wide(xs, log_x), _wide(ys, log_y)
    return Frame(
        width,
        height,
        Scale(x0, x1, left, width - right, log_x),
        Scale(y0, y1, height - bottom, top, log_y),
    )


def axes(f: Frame, x_label: str, y_label: str, x_about: int = 7, y_about: int = 5) -> str:
    """Grid lines, tick labels and axis titles."""
    left, right, top, bottom = f.box
    parts = []
    for tick in f.y.ticks(y_about):
        y = f.y(tick)
        parts.append(
            f'<path class="grid" d="M{left} {y}H{right}"/>'
            + word(left - 7, y + 4, number(tick), "tick", "end")
        )
    for tick in f.x.ticks(x_about):
        x = f.x(tick)
        parts.append(
            f'<path class="axis" d="M{x} {bottom}v5"/>' + word(x, bottom + 19, number(tick), "tick")
        )
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(word((left + right) / 2, f.height - 5, x_label, "label"))
    if y_label:
        middle = (top + bottom) / 2
        parts.append(
            f'<g transform="rotate(-90 14 {middle})">' + word(14, middle, y_label, "label") + "</g>"
        )
    return "".join(parts)


def word(x: float, y: float, text: str, style: str, anchor: str = "middle") -> str:
    """A text at a pixel."""
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(f: Frame, parts: Iterable[str], what: str) -> Markup:
    """The finished drawing; `what` is read out by screen readers."""
    # big ones shrink on a phone: their letters grow there
    size = "big" if f.width > 700 else "small"
    return Markup(
        f'<svg class="{size}" viewBox="0 0 {f.width} {f.height}" role="img"'
        f' aria-label="{escape(what)}">' + "".join(parts) + "</svg>"
    )


def rectangle(
    f: Frame, x0: float, x1: float, y0: float, y1: float, style: str, tip: str = ""
) -> str:
    """A rectangle between values; nothing where it has no height or width."""
    a, b = sorted((f.x(x0), f.x(x1)))
    top, bottom = sorted((f.y(y0), f.y(y1)))
    if b <= a or bottom <= top:
        return ""
    shape = (
        f'<rect class="{style}" x="{a:g}" y="{top:g}" width="{b - a:.1f}"'
        f' height="{bottom - top:.1f}"'
    )
    return f"{shape}><title>{escape(tip)}</title></rect>" if tip else f"{shape}/>"


def line(f: Frame, xs: Iterable[float], ys: Iterable[float], style: str, tip: str = "") -> str:
    """A broken line through points; breaks where a value is not finite."""
    path, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        path.append(f"{pen}{f.x(x):g} {f.y(y):g}")
        pen = "L"
    shape = f'<path class="{style}" d="{"".join(path)}"'
    return f"{shape}><title>{escape(tip)}</title></path>" if tip else f"{shape}/>"


def dots(f: Frame, xs: Iterable[float], ys: Iterable[float], style: str, radius: float) -> str:
    """Many equal points as one path of round-capped strokes of no length: a few bytes each."""
    spots = "".join(f"M{f.x(x):g} {f.y(y):g}h0" for x, y in zip(xs, ys, strict=True))
    return (
        f'<path class="dots {style}" stroke-width="{2 * radius:g}" d="{spots}"/>' if spots else ""
    )


def cells(
    f: Frame,
    edges_x: np.ndarray,
    edges_y: np.ndarray,
    counts: np.ndarray,
    style: str,
    shades: int = 8,
) -> str:
    """A two-way histogram (counts [X, Y]) as one path for each shade; shade grows with the
    logarithm of the count.
    """
    if not counts.any():
        return ""
    level = np.ceil(np.log1p(counts) / np.log1p(counts.max()) * shades).astype(int)
    parts = []
    for shade in range(1, shades + 1):
        path = []
        for i, j in zip(*np.nonzero(level == shade), strict=True):
            x0, x1 = f.x(float(edges_x[i])), f.x(float(edges_x[i + 1]))
            y0, y1 = f.y(float(edges_y[j])), f.y(float(edges_y[j + 1]))
            path.append(f"M{x0:g} {y0:g}H{x1:g}V{y1:g}H{x0:g}z")
        if path:
            parts.append(
                f'<path class="{style}" opacity="{0.12 + 0.78 * shade / shades:.2f}"'
                f' d="{"".join(path)}"/>'
            )
    return "".join(parts)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """(style, text) pairs as a row of swatches."""
    items = "".join(
        f'<span><i class="{style}"></i>{escape(text)}</span>' for style, text in entries
    )
    return Markup(f'<div class="legend">{items}</div>')


def number(value: float) -> str:
    """A tick's text: 3 to 4 digits, a true minus sign, thousands as k and M."""
    size = abs(value)
    if size >= 1e6:
        text = f"{value / 1e6:.4g}M"
    elif size >= 1e4:
        text = f"{value / 1e3:.4g}k"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−")


def finite_range(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest finite value, (0, 1) when there is none."""
    kept = values[np.isfinite(values)]
    return (float(kept.min()), float(kept.max())) if len(kept) else (0.0, 1.0)


def _wide(pair: tuple[float, float], log: bool) -> tuple[float, float]:
    low, high = pair
    if log:
        low = max(low, 1e-30)
        return (low / 2, low * 2) if high <= low else (low, high)
    return (low - 0.5, low + 0.5) if high <= low else (low, high)
