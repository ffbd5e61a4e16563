r"""Two small neural rankers: a dual encoder, which reads query and document apart, and KNRM, which compares words.

    dual encoder   cos(f(q), f(d)), f(x) = tanh(x E) H, x the features of a text: shares of words, of letter triples,
                   or the output of a frozen pretrained encoder; E (features, d), H (d, d)
    KNRM           w · Σ_{t in q} ln max(K(t, d), 1e-10) / 100,
                   K_k(t, d) = Σ_{u in d} exp(-(cos(e_t, e_u) - μ_k)² / 2σ_k²)

KNRM: Xiong and others, SIGIR 2017; its last tanh is left out, as it changes no order. Both train with in-batch softmax:
the document of each query against those of the others, also where one of these is relevant too. Both run in float32.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.checks import check_integer, check_number
from lowrank_ref.robustness.lexical_rankers import Texts, check_texts, count_words


class WordShares:
    """Features of a text: the share of each known word among its known words, zeros if it has none.

    Args:
        words: word -> number, 0 to V - 1.

    Example:
        >>> from lowrank_ref.robustness import WordShares
        >>> WordShares({"red": 0, "fish": 1})([["red", "fish", "?"]]).tolist()
        [[0.5, 0.5]]
    """

    def __init__(self, words: dict[str, int]) -> None:
        self.words, self.size = words, len(words)

    def parts(self, text: Sequence[str]) -> list[str]:
        """Return what is counted: here the words themselves."""
        return list(text)

    def __call__(self, texts: Texts) -> Float[Tensor, "n V"]:
        """Return the features, in float32."""
        check_texts("texts", texts)
        counts = count_words([self.parts(text) for text in texts], self.words)
        return (counts / counts.sum(1, keepdim=True).clamp_min(1)).float()


@lru_cache(100_000)
def letter_triples(word: str) -> tuple[str, ...]:
    """Return all runs of three letters of a word between two marks.

    Example:
        >>> letter_triples("deer")
        ('#de', 'dee', 'eer', 'er#')
    """
    marked = f"#{word}#"
    return tuple(marked[i : i + 3] for i in range(len(marked) - 2))


class TripleShares(WordShares):
    """The same with letter triples in place of words: a word with a typo keeps some of them.

    Args:
        texts: those whose triples are known.

    Raises:
        TypeError, ValueError: no texts.

    Example:
        >>> from lowrank_ref.robustness import TripleShares
        >>> TripleShares([["deer"]])([["deer"]]).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def __init__(self, texts: Texts) -> None:
        check_texts("texts", texts)
        known = sorted({part for text in texts for part in self.parts(text)})
        super().__init__({part: i for i, part in enumerate(known)})

    def parts(self, text: Sequence[str]) -> list[str]:
        """Return the letter triples of all words."""
        return [triple for word in text for triple in letter_triples(word)]


class DualEncoder(nn.Module):
    """Reads queries and documents apart, by one network, and compares them by their cosine.

    Args:
        features: called with texts; returns (n, size), such as `WordShares`.
        size: how many features.
        dim: d, width of both layers.
        generator: draws E and H, normal with standard deviations 0.1 and 1/√d.

    Raises:
        TypeError, ValueError: a size or dim below 1.

    Example:
        >>> import torch
        >>> from lowrank_ref.robustness import DualEncoder, WordShares
        >>> shares = WordShares({"a": 0, "b": 1})
        >>> model = DualEncoder(shares, shares.size, dim=4, generator=torch.Generator().manual_seed(0))
        >>> model([["a"]], [["a"], ["b"]]).shape
        torch.Size([1, 2])
    """

    def __init__(
        self, features: Callable[[Texts], Tensor], size: int, dim: int = 128, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        check_integer("size", size, low=1)
        check_integer("dim", dim, low=1)
        self.features = features
        self.E = nn.Parameter(0.1 * torch.randn(size, dim, generator=generator))
        self.H = nn.Parameter(torch.randn(dim, dim, generator=generator) / dim**0.5)

    def encode(self, texts: Texts) -> Float[Tensor, "n d"]:
        """Return unit vectors; that of a document does not depend on the query, so it can be kept."""
        return F.normalize(torch.tanh(self.features(texts) @ self.E) @ self.H, dim=1)

    def forward(self, queries: Texts, documents: Texts) -> Float[Tensor, "q n"]:
        """Return the cosines."""
        return self.encode(queries) @ self.encode(documents).T


class KNRM(nn.Module):
    """Counts, for each word of the query, the words of the document at eleven grades of similarity.

    The kernels stand at μ = 1 with σ = 0.001 (the same word) and at 0.9, 0.7, …, -0.9 with σ = 0.1.

    Args:
        words: word -> number; other words are passed over.
        dim: width of the word vectors.
        generator: draws the vectors, normal; the weights start at 0.001.

    Raises:
        TypeError, ValueError: no words, or dim below 1.

    Example:
        >>> import torch
        >>> from lowrank_ref.robustness import KNRM
        >>> model = KNRM({"red": 0, "fish": 1}, dim=4, generator=torch.Generator().manual_seed(0))
        >>> model([["red"]], [["red"], ["fish"]]).shape
        torch.Size([1, 2])
    """

    mu: Tensor
    sigma: Tensor

    def __init__(self, words: dict[str, int], dim: int = 32, *, generator: torch.Generator) -> None:
        super().__init__()
        check_integer("dim", dim, low=1)
        check_integer("words", len(words), low=1)
        self.words = words
        self.vectors = nn.Parameter(torch.randn(len(words), dim, generator=generator))
        self.weights = nn.Parameter(torch.full((11,), 1e-3))
        self.register_buffer("mu", torch.tensor([1.0, *(0.9 - 0.2 * k for k in range(10))]))
        self.register_buffer("sigma", torch.tensor([1e-3] + [0.1] * 10))

    def soft_counts(self, used: Tensor, D: Float[Tensor, "n V"]) -> Float[Tensor, "u n kernels"]:
        """Return K_k(t, d) of some words t, given by their numbers, and documents given by their counts."""
        unit = F.normalize(self.vectors, dim=1)
        similarity = (unit[used] @ unit.T)[:, :, None]
        kernels = torch.exp(-((similarity - self.mu) ** 2) / (2 * self.sigma**2))
        return (D @ kernels.transpose(0, 1).flatten(1)).view(len(D), len(used), len(self.mu)).transpose(0, 1)

    def forward(self, queries: Texts, documents: Texts) -> Float[Tensor, "q n"]:
        """Return the scores. TypeError, ValueError: no texts."""
        check_texts("queries", queries)
        check_texts("documents", documents)
        Q, D = (count_words(texts, self.words).float() for texts in (queries, documents))
        used = Q.sum(0).nonzero()[:, 0]
        matches = (self.soft_counts(used, D).clamp_min(1e-10).log() / 100) @ self.weights
        return Q[:, used] @ matches


def train_in_batches(
    model: nn.Module,
    queries: Texts,
    documents: Texts,
    *,
    steps: int,
    lr: float,
    generator: torch.Generator,
    batch: int = 128,
    temperature: float = 0.1,
) -> nn.Module:
    """Train a ranker on pairs (query i, document i) by Adam, with cross-entropy over the documents of a batch.

    Args:
        model: called with queries and documents; returns (q, n).
        queries: one for each document.
        documents: the right answers.
        steps: of Adam, >= 0; the rate falls in a line to zero.
        lr: the first rate, > 0.
        generator: draws the batches, with replacement.
        batch: pairs in a batch, >= 2.
        temperature: what divides the scores, > 0.

    Returns:
        The model, in eval mode.

    Raises:
        TypeError, ValueError: an option out of range, or another number of documents than queries.
    """
    check_integer("steps", steps, low=0)
    check_integer("batch", batch, low=2)
    check_number("lr", lr, low=0, open_low=True)
    check_number("temperature", temperature, low=0, open_low=True)
    if len(queries) != len(documents):
        raise ValueError(f"documents: got {len(documents)}, wanted one for each of {len(queries)} queries")
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    right = torch.arange(batch)
    model.train()
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(queries), (batch,), generator=generator).tolist()
        scores = model([queries[i] for i in rows], [documents[i] for i in rows]) / temperature
        adam.zero_grad()
        F.cross_entropy(scores, right).backward()
        adam.step()
    return model.eval()
