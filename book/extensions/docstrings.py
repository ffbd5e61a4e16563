"""What the reference pages make of a docstring: tables, blocks, and links."""

import re
from collections.abc import Mapping

#: A name in single backticks, perhaps called, and not inside a role or a literal.
NAME = re.compile(
    r"(?<![:`\w])`([A-Za-z_][\w.]*?)(\.py)?(?:\(\)|(\([^`<>\\]+\)))?`(?![`_])"
)
#: The number of a paper at arXiv.
ARXIV = re.compile(r"(?<![\w./:])((?:arXiv:? ?)?(\d{4}\.\d{5}(?:v\d+)?))(?![\w/]|\.\d)")


def tables_as_rst(lines: list[str]) -> list[str]:
    """Turn Markdown's tables, easy to read in a file, into reStructuredText."""
    out: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("|") and not inside:
            out += ["", ".. list-table::", "   :header-rows: 1", ""]
        inside = line.startswith("|")
        if not inside:
            out.append(line)
        elif not set(line) <= set("|-: "):  # the rule under the head says nothing
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            out.append(f"   * - {cells[0]}")
            out += [f"     - {cell}" for cell in cells[1:]]
    return out


def blocks_kept(lines: list[str]) -> list[str]:
    """Let an indented block after an empty line keep its lines, as in the file."""
    out: list[str] = []
    inside, before = False, ""  # the last line that is not empty
    for i, line in enumerate(lines):
        begins = line.startswith("    ") and i > 0 and not lines[i - 1].strip()
        told = before.startswith((" ", ">>>", "..")) or before.endswith("::")
        listed = re.match(r"([-*]|\d+\.) ", before)
        if begins and not inside and not told and not listed:
            out += ["::", ""]
            inside = True
        if line.strip():
            inside = inside and line.startswith("    ")
            before = line
        out.append(line)
    return out


def linked(lines: list[str], names: Mapping[str, str], module: str) -> list[str]:
    """Link names in backticks to their objects, and numbers of papers to arXiv.

    `names` has the full name of each object that is documented, under itself and, where
    it is the only one of that name, under its last part.
    """

    def link(match: re.Match[str]) -> str:
        text, rest = match[1], (match[2] or "") + (match[3] or "")
        for full in (f"{module}.{text}", f"{module.rpartition('.')[0]}.{text}", text):
            if full in names:
                return f":py:obj:`{text}{rest} <{names[full]}>`"
        return match[0]

    out, literal = [], False
    for line in lines:
        if line.strip():
            literal = literal and line.startswith(" ")
        told = line.lstrip().startswith((">>>", "...", ":param", ":type"))
        if literal or line.lstrip().startswith((">>>", "...")):
            out.append(line)
            continue
        literal = line.strip() == "::"
        if told:  # the name of an argument is no object
            head, colon, rest = line.rpartition(": ")
            line = head + colon + NAME.sub(link, rest)
        else:
            line = NAME.sub(link, line)
        out.append(ARXIV.sub(r"`\1 <https://arxiv.org/abs/\2>`__", line))
    return out


def summary(text: str | None) -> str:
    """The first sentence of a docstring, in one line."""
    first = " ".join((text or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.:!?]) (?=[A-Z`])", first)[0]
