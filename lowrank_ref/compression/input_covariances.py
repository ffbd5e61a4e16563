"""What every linear layer reads while a model sees calibration data: E[xxᵀ], for cuts that look at activations."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.core.checks import check_number
from lowrank_ref.core.layers import is_linear
from lowrank_ref.core.matching import Pattern, select


def matching_linears(model: nn.Module, pattern: Pattern) -> dict[str, nn.Module]:
    """Return path -> linear layer of those that the pattern means, each once. TypeError: the model is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    return select(model, {path: m for path, m in model.named_modules() if path and is_linear(m)}, pattern)


@torch.no_grad()
def input_covariances(
    model: nn.Module, run: Callable[[], Any], pattern: Pattern = "all-linear", *, damping: float = 1e-4
) -> dict[str, Float[Tensor, "_ _"]]:
    """Return path -> E[xxᵀ] of what every matrix reads while `run()` calls the model: for activation-aware cuts.

    Args:
        model: as it is, in whatever mode; its hooks run too.
        run: shows the model its calibration data, such as `lambda: [model(x) for x in batches]`.
        pattern: see `replace_linears`.
        damping: times the mean of the diagonal, is added to it, so that the matrix has a Cholesky factor; > 0.

    Raises:
        ValueError: a layer saw nothing, or damping is not positive.
    """
    check_number("damping", damping, low=0, open_low=True)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    layers = matching_linears(model, pattern)

    def see(path: str, x: Tensor) -> None:
        x = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        sums[path] = sums.get(path, 0) + x.T @ x
        counts[path] = counts.get(path, 0) + len(x)

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: see(path, inputs[0]))
        for path, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if blind := [path for path in layers if not counts.get(path)]:
        raise ValueError(f"run: got no input for {blind[0]!r}, wanted every matrix of the pattern to be called")
    found = {}
    for path, total in sums.items():
        C = total / counts[path]
        found[path] = C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    return found
