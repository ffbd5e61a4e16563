"""Rankers of verses at full size: MiniLM as it is, fine-tuned, with LoRA, and trained on typos (one GPU, minutes).

    python tests/benchmarks/bench_ranking_robustness.py --out book/results/ranking_robustness_scale.json

All verses of Law and History are searched, and all of Gospels and Letters as the other corpus; queries are the last six
words of the old wording. Every tenth verse is a test query, every twentieth a development query; the rest trains.
"""

from functools import cache
from typing import Any

import torch
from common import Runs, arguments, milliseconds, peak_mib, reset_peak
from ranking_tasks import drops, effectiveness, summary
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab.beds import VerseSearch, last_words, verse_search
from lowrank_ref.lab.models import embed_sentences, mean_pool, minilm, tokenize_sentences
from lowrank_ref.robustness import BM25, WordIndex, noisy_letters, with_typo, without_word

RATES = {"MiniLM": (0.0,), "BM25": (0.9,), "fine-tuned": (1e-5, 3e-5, 1e-4), "LoRA": (3e-4, 1e-3, 3e-3)}
RATES["fine-tuned on typos"] = RATES["fine-tuned"]


@cache
def corpora(tiny: bool) -> tuple[VerseSearch, VerseSearch]:
    """Return the corpus and the other one."""
    count = 80 if tiny else None
    return verse_search(("Law", "History"), count), verse_search(("Gospels", "Letters"), count)


def longest(query: list[str]) -> int:
    """Return the place of the first longest word."""
    return max(range(len(query)), key=lambda i: (len(query[i]), -i))


def tuned(name: str, lr: float, seed: int, tiny: bool, device: str) -> tuple[Any, Any]:
    """Return MiniLM after training with in-batch softmax, and its tokenizer."""
    model, tokenizer = minilm()
    g = torch.Generator().manual_seed(seed)
    if name == "LoRA":
        model = replace_linears(model, r"attention\.self\.(query|value)$", lambda m: LoRALinear(m, rank=8, generator=g))
    model.to(device)
    if name == "MiniLM":
        return model, tokenizer
    bed = corpora(tiny)[0]
    rows = [i for i in range(len(bed.documents)) if i % 10 and i % 20 != 5]
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    steps, batch = (3, 8) if tiny else (1000, 128)
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * min((step + 1) / (steps // 10 + 1), (steps - step) / steps)
        drawn = [rows[i] for i in torch.randint(len(rows), (batch,), generator=g).tolist()]
        queries = [last_words(bed.wordings[i]) for i in drawn]
        if "typos" in name:  # every second query
            queries = [with_typo(q, longest(q), g) if i % 2 else q for i, q in enumerate(queries)]
        vectors = []
        for texts in (queries, [bed.documents[i] for i in drawn]):
            ids, mask = (t.to(device) for t in tokenize_sentences(tokenizer, [" ".join(text) for text in texts]))
            with torch.autocast(device, torch.bfloat16):
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            vectors.append(F.normalize(mean_pool(hidden.float(), mask), dim=1))
        adam.zero_grad()
        F.cross_entropy(vectors[0] @ vectors[1].T / 0.05, torch.arange(batch, device=device)).backward()
        adam.step()
    return model.eval(), tokenizer


def measured(name: str, lr: float, seed: int, tiny: bool, device: str) -> dict[str, float]:
    """Return MRR@10 of all sets, milliseconds a query and peak memory."""
    bed, other = corpora(tiny)
    reset_peak()
    if name == "BM25":
        rankers = [BM25(WordIndex(b.documents), k1=lr) for b in (bed, other)]
        score = [lambda q, r=r, b=b: r(q, b.documents) for r, b in zip(rankers, (bed, other))]
    else:
        model, tokenizer = tuned(name, lr, seed, tiny, device)

        def embed(texts: Any) -> torch.Tensor:
            return embed_sentences(model, tokenizer, [" ".join(text) for text in texts], batch=256)

        found = [embed(b.documents) for b in (bed, other)]
        score = [lambda q, d=d: (embed(q) @ d.T).cpu() for d in found]
    dev, test = range(5, len(bed.documents), 20), range(0, len(bed.documents), 10)
    g = torch.Generator().manual_seed(seed)
    queries = [last_words(bed.wordings[i]) for i in test]
    sets = {
        "typo": [with_typo(q, longest(q), g) for q in queries],
        "deleted": [without_word(q, longest(q)) for q in queries],
        "20 % of letters": [noisy_letters(q, 0.2, g) for q in queries],
        "whole verse": [bed.wordings[i] for i in test],
    }
    grades, scores = bed.grades(test), score[0](queries)
    values = {key: effectiveness("mrr", score[0](q), grades) for key, q in sets.items()}
    rows = range(0, len(other.documents), 10)
    new = score[1]([last_words(other.wordings[i]) for i in rows])
    values["other books"] = effectiveness("mrr", new, other.grades(rows))
    on_dev = effectiveness("mrr", score[0]([last_words(bed.wordings[i]) for i in dev]), bed.grades(dev))
    time = milliseconds(lambda: score[0](queries[:32]), repeats=2 if tiny else 10, warmup=1)["median_ms"] / 32
    numbers = {**summary(scores, grades, "mrr"), **drops(effectiveness("mrr", scores, grades), values)}
    return {**numbers, "dev": on_dev.mean().item(), "ms a query": round(time, 3), "MiB": round(peak_mib())}


def main() -> None:
    """Measure what is missing."""
    args = arguments(__doc__, ("verses",))
    setting = "All verses of Law and History, every tenth a query of its last six words in the old wording; MRR@10."
    runs = Runs(args.out, "verses", setting=setting, packages=("transformers",), seconds=args.seconds)
    for seed in range(1 if args.tiny else 3):
        for name, rates in RATES.items():
            for lr in rates[:1] if args.tiny else rates:
                row = {"method": name, "lr": lr, "seed": seed}
                runs.row(row, lambda n=name, x=lr, s=seed: measured(n, x, s, args.tiny, args.device))


if __name__ == "__main__":
    main()
