r"""Methods of this part give each layer its own rank: they score directions, close gates, or
cut what was trained. You derive another closing rule, share out a budget, and find the best
cut of a product without forming it.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from course import task, variant

TITLE = "Which directions stay"
OBJECTIVE = "Derive a proximal step, share a budget of ranks, and cut a product by its factors."
AFTER = ("primer", "adapters/lora", "ranks/sora", "ranks/increlora")

v = variant(
    bend=(0.5, 1.5, 2, 3),
    cost=(0.5, 0.75, 0.25),
    shrink=(1.2, 1.4, 1.7, 2, 2.5),
)


@task(
    minutes=25,
    points={"value": 3, "gradient": 1, "edge cases": 1},
    given={"penalty": [0.2, 0.5]},
    hint="Treat $x > 0$ first: where is the derivative of the objective zero, and when is "
    "that place positive?",
    example="close(torch.tensor([2.0, -0.3, -1.0]), 0.5)",
)
def close(gate: Float[Tensor, " r"], penalty: float) -> Float[Tensor, " r"]:
    r"""Another way to close a gate

    SoRA moves a gate $g$ to the minimiser of $\tfrac12 (x - g)^2 + \lambda |x|$, which is
    soft thresholding. With a second term,

    $$ \tfrac12 (x - g)^2 + \lambda \big( |x| + \tfrac{«bend»}{2}\, x^2 \big) , $$

    small gates still close, and large ones shrink in proportion. Derive the minimiser and
    return it for every entry of `gate`; `penalty` is $\lambda$. At which $|g|$ does your
    gate close, compared with SoRA's?
    """
    size = (gate.abs() - penalty).clamp(min=0)
    return gate.sign() * size / (1 + v.bend * penalty)


@task(
    minutes=30,
    points={"value": 3, "shapes": 1, "edge cases": 1},
    given={
        "widths": lambda k: 2.0 ** torch.randint(0, 7, (k,)).double(),
        "budget": [0, 3, 7],
    },
    hint="Flatten the weighted scores, sort once, and count how many of the winners lie in "
    "each row.",
)
def share_out(
    scores: Annotated[Float[Tensor, "k r"], "positive"],
    widths: Float[Tensor, " k"],
    budget: int,
) -> Int64[Tensor, " k"]:
    r"""Share out a budget of directions

    `scores` has a row for each of $k$ layers with a score for each of its $r$ directions.
    A direction of a wide layer costs more numbers, so each score is divided by
    $w^{«cost»}$, where $w$ is the layer's entry of `widths`. The `budget` directions with
    the largest results stay, over all layers together; all of them if there are fewer.
    Return how many stay in each layer.

    Which exponent would compare directions by score per number?
    """
    worth = scores / widths[:, None] ** v.cost
    best = worth.flatten().argsort(descending=True)[:budget]
    kept = torch.zeros(worth.numel(), dtype=torch.int64)
    kept[best] = 1
    return kept.reshape(worth.shape).sum(1)


@task(
    minutes=30,
    points={"value": 3, "gradient": 1, "shapes": 1},
    given={"rank": [1, 2]},
    hint="QR of $B$ and of $A^\\top$, an SVD of what is left. For $r = \\text{rank}$ there is "
    "no $\\sigma_{\\text{rank}+1}$: it counts as 0.",
)
def shrunk(B: Float[Tensor, "m r"], A: Float[Tensor, "r n"], rank: int) -> Float[Tensor, "m n"]:
    r"""Cut and shrink a product

    Let $BA = \sum_i \sigma_i u_i v_i^\top$. Noise lifts singular values, so whoever cuts at
    rank $k$ may want to lower those that stay. Return

    $$ \sum_{i \le k} \max(\sigma_i - «shrink»\, \sigma_{k+1},\, 0)\; u_i v_i^\top $$

    for $k$ = `rank`. Find the singular values from the factors: the SVD may be of a matrix
    of at most $r$ rows and columns. Where $k$ is above the rank that $BA$ can have,
    nothing is cut and nothing shrinks.
    """
    Q, R = torch.linalg.qr(B)
    P, L = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R @ L.T, full_matrices=False)
    first = S[rank : rank + 1].sum()
    size = (S[:rank] - v.shrink * first).clamp(min=0)
    return (Q @ U[:, :rank] * size) @ (Vh[:rank] @ P.T)


def _is_misled(result, rank):
    B, A, gates = result
    if B.shape[1] != rank or A.shape[0] != rank or gates.shape != (rank,):
        return f"B, A and gates are not of rank {rank}"
    parts = [float(g) * torch.outer(b, a) for g, b, a in zip(gates, B.T, A)]
    whole = sum(parts)
    small = int(gates.abs().argmin())
    if int((gates.abs() == gates.abs().min()).sum()) > 1:
        return "two gates are the smallest"
    without = [float(part.norm() / whole.norm()) for part in parts]
    wanted = 1 - v.cost / 2
    if abs(without[small] - wanted) > 1e-6:
        return f"without its smallest gate the update loses {without[small]:.6f} of its norm"
    return True


@task(
    minutes=25,
    points={"value": 4, "edge cases": 1},
    accept=_is_misled,
    given={"rank": [2, 3, 5]},
    edges=[{"rank": 1}],
    hint="Let the parts be orthogonal, so that squares add. The norm of part $i$ is "
    "$|g_i| \\lVert b_i \\rVert \\lVert a_i \\rVert$, and only the product counts.",
)
def misled(
    rank: int,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], Float[Tensor, " r"]]:
    r"""Break it: a small gate that matters

    A gated update is $\sum_i g_i\, b_i a_i^\top$ with columns $b_i$ of $B$ and rows $a_i$ of
    $A$. Pruning by the size of gates removes the part with the smallest $|g_i|$. Return
    $B$, $A$ and gates of the given rank, in shapes of your choice, for which exactly one
    gate is the smallest, and the norm of its part is
    $1 - «cost»/2$ times the norm of the whole update. For rank 1 raise a `ValueError`.

    Which normalisation of $B$ and $A$ makes pruning by gates safe?
    """
    if rank < 2:
        raise ValueError("rank below 2")
    share = 1 - v.cost / 2
    B = torch.eye(rank, dtype=torch.float64)
    rest = ((1 - share**2) / (rank - 1)) ** 0.5
    B[0, 0] = 2 * share / rest
    gates = torch.full((rank,), rest, dtype=torch.float64)
    gates[0] = rest / 2
    return B, torch.eye(rank, dtype=torch.float64), gates
