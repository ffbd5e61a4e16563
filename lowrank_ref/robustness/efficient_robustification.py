r"""A small robust teacher, a few tuned layers of a large student with three heads, and a choice of head for each input.

Jain et al., "Efficiently Robustify Pre-Trained Models", arXiv 2309.07499v1 (ICCV 2023). No official code is known.

Theirs, from the abstract and the captions of figures 1 and 4: the small teacher made robust by augmentation, the few
tuned layers, two more heads, and a choice of head from uncertainty and KL divergences. That the distillation minds
uncertainty is from a summary by others. The formulas below are our reconstructions; the paper's were not at hand.

| step                                                             | here                                         |
|------------------------------------------------------------------|----------------------------------------------|
| teacher: CE + λ·JS on augmented images (AugMix)                  | `consistent_loss` of `augmentation_chains`   |
| three heads: clean on the frozen layers, two on a tuned copy     | `ThreeHeads`                                 |
| ω = exp(-H(p)/log K), p of the teacher                           | `certainty`                                  |
| D(h) = T²·mean of ω·KL(softmax(g/T) ‖ softmax(h/T))              | `weighted_distillation`                      |
| L = CE(u_a) + CE(m) + CE(m_a) + λ(D(u_a) + D(m_a))               | `student_loss`                               |
| argmin over c and u of H(p_h)·KL(p_m ‖ p_h), else m              | `choose_head`                                |

Letters: c, u, m are the clean, the unclean and the combined head, index a an augmented image, g the teacher, K classes,
H the entropy in nats.

Ours in detail: the clean head reads the untouched layers, so that it stays the old model to the bit; both new heads
read one tuned copy and start as copies of the clean head; uncertainty at inference is the entropy of each head.
Companions: `dropout_uncertainty` (p of Monte Carlo dropout), `head_baselines`, `weight_interpolation` (WiSE-FT).
Cost, with q of L equal blocks tuned: trained numbers and Adam's state of q blocks and two heads, a stored copy of q
blocks, no backward pass below them; a prediction runs q blocks twice. `replace_linears` on `tuned` makes the low-rank
variant: then q = L, and the backward pass is that of the whole network. DDP and FSDP2: not tested.
"""

import copy
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_number
from lowrank_ref.core.registry import PaperInfo


def entropy_of(p: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Return H(p) = -Σ p log p of every row, in nats, with 0·log 0 = 0. Fewer than two classes: a ValueError."""
    if p.shape[1] < 2:
        raise ValueError(f"p: got {p.shape[1]} classes, wanted at least 2")
    return torch.special.entr(p).sum(1)


def certainty(p: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Return ω = exp(-H(p)/log K) for every row of probabilities: 1 for a sure one, 1/e for a uniform one.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> certainty(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist()
        [1.0, 0.3678794503211975]
    """
    return (-entropy_of(p) / math.log(p.shape[1])).exp()


def weighted_distillation(
    z: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    omega: Float[Tensor, " batch"] | None = None,
    *,
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """Return T²·mean over rows of ω·KL(softmax(teacher/T) ‖ softmax(z/T)) >= 0.

    The mean divides by the number of rows, not by Σω.

    Args:
        z: logits of the student.
        teacher: logits of the teacher.
        omega: a weight for each row; None weighs all alike, which is plain distillation.
        temperature: T > 0.

    Raises:
        TypeError, ValueError: shapes that differ, or T out of range.
    """
    check_number("temperature", temperature, low=0, open_low=True)
    if z.shape != teacher.shape or (omega is not None and omega.shape != z.shape[:1]):
        shapes = tuple(z.shape), tuple(teacher.shape), None if omega is None else tuple(omega.shape)
        raise ValueError(f"z, teacher, omega: got shapes {shapes}, wanted (n, c), (n, c) and (n,)")
    log_q, log_p = ((t / temperature).log_softmax(1) for t in (z, teacher))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    return temperature**2 * (kl if omega is None else omega * kl).mean()


def student_loss(
    unclean: Float[Tensor, "batch classes"],
    combined: Float[Tensor, "batch classes"],
    combined_clean: Float[Tensor, "batch classes"],
    y: Int64[Tensor, " batch"],
    teacher: Float[Tensor, "batch classes"] | None = None,
    omega: Float[Tensor, " batch"] | None = None,
    *,
    kd_weight: float = 1.0,
    temperature: float = 2.0,
    label_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Return CE(u_a, y) + CE(m, y) + CE(m_a, y) + λ(D(u_a) + D(m_a)); each CE is a mean over rows.

    Args:
        unclean: logits of the unclean head at augmented images.
        combined: of the combined head there.
        combined_clean: of the combined head at the clean images.
        y: labels.
        teacher: logits of the teacher at the augmented images; None leaves it out.
        omega: weight of each row in D.
        kd_weight: λ >= 0.
        temperature: T > 0 in D.
        label_weight: >= 0, factor on the three cross-entropies; 0 learns from the teacher alone.

    Raises:
        TypeError, ValueError: a weight out of range, or as `weighted_distillation`.
    """
    check_number("kd_weight", kd_weight, low=0)
    check_number("label_weight", label_weight, low=0)
    ce = [F.cross_entropy(z, y) for z in (unclean, combined_clean, combined)]
    loss = label_weight * torch.stack(ce).sum()
    if teacher is None or kd_weight == 0:
        return loss
    kd = [weighted_distillation(z, teacher, omega, temperature=temperature) for z in (unclean, combined)]
    return loss + kd_weight * torch.stack(kd).sum()


class Heads(NamedTuple):
    """Logits of the three heads, each (batch, classes)."""

    clean: Tensor
    unclean: Tensor
    combined: Tensor

    def pick(self, index: Int64[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
        """Return for each row the logits of head 0 (clean), 1 (unclean) or 2 (combined)."""
        return torch.stack(tuple(self))[index, torch.arange(len(index), device=index.device)]


def choose_head(heads: Heads, *, threshold: float | None = None) -> Int64[Tensor, " batch"]:
    """Return for each row the head h of {0, 1} with the smaller H(p_h)·KL(p_m ‖ p_h); the clean one of a tie.

    Args:
        heads: logits of the clean (0), the unclean (1) and the combined head (2).
        threshold: where both products exceed it, the answer is 2; None asks for no limit.

    Raises:
        TypeError, ValueError: a negative threshold.
    """
    if threshold is not None:
        check_number("threshold", threshold, low=0)
    log_m = heads.combined.log_softmax(1)
    products = []
    for z in heads[:2]:
        kl = F.kl_div(z.log_softmax(1), log_m, reduction="none", log_target=True).sum(1).clamp_min(0)
        products.append(entropy_of(z.softmax(1)) * kl)
    index = (products[1] < products[0]).long()
    return index if threshold is None else torch.where(torch.minimum(*products) > threshold, 2, index)


class ThreeHeads(nn.Module):
    """A trained classifier, and a tuned copy of its last layers with two heads beside it.

    `prefix`, `original` and `clean` are the parts that come in: frozen here, kept in eval mode, never written. `tuned`
    is a copy of `original`, `unclean` and `combined` are copies of `clean`; these three train. Before the first step
    all three heads say the same.

    Args:
        prefix: first layers; `nn.Identity()` tunes all that comes after.
        chunk: the layers that are copied and tuned.
        head: from the chunk's output to logits.

    Raises:
        TypeError: a part that is no module.
        ValueError: the chunk has no parameter to tune.

    Example:
        >>> from torch import nn
        >>> from lowrank_ref.robustness import ThreeHeads
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> student = ThreeHeads(model[:2], model[2:4], model[4])
        >>> sum(p.numel() for p in student.parameters() if p.requires_grad)  # 8·8 + 8 + 2(8·3 + 3)
        126
    """

    def __init__(self, prefix: nn.Module, chunk: nn.Module, head: nn.Module) -> None:
        for name, part in {"prefix": prefix, "chunk": chunk, "head": head}.items():
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name}: got {type(part).__name__}, wanted an nn.Module")
        if not any(p.is_floating_point() for p in chunk.parameters()):
            raise ValueError("chunk: got no parameter, wanted layers that can be tuned")
        super().__init__()
        self.prefix, self.original, self.clean = prefix, chunk, head
        self.tuned, self.unclean, self.combined = copy.deepcopy(chunk), copy.deepcopy(head), copy.deepcopy(head)
        for part in self.frozen():
            part.requires_grad_(False)
        for part in (self.tuned, self.unclean, self.combined):
            part.requires_grad_(True)
        self.train(self.training)

    def frozen(self) -> tuple[nn.Module, ...]:
        """Return the parts that stay as they came."""
        return self.prefix, self.original, self.clean

    def train(self, mode: bool = True) -> "ThreeHeads":
        """Set the mode of what is tuned; the frozen parts stay in eval mode, so that no running statistic moves."""
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def new_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the unclean and of the combined head: what training needs."""
        h = self.tuned(self.prefix(x))
        return self.unclean(h), self.combined(h)

    def forward(self, x: Tensor) -> Heads:
        """Return the logits of all three heads."""
        h = self.prefix(x)
        tuned = self.tuned(h)
        return Heads(self.clean(self.original(h)), self.unclean(tuned), self.combined(tuned))


PAPER = PaperInfo(
    key="efficient_robustification",
    part="robustness",
    name="Efficient robustification",
    title="Efficiently Robustify Pre-Trained Models",
    authors=("Nishant Jain", "Harkirat Behl", "Yogesh Singh Rawat", "Vibhav Vineet"),
    arxiv="2309.07499v1",
    summary="Let a small robust network teach the last layers of a large one, and keep the old head for clean inputs.",
    use_when="you must not touch a large model's own answers, and have a small model that is more robust",
    instead={"ramp": "the inputs move by attacks, not by noise, blur or weather"},
    needs=("primer",),
    official_code="",
    code_licence="",
    equations={
        "uncertainty weight": "certainty",
        "distillation": "weighted_distillation",
        "student": "student_loss",
        "three heads": "ThreeHeads",
        "inference": "choose_head",
    },
    deviations=("loss, weights and choice of head are reconstructed", "the clean head reads the frozen layers"),
    aliases=("robust distillation", "small teacher", "AugMix", "WiSE-FT", "corruptions", "common corruptions"),
    status="draft",
    verified="2026-11-30",
)
