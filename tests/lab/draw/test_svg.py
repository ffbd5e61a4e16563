import base64
import math
import re
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

from lowrank_ref.lab.draw import svg

NS = {"s": "http://www.w3.org/2000/svg"}


def parse(picture):
    return ET.fromstring(str(picture))


def chart(series=None, **options):
    series = {"a": ([0, 1, 2], [1.0, 4.0, 2.0]), "b": ([0, 1, 2], [2.0, 2.0, 2.0])} if series is None else series
    return svg.line_chart(series, **{"x_label": "step", "y_label": "loss (nats)", **options})


def texts(picture):
    return [t.text for t in parse(picture).iter(f"{{{NS['s']}}}text")]


# --- all pictures -----------------------------------------------------------------------------------------------------

PICTURES = {
    "line": chart(marks={"here": 1.0}, dots=["b"]),
    "bar": svg.bar_chart({"1": 1.0, "2": -0.5}, x_label="index", y_label="size"),
    "image": svg.image({"W": np.eye(3), "colour": np.zeros((3, 2, 2))}),
}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_pictures_are_xml_with_a_name_and_no_ids(picture):
    root = parse(picture)
    assert root.get("role") == "img" and len(root.get("aria-label")) > 10
    assert " id=" not in picture
    assert root.get("fill") == "currentColor"  # text follows the page's theme
    assert picture._repr_html_() == picture


def test_text_is_escaped():
    picture = chart({"<b> & co": ([0, 1], [0, 1])}, y_label='a "quoted" <label>', alt="x < y")
    assert "<b> & co" in texts(picture) and parse(picture).get("aria-label") == "x < y"


def test_pictures_stack():
    both = PICTURES["line"] + svg.readout({"rank": 4})
    assert repr(both).startswith("Picture(Line chart of loss (nats) against step for a, b.")
    assert isinstance(both, svg.Picture) and both.count("<svg") >= 2 and "<dl" in both


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("colour", svg.PALETTE)
def test_palette_contrasts_with_white_and_with_near_black(colour):
    light, dark = _luminance("#ffffff"), _luminance("#14181e")
    own = _luminance(colour)
    assert (light + 0.05) / (own + 0.05) >= 3 and (own + 0.05) / (dark + 0.05) >= 3


# --- line chart -------------------------------------------------------------------------------------------------------


def _curves(picture):
    inner = parse(picture).find("s:svg", NS)
    return [
        np.array([[float(v) for v in p.split()] for p in re.split("[ML]", path.get("d"))[1:]])
        for path in inner.findall("s:path", NS)
    ], inner


def test_line_chart_draws_the_numbers():
    curves, inner = _curves(chart(x_range=(0, 2), y_range=(0, 4)))
    w, h = float(inner.get("width")), float(inner.get("height"))
    assert np.allclose(curves[0], [[0, h * 0.75], [w / 2, 0], [w, h / 2]], atol=0.11)
    assert np.allclose(curves[1][:, 1], h / 2, atol=0.11)


def test_log_axes():
    curves, inner = _curves(
        chart({"a": ([1, 10, 100], [0.01, 0.1, 1.0])}, log_x=True, log_y=True, x_range=(1, 100), y_range=(0.01, 1))
    )
    w, h = float(inner.get("width")), float(inner.get("height"))
    assert np.allclose(curves[0], [[0, h], [w / 2, h / 2], [w, 0]], atol=0.11)
    assert {"1", "10", "100", "0.01", "0.1"} <= set(
        texts(chart({"a": ([1, 10, 100], [0.01, 0.1, 1.0])}, log_x=True, log_y=True))
    )


def test_gaps_interrupt_a_curve():
    d = chart({"a": ([0, 1, 2, 3, 4], [1, 2, math.nan, 4, math.inf])})
    path = parse(d).find("s:svg/s:path", NS).get("d")
    assert path.count("M") == 2 and path.count("L") == 1
    log = chart({"a": ([0, 1, 2], [1, 0, 4])}, log_y=True)  # 0 has no place on a log axis
    assert parse(log).find("s:svg/s:path", NS).get("d").count("M") == 2


def test_long_curves_are_thinned_but_keep_their_ends():
    curves, inner = _curves(chart({"a": (np.arange(5000), np.arange(5000))}, x_range=(0, 4999)))
    assert len(curves[0]) == 120
    assert curves[0][0, 0] == 0 and curves[0][-1, 0] == pytest.approx(float(inner.get("width")), abs=0.11)


def test_every_curve_is_named_and_names_do_not_overlap():
    series = {f"method {i}": ([0, 1], [0, 1 + i / 1000]) for i in range(6)}
    root = parse(chart(series))
    places = {t.text: float(t.get("y")) for t in root.findall("s:text", NS) if (t.text or "").startswith("method")}
    assert set(places) == set(series)
    ys = sorted(places.values())
    assert min(np.diff(ys)) >= 18.9 and ys[-1] < 290
    dashes = {p.get("stroke-dasharray") for p in root.findall("s:svg/s:path", NS)}
    assert len(dashes) == 6  # curves differ without colour too


def test_dots_and_marks_and_colours():
    root = parse(chart(dots=["b"], marks={"refresh": 1, "outside": 9}, x_range=(0, 2), colours={"a": "currentColor"}))
    assert len(root.findall("s:svg/s:g/s:circle", NS)) == 3
    assert root.find("s:svg/s:path", NS).get("stroke") == "currentColor"
    assert "refresh" in [t.text for t in root.findall("s:text", NS)]
    assert "outside" not in [t.text for t in root.findall("s:text", NS)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: chart({}), "series: got 0"),
        (lambda: chart({str(i): ([0], [0]) for i in range(9)}), "got 9 series"),
        (lambda: chart({"a": ([0, 1], [1])}), "got shapes"),
        (lambda: chart({"a": ([0], [math.nan])}), "no finite point"),
        (lambda: chart(y_range=(1, 1)), "y_range: got"),
        (lambda: chart(x_range=(0, 2), log_x=True), "low > 0"),
    ],
)
def test_line_chart_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_constant_curve_and_single_point_have_an_axis():
    assert len(texts(chart({"a": ([3], [5.0])}))) > 4
    assert len(texts(chart({"a": ([0, 1], [0.0, 0.0])}))) > 4


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7.5), (0.001, 0.0013), (0, 25_856), (-1e-9, 1e-9)])
def test_ticks_are_few_even_and_inside(low, high):
    ticks = svg._ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
    margin = 1e-6 * (high - low)
    assert ticks[0] >= low - margin and ticks[-1] <= high + margin


def test_tick_labels():
    assert svg._tick_label(-0.5, False) == "−0.5"
    assert svg._tick_label(1e-5, True) == "10⁻⁵"
    assert svg._tick_label(2e6, False) == "2·10⁶"
    assert svg._tick_label(0.0, False) == "0"
    assert svg._n(-0.04) == "0" and svg._n(12.0) == "12" and svg._n(12.34) == "12.3"


# --- bars -------------------------------------------------------------------------------------------------------------


def test_bars_have_their_heights_and_stand_on_zero():
    rects = parse(svg.bar_chart({"a": 1.0, "b": 2.0, "c": -1.0}, x_label="x", y_label="y")).findall("s:rect", NS)
    a, b, c = ({k: float(r.get(k)) for k in ("y", "height")} for r in rects)
    assert b["height"] == pytest.approx(2 * a["height"], abs=0.2) and c["height"] == pytest.approx(a["height"], abs=0.2)
    zero = a["y"] + a["height"]
    assert b["y"] + b["height"] == pytest.approx(zero, abs=0.2) and c["y"] == pytest.approx(zero, abs=0.2)


def test_bar_chart_refuses():
    with pytest.raises(ValueError, match="bars: got"):
        svg.bar_chart({}, x_label="x", y_label="y")
    with pytest.raises(ValueError, match="bars: got"):
        svg.bar_chart({"a": math.inf}, x_label="x", y_label="y")


# --- images -----------------------------------------------------------------------------------------------------------


def _pixels(picture):
    """Decode every PNG of a picture with the standard library: filter 0, 8 bit, as `png` writes them."""
    for href in re.findall(r'base64,([^"]+)"', picture):
        png = base64.b64decode(href)
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
        channels = {0: 1, 2: 3}[png[25]]
        start = png.index(b"IDAT") + 4
        raw = zlib.decompress(png[start : png.index(b"IEND") - 8])
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(height, 1 + width * channels)
        assert not rows[:, 0].any()
        yield rows[:, 1:].reshape(height, width, channels).squeeze()


def test_image_is_pixel_exact():
    values = np.array([[0.0, 0.5], [1.0, 0.25]])
    (pixels,) = _pixels(svg.image(values))
    assert pixels.tolist() == [[0, 128], [255, 64]]
    one, two = _pixels(svg.image({"a": values, "b": 2 * values}))  # one scale for all
    assert one.max() == 128 and two.max() == 255
    (clipped,) = _pixels(svg.image(values, low=0.5, high=0.75))
    assert clipped.tolist() == [[0, 0], [255, 0]]


def test_image_opens_in_an_independent_decoder():
    from io import BytesIO

    from PIL import Image

    colour = np.random.default_rng(0).random((3, 5, 7))
    href = re.search(r'base64,([^"]+)"', svg.image(colour, high=1.0)).group(1)
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(href))))
    assert np.abs(pixels / 255 - colour.transpose(1, 2, 0)).max() <= 0.5 / 255 + 1e-9


def test_signed_image_is_white_at_zero_blue_below_orange_above():
    (pixels,) = _pixels(svg.image(np.array([[-2.0, 0.0, 2.0]]), signed=True))
    negative, zero, positive = pixels
    assert zero.tolist() == [255, 255, 255]
    assert negative[2] > negative[0] and positive[0] > positive[2]


def test_images_side_by_side_stay_inside():
    root = parse(svg.image({str(i): np.ones((2, 2)) for i in range(6)}, columns=4))
    _, _, width, height = map(float, root.get("viewBox").split())
    for item in root.findall("s:image", NS):
        x, y, w, h = (float(item.get(k)) for k in ("x", "y", "width", "height"))
        assert x + w <= width + 0.2 and y + h <= height + 0.2


@pytest.mark.parametrize(
    "pictures, message",
    [({}, "got none"), (np.zeros(3), "got shape"), (np.zeros((0, 3)), "got shape"), (np.full((2, 2), np.nan), "NaN")],
)
def test_image_refuses(pictures, message):
    with pytest.raises(ValueError, match=message):
        svg.image(pictures)


def test_readout_formats():
    html = svg.readout({"a < b": 0.123456, "n": 1024, "negative": -0.5, "word": "yes"})
    assert "a &lt; b" in html and ">0.1235<" in html and ">1024<" in html and ">−0.5<" in html
