r"""BA-LoRA: three penalties on outputs while LoRA trains: stay near the pretrained model, spread, concentrate.

Chang, Chang and Wu, "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large
Language Models", arXiv 2408.04556v8. Versions 1 to 5 (first generation, G1) have other penalties than 6 to 8 (G2).

| in the paper                                                          | here                                  |
|-----------------------------------------------------------------------|---------------------------------------|
| W = W_res + BA, start at the top r singular triples (PiSSA)           | `dora_pissa.PiSSALinear`, alpha = rank |
| L_CR = T² KL(softmax(Z_P/T) ‖ softmax(Z_F/T)), mean of the rows (G2)  | `temperature_kl`                      |
| L_CR of classification in G1: mean (Z_F/‖Z_F‖ - Z_P/‖Z_P‖)²           | `normalised_mse`                      |
| L_DR of classification: (1/D) Σ_{i≠j} C_ij², C the covariance of Z_F  | `covariance_penalty`                  |
| L_DR of generation: -H of the K largest logits (G1: of all)           | `entropy_penalty`                     |
| L_SVD = -Σ_{i≤k} σ_i / Σ_i σ_i, in generation of G2 over ‖Z_F‖_F      | `singular_penalty`                    |
| λ1 L_CR + λ2 L_DR + λ3 L_SVD                                          | `OutputPenalty`                       |
| schedules of λ, from the official code                                | `lambda_schedules`                   |

Letters: Z_F is `z`, logits (rows, classes) of the model that trains; Z_P is `teacher`, the original model's, which gets
no gradient; T `temperature`, K `kept`, k `top`. A row is an example, or a token that predicts a response
(`teacher.response_logits`). G1's KL of generation is summed over t tokens and divided by b sequences: t/b times
`temperature_kl` at T = 1.

Deviations. The teacher is the model with its adapters off, no second copy: here PiSSA keeps W itself as the base, where
the paper's keeps W_res. A token counts where its *next* label counts; the official code forgets to shift. Whether σ is
divided by their sum or by ‖Z‖_F is an argument; there it changes with the vocabulary. The sketch of a large SVD gets no
gradient; where the spectrum is flat, value and gradient are off, and differ from those of the official code.

Cost: one forward pass without gradient; an SVD of (rows, classes), O(rows·classes·min(rows, classes)), or with a sketch
O(rows·classes·k); no parameters. Covariance and singular values are those of a process's own rows. Not tested under DDP
or FSDP2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.adapters.lambda_schedules import cosine_fall, two_phase
from lowrank_ref.core.checks import check_integer, check_number, check_wide
from lowrank_ref.core.linalg import power_basis
from lowrank_ref.core.registry import PaperInfo

#: λ1, λ2, λ3 of the paper for classification.
PUBLISHED = (0.15, 0.03, 0.03)
#: What the sum of the first singular values is divided by.
DIVISORS = ("nuclear", "frobenius")
#: Logits of no larger norm have no direction, so the term and its gradient are 0, as in the official code.
TINY = 1e-8


def _rows(name: str, z: Tensor, least: int = 1) -> Tensor:
    """Check logits, return them in float32 or wider: entropies and singular values of 16 bits are too coarse."""
    check_wide(name, z)
    if z.ndim != 2 or z.shape[0] < least or z.shape[1] < 1:
        raise ValueError(f"{name}: got shape {tuple(z.shape)}, wanted (rows, classes) with at least {least} rows")
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _pair(z: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if teacher.shape != z.shape:
        raise ValueError(f"teacher: got shape {tuple(teacher.shape)}, wanted that of z, {tuple(z.shape)}")
    return _rows("z", z), _rows("teacher", teacher).detach()


def temperature_kl(
    z: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"], *, temperature: float = 2.0
) -> Float[Tensor, ""]:
    """Return T² times the mean over rows of KL(softmax(teacher/T) ‖ softmax(z/T)) >= 0. T > 0, else a ValueError.

    Example:
        >>> z = torch.tensor([[1.0, 0.0, -1.0]])
        >>> temperature_kl(z + 3, z).item()  # a constant in a row changes nothing
        0.0
    """
    check_number("temperature", temperature, low=0, open_low=True)
    z, teacher = (part.div(temperature).log_softmax(1) for part in _pair(z, teacher))
    return temperature**2 * F.kl_div(z, teacher, reduction="batchmean", log_target=True)


def normalised_mse(z: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"]) -> Float[Tensor, ""]:
    """Return the mean over all entries of (z/‖z‖ - teacher/‖teacher‖)², norms row by row. Bad shapes: a ValueError."""
    z, teacher = _pair(z, teacher)
    return F.mse_loss(F.normalize(z, dim=1), F.normalize(teacher, dim=1))


def covariance_penalty(z: Float[Tensor, "rows classes"]) -> Float[Tensor, ""]:
    """Return the sum of squared covariances of different columns over the number of columns, >= 0.

    No floating-point matrix raises a TypeError or ValueError, and so does a single row, which has no covariance.
    """
    z = _rows("z", z, least=2)
    z = z - z.mean(0)
    C = z.T @ z / (len(z) - 1)
    return (C - C.diagonal().diag()).square().sum() / len(C)


def entropy_penalty(z: Float[Tensor, "rows classes"], *, kept: int | None = 20) -> Float[Tensor, ""]:
    """Return minus the mean entropy, in nats, of the softmax of each row's `kept` largest logits; in [-log kept, 0].

    `kept` None, or more than there are, takes all. Bad logits, or kept < 1: a TypeError or ValueError.
    """
    z = _rows("z", z)
    if kept is not None:
        check_integer("kept", kept, low=1)
        z = z.topk(min(kept, z.shape[1]), dim=1).values
    log_p = z.log_softmax(1)
    return (log_p.exp() * log_p).sum(1).mean()


def singular_penalty(
    z: Float[Tensor, "rows classes"],
    *,
    top: int = 5,
    norm: str = "nuclear",
    sketch: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return -Σ_{i≤k} σ_i over the sum of all ("nuclear", in [-1, 0)) or over ‖z‖_F ("frobenius", in [-√k, 0)).

    Args:
        z: logits; one number added to all can lower the term, though no softmax sees that.
        top: k >= 1, cut to min(rows, classes).
        norm: "nuclear" or "frobenius".
        sketch: None takes all singular values; a number finds the first k in a random sketch with so many directions
            to spare (the official code: 5), where the matrix is larger than that. "frobenius" only.
        generator: source of the sketch.

    Raises:
        TypeError, ValueError: no matrix of floating point, top < 1, sketch < 0, another norm, a sketch with "nuclear".

    Example:
        >>> singular_penalty(torch.diag(torch.tensor([3.0, 2.0, 1.0])), top=1).item()
        -0.5
    """
    z = _rows("z", z)
    check_integer("top", top, low=1)
    if norm not in DIVISORS:
        raise ValueError(f"norm: got {norm!r}, wanted one of {DIVISORS}")
    if sketch is not None:
        check_integer("sketch", sketch, low=0)
        if norm != "frobenius":
            raise ValueError(f"sketch: got {sketch} with norm {norm!r}, wanted 'frobenius': a sketch finds no full sum")
    small = z
    if sketch is not None and top + sketch < min(z.shape):
        Q = power_basis(z.detach(), top + sketch, oversample=0, generator=generator)
        small = Q.T @ z
    S = torch.linalg.svdvals(small)
    whole = S.sum() if norm == "nuclear" else z.norm()
    return -S[:top].sum() * (whole > TINY) / whole.clamp_min(TINY)


@dataclass(frozen=True, kw_only=True)
class OutputPenalty:
    """λ1·consistency + λ2·diversity + λ3·singular values, to be added to the loss. A term with λ = 0 is not computed.

    Terms are those of classification, with consistency alone on and constant, as the chapter chose (λ1 = 0.4 did as
    well); the paper's λ are `PUBLISHED`. `generation()` has the official settings of language models. First generation:
    penalties=(1e-4, 3e-4, 1e-4) and singular=partial(singular_penalty, top=3), with consistency=normalised_mse, or, for
    language models, with partial(temperature_kl, temperature=1) and partial(entropy_penalty, kept=None).

    Args:
        penalties: λ1, λ2, λ3 >= 0; else a TypeError or ValueError.
        consistency: (z, teacher) -> number.
        diversity, singular: z -> number.

    Example:
        >>> import torch
        >>> from lowrank_ref.adapters import OutputPenalty
        >>> z = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> penalty = OutputPenalty()
        >>> penalty(z, z).item(), list(penalty.terms(z, z))
        (0.0, ['consistency'])
    """

    penalties: tuple[float, float, float] = (0.2, 0.0, 0.0)
    consistency: Callable[[Tensor, Tensor], Tensor] = temperature_kl
    diversity: Callable[[Tensor], Tensor] = covariance_penalty
    singular: Callable[[Tensor], Tensor] = singular_penalty

    def __post_init__(self) -> None:
        if len(self.penalties) != 3:
            raise ValueError(f"penalties: got {self.penalties!r}, wanted three: consistency, diversity, singular")
        for penalty in self.penalties:
            check_number("penalties", penalty, low=0)

    @classmethod
    def generation(cls, **changes: Any) -> "OutputPenalty":
        """Return the official settings of language models: other λ, entropy, ten σ from a sketch over ‖Z‖_F."""
        singular = partial(singular_penalty, top=10, norm="frobenius", sketch=5)
        others: dict[str, Any] = {
            "penalties": (0.025, 0.005, 0.005),
            "diversity": entropy_penalty,
            "singular": singular,
        }
        return cls(**others | changes)

    def terms(self, z: Float[Tensor, "rows classes"], teacher: Tensor | None = None) -> dict[str, Tensor]:
        """Return the terms with λ > 0, not weighted. Bad logits, or a teacher that is missing: a ValueError."""
        found = {}
        if self.penalties[0]:
            if teacher is None:
                raise ValueError("teacher: got None, wanted the logits of `teacher_logits`: λ1 > 0")
            found["consistency"] = self.consistency(z, teacher)
        if self.penalties[1]:
            found["diversity"] = self.diversity(z)
        if self.penalties[2]:
            found["singular"] = self.singular(z)
        return found

    def weights(self, done: float | None = None) -> dict[str, float]:
        """Return the three λ, at a share of the training by the official schedules. Not in [0, 1]: a ValueError."""
        names = ("consistency", "diversity", "singular")
        if done is None:
            return dict(zip(names, self.penalties))
        late = two_phase(done)
        return {n: w * f for n, w, f in zip(names, self.penalties, (cosine_fall(done), late, late))}

    def __call__(self, z: Tensor, teacher: Tensor | None = None, *, done: float | None = None) -> Tensor:
        """Return the weighted sum; with `done`, scheduled. Raises what `terms` and `weights` raise."""
        weights = self.weights(done)
        return sum((weights[name] * term for name, term in self.terms(z, teacher).items()), z.new_zeros(()))


PAPER = PaperInfo(
    key="ba_lora",
    part="adapters",
    name="BA-LoRA",
    title="BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language Models",
    authors=("Yupeng Chang", "Yi Chang", "Yuan Wu"),
    arxiv="2408.04556v8",
    summary="Three penalties on the outputs of a model that is adapted: what each keeps, and which bias a pull keeps.",
    use_when="you adapt on few, skewed or noisy data, have nothing of the old data, and trust the pretrained model",
    instead={"lora": "the pretrained model itself is what is wrong"},
    needs=("lora",),
    official_code="llm172/BA-LoRA",
    code_licence="none stated",
    equations={
        "consistency": "temperature_kl",
        "diversity, classification": "covariance_penalty",
        "diversity, generation": "entropy_penalty",
        "singular values": "singular_penalty",
    },
    deviations=("the teacher is the model with adapters off", "tokens are those whose next label counts"),
    aliases=("catastrophic inheritance", "output regularisation", "consistency regularisation", "PiSSA"),
    verified="2026-11-29",
)
