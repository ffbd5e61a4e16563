import json
import re

import pytest

from lowrank_ref.lab.draw.explore import explore
from lowrank_ref.lab.draw.svg import line_chart


def small(**grids):
    return explore(lambda **v: {k: str(x) for k, x in v.items()}, title="T", alt="A", **grids)


def data(explorer):
    text = re.search(r"data-frames>(.*?)</script>", explorer.html, re.S).group(1)
    packed = json.loads(text)
    return ["\n".join(packed["lines"][i] for i in frame) for frame in packed["frames"]], packed


def test_every_frame_is_stored_in_the_order_of_the_grid():
    e = small(a=[1, 2], b=["x", "y", "z"])
    frames, packed = data(e)
    assert list(e.frames) == [(1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z")]
    assert frames == list(e.frames.values())
    assert packed["shown"] == [["1", "2"], ["x", "y", "z"]]


def test_the_middle_frame_stands_without_javascript():
    e = small(a=[1, 2], b=["x", "y", "z"])
    without = re.sub(r"<script.*?</script>", "", e.html, flags=re.S)
    assert e.frames[2, "y"] in without
    assert 'data-frame="4"' in without and e.frames[1, "x"] not in without


def test_output_is_deterministic_and_its_id_follows_the_content():
    one, two, other = small(a=[1, 2]), small(a=[1, 2]), small(a=[1, 3])
    assert one.html == two.html

    def name(e):
        return re.search(r'id="(lr-[0-9a-f]{12})"', e.html).group(1)

    assert name(one) != name(other)
    assert one.html.count(name(one)) == 2  # the element and the script that finds it
    assert repr(one) == "Explorer('T', 2 frames: a 1 ... 2)"


def test_accessible_structure():
    e = explore(lambda r: {"n": r}, title="<T>", alt='an "alt"', caption="c & d", labels={"r": "rank r"}, r=[1, 2, 4])
    assert e.html.startswith('<div class="lr-explore" id="')
    assert 'role="group" aria-label="an &quot;alt&quot;"' in e.html
    assert "&lt;T&gt;" in e.html and "c &amp; d" in e.html
    assert re.search(
        r'<label><span[^>]*>rank r</span><input type="range" min="0" max="2" value="1"[^>]*></label>', e.html
    )
    assert 'data-lm-suppress-shortcuts="true" disabled></label>' in e.html  # JupyterLab's keys
    assert e.html.count('aria-live="off"') == 1 and e.html.count('role="status"') == 1  # one voice only


def test_units_follow_every_value():
    e = explore(
        lambda gap: {"n": gap}, title="t", alt="a", labels={"gap": "period"}, units={"gap": "steps"}, gap=[1, 20]
    )
    assert 'aria-valuetext="20 steps"' in e.html and ">20 steps</output>" in e.html
    assert data(e)[1]["shown"] == [["1 steps", "20 steps"]]
    assert repr(e) == "Explorer('t', 2 frames: gap 1 steps ... 20 steps)"


def test_a_frame_cannot_end_the_script():
    e = explore(lambda r: f"<p>{r}</p>", title="t", alt="a", r=["</script>"[2:], "b"])
    assert len(re.findall("</script>", e.html)) == 2
    assert data(e)[0] == list(e.frames.values())


def test_nothing_is_loaded_from_elsewhere():
    e = explore(lambda r: line_chart({"a": ([0, 1], [0, r])}, x_label="x", y_label="y"), title="t", alt="a", r=[1, 2])
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", e.html)


def test_shared_lines_are_stored_once():
    shared = "<p>" + "x" * 1000 + "</p>"
    e = explore(lambda r: f"{shared}\n<b>{r}</b>", title="t", alt="a", r=list(range(100)))
    assert len(e.html) < 12_000


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: small(), "got 0 sliders"),
        (lambda: small(a=[1, 2], b=[1, 2], c=[1, 2], d=[1, 2]), "got 4 sliders"),
        (lambda: small(a=[1]), "a: got 1 value"),
        (lambda: small(a=list(range(15)), b=list(range(14))), "got 210 frames"),
        (lambda: explore(lambda a: "x", title="t", alt="a", labels={"b": "?"}, a=[1, 2]), r"labels: got \['b'\]"),
        (lambda: explore(lambda a: "x", title="t", alt="a", units={"b": "?"}, a=[1, 2]), r"units: got \['b'\]"),
        (lambda: explore(lambda a: '<g id="x"/>', title="t", alt="a", a=[1, 2]), "an id or a script"),
        (lambda: explore(lambda a: "<script>", title="t", alt="a", a=[1, 2]), "an id or a script"),
        (lambda: explore(lambda a: str(a) * 100_000, title="t", alt="a", a=[1, 2]), r"got \d{3},\d{3} bytes"),
    ],
)
def test_explore_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_explore_refuses_other_frames():
    with pytest.raises(TypeError, match="frame: got int"):
        explore(lambda a: 3, title="t", alt="a", a=[1, 2])


def test_live_calls_the_same_function():
    pytest.importorskip("ipywidgets")
    seen = []
    e = explore(lambda r: seen.append(r) or {"r": r}, title="t", alt="a", labels={"r": "rank"}, r=[1, 2, 4])
    slider = e.live().children[0]
    assert slider.description == "rank" and slider.value == 2
    seen.clear()
    slider.value = 4
    assert seen == [4]


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_keyboard_moves_the_figure_and_says_the_value(show):
    page = show(small(a=list(range(1, 24)), b=["x", "y"]))
    first = page.get_by_label("a", exact=True)
    assert page.locator("dd").all_inner_texts() == ["12", "y"]
    first.focus()
    for key, value in {"ArrowRight": 13, "ArrowDown": 12, "PageUp": 14, "PageDown": 12, "Home": 1, "End": 23}.items():
        page.keyboard.press(key)
        assert first.get_attribute("aria-valuetext") == str(value), key
        assert page.locator("output").all_inner_texts() == [str(value), "y"]
        assert page.locator("dd").all_inner_texts() == [str(value), "y"]
    page.get_by_label("b", exact=True).focus()
    page.keyboard.press("Home")
    assert page.locator("dd").all_inner_texts() == ["23", "x"]
    assert page.locator("[data-frame]").get_attribute("data-frame") == "44"
    assert page.problems == []


@pytest.mark.browser
def test_mouse_and_touch_move_the_figure(show):
    page = show(small(a=[1, 2, 3]), touch=True)
    place = page.locator("input").bounding_box()
    page.mouse.click(place["x"] + 3, place["y"] + place["height"] / 2)
    assert page.locator("dd").all_inner_texts() == ["1"]
    page.touchscreen.tap(place["x"] + place["width"] - 3, place["y"] + place["height"] / 2)
    assert page.locator("dd").all_inner_texts() == ["3"]
    assert place["height"] >= 44  # a finger's width
    assert page.problems == []


@pytest.mark.browser
def test_the_frame_is_told_once_the_slider_rests(show):
    chart = explore(
        lambda r: line_chart({"a": ([0, 1], [0, r])}, x_label="x", y_label="y", alt=f"A line up to {r}."),
        title="t", alt="line", r=[1, 2, 3],
    )  # fmt: skip
    page = show(small(a=list(range(9)), b=["x", "y"]), chart)
    said = page.locator(".lr-said")
    page.evaluate(
        """() => { window.heard = []; new MutationObserver(() => heard.push(document.querySelector("[role=status]")
           .textContent)).observe(document.querySelector("[role=status]"), {childList: true}); }"""
    )
    assert said.all_text_contents() == ["", ""]  # silent until something moves
    page.get_by_label("a", exact=True).focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.get_by_label("r", exact=True).press("Home")
    page.wait_for_function("document.querySelectorAll('[role=status]')[1].textContent")
    assert page.evaluate("heard") == ["a 8; b y"]  # once, not four times
    assert said.nth(1).text_content() == "A line up to 1."
    assert page.problems == []


@pytest.mark.browser
def test_prints_figure_and_values_without_sliders(show):
    page = show(small(a=[1, 2, 3]))
    page.emulate_media(media="print")
    assert page.locator("dd").is_visible() and page.locator("output").is_visible()
    assert not page.locator("input").is_visible()


@pytest.mark.browser
def test_two_explorers_and_two_copies_of_one_work_apart(show):
    page = show(small(a=[1, 2, 3]), small(a=[1, 2, 4]), small(a=[1, 2, 3]))
    inputs = page.locator("input")
    inputs.nth(2).focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("dd").all_inner_texts() == ["2", "2", "3"]
    assert page.problems == []


@pytest.mark.browser
def test_fits_a_phone_and_needs_no_javascript(show):
    chart = explore(
        lambda r: line_chart({"a long name": ([0, 1], [0, r])}, x_label="x", y_label="y"),
        title="A title of some length that must wrap on a phone", alt="a", labels={"r": "a rather long label"},
        r=[1, 2],
    )  # fmt: skip
    page = show(chart, small(word=["short", "a very long value that has to fit"]), width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    still = show(chart, javascript=False)
    assert still.locator(".lr-explore svg.lr-chart").count() == 1
    assert still.locator("input").is_disabled()  # it would move nothing
