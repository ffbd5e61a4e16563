"""Five tests of rankers on a made-up language and on Bible verses (CPU).

    python tests/benchmarks/bench_ranking_robustness_small.py --out book/results/ranking_robustness_small.json

choice: settings of each ranker, on a language of its own. tasks: eight rankers, four controls and an oracle; a seed is
a language, a corpus, queries and a training. documents: task 3 against fresh documents of the same topics and words,
with rankers that count in the searched corpus and in the old one. verses: known-item search, a seed is a draw of
queries and a training. attacks: documents of the tasks, ten cases a seed; lifts: what any edit does, and an oracle.
"""

from functools import cache, partial
from typing import Any

import torch
from common import Runs, arguments
from ranking_tasks import attack, attacked_places, drops, effectiveness, fit_trees, lambda_mart, summary, targets

from lowrank_ref.lab.beds import (
    SearchQueries,
    SentenceVectors,
    last_words,
    synonym_language,
    verse_search,
)
from lowrank_ref.robustness import (
    BM25,
    KNRM,
    LSI,
    DualEncoder,
    QueryLikelihood,
    TripleShares,
    WordIndex,
    WordShares,
    misspelt,
    ndcg,
    noisy_letters,
    reordered,
    reworded,
    stuffed,
    train_in_batches,
    with_typo,
    without_word,
)
from lowrank_ref.robustness.query_edits import with_word

SEEDS, CHOICE = range(3), 100
A, B = (0, 1), (1, 2)
OLD, NEW = range(16), range(16, 24)
EDITS = 3

#: Ranker -> settings tried; the number is k1, mu, rank, rounds, or a learning rate.
GRIDS: dict[str, tuple[float, ...]] = {
    "BM25": (0.45, 0.9, 1.8, 3.6),
    "query likelihood": (20, 80, 320, 1280),
    "LSI": (64, 128, 256, 512),
    "LambdaMART": (20, 40, 80),
    "LambdaMART, per word": (20, 40, 80),
    "dual encoder": (0.001, 0.003, 0.01),
    "dual encoder, letters": (0.001, 0.003, 0.01),
    "KNRM": (0.001, 0.003, 0.01),
}
#: Two more languages, in tasks.
FIVE = ("BM25", "LambdaMART", "LambdaMART, per word", "dual encoder")
CONTROLS = ("dual encoder, twin", "dual encoder, A + B", "LSI, directions of the new corpus", "BM25, noisy", "oracle")
ATTACKED = ("BM25", "query likelihood", "LSI", "LambdaMART, per word", "dual encoder", "KNRM")
CASES, BUDGET = 10, 5
DOCUMENTS = (
    "BM25", "BM25, index of A", "query likelihood", "query likelihood, index of A", "LSI",
    "LSI, directions of the new corpus", "LSI, no projection", "LambdaMART, per word", "dual encoder",
    "dual encoder, letters", "KNRM", "dual encoder, A + B", "dual encoder, A + other B", "oracle",
)  # fmt: skip
LIFTED = ("LSI", "dual encoder", "dual encoder, letters", "KNRM", "oracle")


class Bed:
    """A language with corpora, queries, and the rankers that were trained in it."""

    def __init__(self, seed: int, tiny: bool) -> None:
        few, some, many = (60, 20, 80) if tiny else (800, 100, 3000)
        self.seed, self.tiny, L = seed, tiny, synonym_language(seed)
        self.language = L
        where = {"A": (OLD, A), "B": (NEW, B), "new topics": (NEW, A), "new words": (OLD, B),
                 "new documents": (OLD, A), "other B": (NEW, B), "strange": (OLD, (2,))}  # fmt: skip
        self.corpora = {
            name: L.corpus(10 * seed + i, few if name == "A" else few * 2 // 3, *what)
            for i, (name, what) in enumerate(where.items())
        }
        self.indexes = {name: WordIndex(corpus.documents) for name, corpus in self.corpora.items()}
        self.index, self.documents = self.indexes["A"], self.corpora["A"].documents
        draw = partial(L.queries, corpus=self.corpora["A"], which=A)
        self.train, self.dev = draw(100 + seed, count=many), draw(200 + seed, count=20 if tiny else 200)
        self.test = draw(300 + seed, count=some)
        self.sets: dict[str, tuple[str, SearchQueries]] = {
            "short": ("A", draw(400 + seed, count=some, size=1)),
            "long": ("A", draw(500 + seed, count=some, size=5, fillers=6)),
        }
        for i, name in enumerate(("B", "new topics", "new words")):
            self.sets[name] = (name, L.queries(600 + 10 * i + seed, self.corpora[name], some, where[name][1]))
        self.fresh = {name: self.sets[name] for name in ("new topics", "new words", "B")}
        for i, name in enumerate(("new documents", "strange")):
            self.fresh[name] = (name, L.queries(800 + 10 * i + seed, self.corpora[name], some, where[name][1]))
        self.train_b = {n: L.queries(700 + seed, self.corpora[n], many // 2, B) for n in ("B", "other B")}
        self.edits = self._edited()

    def _edited(self) -> dict[str, list[list[list[str]]]]:
        """Attacks on the test queries, the same for all rankers: name -> edits -> queries."""
        g = torch.Generator().manual_seed(self.seed)
        words, L = self.test.words, self.language
        places = [[int(torch.randint(len(q), (1,), generator=g)) for q in words] for _ in range(EDITS)]
        filled = [with_word(q, L.empty[i % len(L.empty)], g) for i, q in enumerate(words)]
        empty = set(L.empty)
        return {
            "typo": [[with_typo(q, p, g) for q, p in zip(words, row)] for row in places],
            "deleted": [[without_word(q, p) for q, p in zip(words, row)] for row in places],
            "5 % of letters": [[noisy_letters(q, 0.05, g) for q in words]],
            "20 % of letters": [[noisy_letters(q, 0.2, g) for q in words]],
            "other words": [[reworded(q, L.others(A), g) for q in words]],
            "reordered": [[reordered(q, g) for q in words]],
            "filler": [filled],
            "typo in filler": [[[misspelt(w, g) if w in empty else w for w in q] for q in filled]],
        }

    @cache  # noqa: B019
    @torch.enable_grad()
    def trained(self, name: str, setting: float) -> Any:
        """What training gives: a model, trees, or None."""
        g = torch.Generator().manual_seed(1000 + self.seed + 500 * ("twin" in name))
        steps = 5 if self.tiny else 300
        words = self.index.words
        pairs = list(zip(self.train.words, (self.documents[i] for i in self.train.source)))
        if "A + " in name:
            more = name.partition("A + ")[2]
            there, asked = self.corpora[more].documents, self.train_b[more]
            words = WordIndex([*self.documents, *there]).words
            pairs = pairs[len(pairs) // 2 :] + list(zip(asked.words, (there[i] for i in asked.source)))
        fit = partial(train_in_batches, queries=[q for q, _ in pairs], documents=[d for _, d in pairs], generator=g)
        if name.startswith("dual"):
            shares = TripleShares(self.documents) if "letters" in name else WordShares(words)
            return fit(DualEncoder(shares, shares.size, generator=g), steps=steps, lr=setting)
        if name == "KNRM":
            model = KNRM(words, 32, generator=g)
            return fit(model, steps=steps * 2 // 3, lr=setting, batch=64, temperature=0.01)
        few = slice(0, 20 if self.tiny else 250)
        per_word = "per word" in name
        return fit_trees(
            self.index, self.train.words[few], self.documents, self.train.grades[few], self.seed, mu=MU,
            per_word=per_word, rounds=int(setting),
        )  # fmt: skip

    def ranker(self, name: str, setting: float, corpus: str = "A") -> Any:
        """The ranker as it searches a corpus: what only counts is counted there, what was trained stays."""
        index = self.indexes["A" if "index of A" in name else corpus]
        if name == "oracle":
            return self.oracle(corpus)
        if name.startswith("BM25"):
            return BM25(index, k1=setting)
        if name.startswith("query likelihood"):
            return QueryLikelihood(index, setting)
        if name == "LSI, no projection":
            return LSI(self.index, None)
        if name.startswith("LSI"):
            return self.lsi(int(setting), corpus if "new corpus" in name else "A")
        if name.startswith("LambdaMART"):
            return lambda_mart(index, self.trained(name, setting), mu=MU, per_word="per word" in name)
        return self.trained(name, setting)

    @cache  # noqa: B019
    def lsi(self, rank: int, corpus: str) -> LSI:
        """LSI of a corpus."""
        index = self.indexes[corpus]
        return LSI(index, min(rank, *index.counts.shape))

    def oracle(self, corpus: str) -> Any:
        """BM25 on concepts, without words that say nothing: what a perfect knowledge of synonyms gives."""
        concept = self.language.concept_of()

        def named(texts: Any) -> list[list[str]]:
            return [[str(concept[w]) for w in text if w in concept] for text in texts]

        ranker = BM25(WordIndex(named(self.corpora[corpus].documents)))
        return lambda queries, documents: ranker(named(queries), named(documents))


MU = 40.0


@torch.no_grad()
def scored(bed: Bed, name: str, setting: float, queries: Any, corpus: str = "A", noise: int = 0) -> torch.Tensor:
    """Return scores; the noisy arm gets normal noise of a third of the scores' standard deviation."""
    scores = bed.ranker(name, setting, corpus)(queries, bed.corpora[corpus].documents)
    if "noisy" in name:
        g = torch.Generator().manual_seed(noise)
        scores = scores + scores.std() / 3 * torch.randn(scores.shape, generator=g, dtype=scores.dtype)
    return scores


def tasks(bed: Bed, name: str, setting: float) -> dict[str, float]:
    """All numbers of a ranker but those of attacks on documents."""
    scores = scored(bed, name, setting, bed.test.words)
    old = ndcg(bed.test.grades, scores)
    sets = {
        key: ndcg(queries.grades, scored(bed, name, setting, queries.words, corpus, 1))
        for key, (corpus, queries) in bed.sets.items()
    }
    for key, edits in bed.edits.items():
        values = [ndcg(bed.test.grades, scored(bed, name, setting, q, noise=2 + i)) for i, q in enumerate(edits)]
        sets[key] = torch.stack(values) if len(values) > 1 else values[0]
    found = {**summary(scores, bed.test.grades, "ndcg"), **drops(old, sets)}
    found["DR typo in filler"] = round(found["typo in filler"] / found["filler"] - 1, 5)
    found["beyond deletion"] = round(found["DR typo"] - found["DR deleted"], 5)
    return found


def documents(bed: Bed, name: str, setting: float) -> dict[str, float]:
    """Task 3: nDCG@10 and DR, of fresh documents against those of training, of other ones against the fresh ones."""
    old = ndcg(bed.test.grades, scored(bed, name, setting, bed.test.words))
    sets = {
        key: ndcg(queries.grades, scored(bed, name, setting, queries.words, corpus))
        for key, (corpus, queries) in bed.fresh.items()
    }
    base, found = sets.pop("new documents"), {"iid": round(old.mean().item(), 5)}
    found |= drops(old, {"new documents": base}) | drops(base, sets)
    unknown = torch.tensor([sum(w not in bed.index.words for w in q) for q in bed.fresh["new words"][1].words])
    for count in range(4):
        if bool((unknown == count).any()):
            found[f"{count} unknown"] = round(sets["new words"][unknown == count].mean().item(), 5)
            found[f"queries with {count} unknown"] = int((unknown == count).sum())
    return found


@torch.no_grad()
def places_of(bed: Bed, name: str, setting: float, writes: Any) -> dict[str, Any]:
    """Places of attacked documents for 0 to 5 words, by what may be written: writes(query's number) -> words."""
    ranker, scores, found = bed.ranker(name, setting), scored(bed, name, setting, bed.test.words), {}
    cases = 3 if bed.tiny else CASES
    for row in range(cases):
        for key, words in writes(row).items():
            grades = bed.test.grades[row]
            places = attack(ranker, bed.test.words[row], bed.documents, scores[row], grades, list(words), BUDGET)
            found.setdefault(key, []).append(places)
    return {
        f"{key}, {k} words": sum(case[k] <= 10 for case in cases) for key, cases in found.items() for k in (0, 1, 3, 5)
    } | {"places": found, "cases": cases}


def of_other_concepts(bed: Bed, row: int) -> list[str]:
    """Return the words of A but for those of the query's concepts."""
    concept = bed.language.concept_of()
    return [w for w in sorted(bed.index.words) if concept.get(w) not in bed.test.concepts[row]]


def attacks(bed: Bed, name: str, setting: float) -> dict[str, Any]:
    """Five sets of words that an attacker may write."""
    g = torch.Generator().manual_seed(bed.seed)

    def writes(row: int) -> dict[str, list[str]]:
        query, far = bed.test.words[row], of_other_concepts(bed, row)
        near = [w for c in bed.test.concepts[row] for w in bed.language.synonyms[c][:2] if w not in query]
        drawn = [far[i] for i in torch.randint(len(far), (10,), generator=g).tolist()]
        return {"query words": query, "synonyms": near, "any word": sorted(bed.index.words), "other concepts": far,
                "random words": drawn}  # fmt: skip

    return places_of(bed, name, setting, writes)


def lifts(bed: Bed, name: str, setting: float) -> dict[str, Any]:
    """Words of the query, of other concepts, and words that say nothing: what it is worth to take a word out."""
    return places_of(bed, name, setting, lambda row: {
        "query words": bed.test.words[row], "other concepts": of_other_concepts(bed, row),
        "words that say nothing": bed.language.empty})  # fmt: skip


# --- verses

GRIDS_R: dict[str, tuple[float, ...]] = {
    "BM25": (0.45, 0.9, 1.8),
    "query likelihood": (100, 400, 1600),
    "LSI": (128, 256, 512),
    "LambdaMART, per word": (20, 40),
    "dual encoder": (0.001, 0.003, 0.01),
    "MiniLM": (0.0,),
    "MiniLM, head": (0.001, 0.003, 0.01),
}


@cache
def vectors() -> SentenceVectors:
    """Return MiniLM's vectors, shared by all runs."""
    return SentenceVectors()


@cache
def verses(tiny: bool) -> dict[str, Any]:
    """Return the verses to find, others of the same kind to train on, and those of other books."""
    whole = verse_search(("Law", "History"))
    n, last = (60, 200) if tiny else (400, 3400)
    other = verse_search(("Gospels", "Letters"), n)
    return {"documents": whole.documents[:n], "wordings": whole.wordings[:n], "other": other,
            "train": (whole.wordings[n:last], whole.documents[n:last])}  # fmt: skip


class VerseBed:
    """Queries of one draw, and rankers."""

    def __init__(self, seed: int, tiny: bool) -> None:
        self.seed, self.tiny, data = seed, tiny, verses(tiny)
        self.documents, self.other = data["documents"], data["other"]
        n, few = len(self.documents), 20 if tiny else 100
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        self.rows, self.dev_rows, self.train_rows = order[:few], order[few : few * 3 // 2], order[few * 3 // 2 :]
        self.wordings = data["wordings"]
        self.index, self.other_index = WordIndex(self.documents), WordIndex(self.other.documents)
        self.eye = torch.eye(n, dtype=torch.long)
        g = torch.Generator().manual_seed(seed)
        queries = [last_words(self.wordings[i]) for i in self.rows]
        self.queries = queries
        drawn = [torch.randperm(len(self.wordings[i]), generator=g)[:4].tolist() for i in self.rows]
        longest = [max(range(6), key=lambda p, q=q: (len(q[p]), -p)) for q in queries]
        shortest = [min(range(6), key=lambda p, q=q: (len(q[p]) < 2, len(q[p]), p)) for q in queries]
        self.others = order[:few]
        self.sets = {
            "four random words": [[[self.wordings[i][p] for p in ps] for i, ps in zip(self.rows, drawn)]],
            "whole verse": [[self.wordings[i] for i in self.rows]],
            "typo": [[with_typo(q, p, g, kind) for q, p in zip(queries, longest)] for kind in ("swap", None)],
            "deleted": [[without_word(q, p) for q, p in zip(queries, longest)]],
            "typo in a short word": [[with_typo(q, p, g, "replace") for q, p in zip(queries, shortest)]],
            "20 % of letters": [[noisy_letters(q, 0.2, g) for q in queries]],
            "reordered": [[reordered(q, g) for q in queries]],
        }

    @cache  # noqa: B019
    @torch.enable_grad()
    def trained(self, name: str, setting: float) -> Any:
        """What training gives."""
        g = torch.Generator().manual_seed(1000 + self.seed)
        steps = 5 if self.tiny else 300
        asked = [last_words(self.wordings[i]) for i in self.train_rows]
        right = [self.documents[i] for i in self.train_rows]
        if name.startswith("Lambda"):
            few = slice(0, 250)
            return fit_trees(self.index, asked[few], self.documents, self.eye[self.train_rows[few]], self.seed,
                             mu=400.0, per_word=True, rounds=int(setting))  # fmt: skip
        if name == "MiniLM, head":
            model = DualEncoder(vectors(), SentenceVectors.size, generator=g)
            return train_in_batches(model, asked, right, steps=steps, lr=setting, generator=g)
        wordings, documents = verses(self.tiny)["train"]
        known = sorted({word for text in (*documents, *wordings) for word in text})
        shares = WordShares({word: i for i, word in enumerate(known)})
        pairs = [*[last_words(w) for w in wordings], *asked], [*documents, *right]
        return train_in_batches(
            DualEncoder(shares, shares.size, generator=g), *pairs, steps=steps, lr=setting, generator=g
        )

    def ranker(self, name: str, setting: float, new: bool = False) -> Any:
        """The ranker as it searches one of the two corpora."""
        index = self.other_index if new else self.index
        if name == "BM25":
            return BM25(index, k1=setting)
        if name == "query likelihood":
            return QueryLikelihood(index, setting)
        if name == "LSI":
            return self.lsi(int(setting))
        if name.startswith("Lambda"):
            return lambda_mart(index, self.trained(name, setting), mu=400.0, per_word=True)
        return vectors().scores if name == "MiniLM" else self.trained(name, setting)

    @cache  # noqa: B019
    def lsi(self, rank: int) -> LSI:
        """LSI of the verses."""
        return LSI(self.index, min(rank, *self.index.counts.shape))


@torch.no_grad()
def verse_scores(bed: VerseBed, name: str, setting: float, queries: Any) -> torch.Tensor:
    """Return scores of the verses."""
    return bed.ranker(name, setting)(queries, bed.documents)


@torch.no_grad()
def verse_tasks(bed: VerseBed, name: str, setting: float) -> dict[str, Any]:
    """All numbers of a ranker on verses: MRR@10, and stuffing."""
    grades = bed.eye[bed.rows]
    scores = verse_scores(bed, name, setting, bed.queries)
    old, sets = effectiveness("mrr", scores, grades), {}
    for key, edits in bed.sets.items():
        values = [effectiveness("mrr", verse_scores(bed, name, setting, q), grades) for q in edits]
        sets[key] = torch.stack(values) if len(values) > 1 else values[0]
    asked = [last_words(bed.other.wordings[i]) for i in bed.others]
    new = bed.ranker(name, setting, new=True)(asked, bed.other.documents)
    sets["other books"] = effectiveness("mrr", new, bed.other.grades(bed.others))
    found: dict[str, Any] = {**summary(scores, grades, "mrr"), **drops(old, sets)}
    found["beyond deletion"] = round(found["DR typo"] - found["DR deleted"], 5)
    ranker, places = bed.ranker(name, setting), []
    for row, query in enumerate(bed.queries[: 3 if bed.tiny else 25]):
        target = targets(scores[row], grades[row])
        words = sorted(
            query, key=lambda w: -float(bed.index.idf[bed.index.words[w]]) if w in bed.index.words else -99.0
        )
        versions = [stuffed(bed.documents[target], words, k) for k in (1, 3, 5)]
        places.append(attacked_places(ranker, query, bed.documents, scores[row], target, versions))
    for i, k in enumerate((1, 3, 5)):
        found[f"stuffed, {k} words"] = sum(case[i] <= 10 for case in places)
    return found | {"places": places, "cases": len(places)}


# --- all


def best(rows: list[dict[str, Any]], bed: str, name: str) -> float:
    """Return the setting of a ranker with the highest number on development queries."""
    if name not in {**GRIDS, **GRIDS_R}:  # a control takes the setting of its ranker
        name = name.partition(",")[0]
    mine = [row for row in rows if row["bed"] == bed and row["method"] == name]
    return float(max(mine, key=lambda row: (row["dev"], -row["lr"]))["lr"]) if mine else 0.0


@cache
def bed_of(kind: str, seed: int, tiny: bool) -> Any:
    """Return a bed, drawn once."""
    return Bed(seed, tiny) if kind == "language" else VerseBed(seed, tiny)


def choose(runs: Runs, tiny: bool) -> None:
    """Measure all settings on development queries."""
    for name, grid in GRIDS.items():
        for setting in grid:

            def on_dev(name: str = name, setting: float = setting) -> dict[str, float]:
                bed = bed_of("language", CHOICE, tiny)
                scores = scored(bed, name, setting, bed.dev.words)
                return {"dev": round(ndcg(bed.dev.grades, scores).mean().item(), 5)}

            runs.row({"bed": "language", "method": name, "lr": setting}, on_dev)
    for name, grid in GRIDS_R.items():
        for setting in grid:

            def on_verses(name: str = name, setting: float = setting) -> dict[str, float]:
                bed = bed_of("verses", CHOICE, tiny)
                asked = [last_words(bed.wordings[i]) for i in bed.dev_rows]
                scores = verse_scores(bed, name, setting, asked)
                return {"dev": round(effectiveness("mrr", scores, bed.eye[bed.dev_rows]).mean().item(), 5)}

            runs.row({"bed": "verses", "method": name, "lr": setting}, on_verses)


def main() -> None:
    """Measure what is missing."""
    args = arguments(__doc__, ("choice", "documents", "lifts", "tasks", "attacks", "verses"))
    torch.set_num_threads(1)
    options: dict[str, Any] = {"packages": ("scikit-learn",), "seconds": args.seconds}
    choice = Runs(
        args.out,
        "choice",
        setting="Settings tried on a draw of its own: 200 queries in 1,500 documents, 50 in 400 verses.",
        **options,
    )
    if "choice" in args.part:
        choose(choice, args.tiny)
    chosen = choice.rows
    say = "800 documents of 40 words, 3,000 training queries (250 for LambdaMART), 100 test queries; nDCG@10."
    measure = {"tasks": ("language", (*GRIDS, *CONTROLS), tasks, "A made-up language: " + say)}
    say = "800 documents of A, 533 of others; 3,000 training queries, 100 of each test; nDCG@10."
    measure["documents"] = ("language", DOCUMENTS, documents, say)
    say = "10 documents of place 100 a seed; successes of top 10; words that say nothing, and an oracle."
    measure["lifts"] = ("language", LIFTED, lifts, say)
    measure["verses"] = ("verses", tuple(GRIDS_R), verse_tasks, "400 verses, 100 queries of six words; MRR@10.")
    measure["attacks"] = ("language", ATTACKED, attacks, f"{CASES} documents of place 100 a seed; successes of top 10.")
    runs = {part: Runs(args.out, part, setting=measure[part][3], **options) for part in args.part if part in measure}
    for seed in range(1 if args.tiny else 5):
        for part in runs:
            kind, names, numbers, _ = measure[part]
            for name in names:
                if seed not in SEEDS and (part != "tasks" or name not in FIVE):
                    continue
                lr = best(chosen, kind, name)
                run = partial(one, numbers, kind, name, lr, seed, args.tiny)
                runs[part].row({"method": name, "lr": lr, "seed": seed}, run)
        bed_of.cache_clear()


def one(numbers: Any, kind: str, name: str, lr: float, seed: int, tiny: bool) -> dict[str, Any]:
    """Measure one row."""
    return numbers(bed_of(kind, seed, tiny), name, lr)


if __name__ == "__main__":
    main()
