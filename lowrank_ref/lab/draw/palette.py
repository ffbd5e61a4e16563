"""One colour a method through the whole book, for matplotlib and for SVG, on white and on the dark page.

A method keeps its hue in every figure. Its dash and its marker are its own as well, where no other series of the same
figure has them; so no figure needs colour alone to be read.
"""

import re
import zlib
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["DASHES", "GRAY", "HUES", "Look", "colour", "looks", "method"]

# Okabe and Ito's hues, those too pale for white paper darkened, and two more. Each has a contrast of at least 3:1 on
# white and on the dark page (#14181e); that leaves a narrow band of lightness, so dashes and markers help the eye.
HUES = {
    "blue": "#0072b2", "vermillion": "#d55e00", "green": "#009e73", "purple": "#b8609a", "orange": "#a87b00",
    "sky": "#5b83d6", "violet": "#8447d8", "crimson": "#b53c50",
}  # fmt: skip
GRAY = "#66707c"  # of baselines and of what is no method
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")  # lengths of strokes and gaps, as in SVG
MARKERS = "os^Dv<>pX*P"  # matplotlib's letters

# Name -> hue, preferred dash (its place in DASHES), marker. A planned paper stands under its key, without "_".
METHODS: dict[str, tuple[str, int, str]] = {
    # what the book compares with: nothing special done, or everything trained
    "full": ("gray", 0, "o"), "dense": ("gray", 0, "s"), "adam": ("gray", 0, "^"), "adamw": ("gray", 0, "D"),
    "sgd": ("gray", 4, "o"), "pretrained": ("gray", 3, "o"), "clean": ("gray", 0, "v"), "head": ("gray", 2, "o"),
    "biases": ("gray", 3, "s"), "gaussian": ("gray", 1, "X"),
    # updates of a weight, and their ranks
    "lora": ("blue", 0, "o"), "svfit": ("violet", 0, "s"), "randlora": ("vermillion", 0, "^"),
    "nola": ("crimson", 0, "D"), "loldu": ("orange", 1, "v"), "lorasb": ("vermillion", 1, "<"),
    "lorasqueeze": ("green", 1, ">"), "allora": ("violet", 1, "p"), "balora": ("purple", 1, "X"),
    "sara": ("crimson", 1, "*"), "sora": ("green", 0, "D"), "increlora": ("vermillion", 2, "v"),
    "diffora": ("violet", 2, "<"), "codyra": ("purple", 2, ">"), "bayesianlora": ("orange", 3, "p"),
    "artificialentanglement": ("orange", 0, "X"), "mps": ("orange", 0, "X"),
    "dora": ("sky", 0, "s"), "rslora": ("orange", 2, "^"), "lora+": ("crimson", 2, "v"), "pissa": ("purple", 0, "D"),
    "adalora": ("sky", 2, "p"), "loraxs": ("green", 3, "X"), "vera": ("violet", 3, "*"),
    # low-rank gradients, and weights that are low-rank from the start
    "galore": ("vermillion", 0, "s"), "fira": ("green", 1, "o"), "dctadamw": ("violet", 2, "D"),
    "efficientpretraining": ("orange", 3, "v"), "sltrain": ("purple", 0, "^"), "lost": ("sky", 1, "<"),
    "sst": ("crimson", 3, ">"), "lowrank": ("orange", 1, "s"), "relora": ("blue", 2, "p"),
    "wba": ("orange", 1, "s"), "tworateadam": ("gray", 1, "P"), "randombasis": ("crimson", 1, "X"),
    "fixedbasis": ("crimson", 2, "s"), "sparseonly": ("green", 2, "D"),
    # trained networks made low-rank
    "maestro": ("vermillion", 0, "D"), "trp": ("green", 1, "s"), "welore": ("violet", 2, "s"),
    "pela": ("orange", 3, "s"), "svd": ("sky", 1, "o"), "factors": ("orange", 2, "o"), "ordered": ("purple", 3, "^"),
    # few bits
    "hgf": ("vermillion", 0, "v"), "lowprecision": ("green", 1, "^"), "bitlinear": ("violet", 2, "o"),
    "ternary": ("violet", 2, "o"),
    # inputs that move
    "ramp": ("vermillion", 0, "p"), "natra": ("green", 1, "D"), "efficientrobustification": ("violet", 2, "^"),
    "lr0fm": ("orange", 3, "D"), "tokens": ("orange", 3, "D"), "frozen": ("gray", 3, "D"), "cgbc": ("crimson", 2, "X"),
    "rankingrobustness": ("purple", 3, "o"), "rmtgb": ("sky", 0, "X"), "mtgb": ("orange", 1, "o"),
    # rankers
    "bm25": ("gray", 4, "v"), "querylikelihood": ("gray", 1, "s"), "lsi": ("sky", 0, "^"),
    "lambdamart": ("orange", 0, "D"), "dualencoder": ("vermillion", 1, "v"), "knrm": ("purple", 1, "p"),
    "minilm": ("green", 0, "X"),
}  # fmt: skip


class Look(NamedTuple):
    """How a series is drawn: a CSS colour, a dash pattern of SVG ("" for a solid line), a marker of matplotlib."""

    colour: str
    dash: str
    marker: str


def method(name: str) -> str | None:
    """Return the entry of the map that a series' name begins with, or None: "LoRA r=4" and "LoRA, merged" are "lora".

    Case, spaces, hyphens and underscores do not count, so a paper's key finds what its name finds.
    """
    words = re.split(r"[\s,:()]+", name)
    for k in range(len(words), 0, -1):
        key = re.sub(r"[^a-z0-9+]", "", "".join(words[:k]).lower())
        if key in METHODS:
            return key
    return None


def colour(name: str) -> str:
    """Return the colour of a method; "LoRA r=4" has that of "LoRA", an unknown name always the same one.

    Args:
        name: a method's name or key, alone or followed by details.
    """
    key = method(name)
    if key is None:
        return list(HUES.values())[zlib.crc32(name.encode()) % len(HUES)]
    return _hue(METHODS[key][0])


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return how each series of one figure is drawn.

    Methods keep their colour; sizes of one method share it. Other series take the hues that no method here has. Dashes
    and markers differ as long as there are enough: a method gives way where another series came first.

    Args:
        names: the series of the figure, in their order.

    Raises:
        ValueError: more series that are no methods than hues are left.
    """
    keys = {name: method(name) for name in names}
    taken = {METHODS[key][0] for key in keys.values() if key}
    free = [hue for hue in HUES if hue not in taken]
    if (strangers := sum(key is None for key in keys.values())) > len(free):
        raise ValueError(f"names: got {strangers} series that are no methods, wanted at most {len(free)}, one a hue")
    found: dict[str, Look] = {}
    for name, key in keys.items():
        hue, dash, marker = METHODS[key] if key else (free.pop(0), 0, MARKERS[0])
        dashes = [*DASHES[dash:], *DASHES[:dash]]
        markers = [marker, *MARKERS]
        found[name] = Look(
            _hue(hue),
            next((d for d in dashes if d not in {look.dash for look in found.values()}), dashes[0]),
            next((m for m in markers if m not in {look.marker for look in found.values()}), marker),
        )
    return found


def _hue(name: str) -> str:
    return GRAY if name == "gray" else HUES[name]
