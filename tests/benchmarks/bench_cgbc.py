"""CGBC behind a larger dual encoder, and its time beside CLIP's size, on one GPU (eight minutes).

    python tests/benchmarks/bench_cgbc.py --out book/results/cgbc_scale.json

accuracy: the encoder of the species bed, wider, learns 200,000 pictures; then the rules of `bench_cgbc_small.py` at
4, 16 and 50 concepts, five pools, none to three fifths wrong. time: 1,000 classes of 512 numbers, ms for 256 images.
"""

import math
from functools import cache, partial
from typing import Any

import torch
from bench_cgbc_small import FIXED
from common import Runs, arguments, milliseconds, peak_mib, reset_peak
from torch import Tensor, nn

from lowrank_ref.lab.beds import species
from lowrank_ref.robustness import ConceptClassifier, cgbc, concept_rules

POOLS = 5


class WideEncoder(species.PictureCaptionEncoder):
    """The bed's encoder with four times its widths."""

    def __init__(self, dim: int = 128):
        super().__init__(dim)
        self.conv = nn.Conv2d(3, 96, 5, stride=2, padding=2)
        self.image = nn.ModuleList([nn.Linear(96 * 16, 512), nn.Linear(512, dim)])
        self.words = nn.Linear(len(species.WORDS), 192, bias=False)
        self.text = nn.ModuleList([nn.Linear(192, 256), nn.Linear(256, dim)])


@cache
def encoder(device: str, tiny: bool) -> species.PictureCaptionEncoder:
    """Train with Adam on pictures that stay on the device."""
    torch.manual_seed(0)
    count, steps, batch = (200, 2, 32) if tiny else (200_000, 3000, 4096)
    data = species.CaptionedShapes.draw(count, generator=torch.Generator().manual_seed(0))
    model, x = WideEncoder().to(device), data.x.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(count, (batch,), generator=g)
        bags = data.captions(rows, generator=g).to(device)
        loss = species.clip_loss(
            model.encode_image(x[rows.to(device)]), model.encode_text(bags), model.log_scale.exp().clamp_max(100.0)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def accuracy(kind: str, wrong: float, concepts: int, pool: int, device: str, tiny: bool) -> dict[str, Any]:
    """Accuracy of all rules on 40 species, each ten of a name."""
    g = torch.Generator().manual_seed(1000 + pool)
    looks = torch.stack([torch.randperm(15, generator=g)[:10] for _ in range(4)])
    shape = torch.arange(4)[:, None].expand(4, 10)
    kinds = torch.stack([shape, looks // 3, looks % 3], dim=2).reshape(40, 3)
    world = species.SpeciesWorld(encoder(device, tiny).cpu(), kinds, kinds)
    V, y = world.pictures(50 if tiny else 4000, generator=g)
    words = species.concept_words(kinds, concepts, wrong=wrong, kind=kind, generator=g)
    T = world.texts(species.with_name(words, kinds)).to(device)
    S = cgbc.concept_similarities(V.to(device), T, scale=world.scale)

    def right(score: Tensor) -> float:
        return float((score.argmax(dim=1).cpu() == y).double().mean())

    found = {"mean embedding": right(concept_rules.mean_embedding_scores(V.to(device), T))}
    encoder(device, tiny).to(device)
    return {"numbers": found | {name: right(rule(S)) for name, rule in FIXED.items()}}


def time(concepts: int, device: str, tiny: bool) -> dict[str, Any]:
    """Milliseconds and peak memory of one batch."""
    classes, d, batch = (4, 8, 3) if tiny else (1000, 512, 256)
    T = torch.randn(classes, concepts, d, generator=torch.Generator().manual_seed(0)).to(device)
    model, x = ConceptClassifier(T), torch.randn(batch, d, device=device)
    reset_peak()
    with torch.no_grad():
        spent = milliseconds(lambda: model(x))
    return {**spent, "peak_mib": round(peak_mib()), "table bytes": 4 * T.numel()}


def main() -> None:
    """Run both parts."""
    args = arguments(__doc__ or "", ("accuracy", "time"))
    where = {"device": args.device, "tiny": args.tiny}
    if "time" in args.part:
        runs = Runs(args.out, "time", setting="1,000 classes of 512 numbers, 256 images, float32", seconds=args.seconds)
        for concepts in (1, 4, 16, 50):
            runs.row({"concepts": concepts}, partial(time, concepts, **where))
    if "accuracy" in args.part:
        setting = "species bed, encoder of 128 numbers on 200,000 pictures, 40 species of 4 names, 4,000 pictures"
        runs = Runs(args.out, "accuracy", setting=setting, seconds=args.seconds)
        for pool in range(1 if args.tiny else POOLS):
            for kind in species.KINDS:
                for wrong in (0.0, 0.2, 0.4, 0.6):
                    for concepts in (4, 16, 50):
                        key = {"kind": kind, "wrong": wrong, "concepts": concepts, "pool": pool}
                        runs.row(key, partial(accuracy, kind, wrong, concepts, pool, **where))


if __name__ == "__main__":
    main()
