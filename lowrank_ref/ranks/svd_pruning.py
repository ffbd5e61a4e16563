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
from lowrank_ref.core.checks import check_finite, check_integer, check_number
from lowrank_ref.core.layers import AdaptedLinear, Model, adapters, replace_modules


def factored_svd(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """Return U, S, Vh of BA in O((m + n)r²): one QR of each factor and the SVD of a small matrix, k = min(m, n, r)."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.T


def ranks_by_energy(
    spectra: Mapping[str, Float[Tensor, " _"]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return path -> rank, taking singular values in the order of σ² per number while their cost fits the budget.

    Args:
        spectra: path -> singular values, falling.
        costs: path -> numbers that one rank of the layer costs, m + n.
        budget: most numbers in all, >= 0.

    Raises:
        TypeError, ValueError: budget is no integer >= 0, costs lack a layer or are not positive, or a singular value is
            negative or not finite.

    Example:
        >>> ranks_by_energy({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5])}, {"a": 10, "b": 10}, 25)
        {'a': 1, 'b': 1}
    """
    check_integer("budget", budget, low=0)
    if costs.keys() != spectra.keys():
        raise ValueError(f"costs: got {sorted(costs)}, wanted one for each of {sorted(spectra)}")
    for path, S in spectra.items():
        check_finite(f"spectra[{path!r}]", S)
        if bool((S < 0).any()):
            raise ValueError(f"spectra[{path!r}]: got a negative number, wanted singular values >= 0")
        check_number(f"costs[{path!r}]", costs[path], low=0, open_low=True)
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

    Dropout and train or eval mode stay.

    Args:
        model: all its adapters are of linear layers and have plain `lora_factors()`, such as `LoRALinear`, SoRA and
            PiSSA. Changed in place.
        budget: most numbers Σ rank·(m + n), >= 0.

    Returns:
        The same model; its adapters are `LoRALinear`.

    Raises:
        TypeError: budget is no integer.
        ValueError: budget < 0, no adapter inside the model, or one whose update is no sum of such terms (DoRA,
            embeddings, convolutions, RandLoRA): it would keep its numbers beside the budget. The model is unchanged.
    """
    check_integer("budget", budget, low=0)
    layers = {path: layer for path, layer in adapters(model) if path and isinstance(layer, AdaptedLinear)}
    others = [f"{type(layer).__name__} at {path!r}" for path, layer in adapters(model) if not _plain(layer)]
    if not layers or others:
        got = ", ".join(others[:5]) or type(model).__name__
        raise ValueError(f"model: got {got}, wanted a model with LoRA layers inside and no other adapters")
    parts = {path: factored_svd(A, scale * B) for path, layer in layers.items() for A, B, scale in [_factors(layer)]}
    costs = {path: layer.in_features + layer.out_features for path, layer in layers.items()}
    ranks = ranks_by_energy({path: S for path, (_, S, _) in parts.items()}, costs, budget)
    new = {id(layer): _truncated(layer, *parts[path], ranks[path]) for path, layer in layers.items()}
    return replace_modules(model, "", lambda layer: new[id(layer)], accepts=lambda module: id(module) in new)


def _plain(layer: nn.Module) -> bool:
    """Tell adapters of linear layers whose update is the product of their factors; DoRA rescales it."""
    return isinstance(layer, AdaptedLinear) and hasattr(layer, "lora_factors") and not hasattr(layer, "magnitude")


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    return layer.lora_factors()  # type: ignore[operator]


def _truncated(layer: AdaptedLinear, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> nn.Module:
    if not rank:
        return layer.base
    root = S[:rank].sqrt()
    dropout = getattr(getattr(layer, "dropout", None), "p", 0.0)
    new = LoRALinear(layer.base, rank, alpha=float(rank), dropout=dropout, generator=torch.Generator())  # s = 1
    new.A, new.B = nn.Parameter(root[:, None] * Vh[:rank]), nn.Parameter(U[:, :rank] * root)
    return new.train(layer.training)
