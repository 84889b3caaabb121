"""Small drawings as SVG, without a plotting library: matrices, curves, bars, meshes.

A drawing is a `Panel`, so that a page can lay panels beside each other, or below on a phone. Ink is
`currentColor`: the same drawing does on light and on dark paper.
"""

import base64
import html
import itertools
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 320, 260
"""Size of a panel, in units of its view box."""

LEFT, RIGHT, TOP, BOTTOM = 60, 10, 26, 40
"""Margins of the axes."""

COLORS = ("#2f8fd0", "#e08a00", "#1aa67d", "#d9603b", "#b56fc0", "#8a8f98", "#c2a500")
"""Of lines and bars; each is readable on white and on black."""

FAINT_LINE = 'fill="none" stroke="currentColor" stroke-opacity=".4"'
DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))
SEQUENTIAL = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Panel:
    """A drawing.

    Attributes:
        body: SVG elements.
        alt: What it shows, in words.
        width: Of its view box.
        height: Of its view box.
    """

    body: str
    alt: str
    width: int = WIDTH
    height: int = HEIGHT

    def svg(self) -> str:
        """The panel as an element of a page."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html.escape(self.alt)}">{self.body}</svg>'
        )


def svg_file(panels: Sequence[Panel]) -> str:
    """All panels in a row, as a file of its own, black on white."""
    width, height = sum(p.width for p in panels), max(p.height for p in panels)
    parts, x = [], 0
    for panel in panels:
        parts.append(f'<g transform="translate({x} 0)">{panel.body}</g>')
        x += panel.width
    alt = html.escape("; ".join(panel.alt for panel in panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" color="#1b1f24"><title>{alt}</title>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def matrix(
    values: Any, title: str, *, signed: bool = True, note: str = "", limit: float | None = None
) -> Panel:
    """A matrix as an image: blue is negative, red positive; with `signed=False` dark is small.

    Args:
        values: Rows and columns.
        title: Above it.
        signed: Whether zero is the middle of the colours.
        note: Below it.
        limit: The largest magnitude of the colours, from 0; by default that of the matrix.
    """
    M = np.asarray(getattr(values, "numpy", lambda: values)(), dtype=float)
    side = HEIGHT - TOP - BOTTOM
    width = side * min(1.4, max(0.5, M.shape[1] / M.shape[0]))
    x = (WIDTH - width) / 2
    image = base64.b64encode(_png(_places(M, signed, limit), _palette(signed))).decode()
    body = (
        _text(WIDTH / 2, 17, title, "middle")
        + f'<image x="{x:.0f}" y="{TOP}" width="{width:.0f}" height="{side}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{image}"/>'
        + f'<rect x="{x:.0f}" y="{TOP}" width="{width:.0f}" height="{side}" fill="none" '
        'stroke="currentColor" stroke-opacity=".3"/>'
        + _text(WIDTH / 2, HEIGHT - BOTTOM + 20, note, "middle", faint=True)
    )
    return Panel(body, f"{title}. {note}".strip(". "))


def _places(M: NDArray[Any], signed: bool, limit: float | None) -> NDArray[np.uint8]:
    """The place of each entry among 256 colours."""
    M = np.nan_to_num(M)
    if signed:
        scale = limit or float(np.abs(M).max()) or 1.0
        place = np.clip(M / scale, -1, 1) / 2 + 0.5
    else:
        low, high = 0.0 if limit else float(M.min()), limit or float(M.max())
        place = np.clip((M - low) / ((high - low) or 1.0), 0, 1)
    return np.round(254 * place).astype(np.uint8)  # 127 is the middle


def _palette(signed: bool) -> NDArray[np.uint8]:
    """Red, green and blue of each colour."""
    anchors = np.array(DIVERGING if signed else SEQUENTIAL, dtype=float)
    at, places = np.linspace(0, 254, len(anchors)), np.arange(255)
    return np.stack([np.interp(places, at, anchors[:, c]) for c in range(3)], -1).astype(np.uint8)


def _png(places: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """A PNG file of indexed colours (RFC 2083)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        """Length, kind, data, check sum."""
        total = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + total

    rows, columns = places.shape
    raw = b"".join(b"\0" + row.tobytes() for row in places)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"PLTE", palette.tobytes())
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )


def curves(
    lines: Mapping[str, tuple[Any, Any]],
    title: str,
    *,
    x: str = "",
    y: str = "",
    log: str = "",
    mark: tuple[float, float] | None = None,
    dots: bool = False,
) -> Panel:
    """Lines over common axes.

    Args:
        lines: Name, and the two sequences of numbers; `""` has no entry in the legend.
        title: Above them.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        log: `"x"`, `"y"` or `"xy"`: logarithmic axes. What is not positive is left out there.
        mark: A point to look at.
        dots: Points without lines between them.
    """
    kept = {name: _kept(*line, log) for name, line in lines.items()}
    points = list(itertools.chain.from_iterable(kept.values()))
    axes = Axes(points + ([mark] if mark else []), log)
    body = [axes.frame(title, x, y)]
    draw = _dots if dots else _line
    for line, color in zip(kept.values(), COLORS * 3, strict=False):
        body.append(draw(axes, line, color))
    if mark:
        u, v = axes.place(mark)
        body.append(f'<circle cx="{u:.1f}" cy="{v:.1f}" r="5" fill="{COLORS[3]}"/>')
    along = (_along([axes.place(p) for p in line]) for line in kept.values())
    body.append(_legend(list(kept), list(itertools.chain.from_iterable(along))))
    shown = ", ".join(filter(None, kept))
    return Panel("".join(body), f"{title}: {y} against {x}. {shown}".strip(". "))


def bars(values: Mapping[str, float], title: str, *, y: str = "", spec: str = ".3g") -> Panel:
    """One horizontal bar for each name, with its number."""
    top = max(*values.values(), 1e-300)
    step = (HEIGHT - TOP - 8) / len(values)
    room = min(150, 12 + 7 * max(map(len, values)))
    body = [_text(WIDTH / 2, 17, title, "middle")]
    for i, (name, value) in enumerate(values.items()):
        v = TOP + i * step
        length = max(1.0, (WIDTH - room - 58) * max(value, 0) / top)
        body.append(
            f'<rect x="{room:.0f}" y="{v + step * 0.15:.1f}" width="{length:.1f}" '
            f'height="{step * 0.7:.1f}" fill="{COLORS[0]}"/>'
            + _text(room - 6, v + step / 2 + 4, name, "end")
            + _text(room + length + 5, v + step / 2 + 4, format(value, spec), "start")
        )
    said = ", ".join(f"{name} {format(value, spec)}" for name, value in values.items())
    return Panel("".join(body), f"{title}. {y} {said}")


def mesh(vertices: Any, cells: Any, values: Any, title: str, note: str = "") -> Panel:
    """Triangles, coloured by the mean of their corners."""
    P = np.asarray(vertices, dtype=float)
    T, u = np.asarray(cells), np.asarray(values, dtype=float)
    side = HEIGHT - TOP - BOTTOM
    P = (P - P.min(0)) / (P.max(0) - P.min(0)).max()
    xy = np.stack([(WIDTH - side) / 2 + side * P[:, 0], TOP + side * (1 - P[:, 1])], 1)
    tones = _palette(True)[_places(u[T].mean(1), True, float(np.abs(u).max()))]
    body = [_text(WIDTH / 2, 17, title, "middle")]
    for cell, (r, g, b) in zip(T, tones, strict=True):
        points = " ".join(f"{a:.1f},{c:.1f}" for a, c in xy[cell])
        tone = f"#{r:02x}{g:02x}{b:02x}"
        body.append(f'<polygon points="{points}" fill="{tone}" stroke="{tone}" stroke-width=".4"/>')
    body.append(_text(WIDTH / 2, HEIGHT - BOTTOM + 20, note, "middle", faint=True))
    return Panel("".join(body), f"{title}. {note}".strip(". "))


class Axes:
    """Linear or logarithmic axes around points.

    Args:
        points: All that is to be seen.
        log: Which axes are logarithmic.
    """

    def __init__(self, points: Sequence[tuple[float, float]], log: str) -> None:
        self.log = log
        self.low, self.high = [], []
        for i, name in enumerate("xy"):
            values = [self._scaled(p[i], name) for p in points] or [0.0, 1.0]
            low, high = min(values), max(values)
            pad = 0.04 * (high - low) or 0.5
            self.low.append(low - pad)
            self.high.append(high + pad)

    def _scaled(self, value: float, name: str) -> float:
        """A coordinate, or its logarithm."""
        return math.log10(value) if name in self.log else float(value)

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where a point is drawn."""
        shares = [
            (self._scaled(point[i], n) - self.low[i]) / (self.high[i] - self.low[i])
            for i, n in enumerate("xy")
        ]
        return (
            LEFT + shares[0] * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - shares[1] * (HEIGHT - TOP - BOTTOM),
        )

    def frame(self, title: str, x: str, y: str) -> str:
        """Title, box, ticks and names."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [
            _text((LEFT + right) / 2, 17, title, "middle"),
            f'<path d="M{LEFT} {TOP}V{bottom}H{right}V{TOP}Z" {FAINT_LINE}/>',
            _text((LEFT + right) / 2, HEIGHT - 6, x, "middle", faint=True),
            f'<g transform="translate(11 {(TOP + bottom) / 2:.0f}) rotate(-90)">'
            + _text(0, 0, y, "middle", faint=True)
            + "</g>",
        ]
        for value in self._ticks(0):
            u, _ = self.place((value, 10 ** self.low[1] if "y" in self.log else self.low[1]))
            parts.append(_text(u, bottom + 15, _tick(value), "middle", faint=True))
        for value in self._ticks(1):
            _, v = self.place((10 ** self.low[0] if "x" in self.log else self.low[0], value))
            parts.append(
                _text(LEFT - 5, v + 4, _tick(value), "end", faint=True)
                + f'<path d="M{LEFT} {v:.1f}H{right}" stroke="currentColor" stroke-opacity=".12"/>'
            )
        return "".join(parts)

    def _ticks(self, i: int) -> list[float]:
        """About four round numbers."""
        low, high = self.low[i], self.high[i]
        if "xy"[i] in self.log:
            return _decades(low, high)
        raw = (high - low) / 4
        unit = 10 ** math.floor(math.log10(raw))
        step = next(f * unit for f in (1, 2, 5, 10) if f * unit >= raw)
        first = math.ceil(low / step)
        return [k * step for k in range(first, math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, not more than about five; within one decade 1, 2 and 5 times these."""
    every = max(1, math.ceil((high - low) / 5))
    whole = range(every * math.ceil(low / every), math.floor(high) + 1, every)
    if len(whole) > 1:
        return [10.0**k for k in whole]
    near = range(math.floor(low), math.ceil(high) + 1)
    fine = [f * 10.0**k for k in near for f in (1, 2, 5)]
    return [v for v in fine if low <= math.log10(v) <= high]


def _tick(value: float) -> str:
    """A number on an axis."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def _kept(xs: Any, ys: Any, log: str) -> list[tuple[float, float]]:
    """The points that the axes can show."""
    points = [(float(a), float(b)) for a, b in zip(xs, ys, strict=True)]
    good = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    return [p for p in good if all(p["xy".index(n)] > 0 for n in log)]


def _line(axes: Axes, points: Sequence[tuple[float, float]], color: str) -> str:
    """A line through points, and the points if they are few."""
    at = [axes.place(p) for p in points]
    path = " ".join(f"{u:.1f},{v:.1f}" for u, v in at)
    line = f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
    return line + (_dots(axes, points, color) if len(points) <= 12 else "")


def _dots(axes: Axes, points: Sequence[tuple[float, float]], color: str) -> str:
    """Points."""
    places = [axes.place(p) for p in points]
    radius = 3 if len(places) <= 200 else 1.4
    return "".join(
        f'<circle cx="{u:.1f}" cy="{v:.1f}" r="{radius}" fill="{color}"/>' for u, v in places
    )


def _along(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of a line, and ten between each two."""
    if not line:
        return []
    t = np.linspace(0, len(line) - 1, 10 * (len(line) - 1) + 1)
    u, v = (np.interp(t, range(len(line)), axis) for axis in zip(*line, strict=True))
    return list(zip(u.tolist(), v.tolist(), strict=True))


def _legend(names: Sequence[str], points: Sequence[tuple[float, float]]) -> str:
    """Names beside their colours, in the corner that has the fewest points."""
    shown = [(name, color) for name, color in zip(names, COLORS * 3, strict=False) if name]
    if not shown:
        return ""
    width, height = 22 + 7 * max(len(name) for name, _ in shown), 15 * len(shown) + 6
    corners = [
        (x, y) for y in (TOP, HEIGHT - BOTTOM - height) for x in (WIDTH - RIGHT - width, LEFT)
    ]

    def crowd(corner: tuple[float, float]) -> int:
        """Points in the box of the legend."""
        x, y = corner
        return sum(x - 5 <= u <= x + width + 5 and y - 5 <= v <= y + height + 5 for u, v in points)

    x, y = min(corners, key=crowd)
    paper = 'style="fill:var(--paper,#fff)" fill-opacity=".75"'
    parts = [f'<rect x="{x + 2}" y="{y + 2}" width="{width - 4}" height="{height}" {paper}/>']
    for row, (name, color) in enumerate(shown):
        v = y + 14 + 15 * row
        parts.append(
            f'<rect x="{x + 6}" y="{v - 8}" width="9" height="9" fill="{color}"/>'
            + _text(x + 19, v, name, "start")
        )
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, *, faint: bool = False) -> str:
    """One line of words."""
    if not text:
        return ""
    opacity = ' fill-opacity=".7"' if faint else ""
    size = 12 if faint else 12.5
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'fill="currentColor"{opacity}>{html.escape(text)}</text>'
    )
