"""One photograph at every rank, with its error and its bytes: the page itself computes the SVD.

Frames of a photograph do not compress, so `lab.explore` could store a few of them only. Here the output holds the
pixels once. When the page opens, some plain JavaScript finds all singular vectors by one-sided Jacobi rotations, and
then sums as many as the slider asks for. The frame visible without JavaScript is computed here, from the same pixels.
"""

import base64
import re
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from lowrank_ref.lab.draw.explore import MOST_BYTES, TELL, box, slider
from lowrank_ref.lab.draw.svg import PALETTE, line_chart, png

__all__ = ["PhotoExplorer", "explore_photo"]

MOST_SIDE = 192  # more would take a phone too long
BYTES = 4  # of a float32 number
TOP = 1.25  # upper end of the vertical axis, and of the bars

_STYLE = """<style>
.lr-explore .lr-pair{display:grid;grid-template-columns:1fr 1fr;gap:.8em;margin:0 0 .3em;text-align:center}
.lr-explore .lr-pair img{display:block;width:100%;height:auto;margin:0 0 .2em}
.lr-explore dl.lr-bars{display:grid;grid-template-columns:auto 1fr;gap:.15em .9em;margin:.3em 0 .5em}
.lr-explore .lr-bars dt{font-weight:400;opacity:.8}
.lr-explore .lr-bars dd{position:relative;margin:0;padding:0 .4em;font-weight:600;font-variant-numeric:tabular-nums}
.lr-explore .lr-bars b{position:relative}
.lr-explore .lr-bars dd span{position:absolute;inset:0 auto 0 0;opacity:.35;border-radius:2px}
</style>"""

# G = X·V has orthogonal columns when no pair can be turned any further; then their lengths are the singular values.
_SCRIPT = (
    (
        """<script>
document.querySelectorAll('[id="%s"]:not([data-ready])').forEach(async root => {
  root.dataset.ready = "";
  const {rows, columns, pixels} = JSON.parse(root.querySelector("[data-frames]").textContent);
  const input = root.querySelector("input"), output = root.querySelector("output");
  const place = root.querySelector("[data-frame]"), inner = place.querySelector("svg svg");
  const images = place.querySelectorAll("img"), rank = place.querySelector("[data-rank]");
  const bars = place.querySelectorAll("dd span"), values = place.querySelectorAll("dd b");
  const dots = inner.querySelectorAll("[data-dot]");
  const wide = +inner.getAttribute("width"), high = +inner.getAttribute("height"), most = input.max - -1;"""
        + TELL
        + """
  const X = Uint8Array.from(atob(pixels), letter => letter.charCodeAt(0));
  const column = j => Float64Array.from({length: rows}, (_, i) => X[i * columns + j] / 255);
  const G = Array.from({length: columns}, (_, j) => column(j));
  const V = G.map((_, j) => Float64Array.from(G, (_, i) => +(i === j)));
  const dot = (a, b) => {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
    return sum;
  };
  const turn = (a, b, c, s) => {
    for (let i = 0; i < a.length; i++) [a[i], b[i]] = [c * a[i] - s * b[i], s * a[i] + c * b[i]];
  };
  const total = G.reduce((sum, g) => sum + dot(g, g), 0);
  for (let turned = true, sweep = 0; turned && sweep < 30; sweep++) {
    turned = false;
    for (let p = 0; p < columns; p++)
      for (let q = p + 1; q < columns; q++) {
        const pq = dot(G[p], G[q]);
        if (Math.abs(pq) <= 1e-11 * total) continue;
        const z = (dot(G[q], G[q]) - dot(G[p], G[p])) / (2 * pq);
        const t = (z < 0 ? -1 : 1) / (Math.abs(z) + Math.hypot(1, z)), c = 1 / Math.hypot(1, t);
        turn(G[p], G[q], c, c * t);
        turn(V[p], V[q], c, c * t);
        turned = true;
      }
    await new Promise(next => setTimeout(next));  // the page stays awake
  }
  const energy = G.map(g => dot(g, g));
  const order = energy.map((_, j) => j).sort((i, j) => energy[j] - energy[i]);
  const canvas = Object.assign(document.createElement("canvas"), {width: columns, height: rows});
  const pen = canvas.getContext("2d"), gray = pen.createImageData(columns, rows);
  const picture = value => {
    for (let k = 0; k < X.length; k++) {
      gray.data.fill(Math.floor(Math.min(Math.max(value(k), 0), 1) * 255 + 0.5), 4 * k, 4 * k + 3);
      gray.data[4 * k + 3] = 255;
    }
    pen.putImageData(gray, 0, 0);
    return canvas.toDataURL();
  };
  const draw = () => {
    const r = +input.value + 1, best = new Float64Array(X.length);
    for (const j of order.slice(0, r))
      for (let i = 0, k = 0; i < rows; i++)
        for (let l = 0; l < columns; l++, k++) best[k] += G[j][i] * V[j][l];
    const error = Math.sqrt(order.slice(r).reduce((sum, j) => sum + energy[j], 0) / total);
    const share = r * (rows + columns) / (rows * columns), stored = %BYTES * r * (rows + columns);
    images[0].src = picture(k => best[k]);
    images[1].src = picture(k => 0.5 + X[k] / 255 - best[k]);
    [error, share].forEach((y, k) => {
      dots[k].setAttribute("cx", wide * r / most);
      dots[k].setAttribute("cy", high * (1 - y / %TOP));
    });
    [error, share].forEach((y, k) => bars[k].style.width = 100 * y / %TOP + "%");
    values[0].textContent = (100 * error).toFixed(1) + " %";
    values[1].textContent = stored.toLocaleString("en-US") + " bytes";
    place.dataset.frame = rank.textContent = output.textContent = r;
    input.setAttribute("aria-valuetext", r);
  };
  input.disabled = false;
  input.addEventListener("input", () => { draw(); tell(); });
  draw();
});
</script>"""
    )
    .replace("%TOP", str(TOP))
    .replace("%BYTES", str(BYTES))
)


def explore_photo(
    pixels: ArrayLike, *, title: str, alt: str, caption: str = "", label: str = "rank r", start: int | None = None
) -> "PhotoExplorer":
    """Show a photograph at every rank up to a little beyond the one where its factors need as many bytes as it does.

    One slider moves all parts: the best approximation of that rank, what it lacks, error and bytes on their curves, and
    both as numbers. The error is the Frobenius norm of what is lacking over that of the photograph; bytes are those of
    float32 numbers.

    Args:
        pixels: gray values, integers 0 (black) to 255 (white), shape (H, W), each side at most 192.
        title: one line above the figure.
        alt: what a reader who does not see the figure should know.
        caption: what to look for, below the figure.
        label: text beside the slider.
        start: rank of the frame shown first, and the only one without JavaScript; default a sixteenth of the smaller
            side.

    Raises:
        ValueError: another shape, values that are no bytes, a black photograph, or a start without a place on the
            slider.
    """
    X = np.asarray(pixels)
    if X.ndim != 2 or not 8 <= min(X.shape) <= max(X.shape) <= MOST_SIDE:
        raise ValueError(f"pixels: got shape {X.shape}, wanted (H, W), each from 8 to {MOST_SIDE}")
    if not (np.clip(np.round(X), 0, 255) == X).all() or not X.any():
        raise ValueError("pixels: got values that are no whole numbers from 0 to 255, or only zeros")
    return PhotoExplorer(X.astype(np.uint8), title, alt, caption, label, start)


class PhotoExplorer:
    """A photograph behind a slider over its rank: `html` for pages, `errors` and `share` for tests.

    Attributes:
        errors: relative error of the best approximation of rank 1, 2, ..., `most`.
        share: bytes of the factors over bytes of the photograph, likewise.

    Raises:
        ValueError: a start without a place on the slider, or too much HTML.
    """

    def __init__(self, X: np.ndarray, title: str, alt: str, caption: str, label: str, start: int | None):
        (rows, columns), photo = X.shape, X / 255
        self.most = int(TOP * rows * columns / (rows + columns))
        self.start = start or max(1, min(X.shape) // 16)
        if not 1 <= self.start <= self.most:
            raise ValueError(f"start: got {start}, wanted 1 to {self.most}")
        U, S, Vh = np.linalg.svd(photo, full_matrices=False)
        ranks = np.arange(1, self.most + 1)
        tails = np.sqrt(np.append(np.cumsum(S[::-1] ** 2)[::-1], 0.0))  # tails[r]: norm of what rank r lacks
        self.errors = tails[np.minimum(ranks, len(S))] / tails[0]
        self.share = ranks * (rows + columns) / (rows * columns)
        self.title, self.best = title, (U[:, : self.start] * S[: self.start]) @ Vh[: self.start]
        self.html = box(
            title=title,
            alt=alt,
            caption=caption,
            frame=self._frame(ranks, photo),
            sliders=[slider(label, [str(r) for r in ranks], self.start - 1)],
            data={"rows": rows, "columns": columns, "pixels": base64.b64encode(X.tobytes()).decode()},
            script=_SCRIPT,
        )
        if (size := len(self.html.encode())) > MOST_BYTES:
            raise ValueError(
                f"pixels: got {size:,} bytes of HTML, wanted at most {MOST_BYTES:,} (a smaller photograph)"
            )

    def _frame(self, ranks: np.ndarray, photo: np.ndarray) -> str:
        r, (rows, columns) = self.start, photo.shape
        error, share = self.errors[r - 1], self.share[r - 1]
        whole = BYTES * rows * columns
        pictures = [
            ("The photograph at the chosen rank", f"rank <b data-rank>{r}</b>", self.best),
            ("What the rank lacks; gray means nothing", "what it lacks", 0.5 + photo - self.best),
        ]
        # Without the theme's filter and frame for dark pages: gray values are the point here.
        pair = "".join(
            f'<div><img class="dark-light" style="padding:0" alt="{alt}" width="{columns}" height="{rows}" '
            f'src="data:image/png;base64,{base64.b64encode(png(values)).decode()}">{name}</div>'
            for alt, name, values in pictures
        )
        chart = line_chart(
            {"error": (ranks, self.errors), "bytes": (ranks, self.share)},
            x_label="rank r",
            y_label="relative to the photograph",
            x_range=(0, self.most),
            y_range=(0, TOP),
            alt="Error and bytes against rank: the error falls fast, then slowly; the bytes rise steadily.",
            height=230,
        )
        wide, high = (float(v) for v in re.search(r'<svg x=.*? width="(.*?)" height="(.*?)"', chart).groups())  # type: ignore[union-attr]
        dots = "".join(
            f'<circle data-dot r="5" cx="{wide * r / self.most:.1f}" cy="{high * (1 - y / TOP):.1f}" fill="{colour}"/>'
            for y, colour in zip((error, share), PALETTE)
        )
        drawn = chart.replace("<svg x=", '<svg overflow="visible" x=')  # for dots at the ends
        drawn = drawn.replace("\n</svg>", f"\n{dots}\n</svg>", 1)  # the first one closes the part inside the axes
        numbers = [
            ("error", f"{100 * error:.1f} %", error, PALETTE[0]),
            ("two factors", f"{round(share * whole):,} bytes", share, PALETTE[1]),
            ("photograph", f"{whole:,} bytes", 1.0, "currentColor"),
        ]
        bars = "\n".join(
            f'<dt>{name}</dt><dd><span style="width:{100 * y / TOP:.1f}%;background:{colour}"></span>'
            f"<b>{escape(value)}</b></dd>"
            for name, value, y, colour in numbers
        )
        return (
            f'{_STYLE}\n<div data-frame="{r}">\n<div class="lr-pair">{pair}</div>\n{drawn}\n'
            f'<dl class="lr-bars">\n{bars}\n</dl>\n</div>'
        )

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        shown = f"rank {self.start}: {100 * self.errors[self.start - 1]:.1f} % error"
        return f"PhotoExplorer({self.title!r}, rank 1 ... {self.most}, {shown})"
