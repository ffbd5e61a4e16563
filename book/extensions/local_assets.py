"""No page asks another server for anything: the book works offline and from a disk."""

from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.fileutil import copy_asset

# The pieces that a page with TeX needs. The ready-made bundle has half again as much:
# a menu, and a speech engine that screen readers do without, since each formula also
# comes as MathML.
MATHJAX = ("core", "input/tex", "output/chtml", "a11y/assistive-mml")
#: What these ask for themselves, once they are there.
ON_DEMAND = (
    "output/chtml/fonts/tex.js",
    "output/chtml/fonts/woff-v2",
    "input/tex/extensions",
)


def mathjax_folder() -> Path:
    """MathJax 3.2.2 as it comes with a package from PyPI."""
    spec = find_spec("sphinx-mathjax-offline")
    if spec is None:
        raise ImportError("MathJax is missing: pip install sphinx-mathjax-offline")
    return Path(spec.origin).parent / "static" / "mathjax"


def use_mathjax(app: Sphinx, config: Config) -> None:
    config.mathjax_path = "mathjax/startup.js"
    own = config.mathjax3_config or {}
    config.mathjax3_config = own | {"loader": {"load": list(MATHJAX)}}


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        target = app.outdir / "_static" / "mathjax"
        for name in ("startup.js", *(f"{piece}.js" for piece in MATHJAX), *ON_DEMAND):
            source = mathjax_folder() / name
            to = target / name if source.is_dir() else (target / name).parent
            to.mkdir(parents=True, exist_ok=True)
            copy_asset(source, to)


def drop_thebe(app: Sphinx) -> None:
    """Jupyter Book loads thebe even when it is off, and twice: a console error."""
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)
    styles = app.registry.css_files
    styles[:] = [style for style in styles if style[0] != "sphinx-thebe.css"]


def setup(app: Sphinx) -> dict[str, bool]:
    drop_thebe(app)  # it is set up before
    app.connect("config-inited", use_mathjax)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
