"""One colour a method: every planned paper has one, those that meet in a figure differ, all are seen on both pages."""

import re
from pathlib import Path

import pytest

from lowrank_ref.core.registry import PARTS, papers
from lowrank_ref.lab.draw import palette, plots, svg
from lowrank_ref.lab.draw.palette import DASHES, GRAY, HUES, METHODS, colour, looks, method

CSS = Path(__file__).parents[3] / "book" / "theme" / "book.css"
PLANNED = {part: keys for part, (_, keys) in PARTS.items()}

#: Methods that meet, or will meet, in one figure: nobody should need a dash to tell them apart.
MEET = [
    ("full", "LoRA", "DoRA", "rsLoRA", "LoRA+", "PiSSA"),
    ("full", "LoRA", "DoRA", "PiSSA", "RandLoRA", "SoRA", "MPS"),
    ("full", "LoRA", "SoRA", "IncreLoRA", "DiffoRA", "CoDyRA", "AdaLoRA", "Bayesian-LoRA"),
    ("full", "LoRA", "LoRA-SB", "LoRA-XS", "PiSSA", "rsLoRA", "DoRA"),
    ("AdamW", "GaLore", "Fira", "DCT-AdamW", "low-rank", "LoRA"),
    ("full rank", "low-rank", "SLTrain", "GaLore", "LOST", "SST", "ReLoRA"),
    ("dense", "Maestro", "TRP", "WeLore", "PELA", "SVD"),
    ("full", "HGF", "ternary", "low_precision"),
    ("clean", "RAMP", "NaTra", "Efficient robustification", "LoRA"),
]


def contrast(one, other):
    """Of WCAG: 1 for the same luminance, 21 for black on white."""

    def luminance(hue):
        parts = [int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def grounds():
    """The page's ground in light and dark."""
    return re.findall(r"--pst-color-background: (#[0-9a-f]+)", CSS.read_text())


def test_contrast_knows_its_ends():
    assert contrast("#000000", "#ffffff") == 21 and contrast("#123456", "#123456") == 1
    assert contrast("#56b4e9", "#ffffff") < 3  # Okabe and Ito's sky, as it was


@pytest.mark.parametrize("hue", [*HUES.values(), GRAY])
def test_lines_are_seen_on_white_and_on_the_dark_page(hue):
    grounds_of_pages = [{"#fff": "#ffffff"}.get(ground, ground) for ground in grounds()]
    assert len(grounds_of_pages) == 2
    for ground in grounds_of_pages:
        assert contrast(hue, ground) >= 3, f"{hue} on {ground}"


def test_the_lit_terms_of_equations_use_the_same_hues():
    named = re.findall(r"--hue: (#[0-9a-f]+)", (CSS.parent / "columns.css").read_text())
    assert named and set(named) <= set(HUES.values())


def test_every_planned_paper_has_a_colour_under_its_key():
    missing = [key for keys in PLANNED.values() for key in keys if method(key) != key.replace("_", "")]
    assert missing == []


def test_a_papers_name_finds_what_its_key_finds():
    for paper in papers().values():
        if method(paper.name):
            assert colour(paper.name) == colour(paper.key), paper.name
    assert method("R-MTGB") == method("r_mtgb") == "rmtgb" and method("MPS") and method("SaRA") == method("sara")


def test_details_do_not_change_a_colour():
    for name in ("LoRA", "LoRA r=4", "LoRA, best possible", "lora", "LoRA: r 8"):
        assert method(name) == "lora"
    assert method("LoRA+ r=8") == "lora+" and method("LoRA-XS r=8") == "loraxs"
    assert method("full fine-tuning") == "full" and method("low-rank r=3") == "lowrank"
    assert method("W = B·A") == method("W = BA") == "wba"
    assert method("two-rate Adam") == "tworateadam" and method("Adam, two rates") == "adam"
    assert method("floor") is None and method("LoRAx") is None and method("") is None


def test_each_look_is_given_once():
    """Names of one thing share a look; no two things have one."""
    same = [("mps", "artificialentanglement"), ("lr0fm", "tokens"), ("bitlinear", "ternary"), ("lowrank", "wba")]
    for one, other in same:
        assert METHODS[one] == METHODS[other]
    left = {key: look for key, look in METHODS.items() if key not in [other for _, other in same]}
    assert len(set(left.values())) == len(left)


@pytest.mark.parametrize("part", PLANNED)
def test_the_papers_of_a_part_differ_in_hue_or_dash(part):
    seen = [METHODS[key.replace("_", "")][:2] for key in PLANNED[part]]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("together", MEET, ids=lambda names: names[1])
def test_methods_that_meet_differ_in_hue(together):
    assert all(map(method, together))
    assert len({colour(name) for name in together}) == len(together)
    drawn = looks(together).values()
    assert len({look.marker for look in drawn}) == len(together)
    assert len({look.dash for look in drawn}) == min(len(together), len(DASHES))


def test_matplotlib_and_svg_agree():
    names = ["LoRA", "GaLore", "full", "floor"]
    chart = svg.line_chart({name: ([0, 1], [k, k + 1]) for k, name in enumerate(names)}, x_label="x", y_label="y")
    for name in names[:3]:
        assert f'stroke="{plots.colour(name)}"' in chart
    assert f'fill="{plots.colour("LoRA")}"' in svg.bar_chart({"LoRA": 1.0, "x": 2.0}, x_label="x", y_label="y")


def test_strangers_take_what_no_method_has():
    drawn = looks(["floor", "RandLoRA", "ceiling", "LoRA"])
    assert drawn["RandLoRA"].colour == HUES["vermillion"] and drawn["LoRA"].colour == HUES["blue"]
    assert len({look.colour for look in drawn.values()}) == 4
    with pytest.raises(ValueError, match="got 9 series that are no methods, wanted at most 8"):
        looks(map(str, range(9)))


def test_sizes_of_one_method_share_its_hue_and_differ_in_dash():
    drawn = looks(["LoRA r=1", "LoRA r=4", "LoRA r=8"])
    assert {look.colour for look in drawn.values()} == {HUES["blue"]}
    assert len({look.dash for look in drawn.values()}) == len({look.marker for look in drawn.values()}) == 3


def test_an_unknown_name_keeps_its_colour():
    assert colour("something new") == colour("something new") in HUES.values()


def test_dashes_become_matplotlibs():
    assert plots.line(palette.Look("#000000", "", "o"))["linestyle"] == "-"
    assert plots.line(palette.Look("#000000", "11 2.2", "o"))["linestyle"] == (0, (5.0, 1.0))
