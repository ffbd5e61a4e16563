"""Run the chapters.

python book/tools/execute.py                     all of them, on a copy in _build/book
python book/tools/execute.py --in-place          all of them; refresh the outputs
python book/tools/execute.py --in-place A.ipynb  one chapter

What is written depends on the results only, so two runs give the same bytes.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from links import ROOT, chapters

BOOK = ROOT / "book"
COPY = ROOT / "_build" / "book"
TIMINGS = BOOK / "results" / "timings.json"
CELL_TIMEOUT = 600  # seconds, after which a cell counts as hanging
CELL_BUDGET = 30  # seconds, more is reported
CHAPTER_BUDGET = 60
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

# One thread is fast and repeatable, nothing waits for the network, no output is a
# progress bar.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "0" if os.environ.get("LOWRANK_DATA") == "hub" else "1",
    "LOWRANK_PROGRESS": "0",
}


@dataclass
class Run:
    """One chapter's run."""

    name: str
    seconds: float = 0.0
    slow_cells: list[tuple[int, float]] = field(default_factory=list)
    error: str = ""


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Keep what the reader sees; drop everything that differs from run to run."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = NotebookNode(
        kernelspec=KERNEL, language_info={"name": "python"}
    )
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"c{number:02d}"
        kept = {k: v for k, v in cell.metadata.items() if k in ("tags", "mystnb")}
        cell.metadata = NotebookNode(kept)
        if cell.cell_type == "code":
            cell.outputs = [_fixed(out) for out in cell.outputs if not _is_widget(out)]
    return notebook


def _is_widget(output: NotebookNode) -> bool:
    # A live widget is dead without its kernel, and its id is random.
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _fixed(output: NotebookNode) -> NotebookNode:
    """Replace addresses of objects, which differ in every process."""
    if "text" in output:
        output.text = _no_address(output.text)
    for mime, text in output.get("data", {}).items():
        if mime in ("text/plain", "text/html", "text/markdown"):
            output.data[mime] = _no_address(text)
    return output


def _no_address(text: str) -> str:
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "at 0x0", text)


def write(notebook: NotebookNode, path: Path) -> None:
    """Write as nbformat does, in one step, and only where something changed."""
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


async def run_chapter(path: Path, name: str) -> Run:
    """Execute one notebook in its own folder; rewrite it if every cell ran."""
    run = Run(name)
    notebook = nbformat.read(path, as_version=4)
    starts: dict[int, float] = {}

    def started(cell: NotebookNode, cell_index: int) -> None:
        starts[cell_index] = time.perf_counter()

    def finished(cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        took = time.perf_counter() - starts[cell_index]
        if took > CELL_BUDGET:
            run.slow_cells.append((cell_index, took))

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--HistoryManager.enabled=False", "--log-level=ERROR"],
        on_cell_execute=started,
        on_cell_executed=finished,
    )
    start = time.perf_counter()
    try:
        await client.async_execute()
    except (
        Exception
    ) as error:  # whatever stops a chapter is reported, and the others go on
        run.error = _report(name, notebook, max(starts, default=None), error)
    else:
        write(normalise(notebook), path)
    run.seconds = time.perf_counter() - start
    return run


def _report(
    name: str, notebook: NotebookNode, index: int | None, error: Exception
) -> str:
    if index is None:
        return f"{name}: the kernel did not start\n{error}"
    source = "\n".join(
        f"    {line}" for line in notebook.cells[index].source.split("\n")
    )
    colour = re.compile(r"\x1b\[[0-9;]*m")
    traceback = [
        line
        for output in notebook.cells[index].get("outputs", [])
        if output.output_type == "error"
        for line in output.traceback
    ]
    told = colour.sub("", "\n".join(traceback) or f"{type(error).__name__}: {error}")
    return f"{name}, cell {index + 1} of {len(notebook.cells)}:\n\n{source}\n\n{told}"


def longest_first(paths: list[Path]) -> list[Path]:
    """So that two processors end together; a chapter without a time counts as long."""
    known = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
    seconds = {key.rpartition("/")[2]: time["seconds"] for key, time in known.items()}
    return sorted(paths, key=lambda path: (-seconds.get(path.stem, 60), str(path)))


async def run_all(paths: list[Path], root: Path, at_once: int) -> list[Run]:
    """Execute the chapters, `at_once` side by side, with a line for each."""
    gate = asyncio.Semaphore(at_once)
    done = 0

    async def one(path: Path) -> Run:
        nonlocal done
        async with gate:
            run = await run_chapter(path, _name(path, root))
        done += 1
        outcome = "FAILED" if run.error else "ok"
        counter = f"[{done:>2}/{len(paths)}]"
        print(f"{counter} {run.name:<40} {run.seconds:6.1f} s  {outcome}", flush=True)
        return run

    return await asyncio.gather(*map(one, paths))


def _name(path: Path, root: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def report(runs: list[Run]) -> int:
    """Print what is slow and what failed; return the number of failed chapters."""
    for run in runs:
        for index, seconds in run.slow_cells:
            print(
                f"slow: {run.name}, cell {index + 1}: {seconds:.0f} s > {CELL_BUDGET} s"
            )
        if run.seconds > CHAPTER_BUDGET:
            print(f"slow: {run.name}: {run.seconds:.0f} s > {CHAPTER_BUDGET} s")
    failed = [run for run in runs if run.error]
    for run in failed:
        print(f"\n{'-' * 88}\n{run.error}")
    if failed:
        print(f"\n{len(failed)} of {len(runs)} chapters failed.", file=sys.stderr)
    return len(failed)


def store_timings(runs: list[Run], path: Path = TIMINGS) -> None:
    """Keep each chapter's time for its badge; small changes are noise, not stored."""
    old = json.loads(path.read_text()) if path.exists() else {}
    hardware = f"{os.cpu_count()}-core {platform.machine()} CPU"
    there = {str(p.relative_to(BOOK).with_suffix("")) for p in chapters()}
    new = {chapter: time for chapter, time in old.items() if chapter in there}
    for run in runs:
        chapter = run.name.removesuffix(".ipynb")
        seconds = max(5, 5 * round(run.seconds / 5))
        before = old.get(chapter)
        if before and abs(seconds - before["seconds"]) <= max(
            5, 0.3 * before["seconds"]
        ):
            new[chapter] = before
        else:
            new[chapter] = {"seconds": seconds, "hardware": hardware}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")


def copy_book() -> Path:
    """A fresh copy of book/, so that the sources stay as they are."""
    shutil.rmtree(COPY, ignore_errors=True)
    leave = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(BOOK, COPY, ignore=leave)
    return COPY


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-place", action="store_true", help="run book/ itself")
    parser.add_argument("chapter", nargs="*", type=Path, help="default: all")
    options = parser.parse_args()
    if options.chapter and not options.in_place:
        parser.error("chapters are named together with --in-place")
    os.environ.update(ENVIRONMENT)
    root = BOOK if options.in_place else copy_book()
    at_once = (
        1 if options.in_place else 2
    )  # in place the times are kept, so nothing runs beside
    paths = options.chapter or longest_first(chapters(root))
    runs = asyncio.run(run_all(paths, root, at_once))
    failed = report(runs)
    if options.in_place and not failed:
        store_timings(runs)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
