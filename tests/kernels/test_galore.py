"""The two kernels of a GaLore step in Triton's interpreter against their definitions, in float16."""

import pytest
import torch

from lowrank_ref.optimizers import fast, galore

pytest.importorskip("triton", reason="Triton is not installed")
from lowrank_ref.kernels import galore as kernels

pytestmark = pytest.mark.skipif(not kernels.INTERPRETED, reason="a GPU is there: tests/gpu tests the compiled kernels")

SHAPES = [(40, 24), (24, 40), (33, 50), (150, 131), (16, 16)]
#: Small blocks, some of which matrices of 64 x 96 at rank 32 fill wholly.
BLOCKS = {"BM": 32, "BN": 32, "BK": 32}


def problem(m, n, side, r=12, count=3, dtype=torch.float16):
    g = torch.Generator().manual_seed(m)
    k, small = (m, (r, n)) if side == "left" else (n, (m, r))

    def draw(*shape):
        return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]

    P = [torch.linalg.qr(torch.randn(k, r, generator=g)).Q.to(dtype).contiguous() for _ in range(count)]
    V = [v.abs() + 0.1 for v in draw(*small)]
    return {"W": draw(m, n), "G": draw(m, n), "P": P, "M": draw(*small), "V": V}


def step(p, side):
    """Take the step with both kernels; return all that it changed or made."""
    N = kernels.project_adam(p["G"], p["M"], p["V"], p["P"], side, 3, (0.9, 0.99), 1e-6)
    kernels.add_back(p["W"], N, p["P"], side, -0.1, 0.9)
    return [*p["M"], *p["V"], *N, *p["W"]]


def wide(tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_all_matrices_is_the_definitions(shape, side):
    p = problem(*shape, side)
    exact = {name: wide(tensors) for name, tensors in p.items()}
    got = step(p, side)
    R = [galore.project_gradient(G, **{side: P}) for G, P in zip(exact["G"], exact["P"])]
    directions = galore.adam_directions(R, exact["M"], exact["V"], [3] * 3, betas=(0.9, 0.99), eps=1e-6)
    for W, D, P in zip(exact["W"], directions, exact["P"]):
        fast.add_back(W, D, -0.1, keep=0.9, **{side: P})
    for a, b in zip(got, [*exact["M"], *exact["V"], *directions, *exact["W"]]):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape, r, whole", [((64, 96), 32, True), ((70, 96), 32, None), ((64, 96), 12, False)])
def test_whole_tiles_are_read_without_masks_and_give_the_same(shape, r, whole, side, monkeypatch):
    p, launches, real = problem(*shape, side, r), [], kernels._launch
    copy = {name: [T.clone() for T in tensors] for name, tensors in p.items()}
    ends = [step(p, side)]
    monkeypatch.setattr(kernels, "PROJECT", BLOCKS)
    monkeypatch.setattr(kernels, "BACK", BLOCKS)
    monkeypatch.setattr(kernels, "_launch", lambda *a: launches.append(real(*a)) or launches[-1])
    ends.append(step(copy, side))
    if whole is not None:
        assert [options["WHOLE"] for _, options in launches] == [whole] * 2
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_squares_of_tensors_of_several_sizes():
    tensors = [torch.randn(s, generator=torch.Generator().manual_seed(s)).half() for s in (1, 7, 5000, 40_000)]
    torch.testing.assert_close(
        kernels.squares(tensors).double(), torch.stack([T.double().square().sum() for T in tensors])
    )
    assert not kernels.squares([torch.tensor([1.0, float("nan")]).half()]).isfinite()


def test_misaligned_rows_are_copied_and_directions_have_aligned_rows():
    p = problem(24, 41, "left")
    N = kernels.project_adam(p["G"], p["M"], p["V"], p["P"], "left", 1, (0.9, 0.99), 1e-6)
    assert N[0].shape == (12, 41) and N[0].stride() == (128, 1)
    assert kernels._aligned(p["G"][0]).stride() == (128, 1)
    aligned = torch.ones(4, 16, dtype=torch.float16)
    assert kernels._aligned(aligned) is aligned


def test_which_matrices_the_kernels_take():
    matrix = torch.ones(8, 16, dtype=torch.float16)
    assert kernels.usable([matrix, matrix])
    assert not kernels.usable([matrix, matrix.float()])
    assert not kernels.usable([matrix.T])
    assert not kernels.usable([torch.ones(129, dtype=torch.float16)[1:].view(8, 16)])
    assert not kernels.usable([torch.empty(2**15, 2**15, dtype=torch.float16, device="meta")])
