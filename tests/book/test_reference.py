"""The reference: what is made of a docstring, and what the written pages show."""

import json

import api_pages
import registry_pages
from docstrings import blocks_kept, linked, summary
from finish_pages import searchable
from reading import HTML, PAGES, needs_pages, soup

from lowrank_ref.core.registry import papers
from lowrank_ref.optimizers import GaLoreAdamW, GaLoreSGD
from lowrank_ref.ranks import SoRALinear

NAMES = {"a.b.prune": "a.b.prune", "a.b.Gate": "a.b.Gate", "Gate": "a.b.Gate", "a.c": "a.c"}


def test_names_become_links():
    assert linked(["`prune` and `prune()`, `rank`"], NAMES, "a.b") == [
        ":py:obj:`prune <a.b.prune>` and :py:obj:`prune <a.b.prune>`, `rank`"
    ]
    assert linked(["`prune(net, rank=2)`, `rank(2)`, `prune(a <b>)`"], NAMES, "a.b") == [
        ":py:obj:`prune(net, rank=2) <a.b.prune>`, `rank(2)`, `prune(a <b>)`"
    ]
    assert linked(["`Gate` in `c.py`, ``Gate``, :py:obj:`Gate`"], NAMES, "a.d") == [
        ":py:obj:`Gate <a.b.Gate>` in :py:obj:`c.py <a.c>`, ``Gate``, :py:obj:`Gate`"
    ]


def test_no_links_in_code():
    lines = ["See `prune`:", "", "::", "", "    x  `prune`", "", ">>> `prune`", ":param prune: a `prune`"]
    found = linked(lines, NAMES, "a.b")
    assert found[4:7] == lines[4:7] and found[0] != lines[0]
    assert found[7] == ":param prune: a :py:obj:`prune <a.b.prune>`"


def test_papers_are_links():
    (line,) = linked(["arXiv 2402.06827v2; (Madry, 1706.06083), version 1.2345, 0.12345"], {}, "a")
    assert line == (
        "`arXiv 2402.06827v2 <https://arxiv.org/abs/2402.06827v2>`__; "
        "(Madry, `1706.06083 <https://arxiv.org/abs/1706.06083>`__), version 1.2345, 0.12345"
    )


def test_indented_blocks_keep_their_lines():
    block = ["Papers:", "", "    lora   one", "    sora   two", "", "More."]
    assert blocks_kept(block) == ["Papers:", "", "::", "", *block[2:]]
    for kept in (
        ["Args:", "    x: y", "", "    z: one"],
        ["- a list", "", "    goes on"],
        ["As::", "", "    code"],
        ["Example:", "    >>> 1", "    1"],
    ):
        assert blocks_kept(kept) == kept


def test_a_summary_is_one_sentence():
    assert summary("One `x`,\nin two lines. Two.\n\nThree.") == "One `x`, in two lines."
    assert summary(None) == ""


def test_options_of_a_base_are_shown():
    found = api_pages.whole_signature(GaLoreAdamW).parameters
    assert {"betas", "eps", "rank", "gap", "side", "basis"} <= set(found) and not {"own", "options"} & set(found)
    assert repr(found["basis"].default) == "gram_basis"
    assert {"gate", "alpha", "dropout"} <= set(api_pages.whole_signature(SoRALinear).parameters)
    assert api_pages.whole_signature(GaLoreSGD) is None  # its base says it all


@needs_pages
def test_no_class_hides_its_arguments():
    for page in (name for name in PAGES if name.startswith("api/")):
        shown = [tag.get_text() for tag in soup(page).select("dl.class > dt")]
        assert not [text for text in shown if "*args: Any" in text]  # a Protocol has a bare *args


def test_the_packages_name_is_not_searched():
    index = {
        "objects": {
            "lowrank_ref": [[0, 0, 0, "-", "core"]],
            "lowrank_ref.core": [[1, 1, 1, "", "svd"], [2, 1, 1, "x", "rank"]],
        },
        "objnames": {"0": ["py", "module", "m"], "1": ["py", "function", "f"]},
        "terms": {"lowrank_ref": 1, "rank": 2},
        "titleterms": {"lowrank_ref": 1},
    }
    found = json.loads(searchable(f"Search.setIndex({json.dumps(index)})")[len("Search.setIndex(") : -1])
    assert found["objects"] == {
        "": [[0, 0, 0, "module-lowrank_ref.core", "core"]],
        "core": [[1, 1, 1, "lowrank_ref.core.svd", "svd"], [2, 1, 1, "x", "rank"]],
    }
    assert found["terms"] == {"rank": 2} and found["titleterms"] == {}


@needs_pages
def test_package_pages_tell_each_name_in_a_line():
    for package in api_pages.public_packages():
        page = soup(f"api/{package}.html")
        text = page.select_one("article").get_text(" ")
        names = getattr(api_pages.loaded(package), "__all__", [])
        assert all(name in text for name in names) and "what it is" in text
        linked_names = [link.get_text() for link in page.select("td a code")]
        assert not names or len(set(linked_names) & set(names)) >= 0.6 * len(names)


@needs_pages
def test_chapters_and_reference_link_to_each_other():
    for paper in papers().values():
        page = f"api/lowrank_ref.{paper.part}.{paper.key}.html"
        assert soup(f"{paper.part}/{paper.key}.html").select(f'a[href="../{page}"]')
        assert soup(page).select(f'a[href="../{paper.part}/{paper.key}.html"]')
        assert soup(page).select(f'a[href^="https://arxiv.org/abs/{paper.arxiv.partition("v")[0]}"]')


@needs_pages
def test_inherited_members_are_shown():
    ids = {tag["id"] for tag in soup("api/lowrank_ref.ranks.sora.html").select("dt[id]")}
    home = "lowrank_ref.ranks.sora"
    assert {f"{home}.ProximalGates.attach", f"{home}.SoRALinear.merged"} <= ids
    assert f"{home}.SoRALinear.requires_grad_" not in ids


def test_the_best_rate_is_that_of_the_lowest_mean():
    losses = {0.1: (1.0, 4.0), 0.2: (2.0, 2.0), 0.4: (0.5, 5.0)}
    runs = [(lr, seed, loss) for lr, both in losses.items() for seed, loss in enumerate(both)]
    rows = [{"method": "a", "lr": lr, "seed": seed, "loss": loss} for lr, seed, loss in runs]
    rows += [{"method": "b", "lr": 0.8, "seed": 0, "loss": 0.0}]
    assert registry_pages.best_rate(rows, "a", "loss") == (0.2, True)
    assert registry_pages.best_rate(rows[:4], "a", "loss") == (0.2, False)


@needs_pages
def test_the_chooser_tells_a_rate_for_each_sweep():
    rows = soup("chooser.html").select('[aria-label="Learning rates"] tbody tr')
    assert [row.a.get_text() for row in rows] == [papers()[key].name for key in registry_pages.SWEEPS]


#: Their chapters sweep no rate of Adam; the chooser says so, or they train nothing.
NO_RATE = {"trp", "maestro", "ramp", "cgbc", "ranking_robustness", "r_mtgb", "artificial_entanglement"}


def test_every_method_with_a_rate_tells_where_to_start():
    assert set(registry_pages.SWEEPS) | NO_RATE == set(papers())
    assert list(registry_pages.SWEEPS) == [key for key in papers() if key not in NO_RATE]


@needs_pages
def test_a_stored_page_does_not_hold_the_whole_environment():
    """Every page is read several times while the book is built."""
    sizes = {path.stem: path.stat().st_size for path in (HTML.parent / ".doctrees" / "api").glob("*.doctree")}
    assert len(sizes) > 100 and max(sizes.values()) < 1_500_000
