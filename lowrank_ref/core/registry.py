"""One card per paper: what ties a paper's file, test and chapter together.

A paper's module ends with `PAPER = PaperInfo(...)`. Nothing registers itself on import: `papers()` walks the parts and
collects the cards, so that the list never depends on who imported what.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from graphlib import CycleError, TopologicalSorter
from typing import Any

#: Part -> (title, the papers planned for it). A module, its test and its chapter carry the paper's name.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adapters": (
        "How to write the update",
        ("lora", "svfit", "randlora", "nola", "loldu", "lora_sb", "lora_squeeze", "allora", "ba_lora", "sara"),
    ),
    "ranks": ("How much rank, and where", ("sora", "increlora", "diffora", "codyra", "bayesian_lora")),
    "optimizers": ("Low-rank gradients", ("galore", "fira", "dct_adamw", "efficient_pretraining")),
    "pretraining": ("Low-rank (and sparse) from the start", ("sltrain", "lost", "sst")),
    "compression": ("Making a trained network low-rank", ("trp", "maestro", "welore", "pela")),
    "lowbit": ("Few bits, ternary weights", ("low_precision", "hgf")),
    "robustness": (
        "Staying right when inputs move",
        ("ramp", "natra", "efficient_robustification", "lr0_fm", "cgbc", "ranking_robustness", "r_mtgb"),
    ),
    "analysis": ("What the updates look like", ("artificial_entanglement",)),
}

#: Pages that belong to no paper, but that a chapter can ask its reader to know.
PAGES = ("notation", "primer")


@dataclass(frozen=True, kw_only=True)
class PaperInfo:
    """What the book and the tests know about one paper.

    Attributes:
        key: module, test and chapter name, and the key in `references.bib`.
        name: what people call the method.
        part: folder in the three trees, a key of `PARTS`.
        title: the paper's title.
        authors: names in the paper's order.
        arxiv: identifier with version, such as "2106.09685v2".
        summary: one sentence on why to read the chapter.
        use_when: the situation in which the measurements here speak for the method, as "you ...".
        instead: key of another paper -> the situation in which that one is the better choice.
        needs: what to read first: keys of papers, or of `PAGES`. What those need themselves is not repeated.
        official_code: repository as "owner/name", or "" where none is known.
        code_licence: licence of that repository.
        equations: what the paper calls it -> name of the function here.
        deviations: where this file departs from paper or official code, and why.
        aliases: other names readers search for.
        status: "draft", "checked" (compared with official code) or "frozen".
        verified: ISO date of the last full check.
        changes: ISO date -> what is new for a reader since the first version, in one sentence.
        layers: name -> factory(base, generator=...) of an `AdaptedLinear`, walked by the test battery.
        optimizers: name -> factory(groups) of an optimizer, walked by the test battery.

    Raises:
        ValueError: a part, key, status or date that is none, or a needed or better paper that nobody plans.
    """

    key: str
    part: str
    name: str
    title: str
    authors: tuple[str, ...]
    arxiv: str
    summary: str
    use_when: str
    instead: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    official_code: str = ""
    code_licence: str = ""
    equations: dict[str, str] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    status: str = "draft"
    verified: str = ""
    changes: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    optimizers: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part: got {self.part!r}, wanted one of {sorted(PARTS)}")
        if self.key not in PARTS[self.part][1]:
            raise ValueError(f"key: got {self.key!r}, wanted one of {PARTS[self.part][1]}")
        planned = {key for _, keys in PARTS.values() for key in keys}
        if strangers := set(self.instead) - planned:
            raise ValueError(f"instead: got {sorted(strangers)}, wanted keys of planned papers")
        if strangers := set(self.needs) - planned - set(PAGES):
            raise ValueError(f"needs: got {sorted(strangers)}, wanted keys of planned papers or of {PAGES}")
        if self.status not in ("draft", "checked", "frozen"):
            raise ValueError(f"status: got {self.status!r}, wanted 'draft', 'checked' or 'frozen'")
        if not self.use_when.startswith("you ") or self.use_when.endswith("."):
            raise ValueError(f"use_when: got {self.use_when!r}, wanted the rest of 'Use it when', as 'you tune'")
        if unended := [text for text in self.changes.values() if not text.endswith(".")]:
            raise ValueError(f"changes: got {unended}, wanted sentences with a full stop")
        for day in (*self.changes, *filter(None, [self.verified])):
            try:
                date.fromisoformat(day)
            except ValueError:
                raise ValueError(f"changes, verified: got {day!r}, wanted ISO dates such as '2026-11-23'") from None

    @property
    def module(self) -> str:
        """Import path of the paper's file."""
        return f"lowrank_ref.{self.part}.{self.key}"


def papers() -> dict[str, PaperInfo]:
    """Collect the cards of all papers that exist, in the order of `PARTS`.

    Returns:
        key -> PaperInfo.

    Raises:
        ValueError: a module of a paper carries no `PAPER`, or one whose key or part is not its own place.

    Example:
        >>> papers()["lora"].arxiv
        '2106.09685v2'
    """
    found = {}
    for part, (_, keys) in PARTS.items():
        for key in keys:
            name = f"lowrank_ref.{part}.{key}"
            if importlib.util.find_spec(name) is None:
                continue
            info = getattr(importlib.import_module(name), "PAPER", None)
            if info is None or (info.part, info.key) != (part, key):
                raise ValueError(f"{name}.PAPER: got {info!r}, wanted a PaperInfo with part={part!r} and key={key!r}")
            found[key] = info
    return found


def reading_order(needs: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Sort chapters so that each comes after all that it needs.

    Args:
        needs: key -> keys of what to read before it. What appears only on the right needs nothing.

    Returns:
        Depth by key, in an order to read in. It is 0 for what needs nothing, else one more than the deepest need. A
        chapter follows the last of its needs as closely as possible; ties keep the order of `needs`.

    Raises:
        ValueError: chapters that need each other in a circle.

    Example:
        >>> reading_order({"lora": ("primer",), "galore": ("primer",), "sora": ("lora",)})
        {'primer': 0, 'lora': 1, 'sora': 2, 'galore': 1}
    """
    try:
        first = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise ValueError(f"needs: got the circle {' -> '.join(reversed(error.args[1]))}, wanted none") from None
    depth: dict[str, int] = {}
    for key in first:
        depth[key] = max((depth[need] + 1 for need in needs.get(key, ())), default=0)
    order: dict[str, int] = {}

    def visit(key: str) -> None:
        if key not in order and all(need in order for need in needs.get(key, ())):
            order[key] = depth[key]
            for other, wanted in needs.items():
                if key in wanted:
                    visit(other)

    for key in (*(k for k in first if k not in needs), *needs):
        visit(key)
    return order
