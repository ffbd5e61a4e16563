"""Tables made from the registry and from the chapters' own outputs.

`{chooser}`: when to use which method. `{rates}`: learning rates that were best.
`{claims}`: every claim of every chapter. `{status}`: all planned papers.
`{reading}`: what to read before what. `{scaling}`: steps on one and on two devices, if
they have been measured.
"""

import functools
from collections import Counter
from html import escape
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from docutils import nodes
from pybtex.database import parse_file
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from chapter_header import gpus, timing
from lowrank_ref.core.registry import PARTS, PaperInfo, papers, reading_order
from lowrank_ref.lab.claims import MARK, VERDICTS
from lowrank_ref.lab.compare import Comparison
from lowrank_ref.lab.results import older_than_code, stored

#: The columns of a claim table.
COLUMNS = [
    "claim",
    "where",
    "measured here",
    "95 % interval, or check",
    "seeds",
    "verdict",
]

#: What a verdict is called in a count.
SHORT = dict(zip(VERDICTS, ("held", "in part", "not confirmed", "open")))

#: Where each method's rates were tried: results file, part, the number that decides,
#: the method's arm, the plain baseline's arm, and what it was.
SWEEPS = {
    "lora": ("lora_small", "new_domain", "valid", "LoRA r 8", "full", "small GPT"),
    "svfit": (
        *("svfit_small", "turned", "valid loss"),
        *("SVFit", "LoRA r=8", "small MLP"),
    ),
    "randlora": (
        *("randlora_scale", "fine_tuning", "new"),
        *("RandLoRA r 16", "full fine-tuning", "GPT on one GPU"),
    ),
    "nola": (
        *("nola_small", "turned", "valid"),
        *("NOLA r=8 k=64", "LoRA r=8", "small MLP"),
    ),
    "loldu": (
        *("loldu_small", "turned", "valid loss"),
        *("LoLDU", "LoRA r=8", "small MLP"),
    ),
    "lora_sb": (
        *("lora_sb_small", "digits", "valid loss"),
        *("LoRA-SB r=8", "LoRA, s = 2 r=8", "small MLP"),
    ),
    "lora_squeeze": (
        *("lora_squeeze_small", "turned", "valid loss"),
        *("16 to k at 3 %, k=4", "direct, k=4", "small MLP"),
    ),
    "allora": (
        *("allora_small", "adam, 200 steps", "valid loss"),
        *("ALLoRA c₀=1", "LoRA s=1", "small MLP"),
    ),
    "ba_lora": (
        *("ba_lora_small", "skew", "valid error"),
        *("CR, λ 0.2 0 0", "PiSSA, steps 200", "small MLP"),
    ),
    "sara": (
        *("comparison", "digits_shift", "valid loss"),
        *("SaRA r=8", "LoRA r=8", "small MLP"),
    ),
    "sora": (
        *("sora_scale", "verses", "test_loss"),
        *("SoRA λ=0.3", "LoRA r=8", "sentence encoder"),
    ),
    "increlora": (
        *("increlora_small", "planted", "valid"),
        *("IncreLoRA", "LoRA r=3", "four planted layers"),
    ),
    "diffora": (
        *("diffora_small", "transformer", "valid"),
        *("DiffoRA K=14, θ at 0.1", "uniform r=2", "small vision transformer"),
    ),
    "codyra": (
        *("codyra_small", "regressions", "valid last"),
        *("CoDyRA, shrink 0.65", "LoRA r=16", "small network, four tasks"),
    ),
    "bayesian_lora": (
        *("bayesian_lora_small", "digits", "log10 valid"),
        *("B-LoRA μ=0.01 φ-rate 0.1", "LoRA r=8", "small MLP"),
    ),
    "galore": (
        *("galore_scale", "pretraining", "valid"),
        *("GaLore", "Adam", "GPT from scratch"),
    ),
    "sltrain": (
        *("sltrain_small", "rates", "loss"),
        *("SLTrain r=3", "full rank", "small GPT from scratch"),
    ),
    "welore": (
        *("welore_small", "tuning", "valid loss"),
        *("cut: LRC", "cut: both", "small GPT, cut"),
    ),
    "pela": (
        *("pela_small", "repair", "valid loss"),
        *("c=3: CE + FD + WP", "c=3: CE", "small MLP, cut"),
    ),
    "low_precision": (
        *("low_precision_small", "tensors", "valid loss"),
        *("weights, stored at random: int8 row", "float32", "small MLP"),
    ),
    "hgf": (
        *("hgf_small", "small", "valid loss"),
        *("HGF", "FP", "small GPT from scratch"),
    ),
    "natra": ("natra_small", "training", "valid", "NaTra", "plain", "small MLP"),
    "efficient_robustification": (
        *("efficient_robustification_small", "tuning", "valid"),
        *("last, taught", "full, augmented", "residual MLP"),
    ),
    "lr0_fm": (
        *("lr0_fm_small", "digits", "valid disagreement"),
        *("tokens", "LoRA, queries and values", "small vision transformer"),
    ),
}


def page_of(paper: PaperInfo) -> str:
    return f"{paper.part}/{paper.key}.html"


def link(paper: PaperInfo, fragment: str = "", text: str = "") -> str:
    return f'<a href="{page_of(paper)}{fragment}">{escape(text or paper.name)}</a>'


@functools.cache
def chapter(path: Path) -> tuple[str, list[list[str]]]:
    """Anchor of the experiment and rows of the claim tables, read once a build."""
    notebook = nbformat.read(path, as_version=4)
    return experiment(notebook), claims_of(notebook)


def notebook_of(book: Path, paper: PaperInfo) -> Path:
    return book / paper.part / f"{paper.key}.ipynb"


def experiment(notebook: nbformat.NotebookNode) -> str:
    """The anchor of the section that holds the experiment."""
    for cell in notebook.cells:
        for line in cell.source.split("\n"):
            if line.startswith("## ") and "experiment" in line.lower():
                return "#" + nodes.make_id(line[3:])
    return ""


def claims_of(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Claim, place, measurement, interval or check, seeds and verdict of each claim."""
    rows = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            page = BeautifulSoup(
                output.get("data", {}).get("text/html", ""), "html.parser"
            )
            for row in page.select("table.claims tbody tr"):
                text = [
                    data.get_text().replace(MARK, "") for data in row.find_all("td")
                ]
                rows.append(text)
    return rows


def counted(claims: list[list[str]]) -> str:
    """Such as "2 held, 1 in part"."""
    verdicts = Counter(row[-1] for row in claims)
    return ", ".join(f"{verdicts[v]} {SHORT[v]}" for v in VERDICTS if verdicts[v])


def told(claims: list[list[str]]) -> str:
    """The claims that rest on seeds, each with its interval, folded."""
    items = [
        f"<li>{escape(claim)}: {escape(interval)}, {seeds} seeds, <b>{verdict}</b></li>"
        for claim, _, _, interval, seeds, verdict in claims
        if seeds
    ]
    if not items:
        return ""
    fold = '<details class="fold"><summary>intervals</summary><ul>'
    return f"{fold}{''.join(items)}</ul></details>"


def table(
    header: list[str],
    rows: list[list[str]],
    name: str,
    attributes: str = "",
    css: str = "",
) -> str:
    """Rows of HTML cells in a box that scrolls by itself."""
    columns = "".join(f'<th scope="col">{title}</th>' for title in header)
    head = f"<thead><tr>{columns}</tr></thead>"
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="lr-scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="lr-table lr-wide{css}"{attributes}>\n{head}\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


@functools.cache
def titles(book: Path) -> dict[str, str]:
    """Key -> title of everything in the bibliography."""
    entries = parse_file(book / "references.bib").entries
    return {
        key: entry.fields["title"].replace("{", "").replace("}", "")
        for key, entry in entries.items()
    }


def chooser(book: Path) -> str:
    """A table for each part that has a chapter."""
    found, text = papers(), ""

    def named(key: str) -> str:
        """A link to a chapter, or the short title of a planned one."""
        if key in found:
            return link(found[key])
        return escape(titles(book)[key].split(":")[0])

    for part, (title, _) in PARTS.items():
        mine = [paper for paper in found.values() if paper.part == part]
        rows = []
        for paper in mine:
            anchor, claimed = chapter(notebook_of(book, paper))
            instead = "<br>".join(
                f"{named(key)}: {escape(condition)}"
                for key, condition in paper.instead.items()
            )
            evidence = link(paper, anchor, counted(claimed) or "read") + told(claimed)
            rows.append([link(paper), escape(paper.use_when), instead, evidence])
        if rows:
            header = ["method", "use it when", "rather", "its claims, measured here"]
            text += f'<h3 class="lr-part">{escape(title)}</h3>' + table(
                header, rows, title
            )
    return text


def best_rate(rows: list[dict], arm: str, metric: str) -> tuple[float, bool]:
    """The rate with the lowest mean over seeds, and whether it lies inside its grid."""
    own = [row for row in rows if row["method"] == arm]
    grid = {arm: tuple(sorted({row["lr"] for row in own}))}
    best = Comparison(own, grid, metric).best()[arm]
    return best.lr, not best.edge


def rates(book: Path) -> str:
    """Where to start with the learning rate: what was best in each chapter's sweep."""
    found, lines = papers(), []
    for key, (file, part, metric, arm, plain, bed) in SWEEPS.items():
        rows, cells = stored(file)[part]["rows"], []
        for name in (arm, plain):
            rate, inside = best_rate(rows, name, metric)
            cells.append(f"{rate:g}" + ("" if inside else ", an end of its grid"))
        told = f"{cells[1]} ({escape(plain)})"
        lines.append([link(found[key]), escape(arm), cells[0], told, bed])
    header = ["method", "arm", "best rate", "the plain baseline's", "what was trained"]
    return table(header, lines, "Learning rates")


def claims(book: Path) -> str:
    """One table of all claims, which the script beside it sorts and filters."""
    rows = []
    for paper in papers().values():
        anchor, claimed = chapter(notebook_of(book, paper))
        for *words, verdict in claimed:
            told = f'<span class="lr-verdict" data-verdict="{verdict}">{verdict}</span>'
            rows.append([link(paper, anchor), *map(escape, words), told])
    header = ["paper", *COLUMNS]
    script = '<script defer src="_static/ledger.js"></script>'
    return table(header, rows, "All claims", " data-ledger") + script


def status(book: Path) -> str:
    """Counts, then a row for each of the planned papers."""
    found = papers()
    rows, states, verdicts, on_gpu = [], Counter(), Counter(), 0
    for part, (_, keys) in PARTS.items():
        for key in keys:
            paper = found.get(key)
            states[paper.status if paper else "planned"] += 1
            if paper is None:
                rows.append([escape(titles(book)[key]), "planned", "", "", "", ""])
                continue
            claimed = chapter(notebook_of(book, paper))[1]
            verdicts.update(row[-1] for row in claimed)
            hardware, time = gpus(book, key), timing(book, f"{part}/{key}")
            on_gpu += bool(hardware)
            rows.append(
                [
                    link(paper, text=paper.title),
                    f'{paper.status} <span class="lr-day">{paper.verified}</span>',
                    official(paper),
                    f"{time['seconds']} s" if time else "",
                    gpu_results(book, key, hardware),
                    counted(claimed).replace(", ", "<br>"),
                ]
            )
    header = ["paper", "state", "official code", "runs in", "GPU result", "claims"]
    text = table(header, rows, "State of all papers", css=" lr-state")
    return summary(states, on_gpu, verdicts) + text


def gpu_results(book: Path, key: str, hardware: list[str]) -> str:
    """Where a paper was measured on a GPU, and which code is newer than its results."""
    lines = [escape(", ".join(hardware)) or "none"]
    for path in sorted((book / "results").glob(f"{key}_*.json")):
        for part, files in older_than_code(stored(path.stem)).items():
            names = ", ".join(Path(file).name for file in files)
            lines.append(escape(f"{path.stem}, {part}: older than {names}"))
    return "<br>".join(lines)


def scaling(book: Path) -> str:
    """Steps on one and on two devices, from `results/scaling.json`, if there."""
    if not (book / "results" / "scaling.json").exists():
        return ""
    parts = stored("scaling")
    ms = {
        (part, row["method"], row["processes"]): row["ms_per_step"]
        for part in ("strong", "weak")
        for row in parts.get(part, {}).get("rows", [])
    }
    rows = []
    for part, method, processes in ms:
        if (part, processes) == ("strong", 1):
            one, half, two = (
                ms.get(key)
                for key in (
                    (part, method, 1),
                    (part, method, 2),
                    ("weak", method, 2),
                )
            )
            cells = [f"{one:.0f}"]
            cells += [f"{half:.0f}", f"{one / half:.2f}"] if half else ["", ""]
            cells += [f"{two:.0f}", f"{2 * one / two:.2f}"] if two else ["", ""]
            rows.append([escape(method), *cells])
    header = [
        "method",
        "one device, ms a step",
        "two, half the batch each, ms",
        "times as fast",
        "two, the whole batch each, ms",
        "times the tokens a second",
    ]
    day = parts["strong"]["provenance"]
    told = f"{parts['strong']['setting']}. {day['hardware']}, {day['date']}."
    return f"<p>{escape(told)}</p>" + table(header, rows, "Steps on two devices")


def official(paper: PaperInfo) -> str:
    code = paper.official_code
    if not code:
        return "none known"
    return f'<a href="https://github.com/{code}">{code.replace("/", "/<wbr>")}</a>'


def summary(states: Counter, on_gpu: int, verdicts: Counter) -> str:
    """The state of the book in one line of counts."""
    papers_are = {"papers": states.total()}
    papers_are |= {state: states[state] for state in ("planned", "draft", "checked")}
    if states["frozen"]:
        papers_are["frozen"] = states["frozen"]
    papers_are["with a GPU result"] = on_gpu
    claims_are = {"claims": verdicts.total()}
    claims_are |= {SHORT[v]: verdicts[v] for v in VERDICTS}
    lines = []
    for counts in (papers_are, claims_are):
        items = (f"<li><b>{count}</b> {name}</li>" for name, count in counts.items())
        lines.append(f'<ul class="lr-counts">{"".join(items)}</ul>')
    return "".join(lines)


def reading(book: Path) -> str:
    """The graph of needs: one row per chapter, a line from each chapter it needs."""
    found = papers()
    needs = {key: paper.needs for key, paper in found.items()}
    order = reading_order(needs)
    place = {
        key: (14 + 30 * depth, 18 + 32 * row)
        for row, (key, depth) in enumerate(order.items())
    }
    lines, rows = [], []
    for key, (x, y) in place.items():
        wanted = sorted(needs.get(key, ()), key=list(order).index)
        for need in wanted:
            u, v = place[need]
            # A line down from the nearest; the others go round on the left, dashed.
            if need == wanted[-1]:
                lines.append(f'<path d="M{u} {v + 6}V{y - 8}q0 8 8 8H{x - 7}"/>')
            else:
                way = f"M{u - 6} {v}q-9 0 -9 9V{y - 12}q0 8 8 8H{x - 6}"
                lines.append(f'<path d="{way}" stroke-dasharray="4 3"/>')
        name = found[key].name if key in found else key.replace("_", " ").capitalize()
        page = page_of(found[key]) if key in found else f"{key}.html"
        after = " and ".join(
            found[need].name if need in found else need for need in wanted
        )
        label = f"{name}, after {after}" if after else f"{name}, first"
        rows.append(
            f'<a href="{page}" aria-label="{escape(label)}">'
            f'<circle cx="{x}" cy="{y}" r="5"/>'
            f'<text x="{x + 13}" y="{y + 5}">{escape(name)}</text></a>'
        )
    height = 32 * len(order) + 4
    return (
        '<svg class="lr-reading" xmlns="http://www.w3.org/2000/svg" role="group" '
        'aria-label="Which chapter builds on which" '
        f'viewBox="0 0 320 {height}" width="320" height="{height}">'
        f'<g fill="none" stroke="currentColor">{"".join(lines)}</g>'
        f"{''.join(rows)}</svg>"
    )


class _Made(SphinxDirective):
    """HTML made from registry and chapters."""

    def run(self) -> list[nodes.Node]:
        book = Path(self.env.srcdir)
        self.env.note_reread()  # it depends on all chapters
        return [nodes.raw("", TABLES[self.name](book), format="html")]


TABLES = {
    "chooser": chooser,
    "claims": claims,
    "rates": rates,
    "reading": reading,
    "scaling": scaling,
    "status": status,
}


def setup(app: Sphinx) -> dict[str, bool]:
    for name in TABLES:
        app.add_directive(name, _Made)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
