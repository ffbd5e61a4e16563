r"""Four questions about the singular values of a matrix. Each is close to something in
the chapter, and none is answered by a function of the package.

Letters as in the chapter: $W$ has shape $(m, n)$, singular values
$\sigma_1 \ge \sigma_2 \ge \dots$, and $W_r$ is its truncated SVD.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from course import given, task, variant

TITLE = "How close rank r comes"
OBJECTIVE = "Turn a theorem on singular values into numbers, and use the gauge freedom."
AFTER = ("primer",)

v = variant(
    power=(3, 4, 5, 6),
    order=(2, 3, 0.5, 4, 1.5),
    ratio=(4, 9, 16),
    error=(0.05, 0.06, 0.07, 0.08, 0.09, 0.11, 0.12),
)


@task(
    minutes=20,
    points={"value": 3, "gradient": 1, "edge cases": 1},
    given={"rank": [1, 2]},
    hint="Mirsky's theorem holds for every norm that depends on the singular values "
    "only. Which are the singular values of $W - W_r$?",
    example="tail(torch.diag(torch.tensor([5.0, 2.0, 1.0])), 1)",
)
def tail(W: Float[Tensor, "m n"], rank: int) -> Float[Tensor, ""]:
    r"""The floor in another norm

    The Schatten norm of order $p$ is
    $\lVert X \rVert_{S_p} = \big( \sum_i \sigma_i(X)^p \big)^{1/p}$. Yours has
    $p = «power»$. Derive $\min_{\operatorname{rank}(X) \le r} \lVert W - X
    \rVert_{S_p}$ and write a function that returns it. For $r \ge \min(m, n)$ it is 0.
    """
    S = torch.linalg.svdvals(W)
    return (S[rank:] ** v.power).sum() ** (1 / v.power)


@task(
    minutes=20,
    points={"value": 3, "gradient": 1, "shapes": 1},
    hint="Check two cases by hand: $k$ equal values, and one giant among zeros.",
    example="soft_rank(torch.tensor([2.0, 1.0, 1.0]))",
)
def soft_rank(
    S: Annotated[Float[Tensor, " k"], "positive"],
) -> Float[Tensor, ""]:
    r"""Another count of directions

    The chapter's effective rank is the exponential of an entropy. Rényi's entropy of
    order $q \ne 1$ is $H_q = \frac{1}{1 - q} \log \sum_i p_i^q$. Take the shares of the
    *squares*, $p_i = \sigma_i^2 / \sum_j \sigma_j^2$, and $q = «order»$, and return
    $\exp H_q$ of given singular values $S$.

    Convince yourself that the result is $k$ for $k$ equal values. For which order is it
    $1 / \sum_i p_i^2$, and how is that related to the stable rank?
    """
    share = S**2 / (S**2).sum()
    return (share**v.order).sum() ** (1 / (1 - v.order))


def _is_balanced(result, B, A):
    C, D = result
    if not torch.allclose(C @ D, B @ A, atol=1e-8):
        return "the product has changed"
    if not torch.allclose(C.T @ C, v.ratio * D @ D.T, atol=1e-8):
        return f"B'ᵀB' is not {v.ratio} A'A'ᵀ"
    return True


@task(
    minutes=30,
    points={"value": 3, "shapes": 1, "dtype": 1, "edge cases": 1},
    accept=_is_balanced,
    hint="Take QR decompositions of $B$ and of $A^\\top$. What is left is a product of "
    "two $(r, r)$ matrices, of which an SVD is cheap.",
)
def balanced(
    B: Float[Tensor, "m r"], A: Float[Tensor, "r n"]
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    r"""A gauge of your own

    Return factors $B'$ and $A'$ of the same shapes and the same product, $B'A' = BA$, with

    $$ B'^\top B' = «ratio»\, A' A'^\top . $$

    Never form a matrix of shape $(m, n)$: for a layer of 4096 × 4096 and $r = 8$ it would
    have 256 times as many numbers as the factors. Where $r > \min(m, n)$, raise a
    `ValueError`. Any $B'$ and $A'$ with the two properties are right.
    """
    if B.shape[1] > min(len(B), A.shape[1]):
        raise ValueError("rank above min(m, n)")
    Q, R = torch.linalg.qr(B)
    P, L = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R @ L.T)
    root = S.sqrt()
    weight = v.ratio**0.25
    return Q @ (U * root) * weight, (root[:, None] * Vh) @ P.T / weight


@given
def own_matrix() -> Tensor:
    """A matrix that only you have: a steep spectrum, turned on both sides."""
    generator = torch.Generator().manual_seed(v.seed)
    noise = {"generator": generator, "dtype": torch.float64}
    U = torch.linalg.qr(torch.randn(v.rows, v.rows, **noise)).Q
    V = torch.linalg.qr(torch.randn(v.columns, v.columns, **noise)).Q
    S = 0.7 ** torch.arange(v.columns) * (1 + torch.rand(v.columns, **noise))
    return U[:, : v.columns] * S @ V.T


@task(
    minutes=25,
    points={"value": 4},
    hint="The third number wants `own_matrix().shape` and nothing else.",
)
def report() -> tuple[int, float, int]:
    r"""Your matrix

    `own_matrix()` above is your own. Return three numbers about it:

    1. the smallest rank $r$ at which the relative error $\lVert W - W_r \rVert_F /
       \lVert W \rVert_F$ is at most «error»,
    2. the relative error at that rank,
    3. the largest rank at which two factors hold at most half as many numbers as $W$.

    Then look at (1) and (3): does low rank pay here? Would it for the matrix of the
    chapter's third exercise?
    """
    W = own_matrix()
    m, n = W.shape
    S = torch.linalg.svdvals(W)
    kept = S.square().cumsum(0) / S.square().sum()
    errors = (1 - kept).sqrt()
    rank = int((errors > v.error).sum()) + 1
    return rank, float(errors[rank - 1]), m * n // (2 * (m + n))
