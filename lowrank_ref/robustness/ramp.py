r"""RAMP: adversarial training against l1, l2 and l∞ at once, by logit pairing and gradient projection.

Jiang and Singh, "RAMP: Boosting Adversarial Robustness Against Multiple l_p Perturbations for Universal Robustness",
arXiv 2402.06827v2.

| in the paper                                        | here                                     |
|-----------------------------------------------------|------------------------------------------|
| L_KL (equation 1)                                   | `logit_pairing`                          |
| L_max (equation 2)                                  | `max_loss`                               |
| L = L_max + λ·L_KL (equation 3)                     | `ramp_loss`                              |
| GP (equation 5)                                     | `cosine_projection`                      |
| f + β·GP + (1 - β)·ĝ_a (equation 7)                 | `fuse`, `GradientProjection`             |
| Proj of the proofs (definition A.3)                 | `orthogonal_projection`                  |

Letters: z_q, z_r are logits at the two attacks, y labels; β is `beta`, λ `weight`; g_n, g_a are what one natural and
one adversarial epoch change in a tensor, both from the same start f.

Deviations. The official code picks the worse attack by the loss seen inside the attack and runs a third forward pass;
here equation 2 takes the maximum of the two losses at hand, the same without batch norm and dropout. The code also
fuses running statistics of batch norm; here buffers are those of the adversarially trained model. Which pair to train
on: the paper says the two largest balls, which is not the pair it uses on CIFAR-10; `threats.is_free` gives a reason.
Union accuracy is in `threats`, the attacks in `attacks`.
Cost: two attacks a batch (three for MAX over three norms); with gradient projection one natural epoch beside each
adversarial one, a copy of the model, its optimizer's state, and a copy of the weights at the start of the epoch.
Works under DDP if every process takes the same steps. FSDP2: cosines would be those of shards; not supported.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_finite, check_integer, check_number
from lowrank_ref.core.registry import PaperInfo
from lowrank_ref.robustness.attack_losses import cross_entropy

Projection = Callable[[Tensor, Tensor], Tensor]


def logit_pairing(
    z_q: Float[Tensor, "batch classes"], z_r: Float[Tensor, "batch classes"], y: Int64[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Return the mean of KL(softmax z_q ‖ softmax z_r) over the samples that the q-attack does not fool (equation 1).

    Gradients flow into both. Without such a sample it is 0.

    Example:
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> logit_pairing(z, z, torch.tensor([0, 0])).item()
        0.0
    """
    kl = F.kl_div(z_r.log_softmax(1), z_q.log_softmax(1), reduction="none", log_target=True).sum(1)
    right = (z_q.argmax(1) == y).to(kl.dtype)
    return (right * kl).sum() / right.sum().clamp_min(1)


def max_loss(logits: Sequence[Float[Tensor, "batch classes"]], y: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the mean over samples of the largest cross-entropy among the attacks (equation 2, MAX)."""
    return torch.stack([cross_entropy(z, y) for z in logits]).amax(0).mean()


def average_loss(logits: Sequence[Float[Tensor, "batch classes"]], y: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over samples and attacks: AVG, a baseline."""
    return torch.stack([cross_entropy(z, y) for z in logits]).mean()


def ramp_loss(
    z_q: Float[Tensor, "batch classes"],
    z_r: Float[Tensor, "batch classes"],
    y: Int64[Tensor, " batch"],
    *,
    weight: float = 2.0,
) -> Float[Tensor, ""]:
    """Return L_max + λ·L_KL (equation 3).

    Args:
        z_q: logits at the q-attack; q is the norm of the robust starting model, or the harder one.
        z_r: logits at the r-attack.
        y: labels.
        weight: λ >= 0. The paper's text has 2 from scratch and 0.5 for fine-tuning.

    Raises:
        ValueError: weight < 0, or shapes that differ.
    """
    check_number("weight", weight, low=0)
    if z_q.shape != z_r.shape or y.shape != z_q.shape[:1]:
        shapes = tuple(z_q.shape), tuple(z_r.shape), tuple(y.shape)
        raise ValueError(f"z_q, z_r, y: got shapes {shapes}, wanted (n, c), (n, c) and (n,)")
    return max_loss((z_q, z_r), y) + weight * logit_pairing(z_q, z_r, y)


# --- gradient projection ----------------------------------------------------------------------------------------------


def cosine_projection(g_n: Float[Tensor, "*shape"], g_a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return max(cos(g_n, g_a), 0)·g_n (equation 5, and the official code): its length does not depend on that of g_a.

    Example:
        >>> cosine_projection(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0])).tolist()
        [1.2000000476837158, 0.0]
    """
    return cosine(g_n, g_a).clamp_min(0) * g_n


def orthogonal_projection(g_n: Float[Tensor, "*shape"], g_a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return max(<g_a, g_n>, 0)/‖g_n‖²·g_n, the part of g_a along g_n (definition A.3, used in the proofs)."""
    tiny = torch.finfo(g_n.dtype).tiny
    return (g_a * g_n).sum().clamp_min(0) / g_n.square().sum().clamp_min(tiny) * g_n


def no_projection(g_n: Float[Tensor, "*shape"], g_a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 0: `fuse` is then Lookahead with slow step 1 - β (Zhang et al., 1907.08610). A control."""
    return torch.zeros_like(g_a)


def whole_natural(g_n: Float[Tensor, "*shape"], g_a: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return g_n: `fuse` is then the average of both epochs with weights β and 1 - β, plain at β = ½. A control."""
    return g_n


def cosine(g_n: Float[Tensor, "*shape"], g_a: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return <g_n, g_a>/(‖g_n‖‖g_a‖) over all entries, 0 where one of them is 0."""
    lengths = g_n.norm() * g_a.norm()
    return (g_n * g_a).sum() / lengths.clamp_min(torch.finfo(g_n.dtype).tiny)


def fuse(
    f: Float[Tensor, "*shape"],
    f_n: Float[Tensor, "*shape"],
    f_a: Float[Tensor, "*shape"],
    *,
    beta: float = 0.5,
    projection: Projection = cosine_projection,
) -> Float[Tensor, "*shape"]:
    """Return f + β·GP(g_n, g_a) + (1 - β)·g_a with g_n = f_n - f and g_a = f_a - f (equation 7), for one tensor.

    Args:
        f: weights at the start of the epoch.
        f_n: after a natural epoch.
        f_a: after an adversarial epoch.
        beta: β in [0, 1]; 0 gives f_a. Another one raises a ValueError.
        projection: GP, called as projection(g_n, g_a).
    """
    check_number("beta", beta, low=0, high=1)
    g_n, g_a = f_n - f, f_a - f
    return f + beta * projection(g_n, g_a) + (1 - beta) * g_a


class GradientProjection(Action):
    """Fuse a model with a natural twin at the end of every epoch.

    Train both between two calls of `step`, the model on attacks, the twin on clean images, each with its own optimizer
    state. `step` then writes the fused weights into both, tensor by tensor. Attach it to the optimizer stepping last.

    Args:
        model: trained on attacks.
        twin: a copy of the model.
        beta: β in [0, 1].
        projection: `cosine_projection`, `orthogonal_projection`, or a control.
        every: fuse at every so many calls of `step`: the steps of an epoch, where it is called after each of them.

    Raises:
        TypeError, ValueError: beta or every out of range, or a twin that is not a copy. On `step`: a weight with NaN or
            infinity; nothing is then written or counted.

    Example:
        >>> import copy, torch
        >>> from lowrank_ref.robustness import GradientProjection
        >>> model = torch.nn.Linear(4, 3)
        >>> projection = GradientProjection(model, copy.deepcopy(model), every=100)  # the steps of an epoch
    """

    def __init__(
        self,
        model: nn.Module,
        twin: nn.Module,
        *,
        beta: float = 0.5,
        projection: Projection = cosine_projection,
        every: int = 1,
    ) -> None:
        check_number("beta", beta, low=0, high=1)
        check_integer("every", every, low=1)
        ours, others = dict(model.named_parameters()), dict(twin.named_parameters())
        same = ours.keys() == others.keys() and all(torch.equal(p, others[name]) for name, p in ours.items())
        if not same or any(p is others[name] for name, p in ours.items()):
            raise ValueError("twin: got other or shared parameters, wanted copy.deepcopy(model)")
        self.model, self.twin, self.beta, self.projection, self.every = model, twin, beta, projection, every
        self.calls = 0
        self.start = {name: p.detach().clone() for name, p in ours.items()}

    @torch.no_grad()
    def act(self) -> None:
        """Count; at the end of an epoch, fuse. ValueError: as the class says."""
        if (self.calls + 1) % self.every:
            self.calls += 1
            return
        natural = dict(self.twin.named_parameters())
        for name, p in self.model.named_parameters():
            check_finite(name, p)
            check_finite(f"twin.{name}", natural[name])
        for name, p in self.model.named_parameters():
            p.copy_(fuse(self.start[name], natural[name], p, beta=self.beta, projection=self.projection))
            self.start[name] = p.detach().clone()
        self.twin.load_state_dict(self.model.state_dict())
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the count of calls and the weights at the start of the epoch."""
        return {"calls": self.calls, "start": {name: t.clone() for name, t in self.start.items()}}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Load what `state_dict` returned; another state, or weights of another model, raise a ValueError."""
        self._check_keys(state)
        shapes = {name: t.shape for name, t in self.start.items()}
        if {name: t.shape for name, t in state["start"].items()} != shapes:
            raise ValueError(f"state: got weights of another model, wanted {sorted(shapes)} with the same shapes")
        self.calls = state["calls"]
        self.start = {name: state["start"][name].to(t, copy=True) for name, t in self.start.items()}


PAPER = PaperInfo(
    key="ramp",
    part="robustness",
    name="RAMP",
    title="RAMP: Boosting Adversarial Robustness Against Multiple $l_p$ Perturbations for Universal Robustness",
    authors=("Enyi Jiang", "Gagandeep Singh"),
    arxiv="2402.06827v2",
    summary="Train one network to withstand l1, l2 and l∞ attacks together, and measure it by the attacks' union.",
    use_when="you must withstand attacks of several norms at once and can afford two attacks a batch",
    instead={"natra": "one norm is all that matters"},
    official_code="uiuc-focal-lab/RAMP",
    code_licence="GPL-2.0",
    equations={
        "equation 1": "logit_pairing",
        "equation 2": "max_loss",
        "equation 3": "ramp_loss",
        "equation 5": "cosine_projection",
        "equation 7": "fuse",
        "definition A.3": "orthogonal_projection",
    },
    deviations=("no third forward pass", "no fusing of running statistics", "pair of norms by convex hull, not volume"),
    aliases=("robustness against multiple perturbations", "union accuracy", "PGD", "APGD", "E-AT"),
    status="draft",
    verified="2026-11-24",
)
