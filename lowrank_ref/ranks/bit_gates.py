"""What a model of Bayesian-LoRA layers needs beside the layers: gates drawn after each step, and what it costs.

| here                                   | what it is                                                            |
|----------------------------------------|-----------------------------------------------------------------------|
| `GateSampler`                          | draws the gates of the next step                                      |
| `bit_cost`, `chain_divergence`         | what μ multiplies in the loss: the code's penalty, or the exact KL    |
| `bit_operations`, `stored_bits`        | what the deterministic gates cost: BOPs a token, and bits of the file |
| `logit_groups`                         | groups of an optimizer: logits apart, without weight decay            |
| `prune_to_lora`                        | plain LoRA layers of the learned ranks, as PEFT reads them            |
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.adapters.lora import LoRALinear
from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.core.layers import Model, adapters, replace_modules
from lowrank_ref.ranks.bayesian_lora import BayesianLoRALinear, chain_kl, chain_penalty, open_probability

__all__ = [
    "GateSampler",
    "bit_cost",
    "bit_operations",
    "chain_divergence",
    "gated_layers",
    "logit_groups",
    "operations",
    "prune_to_lora",
    "stored_bits",
]


def gated_layers(model: nn.Module) -> dict[str, BayesianLoRALinear]:
    """Return path -> layer of every Bayesian-LoRA layer; a model without one raises a ValueError."""
    found = {path: layer for path, layer in adapters(model) if isinstance(layer, BayesianLoRALinear)}
    if not found:
        raise ValueError(f"model: got {type(model).__name__} without a BayesianLoRALinear, wanted at least one")
    return found


def _sizes(layer: BayesianLoRALinear) -> tuple[int, int, int]:
    """Multiplications a token of A, B and E at the full rank."""
    return layer.rank * layer.in_features, layer.rank * layer.out_features, layer.rank


def bit_cost(model: nn.Module, *, weighting: str = "const", cumulative: bool = True) -> Float[Tensor, ""]:
    """Return Σ over layers of the penalties of A, of B, and of E times its expected share of ranks.

    Each is `chain_penalty`; E's is multiplied by the mean over i = 2 ... r of q_2 ... q_i. The loss takes μ times it.

    Args:
        model: holds at least one Bayesian-LoRA layer.
        weighting: "const", c_b = 1; or "bop", c_b = b · (multiplications of the factor) / (those of the largest).
        cumulative: False takes the mean of q_i alone, as the code does.

    Raises:
        ValueError: no such layer, or another weighting.
    """
    if weighting not in ("const", "bop"):
        raise ValueError(f"weighting: got {weighting!r}, wanted 'const' or 'bop'")
    layers = gated_layers(model).values()
    most = max(size for layer in layers for size in _sizes(layer))
    total = []
    for layer in layers:
        ranks = open_probability(layer.rank_logits)
        ranks = ranks.cumprod(0) if cumulative else ranks
        share = ranks.mean() if len(ranks) else 1.0
        levels = 2.0 ** torch.arange(1, layer.bit_logits.shape[1] + 2, device=layer.bit_logits.device)
        A, B, E = (
            chain_penalty(q, levels.to(q) * size / most if weighting == "bop" else torch.ones_like(levels).to(q))
            for q, size in zip(open_probability(layer.bit_logits), _sizes(layer))
        )
        total.append(A + B + share * E)
    return torch.stack(total).sum()


def chain_divergence(model: nn.Module, penalty: float) -> Float[Tensor, ""]:
    """Return the exact KL(q‖p) of all gates: one chain of bits a factor, and one of ranks a layer.

    Args:
        model: holds at least one Bayesian-LoRA layer.
        penalty: λ > 0; a gate is open with probability e^-λ in the prior.

    Raises:
        TypeError, ValueError: no such layer, or λ out of range.
    """
    check_number("penalty", penalty, low=0, open_low=True)
    chains = [q for layer in gated_layers(model).values() for q in (layer.rank_logits, *layer.bit_logits)]
    return torch.stack([chain_kl(open_probability(logits), penalty) for logits in chains]).sum()


def logit_groups(model: nn.Module, lr: float, *, ratio: float = 1.0, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return two optimizer groups: the logits at rate ratio·lr without decay, and all else that trains.

    Args:
        model: holds at least one Bayesian-LoRA layer.
        lr: learning rate of all but the logits, > 0.
        ratio: rate of the logits over `lr`, > 0.
        weight_decay: λ >= 0, of matrices.

    Raises:
        TypeError, ValueError: no such layer, or a number out of range.
    """
    check_number("lr", lr, low=0, open_low=True)
    check_number("ratio", ratio, low=0, open_low=True)
    check_number("weight_decay", weight_decay, low=0)
    layers = gated_layers(model).values()
    logits = {id(p): p for layer in layers for p in (layer.rank_logits, layer.bit_logits)}
    E = {id(layer.E) for layer in layers}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in logits]
    groups = [
        {"params": [p for p in rest if id(p) not in E and p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if id(p) in E or p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"params": list(logits.values()), "lr": lr * ratio, "weight_decay": 0.0},
    ]
    return groups


class GateSampler(Action):
    """Draws u of every gate after each step of the optimizer, for the forwards and the backward of the next one.

    The first draw is made here. Gates of one step are the same in all its forwards: gradients may be accumulated, and
    checkpointed activations computed again. Under DDP the first process's draw goes to all, as buffers do.

    Args:
        model: holds at least one Bayesian-LoRA layer.
        stochastic: False takes u = ½ always, gates without noise: what sampling adds is the difference.
        generator: on the CPU; None is PyTorch's global one, whose state is not saved with this action.

    Raises:
        ValueError: no such layer.

    Example:
        >>> import torch
        >>> from lowrank_ref.ranks import BayesianLoRALinear, GateSampler
        >>> layer = BayesianLoRALinear(torch.nn.Linear(6, 4), rank=2)
        >>> optimizer = torch.optim.Adam(layer.adapter_parameters().values(), lr=0.01)
        >>> sampler = GateSampler(layer, generator=torch.Generator()).attach(optimizer)
        >>> bool(layer.bit_noise.any())
        True
    """

    def __init__(self, model: nn.Module, *, stochastic: bool = True, generator: torch.Generator | None = None) -> None:
        self.layers, self.stochastic, self.generator = list(gated_layers(model).values()), stochastic, generator
        for layer in self.layers:
            layer.sampled = True
            layer.rank_noise = torch.zeros_like(layer.rank_logits.detach())  # afresh: it may have been on meta
            layer.bit_noise = torch.zeros_like(layer.bit_logits.detach())
        self.act()

    def _noise(self) -> list[Tensor]:
        return [noise for layer in self.layers for noise in (layer.rank_noise, layer.bit_noise)]

    @torch.no_grad()
    def act(self) -> None:
        """Draw log u - log(1 - u) for all gates, u uniform and cut to [1e-6, 1 - 1e-6]; ranks first, then bits."""
        for noise in self._noise() if self.stochastic else ():
            u = torch.rand(noise.shape, generator=self.generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
            noise.copy_(torch.logit(u))

    def state_dict(self) -> dict[str, Any]:
        """Return the present draw and the generator's state."""
        state = None if self.generator is None else self.generator.get_state()
        return {"noise": [noise.detach().cpu().clone() for noise in self._noise()], "generator": state}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it belongs to something else, or to layers of other sizes.
        """
        self._check_keys(state)
        shapes, wanted = ([tuple(t.shape) for t in ts] for ts in (state["noise"], self._noise()))
        if shapes != wanted:
            raise ValueError(f"state: got gates of shapes {shapes}, wanted {wanted}")
        for noise, saved in zip(self._noise(), state["noise"]):
            noise.copy_(saved)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])


# What it costs in the end.


def bit_operations(products: Iterable[tuple[int, int, int]]) -> int:
    """Return Σ multiplications · bits of the weight · bits of what it is multiplied with.

    Example:
        >>> bit_operations([(64, 32, 32), (16, 8, 16)])
        67584
    """
    return sum(count * weight * other for count, weight, other in products)


def operations(model: nn.Module, *, base: int = 32, activations: int = 32) -> dict[str, int]:
    """Return the bit operations of one token through all Bayesian-LoRA layers, by deterministic gates.

    Args:
        model: holds at least one Bayesian-LoRA layer.
        base: bits of the frozen weights.
        activations: bits of what every weight is multiplied with. Nothing here quantises either; these are assumptions.

    Returns:
        "base", of the frozen weights; "adapter", of A, E and B at the learned rank and bits; "full", what both would be
        at rank r with 32 bits for all.

    Raises:
        TypeError, ValueError: no such layer, or bits below 1.
    """
    check_integer("base", base, low=1)
    check_integer("activations", activations, low=1)
    found = {"base": 0, "adapter": 0, "full": 0}
    for layer in gated_layers(model).values():
        k, bits, size = layer.learned_rank, layer.learned_bits, layer.in_features * layer.out_features
        counts = {"A": k * layer.in_features, "E": k, "B": k * layer.out_features}
        found["base"] += bit_operations([(size, base, activations)])
        found["adapter"] += bit_operations((count, bits[name], activations) for name, count in counts.items())
        found["full"] += bit_operations([(size + sum(_sizes(layer)), 32, 32)])
    return found


def stored_bits(model: nn.Module) -> int:
    """Return the bits of all codes and steps that a packed file holds: Σ k(n·b_A + m·b_B + b_E) + 3·32 a layer.

    A model without a Bayesian-LoRA layer raises a ValueError.
    """
    total = 0
    for layer in gated_layers(model).values():
        bits = layer.learned_bits
        row = layer.in_features * bits["A"] + layer.out_features * bits["B"] + bits["E"]
        total += layer.learned_rank * row + 3 * 32
    return total


def prune_to_lora(model: Model) -> Model:
    """Replace every Bayesian-LoRA layer inside the model by a `LoRALinear` of its learned rank, for PEFT.

    Gates are deterministic. A' is Q(A) and B' is Q(B)·diag(Q(E)), both in full precision: their values still lie on a
    grid, but a LoRA file does not know that. A model without such a layer raises a ValueError.
    """

    @torch.no_grad()
    def pruned(layer: BayesianLoRALinear) -> nn.Module:
        training = layer.training
        A, B, g = layer.eval().quantized()
        layer.train(training)
        k = layer.learned_rank
        new = LoRALinear(layer.base, k, dropout=layer.dropout.p, generator=torch.Generator())  # A is replaced
        new.A, new.B, new.scale = nn.Parameter(A[:k].clone()), nn.Parameter((B * g)[:, :k].clone()), layer.scale
        return new.train(training)

    return replace_modules(model, "", pruned, accepts=lambda module: isinstance(module, BayesianLoRALinear))
