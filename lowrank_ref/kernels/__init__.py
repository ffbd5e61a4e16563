"""Triton fast paths; each stands beside a plain PyTorch definition in its paper's file.

Modules here need Triton, which comes with PyTorch's CUDA builds; `have_triton` says whether it is there.
"""

import functools
import os
import warnings
from importlib.util import find_spec

#: Whether kernels run in Triton's interpreter, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def have_triton() -> bool:
    """Tell whether Triton is installed. Warns, once a process, if it is not: a GPU is then slower than it could be."""
    found = find_spec("triton") is not None
    if not found:
        warnings.warn("Triton is not installed: GPU kernels are replaced by their plain definitions", stacklevel=2)
    return found


def launch_options(blocks: dict[str, int]) -> dict[str, int]:
    """Return block sizes and, where a GPU runs the kernel, what only the compiler knows, such as num_warps."""
    return {key: value for key, value in blocks.items() if key.isupper() or not INTERPRETED}
