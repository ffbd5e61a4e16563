"""Steps of many matrices at once, for GaLore and optimizers like it: batched bases, Adam in one pass, Triton kernels.

Each function equals plain steps of `galore.py` up to rounding; tests hold them together.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_ref.core.linalg import subspace_basis
from lowrank_ref.kernels import have_triton

#: Bases that take several gradients of one shape at once, and how many numbers these may hold together (0.25 GiB).
BATCHED, MOST_NUMBERS = (subspace_basis,), 2**26


def in_batches(
    projectors: Callable[..., dict[str, Tensor]],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    rank: int,
    *,
    side: str,
    basis: Callable[..., Tensor],
) -> list[dict[str, Tensor]]:
    """Return the `projectors` of each gradient; those of one kind together, where the basis takes batches.

    Args:
        projectors: `galore.projectors`.
        states: hold the last bases, if any.
    """
    found: list[dict[str, Tensor]] = [{} for _ in grads]
    kinds = [(G.shape, G.dtype, G.device) for G in grads]
    for kind in dict.fromkeys(kinds):
        mine = [i for i, other in enumerate(kinds) if other == kind]
        size = max(1, MOST_NUMBERS // kind[0].numel()) if basis in BATCHED else 1
        for chunk in (mine[i : i + size] for i in range(0, len(mine), size)):
            if len(chunk) == 1:
                found[chunk[0]] = projectors(grads[chunk[0]], rank, side=side, basis=basis, old=states[chunk[0]])
                continue
            keys = [key for key in ("left", "right") if all(key in states[i] for i in chunk)]
            old = {key: torch.stack([states[i][key] for i in chunk]) for key in keys}
            together = projectors(torch.stack([grads[i] for i in chunk]), rank, side=side, basis=basis, old=old)
            for key, bases in together.items():
                for i, P in zip(chunk, bases):
                    found[i][key] = P.clone()  # a view would keep all of the batch alive
    return [{key: P.contiguous() if P.is_cuda else P for key, P in bases.items()} for bases in found]  # for the kernels


def wide(T: Tensor) -> Tensor:
    """Return a float16 tensor as float32, since its range holds no squares of gradients; another tensor itself."""
    return T.float() if T.dtype == torch.float16 else T


def add_back(
    W: Tensor,
    N: Tensor,
    factor: float,
    *,
    keep: float = 1.0,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> None:
    """Set W to keep · (W + factor · `galore.project_back` (N)) in place, without the (m, n) direction beside W.

    N may be wider than W (float32 for float16): the sum is then computed in its dtype, and rounded once.
    """
    if N.dtype != W.dtype:
        D = N if left is None else left.to(N.dtype) @ N
        D = D if right is None else D @ right.T.to(N.dtype)
        W.copy_(keep * (W + factor * D))
    elif right is not None:
        W.addmm_(N if left is None else left @ N, right.T, alpha=keep * factor, beta=keep)
    elif left is not None:
        W.addmm_(left, N, alpha=keep * factor, beta=keep)
    else:
        W.mul_(keep).add_(N, alpha=keep * factor)


def add_adam(
    W: list[Tensor], R: list[Tensor], M: list[Tensor], V: list[Tensor], step: int, factor: float, group: dict[str, Any]
) -> None:
    """Update the moments and add factor · `galore.adam_directions` to W, in place, in one pass over the memory.

    It is PyTorch's fused Adam, which adds its ε after bias correction: hence ε/√(1 - β₂ᵗ). Computed in float32 or
    wider.

    Raises:
        ValueError: lists whose tensors are not alike; PyTorch's kernel would write where it must not.
    """
    if not len(W) == len(R) == len(M) == len(V):
        raise ValueError(f"W, R, M, V: got {len(W)}, {len(R)}, {len(M)} and {len(V)} tensors, wanted as many of each")
    for four in zip(W, R, M, V):
        kinds = [(tuple(T.shape), T.dtype, T.device) for T in four]
        if len(set(kinds)) > 1:
            raise ValueError(f"W, R, M, V: got {kinds}, wanted one shape, dtype and device")
    beta1, beta2 = group["betas"]
    options = {"beta1": beta1, "beta2": beta2, "eps": group["eps"] / math.sqrt(1 - beta2**step), "weight_decay": 0.0}
    steps: Any = [torch.tensor(float(step), device=W[0].device)] * len(W)
    torch._fused_adam_(W, R, M, V, [], steps, lr=-factor, amsgrad=False, maximize=False, **options)


def one_pass(R: list[Tensor], steps: list[int]) -> bool:
    """Tell whether `add_adam` takes these: on a CPU or a GPU, contiguous, of one dtype and step."""
    kinds = {(r.device, r.dtype, r.is_contiguous(), step) for r, step in zip(R, steps)}
    return len(kinds) == 1 and R[0].is_contiguous() and R[0].device.type in ("cpu", "cuda")


def plain_steps(
    ps: list[Tensor], R: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], factor: float, keep: float
) -> bool:
    """Take Adam's steps of unprojected parameters in one pass, without a direction beside W; tell whether it fits."""
    fit = one_pass([*ps, *R], [state["step"] for state in states] * 2)
    if fit:
        M, V = moments(R, states)
        add_adam(ps, R, M, V, states[0]["step"], factor, group)
        if keep != 1.0:
            torch._foreach_mul_(ps, keep)
    return fit


def moments(R: list[Tensor], states: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the two moments of each (projected) gradient; those that do not exist yet are made."""
    for r, state in zip(R, states):
        if "M" not in state:
            state["M"], state["V"] = torch.zeros_like(r), torch.zeros_like(r)
    return [state["M"] for state in states], [state["V"] for state in states]


def fused_directions(
    R: list[Tensor], M: list[Tensor], V: list[Tensor], step: int, group: dict[str, Any]
) -> list[Tensor]:
    """Return `galore.adam_directions` by `add_adam`."""
    N = [torch.zeros_like(r) for r in R]
    add_adam(N, R, M, V, step, 1.0, group)
    return N


def norms(tensors: list[Tensor]) -> Tensor:
    """Return the Frobenius norm of each tensor, on the device of the first one; infinity if its squares overflow.

    Those of float16 are float32: the squares of most of its numbers are out of its range.
    """
    if tensors[0].is_cuda and have_triton():
        from lowrank_ref.kernels import galore as kernels

        if len({T.dtype for T in tensors}) == 1 and kernels.usable(tensors):
            return kernels.squares(tensors).sqrt()
    found: dict[int, Tensor] = {}
    kinds = [(T.device, T.dtype) for T in tensors]
    for kind in dict.fromkeys(kinds):
        mine = [i for i, other in enumerate(kinds) if other == kind]
        dtype = torch.float32 if kind[1] == torch.float16 else None
        found |= zip(mine, torch._foreach_norm([tensors[i] for i in mine], dtype=dtype))
    return torch.stack([found[i].to(tensors[0].device) for i in range(len(tensors))])


def kernel_steps(
    ps: list[Tensor],
    states: list[dict[str, Any]],
    bases: list[dict[str, Tensor]],
    group: dict[str, Any],
    factor: float,
    keep: float,
) -> list[int]:
    """Take GaLore's steps of those matrices that `kernels.galore` takes; return the numbers of the others.

    Moments that do not exist yet are made. See `add_back` for factor and keep. The kernels keep moments in the dtype of
    the weight, which float16 has no range for.
    """
    if not ps or not ps[0].is_cuda or not have_triton():
        return list(range(len(ps)))
    from lowrank_ref.kernels import galore as kernels

    groups: dict[Any, list[int]] = {}
    for i, (p, state, basis) in enumerate(zip(ps, states, bases)):
        if p.dtype == torch.float16 or len(basis) != 1 or p.grad is None:
            continue
        if kernels.usable([p, p.grad, *basis.values()]):
            ((side, P),) = basis.items()
            groups.setdefault((p.shape, P.shape, p.dtype, side, state["step"]), []).append(i)
            if "M" not in state:
                r, (m, n) = P.shape[1], p.shape
                state["M"], state["V"] = (p.new_zeros((r, n) if side == "left" else (m, r)) for _ in "MV")
    for (*_, side, step), mine in groups.items():
        grads: Any = [ps[i].grad for i in mine]
        M, V, bases_of = ([states[i][key] for i in mine] for key in ("M", "V", side))
        N = kernels.project_adam(grads, M, V, bases_of, side, step, group["betas"], group["eps"])
        kernels.add_back([ps[i] for i in mine], N, bases_of, side, factor, keep)
    done = {i for mine in groups.values() for i in mine}
    return [i for i in range(len(ps)) if i not in done]
