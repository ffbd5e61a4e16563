"""A figure with sliders that works on a static page: no kernel, no network, no library.

`explore` calls a function on a small grid, stores the results in the output, and adds native sliders with a few lines
of plain JavaScript. Without JavaScript the middle frame stays visible. With a kernel, `.live()` is the same function
behind ipywidgets.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from lowrank_ref.lab._tools import need
from lowrank_ref.lab.svg import readout

__all__ = ["Explorer", "explore"]

MOST_SLIDERS, MOST_FRAMES, MOST_BYTES = 3, 200, 150_000

Value = float | int | str
Frame = Callable[..., str | Mapping[str, Value]]

_STYLE = """<style>
.lr-explore{max-width:580px;margin:1em 0;padding:.9em 1em .7em;border-radius:10px;
border:1px solid color-mix(in srgb,currentColor 22%,transparent)}
.lr-explore .lr-title{margin:0 0 .5em;font-weight:600;line-height:1.3}
.lr-explore .lr-controls{display:grid;grid-template-columns:auto 1fr auto;gap:0 .9em;align-items:center}
.lr-explore .lr-row,.lr-explore label{display:contents}
.lr-explore input{width:100%;height:1.9em;margin:0;accent-color:#0072b2;cursor:pointer}
.lr-explore output{font-weight:600;font-variant-numeric:tabular-nums}
.lr-explore .lr-caption{margin:.6em 0 .2em;font-size:.88em;line-height:1.45;opacity:.85}
@media(max-width:480px){.lr-explore{padding:.7em .6em .5em}.lr-explore .lr-controls{display:block}
.lr-explore .lr-row{display:grid;grid-template:"name value" "input input"/1fr auto}
.lr-explore .lr-name{grid-area:name}.lr-explore input{grid-area:input}
.lr-explore output{grid-area:value;text-align:right}}
</style>"""

# Frames are lists of line numbers; together the lines of a frame are its HTML.
_SCRIPT = """<script>
document.querySelectorAll('[id="%s"]:not([data-ready])').forEach(root => {
  root.dataset.ready = "";
  const {lines, frames, shown} = JSON.parse(root.querySelector("[data-frames]").textContent);
  const inputs = [...root.querySelectorAll("input")], outputs = [...root.querySelectorAll("output")];
  const place = root.querySelector("[data-frame]");
  const draw = () => {
    let index = 0;
    inputs.forEach((input, k) => {
      const text = shown[k][+input.value];
      index = index * shown[k].length + +input.value;
      input.setAttribute("aria-valuetext", text);
      if (outputs[k].textContent !== text) outputs[k].textContent = text;
    });
    place.dataset.frame = index;
    place.innerHTML = frames[index].map(i => lines[i]).join("\\n");
  };
  inputs.forEach(input => input.addEventListener("input", draw));
  draw();
});
</script>"""


def explore(
    frame: Frame,
    *,
    title: str,
    alt: str,
    caption: str = "",
    labels: Mapping[str, str] | None = None,
    **grids: Sequence[Value],
) -> "Explorer":
    """Precompute `frame` on a grid and show it behind sliders.

    Args:
        frame: called as frame(name=value, ...); returns SVG or HTML text without ids and scripts (see `lab.svg`), or a
            dict of numbers and strings, shown as a row of named values. Text in which many frames share whole lines
            is stored compactly.
        title: one line above the figure.
        alt: what a reader who does not see the figure should know.
        caption: what to look for, below the figure.
        labels: slider name -> text beside it, for example {"rank": "rank r"}.
        grids: slider name -> its values, numbers or strings; 1 to 3 sliders, at least 2 values each, at most 200
            frames together.

    Returns:
        An Explorer, which a notebook shows; its middle frame is the one visible without JavaScript.

    Raises:
        ValueError: no slider or too many, a grid with a single value, labels for sliders that do not exist, ids or
            scripts in a frame, or more than 150 kB of HTML.
        TypeError: a frame that is neither text nor a mapping.

    Example:
        >>> e = explore(lambda rank: {"numbers": 2 * 64 * rank}, title="LoRA's size", alt="A count.", rank=[1, 2, 4])
        >>> e
        Explorer("LoRA's size", 3 frames: rank 1 ... 4)
    """
    if not 1 <= len(grids) <= MOST_SLIDERS:
        raise ValueError(f"grids: got {len(grids)} sliders, wanted 1 to {MOST_SLIDERS}")
    for name, values in grids.items():
        if len(values) < 2:
            raise ValueError(f"{name}: got {len(values)} value, wanted at least 2 to slide between")
    if strangers := set(labels or {}) - set(grids):
        raise ValueError(f"labels: got {sorted(strangers)}, wanted names of sliders: {sorted(grids)}")
    combinations = list(itertools.product(*grids.values()))
    if len(combinations) > MOST_FRAMES:
        raise ValueError(f"grids: got {len(combinations)} frames, wanted at most {MOST_FRAMES}")
    frames = {values: _html(frame(**dict(zip(grids, values)))) for values in combinations}
    return Explorer(frame, frames, {k: tuple(v) for k, v in grids.items()}, title, alt, caption, dict(labels or {}))


class Explorer:
    """Frames on a grid with sliders: `html` for pages, `frames[values]` for tests, `live()` for a kernel."""

    def __init__(
        self,
        frame: Frame,
        frames: dict[tuple, str],
        grids: dict[str, tuple],
        title: str,
        alt: str,
        caption: str,
        labels: dict[str, str],
    ):
        self.frame, self.frames, self.grids, self.labels = frame, frames, grids, labels
        self.title, self.alt, self.caption = title, alt, caption
        self.html = self._build()
        size = len(self.html.encode())
        if size > MOST_BYTES:
            raise ValueError(
                f"frames: got {size:,} bytes of HTML for {len(frames)} frames, wanted at most {MOST_BYTES:,} "
                "(fewer values, fewer points, or parts that frames share on lines of their own)"
            )

    def _build(self) -> str:
        lines: dict[str, int] = {}  # line -> its number; parts that frames share are stored once
        packed = [[lines.setdefault(line, len(lines)) for line in text.split("\n")] for text in self.frames.values()]
        shown = [[_show(value) for value in values] for values in self.grids.values()]
        data = json.dumps(
            {"lines": list(lines), "frames": packed, "shown": shown}, ensure_ascii=False, separators=(",", ":")
        ).replace("</", "<\\/")  # "</script>" inside a string must not end the element
        middles = [len(values) // 2 for values in self.grids.values()]
        middle = 0
        for k, values in zip(middles, self.grids.values()):
            middle = middle * len(values) + k
        controls = "\n".join(
            f'<div class="lr-row"><label><span class="lr-name">{escape(self.labels.get(name, name))}</span>'
            f'<input type="range" min="0" max="{len(texts) - 1}" value="{k}" aria-valuetext="{escape(texts[k])}">'
            # A fixed width for the value keeps the slider still while its value changes.
            f'</label><output aria-live="polite" style="min-width:{max(map(len, texts))}ch">'
            f"{escape(texts[k])}</output></div>"
            for name, texts, k in zip(self.grids, shown, middles)
        )
        caption = f'<p class="lr-caption">{escape(self.caption)}</p>\n' if self.caption else ""
        body = (
            f'role="group" aria-label="{escape(self.alt)}">\n{_STYLE}\n<p class="lr-title">{escape(self.title)}</p>\n'
            f'<div data-frame="{middle}">\n{list(self.frames.values())[middle]}\n</div>\n'
            f'<div class="lr-controls">\n{controls}\n</div>\n{caption}'
            f'<script type="application/json" data-frames>{data}</script>\n'
        )
        name = "lr-" + hashlib.sha256(body.encode()).hexdigest()[:12]
        return f'<div class="lr-explore" id="{name}" {body}{_SCRIPT % name}\n</div>'

    def live(self) -> Any:
        """Return ipywidgets sliders that call the function anew: for a kernel, and for finer thoughts than the grid."""
        widgets, display = need("ipywidgets"), need("IPython.display", "ipython")

        def show(**values: Value) -> None:
            display.display(display.HTML(_html(self.frame(**values))))

        sliders = {
            name: widgets.SelectionSlider(
                options=[(_show(v), v) for v in values],
                value=values[len(values) // 2],
                description=self.labels.get(name, name),
            )
            for name, values in self.grids.items()
        }
        return widgets.interactive(show, **sliders)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        grids = ", ".join(f"{name} {_show(v[0])} ... {_show(v[-1])}" for name, v in self.grids.items())
        return f"Explorer({self.title!r}, {len(self.frames)} frames: {grids})"


def _html(frame: object) -> str:
    if isinstance(frame, Mapping):
        frame = readout(frame)
    if not isinstance(frame, str):
        raise TypeError(f"frame: got {type(frame).__name__}, wanted SVG text or a mapping of named values")
    if " id=" in frame or "<script" in frame:
        raise ValueError("frame: got an id or a script in its HTML, wanted none: frames replace each other in one page")
    return str(frame)


def _show(value: Value) -> str:
    return f"{value:g}".replace("-", "−") if isinstance(value, float) else str(value)
