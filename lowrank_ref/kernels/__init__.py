"""Triton fast paths; each stands beside a plain PyTorch definition in its paper's file.

Modules here need Triton, which comes with PyTorch's CUDA builds; `have_triton` says whether it is there, and `runs_on`
whether a device runs the kernels. Where one does not, the definitions compute the same.
"""

import functools
import os
import warnings
from importlib.util import find_spec

import torch

#: Whether kernels run in Triton's interpreter, on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: The least scale of BitNet's quantisers, and what its norm adds under the root.
EPS = 1e-5


@functools.cache
def have_triton() -> bool:
    """Tell whether Triton is installed. Warns, once a process, if it is not: a GPU is then slower than it could be."""
    found = find_spec("triton") is not None
    if not found:
        warnings.warn("Triton is not installed: GPU kernels are replaced by their plain definitions", stacklevel=2)
    return found


def takes_card(capability: tuple[int, int], *, amd: bool = False) -> bool:
    """Tell whether the kernels run on a card: NVIDIA's from compute capability 8.0 on (A100, L4, RTX 30, Hopper, ...).

    The tensor cores of older ones (T4: 7.5) know no bfloat16, and Triton makes no int8 product for them. The kernels
    hold inline PTX, which AMD's cards do not speak.

    Args:
        capability: (major, minor), as `torch.cuda.get_device_capability` returns it.
        amd: whether this PyTorch is built for ROCm, where AMD's cards call themselves CUDA devices.
    """
    return not amd and capability >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result  # torch.compile asks once and does not trace the question
def runs_on(device: torch.device) -> bool:
    """Tell whether the kernels run on a device. In the interpreter they run on any."""
    amd = torch.version.hip is not None
    fit = INTERPRETED or (device.type == "cuda" and takes_card(_capability(device), amd=amd))
    return fit and have_triton()


def launch_options(blocks: dict[str, int]) -> dict[str, int]:
    """Return block sizes and, where a GPU runs the kernel, what only the compiler knows, such as num_warps."""
    return {key: value for key, value in blocks.items() if key.isupper() or not INTERPRETED}
