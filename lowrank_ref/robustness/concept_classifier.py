"""A zero-shot classifier that holds the features of its concepts: what CGBC runs at test time."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowrank_ref.core.checks import check_finite, check_floating
from lowrank_ref.robustness.cgbc import concept_similarities, soft_trim, trim_sharpness


class ConceptClassifier(nn.Module):
    """Scores classes by their concepts: image features in, logits out. Nothing trains.

    Args:
        concepts: features (K, M, D) of the concept prompts. A row of NaN is no concept: classes may have fewer than M.
        prior: p(C), numbers (K, M) >= 0 with a positive one in each class, or None for a uniform one. It weighs the
            sum; median and MAD do not know it.
        scale: logit scale of the model, > 0.
        temperature: τ > 0.
        side: one of `TRIMS`.
        threshold: λ >= 1.
        slope: k > 0 of "both".

    Raises:
        TypeError, ValueError: concepts that are no features (K, M, D), a class without any, or an argument out of
            range.

    Example:
        >>> import torch
        >>> from lowrank_ref.robustness import ConceptClassifier
        >>> concepts = torch.eye(4).view(2, 2, 4)  # two classes, two concepts each
        >>> ConceptClassifier(concepts, scale=10.0)(torch.tensor([[1.0, 1.0, 0.0, 0.0]])).argmax().item()
        0
    """

    concepts: Tensor
    prior: Tensor | None

    def __init__(
        self,
        concepts: Float[Tensor, "classes m d"],
        *,
        prior: Float[Tensor, "classes m"] | None = None,
        scale: float = 100.0,
        temperature: float = 1.0,
        side: str = "lower",
        threshold: float = 2.5,
        slope: float = 1.0,
    ) -> None:
        super().__init__()
        check_floating("concepts", concepts)
        if concepts.ndim != 3 or 0 in concepts.shape:
            raise ValueError(f"concepts: got shape {tuple(concepts.shape)}, wanted (classes, concepts, features)")
        absent = concepts.isnan().all(dim=-1)
        check_finite("concepts", concepts[~absent])
        if prior is not None:
            check_finite("prior", prior)
            if prior.shape != absent.shape or bool((prior < 0).any()):
                raise ValueError(f"prior: got shape {tuple(prior.shape)}, wanted {tuple(absent.shape)}, none negative")
        if bool((absent if prior is None else absent | (prior <= 0)).all(dim=-1).any()):
            raise ValueError("concepts, prior: got a class without a concept, wanted at least one with a prior > 0")
        trim_sharpness(torch.zeros(1), side=side, threshold=threshold, slope=slope)
        concept_similarities(torch.ones(1, 1), torch.ones(1, 1, 1), scale=scale, temperature=temperature)
        self.scale, self.temperature = scale, temperature
        self.side, self.threshold, self.slope = side, threshold, slope
        self.register_buffer("concepts", concepts.detach().clone())
        self.register_buffer("prior", None if prior is None else prior.detach().to(concepts.dtype).clone())

    def forward(self, images: Float[Tensor, "batch d"]) -> Float[Tensor, "batch classes"]:
        """Return the score of every image and class."""
        S = concept_similarities(images, self.concepts, scale=self.scale, temperature=self.temperature)
        return soft_trim(S, side=self.side, threshold=self.threshold, slope=self.slope, prior=self.prior)
