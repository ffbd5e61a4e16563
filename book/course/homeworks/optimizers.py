r"""GaLore keeps Adam's moments in a small space. You write its step with other moments, carry
moments from one basis to the next, build a small optimizer, and try it on a problem of your
own.

Letters as in the chapter: $G$ is a gradient of shape $(m, n)$, $P$ of shape $(m, r)$ has
orthonormal columns, and $R = P^\top G$.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from course import given, task, variant

TITLE = "Moments in a moving subspace"
OBJECTIVE = "Write projected steps with state, and derive what a change of basis does to it."
AFTER = ("primer", "optimizers/galore")

v = variant(
    power=(0.25, 0.3, 0.4, 0.75),
    momentum=(0.7, 0.8, 0.85, 0.9, 0.95),
    mix=(0.2, 0.4, 0.6),
)


@task(
    minutes=30,
    points={"value": 2, "inputs": 2, "shapes": 1},
    given={"lr": [0.01, 0.1]},
    hint="`lerp_`, `mul_` and `add_` change a tensor in place. The order of decay and "
    "addition matters, and so does whether the step sees the old or the new moments.",
)
def projected_step(
    W: Float[Tensor, "m n"],
    G: Float[Tensor, "m n"],
    P: Annotated[Float[Tensor, "m r"], "orthonormal"],
    M: Float[Tensor, "r n"],
    V: Annotated[Float[Tensor, "r n"], "positive"],
    lr: float,
) -> Float[Tensor, "m n"]:
    r"""A step with another root

    Return the weight after one step, with $\odot$ for products of entries:

    $$ M \leftarrow «momentum»\, M + (1 - «momentum»)\, R, \qquad
       V \leftarrow 0.99\, V + 0.01\, R \odot R, $$
    $$ W' = W - \eta\, P \big( M / (V + 0.01)^{«power»} \big) , $$

    power and quotient by entry. $M$ and $V$ are updated in place, $W$, $G$ and $P$ stay as
    they are. Adam has the power $1/2$. Multiply all gradients by 10: by which factor does
    the step change in the long run, under Adam and under your rule?
    """
    R = P.T @ G
    M.mul_(v.momentum).add_((1 - v.momentum) * R)
    V.mul_(0.99).add_(0.01 * R * R)
    return W - lr * P @ (M / (V + 0.01) ** v.power)


@task(
    minutes=30,
    points={"value": 3, "gradient": 1, "shapes": 1},
    hint="A row of $M$ holds coordinates. Write the vector that they stand for in the new "
    "basis. For $V$, expand the square of a sum and drop the mixed terms.",
)
def carried(
    M: Float[Tensor, "r n"],
    V: Annotated[Float[Tensor, "r n"], "positive"],
    old: Annotated[Float[Tensor, "m r"], "orthonormal"],
    new: Annotated[Float[Tensor, "m r"], "orthonormal"],
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "r n"]]:
    r"""Carry the moments to a new basis

    GaLore leaves $M$ and $V$ as they are when the basis changes from $P$ to $P'$. Let
    $C = P'^\top P$. (1) Which $M'$ makes $P'M'$ the closest matrix to $PM$ that the new
    basis can write? (2) If the coordinates of the old gradients were uncorrelated with mean
    0, which $V'$ would their squares have in the new basis?

    A careful optimizer trusts neither: it returns «mix» of the carried moment and
    $1 - «mix»$ of the moment as it was, for $M$ and for $V$. Return both, new tensors.
    """
    C = new.T @ old
    return v.mix * (C @ M) + (1 - v.mix) * M, v.mix * (C * C) @ V + (1 - v.mix) * V


@task(
    minutes=40,
    points={"value": 2, "state": 2, "shapes": 1, "edge cases": 1},
    given={"lr": [0.1], "rank": [2]},
    hint="`self.state[p]` is a dictionary that `state_dict()` saves. A basis that is kept "
    "anywhere else is lost when training resumes.",
)
class ProjectedMomentum(torch.optim.Optimizer):
    r"""An optimizer with a basis for life

    Write a `torch.optim.Optimizer` for matrices, called as
    `ProjectedMomentum(params, lr=0.1, rank=2)`. At the first gradient $G$ of a matrix it
    keeps $P$, the first `rank` left singular vectors of $G$ (all of them, where there are
    fewer). Each step is

    $$ M \leftarrow «momentum»\, M + P^\top G, \qquad
       W \leftarrow W - \eta\, P \big( P^\top G + «momentum» M \big), $$

    Nesterov's form, with $M = 0$ at the start. Parameters without a gradient are left
    alone. It resumes from its state dict exactly.
    """

    def __init__(self, params, lr: float = 0.1, rank: int = 2) -> None:
        super().__init__(params, {"lr": lr, "rank": rank})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "P" not in state:
                    U = torch.linalg.svd(p.grad, full_matrices=False).U
                    state["P"] = U[:, : group["rank"]]
                    state["M"] = torch.zeros_like(state["P"].T @ p.grad)
                R = state["P"].T @ p.grad
                state["M"].mul_(v.momentum).add_(R)
                p.sub_(group["lr"] * state["P"] @ (R + v.momentum * state["M"]))


@given
def own_problem() -> tuple[Tensor, Tensor]:
    """A target of rank 3, turned in your own way, and what each row of it weighs."""
    noise = torch.Generator().manual_seed(v.seed)
    U = torch.randn(v.rows, 3, generator=noise, dtype=torch.float64)
    V = torch.randn(3, v.columns, generator=noise, dtype=torch.float64)
    weight = 0.5 + torch.rand(v.rows, 1, generator=noise, dtype=torch.float64)
    return U @ V / v.rows**0.5, weight


@task(
    minutes=20,
    points={"value": 4},
    hint="The gradient of $f$ by $W$ is the weighted difference. Its columns, and so the "
    "basis, change as $W$ does.",
)
def losses() -> list[float]:
    r"""Your problem

    `own_problem()` returns a target $T$ and weights $w$, one for each row. Minimise
    $f(W) = \tfrac12 \sum_{ij} w_i (W - T)_{ij}^2$ from $W = 0$ by 15 steps
    $W \leftarrow W - «mix»\, P P^\top G$, where $G$ is the gradient of $f$ and $P$ its
    first $r$ left singular vectors, found anew at each step. Return $f$ at the end for
    $r = 1, 2$. Why is $r = 1$ not stuck, although every step has rank 1?
    """
    T, weight = own_problem()
    found = []
    for rank in (1, 2):
        W = torch.zeros_like(T)
        for _ in range(15):
            G = weight * (W - T)
            P = torch.linalg.svd(G, full_matrices=False).U[:, :rank]
            W = W - v.mix * P @ (P.T @ G)
        found.append(float((weight * (W - T) ** 2).sum() / 2))
    return found
