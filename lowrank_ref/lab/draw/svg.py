"""Small pictures as SVG text: a line chart, bars, and images side by side.

A chart is a string of lines, one line per part, so that `explore` can store a part that many frames share only once.
Text and axes use `currentColor`, so a picture follows the light or dark theme of its page; the palette is readable on
both, a method has the colour that it has everywhere in the book, and every curve of a chart also has its own dash
pattern. There are no ids that could clash.
"""

import base64
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape, unescape

import numpy as np
from numpy.typing import ArrayLike

from lowrank_ref.lab.draw.palette import DASHES, HUES, Look, colour, looks, method

__all__ = ["PALETTE", "Picture", "bar_chart", "image", "line_chart", "readout"]

PALETTE = tuple(HUES.values())  # for what is no method
_CHAR = 8.0  # average width of a character at the larger font of phones
_STYLE = (
    "<style>.lr-chart{display:block;width:100%;height:auto;margin:.2em 0;font-size:13px;line-height:1.2}"
    "@media(max-width:480px){.lr-chart{font-size:15px}}</style>"
)


class Picture(str):
    """HTML or SVG text that a notebook shows instead of quoting. `picture + picture` stacks them."""

    def __add__(self, other: str) -> "Picture":
        return Picture(str(self) + "\n" + str(other))

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        name = re.search('aria-label="([^"]*)"', self)
        return f"Picture({unescape(name[1]) if name else 'values'})"


def line_chart(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    dots: Sequence[str] = (),
    marks: Mapping[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
    alt: str = "",
    width: int = 480,
    height: int = 290,
) -> Picture:
    """Draw curves with their names at the right edge.

    Args:
        series: name -> (xs, ys) of equal length. Gaps (NaN, infinity, or <= 0 on a log axis) interrupt a curve; beyond
            120 points a curve is thinned evenly.
        x_label: what the horizontal axis shows, with its unit.
        y_label: the same for the vertical axis; it stands above the axis, where it reads without turning the head.
        log_x: logarithmic horizontal axis.
        log_y: logarithmic vertical axis.
        x_range: ends of the axis; default the data's. Fix it in an explorer, or the axes jump from frame to frame.
        y_range: the same for the vertical axis.
        dots: names of series drawn as points without a line.
        marks: name -> x of vertical reference lines.
        colours: name -> CSS colour; default a method's own, and the free ones of the palette in order. "currentColor"
            suits a reference that is no method.
        alt: description for readers who do not see it; default names the axes and curves.
        width: in user units, on the page at most 7/6 of it in pixels; the chart shrinks with its page.
        height: in user units.

    Raises:
        ValueError: no finite point, lengths that differ, a range that is empty or not positive on a log axis, or more
            series than distinguishable colours.
    """
    styles = _styles(series, colours)
    data = {name: _points(name, xs, ys, log_x, log_y) for name, (xs, ys) in series.items()}
    x_axis = _Axis("x", np.concatenate([x for x, _ in data.values()]), x_range, log_x, air=bool(dots))
    y_axis = _Axis("y", np.concatenate([y for _, y in data.values()]), y_range, log_y, air=True)

    left = 14 + _CHAR * max(len(label) for _, label in y_axis.ticks)
    right = 44 + _CHAR * max(len(name) for name in series)
    top, bottom = 34, 50
    w, h = width - left - right, height - top - bottom
    alt = alt or f"Line chart of {y_label} against {x_label} for {', '.join(series)}."
    out = [_open(width, height, alt)]
    out.append(_grid(x_axis, y_axis, left, top, w, h))
    out.append(_text(left - 8, 18, y_label))
    out.append(_text(left + w / 2, height - 8, x_label, anchor="middle"))
    for name, x in (marks or {}).items():
        u = left + w * x_axis.share(x)
        if left <= u <= left + w:
            line = (
                f'<path d="M{_n(u)} {top}v{_n(h)}" stroke="currentColor" stroke-opacity=".55" stroke-dasharray="3 3"/>'
            )
            out.append(line + _text(u + 4, top + 12, name, size=12))
    # The inner svg clips at the frame without needing an id.
    out.append(f'<svg x="{_n(left)}" y="{top}" width="{_n(w)}" height="{_n(h)}" fill="none" stroke-width="2.2">')
    for name, (xs, ys) in sorted(data.items(), key=lambda item: item[0] in dots):  # points on top of lines
        us, vs = w * x_axis.share(xs), h * (1 - y_axis.share(ys))
        if name in dots:
            body = "".join(f'<circle cx="{_n(u)}" cy="{_n(v)}" r="4"/>' for u, v in zip(us, vs) if math.isfinite(u + v))
            out.append(f'<g fill="{styles[name].colour}">{body}</g>')
        else:
            out.append(f'<path d="{_path(us, vs)}"{_stroke(styles[name])} stroke-linejoin="round"/>')
    out.append("</svg>")
    out += _end_labels(data, y_axis, styles, dots, left + w, top, h)
    return Picture("\n".join([*out, "</svg>"]))


def bar_chart(
    bars: Mapping[str, float],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    colours: Mapping[str, str] | None = None,
    alt: str = "",
    width: int = 480,
    height: int = 270,
) -> Picture:
    """Draw one upright bar per name, from zero.

    Args:
        bars: name -> finite height. Names are left out where they would not fit.
        x_label: what the bars are.
        y_label: what their height is, with its unit.
        y_range: ends of the axis; default from 0 to the highest bar (or from the lowest, if negative).
        colours: name -> CSS colour; default a method's own, and the first of the palette for all other bars.
        alt: description for readers who do not see it; default names the axes.
        width: in user units, on the page at most 7/6 of it in pixels; the chart shrinks with its page.
        height: in user units.

    Raises:
        ValueError: no bar, or a height that is not finite.
    """
    heights = np.array(list(bars.values()), dtype=float)
    if not len(heights) or not np.isfinite(heights).all():
        raise ValueError(f"bars: got {dict(bars)}, wanted at least one, all of finite height")
    axis = _Axis("y", np.append(heights, 0.0), y_range, False, air=True)
    left = 14 + _CHAR * max(len(label) for _, label in axis.ticks)
    top, bottom = 34, 50
    w, h = width - left - 8, height - top - bottom
    out = [_open(width, height, alt or f"Bar chart of {y_label} for each {x_label}.")]
    out.append(_grid(None, axis, left, top, w, h))
    out.append(_text(left - 8, 18, y_label))
    out.append(_text(left + w / 2, height - 8, x_label, anchor="middle"))
    step = w / len(heights)
    every = max(1, math.ceil(max(_CHAR * len(name) + 8 for name in bars) / step))
    zero = float(axis.share(0.0))
    for i, (name, value) in enumerate(bars.items()):
        share = min(max(float(axis.share(value)), 0.0), 1.0)
        low, high = sorted((min(max(zero, 0.0), 1.0), share))
        x, y = left + i * step + step * 0.12, top + h * (1 - high)
        hue = (colours or {}).get(name) or (colour(name) if method(name) else PALETTE[0])
        out.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(step * 0.76)}" height="{_n(h * (high - low))}" fill="{hue}"/>'
        )
        if i % every == 0:
            out.append(_text(x + step * 0.38, top + h + 18, name, anchor="middle"))
    return Picture("\n".join([*out, "</svg>"]))


def image(
    pictures: ArrayLike | Mapping[str, ArrayLike],
    *,
    low: float | None = None,
    high: float | None = None,
    signed: bool = False,
    alt: str = "",
    width: int = 480,
    columns: int = 4,
) -> Picture:
    """Show one picture, or several side by side with their names underneath, every pixel sharp.

    Args:
        pictures: an array (H, W) in gray, (3, H, W) in colour, or name -> array.
        low: value shown black; default 0, or the smallest value if negative.
        high: value shown white; default the largest value of all pictures.
        signed: blue for negative, white for 0, orange for positive, up to the largest size (or `high`): for weights.
        alt: description for readers who do not see it; default the names.
        width: in user units of all columns together.
        columns: most pictures in a row.

    Raises:
        ValueError: no picture, another shape, or NaN or infinity.
    """
    named = dict(pictures) if isinstance(pictures, Mapping) else {"": pictures}
    arrays = {name: np.asarray(value, dtype=float) for name, value in named.items()}
    for name, a in arrays.items():
        if not (a.ndim == 2 or (a.ndim == 3 and len(a) == 3)) or 0 in a.shape:
            raise ValueError(f"pictures: got shape {a.shape} for {name!r}, wanted (H, W) or (3, H, W)")
        if not np.isfinite(a).all():
            raise ValueError(f"pictures: got NaN or infinity in {name!r}, wanted finite values")
    if not arrays:
        raise ValueError("pictures: got none, wanted at least one")
    if signed:
        high = max(np.abs(a).max() for a in arrays.values()) if high is None else high
        low = -high
    else:
        high = max(a.max() for a in arrays.values()) if high is None else high
        low = min(0.0, *(a.min() for a in arrays.values())) if low is None else low

    columns = min(columns, len(arrays))
    gap, cell = 12, (width - 12 * (columns - 1)) / columns
    tall = max(a.shape[-2] / a.shape[-1] for a in arrays.values()) * cell
    row = tall + (26 if any(arrays) else 0)
    rows = math.ceil(len(arrays) / columns)
    height = rows * row + (rows - 1) * gap
    out = [_open(width, height, alt or "Pictures: " + (", ".join(filter(None, arrays)) or "one array") + ".")]
    for i, (name, a) in enumerate(arrays.items()):
        x, y = (i % columns) * (cell + gap), (i // columns) * (row + gap)
        unit = (a - low) / (high - low if high > low else 1.0)
        pixels = _diverging(unit) if signed and a.ndim == 2 else unit
        data = base64.b64encode(png(pixels)).decode()
        out.append(
            f'<image x="{_n(x)}" y="{_n(y)}" width="{_n(cell)}" height="{_n(tall)}" style="image-rendering:pixelated"'
            f' preserveAspectRatio="xMidYMid" href="data:image/png;base64,{data}"/>'
        )
        if name:
            out.append(_text(x + cell / 2, y + tall + 18, name, anchor="middle"))
    return Picture("\n".join([*out, "</svg>"]))


def readout(numbers: Mapping[str, float | int | str]) -> Picture:
    """Set named values in a row that wraps on small screens. Floats keep four significant digits."""
    items = "\n".join(
        f'<div><dt style="display:inline;opacity:.75">{escape(name)}</dt> '
        f'<dd style="display:inline;margin:0;font-weight:600">{escape(_show(value))}</dd></div>'
        for name, value in numbers.items()
    )
    style = "display:flex;flex-wrap:wrap;gap:.2em 1.4em;margin:.4em 0;font-variant-numeric:tabular-nums"
    return Picture(f'<dl style="{style}">\n{items}\n</dl>')


# --- inside -----------------------------------------------------------------------------------------------------------


class _Axis:
    """Maps values to [0, 1] between the ends of an axis, and chooses its ticks."""

    def __init__(self, name: str, values: np.ndarray, ends: tuple[float, float] | None, log: bool, *, air: bool):
        self.log = log
        if ends is None:
            values = values[np.isfinite(values)]
            if not len(values):
                raise ValueError("series: got no finite point (or no positive one on a log axis)")
            low, high = float(values.min()), float(values.max())
            if air:  # so that points do not sit on the frame
                pad = (high / low) ** 0.05 if log else 0.05 * (high - low)
                low, high = (low / pad, high * pad) if log else (low if low == 0 else low - pad, high + pad)
            if low == high:
                low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        else:
            low, high = map(float, ends)
            if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
                raise ValueError(f"{name}_range: got {ends}, wanted low < high" + (" and low > 0" if log else ""))
        self.low, self.high = low, high
        self.ticks = [(t, _tick_label(t, log)) for t in (_log_ticks if log else _ticks)(low, high)]

    def share(self, value):
        """Place of a value (or an array) between the ends, 0 to 1; outside beyond them."""
        if self.log:
            return np.log(np.asarray(value, dtype=float) / self.low) / math.log(self.high / self.low)
        return (np.asarray(value, dtype=float) - self.low) / (self.high - self.low)


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.2 else (1,)
    every = max(1, math.ceil(decades / 6))
    ticks = [m * 10.0**k for k in range(first, last + 1) for m in digits if k % every == 0]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    return inside if len(inside) > 1 else _ticks(low, high)


def _tick_label(value: float, log: bool) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        digits, power = (
            f"{float(mantissa):g}",
            str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")),
        )
        return f"10{power}" if digits == "1" else f"{digits}·10{power}"
    return f"{value:g}".replace("-", "−")


def _points(name: str, xs: ArrayLike, ys: ArrayLike, log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"series: got shapes {x.shape} and {y.shape} for {name!r}, wanted two rows of equal length")
    if len(x) > 120:
        keep = np.unique(np.linspace(0, len(x) - 1, 120).round().astype(int))
        x, y = x[keep], y[keep]
    bad = ~np.isfinite(x) | ~np.isfinite(y) | (log_x & (x <= 0)) | (log_y & (y <= 0))
    return np.where(bad, np.nan, x), np.where(bad, np.nan, y)


def _styles(series: Mapping[str, object], given: Mapping[str, str] | None) -> dict[str, Look]:
    if not series:
        raise ValueError("series: got 0, wanted at least 1")
    own = looks(name for name in series if name not in (given or {}))
    dashes = [dash for dash in DASHES if dash not in {look.dash for look in own.values()}]
    for i, name in enumerate(name for name in series if name in (given or {})):
        own[name] = Look((given or {})[name], dashes[i % len(dashes)] if dashes else "", "")
    return own


def _stroke(style: Look) -> str:
    return f' stroke="{style.colour}"' + (f' stroke-dasharray="{style.dash}"' if style.dash else "")


def _n(value: float) -> str:
    """A coordinate with one decimal, as short as possible."""
    return f"{round(float(value), 1) + 0.0:g}"  # + 0.0 turns -0.0 into 0


def _open(width: float, height: float, alt: str) -> str:
    return (
        f'<svg class="lr-chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" role="img" '
        f'aria-label="{escape(alt)}" style="max-width:{_n(width * 7 / 6)}px" fill="currentColor">{_STYLE}'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int | None = None) -> str:
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    font = f' font-size="{size}"' if size else ""
    return f'<text x="{_n(x)}" y="{_n(y)}"{place}{font}>{escape(text)}</text>'


def _grid(x_axis: _Axis | None, y_axis: _Axis, left: float, top: float, w: float, h: float) -> str:
    """Faint lines at the ticks, the two axes, the tick labels: one line of text, since frames share it."""
    lines, labels = [], []
    for value, label in y_axis.ticks:
        v = top + h * (1 - float(y_axis.share(value)))
        lines.append(f"M{_n(left)} {_n(v)}h{_n(w)}")
        labels.append(_text(left - 8, v + 5, label, anchor="end"))
    last = -math.inf
    for value, label in x_axis.ticks if x_axis else ():
        u = left + w * float(x_axis.share(value))  # type: ignore[union-attr]
        lines.append(f"M{_n(u)} {top}v{_n(h)}")
        half = _CHAR * len(label) / 2 + 4
        if u - half > last:  # labels that would touch are left out
            labels.append(_text(u, top + h + 20, label, anchor="middle"))
            last = u + half
    axes = f"M{_n(left)} {top}v{_n(h)}h{_n(w)}"
    return (
        f'<path d="{"".join(lines)}" stroke="currentColor" stroke-opacity=".13"/>'
        f'<path d="{axes}" stroke="currentColor" stroke-opacity=".6" fill="none"/>{"".join(labels)}'
    )


def _path(us: np.ndarray, vs: np.ndarray) -> str:
    """Move-to and line-to, lifting the pen over gaps."""
    parts, pen = [], "M"
    for u, v in zip(us, vs):
        if math.isfinite(u) and math.isfinite(v):
            parts.append(f"{pen}{_n(u)} {_n(v)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _end_labels(data, y_axis: _Axis, styles: Mapping[str, Look], dots, x: float, top: float, h: float) -> list[str]:
    """Name every curve where it ends, pushed apart to a line's height, with a sample of its stroke."""
    ends = []
    for name, (_, ys) in data.items():
        finite = ys[np.isfinite(ys)]
        share = float(y_axis.share(finite[-1])) if len(finite) else 0.0
        ends.append((top + h * (1 - min(max(share, 0.0), 1.0)), name))
    ends.sort(key=lambda end: end[0])
    places, gap = [v for v, _ in ends], 19.0
    for j in range(1, len(places)):
        places[j] = max(places[j], places[j - 1] + gap)
    for j in reversed(range(len(places))):  # and back up, if the lowest left the frame
        limit = top + h if j == len(places) - 1 else places[j + 1] - gap
        places[j] = min(places[j], limit)
    out = []
    for v, (_, name) in zip(places, ends):
        sample = (
            f'<circle cx="{_n(x + 18)}" cy="{_n(v)}" r="4" fill="{styles[name].colour}"/>'
            if name in dots
            else f'<path d="M{_n(x + 8)} {_n(v)}h20"{_stroke(styles[name])} stroke-width="2.5"/>'
        )
        out.append(sample + _text(x + 33, v + 5, name))
    return out


def _show(value: float | int | str) -> str:
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)


def _diverging(unit: np.ndarray) -> np.ndarray:
    """Map (H, W) in [0, 1] to blue - white - orange (3, H, W)."""
    blue, white, orange = np.array([[0.0, 0.447, 0.698], [1.0, 1.0, 1.0], [0.835, 0.369, 0.0]])
    t = np.clip(2 * unit - 1, -1, 1)[None]
    end = np.where(t < 0, blue[:, None, None], orange[:, None, None])
    return white[:, None, None] + np.abs(t) * (end - white[:, None, None])


def png(pixels: np.ndarray) -> bytes:
    """Encode (H, W) or (3, H, W) in [0, 1] as PNG with the standard library: the same bytes on every machine."""
    bytes_ = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    rows = bytes_ if bytes_.ndim == 2 else bytes_.transpose(1, 2, 0).reshape(bytes_.shape[1], -1)
    height, width = bytes_.shape[-2:]
    raw = b"".join(b"\0" + row.tobytes() for row in rows)  # filter 0 before every row

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if bytes_.ndim == 2 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
