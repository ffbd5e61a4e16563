"""Put built pages into the folder of the public site, beside those of earlier versions.

python book/tools/publish.py _build/html SITE main    as SITE/latest
python book/tools/publish.py _build/html SITE v0.1.0  as SITE/latest and SITE/v0.1.0

The root leads on to `latest/`, and `versions.html` lists all folders. Each page of an
older version says so in its first line, with a link to the same page of the newest.
"""

import argparse
import re
import shutil
from pathlib import Path

from links import BRANCH, install_target, version

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
{body}
</html>
"""


#: The first line of a page of an older version.
OLD = (
    '<p class="old-version" role="note">This is version {old} of the book. '
    '<a href="{target}">The newest is {new}.</a></p>'
)

#: What Binder installs for the notebooks beside the pages.
ENVIRONMENT = """name: lowrank-ref
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
      - "{package}"
"""


def publish(pages: Path, site: Path, name: str) -> list[str]:
    """Copy the pages; return the folders that the site then has, the newest first.

    Raises:
        ValueError: neither `main` nor the version in pyproject.toml, or no pages.
    """
    if not (pages / "index.html").exists():
        raise ValueError(
            f"pages: got {pages} without an index.html, wanted built pages"
        )
    tagged = name != BRANCH
    if tagged and name != f"v{version()}":
        raise ValueError(
            f"name: got {name!r}, wanted 'v{version()}' as in pyproject.toml, or "
            f"{BRANCH!r}"
        )
    for folder in ["latest", name] if tagged else ["latest"]:
        shutil.rmtree(site / folder, ignore_errors=True)
        shutil.copytree(pages, site / folder)
    found = versions(site)
    for old in found[2:]:
        mark_as_old(site, old, found[1])
    (site / ".nojekyll").touch()  # else folders with an underscore are left out
    environment = ENVIRONMENT.format(package=install_target("book"))
    (site / "environment.yml").write_text(environment)
    leads = '<meta http-equiv="refresh" content="0; url=latest/index.html">\n'
    leads += '<a href="latest/index.html">Low-rank, sparse, ternary</a>'
    (site / "index.html").write_text(PAGE.format(title="Lead", body=leads))
    items = "\n".join(f'<li><a href="{v}/index.html">{v}</a></li>' for v in found)
    body = f"<h1>All versions</h1>\n<ul>\n{items}\n</ul>"
    (site / "versions.html").write_text(PAGE.format(title="All versions", body=body))
    return found


def mark_as_old(site: Path, old: str, new: str) -> None:
    """Say on each page of the folder `old`, once, that `new` is newer."""
    said = re.compile(r'\n<p class="old-version".*?</p>')
    for path in (site / old).rglob("*.html"):
        page = path.relative_to(site / old)
        there = page if (site / new / page).exists() else Path("index.html")
        target = "../" * len(page.parts) + f"{new}/{there.as_posix()}"
        text = said.sub("", path.read_text(encoding="utf-8"))
        line = OLD.format(old=old, new=new, target=target)
        if body := re.search(r"<body[^>]*>", text):  # a fragment has none
            text = f"{text[: body.end()]}\n{line}{text[body.end() :]}"
        path.write_text(text, encoding="utf-8")


def versions(site: Path) -> list[str]:
    """`latest`, then the numbered folders from the newest to the oldest."""
    names = [path.name for path in site.iterdir() if path.is_dir()]
    numbered = [name for name in names if re.fullmatch(r"v\d+(\.\d+)*", name)]
    numbered.sort(key=lambda v: [int(n) for n in v[1:].split(".")], reverse=True)
    return ["latest", *numbered]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path)
    parser.add_argument("site", type=Path)
    parser.add_argument("name", help="the tag or branch that was built")
    options = parser.parse_args()
    print("Published:", *publish(options.pages, options.site, options.name))


if __name__ == "__main__":
    main()
