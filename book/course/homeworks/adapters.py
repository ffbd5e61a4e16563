r"""You write LoRA with another rule for its scale, find its gradients without autograd,
and show that equal updates need not train alike.

Letters as in the chapter: $\Delta W = s\,BA$ with $B$ of shape $(m, r)$, $A$ of shape
$(r, n)$, and a scale $s$ that follows from $\alpha$ and $r$.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from course import task, variant

TITLE = "Scale, start and gauge of an update"
OBJECTIVE = "Write an adapter, derive its gradients, and see what its gauge does to them."
AFTER = ("primer", "adapters/lora")

v = variant(
    power=(0.25, 0.75, 0.6, 0.4),
    penalty=(0.1, 0.2, 0.3),
    ratio=(2, 3, 4, 5, 6),
)


@task(
    minutes=15,
    points={"value": 2, "gradient": 1, "shapes": 1},
    given={"alpha": [1.0, 8.0, 16.0]},
    hint="The rank is the number of rows of $A$; it is no argument.",
    example="update(torch.ones(2, 3), torch.ones(1, 2), 8.0)",
)
def update(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], alpha: float
) -> Float[Tensor, "m n"]:
    r"""Another rule for the scale

    LoRA has $s = \alpha / r$, rank-stabilised LoRA $s = \alpha / \sqrt r$. Yours is

    $$ s = \alpha / r^{«power»} . $$

    Return $\Delta W$. Before you write it: if all entries of $A$ and $B$ are independent
    with mean 0 and variance 1, how does the size of one entry of $BA$ grow with $r$? And
    of $\Delta W$, under your rule?
    """
    return alpha / len(A) ** v.power * (B @ A)


@task(
    minutes=30,
    points={"value": 3, "shapes": 1, "inputs": 1},
    given={"scale": [0.5, 2.0]},
    hint="Write $L$ as a function of $\\Delta = s\\,BA$. The penalty adds a multiple of "
    "$\\Delta$ to its gradient by $\\Delta$.",
)
def gradients(
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    G: Float[Tensor, "m n"],
    scale: float,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    r"""Gradients by hand

    Let $G$ of shape $(m, n)$ be the gradient of a loss $\ell$ by the weight $W + s\,BA$.
    Derive the gradients of

    $$ L = \ell + \tfrac{«penalty»}{2} \lVert s\,BA \rVert_F^2 $$

    by $A$ and by $B$, and return them in this order. No autograd, and order the products
    of the penalty so that no matrix of shape $(m, n)$ beside $G$ is formed. What do both
    gradients say at LoRA's start, $B = 0$?
    """
    small = v.penalty * scale**2
    dA = scale * B.T @ G + small * (B.T @ B) @ A
    dB = scale * G @ A.T + small * B @ (A @ A.T)
    return dA, dB


@task(
    minutes=35,
    points={"value": 2, "gradient": 2, "state": 2},
    given={
        "base": lambda m, n: nn.Linear(n, m, dtype=torch.float64),
        "rank": [2, 3],
        "alpha": [1.0, 8.0],
    },
    hint="Parameters are `nn.Parameter`s of the dtype of `base.weight`. Compute the scale "
    "once, the product at each call: a product that is kept goes stale.",
)
class Adapter(nn.Module):
    r"""A layer around a layer

    Write a module that keeps a linear layer `base` frozen, weight and bias, and adds your
    update of the first task to it. Its parameters are called `A` and `B`. At the start
    $B$ is zero and $A$ is not, so that the layer computes what `base` computes, while the
    first gradient of $B$ is not zero. (Why not both zero? Why not the other way round?)
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        start = torch.randn(rank, n, dtype=base.weight.dtype)
        self.A = nn.Parameter(start)
        self.B = nn.Parameter(start.new_zeros(m, rank))
        self.scale = alpha / rank**v.power

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T


def _is_longer(result, A, B, G):
    C, D = result
    if not torch.allclose(D @ C, B @ A, atol=1e-8):
        return "the product has changed"
    before = (B @ B.T @ G + G @ A.T @ A).norm()
    after = (D @ D.T @ G + G @ C.T @ C).norm()
    if not torch.isclose(after, v.ratio * before, rtol=1e-6):
        return f"the step is {float(after / before):.4g} times as long"
    return True


@task(
    minutes=30,
    points={"value": 4, "edge cases": 1},
    accept=_is_longer,
    hint="Scale one factor by $c$ and the other by $1/c$. The squared length is then a "
    "quadratic expression in $u = c^4$, divided by $u$.",
)
def stretched(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], G: Float[Tensor, "m n"]
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    r"""Break it: the same update, another step

    A small step of gradient descent on both factors moves the product by a multiple of
    $BB^\top G + GA^\top A$. Find factors $A'$, $B'$ with the same product $B'A' = BA$
    for which the Frobenius norm of this move is exactly «ratio» times as large, and
    return them. If $B^\top G$ is zero, raise a `ValueError`. Any such factors are right.

    Which advice on learning rates of the two factors follows?
    """
    X, Y = B @ (B.T @ G), (G @ A.T) @ A
    if not X.any():
        raise ValueError("B has no gradient")
    a, b = X.square().sum(), Y.square().sum()
    h = v.ratio**2 * (X + Y).square().sum() / 2 - (X * Y).sum()
    u = (h + (h * h - a * b).sqrt()) / a
    c = u**0.25
    return A / c, B * c
