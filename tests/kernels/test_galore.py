"""The two kernels of a GaLore step in Triton's interpreter against their definitions, in float16."""

import pytest
import torch

from lowrank_ref.optimizers import fast, galore

pytest.importorskip("triton", reason="Triton is not installed")
from lowrank_ref.kernels import galore as kernels

pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="a GPU is there: tests/gpu tests the compiled kernels")

SHAPES = [(40, 24), (24, 40), (33, 50), (150, 131), (16, 16)]


def problem(m, n, side, r=12, count=3, dtype=torch.float16):
    g = torch.Generator().manual_seed(m)
    k, small = (m, (r, n)) if side == "left" else (n, (m, r))

    def draw(*shape):
        return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]

    P = [torch.linalg.qr(torch.randn(k, r, generator=g)).Q.to(dtype).contiguous() for _ in range(count)]
    V = [v.abs() + 0.1 for v in draw(*small)]
    return {"W": draw(m, n), "G": draw(m, n), "P": P, "M": draw(*small), "V": V}


def wide(tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_all_matrices_is_the_definitions(shape, side):
    p = problem(*shape, side)
    exact = {name: wide(tensors) for name, tensors in p.items()}
    N = kernels.project_adam(p["G"], p["M"], p["V"], p["P"], side, 3, (0.9, 0.99), 1e-6)
    kernels.add_back(p["W"], N, p["P"], side, -0.1, 0.9)
    R = [galore.project(G, **{side: P}) for G, P in zip(exact["G"], exact["P"])]
    directions = galore.adam_directions(R, exact["M"], exact["V"], [3] * 3, betas=(0.9, 0.99), eps=1e-6)
    for W, D, P in zip(exact["W"], directions, exact["P"]):
        fast.add_back(W, D, -0.1, keep=0.9, **{side: P})
    for got, wanted in [(p["M"], exact["M"]), (p["V"], exact["V"]), (N, directions), (p["W"], exact["W"])]:
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3)


def test_misaligned_rows_are_copied_and_directions_have_aligned_rows():
    p = problem(24, 41, "left")
    N = kernels.project_adam(p["G"], p["M"], p["V"], p["P"], "left", 1, (0.9, 0.99), 1e-6)
    assert N[0].shape == (12, 41) and N[0].stride() == (48, 1)
    assert kernels._aligned(p["G"][0]).stride() == (48, 1)
    aligned = torch.ones(4, 16, dtype=torch.float16)
    assert kernels._aligned(aligned) is aligned


def test_which_matrices_the_kernels_take():
    matrix = torch.ones(8, 16, dtype=torch.float16)
    assert kernels.usable([matrix, matrix])
    assert not kernels.usable([matrix, matrix.float()])
    assert not kernels.usable([matrix.T])
    assert not kernels.usable([torch.ones(129, dtype=torch.float16)[1:].view(8, 16)])
