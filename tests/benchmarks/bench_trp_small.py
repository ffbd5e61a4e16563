"""TRP against its rivals on real digits: a small convolutional network (CPU).

    python tests/benchmarks/bench_trp_small.py --part trp --out book/results/trp_small.json --device cpu
    python tests/benchmarks/bench_trp_small.py --part rivals --out book/results/trp_small.json --device cpu

trp: trained rank pruning with other energies, periods, nuclear terms, schemes, labels. rivals: all that has to reach
the multiplications of an arm of TRP; it reads that arm's ranks, seed by seed at its best rate, so run trp first, whole.

The network is conv 1-12, 12-24, pool, 24-24, mean, head, batch norm after each convolution; the last two convolutions
are decomposed. Every arm has six rates; the loss on 297 validation images chooses, 500 test images report, with the
running statistics of batch norm and with new ones. The numbers of one row may belong to several arms of the chapter,
such as a dense network and what is left of it after each kind of cut; each has a validation loss of its own.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from common import Runs, arguments
from rank_pruning import FixedRanks, Ranks, best_ranks, energy_ranks, guarded, split, thin, with_new_statistics
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.compression import (
    JointRankSampler,
    RankSampler,
    RankShrinker,
    TrainedRankPruning,
    decompose,
    deployed,
    maestro_layers,
    matrix_nuclear_norm,
    ranks_within,
    resorted,
    split_macs,
    strengths,
    to_matrix,
)
from lowrank_ref.compression import penalty as group_lasso
from lowrank_ref.lab.data import array_batches, digits

RATES = (0.02, 0.05, 0.12, 0.3, 0.7, 1.5)
#: The ranks that rivals get were taken at the best of these.
FIRST = RATES[:5]
STEPS, BATCH = 150, 100
#: path of a decomposed convolution -> places of its output
PLACES = {"3": 64, "7": 16}
#: multiplications of what is not decomposed, and of all
REST = 64 * 9 * 12 + 240
DENSE = REST + 64 * 24 * 108 + 16 * 24 * 216


@dataclass(frozen=True)
class TRP:
    """Options of one TRP arm; `nuclear` adds the norm in every step, `shuffled` learns permuted labels."""

    energy: float = 0.9
    every: int = 10
    penalty: float = 0.0
    scheme: str = "channel"
    decay: float = 0.0
    nuclear: float = 0.0
    shuffled: bool = False


BASE = TRP()
MAIN: dict[str, TRP] = {
    "TRP": BASE,
    "TRP, λ = 0.003": replace(BASE, penalty=3e-3),
    "TRP, spatial": replace(BASE, scheme="spatial"),
    "TRP, tight": replace(BASE, energy=0.8),
    "TRP, m = 5": replace(BASE, every=5),
    "TRP, m = 5, tight": replace(BASE, energy=0.8, every=5),
}
SWEEPS: dict[str, TRP] = {f"TRP, e = {e:g}": replace(BASE, energy=e) for e in (0.95, 0.98)}
SWEEPS |= {f"TRP, m = {m}": replace(BASE, every=m) for m in (1, 20, 50)}
SWEEPS |= {f"TRP, λ = {v:g}": replace(BASE, penalty=v) for v in (3e-4, 3e-2, 0.3)}
SWEEPS |= {f"TRP, nuclear in every step, λ = {v:g}": replace(BASE, nuclear=v) for v in (3e-4, 3e-3)}
SWEEPS |= {f"TRP, decay {v:g}": replace(BASE, decay=v) for v in (1e-3, 1e-2)}
SWEEPS |= {"TRP, decoupled": replace(BASE, scheme="decoupled"), "TRP, shuffled labels": replace(BASE, shuffled=True)}

#: Rivals. All get the ranks of "TRP", or of "TRP, spatial" or "TRP, tight" where the name ends so.
RIVALS = ("dense", "thin", "thin, half the ranks", "cut at 0", "cut at 0.2", "cut at 0.5", "cut at 0.8")
RIVALS += ("cut at 0.8, rate raised", "15 + 3 epochs", "TRP to 0.8, then factors", "fixed ranks, m = 10")
RIVALS += ("Maestro, λ = 0", "Maestro, λ = 0.0003", "Maestro, λ = 0.001", "Maestro, λ = 0.003", "jointly ordered")
RIVALS += tuple(f"{name}, tight" for name in ("thin", "cut at 0", "cut at 0.2", "cut at 0.5", "fixed ranks, m = 10"))
RIVALS += ("Maestro, λ = 0.001, tight",)
FEWER = ("fixed ranks, m = 1", "nuclear only, λ = 0.001", "nuclear only, λ = 0.01")


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Part -> pictures (n, 1, 8, 8) and labels."""
    d = digits()
    parts = {name: (getattr(d, f"x_{name}"), getattr(d, f"y_{name}")) for name in ("train", "valid", "test")}
    return {name: (x.view(-1, 1, 8, 8), y) for name, (x, y) in parts.items()}


def network(seed: int) -> nn.Sequential:
    """Draw the network."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    layers += [nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def falling(step: int) -> float:
    """A tenth of the rate from half of the steps on, a hundredth from four fifths on."""
    return 1.0 if step < STEPS // 2 else 0.1 if step < STEPS * 4 // 5 else 0.01


def raised(step: int, first: int = STEPS * 4 // 5, count: int = STEPS // 5) -> float:
    """Finish with a tenth of the rate, falling in a line to zero."""
    return falling(step) if step < first else 0.1 * (first + count - step) / count


def fit(
    model: nn.Module, lr: float, seed: int, *, first: int = 0, last: int = STEPS, decay: float = 0.0,
    rate: Callable[[int], float] = falling, term: Callable[[nn.Module], Tensor] | None = None,
    attach: Callable[[nn.Module, Any], Any] | None = None, shuffled: bool = False,
) -> nn.Module:  # fmt: skip
    """Steps first to last of SGD with momentum 0.9. What `attach` returns is detached before step 150."""
    x, y = data()["train"]
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))] if shuffled else y
    batch = array_batches(x, y, batch=BATCH, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    action = attach(model, optimizer) if attach is not None else None
    model.train()
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = lr * rate(step)
        if action is not None and step == STEPS - 1:
            action.detach()
        u, v = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(u), v)
        (loss if term is None else loss + term(model)).backward()
        optimizer.step()
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError("loss: got no finite number, wanted one")
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, name: str = "") -> dict[str, float]:
    """Loss on validation images, accuracy on test images."""
    (x, y), (u, v) = data()["valid"], data()["test"]
    found = {"valid": F.cross_entropy(model.eval()(x), y).item(), "accuracy": (model(u).argmax(1) == v).double().mean()}
    return {f"{name} {key}".strip(): round(float(value), 5) for key, value in found.items()}


def anew(model: nn.Module) -> nn.Module:
    """A copy with new statistics of batch norm, of the training images."""
    return with_new_statistics(model, data()["train"][0])


def both_statistics(model: nn.Module) -> dict[str, float]:
    """Loss and accuracy, as it is and with new statistics of batch norm."""
    return {**measured(model), **measured(anew(model), "new statistics")}


def macs(ranks: Ranks, scheme: str = "channel") -> int:
    """Multiplications a picture with these ranks."""
    shapes = {"3": (24, 12, 3, 3), "7": (24, 24, 3, 3)}
    return REST + sum(PLACES[path] * split_macs(shapes[path], rank, scheme) for path, rank in ranks.items())


@torch.no_grad()
def allotted(model: nn.Module, budget: float, scheme: str = "channel") -> Ranks:
    """Ranks within this many multiplications, by one threshold on singular values divided by their norm."""
    spectra = [torch.linalg.svdvals(to_matrix(model.get_submodule(path).weight, scheme)) for path in PLACES]
    costs = [float(macs({path: 1}, scheme) - REST) for path in PLACES]
    found = ranks_within([S / S.norm() for S in spectra], costs, budget - REST + 1e-6)
    return dict(zip(PLACES, found))


def run_trp(options: TRP, lr: float, seed: int) -> dict[str, Any]:
    """Train with truncations, cut once more, split."""
    model, first = network(seed), {}
    pruning = TrainedRankPruning(
        model, scheme=options.scheme, energy=options.energy, every=options.every, penalty=options.penalty
    )
    pruning.truncate()
    first.update(pruning.ranks)

    def term(model: nn.Module) -> Tensor:
        total = pruning.nuclear_term()
        if options.nuclear:
            norms = [matrix_nuclear_norm(model.get_submodule(path).weight, options.scheme) for path in PLACES]
            total = total + options.nuclear * torch.stack(norms).sum()
        return total

    # without a truncation after the last step: it is the split that cuts what up to m steps have added
    options_of_fit = {"decay": options.decay, "shuffled": options.shuffled}
    fit(model, lr, seed, term=term, attach=lambda _, optimizer: pruning.attach(optimizer), **options_of_fit)
    before = measured(model, "before")
    ranks = energy_ranks(model, tuple(PLACES), options.energy, options.scheme)
    small = split(model, ranks, options.scheme)
    cost = macs(ranks, options.scheme)
    return {
        **both_statistics(small), **before, **{f"rank {path}": rank for path, rank in ranks.items()}, "macs": cost,
        **{f"first rank {path}": rank for path, rank in first.items()}, **pair_of_last(pruning),
    }  # fmt: skip


def pair_of_last(pruning: TrainedRankPruning) -> Ranks:
    """Ranks of the last truncation in training."""
    return {f"last rank {path}": rank for path, rank in pruning.ranks.items()}


def maestro(penalty: float, joint: bool, ranks: Ranks, lr: float, seed: int) -> dict[str, Any]:
    """Train factors in order, cut to the multiplications by their strengths, and to the same ranks."""
    model: Any = decompose(network(seed), r"^(3|7)$")
    sampler = JointRankSampler if joint else RankSampler

    def attach(model: nn.Module, optimizer: Any) -> None:
        if penalty:
            RankShrinker(model, threshold=1e-2, every=10).attach(optimizer)
        sampler(model, generator=torch.Generator().manual_seed(seed)).attach(optimizer)

    fit(model, lr, seed, attach=attach, term=(lambda m: penalty * group_lasso(m)) if penalty else None)
    layers = dict(maestro_layers(model))
    scores = [strengths(*layer.kept()).detach() for layer in layers.values()]
    costs = [float(macs({path: 1}) - REST) for path in layers]
    own = ranks_within([s / s.norm() for s in scores], costs, macs(ranks) - REST + 1e-6)
    own = [min(rank, layer.rank) for rank, layer in zip(own, layers.values())]
    same = [min(ranks[path], layer.rank) for path, layer in layers.items()]
    found = {**measured(model, "whole")}
    for name, whole, cut in (("", model, own), ("same ranks", model, same), ("by SVD", resorted(model), same)):
        small = deployed(whole, cut)
        found |= measured(anew(small), name) | measured(small, f"{name} old statistics".strip())
    return found | {f"rank {path}": rank for path, rank in zip(layers, own)} | {"macs": macs(dict(zip(layers, own)))}


def dense(ranks: dict[str, Ranks], lr: float, seed: int) -> dict[str, Any]:
    """Train a dense network, and cut it in all ways."""
    model = fit(network(seed), lr, seed)
    found, own = both_statistics(model), allotted(model, macs(ranks[""]))
    cuts = {
        "cut": split(model, ranks[""]),
        "cut, own ranks": split(model, own),
        "cut, tight": split(model, ranks["tight"]),
    }
    cuts["cut, spatial"] = split(model, ranks["spatial"], "spatial")
    for name, small in cuts.items():
        found |= measured(small, name) | measured(anew(small), f"{name}, new statistics")
    for energy in (0.9, 0.95, 0.98):
        kept = energy_ranks(model, tuple(PLACES), energy)
        small = split(model, kept)
        found |= measured(small, f"cut at e = {energy:g}")
        found |= measured(anew(small), f"cut at e = {energy:g}, new statistics")
        found |= {f"rank {path} at e = {energy:g}": rank for path, rank in kept.items()}
        found |= {f"macs at e = {energy:g}": macs(kept)}
    return found | {f"own rank {path}": rank for path, rank in own.items()} | {"macs": DENSE}


def number(pattern: str, name: str, default: float) -> float:
    """The number in the name of an arm."""
    return float((re.findall(pattern + r"([\d.]+\d|\d)", name) or [default])[0])


def run_rival(name: str, sets: dict[str, Ranks], lr: float, seed: int) -> dict[str, Any]:
    """One row of a rival."""
    kind = next((k for k in ("spatial", "tight") if name.endswith(k)), "")
    scheme, ranks = "spatial" if kind == "spatial" else "channel", sets[kind]
    if name == "dense":
        return dense(sets, lr, seed)
    if name.startswith(("Maestro", "jointly")):
        return maestro(number("λ = ", name, 0), name.startswith("jointly"), ranks, lr, seed)
    if name.startswith(("nuclear only", "fixed ranks")):
        weight, every = number("λ = ", name, 0), int(number("m = ", name, 0))
        how: dict[str, Any] = {"attach": lambda m, o: FixedRanks(m, ranks, every, scheme).attach(o)}
        if weight:
            how = {"term": lambda m: weight * sum(matrix_nuclear_norm(m.get_submodule(path).weight) for path in PLACES)}
        model = fit(network(seed), lr, seed, **how)
        small = split(model, ranks, scheme)
        return {**measured(model, "before"), **both_statistics(small), "macs": macs(ranks, scheme)}
    if name.startswith("thin"):
        if "half" in name:
            ranks = {path: max(1, rank // 2) for path, rank in ranks.items()}
        model = thin(network(seed), ranks, scheme, 1000 + seed)
        return {**both_statistics(fit(model, lr, seed)), "macs": macs(ranks, scheme)}
    return cut_and_train(name, ranks, scheme, lr, seed)


def cut_and_train(name: str, ranks: Ranks, scheme: str, lr: float, seed: int) -> dict[str, Any]:
    """Train dense, or with TRP, up to a share of the steps; split; train the pairs for the rest."""
    model, pruning, rate, end = network(seed), [], falling, STEPS
    place = round(number("cut at ", name, 0.8) * STEPS)
    if name == "15 + 3 epochs":
        place, end, rate = STEPS, STEPS * 6 // 5, partial(raised, first=STEPS)
    elif name.endswith("rate raised"):
        rate = raised

    def attach(model: nn.Module, optimizer: Any) -> TrainedRankPruning:
        pruning.append(TrainedRankPruning(model, every=10).attach(optimizer))
        pruning[0].truncate()
        return pruning[0]

    if place:
        model = fit(model, lr, seed, last=place, rate=rate, attach=attach if name.startswith("TRP to") else None)
    if pruning:
        ranks = pruning[0].ranks  # its own, which may differ from those that 30 more steps would leave
    if name.endswith("own ranks"):
        ranks = allotted(model, macs(ranks))
    small = split(model, ranks, scheme)
    at_the_cut = {**measured(small, "at the cut"), **measured(anew(small), "at the cut, new statistics")}
    found = at_the_cut | both_statistics(fit(small, lr, seed, first=place, last=end, rate=rate))
    return found | {f"rank {path}": rank for path, rank in ranks.items()} | {"macs": macs(ranks, scheme)}


def main() -> None:
    """Run the parts asked for."""
    args = arguments(__doc__ or "", ("trp", "rivals"))
    torch.set_num_threads(1)
    sizes = "1,000 digits of 8x8 train, 297 validate, 500 test; conv 1-12-24, pool, conv 24-24, batch norm; "
    setting = sizes + f"{STEPS} steps of SGD with momentum 0.9 on {BATCH} images, rate times 0.1 at 50 and 80 %"
    for part in args.part:
        runs = Runs(args.out, part, setting=setting, packages=("scikit-learn",), seconds=args.seconds, dense_macs=DENSE)
        if part == "rivals":
            rows = Runs(args.out, "trp", setting=setting, seconds=args.seconds, dense_macs=DENSE).rows
            found = {kind: best_ranks(rows, f"TRP, {kind}".rstrip(", "), FIRST) for kind in ("", "spatial", "tight")}
            arms = {name: range(8 if name in RIVALS else 5) for name in (*RIVALS, *FEWER)}
        else:
            arms = {name: range(8 if name in MAIN else 5) for name in MAIN | SWEEPS}
        stored = {(row["method"], row["lr"], row["seed"]) for row in runs.rows}
        for name, seeds in arms.items():
            if not re.search(args.only, name):
                continue
            for lr in RATES:
                for seed in list(seeds)[:1] if args.tiny else seeds:
                    if (name, lr, seed) in stored:
                        continue
                    if part == "trp":
                        run = partial(run_trp, (MAIN | SWEEPS)[name], lr, seed)
                    else:
                        run = partial(run_rival, name, {k: of[seed] for k, of in found.items()}, lr, seed)
                    runs.row({"method": name, "lr": lr, "seed": seed}, partial(guarded, run))


if __name__ == "__main__":
    main()
