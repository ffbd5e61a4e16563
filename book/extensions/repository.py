"""Give the theme and the API pages the public address that stands in pyproject.toml."""

import importlib
import inspect
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import links


def set_repository(app: Sphinx, config: Config) -> None:
    """The theme derives the Colab, Binder and source buttons from these."""
    student = config.student_edition
    config.html_theme_options |= {
        "repository_url": links.repository(),
        "use_repository_button": True,
        "use_issues_button": True,
        "use_source_button": not student,
        "extra_footer": f"Version {links.version()}. "
        f'<a href="{links.site()}/versions.html">All versions</a>',
    }
    # The canonical address of a page: the newest version, whichever one it is read in.
    config.html_baseurl = links.site("latest") + "/"
    config.linkcode_resolve = source_of


def source_of(domain: str, info: dict[str, str]) -> str | None:
    """Where an object of an API page is defined, with its lines."""
    if domain != "py" or not info["module"]:
        return None
    thing = importlib.import_module(info["module"])
    try:
        for name in info["fullname"].split("."):
            thing = getattr(thing, name)
        thing = inspect.unwrap(getattr(thing, "fget", thing))
        path = Path(inspect.getsourcefile(thing)).relative_to(links.ROOT)
        lines, first = inspect.getsourcelines(thing)
    except (AttributeError, TypeError, ValueError):
        return None  # a constant or a field has no source of its own
    return links.source(f"{path.as_posix()}#L{first}-L{first + len(lines) - 1}")


def setup(app: Sphinx) -> dict[str, bool]:
    # Set by student_edition.py: no button leads to a notebook with solutions.
    app.add_config_value("student_edition", False, "env", types=(bool,))
    app.connect("config-inited", set_repository)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
