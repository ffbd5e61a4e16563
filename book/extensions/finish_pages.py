"""Last touches on the written pages, where the theme's templates offer no setting.

Weight: icons come as two small fonts with the glyphs that the pages use, not as 1.5 MB
of script; the search index is loaded where one searches. Accessibility: a name that the
theme leaves out. For other sites: a description and a picture.
"""

import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from fontTools import subset
from fontTools.ttLib import TTFont
from sphinx.application import Sphinx

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import links

#: Icons that scripts of the theme put into a page.
BY_SCRIPT = ("xmark",)
#: And those that styles name by code: unfolding contents, and exercises.
LONE_ICONS = ("f107", "f303")
FONTS = {"icons-solid": "fa-solid-900", "icons-brands": "fa-brands-400"}


def describe(app: Sphinx, name: str, template: str, context: Any, doctree: Any) -> None:
    """Tell other sites what a page is about, and give it a picture."""
    about = description(doctree)
    title = re.sub(r"<[^>]+>", "", context.get("title", "")) or app.config.html_title
    tags = {
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:title": title,
        "og:description": about,
        "og:url": context["pageurl"],
        "og:image": links.site("latest") + "/_static/social.png",
        "og:image:alt": "The book's title beside a matrix and its low-rank factors.",
        "twitter:card": "summary_large_image",
        "twitter:title": title,
        "twitter:description": about,
        "twitter:image": links.site("latest") + "/_static/social.png",
    }
    lines = [
        f'<meta {"name" if key.startswith("twitter") else "property"}="{key}" '
        f'content="{escape(text)}" />'
        for key, text in tags.items()
    ]
    if 'name="description"' not in context.get("metatags", ""):
        lines.append(f'<meta name="description" content="{escape(about)}" />')
    context["metatags"] = context.get("metatags", "") + "\n".join(lines)


def description(doctree: nodes.document | None, most: int = 200) -> str:
    """The description that a page declares, else its first paragraph, in one line."""
    default = (
        "An executable textbook on low-rank, sparse and ternary methods for neural "
        "networks: one chapter, one file and one test per paper."
    )
    if doctree is None:  # search and index
        return default
    for meta in doctree.findall(nodes.meta):
        if meta.get("name") == "description":
            return meta["content"]
    texts = (
        " ".join(paragraph.astext().split())
        for paragraph in doctree.findall(nodes.paragraph)
    )
    text = next((text for text in texts if len(text) > 40), default)
    return text if len(text) <= most else text[: most - 2].rsplit(" ", 1)[0] + " …"


def finish(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    pages = [path for path in out.rglob("*.html") if "_static" not in path.parts]
    icons = set(BY_SCRIPT)
    for path in pages:
        text = path.read_text(encoding="utf-8")
        for classes in re.findall(r'class="([^"]*\bfa-[^"]*)"', text):
            icons.update(re.findall(r"\bfa-([a-z-]+)", classes))
        path.write_text(mended(text, path.name), encoding="utf-8")
    write_icons(out / "_static", icons)
    index = out / "searchindex.js"
    index.write_text(searchable(index.read_text(encoding="utf-8")), encoding="utf-8")


def searchable(text: str, package: str = "lowrank_ref") -> str:
    """The search index without the package's own name, in which "rank" would be found.

    Objects are searched by their full name; without the package in it, their anchors,
    which else follow from the name, are written out.
    """
    start, end = "Search.setIndex(", ")"
    index = json.loads(text[len(start) :].rstrip().removesuffix(end))
    objects: dict[str, list[Any]] = {}
    for prefix, entries in index["objects"].items():
        short = prefix.removeprefix(package).removeprefix(".")
        for page, kind, priority, anchor, name in entries:
            full = f"{prefix}.{name}" if prefix else name
            if anchor == "-":
                anchor = f"{index['objnames'][str(kind)][1]}-{full}"
            row = [page, kind, priority, anchor or full, name]
            objects.setdefault(short, []).append(row)
    index["objects"] = objects
    for terms in (index["terms"], index["titleterms"]):
        for term in [term for term in terms if package.split("_")[0] in term]:
            del terms[term]
    return f"{start}{json.dumps(index, separators=(',', ':'))}{end}"


def mended(text: str, name: str) -> str:
    """One page as the theme should have written it."""
    scripts = ["fontawesome.js"]
    if name != "search.html":
        scripts += ["searchtools.js", "language_data.js", "searchindex.js"]
    if 'class="sd-' not in text:  # no page of this kind uses grids, cards or tabs
        scripts.append("design-tabs.js")
        text = re.sub(r"<link[^>]*sphinx-design\.min\.css[^>]*>\s*", "", text)
    for script in scripts:
        text = re.sub(rf"<script[^>]*{re.escape(script)}[^>]*></script>\s*", "", text)
    # Readers get the notebook made for a kernel, not the page's source.
    ours, page = links.owner_and_name(links.repository()), r"book/([\w/-]+)\.ipynb"
    colab = rf"{links.COLAB}/{ours}/blob/{links.BRANCH}/{page}"
    text = re.sub(colab, lambda found: links.colab(found[1]), text)
    binder = rf"{links.BINDER}/{ours}/{links.BRANCH}\?urlpath=lab/tree/{page}"
    text = re.sub(binder, lambda found: links.binder(found[1]), text)
    text = re.sub(r'"((?:\.\./)*)_sources/([\w/-]+\.ipynb)"', r'"\1notebooks/\2"', text)
    # The button that unfolds a part of the contents has no name.
    text = text.replace(
        '<summary><span class="toctree-toggle"',
        '<summary aria-label="Pages below"><span class="toctree-toggle"',
    )
    # The line on a fold of code says more than this.
    text = text.replace(' aria-label="Toggle hidden content"', "")
    # The bibliography names roles, and breaks the rules of these roles.
    text = text.replace('<div role="list" class="citation', '<div class="citation')
    text = text.replace(' role="doc-biblioentry"', "")
    if name in ("bibliography.html", "status.html"):  # BibTeX's way to write a title
        text = text.replace("$l_p$", "<i>l<sub>p</sub></i>")
    # Links to exercises begin with a space, underlined.
    text = re.sub(r"(<a [^>]*>) (?=Exercise)", r" \1", text)
    # A long signature is no list of definitions.
    return re.sub(r"<dl>\n(.*?)</dl>", _plain_lines, text, flags=re.DOTALL)


def _plain_lines(match: re.Match[str]) -> str:
    lines = (
        match[1].replace("<dd>", '<div class="sig-line">').replace("</dd>", "</div>")
    )
    return f"<div>\n{lines}</div>"


def write_icons(static: Path, icons: set[str]) -> None:
    """Cut the theme's icon fonts down to the glyphs in use, for book.css."""
    style = "".join(path.read_text() for path in (static / "styles").glob("*.css"))
    codes = set(map(ord, re.findall(r'--pst-icon-[a-z-]+:"(.)"', style)))
    codes.update(int(code, 16) for code in LONE_ICONS)
    for icon in icons:
        rule = rf'\.fa-{icon}:before[^{{}}]*{{content:"\\([0-9a-f]+)"}}'
        codes.update(int(code, 16) for code in re.findall(rule, style))
    for name, font in FONTS.items():
        path = static / "vendor" / "fontawesome" / "webfonts" / f"{font}.ttf"
        glyphs = TTFont(path)
        options = subset.Options(flavor="woff", notdef_outline=True)
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=codes)
        cutter.subset(glyphs)
        subset.save_font(glyphs, str(static / f"{name}.woff"), options)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", describe)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
