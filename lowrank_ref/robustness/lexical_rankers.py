r"""Rankers that count words: BM25, query likelihood, and latent semantic indexing (LSI).

A text is a list of words. A ranker is called with queries and documents and returns scores (q, n); what it knows of a
corpus (which words there are, how rare they are, the mean length) was counted once, in a `WordIndex`, and stays as it
was when a document is edited. Words that the index has not seen count for the length and for nothing else.

    BM25   Σ_t idf_t · tf (k₁ + 1) / (tf + k₁ (1 - b + b |d| / mean length)),  idf = ln(1 + (N - df + ½)/(df + ½))
    QL     Σ_t ln((tf + μ P(t|C)) / (|d| + μ)), Dirichlet smoothing, P the share of t among all words of the corpus
    LSI    cosine of V_rᵀ(tf · idf) of query and document, V_r the top right singular vectors of the corpus (N, V)

The sums run over the words of the query, a repeated word twice. Robertson and Zaragoza, 2009; Zhai and Lafferty, 2001;
Deerwester and others, 1990. BM25's k₁ = 0.9, b = 0.4 are remembered as the defaults of Anserini. Scores are float64.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.core.checks import check_number
from lowrank_ref.core.linalg import gram_basis

#: Lists of words.
Texts = Sequence[Sequence[str]]
#: Called with queries and documents; returns one score for each pair, (q, n).
Ranker = Callable[[Texts, Texts], Tensor]


def check_texts(name: str, texts: Texts) -> None:
    """Require lists of words.

    Raises:
        TypeError: a text that is a string: it would be read letter by letter.
        ValueError: no text.
    """
    if isinstance(texts, str) or any(isinstance(text, str) for text in texts):
        raise TypeError(f"{name}: got a string, wanted a list of words for each text, such as text.split()")
    if not len(texts):
        raise ValueError(f"{name}: got none, wanted at least one text")


def count_words(texts: Texts, words: dict[str, int]) -> Float[Tensor, "n V"]:
    """Return how often each known word stands in each text, in float64; other words are passed over."""
    rows, columns = [], []
    for row, text in enumerate(texts):
        known = [words[word] for word in text if word in words]
        rows += [row] * len(known)
        columns += known
    flat = torch.tensor(rows, dtype=torch.long) * len(words) + torch.tensor(columns, dtype=torch.long)
    return torch.bincount(flat, minlength=len(texts) * len(words)).view(len(texts), len(words)).double()


def text_lengths(texts: Texts) -> Float[Tensor, " n"]:
    """Return how many words each text has, unknown ones too."""
    return torch.tensor([len(text) for text in texts], dtype=torch.float64)


class WordIndex:
    """What a corpus says about words, counted once.

    Args:
        documents: lists of words.

    Attributes:
        words: word -> its number, in the order of the alphabet.
        idf: (V) ln(1 + (N - df + ½)/(df + ½)), above 0.
        shares: (V) P(t|C), which sum to 1.
        mean_length: words a document.
        counts: (N, V) of the corpus.

    Raises:
        TypeError, ValueError: no document, no word, or a string in place of a list.

    Example:
        >>> from lowrank_ref.robustness import WordIndex
        >>> index = WordIndex([["a", "b", "a"], ["b"]])
        >>> index.count([["a", "a", "x"]]).tolist(), index.mean_length
        ([[2.0, 0.0]], 2.0)
    """

    def __init__(self, documents: Texts) -> None:
        check_texts("documents", documents)
        self.words = {word: i for i, word in enumerate(sorted({word for text in documents for word in text}))}
        if not self.words:
            raise ValueError("documents: got no word, wanted at least one")
        self.counts = self.count(documents)
        df = (self.counts > 0).double().sum(0)
        self.idf = torch.log1p((len(documents) - df + 0.5) / (df + 0.5))
        self.shares = self.counts.sum(0) / self.counts.sum()
        self.mean_length = float(text_lengths(documents).mean())

    def count(self, texts: Texts) -> Float[Tensor, "n V"]:
        """Count known words. TypeError, ValueError: no texts."""
        check_texts("texts", texts)
        return count_words(texts, self.words)


def bm25_weights(
    counts: Float[Tensor, "n V"],
    lengths: Float[Tensor, " n"],
    idf: Float[Tensor, " V"],
    mean_length: float,
    k1: float = 0.9,
    b: float = 0.4,
) -> Float[Tensor, "n V"]:
    """Return what each word would add to the score of each document, 0 for words that do not stand in it."""
    K = k1 * (1 - b + b * lengths / mean_length)[:, None]
    return idf * counts * (k1 + 1) / (counts + K).where(counts > 0, 1.0)


def dirichlet_logs(
    counts: Float[Tensor, "n V"], lengths: Float[Tensor, " n"], shares: Float[Tensor, " V"], mu: float
) -> Float[Tensor, "n V"]:
    """Return `ln((tf + μ P(t|C)) / (|d| + μ))` of each word, the log of its smoothed share of the document."""
    return ((counts + mu * shares) / (lengths + mu)[:, None]).log()


class BM25:
    """Scores by BM25.

    Args:
        index: of the corpus that is searched.
        k1: how slowly a repeated word saturates, >= 0; at 0 it counts once.
        b: how much long documents pay, in [0, 1].

    Raises:
        TypeError, ValueError: k1 or b out of range; at the call, no texts.

    Example:
        >>> from lowrank_ref.robustness import BM25, WordIndex
        >>> ranker = BM25(WordIndex([["red", "fish"], ["blue", "fish"]]))
        >>> ranker([["red"]], [["red", "fish"], ["blue", "fish"]]).round(decimals=3).tolist()
        [[0.693, 0.0]]
    """

    def __init__(self, index: WordIndex, k1: float = 0.9, b: float = 0.4) -> None:
        check_number("k1", k1, low=0)
        check_number("b", b, low=0, high=1)
        self.index, self.k1, self.b = index, k1, b

    def __call__(self, queries: Texts, documents: Texts) -> Float[Tensor, "q n"]:
        """Return the scores."""
        index = self.index
        counts, lengths = index.count(documents), text_lengths(documents)
        weights = bm25_weights(counts, lengths, index.idf, index.mean_length, self.k1, self.b)
        return index.count(queries) @ weights.T


class QueryLikelihood:
    """Scores by the log-likelihood of the query under each document's smoothed shares of words.

    Args:
        index: of the corpus that is searched.
        mu: μ > 0, in words: how many words of the whole corpus are mixed into each document.

    Raises:
        TypeError, ValueError: μ out of range; at the call, no texts.

    Example:
        >>> from lowrank_ref.robustness import QueryLikelihood, WordIndex
        >>> ranker = QueryLikelihood(WordIndex([["red", "fish"], ["blue", "fish"]]), mu=2.0)
        >>> ranker([["red"]], [["red", "fish"], ["blue", "fish"]]).exp().round(decimals=3).tolist()
        [[0.375, 0.125]]
    """

    def __init__(self, index: WordIndex, mu: float = 1000.0) -> None:
        check_number("mu", mu, low=0, open_low=True)
        self.index, self.mu = index, mu

    def __call__(self, queries: Texts, documents: Texts) -> Float[Tensor, "q n"]:
        """Return the scores."""
        counts, lengths = self.index.count(documents), text_lengths(documents)
        return self.index.count(queries) @ dirichlet_logs(counts, lengths, self.index.shares, self.mu).T


class LSI:
    """Scores by the cosine between tf-idf vectors, projected onto the r strongest directions of a corpus.

    What a text has outside these directions counts for nothing. A text that has nothing inside scores 0.

    Args:
        index: of the corpus that gives the directions and the idf.
        rank: r, 1 to min(N, V); None projects nothing: the plain cosine of tf-idf vectors.

    Attributes:
        basis: V_r (V, r), or None.

    Raises:
        TypeError, ValueError: a rank out of range; at the call, no texts.

    Example:
        >>> from lowrank_ref.robustness import LSI, WordIndex
        >>> documents = [["red", "fish"], ["blue", "fish"], ["blue", "sea"]]
        >>> LSI(WordIndex(documents), rank=2)([["red"]], documents).argmax().item()
        0
    """

    def __init__(self, index: WordIndex, rank: int | None = 64) -> None:
        self.index = index
        self.basis = None if rank is None else gram_basis((index.counts * index.idf).T, rank)

    def encode(self, texts: Texts) -> Float[Tensor, "n r"]:
        """Return the unit vectors of texts."""
        X = self.index.count(texts) * self.index.idf
        return F.normalize(X if self.basis is None else X @ self.basis, dim=1)

    def __call__(self, queries: Texts, documents: Texts) -> Float[Tensor, "q n"]:
        """Return the scores, in [-1, 1]."""
        return self.encode(queries) @ self.encode(documents).T
