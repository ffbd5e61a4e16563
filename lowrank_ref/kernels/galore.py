"""A GaLore step of many matrices in two launches, in Triton: project and update the moments; project back and add.

| function       | computes, for every matrix of a list                    | definition in `optimizers`              |
|----------------|---------------------------------------------------------|-------------------------------------------|
| `project_adam` | R = PᵀG or GQ, the new moments, and Adam's direction N  | `galore`: `project`, `adam_directions`  |
| `add_back`     | W = keep · (W + factor · PN or NQᵀ)                     | `fast`: `add_back`                      |

One matrix is too small to fill a GPU, and 168 matrices are more launches than a CPU can issue in the time. So a kernel
gets a table of addresses and works on all matrices of one shape; R exists in registers only. For 16-bit numbers, on one
side. Products are summed in float32, and R is not rounded before it enters the moments.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCKS = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _matrix(entry, number: tl.constexpr, like):
    """Return the address of a matrix from the table. All start at multiples of 16 bytes, so that loads can be wide."""
    return tl.multiple_of(tl.load(entry + number).to(like.dtype), 16)


@triton.jit
def _product(entry, like, rows, columns, inner, li, lk, rk, rj, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Return rows i and columns j of this program's tile, which of them exist, and left[i, :] · right[:, j]."""
    tiles = tl.cdiv(columns, BN)
    i = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    j = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    left, right = _matrix(entry, 0, like), _matrix(entry, 1, like)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(
            left + i[:, None] * li + k[None, :] * lk, mask=(i[:, None] < rows) & (k[None, :] < inner), other=0.0
        )
        b = tl.load(
            right + k[:, None] * rk + j[None, :] * rj, mask=(k[:, None] < inner) & (j[None, :] < columns), other=0.0
        )
        acc = tl.dot(a, b, acc)
    return i, j, (i[:, None] < rows) & (j[None, :] < columns), acc


@triton.jit
def _project_adam(
    table, like, rows, columns, inner, li, lk, rk, rj, stride_n, beta1, beta2, eps, size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Table: addresses of left factor, right factor, M, V, N of each matrix."""
    entry = table + tl.program_id(1) * 5
    i, j, inside, R = _product(entry, like, rows, columns, inner, li, lk, rk, rj, BM, BN, BK)
    at = i[:, None] * columns + j[None, :]
    M, V = _matrix(entry, 2, like) + at, _matrix(entry, 3, like) + at
    first = tl.load(M, mask=inside, other=0.0).to(tl.float32)
    first += (1 - beta1) * (R - first)
    second = beta2 * tl.load(V, mask=inside, other=0.0).to(tl.float32) + (1 - beta2) * R * R
    tl.store(M, first.to(like.dtype.element_ty), mask=inside)
    tl.store(V, second.to(like.dtype.element_ty), mask=inside)
    N = size * first / (tl.sqrt(second) + eps)
    tl.store(_matrix(entry, 4, like) + i[:, None] * stride_n + j[None, :], N.to(like.dtype.element_ty), mask=inside)


@triton.jit
def _add_back(
    table, like, rows, columns, inner, li, lk, rk, rj, factor, keep,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Table: addresses of left factor, right factor and W of each matrix."""
    entry = table + tl.program_id(1) * 3
    i, j, inside, D = _product(entry, like, rows, columns, inner, li, lk, rk, rj, BM, BN, BK)
    W = _matrix(entry, 2, like) + i[:, None] * columns + j[None, :]
    new = keep * (tl.load(W, mask=inside, other=0.0).to(tl.float32) + factor * D)
    tl.store(W, new.to(like.dtype.element_ty), mask=inside)


def usable(tensors: list[Tensor]) -> bool:
    """Tell whether the kernels take these matrices: 16-bit, on a GPU, contiguous, starting at multiples of 16 bytes."""
    return all(
        T.dtype in (torch.bfloat16, torch.float16)
        and (T.is_cuda or INTERPRETED)
        and T.is_contiguous()
        and T.data_ptr() % 16 == 0
        for T in tensors
    )


def project_adam(
    G: list[Tensor],
    M: list[Tensor],
    V: list[Tensor],
    P: list[Tensor],
    side: str,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Update the moments in place and return Adam's directions of the projected gradients.

    Args:
        G: gradients (m, n), all of one shape.
        M, V: moments, (r, n) or (m, r).
        P: bases (m, r) of the side "left", or (n, r) of the side "right".
        step: t >= 1 of all of them.
        betas, eps: as in `optimizers.galore.adam_directions`.
    """
    G = [_aligned(g) for g in G]
    (rows, columns), (m, n) = M[0].shape, G[0].shape
    N = _empty(len(G), rows, columns, G[0])
    if side == "left":
        pairs, inner, strides = zip(P, G), m, (1, P[0].stride(0), G[0].stride(0), 1)
    else:
        pairs, inner, strides = zip(G, P), n, (G[0].stride(0), 1, P[0].stride(0), 1)
    table = _table([(*pair, *rest) for pair, *rest in zip(pairs, M, V, N)], G[0].device)
    size = (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    options = _options()
    grid = (triton.cdiv(rows, options["BM"]) * triton.cdiv(columns, options["BN"]), len(G))
    _project_adam[grid](
        *(table, G[0], rows, columns, inner, *strides, N[0].stride(0), betas[0], betas[1], eps, size), **options
    )
    return N


def add_back(W: list[Tensor], N: list[Tensor], P: list[Tensor], side: str, factor: float, keep: float) -> None:
    """Set every W (m, n) to keep · (W + factor · PN), or on the right to keep · (W + factor · NPᵀ), in place."""
    (m, n), inner = W[0].shape, P[0].shape[1]
    if side == "left":
        pairs, strides = zip(P, N), (P[0].stride(0), 1, N[0].stride(0), 1)
    else:
        pairs, strides = zip(N, P), (N[0].stride(0), 1, 1, P[0].stride(0))
    table = _table([(*pair, w) for pair, w in zip(pairs, W)], W[0].device)
    options = _options()
    grid = (triton.cdiv(m, options["BM"]) * triton.cdiv(n, options["BN"]), len(W))
    _add_back[grid](table, W[0], m, n, inner, *strides, factor, keep, **options)


def _options() -> dict[str, Any]:
    return {key: value for key, value in BLOCKS.items() if key.isupper()} if INTERPRETED else BLOCKS


def _table(rows: list[tuple[Tensor, ...]], device: torch.device) -> Tensor:
    return torch.tensor([[T.data_ptr() for T in row] for row in rows], dtype=torch.int64).to(device)


def _empty(count: int, rows: int, columns: int, like: Tensor) -> list[Tensor]:
    """Return matrices whose rows start at multiples of 16 bytes."""
    return list(like.new_empty(count, rows, (columns + 7) // 8 * 8)[:, :, :columns])


def _aligned(G: Tensor) -> Tensor:
    """Return G, or a copy with padded rows: reading misaligned rows number by number would cost more than the copy."""
    return G if G.shape[1] % 8 == 0 else _empty(1, G.shape[0], G.shape[1], G)[0].copy_(G)
