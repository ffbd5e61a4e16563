"""A GaLore step of many matrices in two launches, in Triton: project and update the moments; project back and add.

| function       | computes, for every matrix of a list                    | definition in `optimizers`              |
|----------------|---------------------------------------------------------|-----------------------------------------|
| `project_adam` | R = PᵀG or GQ, the new moments, and Adam's direction N  | `project_gradient`, `adam_directions`   |
| `add_back`     | W = keep · (W + factor · PN or NQᵀ)                     | `fast`: `add_back`                      |
| `squares`      | the sum of its squares                                  | `projected`: `check_gradients`          |

One matrix is too small to fill a GPU, and 168 matrices are more launches than a CPU can issue in the time. So a kernel
gets a table of addresses and works on all matrices of one shape; R exists in registers only. For 16-bit numbers, on one
side. Products are summed in float32, and R is not rounded before it enters the moments.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_ref.kernels import INTERPRETED, launch_options, runs_on

#: Blocks, found on an H100 with matrices of 2048 x 2048 and 2048 x 5461 at rank 512. These tiles are bound by the L2
#: cache; larger ones were slower, as what follows the product then has too few registers.
PROJECT = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4}
BACK = {**PROJECT, "num_stages": 3}
SQUARES = {"BLOCK": 4096, "BLOCKS": 8, "num_warps": 8}
#: Rows of copies and directions are multiples of this, so that they fill whole tiles.
PADDED = 128


@triton.jit
def _matrix(entry, number: tl.constexpr, like):
    """Return the address of a matrix from the table. All start at multiples of 16 bytes, so that loads can be wide."""
    return tl.multiple_of(tl.load(entry + number).to(like.dtype), 16)


@triton.jit
def _tile(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """Return rows i and columns j of this program's tile of a matrix, and which of its entries exist."""
    tiles = tl.cdiv(columns, BN)
    i = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    j = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    return i, j, (i[:, None] < rows) & (j[None, :] < columns)


@triton.jit
def _product(
    entry, like, i, j, rows, columns, inner, li, lk, rk, rj,
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return left[i, :] · right[:, j].

    WHOLE: memory holds whole tiles, so that no load needs a mask. Rows that do not exist are read as the last one.
    """
    k = tl.arange(0, BK)
    li_safe = i if li == 1 else tl.minimum(i, rows - 1)
    rj_safe = j if rj == 1 else tl.minimum(j, columns - 1)
    left = _matrix(entry, 0, like) + li_safe[:, None] * li + k[None, :] * lk
    right = _matrix(entry, 1, like) + k[:, None] * rk + rj_safe[None, :] * rj
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, inner, BK):
        if WHOLE:
            acc = tl.dot(tl.load(left), tl.load(right), acc)
        else:
            there = start + k < inner
            a = tl.load(left, mask=(i[:, None] < rows) & there[None, :], other=0.0)
            b = tl.load(right, mask=there[:, None] & (j[None, :] < columns), other=0.0)
            acc = tl.dot(a, b, acc)
        left += BK * lk
        right += BK * rk
    return acc


@triton.jit
def _project_adam(
    table, like, rows, columns, inner, li, lk, rk, rj, stride_n, beta1, beta2, eps, size,
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Table: addresses of left factor, right factor, M, V, N of each matrix."""
    entry = table + tl.program_id(1) * 5
    i, j, inside = _tile(rows, columns, BM, BN)
    R = _product(entry, like, i, j, rows, columns, inner, li, lk, rk, rj, WHOLE, BM, BN, BK)
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
    WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Table: addresses of left factor, right factor and W of each matrix."""
    entry = table + tl.program_id(1) * 3
    i, j, inside = _tile(rows, columns, BM, BN)
    W = _matrix(entry, 2, like) + i[:, None] * columns + j[None, :]
    D = _product(entry, like, i, j, rows, columns, inner, li, lk, rk, rj, WHOLE, BM, BN, BK)
    new = keep * (tl.load(W, mask=inside, other=0.0).to(tl.float32) + factor * D)
    tl.store(W, new.to(like.dtype.element_ty), mask=inside)


@triton.jit
def _squares(table, like, sums, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Add up the squares of one part of a tensor. Table: address and count of the numbers of each."""
    entry = table + tl.program_id(1) * 2
    first, count = _matrix(entry, 0, like), tl.load(entry + 1)
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    if start < count:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for block in range(BLOCKS):
            at = start + block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(first + at, mask=at < count, other=0.0).to(tl.float32)
            total += x * x
        tl.atomic_add(sums + tl.program_id(1), tl.sum(total))


def usable(tensors: list[Tensor]) -> bool:
    """Tell whether the kernels take these matrices: 16-bit, contiguous, starting at multiples of 16 bytes.

    They must lie on the current GPU, where Triton launches: an address means nothing on another one; and it must be one
    that runs kernels. Places inside a matrix are 32-bit numbers, so it must not be too large.
    """
    return runs_on(tensors[0].device) and all(
        T.dtype in (torch.bfloat16, torch.float16)
        and (INTERPRETED or T.is_cuda and T.get_device() == torch.cuda.current_device())
        and T.is_contiguous()
        and T.data_ptr() % 16 == 0
        and T.numel() < 2**30
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
    grid, options = _launch(PROJECT, G, rows, columns, inner, strides)
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
    grid, options = _launch(BACK, W, m, n, inner, strides)
    _add_back[grid](table, W[0], m, n, inner, *strides, factor, keep, **options)


def squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of the squares of each tensor, float32."""
    table = _on_device([[T.data_ptr(), T.numel()] for T in tensors], tensors[0].device)
    sums = torch.zeros(len(tensors), device=tensors[0].device)
    parts = triton.cdiv(max(T.numel() for T in tensors), SQUARES["BLOCK"] * SQUARES["BLOCKS"])
    _squares[parts, len(tensors)](table, tensors[0], sums, **launch_options(SQUARES))
    return sums


def _launch(
    blocks: dict[str, int], matrices: list[Tensor], rows: int, columns: int, inner: int, strides: tuple[int, ...]
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid and the options. Tiles are whole if memory holds all of them: then loads need no mask."""
    li, lk, rk, rj = strides
    BM, BN, BK = (blocks[name] for name in ("BM", "BN", "BK"))
    whole = inner % BK == 0 and (li > 1 or lk % BM == 0) and (rj > 1 or rk % BN == 0)
    options: dict[str, Any] = {**launch_options(blocks), "WHOLE": whole}
    if not INTERPRETED:
        card = torch.cuda.get_device_properties(matrices[0].device)
        room = getattr(card, "shared_memory_per_block_optin", 99 * 1024)  # what the smallest cards have
        options["num_stages"] = max(1, min(blocks["num_stages"], room // (2 * (BM + BN) * BK)))
    return (triton.cdiv(rows, BM) * triton.cdiv(columns, BN), len(matrices)), options


def _table(rows: list[tuple[Tensor, ...]], device: torch.device) -> Tensor:
    return _on_device([[T.data_ptr() for T in row] for row in rows], device)


def _on_device(numbers: list[list[int]], device: torch.device) -> Tensor:
    """Copy to the device without waiting for it: the CPU goes on to the next launch."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def _empty(count: int, rows: int, columns: int, like: Tensor) -> list[Tensor]:
    """Return matrices whose rows fill whole tiles."""
    return list(like.new_empty(count, rows, triton.cdiv(columns, PADDED) * PADDED)[:, :, :columns])


def _aligned(G: Tensor) -> Tensor:
    """Return G, or a copy with padded rows: reading misaligned rows number by number would cost more than the copy.

    Triton reads wide where it knows that rows start at multiples of 16 numbers.
    """
    return G if G.shape[1] % 16 == 0 else _empty(1, G.shape[0], G.shape[1], G)[0].copy_(G)
