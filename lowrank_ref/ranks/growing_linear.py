"""The layer of IncreLoRA: an update s·B·diag(λ)·A that grows by blocks, and the groups that let each block begin late.

All components up to the capacity are drawn at the start, in blocks of q, each with parameters A, B and λ of its own. A
block is active, in reserve, or off. What is off requires no gradient: an optimizer neither moves nor decays it and
keeps no state for it. When it begins to train its state begins at zero, Adam's count of steps too. No shape ever
changes, so optimizer and schedule are built once, and a checkpoint of any rank fits.

Grows in one process: DDP does not see parameters that begin to train after it was built.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters.lora import lora_update
from lowrank_ref.core.checks import check_integer, check_number, check_rank
from lowrank_ref.core.layers import FactoredLinear, adapters, weight_of

#: λ of the reserve.
RESERVE = 1e-5
Score = Callable[[Tensor, Tensor], Tensor]


def component_sum(
    A: Float[Tensor, "r n"], lam: Float[Tensor, " r"], B: Float[Tensor, "m r"], scale: float
) -> Float[Tensor, "m n"]:
    """Return ΔW = s·B·diag(λ)·A."""
    return scale * (B * lam @ A)


def constant_scaling(alpha: float, rank: int) -> float:
    """Return s = α, whatever the rank. α <= 0 raises a ValueError."""
    check_number("alpha", alpha, low=0, open_low=True)
    return alpha


class IncreLoRALinear(FactoredLinear):
    """A frozen linear layer with a trained update s·B·diag(λ)·A whose rank grows: ranks are given out by `RankGrowth`.

    At the start `rank` components are active, with λ = 0, and `block` are in reserve, with λ = 1e-5 frozen and vectors
    that train already. `delta_weight()`, merges and exports hold the reserve, as forward does, until `finish()`.
    A saved state carries the rank.

    `score`, a function of ΔW and G = ∂L/∂ΔW, is None or what `RankGrowth` asks for; with it, a forward
    with gradients builds ΔW, and its backward notes the score. Inside a compiled model nothing is noted.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`; frozen here, never written.
        rank: components at the start, 1 <= rank <= min(m, n). Later, the active ones.
        capacity: most components, >= rank; a layer never holds more than min(m, n).
        block: q >= 1, how many come at a time.
        alpha: α > 0; the scale is `scaling(alpha, rank)` of the present rank.
        scaling: `constant_scaling`, or `lora_scaling` as in the official code: then growth shrinks what is there.
        std: standard deviation of the entries of A and B at the start, > 0.
        advance: False keeps the reserve out (no advance learning): components begin with λ = 0 when their turn comes.
        dropout: probability in [0, 1) of zeroing an input of the update.
        generator: source of A and B.

    Raises:
        TypeError, ValueError: base is no floating-point linear layer, or an option out of range.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.ranks import IncreLoRALinear
        >>> layer = IncreLoRALinear(nn.Linear(6, 4), capacity=3)
        >>> layer.grow()
        >>> layer.rank, list(layer.adapter_parameters())
        (2, ['A0', 'B0', 'lam0', 'A1', 'B1', 'lam1', 'A2', 'B2'])
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 1,
        *,
        capacity: int = 16,
        block: int = 1,
        alpha: float = 8.0,
        scaling: Callable[[float, int], float] = constant_scaling,
        std: float = 0.02,
        advance: bool = True,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        m, n = weight_of(base).shape
        check_rank(rank, (m, n))
        check_integer("block", block, low=1)
        check_integer("capacity", capacity, low=rank)
        check_number("alpha", alpha, low=0, open_low=True)
        check_number("dropout", dropout, low=0, high=1 - 1e-9)
        check_number("std", std, low=0, open_low=True)
        super().__init__(base)
        self.first_rank, self.block, self.alpha, self.scaling = rank, block, alpha, scaling
        self.growths = (min(capacity, m, n) - rank) // block
        self.dropout = nn.Dropout(dropout).train(base.training)
        for i in range(self.growths + 1):
            drawn = _draw(weight_of(base), block if i else rank, std, RESERVE if i and advance else 0.0, generator)
            for name, value in zip(("A", "B", "lam"), drawn):
                self.register_parameter(f"{name}{i}", nn.Parameter(value))
        self.advance, self._grown, self._reserved = advance, 0, advance
        self.score, self._noted = cast(Score | None, None), cast(list[Tensor], [])
        self._set_flags()

    @property
    def rank(self) -> int:
        """Active components."""
        return self.first_rank + self._grown * self.block

    @property
    def scale(self) -> float:
        """The present scale s."""
        return self.scaling(self.alpha, self.rank)

    @property
    def room(self) -> bool:
        """Whether it can grow once more."""
        return self._grown < self.growths

    @property
    def grown(self) -> int:
        """How often it has grown."""
        return self._grown

    def newcomers(self, growth: int) -> list[nn.Parameter]:
        """Return what begins to train with a growth, counted from 1: its λ, and the vectors of the next reserve."""
        first = growth + 1 if self.advance else growth
        names = [f"lam{growth}", *([f"A{first}", f"B{first}"] if first <= self.growths else [])]
        return [getattr(self, name) for name in names]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> what trains now."""
        names = [f"{name}{i}" for i in range(self._grown + 1) for name in ("A", "B", "lam")]
        names += [f"{name}{self._grown + 1}" for name in ("A", "B") if self._blocks() > self._grown + 1]
        return {name: getattr(self, name) for name in names}

    def components(self) -> tuple[Float[Tensor, "r n"], Float[Tensor, " r"], Float[Tensor, "m r"]]:
        """Return A, λ and B of all that is in use, the reserve last."""
        A, lam, B = ([getattr(self, f"{name}{i}") for i in range(self._blocks())] for name in ("A", "lam", "B"))
        return torch.cat(A), torch.cat(lam), torch.cat(B, 1)

    def grow(self) -> None:
        """Make the reserve active and the next block the reserve. ValueError: the layer is at its capacity."""
        if not self.room:
            raise ValueError(f"grow: got a layer at its capacity, rank {self.rank}, wanted one with room")
        self._grown += 1
        self._set_flags()

    @torch.no_grad()
    def finish(self) -> None:
        """Set λ of the reserve to 0 and let it rest, so that ΔW is what the active components make."""
        if self._blocks() > self._grown + 1:
            getattr(self, f"lam{self._grown + 1}").zero_()
        self._reserved = False
        self._set_flags()

    def delta_weight(self) -> Float[Tensor, "m n"]:
        """Return s·B·diag(λ)·A, the reserve included. A backward pass through it is scored."""
        delta, score = component_sum(*self.components(), self.scale), self.score
        if score is not None and self._notes() and delta.requires_grad:
            held = delta.detach()
            delta.register_hook(lambda G: self._noted.append(score(held, G)))
        return delta

    def update(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return the update of dropout(x); while scores are taken through ΔW, else through the factors."""
        x = self.dropout(x)
        return F.linear(x, self.delta_weight()) if self._notes() else lora_update(x, *self.step_factors())

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        """Return base(x) + x ΔWᵀ."""
        return self.combined(self.base(x), self.update, x) if self._notes() else super().forward(x)

    def lora_factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B·diag(λ), s)."""
        A, lam, B = self.components()
        return A, B * lam, self.scale

    def take_score(self) -> Tensor | None:
        """Return the mean score over the backward passes since the last call, and forget them; None without a pass.

        Passes that overflowed (a `GradScaler` skips their step) do not count.
        """
        noted, self._noted = self._noted, []
        if not noted:
            return None
        scores = torch.stack(noted)
        good = torch.isfinite(scores)
        return torch.where(good, scores, 0.0).sum() / good.sum().clamp(min=1)

    def get_extra_state(self) -> Tensor:
        """Let the state dict carry how often it grew, and whether the reserve is in use."""
        return torch.tensor([self._grown, self._reserved])

    def set_extra_state(self, state: Tensor) -> None:
        """Take both from a state dict. ValueError: more growths than there is room for, or another form."""
        if tuple(state.shape) != (2,) or not 0 <= int(state[0]) <= self.growths or int(state[1]) not in (0, 1):
            raise ValueError(f"state: got {state.tolist()}, wanted [0 to {self.growths}, 0 or 1]")
        self._grown, self._reserved = int(state[0]), bool(state[1])
        self._set_flags()

    def _blocks(self) -> int:
        return min(self._grown + 1 + self._reserved, self.growths + 1)

    def _set_flags(self) -> None:
        training = {id(p) for p in self.adapter_parameters().values()}
        for p in self.parameters(recurse=False):
            p.requires_grad_(id(p) in training)

    def _notes(self) -> bool:
        return self.score is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _draw(W: Tensor, size: int, std: float, lam: float, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    """Draw a block of components: A, B and λ, in float32 or wider."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    place = generator.device if generator is not None else W.device
    shapes = (size, W.shape[1]), (W.shape[0], size)
    A, B = (std * torch.randn(shape, generator=generator, dtype=dtype, device=place) for shape in shapes)
    return A.to(W.device), B.to(W.device), torch.full((size,), lam, dtype=dtype, device=W.device)


def growing_layers(model: nn.Module) -> Iterator[tuple[str, IncreLoRALinear]]:
    """Iterate over (path, layer) of all IncreLoRA layers, each once."""
    return ((path, layer) for path, layer in adapters(model) if isinstance(layer, IncreLoRALinear))


def grown_ranks(model: nn.Module) -> dict[str, int]:
    """Return path -> number of active components."""
    return {path: layer.rank for path, layer in growing_layers(model)}
