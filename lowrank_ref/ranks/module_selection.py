"""From numbers to modules: which fit a budget, the matrix of layers and types, and the model that is left to train."""

import re
from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.checks import check_integer, check_number, check_rank
from lowrank_ref.core.layers import Model, adapters, replace_modules
from lowrank_ref.ranks.diffora import DiffoRALinear, search_layers

__all__ = ["adaptation_matrix", "keep_modules", "module_type", "modules_within", "update_norms"]


def module_type(path: str) -> str:
    """Return the path with `*` for every number in it: what the same module of all layers has in common.

    Example:
        >>> module_type("encoder.layer.3.attention.self.query")
        'encoder.layer.*.attention.self.query'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def adaptation_matrix(values: Mapping[str, float]) -> tuple[list[str], list[str], Float[Tensor, "layers types"]]:
    """Return Γ, or θ, as a matrix: the layers, the types, and values[path]; NaN where a layer lacks the type.

    A layer is named by the numbers in its path, a type by `module_type`; both keep the order in which they come.

    Example:
        >>> layers, types, matrix = adaptation_matrix({"0.q": 1.0, "0.v": 2.0, "1.q": 3.0, "1.v": 4.0})
        >>> layers, types, matrix.tolist()
        (['0', '1'], ['*.q', '*.v'], [[1.0, 2.0], [3.0, 4.0]])
    """
    places = {path: (".".join(re.findall(r"(?<![^.])\d+(?![^.])", path)), module_type(path)) for path in values}
    layers, types = (list(dict.fromkeys(place[i] for place in places.values())) for i in (0, 1))
    matrix = torch.full((len(layers), len(types)), torch.nan)
    for path, (layer, kind) in places.items():
        matrix[layers.index(layer), types.index(kind)] = float(values[path])
    return layers, types, matrix


def modules_within(values: Mapping[str, float], costs: Mapping[str, int], budget: int) -> tuple[str, ...]:
    """Return the paths that are taken in the order of falling value, each if it still fits the budget.

    For modules of different sizes, where a number of modules is no budget. A tie goes to the path that comes first.

    Args:
        values: path -> θ, or another score.
        costs: path -> numbers that the module would train.
        budget: most numbers in all, >= 0.

    Returns:
        Paths in the order of `values`.

    Raises:
        TypeError, ValueError: budget is no integer >= 0, a value is not finite, costs lack a path or are not positive.

    Example:
        >>> modules_within({"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 6, "b": 5, "c": 4}, 10)
        ('a', 'c')
    """
    check_integer("budget", budget, low=0)
    if costs.keys() != values.keys():
        raise ValueError(f"costs: got {sorted(costs)}, wanted one for each of {sorted(values)}")
    for path, value in values.items():
        check_number(f"values[{path!r}]", float(value))
        check_number(f"costs[{path!r}]", costs[path], low=0, open_low=True)
    kept = set()
    for path in sorted(values, key=lambda path: -float(values[path])):
        if costs[path] <= budget:
            budget -= costs[path]
            kept.add(path)
    return tuple(path for path in values if path in kept)


@torch.no_grad()
def update_norms(model: nn.Module) -> dict[str, float]:
    """Return path -> ‖ΔW‖ (Frobenius) of every adapter: the cheapest guess at which modules matter, after a short run.

    ΔW is all that the adapter adds: of a `DiffoRALinear` it is γ·s·BA, gate included.

    Raises:
        ValueError: no adapter.
    """
    found = {path: float(layer.delta_weight().norm()) for path, layer in adapters(model)}
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without an adapter, wanted at least one")
    return found


def keep_modules(
    model: Model,
    chosen: Collection[str],
    *,
    rank: int | Mapping[str, int] | None = None,
    share: str = "none",
    generator: torch.Generator | None = None,
) -> Model:
    """Put a new `LoRALinear` in the place of every chosen module that was searched, and the base in that of the others.

    Nothing that was trained in the search stays. Scale s and dropout are those of the search, whatever the rank. With
    every module chosen it is `replace_linears` with LoRA: the same draws in the same order. Build a new optimizer.

    Args:
        model: holds `DiffoRALinear`; changed in place.
        chosen: their paths that keep an adapter, at least one, such as `top_modules` returns.
        rank: r of the new adapters, or path -> r; None takes the search's.
        share: "none"; or "by_type", which gives the modules that were not chosen one pair A, B for each `module_type`
            and shape. That the paper shares weights among these modules is from its abstract, how is our reading.
        generator: source of A, in the order of the modules; a shared pair is drawn at its first place.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: no searched module, chosen is empty or names something else, share is another word, a
            rank is none or is missing. The model is unchanged.

    Example:
        >>> from functools import partial
        >>> from lowrank_ref.core.layers import replace_linears
        >>> model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        >>> model = replace_linears(model, "", partial(DiffoRALinear, rank=2))
        >>> [type(layer).__name__ for layer in keep_modules(model, ["1"], rank=4)]
        ['Linear', 'LoRALinear']
    """
    layers = search_layers(model)
    if share not in ("none", "by_type"):
        raise ValueError(f"share: got {share!r}, wanted 'none' or 'by_type'")
    if isinstance(chosen, str) or not chosen or not set(chosen) <= set(layers):
        raise ValueError(f"chosen: got {chosen!r}, wanted a list of at least one of {sorted(layers)}")
    building = {id(layer): path for path, layer in layers.items() if path in chosen or share == "by_type"}
    ranks = {path: _rank(rank, path, layers[path]) for path in building.values()}
    pairs: dict[tuple[str, tuple[int, int]], LoRALinear] = {}

    def build(layer: DiffoRALinear) -> nn.Module:
        path = building.get(id(layer))
        if path is None:
            return layer.base
        r = ranks[path]
        key = module_type(path), (layer.out_features, layer.in_features)
        twin = None if path in chosen else pairs.get(key)
        source = generator if twin is None else torch.Generator()  # its A is replaced
        new = LoRALinear(layer.base, r, alpha=layer.scale * r, dropout=layer.dropout.p, generator=source)
        new.scale = layer.scale
        if path not in chosen:
            first = pairs.setdefault(key, new)
            new.A, new.B = first.A, first.B
        return new.to(layer.A.device).train(layer.training)

    return replace_modules(model, "", build, accepts=lambda module: isinstance(module, DiffoRALinear))


def _rank(rank: int | Mapping[str, int] | None, path: str, layer: DiffoRALinear) -> int:
    if isinstance(rank, Mapping):
        if path not in rank:
            raise ValueError(f"rank: got none for {path!r}, wanted one for each module that gets an adapter")
        rank = rank[path]
    found = layer.rank if rank is None else rank
    check_rank(found, (layer.out_features, layer.in_features))
    return found
