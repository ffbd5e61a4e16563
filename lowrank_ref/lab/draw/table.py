"""A table that a notebook shows as HTML and a terminal as aligned text, the same on every run."""

from collections.abc import Sequence
from html import escape

__all__ = ["Table"]


class Table:
    """Rows of text under a header.

    Args:
        header: column titles.
        rows: cells as text, one per column.
        numbers: set columns in which every cell begins with a digit or a sign flush right.
        css: class of the HTML table.
        attributes: further attributes of the HTML table, name -> value.
        row_attributes: one such mapping per row.

    Raises:
        ValueError: a row with more or fewer cells than columns.
    """

    def __init__(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        numbers: bool = True,
        css: str = "lr-table",
        attributes: dict[str, str] | None = None,
        row_attributes: Sequence[dict[str, str]] = (),
    ):
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"rows: got {len(row)} cells in {list(row)}, wanted {len(header)}, one per column")
        self.header, self.rows, self.css = list(header), [list(row) for row in rows], css
        self.attributes, self.row_attributes = attributes or {}, list(row_attributes) or [{} for _ in rows]
        self._right = [numbers and bool(rows) and all(_numeric(row[j]) for row in rows) for j in range(len(header))]

    def _repr_html_(self) -> str:
        def line(cells: list[str], tag: str, attributes: dict[str, str]) -> str:
            style = ' style="text-align:right"', ' style="text-align:left"'
            body = "".join(f"<{tag}{style[not r]}>{escape(c)}</{tag}>" for c, r in zip(cells, self._right))
            return f"<tr{_attributes(attributes)}>{body}</tr>"

        head = line(self.header, "th", {})
        body = "\n".join(line(row, "td", extra) for row, extra in zip(self.rows, self.row_attributes))
        opening = f'<table class="{self.css}"{_attributes(self.attributes)}>'
        return f"{opening}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[j]) for line in lines) for j in range(len(self.header))]

        def text(line: list[str]) -> str:
            cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, self._right))
            return "  ".join(cells).rstrip()

        return "\n".join([text(self.header), "  ".join("-" * w for w in widths), *map(text, self.rows)])

    __repr__ = __str__


def _attributes(attributes: dict[str, str]) -> str:
    return "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())


def _numeric(cell: str) -> bool:
    """Whether a cell fits into a column of numbers; empty cells and diverged runs do."""
    return not cell or cell.lstrip("-−+")[:1].isdigit() or cell in ("-", "diverged")
