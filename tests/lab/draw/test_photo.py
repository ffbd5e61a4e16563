import base64
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lowrank_ref.lab.draw.photo import PhotoExplorer, explore_photo


def pixels(rows=24, columns=17):
    """Stripes, a box and some noise."""
    noise = np.random.default_rng(0).integers(0, 60, (rows, columns))
    noise[rows // 4 : rows // 2, 3:9] += 150
    return noise + 5 * np.arange(columns)


def explorer(X=None, **options) -> PhotoExplorer:
    options = {"title": "T", "alt": "A photograph.", **options}
    return explore_photo(pixels() if X is None else X, **options)


def decode(src):
    return np.asarray(Image.open(BytesIO(base64.b64decode(src.partition("base64,")[2]))).convert("L"), dtype=int)


def test_errors_and_bytes_against_a_slow_loop():
    X = pixels() / 255
    U, S, Vh = np.linalg.svd(X)
    e = explorer()
    assert e.most == len(e.errors) == len(e.share) == 12  # 1.25 · 24 · 17 / 41
    for r in range(1, 13):
        best = sum(S[i] * np.outer(U[:, i], Vh[i]) for i in range(r))
        assert e.errors[r - 1] == pytest.approx(np.linalg.norm(X - best) / np.linalg.norm(X), abs=1e-12)
        assert e.share[r - 1] == pytest.approx((best.shape[0] * r + r * best.shape[1]) / X.size)


def test_the_first_frame_stands_without_javascript():
    e = explorer(start=3)
    without = re.sub(r"<script.*?</script>", "", e.html, flags=re.S)
    best, lacks = (decode(src) for src in re.findall('src="(data:[^"]+)"', without))
    U, S, Vh = np.linalg.svd(pixels())
    wanted = (U[:, :3] * S[:3]) @ Vh[:3]
    assert np.abs(best - wanted).max() <= 0.5 + 1e-9
    assert np.abs(lacks - (127.5 + pixels() - wanted).clip(0, 255)).max() <= 0.5 + 1e-9
    assert f"<b>{100 * e.errors[2]:.1f} %</b>" in without and "<b>492 bytes</b>" in without
    assert "<b>1,632 bytes</b>" in without  # 4 · 24 · 17
    assert repr(e) == f"PhotoExplorer('T', rank 1 ... 12, rank 3: {100 * e.errors[2]:.1f} % error)"
    assert e.html == explorer(start=3).html


def test_a_matrix_of_low_rank_has_no_error():
    e = explorer(np.outer(np.arange(1, 13), np.arange(1, 13)))
    assert e.errors.max() < 1e-7


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: explorer(np.ones((3, 8, 8))), r"pixels: got shape \(3, 8, 8\)"),
        (lambda: explorer(np.ones((8, 193))), "each from 8 to 192"),
        (lambda: explorer(np.full((8, 8), 0.5)), "no whole numbers"),
        (lambda: explorer(np.full((8, 8), 256)), "no whole numbers"),
        (lambda: explorer(np.zeros((8, 8))), "only zeros"),
        (lambda: explorer(start=13), "start: got 13, wanted 1 to 12"),
        (lambda: explorer(np.random.default_rng(0).integers(0, 256, (192, 192))), r"pixels: got \d{3},\d{3} bytes"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def ready(page):
    """The sliders, once the page has computed."""
    page.wait_for_function("[...document.querySelectorAll('input')].every(input => !input.disabled)")
    return page.get_by_label("rank r", exact=True)


def place(element):
    """Where a part stands on the page, however far that is scrolled, and its size."""
    return element.evaluate("e => (b => [b.x + scrollX, b.y + scrollY, b.width, b.height])(e.getBoundingClientRect())")


@pytest.mark.browser
@pytest.mark.parametrize("shape", [(24, 17), (17, 24), (40, 40)])
def test_the_page_finds_the_same_svd(show, shape):
    X = pixels(*shape)
    e = explorer(X, start=2)
    U, S, Vh = np.linalg.svd(X)
    page = show(e)
    slider = ready(page).first
    slider.press("Home")
    for r in range(1, e.most + 1):
        assert page.locator("dd b").first.inner_text() == f"{100 * e.errors[r - 1]:.1f} %"
        assert page.locator("dd b").nth(1).inner_text() == f"{4 * r * sum(shape):,} bytes"
        assert page.locator("[data-frame]").get_attribute("data-frame") == str(r)
        wanted = ((U[:, :r] * S[:r]) @ Vh[:r]).clip(0, 255)
        assert np.abs(decode(page.locator("img").first.get_attribute("src")) - wanted).max() <= 0.5 + 1e-4
        slider.press("ArrowRight")
    assert page.problems == []


@pytest.mark.browser
def test_what_the_page_shows_first_is_what_python_drew(show):
    still, moving = show(explorer(), javascript=False), show(explorer())
    slider = ready(moving).first
    slider.press("ArrowRight")
    slider.press("ArrowLeft")
    for part in ("[data-dot]", "dd span", "dd b", "output"):
        for before, after in zip(still.locator(part).all(), moving.locator(part).all(), strict=True):
            assert before.text_content() == after.text_content()
            one, two = place(before), place(after)
            assert one == pytest.approx(two, abs=0.5), part
    assert still.locator("input").is_disabled()
    moving.wait_for_function("document.querySelector('.lr-said').textContent.startsWith('error ')")


@pytest.mark.browser
def test_two_copies_work_apart_and_fit_a_phone(show):
    page = show(explorer(), explorer(), width=360)
    ready(page).nth(1).press("End")
    assert page.locator("output").all_inner_texts() == ["1", "12"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.problems == []
