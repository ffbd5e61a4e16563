"""A picture of an explorer, for where its script does not run.

JupyterLab shows a saved output without styles, drawings and scripts until it has run.
"""

import re
import textwrap
from html import escape
from pathlib import Path

import matplotlib
import resvg_py
from bs4 import BeautifulSoup, Tag

WIDTH, LINE, MARGIN = 560, 20, 12
PAGE = WIDTH + 3 * MARGIN  # of the picture, in pixels of a page
LETTERS = 78  # that fit into a line of text
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACE = "DejaVu Sans"
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" fill="#1a1a1a">'
)


def is_explorer(html: str) -> bool:
    return 'class="lr-explore"' in html


def described(html: str) -> str:
    """What a reader who does not see it is told, and its caption."""
    root = BeautifulSoup(html, "html.parser").select_one(".lr-explore")
    caption = root.select_one(".lr-caption")
    return root["aria-label"] + (f" {caption.get_text()}" if caption else "")


def still(html: str) -> bytes:
    """The frame that an explorer shows first, with title, numbers and sliders, as PNG.

    Raises:
        ValueError: the output is no explorer with a drawing.
    """
    root = BeautifulSoup(html, "html.parser").select_one(".lr-explore")
    frame = root and root.select_one("[data-frame]")
    drawings = (
        [svg for svg in frame.find_all("svg") if not svg.find_parent("svg")]
        if frame
        else []
    )
    if not drawings:
        raise ValueError(
            "html: wanted the output of an explorer, with a drawing in its frame"
        )
    parts, y = text([root.select_one(".lr-title").get_text()], MARGIN, "bold")
    placed, y = in_rows(drawings, y)
    parts += placed
    numbers = [
        f"{name.get_text()}: {name.find_next('dd').get_text()}"
        for name in frame.select("dt")
    ]
    rows = root.select(".lr-row")
    sliders = [
        f"{row.select_one('.lr-name').get_text()} = {row.output.get_text()}"
        for row in rows
    ]
    for line in (numbers, ["The sliders stand at " + ", ".join(sliders)]):
        more, y = text(line, y + LINE // 3)
        parts += more
    svg = HEAD.format(PAGE, y + MARGIN) + "".join(parts) + "</svg>"
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg,
            background="#ffffff",
            zoom=2.0,
            skip_system_fonts=True,
            font_files=[str(FONTS / f"DejaVuSans{bold}.ttf") for bold in ("", "-Bold")],
            font_family=FACE,
            sans_serif_family=FACE,
            monospace_family=FACE,
        )
    )


def in_rows(drawings: list[Tag], y: float) -> tuple[list[str], float]:
    """Drawings beside each other while they fit, and where the next thing begins."""
    parts, x, tallest = [], 0.0, 0.0
    across = (
        1
        if len(drawings) == 1
        or not drawings[0].find_parent("div", style=re.compile("flex"))
        else len(drawings)
    )
    width = WIDTH / across - 8 * (across > 1)
    for svg in drawings:
        _, _, w, h = map(float, svg["viewbox"].split())
        shown = min(width, w * (1.17 if across == 1 else 1))
        if x + shown > WIDTH + 1:
            x, y, tallest = 0.0, y + tallest, 0.0
        parts.append(nested(svg, x, y, shown, shown * h / w))
        x, tallest = (
            x + (shown + 8 if across > 1 else WIDTH),
            max(tallest, shown * h / w),
        )
    return parts, y + tallest


def nested(svg: Tag, x: float, y: float, width: float, height: float) -> str:
    """A drawing at a place of a larger one."""
    inside = svg.decode_contents()
    kept = {
        k: v
        for k, v in svg.attrs.items()
        if k in ("font-size", "font-family", "fill", "stroke")
    }
    said = "".join(f' {name}="{escape(str(value))}"' for name, value in kept.items())
    place = (
        f'x="{x + MARGIN:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    )
    head = f'<svg {place} overflow="visible" viewBox="{svg["viewbox"]}"{said}>'
    return head + inside.replace("currentColor", "#1a1a1a") + "</svg>"


def text(
    pieces: list[str], y: float, weight: str = "normal"
) -> tuple[list[str], float]:
    """Pieces in lines, broken only where they must, and where the next thing begins."""
    lines: list[str] = []
    for piece in pieces:
        joined = f"{lines[-1]} · {piece}" if lines else piece
        if lines and len(joined) <= LETTERS:
            lines[-1] = joined
        else:
            lines += textwrap.wrap(piece, LETTERS)
    style = f'font-family="{FACE}" font-size="12.5" font-weight="{weight}"'
    parts = [
        f'<text x="{MARGIN}" y="{y + LINE * (k + 0.7):.1f}" {style}>'
        f"{escape(line)}</text>"
        for k, line in enumerate(lines)
    ]
    return parts, y + LINE * len(lines)
