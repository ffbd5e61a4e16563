r"""NaTra: adversarial training on natural changes, made by moving images along directions of a generator's code.

Wang, Lyu, Nepal, Rudolph, Grobler and Moore, "Robust Training Using Natural Transformation", arXiv 2105.04070v1 (also:
"Adversarial Training with Natural Transformation"). No official code is known.

**A reconstruction.** Only the abstract was at hand. Theirs: three parts (batch inverse encoding and shifting; latent
codes expansion; unsupervised attribute directing and manipulation), attributes that are independent of the class, and
adversarial training with the edited images. Every formula below is our reading.

| part                                                     | here                                        |
|----------------------------------------------------------|---------------------------------------------|
| batch inverse encoding; shifting to w̄ + ψ(z - w̄)         | `inverse_codes`                             |
| latent codes expansion: F = Σ_n α_n ⊙ G₁(z_n)            | `latent_codes.compose_codes`, `expand_codes` |
| attribute directing: V, eigenvectors of AᵀA              | `latent_directions.first_layer_directions`  |
| manipulation: z' = z + V α, ‖α‖₂ <= ε                    | `latent_codes.move_codes`                   |
| plain edit: G(z')                                        | `plain_edit`                                |
| residual edit: clip(x + G(z') - G(z))                    | `residual_edit`                             |
| max over α of CE(f(x_α), y)                              | `worst_amplitudes`                          |
| CE(f(x), y) + γ·CE(f(x_α), y)                            | `natra_loss`                                |

Letters: G the frozen generator of codes z (batch, d), or (batch, N, d), of which all N move alike; V (d, q) directions;
α (batch, q) amplitudes in units of the code; f the classifier. The inner maximum is that of `attacks.pgd`, by steps of
length 1 in the 2-norm, so that turning the basis V changes nothing. It sees (1 + α/ε)/2, whose ball the unit box holds.
Cost: with N inner steps N + 1 forward and backward passes of G and f, and two forward passes of G, beside a plain step;
the codes are found once. No state beside the optimizer's. DDP and FSDP2: not tested.
"""

from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_matrix, check_number
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.robustness.attacks import pgd
from lowrank_ref.robustness.latent_codes import Map, invert, move_codes, shift_codes
from lowrank_ref.robustness.latent_directions import random_amplitudes


def inverse_codes(
    generator: nn.Module,
    encoder: Map,
    x: Float[Tensor, "batch *shape"],
    *,
    steps: int = 100,
    lr: float = 1e-2,
    code_weight: float = 2.0,
    truncation: float = 1.0,
) -> Float[Tensor, "batch d"]:
    """Return the codes of a batch: the encoder's, refined by `steps` of Adam, then shifted towards their mean.

    Args:
        generator, encoder, x, lr, code_weight: as for `invert`.
        steps: 0 keeps the encoder's codes.
        truncation: ψ in [0, 1]; 1 does not shift.

    Raises:
        TypeError, ValueError: as `invert` and `shift_codes`.
    """
    with torch.no_grad():
        start = encoder(x)
    found = invert(generator, x, start, steps=steps, lr=lr, encoder=encoder, code_weight=code_weight).z
    return shift_codes(found, found.mean(0), truncation)


def plain_edit(
    generator: Map, z: Float[Tensor, "batch *codes d"], V: Float[Tensor, "d q"], amplitudes: Float[Tensor, "batch q"]
) -> Float[Tensor, "batch *shape"]:
    """Return G(z + V α), the generator's own picture: what it cannot show of x is lost."""
    return generator(move_codes(z, V, amplitudes))


def residual_edit(
    generator: Map,
    x: Float[Tensor, "batch *shape"],
    z: Float[Tensor, "batch *codes d"],
    V: Float[Tensor, "d q"],
    amplitudes: Float[Tensor, "batch q"],
    *,
    before: Float[Tensor, "batch *shape"] | None = None,
) -> Float[Tensor, "batch *shape"]:
    """Return clip(x + G(z + V α) - G(z)) to [0, 1]: x itself at α = 0; `before` is G(z), where it is known.

    Raises:
        ValueError: the generator's images have another shape than x, or as `move_codes`.
    """
    with torch.no_grad():
        before = generator(z) if before is None else before
    if before.shape != x.shape:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted that of the generator's images, {tuple(before.shape)}")
    return (x + (plain_edit(generator, z, V, amplitudes) - before)).clamp(0, 1)


class _Edited(nn.Module):
    """The classifier as a function of u = (1 + α/ε)/2 in the unit box: what an attack of images can attack."""

    def __init__(self, model: nn.Module, edit: Map, epsilon: float) -> None:
        super().__init__()
        self.model, self.edit, self.epsilon = model, edit, epsilon

    def forward(self, u: Tensor) -> Tensor:
        return self.model(self.edit(self.epsilon * (2 * u - 1)))


def worst_amplitudes(
    model: nn.Module,
    edit: Map,
    y: Int64[Tensor, " batch"],
    start: Float[Tensor, "batch q"],
    *,
    epsilon: float,
    steps: int = 3,
) -> Float[Tensor, "batch q"]:
    """Return the amplitudes of ‖α‖₂ <= ε at which PGD saw the largest cross-entropy, the start among them.

    Args:
        model: f, in eval mode meanwhile; its weights get no gradients.
        edit: amplitudes (batch, q) to edited images, differentiable.
        y: labels.
        start: first amplitudes. From zeros the loss found is never below that of the images as they are.
        epsilon: radius ε >= 0 in units of the code; 0 returns zeros.
        steps: N >= 1, of lengths ε, ε(1 - 1/N), ..., ε/N.

    Raises:
        TypeError, ValueError: a number out of range; a start that is no finite matrix; labels that do not fit; NaN in
            a loss or a gradient.
    """
    check_number("epsilon", epsilon, low=0)
    check_matrix("start", start)
    if epsilon == 0:
        return torch.zeros_like(start)
    f, u = _Edited(model, edit, epsilon), (1 + start / epsilon) / 2
    return epsilon * (2 * pgd(f, torch.full_like(u, 0.5), y, norm=2, epsilon=0.5, steps=steps, start=u).x_best - 1)


def natra_loss(
    clean: Float[Tensor, "batch classes"],
    edited: Float[Tensor, "batch classes"],
    y: Int64[Tensor, " batch"],
    *,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Return CE(clean, y) + γ·CE(edited, y), each a mean over the batch, from logits; γ = `weight` >= 0.

    Raises:
        TypeError, ValueError: γ out of range, or shapes that differ.
    """
    check_number("weight", weight, low=0)
    if clean.shape != edited.shape or y.shape != clean.shape[:1]:
        shapes = tuple(clean.shape), tuple(edited.shape), tuple(y.shape)
        raise ValueError(f"clean, edited, y: got shapes {shapes}, wanted (n, c), (n, c) and (n,)")
    return F.cross_entropy(clean, y) + weight * F.cross_entropy(edited, y)


class NaturalEdits(nn.Module):
    """A frozen generator with directions: edits the images of a batch, in the worst way for a classifier or anyhow.

    Args:
        generator: G, frozen here and kept in eval mode.
        V: directions (d, q), orthonormal columns, for example of `first_layer_directions`.
        epsilon: ε >= 0, in units of the code.
        residual: edit x itself, else show G's own picture.

    Raises:
        TypeError, ValueError: a generator that is no module, V that is no finite matrix, or ε out of range.

    Example:
        >>> import torch
        >>> from lowrank_ref.robustness import NaturalEdits, first_layer_directions
        >>> G = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
        >>> edits = NaturalEdits(G, first_layer_directions(G[0].weight.detach(), 1).V, epsilon=2.0)
        >>> x, z, y = torch.rand(5, 6), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> edits.worst(torch.nn.Linear(6, 3), x, z, y).shape
        torch.Size([5, 6])
    """

    V: Tensor

    def __init__(self, generator: nn.Module, V: Float[Tensor, "d q"], *, epsilon: float, residual: bool = True) -> None:
        if not isinstance(generator, nn.Module):
            raise TypeError(f"generator: got {type(generator).__name__}, wanted an nn.Module")
        check_matrix("V", V)
        check_number("epsilon", epsilon, low=0)
        super().__init__()
        self.generator: Map = generator.requires_grad_(False)
        self.epsilon, self.residual = epsilon, residual
        self.register_buffer("V", V.detach().clone())
        self.train(self.training)

    def train(self, mode: bool = True) -> "NaturalEdits":
        """Stay in eval mode: the generator is no part of what trains."""
        return super().train(False)

    def forward(
        self, x: Tensor, z: Tensor, amplitudes: Float[Tensor, "batch q"], *, before: Tensor | None = None
    ) -> Float[Tensor, "batch *shape"]:
        """Return the images x, of codes z, edited by α; `before` as for `residual_edit`."""
        if self.residual:
            return residual_edit(self.generator, x, z, self.V, amplitudes, before=before)
        return plain_edit(self.generator, z, self.V, amplitudes)

    def _drawn(self, count: int, draws: torch.Generator | None) -> Tensor:
        return random_amplitudes(count, self.V.shape[1], epsilon=self.epsilon, generator=draws).to(self.V)

    @torch.no_grad()
    def random(self, x: Tensor, z: Tensor, *, draws: torch.Generator | None = None) -> Tensor:
        """Return the images with α drawn uniformly from the ball."""
        return self(x, z, self._drawn(len(z), draws))

    @torch.no_grad()
    def worst(
        self, model: nn.Module, x: Tensor, z: Tensor, y: Tensor, *, steps: int = 3, draws: torch.Generator | None = None
    ) -> Tensor:
        """Return the images at the worst α of PGD, from a start drawn by `draws`, or from 0 where it is None."""
        start = self._drawn(len(z), draws) if draws is not None else self.V.new_zeros(len(z), self.V.shape[1])
        edit = partial(self, x, z, before=self.generator(z) if self.residual else None)
        return edit(worst_amplitudes(model, edit, y, start, epsilon=self.epsilon, steps=steps))


PAPER = PaperInfo(
    key="natra",
    part="robustness",
    name="NaTra",
    title="Robust Training Using Natural Transformation",
    authors=("Shuo Wang", "Lingjuan Lyu", "Surya Nepal", "Carsten Rudolph", "Marthie Grobler", "Kristen Moore"),
    arxiv="2105.04070v1",
    summary="Train on images moved along directions of a generator's code, so that natural changes do not fool.",
    use_when="you have unlabelled images that show a change the labelled ones lack, and a generator has learned it",
    instead={
        "ramp": "the inputs move by attacks in a norm",
        "efficient_robustification": "you can write the change down",
    },
    needs=("ramp",),
    official_code="",
    code_licence="",
    equations={
        "batch inverse encoding and shifting": "inverse_codes",
        "plain edit": "plain_edit",
        "residual edit": "residual_edit",
        "inner maximum": "worst_amplitudes",
        "loss": "natra_loss",
        "manipulation": "NaturalEdits",
    },
    deviations=("all formulas are reconstructed", "a small VAE in the place of a GAN", "steps of PGD in the 2-norm"),
    aliases=("natural transformations", "SeFa", "GAN inversion", "latent directions", "spurious correlation"),
    status="draft",
    verified="2026-11-30",
)
