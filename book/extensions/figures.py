"""Figures of a chapter: numbered captions, and code folded below what it draws.

A picture whose cell has `mystnb={"figure": {"caption": ...}}` and an explorer, which
brings its own caption, are one series on each page: Figure 1, Figure 2, ... The code
of a folded cell stands below its output, under a line that says what it makes.
"""

import re

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

CAPTION = re.compile(r'<p class="lr-caption">(.*?)</p>\n?', re.DOTALL)
TITLE = re.compile(r'<p class="lr-title">(.*?)</p>', re.DOTALL)
#: What MyST-NB writes on a fold where a cell says nothing.
DEFAULT = re.compile(r"(Show|Hide) code cell ")
OUTPUT = "cell_code_output"


class Figures(SphinxPostTransform):
    """Number the figures of a notebook, then move its folded code below its outputs."""

    default_priority = 200  # after MyST-NB has made its folds, at 199
    formats = ("html",)

    def run(self, **kwargs: object) -> None:
        if not self.env.doc2path(self.env.docname).endswith(".ipynb"):
            return
        found = list(self.document.findall(is_figure))
        for number, node in enumerate(found, start=1):
            place = node.parent.index(node)
            node.parent[place : place + 1] = numbered(node, number)
        for fold in list(self.document.findall(HideCodeCellNode)):
            settle(fold)


def is_explorer(node: nodes.Node) -> bool:
    return isinstance(node, nodes.raw) and 'class="lr-explore"' in node.astext()


def is_figure(node: nodes.Node) -> bool:
    """An explorer, or a picture with a caption."""
    captioned = isinstance(node, nodes.figure) and node.next_node(nodes.caption)
    return bool(captioned) or is_explorer(node)


def numbered(node: nodes.Element, number: int) -> list[nodes.Node]:
    """The figure as an element of HTML with its caption. Sphinx' numbers go on from
    chapter to chapter and know no explorers, so it must not see a figure here."""
    told = f"<strong>Figure {number}.</strong> "
    name = "".join(f' id="{name}"' for name in node["ids"][:1])
    start = f'<figure class="lr-figure" data-figure="{number}"{name}>'
    if is_explorer(node):
        text, (caption, *_) = node.astext(), CAPTION.findall(node.astext()) or [""]
        caption = f"<p>{told}{caption or TITLE.findall(text)[0]}</p>"
        end = f"<figcaption>{caption}</figcaption></figure>"
        whole = start + CAPTION.sub("", text, count=1) + end
        return [nodes.raw("", whole, format="html", classes=node["classes"])]
    caption = next(node.findall(nodes.caption))
    node.remove(caption)
    line = nodes.paragraph("", "", html(told), *caption.children)
    around = html("<figcaption>"), line, html("</figcaption></figure>")
    return [html(start), *node.children, *around]


def html(text: str) -> nodes.raw:
    return nodes.raw("", text, format="html")


def settle(fold: HideCodeCellNode) -> None:
    """Name a fold after what its cell makes; code stands below that."""
    whole = fold.parent is None  # a cell folded with its outputs stands for itself
    cell = fold if whole else fold.parent
    if not whole and "above-input" in fold["classes"] and cell[-1] is not fold:
        cell.remove(fold)
        cell.append(fold)
    if DEFAULT.match(fold["prompt_show"]):
        fold["prompt_show"] = fold["prompt_hide"] = prompt(fold, cell)


def prompt(fold: nodes.Element, cell: nodes.Element) -> str:
    """Such as "Code of Figure 2", from the outputs of a cell."""
    if "above-input" not in fold["classes"]:
        blocks = fold.findall(nodes.literal_block)
        python = any(block.get("language") == "python" for block in blocks)
        return "The source" if python else "Output"
    text = "".join(raw.astext() for raw in cell.findall(nodes.raw))
    if figures := re.findall(r'data-figure="(\d+)"', text):
        return "Code of Figure " + " and ".join(dict.fromkeys(figures))
    if 'class="lr-table claims' in text:
        return "Code of the claims"
    if "<table" in text:
        return "Code of the table"
    return "Code" if cell.next_node(is_output) else "Set-up"


def is_output(node: nodes.Node) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == OUTPUT


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(Figures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
