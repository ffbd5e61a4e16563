"""All checks, the quick ones first. The first that fails ends the run.

python book/tools/check.py            all
python book/tools/check.py unit book  those whose name is given
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from execute import ENVIRONMENT
from links import ROOT
from lowrank_ref.core.registry import PARTS

#: Packages whose types and shapes are checked: all but the kernels, which Triton reads.
CHECKED = ",".join(f"lowrank_ref.{part}" for part in ("core", "lab", *PARTS))
STEPS = {
    "style": "ruff check .",
    "format": "ruff format --check .",
    "imports": "lint-imports --no-logo",
    "types": "mypy",
    "unit": "pytest lowrank_ref tests --ignore=tests/book --ignore=tests/benchmarks"
    " --ignore=lowrank_ref/kernels --doctest-modules -n 2"
    f" --jaxtyping-packages={CHECKED},typed.checked"
    " --cov=lowrank_ref --cov-report=term-missing:skip-covered",
    "chapters": "pytest book --nbval --nbval-current-env"
    " --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 120"
    " -n 2 --dist loadfile",
    "book": "python book/tools/build.py",
    "pages": "pytest tests/book -n 2 --dist loadfile",
}


def main(names: list[str]) -> int:
    unknown = set(names) - set(STEPS)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: wanted some of {', '.join(STEPS)}")
    environment = os.environ | ENVIRONMENT
    start = time.perf_counter()
    for name in names or STEPS:
        elapsed = time.perf_counter() - start
        print(f"\n=== {elapsed:4.0f} s  {name}: {STEPS[name]}", flush=True)
        tool, *arguments = STEPS[name].split()
        command = [str(Path(sys.executable).with_name(tool)), *arguments]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if status:
            print(f"\nFailed: {name}", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
