"""A figure with sliders that works on a static page: no kernel, no network, no library.

`explore` calls a function on a small grid, stores the results in the output, and adds native sliders with a few lines
of plain JavaScript. Without JavaScript the middle frame stays visible. With a kernel, `.live()` is the same function
behind ipywidgets.

A screen reader hears the slider's own value at once, and the numbers below the figure when the slider has come to rest.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from lowrank_ref.lab._tools import need
from lowrank_ref.lab.draw.svg import readout

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
.lr-explore dl dt,.lr-explore dl dd{float:none;width:auto}
.lr-explore .lr-caption{margin:.6em 0 .2em;font-size:.88em;line-height:1.45;opacity:.85}
.lr-explore .lr-said{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media(pointer:coarse){.lr-explore input{height:44px}}
@media print{.lr-explore{break-inside:avoid}.lr-explore input{display:none}
.lr-explore .lr-controls{grid-template-columns:auto 1fr}}
@media(max-width:480px){.lr-explore{padding:.7em .6em .5em}.lr-explore .lr-controls{display:block}
.lr-explore .lr-row{display:grid;grid-template:"name value" "input input"/1fr auto}
.lr-explore .lr-name{grid-area:name}.lr-explore input{grid-area:input}
.lr-explore output{grid-area:value;min-width:0!important;text-align:right}}
</style>"""

# Says the numbers of a frame, or else the names of its pictures, once the slider has rested: not at every step.
TELL = """
  const said = root.querySelector("[role=status]");
  let rest;
  const tell = () => {
    clearTimeout(rest);
    rest = setTimeout(() => {
      const numbers = [...root.querySelectorAll("[data-frame] dt")].map(
        name => name.textContent + " " + name.nextElementSibling.textContent);
      const pictures = [...root.querySelectorAll("[data-frame] [aria-label]")].map(picture => picture.ariaLabel);
      said.textContent = (numbers.length ? numbers : pictures).join("; ");
    }, 600);
  };"""

# Frames are lists of line numbers; together the lines of a frame are its HTML.
_SCRIPT = (
    """<script>
document.querySelectorAll('[id="%s"]:not([data-ready])').forEach(root => {
  root.dataset.ready = "";
  const {lines, frames, shown} = JSON.parse(root.querySelector("[data-frames]").textContent);
  const inputs = [...root.querySelectorAll("input")], outputs = [...root.querySelectorAll("output")];
  const place = root.querySelector("[data-frame]");"""
    + TELL
    + """
  const draw = () => {
    let index = 0;
    inputs.forEach((input, k) => {
      const text = shown[k][+input.value];
      index = index * shown[k].length + +input.value;
      input.setAttribute("aria-valuetext", text);
      outputs[k].textContent = text;
    });
    place.dataset.frame = index;
    place.innerHTML = frames[index].map(i => lines[i]).join("\\n");
  };
  inputs.forEach(input => {
    input.disabled = false;
    input.addEventListener("input", () => { draw(); tell(); });
  });
  draw();
});
</script>"""
)


def explore(
    frame: Frame,
    *,
    title: str,
    alt: str,
    caption: str = "",
    labels: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
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
        units: slider name -> unit, shown and read aloud after each of its values, for example {"gap": "steps"}.
        grids: slider name -> its values, numbers or strings; 1 to 3 sliders, at least 2 values each, at most 200
            frames together.

    Returns:
        An Explorer, which a notebook shows; its middle frame is the one visible without JavaScript.

    Raises:
        ValueError: no slider or too many, a grid with a single value, labels or units for sliders that do not exist,
            ids or scripts in a frame, or more than 150 kB of HTML.
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
    for argument, given in {"labels": labels, "units": units}.items():
        if strangers := set(given or {}) - set(grids):
            raise ValueError(f"{argument}: got {sorted(strangers)}, wanted names of sliders: {sorted(grids)}")
    combinations = list(itertools.product(*grids.values()))
    if len(combinations) > MOST_FRAMES:
        raise ValueError(f"grids: got {len(combinations)} frames, wanted at most {MOST_FRAMES}")
    frames = {values: _html(frame(**dict(zip(grids, values)))) for values in combinations}
    return Explorer(
        frame,
        frames,
        {k: tuple(v) for k, v in grids.items()},
        title,
        alt,
        caption,
        dict(labels or {}),
        dict(units or {}),
    )


class Explorer:
    """Frames on a grid with sliders: `html` for pages, `frames[values]` for tests, `live()` for a kernel.

    Raises:
        ValueError: more than 150 kB of HTML.
    """

    def __init__(
        self,
        frame: Frame,
        frames: dict[tuple, str],
        grids: dict[str, tuple],
        title: str,
        alt: str,
        caption: str,
        labels: dict[str, str],
        units: dict[str, str],
    ):
        self.frame, self.frames, self.grids, self.labels = frame, frames, grids, labels
        self.shown = {
            name: [_show(v) + (f" {units[name]}" if name in units else "") for v in values]
            for name, values in grids.items()
        }
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
        middles = [len(values) // 2 for values in self.grids.values()]
        middle = 0
        for k, values in zip(middles, self.grids.values()):
            middle = middle * len(values) + k
        return box(
            title=self.title,
            alt=self.alt,
            caption=self.caption,
            frame=f'<div data-frame="{middle}">\n{list(self.frames.values())[middle]}\n</div>',
            sliders=[
                slider(self.labels.get(name, name), texts, k) for (name, texts), k in zip(self.shown.items(), middles)
            ],
            data={"lines": list(lines), "frames": packed, "shown": list(self.shown.values())},
            script=_SCRIPT,
        )

    def live(self) -> Any:
        """Return ipywidgets sliders that call the function anew: for a kernel, and for finer thoughts than the grid."""
        widgets, display = need("ipywidgets"), need("IPython.display", "ipython")

        def show(**values: Value) -> None:
            display.display(display.HTML(_html(self.frame(**values))))

        sliders = {
            name: widgets.SelectionSlider(
                options=list(zip(self.shown[name], values)),
                value=values[len(values) // 2],
                description=self.labels.get(name, name),
            )
            for name, values in self.grids.items()
        }
        return widgets.interactive(show, **sliders)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        grids = ", ".join(f"{name} {texts[0]} ... {texts[-1]}" for name, texts in self.shown.items())
        return f"Explorer({self.title!r}, {len(self.frames)} frames: {grids})"


def slider(label: str, texts: Sequence[str], start: int) -> str:
    """HTML of one slider over named values; it stays disabled where scripts do not run."""
    text = escape(texts[start])
    return (
        f'<div class="lr-row"><label><span class="lr-name">{escape(label)}</span>'
        f'<input type="range" min="0" max="{len(texts) - 1}" value="{start}" aria-valuetext="{text}" '
        # Arrow keys stay with the slider, in JupyterLab too; a fixed width of the value keeps it still while it moves.
        f'autocomplete="off" data-lm-suppress-shortcuts="true" disabled></label>'
        f'<output aria-live="off" style="min-width:{max(map(len, texts))}ch">'
        f"{text}</output></div>"
    )


def box(*, title: str, alt: str, caption: str, frame: str, sliders: Sequence[str], data: object, script: str) -> str:
    """The box that all explorers share: title, figure, sliders, caption, data, and a script that finds it by its id."""
    controls = "\n".join(sliders)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("</", "<\\/")  # "</script>" inside a string must not end the element
    below = f'<p class="lr-caption">{escape(caption)}</p>\n' if caption else ""
    body = (
        f'role="group" aria-label="{escape(alt)}">\n{_STYLE}\n<p class="lr-title">{escape(title)}</p>\n{frame}\n'
        f'<div class="lr-controls">\n{controls}\n</div>\n<div class="lr-said" role="status"></div>\n{below}'
        f'<script type="application/json" data-frames>{text}</script>\n'
    )
    name = "lr-" + hashlib.sha256(body.encode()).hexdigest()[:12]
    return f'<div class="lr-explore" id="{name}" {body}{script.replace("%s", name, 1)}\n</div>'


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
