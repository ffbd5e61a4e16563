"""NaTra against plain training, augmentation and attacks on digits lit from a side (CPU).

    python tests/benchmarks/bench_natra_small.py --out book/results/natra_small.json --device cpu

training: one network of 128 hidden units for each arm, rate and seed, on 300 labelled digits in which the light tells
the class. Of each seed there is one VAE, of 3,500 unlabelled digits under free light; a second one, whose first layer
starts at PyTorch's own size, serves one arm. The cross-entropy on 200 images of the labelled kind chooses the rate:
nobody chooses by the light that is tested. Tests: 1,000 images in four lights, and 300 in twelve corruptions.
directions: how much each direction turns the light, and how often an oracle sees another class; VAEs of four κ.
codes: errors of inversion by the encoder, refined, and by 1, 4 and 16 codes at as many steps.
bill: time of a step, in units of a plain one.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from common import Runs, arguments, interleaved, save
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.lab.beds import DigitVAE, LitDigits, light_reading, lit, lit_digits, train_lit, train_vae
from lowrank_ref.robustness import (
    CORRUPTIONS,
    NaturalEdits,
    chained,
    class_flips,
    code_directions,
    compose_codes,
    corrupt,
    expand_codes,
    first_layer_directions,
    inverse_codes,
    invert,
    jacobian_directions,
    pgd,
    random_amplitudes,
)
from lowrank_ref.robustness.augmentation_chains import OPERATIONS, lit_from_a_side

SEEDS, RATES, EPOCHS, EPSILON, STEPS = range(5), (0.006, 0.02, 0.06), 30, 3.0, 2
#: For the arms that train for longer.
LOW_RATES = (0.002, 0.006, 0.02)
KAPPA, KAPPAS, FIRST = 60.0, (20.0, 60.0, 200.0, 600.0), (0.1, 1.0)
CORRUPTED = 300
Edit = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arm:
    """What an arm trains on beside its 300 images.

    `edits`: None, "latent", "pixels", "chains", "dark chains" (without the ramp of light) or "relit".
    `directions`: "first" (SeFa), "last", "random", "three", "all", or "geometry" (mean of JᵀJ).
    `search`: "worst", "random" or "ends" (always ±ε). `codes`: per image; 1 is the encoder's.
    `start`: size of the VAE's first layer at its start. `longer`: times the epochs.
    """

    edits: str | None = "latent"
    directions: str = "first"
    search: str = "worst"
    residual: bool = True
    codes: int = 1
    start: float = 0.1
    epsilon: float = EPSILON
    longer: int = 1
    code_input: bool = False


ARMS: dict[str, Arm] = {
    "plain": Arm(edits=None),
    "plain, 5 times as long": Arm(edits=None, longer=5),
    "plain, code as input": Arm(edits=None, code_input=True),
    "pixel attack, 0.03": Arm(edits="pixels", epsilon=0.03),
    "pixel attack, 0.1": Arm(edits="pixels", epsilon=0.1),
    "AugMix without light": Arm(edits="dark chains"),
    "AugMix": Arm(edits="chains"),
    "relit by hand": Arm(edits="relit"),
    "NaTra": Arm(),
    "NaTra, random": Arm(search="random"),
    "NaTra, random, 3 times as long": Arm(search="random", longer=3),
    "NaTra, ends": Arm(search="ends"),
    "NaTra, geometry": Arm(directions="geometry"),
    "NaTra, top three": Arm(directions="three"),
    "NaTra, all 16": Arm(directions="all"),
    "NaTra, random direction": Arm(directions="random"),
    "NaTra, last direction": Arm(directions="last"),
    "NaTra, usual start": Arm(start=1.0),
    "NaTra, plain edit": Arm(residual=False),
    "NaTra, plain edit, 4 codes": Arm(residual=False, codes=4),
}


class Composed(nn.Module):
    """G of N codes and fixed weights of each image, which ride behind the codes: (batch, N, d) -> images."""

    def __init__(self, vae: DigitVAE) -> None:
        super().__init__()
        self.first, self.second, self.weights = vae.generator[:2], vae.generator[2:], torch.empty(0)

    def forward(self, z: Tensor) -> Tensor:
        """Images of the rows whose weights were set last."""
        return self.second(compose_codes(self.first, z, self.weights))


@lru_cache(maxsize=1)
def bed(seed: int) -> LitDigits:
    """The digits of a seed."""
    return lit_digits(seed)


@lru_cache(maxsize=16)
def vae_of(seed: int, kappa: float, first: float) -> DigitVAE:
    """A VAE of the unlabelled digits of a seed."""
    return train_vae(bed(seed).unlabelled, seed=seed, penalty=kappa, first=first)


@lru_cache(maxsize=1)
def oracle(seed: int) -> nn.Module:
    """A network that knows the classes under any light: the 3,500 images with their labels. It only measures."""
    data = bed(seed)
    return train_lit((data.unlabelled, data.classes), None, lr=0.02, seed=1000 + seed, epochs=10)


@lru_cache(maxsize=1)
def corrupted(seed: int) -> tuple[Tensor, Tensor]:
    """300 test images under free light, in twelve corruptions of two severities, and their labels."""
    x, y = (t[:CORRUPTED] for t in bed(seed).tests["uniform"])
    g = torch.Generator().manual_seed(0)
    sets = [corrupt(x, name, severity, generator=g) for name in CORRUPTIONS for severity in (2, 4)]
    return torch.cat(sets), y.repeat(len(sets))


def directions(name: str, vae: DigitVAE, seed: int, z: Tensor) -> Tensor:
    """Columns V (16, q)."""
    V = first_layer_directions(vae.generator[0].weight).V
    if name == "random":
        return F.normalize(torch.randn(16, 1, generator=torch.Generator().manual_seed(500 + seed)), dim=0)
    if name == "geometry":
        return jacobian_directions(vae.generator, z[:100], 1).V
    return {"first": V[:, :1], "last": V[:, -1:], "three": V[:, :3], "all": V}[name]


@lru_cache(maxsize=1)
def several_codes(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Codes and weights of the labelled images."""
    vae, x = vae_of(seed, KAPPA, 0.1), bed(seed).labelled[0]
    found = expand_codes(vae.generator[:2], vae.generator[2:], x, starts(vae, x, count, seed), lr=0.05)
    assert found.weights is not None
    return found.z, found.weights


def starts(vae: DigitVAE, x: Tensor, count: int, seed: int) -> Tensor:
    """The encoder's code first, the others drawn from N(0, I)."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(x), count, 16, generator=g)
    drawn[:, 0] = vae.encode(x)
    return drawn


def edit_of(arm: Arm, seed: int) -> Edit | None:
    """What the arm adds to a batch: (model, rows, labels) -> images."""
    data, g = bed(seed), torch.Generator().manual_seed(2000 + seed)
    x = data.labelled[0]
    if arm.edits == "latent":
        return latent(arm, seed, g)
    if arm.edits == "pixels":
        return lambda f, rows, y: pgd(f, x[rows], y, norm=math.inf, epsilon=arm.epsilon, steps=3).x_best
    if arm.edits == "relit":
        return lambda f, rows, y: lit(data.unlit[rows], 2 * torch.rand(len(rows), generator=g) - 1)
    if arm.edits in ("chains", "dark chains"):
        dark = [op for op in OPERATIONS if arm.edits == "chains" or op is not lit_from_a_side]
        views: list[Tensor] = []  # of all images at once, anew for each epoch

        def view(f: nn.Module, rows: Tensor, y: Tensor) -> Tensor:
            if next(count) % (len(x) // len(rows)) == 0:
                views[:] = [chained(x, operations=dark, generator=g).clamp(0, 1)]
            return views[0][rows]

        count = itertools.count()
        return view
    return None


def latent(arm: Arm, seed: int, g: torch.Generator) -> Edit:
    """Edits in the latent space."""
    vae, x = vae_of(seed, KAPPA, arm.start), bed(seed).labelled[0]
    z = inverse_codes(vae.generator, vae.encode, x, steps=0)
    V = directions(arm.directions, vae, seed, z)
    G: nn.Module = vae.generator
    if arm.codes > 1:
        G, (z, weights) = Composed(vae), several_codes(seed, arm.codes)
    edits = NaturalEdits(G, V, epsilon=arm.epsilon, residual=arm.residual)

    def edited(f: nn.Module, rows: Tensor, y: Tensor) -> Tensor:
        if arm.codes > 1:
            G.weights = weights[rows]
        if arm.search == "worst":
            return edits.worst(f, x[rows], z[rows], y, steps=STEPS, draws=g)
        if arm.search == "random":
            return edits.random(x[rows], z[rows], draws=g)
        sign = torch.randint(2, (len(rows), 1), generator=g) * 2.0 - 1
        with torch.no_grad():
            return edits(x[rows], z[rows], arm.epsilon * sign)

    return edited


def run(name: str, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """Train an arm and measure it."""
    arm, data = ARMS[name], bed(seed)
    vae = vae_of(seed, KAPPA, arm.start)

    def seen(x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), vae.encode(x)], 1) if arm.code_input else x

    x, y = data.labelled
    try:
        f = train_lit((seen(x), y), edit_of(arm, seed), lr=lr, seed=seed, epochs=epochs * arm.longer)
    except FloatingPointError as error:
        return {"error": str(error)}
    with torch.no_grad():
        found = {"valid": float(F.cross_entropy(f(seen(data.valid[0])), data.valid[1]))}
        tests = {**data.tests, "corrupted": corrupted(seed)}
        for how, (x, y) in tests.items():
            found[how] = float((f(seen(x)).argmax(1) == y).double().mean())
    return {k: round(v, 5) for k, v in found.items()} | {"trainable": sum(p.numel() for p in f.parameters())}


# --- directions and codes ---------------------------------------------------------------------------------------------


def turned(vae: DigitVAE, V: Tensor, x: Tensor, read: Callable[[Tensor], Tensor]) -> list[float]:
    """By how much an edit of +-ε along each direction turns the light read, half the difference, without its sign."""
    z = vae.encode(x)
    found = []
    for v in V.T:
        ends = [read(vae.generator(z + sign * EPSILON * v)).mean() for sign in (1, -1)]
        found.append(round(float((ends[0] - ends[1]).abs() / 2), 4))
    return found


def flips(vae: DigitVAE, V: Tensor, seed: int, *, epsilon: float = EPSILON, residual: bool = True) -> float:
    """Share of labelled images of which the oracle sees another class after an edit of length ε."""
    x = bed(seed).labelled[0]
    alpha = random_amplitudes(len(x), V.shape[1], epsilon=1.0, generator=torch.Generator().manual_seed(seed))
    edits = NaturalEdits(vae.generator, V, epsilon=epsilon, residual=residual)
    return round(class_flips(oracle(seed), x, edits(x, vae.encode(x), epsilon * F.normalize(alpha))), 4)


def look(kappa: float, first: float, seed: int, untrained: bool = False) -> dict[str, Any]:
    """Directions of one VAE."""
    data = bed(seed)
    vae = (
        DigitVAE(first=first, generator=torch.Generator().manual_seed(seed))
        if untrained
        else vae_of(seed, kappa, first)
    )
    vae = vae.eval().requires_grad_(False)
    x, read = data.tests["uniform"][0], light_reading(data.unlabelled, data.light)
    z = vae.encode(data.unlabelled)
    found = first_layer_directions(vae.generator[0].weight)
    others = {"geometry": jacobian_directions(vae.generator, z[:100]), "PCA of codes": code_directions(z)}
    g = torch.Generator().manual_seed(500 + seed)
    random = F.normalize(torch.randn(16, 16, generator=g), dim=0)
    return {
        "eigenvalues": [round(float(v), 4) for v in found.values],
        "light": turned(vae, found.V, x, read),
        "flips": [flips(vae, v[:, None], seed) for v in found.V.T[:3]],
        "flips, twice ε": flips(vae, found.V[:, :1], seed, epsilon=2 * EPSILON),
        "flips, plain edit": flips(vae, found.V[:, :1], seed, residual=False),
        "flips, all 16": flips(vae, found.V, seed),
        "light, random": turned(vae, random, x, read),
        "code variance": sorted((round(float(v), 4) for v in z.var(0)), reverse=True),
        "error": round(float((vae.generator(z) - data.unlabelled).square().flatten(1).sum(1).mean()), 4),
        **{f"light, {name}": turned(vae, o.V[:, :3], x, read) for name, o in others.items()},
        **{f"cosine with {name}": round(abs(float(found.V[:, 0] @ o.V[:, 0])), 4) for name, o in others.items()},
    }


def inversion(count: int, seed: int) -> dict[str, Any]:
    """Squared error an image of 100 labelled images; 0 codes: the encoder, and 100 steps from it."""
    vae, x = vae_of(seed, KAPPA, 0.1), bed(seed).labelled[0][:100]
    if count == 0:
        found = invert(vae.generator, x, vae.encode(x), lr=0.05, encoder=None)
        strict = invert(vae.generator, x, vae.encode(x), lr=0.05, encoder=vae.encode)
        error = (vae.generator(strict.z) - x).square().flatten(1).sum(1)
        told = {"encoder": found.first_loss, "refined": found.loss, "refined, λ_e = 2": error}
        return {k: round(float(v.mean()), 4) for k, v in told.items()}
    found = expand_codes(vae.generator[:2], vae.generator[2:], x, starts(vae, x, count, seed), lr=0.05)
    return {"error of image": round(float(found.loss.mean()), 4)}


def bill() -> dict[str, Any]:
    """Time of one training step on 100 images, relative to a plain one."""
    vae, (x, y) = vae_of(0, KAPPA, 0.1), bed(0).labelled
    x, y, z = x[:100], y[:100], vae.encode(x)[:100]
    f = train_lit((x, y), None, lr=0.02, seed=0, epochs=1)
    edits = NaturalEdits(vae.generator, first_layer_directions(vae.generator[0].weight).V[:, :1], epsilon=EPSILON)
    adam = torch.optim.AdamW(f.parameters(), lr=1e-4, fused=True)

    def step(make: Callable[[], Tensor] | None) -> Callable[[], None]:
        def one() -> None:
            adam.zero_grad()
            loss = F.cross_entropy(f(x), y)
            (loss if make is None else loss + F.cross_entropy(f(make()), y)).backward()
            adam.step()

        return one

    runs = {"plain": step(None), "NaTra, random": step(lambda: edits.random(x, z))}
    for n in (1, 2, 3, 5):
        runs[f"NaTra, {n} steps"] = step(lambda n=n: edits.worst(f, x, z, y, steps=n))
    runs["pixel attack, 3 steps"] = step(lambda: pgd(f, x, y, norm=math.inf, epsilon=0.1, steps=3).x_best)
    times = interleaved(runs, repeats=60)
    return {"times": {k: round(v["median_ms"] / times["plain"]["median_ms"], 2) for k, v in times.items()}}


def setting() -> str:
    """What all rows share, in words."""
    return f"300 labelled digits of 14x14 lit from a side, batches of 100, {EPOCHS} epochs of AdamW, ε = {EPSILON:g}"


def main() -> None:
    """Fill the results file."""
    args = arguments(__doc__, ("training", "directions", "codes", "bill"))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    seeds, epochs = (range(1), 1) if args.tiny else (SEEDS, EPOCHS)
    more: dict[str, Any] = {"setting": setting(), "seconds": args.seconds}
    for seed in seeds:
        for part in args.part:
            if part == "directions":
                runs = Runs(args.out, part, **more)
                for kappa in KAPPAS:
                    for first in FIRST if kappa == KAPPA else FIRST[:1]:
                        key = {"κ": kappa, "start": first, "seed": seed, "untrained": False}
                        runs.row(key, lambda k=kappa, f=first, s=seed: look(k, f, s))
                key = {"κ": KAPPA, "start": 0.1, "seed": seed, "untrained": True}
                runs.row(key, lambda s=seed: look(KAPPA, 0.1, s, untrained=True))
            if part == "codes":
                runs = Runs(args.out, part, **more)
                for count in (0, 1, 4, 16):
                    runs.row({"codes": count, "seed": seed}, lambda c=count, s=seed: inversion(c, s))
            if part == "training":
                runs = Runs(args.out, part, **more)
                for name, arm in ARMS.items():
                    rates = RATES if arm.longer == 1 else LOW_RATES
                    for lr in rates[1:2] if args.tiny else rates:
                        key = {"method": name, "lr": lr, "seed": seed}
                        runs.row(key, lambda n=name, lr=lr, s=seed: run(n, lr, s, epochs))
    if "bill" in args.part:
        save(args.out, "bill", bill())


if __name__ == "__main__":
    main()
