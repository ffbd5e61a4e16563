"""The baseline of every rank allocator: train LoRA at one rank, then drop its smallest singular values, model-wide.

No paper's method, two functions. ΔW = s·BA of each layer is written as a sum of rank-one terms by its SVD; the terms
with the most energy σ² per stored number m + n stay until the budget is spent. It changes the output, unlike deleting
components whose gate is 0, and it is the cheapest way to ask whether ranks had to be learned at all.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lowrank_ref.adapters.lora_squeeze import split_factors
from lowrank_ref.adapters.squeeze_targets import lora_of, lora_parts, squeezable
from lowrank_ref.core.checks import check_finite, check_integer, check_number
from lowrank_ref.core.layers import Model, replace_modules
from lowrank_ref.core.linalg import factored_svd


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

    Dropout and train or eval mode stay; the factors are those of LoRA-Squeeze with s' = 1.

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
    layers = {path: layer for path, layer in squeezable(model).items() if path}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__}, wanted a model with LoRA layers inside")
    parts = {path: lora_parts(layer) for path, layer in layers.items()}
    parts = {path: part for path, part in parts.items() if len(part[0])}  # SoRA's may have no component left
    triples = {path: factored_svd(A, scale * B) for path, (A, B, scale) in parts.items()}
    costs = {path: layer.in_features + layer.out_features for path, layer in layers.items() if path in triples}
    ranks = ranks_by_energy({path: S for path, (_, S, _) in triples.items()}, costs, budget)
    new = {id(layer): layer.base for layer in layers.values()}
    for path, (U, S, Vh) in triples.items():
        if r := ranks[path]:
            new[id(layers[path])] = lora_of(layers[path], *split_factors(U[:, :r], S[:r], Vh[:r], 1.0), 1.0)
    return replace_modules(model, "", lambda layer: new[id(layer)], accepts=lambda module: id(module) in new)
