r"""Reshape a weight into many small indices, cut them in two groups, and its singular values
across the cut have an entropy. You compute another entropy, across other cuts, and ask what a
low rank says about it, and what not.

Letters as in the chapter: a weight of shape $(2^k, 2^k)$ is a tensor of $2k$ indices of size
2, the first $k$ from the row, the others from the column.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from course import given, task, variant

TITLE = "Entropy across a cut"
OBJECTIVE = "Compute entropies across cuts of a tensor, and see what bounds them."
AFTER = ("primer", "adapters/lora", "analysis/artificial_entanglement")

v = variant(
    order=(2, 3, 0.5, 4),
    base=(3, 5, 7),
    offset=(1, 2, 3, 4, 5),
)


@task(
    minutes=25,
    points={"value": 3, "gradient": 1, "shapes": 1},
    hint="A factor in front of $W$ must not matter: make the $p_i$ sum to 1 first.",
    example="entropy(torch.diag(torch.tensor([2.0, 2.0, 1.0])))",
)
def entropy(W: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    r"""Another entropy

    The chapter uses von Neumann's entropy of $p_i = \sigma_i^2 / \sum_j \sigma_j^2$. Return
    the Tsallis entropy of order «order» instead,

    $$ T = \frac{1 - \sum_i p_i^{«order»}}{«order» - 1} . $$

    A matrix of zeros has no $p$: raise a `ValueError`. Between which bounds does $T$ lie for a
    matrix of rank $r$? Unlike the chapter's entropy it is not additive: what is it for the
    Kronecker product of two matrices?
    """
    S = torch.linalg.svdvals(W)
    if not S.any():
        raise ValueError("a matrix of zeros has no entropy")
    p = S.square() / S.square().sum()
    return (1 - (p**v.order).sum()) / (v.order - 1)


@task(
    minutes=30,
    points={"value": 3, "gradient": 1, "edge cases": 1},
    given={"cut": [1, 2, 3, 4, 5]},
    edges=[{"cut": 0}, {"cut": 6}],
    hint="`reshape` to six indices, `permute` so that they come in turns, `reshape` to a "
    "matrix of $2^{\\text{cut}}$ rows.",
)
def in_turns(W: Float[Tensor, "8 8"], cut: int) -> Float[Tensor, "a b"]:
    r"""Rows and columns in turns

    Take $k = 3$, a weight of shape $(8, 8)$ with row indices $i_1 i_2 i_3$ and column indices
    $j_1 j_2 j_3$, the most significant first. Put them in the order
    $j_1 i_1 j_2 i_2 j_3 i_3$ and cut behind the first `cut` of them, from 1 to 5. Return the
    matrix whose row index is the group before the cut and whose column index the one behind
    it, multiplied by $«base»^{-c}$ with $c$ = `cut`; the factor keeps your answer apart from
    your neighbour's. Any other cut is a `ValueError`.

    Which cut of the chapter's order gives $W$ itself? Is there one here?
    """
    if not 1 <= cut <= 5:
        raise ValueError("cut outside of 1 to 5")
    T = W.reshape(2, 2, 2, 2, 2, 2).permute(3, 0, 4, 1, 5, 2)
    return T.reshape(2**cut, -1) / v.base**cut


def _is_hidden(result, k):
    m = 2**k
    if result.shape != (m, m):
        return f"it has shape {tuple(result.shape)}, wanted {(m, m)}"
    if int(torch.linalg.matrix_rank(result)) != m:
        return "across the middle its rank is not full"
    S = torch.linalg.svdvals(result)
    if not torch.allclose(S, S[0].expand(m), rtol=1e-6) or abs(float(S[0]) - v.base) > 1e-6:
        return f"its singular values are not all {v.base}"
    T = result.reshape([2] * (2 * k))
    turns = [axis for pair in zip(range(k), range(k, 2 * k)) for axis in pair]
    T = T.permute(turns)
    for cut in range(2, 2 * k, 2):
        if int(torch.linalg.matrix_rank(T.reshape(2**cut, -1))) != 1:
            return f"in turns, cut behind {cut}, its rank is not 1"
    if bool((result.diagonal() != 0).any()):
        return "its diagonal is not zero"
    return True


@task(
    minutes=30,
    points={"value": 4, "edge cases": 1},
    given={"k": [2, 3, 4]},
    edges=[{"k": 0}, {"k": 1}],
    accept=_is_hidden,
    hint="A Kronecker product of small matrices has rank 1 across each cut between its "
    "factors. Which matrix of shape (2, 2) is orthogonal with a zero diagonal?",
)
def hidden(k: int) -> Float[Tensor, "m m"]:
    r"""Break it: full rank, no entropy

    Return a matrix of shape $(2^k, 2^k)$, $k \ge 1$, with all singular values equal to «base»
    and zeros on its diagonal, that has rank 1 across every cut behind a pair when its indices
    come in turns, $i_1 j_1 i_2 j_2 \dots i_k j_k$. So the largest possible entropy across the
    middle and none at all across other cuts are found in one matrix. For $k < 1$ raise a
    `ValueError`.

    How many numbers does such a matrix need? Which adapter would learn it, and why not LoRA?
    """
    if k < 1:
        raise ValueError("k below 1")
    X = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    W = v.base * X
    for _ in range(k - 1):
        W = torch.kron(W, X)
    return W


@given
def own_update() -> Tensor:
    """An update of rank 2, of shape (8, 8), and a little noise on it: your own."""
    noise = {"generator": torch.Generator().manual_seed(v.seed), "dtype": torch.float64}
    B, A = torch.randn(8, 2, **noise), torch.randn(2, 8, **noise)
    return B @ A + 0.05 * torch.randn(8, 8, **noise)


@task(
    minutes=25,
    points={"value": 5},
    hint="The entropy of a matrix and of its multiples is the same.",
)
def profile() -> list[float]:
    r"""Your update

    For `own_update()` return eight numbers: its entropy of the first task, its entropy across
    the five cuts of the second task, and the mean and the largest entropy of 20 matrices
    of shape (8, 8) with independent Gaussian entries, drawn by
    `torch.randn(8, 8, generator=g, dtype=torch.float64)` one after the other from a generator
    `g` with the seed `«seed» + «offset»`.

    Rank 2 bounds the first number. Does it bound the other five below those of noise?
    """
    W = own_update()
    g = torch.Generator().manual_seed(v.seed + v.offset)
    draws = [torch.randn(8, 8, generator=g, dtype=torch.float64) for _ in range(20)]
    noise = [float(entropy(draw)) for draw in draws]
    cuts = [float(entropy(in_turns(W, cut))) for cut in range(1, 6)]
    return [float(entropy(W)), *cuts, sum(noise) / 20, max(noise)]
