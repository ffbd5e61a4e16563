r"""DiffoRA: a yes or no for each module says where LoRA goes; it is learned as a gate that training can move.

Jiang et al., "DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection", 2502.08905v2.

| in the paper                                   | here                                                      |
|------------------------------------------------|-----------------------------------------------------------|
| differential adaptation matrix Γ in {0,1}      | `top_modules`; as rows and columns: `adaptation_matrix`   |
| ΔW = γ·s·BA, one γ for a module                | `gated_module_delta`, `gated_module_update`               |
| continuous relaxation γ = φ(θ)                 | `relaxed_gates`, `DiffoRALinear`                          |
| the search: B, A on one split, θ on another    | `module_search.ModuleSearch`                              |
| discretisation, weight sharing                 | `module_selection.keep_modules`                           |
| the Gram matrix of the theory                  | `module_gram.relu_gram`, `module_gram.module_grams`       |

Letters: θ is what differentiable architecture search calls α, which is LoRA's numerator here; layer l, module type i.

Reconstructed. Neither the paper's text nor code of its authors was at hand, only abstract and summaries. From them:
a binary matrix that selects modules, its continuous relaxation, its discretisation, weight sharing, the Gram matrix.
Ours: φ = σ, θ = 0 at the start, two levels with first-order steps, the K largest θ of the whole model, fresh factors
afterwards, and what is shared. All of these are switches but the second level's order and the fresh start.
Cost per layer: r(m+n) + 1 trained numbers in the search, Adam twice that, and a second forward and backward a step;
afterwards r(m+n) for a kept module and nothing for the others.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.layers import adapters
from lowrank_ref.core.registry import PaperInfo


def gated_module_delta(
    A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], gate: Float[Tensor, "1"], scale: float
) -> Float[Tensor, "m n"]:
    """Return ΔW = γ·s·BA, one number γ for the whole module.

    Example:
        >>> A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
        >>> gated_module_delta(A, B, torch.tensor([0.5]), 2.0).tolist()
        [[3.0, 6.0], [0.0, 0.0]]
    """
    return scale * (B @ (gate * A))


def gated_module_update(
    x: Float[Tensor, "*batch n"],
    A: Float[Tensor, "r n"],
    B: Float[Tensor, "m r"],
    gate: Float[Tensor, "1"],
    scale: float,
) -> Float[Tensor, "*batch m"]:
    """Return γ·s·B(Ax) for every row."""
    return scale * F.linear(F.linear(x, gate * A), B)


def relaxed_gates(logits: Float[Tensor, " k"], relax: str = "sigmoid") -> Float[Tensor, " k"]:
    """Return γ = φ(θ) of the k modules of a group.

    "sigmoid": γ = σ(θ), each module for itself. "softmax": γ = k·softmax(θ), so that modules compete and γ is 1 on
    average.

    Raises:
        ValueError: another relaxation.

    Example:
        >>> relaxed_gates(torch.zeros(3)).tolist(), relaxed_gates(torch.zeros(3), "softmax").sum().item()
        ([0.5, 0.5, 0.5], 3.0)
    """
    if relax == "sigmoid":
        return torch.sigmoid(logits)
    if relax == "softmax":
        return len(logits) * torch.softmax(logits, dim=0)
    raise ValueError(f"relax: got {relax!r}, wanted 'sigmoid' or 'softmax'")


def logit_gradient(
    G: Float[Tensor, "m n"], A: Float[Tensor, "r n"], B: Float[Tensor, "m r"], logit: Float[Tensor, "1"], scale: float
) -> Float[Tensor, "1"]:
    """Return ∂L/∂θ = σ'(θ)·s·⟨G, BA⟩, with G = ∂L/∂(W + ΔW): what switching the module off would cost, to first order.

    It is 0 while B = 0.
    """
    gate = torch.sigmoid(logit)
    return gate * (1 - gate) * scale * (G * (B @ A)).sum()


def top_modules(
    logits: Mapping[str, float], count: int, *, groups: Mapping[str, Hashable] | None = None
) -> tuple[str, ...]:
    """Return the paths with the largest θ: `count` of all, or of each group. A tie goes to the path that comes first.

    Args:
        logits: path -> θ.
        count: K, from 1 to the number of paths, or to the size of the smallest group.
        groups: path -> group, such as the number of its layer; None makes one group of all.

    Returns:
        Paths in the order of `logits`.

    Raises:
        TypeError, ValueError: count is no integer in its range, θ is not finite, or a path has no group.

    Example:
        >>> top_modules({"a": 0.5, "b": -1.0, "c": 0.5}, 1)
        ('a',)
    """
    check_integer("count", count, low=1)
    for path, value in logits.items():
        check_number(f"logits[{path!r}]", float(value))
    if groups is not None and (missing := set(logits) - set(groups)):
        raise ValueError(f"groups: got none for {sorted(missing)}, wanted one for every path")
    members: dict[Hashable, list[str]] = {}
    for path in logits:
        members.setdefault(None if groups is None else groups[path], []).append(path)
    if count > (smallest := min(map(len, members.values()), default=0)):
        raise ValueError(f"count: got {count}, wanted at most {smallest}, the modules there are to choose from")
    ranked = (sorted(paths, key=lambda path: -float(logits[path]))[:count] for paths in members.values())
    kept = {path for paths in ranked for path in paths}
    return tuple(path for path in logits if path in kept)


class DiffoRALinear(LoRALinear):
    """LoRA behind one trained gate, for the search: ΔW = γ·s·BA with γ = σ(θ), θ = 0 at the start.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: r of the search.
        generator: source of A.
        **options: alpha, dropout and scaling of `LoRALinear`, which also says what is refused.

    By itself it trains θ with A and B, at one level. `ModuleSearch` takes θ away from the optimizer and moves it on
    other data. `couple_logits` makes the gates of a model compete.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.ranks import DiffoRALinear
        >>> layer = DiffoRALinear(nn.Linear(6, 4), rank=2)
        >>> layer.gate().item(), sum(p.numel() for p in layer.adapter_parameters().values())
        (0.5, 21)
    """

    adapter_names = ("A", "B", "logit")
    no_decay = ("logit",)
    _group: tuple[list[nn.Parameter], int] | None = None

    def __init__(
        self, base: nn.Module, rank: int = 8, *, generator: torch.Generator | None = None, **options: Any
    ) -> None:
        super().__init__(base, rank, generator=generator, **options)
        self.logit = nn.Parameter(self.A.new_zeros(1))

    def gate(self) -> Float[Tensor, "1"]:
        """Return γ."""
        if self._group is None:
            return relaxed_gates(self.logit)
        logits, place = self._group
        return relaxed_gates(torch.cat(list(logits)), "softmax")[place : place + 1]

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return γ·s·BA."""
        return gated_module_delta(self.A, self.B, self.gate(), self.scale)

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return γ·s·B(A·dropout(x))."""
        return gated_module_update(self.dropout(x), self.A, self.B, self.gate(), self.scale)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (γA, B, s): the relaxed model as plain LoRA, for export and for a step."""
        return self.gate() * self.A, self.B, self.scale


def search_layers(model: nn.Module) -> dict[str, DiffoRALinear]:
    """Return path -> layer of all modules that are searched; a model without one raises a ValueError."""
    found = {path: layer for path, layer in adapters(model) if isinstance(layer, DiffoRALinear)}
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without a DiffoRALinear, wanted at least one")
    return found


def module_logits(model: nn.Module) -> dict[str, float]:
    """Return path -> θ of every module that is searched; a model without one raises a ValueError."""
    return {path: layer.logit.item() for path, layer in search_layers(model).items()}


def couple_logits(model: nn.Module, *, groups: Mapping[str, Hashable] | None = None) -> None:
    """Let γ = k·softmax(θ) over all k modules that are searched, or over those of each group, instead of σ(θ).

    Call it after the last change of layers; not for FSDP, where a layer sees its own parameters only.

    Raises:
        ValueError: no `DiffoRALinear`, or one without a group.
    """
    layers = search_layers(model)
    if groups is not None and (missing := set(layers) - set(groups)):
        raise ValueError(f"groups: got none for {sorted(missing)}, wanted one for every path")
    members: dict[Hashable, list[DiffoRALinear]] = {}
    for path, layer in layers.items():
        members.setdefault(None if groups is None else groups[path], []).append(layer)
    for group in members.values():
        logits = [layer.logit for layer in group]
        for place, layer in enumerate(group):
            layer._group = logits, place


PAPER = PaperInfo(
    key="diffora",
    part="ranks",
    name="DiffoRA",
    title="DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection",
    authors=("Tangyu Jiang", "Haodi Wang", "Chun Yuan"),
    arxiv="2502.08905v2",
    summary="Ask which modules should have an adapter at all, and let a gate for each module learn the answer.",
    use_when="you know how many modules need a change, most need none, and you can pay for a search",
    instead={
        "lora": "every module needs something, or one short run is all you can pay for",
        "sora": "the ranks may differ and what counts is the sum of numbers, not of modules",
    },
    needs=("lora",),
    equations={
        "ΔW = γ·s·BA": "gated_module_delta",
        "γ = φ(θ)": "relaxed_gates",
        "∂L/∂θ": "logit_gradient",
        "Γ": "top_modules",
    },
    deviations=(
        "reconstructed from abstract and summaries",
        "σ as relaxation, first-order steps, the K largest of the whole model",
        "nothing is shared by default",
    ),
    aliases=("differential adaptation matrix", "module selection", "where to put LoRA", "DARTS", "weight sharing"),
    status="draft",
    verified="2026-11-29",
    layers={"DiffoRALinear": DiffoRALinear},
)
