"""Compile every kernel for one card, down to its machine code, on a machine without a GPU: `compile_all.py 86`.

The launchers themselves say what is compiled, in which dtypes, variants and block sizes: they run on CPU tensors with a
driver that claims to have the card, and each launch ends after compiling. Prints a JSON object: the names of all
kernels, the shared memory that a block of this card may have, and for each launch its kernel, the dtypes of its tensors
and its shared memory.
"""

import importlib
import json
import pkgutil
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lowrank_ref import kernels

capability = int(sys.argv[1]) if __name__ == "__main__" else 90  # whoever only looks at the file
#: Bytes of shared memory that a block may ask for, from the CUDA programming guide, by capability.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
room = SHARED[capability] * 1024
launches = []


class Driver:
    """The part of Triton's driver that compiling needs."""

    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(function, *arguments, grid, warmup, real=JITFunction.run, **options):
    compiled = real(function, *arguments, grid=grid, warmup=True, **options)
    dtypes = [str(t.dtype).removeprefix("torch.") for t in arguments if isinstance(t, torch.Tensor)]
    assert "cubin" in compiled.asm
    launches.append([function.__name__, dtypes, compiled.metadata.shared])


def ternary(rows, m, dtype, rank=0, n=512):
    """A product as the layers ask for it: HGF's with factors, BitLinear's without."""
    from lowrank_ref.kernels.ternary import ternary_matmul

    packed, more = torch.zeros(m, n // 4, dtype=torch.uint8), {}
    if dtype == torch.int8:
        more = {"scale": torch.ones(rows), "x_sum": torch.zeros(rows, dtype=torch.int32), "dtype": torch.bfloat16}
        more |= {"B": torch.zeros(m, rank), "t": torch.zeros(rows, rank)}
    ternary_matmul(torch.zeros(rows, n, dtype=dtype), packed, torch.ones(()), **more)


def galore(dtype, side, m, n, r=128):
    from lowrank_ref.kernels.galore import add_back, project_adam, squares

    W, P, R = (torch.zeros(s, dtype=dtype) for s in ((m, n), ((m if side == "left" else n), r), (m, r)))
    if side == "left":
        R = torch.zeros(r, n, dtype=dtype)
    N = project_adam([W], [R], [R], [P], side, 1, (0.9, 0.999), 1e-8)
    add_back([W], N, [P], side, -0.01, 1.0)
    squares([W])


def main():
    from lowrank_ref.kernels.ternary import quantise, unpacked

    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        ternary(1, 4096, dtype, rank=20)
        ternary(100, 4096, dtype, rank=20)
    for dtype in (torch.bfloat16, torch.int8):
        ternary(256, 16384, dtype)  # the largest tiles
    quantise(torch.zeros(3, 2048))
    unpacked(torch.zeros(64, 256, dtype=torch.uint8), 1024, torch.ones(()), torch.bfloat16)
    galore(torch.bfloat16, "left", 256, 512)
    galore(torch.float16, "right", 500, 250, r=100)  # no whole tiles


def kernel_names():
    """All functions of `lowrank_ref.kernels` that are launched, not called by another one."""
    modules = [importlib.import_module(f"lowrank_ref.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = {f.__name__: f.src for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
    called = {name for name in found for other, src in found.items() if other != name and f" {name}(" in src}
    return sorted(found.keys() - called)


if __name__ == "__main__":
    assert not kernels.INTERPRETED
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    kernels.runs_on = lambda device: kernels.takes_card(divmod(capability, 10))
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(shared_memory_per_block_optin=room)
    main()
    print(json.dumps({"kernels": kernel_names(), "room": room, "launches": launches}))
