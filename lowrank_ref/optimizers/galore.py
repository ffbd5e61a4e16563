r"""GaLore: keep the full weight, run Adam on a low-rank projection of its gradient.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507v2.

| in the paper (algorithms 1 and 2)             | here                                   |
|-----------------------------------------------|----------------------------------------|
| P, Q: top singular vectors of G every T steps | `projectors`                           |
| R = PᵀG, R = GQ, or R = PᵀGQ                  | `project_gradient`                     |
| N = M/(√V + ε), M and V of the size of R      | `adam_directions`                      |
| G̃ = α·PN                                      | `project_back`                         |
| W ← W - η·G̃                                   | `GaLoreAdamW`, `GaLoreSGD`             |

Letters: W and G are (m, n); left basis P (m, r), right basis Q (n, r), rank r; `gap` is T, `scale` is α, `lr` is η.

Deviations. Bases come from `gram_basis` unless another is given: the subspace of the SVD at a fraction of its time;
pass `svd_basis` for the definition, `subspace_basis` for speed on a GPU. Columns of a new basis are turned along the
old ones, as the moments stay; the official code leaves signs to the SVD. A gradient of zeros tells no basis: the next
other one does. Moments of float16 weights are float32. As in the official code, ε is added before bias correction
(algorithm 2 corrects first), moments survive a change of basis unrotated, a square is projected on the right (algorithm
2: left), and weight decay comes after the step, unscaled by α. Its Tucker projector, which its optimizers cannot build,
is left out. Variants: `galore_variants.py`; `fast.py` and `kernels/` repeat Adam for many matrices and for a GPU.

Cost per matrix, k = min(m, n), K = max(m, n): state 2rK + rk numbers instead of 2mn; two products of 2rmn FLOPs a step.
Works under DDP, where every rank sees the same averaged gradient, and under FSDP2 on gathered matrices (`sharded.py`).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.core.linalg import gram_basis
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.optimizers import fast
from lowrank_ref.optimizers.fast import add_back, in_batches, wide
from lowrank_ref.optimizers.projected import ProjectedOptimizer, sides

Basis = Callable[..., Tensor]
Betas = tuple[float, float]


def projectors(
    G: Float[Tensor, "*batch m n"],
    rank: int,
    *,
    side: str = "smaller",
    basis: Basis = gram_basis,
    old: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Return {"left": P (m, r)} and/or {"right": Q (n, r)}: orthonormal bases of the top singular subspaces of G.

    Args:
        G: gradient (m, n), finite; a batch for a basis that takes one. 16 bits are decomposed in float32 and rounded.
        rank: 1 <= rank <= min(m, n).
        side: see `sides`.
        basis: `gram_basis` or another of `core.linalg`; called as basis(G, rank, start=old basis or None).
        old: the last bases, a warm start for `power_basis` and `subspace_basis`.
    """
    left, right = sides((G.shape[-2], G.shape[-1]), side)
    old = old or {}
    found = {}
    if left:
        found["left"] = basis(G, rank, start=old.get("left")).to(G.dtype)
    if right:
        found["right"] = basis(G.mT, rank, start=old.get("right")).to(G.dtype)
    return found


def project_gradient(
    G: Tensor, *, left: Float[Tensor, "m r"] | None = None, right: Float[Tensor, "n r"] | None = None
) -> Tensor:
    """Return PᵀG (r, n), GQ (m, r) or PᵀGQ (r, r) of a matrix G; without a basis G itself, of any shape."""
    R = G if left is None else left.T @ G
    return R if right is None else R @ right


def project_back(
    N: Tensor, *, left: Float[Tensor, "m r"] | None = None, right: Float[Tensor, "n r"] | None = None
) -> Tensor:
    """Return PN, NQᵀ or PNQᵀ, shape (m, n): the direction in the space of the weight."""
    D = N if left is None else left @ N
    return D if right is None else D @ right.T


def adam_directions(
    R: list[Tensor], M: list[Tensor], V: list[Tensor], steps: list[int], *, betas: tuple[float, float], eps: float
) -> list[Tensor]:
    """Update the moments M, V in place and return Adam's directions for (projected) gradients R, bias corrected.

    Each has its step t >= 1; β₁, β₂ in [0, 1); ε is added to √V first. One operation on a list is one launch on a GPU.
    """
    torch._foreach_lerp_(M, R, 1 - betas[0])
    torch._foreach_mul_(V, betas[1])
    torch._foreach_addcmul_(V, R, R, value=1 - betas[1])
    root = torch._foreach_sqrt(V)
    torch._foreach_add_(root, eps)
    N = torch._foreach_div(M, root)
    torch._foreach_mul_(N, [math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) for t in steps])
    return list(N)


class GaLore(ProjectedOptimizer):
    """Base of the GaLore optimizers: projects, asks `direction` for the step in the small space, projects back.

    Args:
        params: parameters or groups. A group with a "rank" is projected and holds matrices only; groups without one
            get the plain optimizer with the unscaled lr.
        lr: η >= 0.
        rank: r of groups that name none; None leaves them unprojected. An r above min(m, n) of a matrix is an error.
        gap: T >= 1, steps between two changes of basis.
        scale: α > 0, multiplies lr in projected groups.
        side: see `sides`.
        spread: change the bases of a group one after the other within a gap, so that no step is the long one.
        weight_decay: λ >= 0, decoupled.
        basis: how to find the projectors, see `projectors`; it also decides their signs.
        own: further options of a subclass.

    Raises:
        TypeError, ValueError: an option out of range or unknown, a projected parameter that is no matrix. On `step`: a
            gradient that is sparse or not finite, or a parameter that changed its shape; nothing is then changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        rank: int | None = None,
        gap: int = 200,
        scale: float = 0.25,
        side: str = "smaller",
        spread: bool = False,
        weight_decay: float = 0.0,
        basis: Basis = gram_basis,
        own: dict[str, Any] | None = None,
    ) -> None:
        if not callable(basis):
            raise TypeError(f"basis: got {basis!r}, wanted a function such as core.linalg.svd_basis")
        self.basis = basis
        shared = {"lr": lr, "rank": rank, "gap": gap, "scale": scale, "side": side, "spread": spread}
        super().__init__(params, {**shared, "weight_decay": weight_decay, **(own or {})})

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy keep the basis."""
        return {**super().__getstate__(), "basis": self.basis}

    def update(self, ps: list[Tensor], group: dict[str, Any]) -> None:
        """Take one step of each parameter from its gradient."""
        change, waiting = self.changes(ps, group) if group["rank"] is not None else ([], [])
        states, grads = [self.state[p] for p in ps], [p.grad for p in ps if p.grad is not None]
        if change:
            asked = ([grads[i] for i in change], [states[i] for i in change], group["rank"])
            for i, found in zip(change, in_batches(projectors, *asked, side=group["side"], basis=self.basis)):
                states[i].update(found)
        for state in states:
            state["step"] = state.get("step", 0) + 1
        bases = [{key: state[key] for key in ("left", "right") if key in state} for state in states]
        factor = -group["lr"] * (group["scale"] if group["rank"] is not None else 1.0)
        keep = 1 - group["lr"] * group["weight_decay"]
        rest = self.quick_steps(ps, states, bases, group, factor, keep)
        R = [project_gradient(wide(grads[i]), **{key: wide(P) for key, P in bases[i].items()}) for i in rest]
        for i, N in zip(rest, self.directions(R, [states[i] for i in rest], group) if rest else []):
            add_back(ps[i], N, factor, keep=keep, **bases[i])
        for i in waiting:
            states[i]["step"] = 0

    def quick_steps(self, ps: list[Tensor], *more: Any) -> list[int]:
        """Take the steps that have a faster equal form; return the numbers of the others, here all."""
        return list(range(len(ps)))

    def directions(self, R: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> Iterable[Tensor]:
        """Return the steps for (projected) gradients R, of their shapes, and update their states."""
        return (self.direction(r, state, group) for r, state in zip(R, states))

    def direction(self, R: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return the step for one (projected) gradient R, and update its state."""
        raise NotImplementedError


class GaLoreAdamW(GaLore):
    """GaLore with Adam's moments; options as `GaLore`, and betas (β₁, β₂) in [0, 1) and eps >= 0.

    Example:
        >>> import lowrank_ref, torch
        >>> W = torch.nn.Parameter(torch.randn(6, 4))
        >>> optimizer = lowrank_ref.GaLoreAdamW([{"params": [W], "rank": 2}], lr=0.01, gap=100)
        >>> optimizer.step(lambda: (W**2).sum().backward())
        >>> {key: tuple(value.shape) for key, value in optimizer.state[W].items() if key != "step"}
        {'right': (4, 2), 'M': (6, 2), 'V': (6, 2)}
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, *, betas: Betas = (0.9, 0.999), eps: float = 1e-6, **options: Any
    ) -> None:
        super().__init__(params, lr, own={"betas": betas, "eps": eps}, **options)

    def directions(self, R: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> Iterable[Tensor]:
        """Return Adam's directions; in one pass where all are of one dtype and step."""
        (M, V), steps = fast.moments(R, states), [state["step"] for state in states]
        if fast.one_pass(R, steps):
            return fast.fused_directions(R, M, V, steps[0], group)
        return adam_directions(R, M, V, steps, betas=group["betas"], eps=group["eps"])

    def quick_steps(self, ps: list[Tensor], *more: Any) -> list[int]:
        """Use the Triton kernels where they apply, and one pass where nothing is projected."""
        states, _, group, *factors = more
        grads = [wide(p.grad) for p in ps if p.grad is not None]
        if group["rank"] is None and fast.plain_steps(ps, grads, states, group, *factors):
            return []
        return fast.kernel_steps(ps, *more)


class GaLoreSGD(GaLore):
    """GaLore without moments: the step is the projected gradient. Options as `GaLore`.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.optimizers import GaLoreSGD
        >>> optimizer = GaLoreSGD([{"params": [nn.Linear(6, 4).weight], "rank": 2}], lr=0.1)
    """

    def direction(self, R: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Return R."""
        return R


PAPER = PaperInfo(
    key="galore",
    part="optimizers",
    name="GaLore",
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    authors=("Jiawei Zhao", "Zhenyu Zhang", "Beidi Chen", "Zhangyang Wang", "Anima Anandkumar", "Yuandong Tian"),
    arxiv="2403.03507v2",
    summary="Train every weight in full, and keep Adam's state only for the top directions of each gradient.",
    use_when="you train every weight and Adam's state does not fit; tune it against Adam with two learning rates",
    instead={"lora": "a pretrained model only needs a small change", "sltrain": "the weights do not fit either"},
    needs=("primer",),
    official_code="jiaweizzhao/GaLore",
    code_licence="Apache-2.0",
    equations={"projector": "projectors", "R": "project_gradient", "N": "adam_directions", "G̃": "project_back"},
    deviations=("bases from the Gram matrix, turned along the last ones", "no Tucker projector"),
    aliases=("gradient low-rank projection", "GaLoreAdamW", "GaLore 8-bit"),
    status="checked",
    verified="2026-11-23",
    changes={"2026-11-25": "Triton kernels, a faster basis, FSDP2.", "2026-11-24": "Steps 32 matrices together."},
    optimizers={"GaLoreAdamW": GaLoreAdamW, "GaLoreSGD": GaLoreSGD},
)
