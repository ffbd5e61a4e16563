"""Linear algebra that several papers share: SVD with fixed signs, fast bases, and measures of rank.

A basis of "the top r directions" is always an orthonormal matrix (m, r) for the *column* space of a matrix (m, n); pass
the transpose for the row space. There are four, from exact to fast:

- `svd_basis`: an SVD, the definition. Slow on a GPU, where it cannot be turned into large matrix products.
- `gram_basis`: an eigendecomposition of the smaller Gram matrix. The same subspace, except for directions with singular
  values under about 3e-4 of the largest (in float32).
- `power_basis`: products and thin QRs only. Nearly the same energy; measure it with `captured_energy`.
- `subspace_basis`: products with a Gram matrix and Cholesky factors only, for many matrices at once. Fastest on a GPU.

The sign of a column is arbitrary, and backends choose differently. Here its largest entry is positive; or, where the
last basis is given as `start`, the column points along its column there.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.checks import check_finite, check_integer, check_matrix, check_rank


def _work_dtype(W: Tensor) -> torch.dtype:
    """Decompositions are not defined in half precision: compute those in float32."""
    return torch.float32 if W.dtype in (torch.float16, torch.bfloat16) else W.dtype


def _scaled(X: Tensor) -> tuple[Tensor, float]:
    """Return X · 2⁻ᵏ, its largest entry near 1, and 2ᵏ: squares stay in range, and no digit is lost.

    k keeps two steps from the ends of the exponents, so that 2ᵏ and 2⁻ᵏ are normal numbers.
    """
    furthest = -math.frexp(torch.finfo(X.dtype).tiny)[1] - 1
    exponent = math.frexp(float(X.abs().max()))[1]
    exponent = max(-furthest, min(exponent, furthest))
    return X * math.ldexp(1.0, -exponent), math.ldexp(1.0, exponent)


def fixed_signs(U: Float[Tensor, "*batch m r"]) -> Float[Tensor, "*batch r"]:
    """Return the sign (+1 or -1) of the largest-magnitude entry of every column.

    Singular vectors are defined up to a sign, and backends choose differently. Multiplying by these signs makes the
    choice one rule (the largest entry is positive), so that runs on other hardware follow the same path.

    Args:
        U: columns to orient, shape (..., m, r).

    Returns:
        Signs, shape (..., r).
    """
    peak = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True)).squeeze(-2)
    return torch.where(peak < 0, -1.0, 1.0).to(U.dtype)


def svd(
    W: Float[Tensor, "m n"], rank: int | None = None
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Thin SVD with fixed signs, W ≈ U diag(S) Vh, truncated to `rank`.

    Half-precision input is computed in float32 and stays float32.

    Args:
        W: matrix (m, n), floating point, finite.
        rank: kept singular values, 1 <= rank <= min(m, n); None keeps all.

    Returns:
        U (m, r), S (r,) in falling order, Vh (r, n).

    Raises:
        TypeError, ValueError: W is not a finite floating-point matrix, or rank is out of range.

    Example:
        >>> U, S, Vh = svd(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        >>> S.tolist(), (U @ S.diag() @ Vh).tolist()
        ([3.0, 2.0], [[3.0, 0.0], [0.0, -2.0]])
    """
    check_matrix("W", W)
    rank = min(W.shape) if rank is None else rank
    check_rank(rank, W.shape)
    U, S, Vh = torch.linalg.svd(W.to(_work_dtype(W)), full_matrices=False)
    signs = fixed_signs(U[:, :rank])
    return U[:, :rank] * signs, S[:rank], Vh[:rank] * signs[:, None]  # products, so that no view keeps all of U alive


def _oriented(P: Tensor, start: Tensor | None) -> Tensor:
    """Return a basis with its columns turned along those of the last one; without it by `fixed_signs`."""
    signs = fixed_signs(P)
    if start is not None and start.shape == P.shape:
        along = (P * start.to(P.dtype)).sum(dim=-2)
        signs = torch.where(along == 0, signs, along.sign())
    return P * signs.unsqueeze(-2)


def svd_basis(G: Float[Tensor, "m n"], rank: int, *, start: Tensor | None = None) -> Float[Tensor, "m r"]:
    """Orthonormal basis of the top `rank` left singular vectors, by an exact SVD. The definition.

    Args:
        G: matrix (m, n), floating point, finite.
        rank: 1 <= rank <= min(m, n).
        start: the last basis (m, rank), along which the columns are turned; None, or another shape: see the top.

    Returns:
        P (m, rank), PᵀP = I, in float32 or float64.
    """
    return _oriented(svd(G, rank)[0], start)


def gram_basis(G: Float[Tensor, "m n"], rank: int, *, start: Tensor | None = None) -> Float[Tensor, "m r"]:
    """Same subspace as `svd_basis`, from an eigendecomposition of the smaller Gram matrix.

    G Gᵀ = U S² Uᵀ, so its top eigenvectors are the top left singular vectors. For a tall G the Gram matrix GᵀG (n, n)
    is smaller; then U = G V, re-orthonormalised by QR. Squaring loses singular values under sqrt(machine epsilon) of
    the largest: their directions are arbitrary, and carry next to no energy.

    Args:
        G: matrix (m, n), floating point, finite.
        rank: 1 <= rank <= min(m, n).
        start: the last basis (m, rank), along which the columns are turned; None, or another shape: see the top.

    Returns:
        P (m, rank), PᵀP = I, in float32 or float64.

    Raises:
        TypeError, ValueError: G is no finite matrix of floating point, or rank is out of range.
    """
    check_matrix("G", G)
    check_rank(rank, G.shape)
    X = G.to(_work_dtype(G))
    X = X / X.abs().max().clamp_min(torch.finfo(X.dtype).tiny)  # gradients of 1e-20 would underflow when squared
    m, n = X.shape
    if m <= n:
        P = torch.linalg.eigh(X @ X.T).eigenvectors[:, -rank:].flip(1)
    else:
        V = torch.linalg.eigh(X.T @ X).eigenvectors[:, -rank:].flip(1)
        P = torch.linalg.qr(X @ V).Q
    return _oriented(P, start)


def power_basis(
    G: Float[Tensor, "m n"],
    rank: int,
    *,
    start: Float[Tensor, "m r"] | None = None,
    oversample: int = 8,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "m r"]:
    """Approximate the top left singular subspace by randomised subspace iteration (Halko, Martinsson and Tropp 2011).

    Only products with G, thin QR factorisations and one eigendecomposition of size rank + oversample.

    Args:
        G: matrix (m, n), floating point, finite.
        rank: 1 <= rank <= min(m, n).
        start: basis (m, rank) to improve, such as that of the last refresh, along which the columns are then turned;
            None, or another shape, starts from noise.
        oversample: extra directions to carry along, >= 0; the best `rank` of all are kept.
        iterations: products with G Gᵀ, >= 0; each sharpens the basis by the squared ratio of singular values.
        generator: source of the Gaussian noise.

    Returns:
        P (m, rank), PᵀP = I, in float32 or float64.

    Raises:
        TypeError, ValueError: G is no finite matrix of floating point, or a number is out of range.
    """
    check_matrix("G", G)
    check_rank(rank, G.shape)
    check_integer("oversample", oversample, low=0)
    check_integer("iterations", iterations, low=0)
    X, _ = _scaled(G.to(_work_dtype(G)))  # unscaled, float32 gradients of 1e-22 or 1e20 leave its range when squared
    width = min(rank + oversample, *X.shape)
    device = generator.device if generator is not None else X.device
    Y = X @ torch.randn(X.shape[1], width, generator=generator, dtype=X.dtype, device=device).to(X.device)
    if start is not None and start.shape == (X.shape[0], rank):
        Y[:, :rank] = start
    Q = torch.linalg.qr(Y).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(X @ torch.linalg.qr(X.T @ Q).Q).Q
    small = Q.T @ X
    P = Q @ torch.linalg.eigh(small @ small.T).eigenvectors[:, -rank:].flip(1)
    return _oriented(P, start)


def orthonormal(Y: Float[Tensor, "*batch m r"]) -> Float[Tensor, "*batch m r"]:
    """Orthonormal basis of the columns of each matrix by a Cholesky factor of YᵀY, twice and in float64.

    6mr² + ⅔r³ FLOPs, 1.5 times those of a thin QR factorisation, but nearly all of them products and triangular
    solves, which a GPU does far faster. Squaring is safe up to a condition number of 10⁷, which float32 columns do not
    exceed unless some depend on others; those take QR.

    Args:
        Y: columns (..., m, r), r <= m, float32 or float64.
    """
    Z = Y.double()
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(Z.mT @ Z)
        if bool(failed.any()):
            return torch.linalg.qr(Y).Q
        Z = torch.linalg.solve_triangular(L.mT, Z, upper=True, left=False)
    return Z.to(Y.dtype)


def subspace_basis(
    G: Float[Tensor, "*batch m n"],
    rank: int,
    *,
    start: Float[Tensor, "*batch m r"] | None = None,
    iterations: int = 4,
) -> Float[Tensor, "*batch m r"]:
    """Approximate top left singular subspaces of one matrix or a batch by subspace iteration with their Gram matrices.

    One product gives the smaller Gram matrix H (k, k), k = min(m, n); each iteration is then H·Q, 2k²r FLOPs, made
    orthonormal by `orthonormal`, 6kr² + ⅔r³ more. Squaring loses what `gram_basis` loses.

    Args:
        G: matrices (..., m, n), floating point, finite.
        rank: 1 <= rank <= min(m, n).
        start: bases to improve, such as those of the last refresh, along which the columns are then turned. None, or
            another shape, starts from the same noise in every process, so that all ranks of a DDP run find the same
            basis.
        iterations: >= 1; each sharpens the basis by the squared ratio of singular values.

    Returns:
        P (..., m, rank), PᵀP = I, in float32 or float64.

    Raises:
        TypeError, ValueError: G holds no finite matrices of floating point, or rank is out of range.
    """
    for matrix in G.flatten(0, -3) if G.ndim > 2 else (G,):
        check_matrix("G", matrix)
    check_rank(rank, G.shape[-2:])
    check_integer("iterations", iterations, low=1)
    X = G.to(_work_dtype(G))
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    tall = X.shape[-2] > X.shape[-1]
    H = X.mT @ X if tall else X @ X.mT
    if start is not None and start.shape == (*X.shape[:-1], rank):
        Q = X.mT @ start.to(X.dtype) if tall else start.to(X.dtype)
    else:
        noise = torch.Generator(X.device).manual_seed(0)
        Q = torch.randn(H.shape[-1], rank, generator=noise, dtype=X.dtype, device=X.device).expand(*H.shape[:-1], rank)
    for _ in range(iterations):
        Q = orthonormal(H @ Q)
    P = orthonormal(X @ Q) if tall else Q
    return _oriented(P, start)


def randomized_svd(
    W: Float[Tensor, "m n"],
    rank: int,
    *,
    oversample: int = 8,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """Truncated SVD from a random sketch: project on `power_basis`, take the exact SVD of the small rest.

    Args:
        W: matrix (m, n), floating point, finite.
        rank: 1 <= rank <= min(m, n).
        oversample: extra sketch columns, >= 0; the sketch never exceeds min(m, n).
        iterations: power iterations, >= 0.
        generator: source of the sketch.

    Returns:
        U (m, rank), S (rank,), Vh (rank, n), with fixed signs.

    Raises:
        TypeError, ValueError: W is no finite matrix of floating point, or a number is out of range.
    """
    check_matrix("W", W)
    check_rank(rank, W.shape)
    width = min(rank + oversample, *W.shape)
    X, scale = _scaled(W.to(_work_dtype(W)))
    Q = power_basis(X, width, oversample=0, iterations=iterations, generator=generator)
    U, S, Vh = svd(Q.T @ X, rank)
    U = Q @ U
    signs = fixed_signs(U)
    return U * signs, S * scale, Vh * signs[:, None]


def factored_svd(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """SVD of the product BA, which is never formed: one QR of each factor and the SVD of the small R_B R_Aᵀ.

    O((m + n)r² + r³) instead of O(mn·min(m, n)). Half-precision input is computed in float32 and stays float32.

    Args:
        A: (r, n), floating point, finite.
        B: (m, r), of the same dtype.

    Returns:
        U (m, k), S (k,) in falling order, Vh (k, n), with fixed signs, k = min(m, n, r).

    Raises:
        TypeError, ValueError: A or B is no finite floating-point matrix, or they are no factors of one product.

    Example:
        >>> A, B = torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0], [0.0]])
        >>> U, S, Vh = factored_svd(A, B)
        >>> S.tolist(), torch.allclose(U * S @ Vh, B @ A)
        ([6.0], True)
    """
    _check_factors(A, B)
    Q_B, R_B = torch.linalg.qr(B.to(_work_dtype(B)))
    Q_A, R_A = torch.linalg.qr(A.to(_work_dtype(A)).T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    U = Q_B @ U
    signs = fixed_signs(U)
    return U * signs, S, (Vh @ Q_A.T) * signs[:, None]


def _check_factors(A: Tensor, B: Tensor) -> None:
    check_matrix("A", A)
    check_matrix("B", B)
    if B.shape[1] != len(A):
        raise ValueError(f"A, B: got shapes {tuple(A.shape)} and {tuple(B.shape)}, wanted (r, n) and (m, r)")


def randomized_factored_svd(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    rank: int,
    *,
    oversample: int = 10,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Truncated SVD of BA from a random sketch; every product goes through the factors, and BA is never formed.

    With rank + oversample >= r the sketch spans all columns of BA, and the result is exact up to rounding.

    Args:
        A: (r, n), floating point, finite.
        B: (m, r), of the same dtype.
        rank: k, 1 <= rank <= min(m, n, r).
        oversample: extra sketch columns, >= 0; the sketch never exceeds min(m, n, r).
        iterations: power iterations, >= 0.
        generator: source of the sketch.

    Returns:
        U (m, rank), S (rank,), Vh (rank, n), with fixed signs.

    Raises:
        TypeError, ValueError: what `factored_svd` refuses, or a number is out of range.
    """
    _check_factors(A, B)
    (r, n), m = A.shape, len(B)
    check_rank(rank, (m, n, r))
    check_integer("oversample", oversample, low=0)
    check_integer("iterations", iterations, low=0)
    A, B = A.to(_work_dtype(A)), B.to(_work_dtype(B))
    place = generator.device if generator is not None else A.device
    noise = torch.randn(n, min(rank + oversample, m, n, r), generator=generator, dtype=A.dtype, device=place)
    Q = torch.linalg.qr(B @ (A @ noise.to(A.device))).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(B @ (A @ torch.linalg.qr(A.T @ (B.T @ Q)).Q)).Q
    U, S, Vh = torch.linalg.svd((Q.T @ B) @ A, full_matrices=False)
    U = Q @ U[:, :rank]
    signs = fixed_signs(U)
    return U * signs, S[:rank], Vh[:rank] * signs[:, None]


def captured_energy(G: Float[Tensor, "m n"], P: Annotated[Float[Tensor, "m r"], "orthonormal"]) -> float:
    """Share of ‖G‖_F² that survives projection on an orthonormal basis, ‖PᵀG‖² / ‖G‖².

    Args:
        G: matrix (m, n), floating point, finite.
        P: orthonormal columns (m, r), floating point, finite.

    Returns:
        A share in [0, 1], up to rounding; 1.0 for G = 0, where nothing is lost.

    Raises:
        TypeError, ValueError: G or P is no such matrix, or they have not as many rows.
    """
    check_matrix("G", G)
    check_matrix("P", P)
    if len(G) != len(P):
        raise ValueError(f"P: got {len(P)} rows, wanted {len(G)}, as many as G has")
    X = G.to(torch.promote_types(_work_dtype(P), _work_dtype(G)))
    X = X / X.abs().max().clamp_min(torch.finfo(X.dtype).tiny)  # squares of small numbers would underflow
    total = X.square().sum()
    return float((P.T.to(X.dtype) @ X).square().sum() / total) if total > 0 else 1.0


def effective_rank(S: Float[Tensor, " r"]) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007).

    Args:
        S: singular values, >= 0, not all zero.

    Returns:
        A number between 1 (one direction) and len(S) (all equal).

    Raises:
        ValueError: a negative entry, or all zero.

    Example:
        >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
        2.0
    """
    _check_spectrum(S)
    p = S.double() / S.double().max()
    p = p / p.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def _check_spectrum(S: Tensor) -> None:
    check_finite("S", S)
    if bool((S < 0).any()) or not bool((S > 0).any()):
        raise ValueError("S: got a negative entry or all zeros, wanted singular values >= 0 with at least one > 0")


def stable_rank(S: Float[Tensor, " r"]) -> float:
    """‖W‖_F² / ‖W‖_2² from the singular values: how many copies of the largest value make up the whole.

    Small values count by their squares: n of them, each ε times the largest, add nε².

    Args:
        S: singular values, >= 0, not all zero.

    Returns:
        A number between 1 and len(S).

    Raises:
        ValueError: a negative entry, or all zero.
    """
    _check_spectrum(S)
    return float((S.double() / S.double().max()).square().sum())
