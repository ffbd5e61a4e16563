r"""An attack is a constrained maximisation. You solve it in norms that the chapter does not
use, where the answer is exact, and then run it as the chapter does, step by step.

The model is linear: logits $z = Wx + b$ with a row of $W$ for each class.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from course import given, task, variant

TITLE = "Another norm, another attack"
OBJECTIVE = "Derive steps and certificates from dual norms, and write an attack with them."
AFTER = ("robustness/ramp",)

v = variant(
    power=(3, 4, 1.5, 2.5),
    scale=(0.3, 0.5, 0.8),
    steps=(3, 4, 5, 6, 7),
)


@task(
    minutes=35,
    points={"value": 3, "edge cases": 1, "shapes": 1},
    given={"epsilon": [0.1, 1.0]},
    hint="Hölder: $g^\\top d \\le \\lVert g \\rVert_q \\lVert d \\rVert_p$ with "
    "$1/p + 1/q = 1$. When is it an equality?",
    example="steepest(torch.tensor([2.0, -1.0, 0.0]), 1.0)",
)
def steepest(g: Float[Tensor, " n"], epsilon: float) -> Float[Tensor, " n"]:
    r"""The steepest step

    FGSM's step $\epsilon \operatorname{sign} g$ maximises $g^\top d$ over
    $\lVert d \rVert_\infty \le \epsilon$, and $\epsilon g / \lVert g \rVert_2$ does it for
    $p = 2$. Derive the maximiser over $\lVert d \rVert_p \le \epsilon$ for $p = «power»$ and
    return it; for $g = 0$ return zeros. Check that your formula gives the two known steps as
    $p \to \infty$ and at $p = 2$.
    """
    q = v.power / (v.power - 1)
    size = g.abs() ** (q - 1)
    length = (g.abs() ** q).sum() ** (1 / v.power)
    return epsilon * g.sign() * size / length.clamp(min=1e-30)


@task(
    minutes=30,
    points={"value": 3, "shapes": 1, "gradient": 1},
    hint="For one rival class $j$ the margin changes by $(w_j - w_y)^\\top d$. How far must "
    "$\\lVert d \\rVert_p$ go?",
)
def radius(
    W: Float[Tensor, "c n"], x: Float[Tensor, " n"], label: Int64[Tensor, ""]
) -> Float[Tensor, ""]:
    r"""An exact certificate

    How large is the smallest $\lVert d \rVert_p$, $p = «power»$, with which $x + d$ is on the
    border between class `label` and another one? Derive it and return it, with a *negative*
    sign where $x$ is already classified wrongly: then it is
    $\min_j (z_y - z_j) / \lVert w_y - w_j \rVert_q$ all the same. There is no bias here. For a
    single class, or a label that is none, raise a `ValueError`.
    """
    if len(W) < 2 or not 0 <= int(label) < len(W):
        raise ValueError("no rival")
    q = v.power / (v.power - 1)
    y = int(label)
    rivals = torch.cat([W[:y], W[y + 1 :]])
    apart = W[y] - rivals
    return ((apart @ x) / (apart.abs() ** q).sum(1) ** (1 / q)).min()


@task(
    minutes=30,
    points={"value": 3, "inputs": 1, "edge cases": 1},
    given={"epsilon": [0.3, 1.0]},
    hint="The gradient of the loss by $x$ is $W^\\top (\\text{softmax}(Wx) - e_y)$. Project on "
    "the ball first, on the box afterwards.",
)
def attack(
    W: Float[Tensor, "c n"],
    x: Float[Tensor, " n"],
    label: Annotated[Int64[Tensor, ""], "below c"],
    epsilon: float,
) -> Float[Tensor, " n"]:
    r"""The attack, step by step

    Write projected gradient ascent on the cross-entropy of $Wx$. Start at $x$. In each of
    «steps» steps move by $«scale»\, \epsilon\, g / \lVert g \rVert_2$ along the gradient $g$
    (stay where it is zero), project on the ball
    $\lVert x' - x \rVert_2 \le \epsilon$, then clip every entry to $[-1, 1]$. Return the last
    point. Does it still lie in the ball, wherever $x$ was?
    """
    y = int(label)
    point = x
    for _ in range(v.steps):
        share = torch.softmax(W @ point, 0)
        g = W.T @ share - W[y]
        point = point + v.scale * epsilon * g / g.norm().clamp(min=1e-30)
        move = point - x
        move = move * (epsilon / move.norm().clamp(min=epsilon))
        point = (x + move).clamp(-1, 1)
    return point


@given
def own_classes() -> tuple[Tensor, Tensor, Tensor]:
    """Your own classes: a weight for each, 24 examples, and their labels."""
    noise = {"generator": torch.Generator().manual_seed(v.seed), "dtype": torch.float64}
    W = torch.randn(4, v.columns, **noise)
    labels = torch.arange(24) % 4
    x = 0.25 * W[labels] + 0.7 * torch.randn(24, v.columns, **noise)
    return W, x.clamp(-1, 1), labels


@task(
    minutes=25,
    points={"value": 5},
    hint="Certified means: the radius of your second task is above $\\epsilon$.",
)
def accuracies() -> tuple[float, float, float]:
    r"""Your classes

    For `own_classes()` and $\epsilon = «scale»$ return three shares of the 24 examples:

    1. right without an attack,
    2. right after your `attack`,
    3. certified in the norm $p = «power»$ by your `radius`.

    (2) and (3) are about different balls. For which of them, $p = 2$ or yours, is it at all
    possible that an attack in the 2-norm succeeds on a certified example? Look at which ball
    contains the other.
    """
    W, x, labels = own_classes()
    clean = [int((W @ a).argmax()) == int(y) for a, y in zip(x, labels)]
    moved = [attack(W, a, y, v.scale) for a, y in zip(x, labels)]
    held = [int((W @ a).argmax()) == int(y) for a, y in zip(moved, labels)]
    sure = [float(radius(W, a, y)) > v.scale for a, y in zip(x, labels)]
    return tuple(sum(right) / len(right) for right in (clean, held, sure))
