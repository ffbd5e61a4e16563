"""The baseline of every rank allocator: train LoRA at one rank, then drop its smallest singular values, model-wide.

No paper's method, three functions. ΔW = s·BA of each layer is written as a sum of rank-one terms by its SVD; the terms
with the most energy σ² per stored number m + n stay until the budget is spent. It changes the output, unlike deleting
components whose gate is 0, and it is the cheapest way to ask whether ranks had to be learned at all.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.checks import check_integer
from lowrank_ref.core.layers import AdaptedLinear, Model, adapters, replace_modules


def factored_svd(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Return U, S, Vh of BA in O((m + n)r²): one QR of each factor and the SVD of a small matrix, k = min(m, n, r)."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def ranks_within(spectra: Mapping[str, Float[Tensor, " _"]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return path -> rank, taking singular values in the order of σ² per number while their cost fits the budget.

    Args:
        spectra: path -> singular values, falling.
        costs: path -> numbers that one rank of the layer costs, m + n.
        budget: most numbers in all, >= 0.

    Example:
        >>> ranks_within({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5])}, {"a": 10, "b": 10}, 25)
        {'a': 1, 'b': 1}
    """
    terms = [(float(s) ** 2 / costs[path], path) for path, S in spectra.items() for s in S if s > 0]
    ranks = dict.fromkeys(spectra, 0)
    for _, path in sorted(terms, key=lambda term: term[0], reverse=True):
        if costs[path] <= budget:
            budget -= costs[path]
            ranks[path] += 1
    return ranks


@torch.no_grad()
def prune_by_svd(model: Model, budget: int) -> Model:
    """Replace every LoRA layer by one of smaller rank, or by its base, so that all hold `budget` numbers at most.

    Args:
        model: holds layers with `lora_factors()`, such as `LoRALinear`. Changed in place.
        budget: most numbers Σ rank·(m + n), >= 0.

    Returns:
        The same model; its adapters are `LoRALinear`.

    Raises:
        TypeError: budget is no integer.
        ValueError: budget < 0, or no adapter with `lora_factors()` inside the model.
    """
    check_integer("budget", budget, low=0)
    layers = {p: layer for p, layer in adapters(model) if p and isinstance(layer, AdaptedLinear) and _plain(layer)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__}, wanted a model with LoRA layers inside")
    parts = {path: factored_svd(A, scale * B) for path, layer in layers.items() for A, B, scale in [_factors(layer)]}
    costs = {path: layer.in_features + layer.out_features for path, layer in layers.items()}
    ranks = ranks_within({path: S for path, (_, S, _) in parts.items()}, costs, budget)
    new = {id(layer): _truncated(layer, *parts[path], ranks[path]) for path, layer in layers.items()}
    return replace_modules(model, "", lambda layer: new[id(layer)], accepts=lambda module: id(module) in new)


def _plain(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_factors") and not hasattr(layer, "magnitude")  # a DoRA is no sum of rank-one terms


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    return layer.lora_factors()  # type: ignore[operator]


def _truncated(layer: AdaptedLinear, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> nn.Module:
    if not rank:
        return layer.base
    root = S[:rank].sqrt()
    new = LoRALinear(layer.base, rank, alpha=float(rank), generator=torch.Generator())  # s = 1; A, B are replaced
    new.A, new.B = nn.Parameter(root[:, None] * Vh[:rank]), nn.Parameter(U[:, :rank] * root)
    return new.train(layer.training)
