"""Projected optimizers under FSDP2 (`fully_shard`): a shard's gradient has another SVD, so they step on whole matrices.

FSDP2 gives every process a slice of each weight and of its averaged gradient. `whole_matrices` gathers both, lets an
optimizer take its ordinary step, and keeps the slice. Every process then computes the same step, and holds the same
bases and moments, whole: these are small, but they are not sharded.

Cost per matrix (m, n) beside what FSDP2 sends: weight and gradient are gathered once a step, 2mn numbers, of which a
process of N receives the share (N - 1)/N; both are whole in memory while their group of matrices is stepped.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    """Tell whether a tensor is a `DTensor`, as FSDP2's parameters and gradients are."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, gathered from all processes; a plain tensor itself."""
    return cast(Any, t).full_tensor() if is_sharded(t) else t


def shard_like(W: Tensor, p: Tensor) -> Tensor:
    """Return of W, whole and the same in every process, the part that this process holds of p. Nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    spread = cast(Any, p)
    everywhere = [Replicate()] * spread.device_mesh.ndim
    replica = DTensor.from_local(W, spread.device_mesh, everywhere, run_check=False)
    return replica.redistribute(placements=spread.placements)


@contextmanager
@torch.no_grad()
def whole_matrices(params: list[Tensor], state: MutableMapping[Tensor, Any]) -> Iterator[list[Tensor]]:
    """Lend whole parameters, with whole gradients and the state of the sharded ones; take back what changed.

    Every process has to enter with the same parameters in the same order. Plain parameters are lent as they are.

    Args:
        params: parameters with a gradient, sharded or not.
        state: the optimizer's `state`, whose entries move to the lent parameters and back.
    """
    lent = [whole(p) for p in params]
    pairs = [(p, W) for p, W in zip(params, lent) if is_sharded(p)]
    for p, W in pairs:
        W.grad = whole(cast(Tensor, p.grad))
        if p in state:
            state[W] = state.pop(p)
    try:
        yield lent
        for p, W in pairs:
            p.copy_(shard_like(W, p))
    finally:
        for p, W in pairs:
            if W in state:
                state[p] = state.pop(W)
