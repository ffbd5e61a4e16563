"""All checks, the quick ones first. The first that fails ends the run.

python book/tools/check.py            all but fresh and coverage
python book/tools/check.py unit book  those whose name is given
python book/tools/check.py --ci       all; the chapters in an environment of their own
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from execute import CELL_BUDGET, ENVIRONMENT, longest_first
from links import ROOT, chapters
from lowrank_ref.core.registry import PARTS

#: Packages whose types and shapes are checked: all but the kernels, which Triton reads.
CHECKED = ",".join(f"lowrank_ref.{part}" for part in ("core", "lab", *PARTS))
#: Run chapters and compare their outputs with the stored ones. Each stays on one of two
#: processors. A slow cell is told and does not fail: the limits only end what hangs.
COMPARE = (
    f"pytest --nbval --nbval-sanitize-with {ROOT}/tests/nbval_sanitize.cfg"
    " --nbval-cell-timeout 600 --nbval-kernel-startup-timeout 600"
    f" --durations 0 --durations-min {CELL_BUDGET}"
    " -n 2 --dist loadfile --no-loadscope-reorder"
)
STEPS = {
    "style": "ruff check .",
    "format": "ruff format --check .",
    "imports": "lint-imports --no-logo",
    "types": "mypy",
    "unit": "pytest lowrank_ref tests --ignore=tests/book --ignore=tests/benchmarks"
    " --ignore=lowrank_ref/kernels --doctest-modules -n 2 --dist worksteal"
    f" --jaxtyping-packages={CHECKED},typed.checked",
    "chapters": f"{COMPARE} --nbval-current-env",
    "fresh": "python book/tools/fresh.py",
    "book": "python book/tools/build.py",
    "pages": "pytest tests/book -n 2 --dist worksteal --durations 20",
}
#: Run when asked for only: counting lines makes the unit tests take two thirds longer.
ASKED = {
    "coverage": f"{STEPS['unit']} --cov=lowrank_ref --cov-fail-under=95"
    " --cov-report=term-missing:skip-covered",
}


def command(step: str, paths: list[Path] | None = None) -> list[str]:
    """What to start for a step; chapters are named, the longest first."""
    tool, *arguments = step.split()
    if step.startswith(COMPARE):
        arguments += map(str, paths or longest_first(chapters()))
    return [str(Path(sys.executable).with_name(tool)), *arguments]


def wanted(names: list[str]) -> list[str]:
    """The steps to run. `fresh` is `chapters` in a new environment, so one will do."""
    if not names or names == ["--ci"]:
        return [name for name in STEPS if name != ("chapters" if names else "fresh")]
    if unknown := set(names) - set(STEPS | ASKED):
        steps = ", ".join(STEPS | ASKED)
        sys.exit(f"{', '.join(sorted(unknown))}: wanted some of {steps}")
    return names


def main(names: list[str]) -> int:
    environment = os.environ | ENVIRONMENT
    start = time.perf_counter()
    for name in wanted(names):
        elapsed = time.perf_counter() - start
        step = (STEPS | ASKED)[name]
        print(f"\n=== {elapsed:4.0f} s  {name}: {step}", flush=True)
        done = subprocess.run(command(step), cwd=ROOT, env=environment)
        if done.returncode:
            print(f"\nFailed: {name}", file=sys.stderr)
            return done.returncode
    print(f"\n=== {time.perf_counter() - start:4.0f} s  all passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
