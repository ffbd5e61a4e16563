"""Test beds that several chapters share, so that their tables can be compared line by line.

**digits-shift**: a small network learns upright digits; the task is the same digits turned by 90°. Every method gets
the same 200 Adam steps of 64 images, a learning rate that falls linearly to 0, and a grid of rates for `lab.compare`.

**Markov pretraining**: a small GPT learns, from scratch, a language of 16 letters in which two letters decide the odds
of the next. Attention has to fetch the letter before the last. The entropy of the language is known.

**planted rank**: the weights of a known network move by updates of known rank, a different one in each layer, and a
student sees only noisy inputs and outputs. Whatever decides about ranks can be compared with the truth, layer by layer:

    task = planted_rank(seed)                       # the truth: task.ranks == (0, 1, 1, 8), task.updates
    model = train_planted(task, adapt, lr=5e-3)     # any adapter, any allocator
    measure_planted(task, model)                    # test error, rank and distance to the truth of each layer
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ref.core.layers import AdaptedLinear
from lowrank_ref.lab.data import Arrays, array_batches, digits
from lowrank_ref.lab.models import GPT, MLP
from lowrank_ref.lab.train import Action, linear_decay, train, warmup_cosine

__all__ = [
    "PlantedRank",
    "TanhResidual",
    "classification_loss",
    "digits_shift",
    "markov_language",
    "markov_pretraining",
    "measure_planted",
    "planted_rank",
    "pretrained_on_digits",
    "train_planted",
]

SIZES = (64, 128, 128, 10)

Adapt = Callable[[nn.Module, torch.Generator], Iterable[Any] | None]
Actions = Callable[[nn.Module, torch.optim.Optimizer], Sequence[Action]]


# --- digits-shift -----------------------------------------------------------------------------------------------------


def classification_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in nats."""
    return F.cross_entropy(model(x), y)


_turned_digits = functools.cache(functools.partial(digits, rotate=90))


@functools.cache
def _upright_weights() -> dict[str, torch.Tensor]:
    data, model = digits(), MLP(SIZES, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    batch = array_batches(data.x_train, data.y_train, batch=128, seed=0)
    train(model, batch, classification_loss, optimizer, steps=300, progress=False)
    return model.state_dict()


def pretrained_on_digits() -> MLP:
    """Return an MLP 64-128-128-10 trained for 300 AdamW steps on 1,000 upright digits (about 0.5 s, once)."""
    model = MLP(SIZES)
    model.load_state_dict(_upright_weights())
    return model


@torch.no_grad()
def _measure(model: nn.Module, data: Arrays) -> dict[str, float]:
    logits = model(data.x_test)
    return {
        "train loss": F.cross_entropy(model(data.x_train), data.y_train).item(),
        "loss": F.cross_entropy(logits, data.y_test).item(),
        "accuracy": (logits.argmax(dim=1) == data.y_test).double().mean().item(),
    }


def _adapted(adapt: Adapt, model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    """Let `adapt` change the model; return Adam over what trains, the groups' "lr" being factors on `lr`."""
    groups = adapt(model, torch.Generator().manual_seed(seed))
    if groups is None:
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    return torch.optim.Adam([{**group, "lr": lr * group.get("lr", 1.0)} for group in groups])


def digits_shift(
    adapt: Adapt, lr: float, seed: int, *, steps: int = 200, actions: Actions | None = None
) -> dict[str, float]:
    """Adapt the upright network to digits turned by 90° and measure it.

    Args:
        adapt: (model, generator) -> changes the model in place, and may return optimizer groups whose "lr" is a factor
            on `lr`; None trains whatever still requires gradients.
        lr: first learning rate of Adam; it falls linearly to 0.
        seed: of the batches and of the generator handed to `adapt`.
        steps: optimizer steps of 64 images.
        actions: (model, optimizer) -> what acts after each step of the optimizer, such as a rank allocator.

    Returns:
        "train loss" and "loss" (on 797 held-out images) in nats, "accuracy" (share of them), and "trainable", the count
        of trained numbers.
    """
    data, model = _turned_digits(), pretrained_on_digits()
    optimizer = _adapted(adapt, model, lr, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    train(
        model,
        array_batches(data.x_train, data.y_train, batch=64, seed=seed),
        classification_loss,
        optimizer,
        steps=steps,
        schedule=linear_decay(steps),
        actions=actions(model, optimizer) if actions else (),
        progress=False,
    )
    return {**_measure(model, data), "trainable": float(sum(p.numel() for p in trained))}


# --- Markov pretraining -----------------------------------------------------------------------------------------------

LETTERS, PLACES = 16, 24

Prepare = Callable[[nn.Module, torch.Generator, float], torch.optim.Optimizer]


@functools.cache
def markov_language() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Draw sentences of 25 letters; the two letters before decide the odds of the next.

    The odds are softmax(2.2 z) of standard normal z, drawn once. Sentences begin in the middle of a long chain.

    Returns:
        (16,000 sentences to train on, 1,000 held out, entropy of a letter in nats when two before it are known).
    """
    g = torch.Generator().manual_seed(0)
    odds = (2.2 * torch.randn(LETTERS, LETTERS, LETTERS, generator=g, dtype=torch.float64)).softmax(dim=-1)
    edges = odds.cumsum(dim=-1)[..., :-1]
    chain = list(torch.randint(LETTERS, (2, 17_000), generator=g))
    for u in torch.rand(20 + PLACES + 1, 17_000, generator=g, dtype=torch.float64):
        chain.append((u[:, None] > edges[chain[-2], chain[-1]]).sum(dim=-1))
    rows = torch.stack(chain[-PLACES - 1 :], dim=1)
    entropy = -(odds * odds.log()).sum(dim=-1)[rows[:, :-2], rows[:, 1:-1]].mean()
    return rows[:16_000], rows[16_000:], entropy.item()


def markov_pretraining(
    prepare: Prepare,
    lr: float,
    seed: int,
    *,
    steps: int = 300,
    measure: Callable[[GPT], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Pretrain a GPT of two blocks of width 48 on the Markov language.

    Args:
        prepare: (model, generator, lr) -> optimizer; may change the model in place.
        lr: peak learning rate, handed to `prepare`; warm-up over a tenth of the steps, then a cosine down to a tenth.
        seed: of the batches and of the generator that draws the model and is handed to `prepare`.
        steps: optimizer steps of 32 sentences, gradients clipped to norm 1.
        measure: further numbers of the trained model.

    Returns:
        "loss", held out, in nats a letter; "block numbers", the trained numbers in the matrices of the blocks; and what
        `measure` returns.
    """
    rows, held_out, _ = markov_language()
    g = torch.Generator().manual_seed(seed)
    model = GPT(LETTERS, dim=48, layers=2, heads=2, length=PLACES, generator=g)
    optimizer = prepare(model, g, lr)
    batch = array_batches(rows[:, :-1], rows[:, 1:], batch=32, seed=seed)
    schedule = warmup_cosine(steps, warmup=steps // 10)
    train(model, batch, GPT.loss, optimizer, steps=steps, schedule=schedule, clip=1.0, progress=False)
    with torch.no_grad():
        loss = model.loss(held_out[:, :-1], held_out[:, 1:]).item()
    trained = ((name, p) for name, p in model.named_parameters() if name.startswith("blocks") and "norm" not in name)
    count = sum(p.numel() for _, p in trained if p.requires_grad)
    return {"loss": loss, "block numbers": float(count), **(measure(model) if measure is not None else {})}


# --- planted rank -----------------------------------------------------------------------------------------------------


class TanhResidual(nn.Module):
    """Layers `layers.0`, `layers.1`, ...: h becomes h + tanh(W h), without biases, so that ΔW is all there is to learn.

    Args:
        width: d; every W is (d, d), drawn from N(0, 1/d).
        depth: number of layers.
        generator: draws the weights.
    """

    def __init__(self, width: int, depth: int, *, generator: torch.Generator | None = None):
        super().__init__()
        bare = functools.partial(nn.utils.skip_init, nn.Linear, width, width, bias=False)
        self.layers = nn.ModuleList(bare() for _ in range(depth))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / math.sqrt(width)

    def forward(self, h: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """Map inputs to outputs of the same width."""
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return h


@dataclass(frozen=True)
class PlantedRank:
    """A regression task whose answer is known: base weights W, and updates ΔW that are to be found.

    Attributes:
        base: the network before the change.
        updates: ΔW (d, d) of each layer, with `ranks[i]` singular values 1 and the others 0.
        ranks: the planted ranks.
        x_train, y_train: inputs N(0, 1) and noisy outputs of the network with W + ΔW.
        x_test, y_test: the same without noise.
        noise: standard deviation of the noise on each training output.
    """

    base: TanhResidual
    updates: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    noise: float

    def floor(self, numbers: float) -> float:
        """Return the mean squared test error to expect of an efficient fit of so many free numbers.

        It is the classical noise² · numbers / (training rows · outputs): every free number costs the same, needed or
        not. A matrix of rank r has r(2d - r) free numbers.
        """
        return self.noise**2 * numbers / self.y_train.numel()


@functools.lru_cache(maxsize=4)
def planted_rank(
    seed: int = 0,
    *,
    ranks: tuple[int, ...] = (0, 1, 1, 8),
    width: int = 32,
    rows: int = 1024,
    noise: float = 0.05,
) -> PlantedRank:
    """Draw a task: everything, weights, updates, inputs and noise, comes from the seed.

    Args:
        seed: of the task.
        ranks: planted rank of each layer, 0 to `width`; their number is the depth of the network.
        width: d.
        rows: of the training data; as many again test.
        noise: standard deviation of the noise on each training output.

    Raises:
        ValueError: no rank, or one outside [0, width].
    """
    if not ranks or not all(0 <= r <= width for r in ranks):
        raise ValueError(f"ranks: got {ranks}, wanted at least one number, each from 0 to width = {width}")
    g = torch.Generator().manual_seed(seed)
    base = TanhResidual(width, len(ranks), generator=g).requires_grad_(False)
    U, V = torch.linalg.qr(torch.randn(2, len(ranks), width, width, generator=g)).Q
    updates = tuple(u[:, :r] @ v[:, :r].T for u, v, r in zip(U, V, ranks))
    teacher = copy.deepcopy(base)
    for layer, update in zip(teacher.layers, updates):
        layer.weight += update
    x = torch.randn(2 * rows, width, generator=g)
    y = teacher(x)
    y_train = y[:rows] + noise * torch.randn(rows, width, generator=g)
    return PlantedRank(base, updates, tuple(ranks), x[:rows], y_train, x[rows:], y[rows:], noise)


def _squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def train_planted(
    task: PlantedRank,
    adapt: Adapt,
    lr: float,
    *,
    seed: int = 0,
    steps: int = 800,
    actions: Actions | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    every: int = 0,
) -> nn.Module:
    """Adapt a copy of the base network to the task, with Adam on batches of 128 rows.

    Args:
        task: from `planted_rank`.
        adapt: (model, generator) -> changes the model in place, and may return optimizer groups whose "lr" is a factor
            on `lr`; None trains whatever still requires gradients.
        lr: largest learning rate; it rises over the first 6 % of the steps and then falls linearly to 0.
        seed: of the batches and of the generator handed to `adapt`.
        steps: optimizer steps, at least 2.
        actions: (model, optimizer) -> what acts after each step of the optimizer, such as a rank allocator.
        penalty: model -> a number to add to the loss, such as an L1 norm or a divergence.
        evaluate: called with the model every `every` steps and at the end, for what it notes down.
        every: steps between two such calls; 0 calls only at the end.

    Returns:
        The trained model.

    Raises:
        ValueError: steps below 2, of which one rises and one falls.
    """
    if steps < 2:
        raise ValueError(f"steps: got {steps}, wanted at least 2")
    model = copy.deepcopy(task.base).requires_grad_(True)
    optimizer = _adapted(adapt, model, lr, seed)
    warm = max(1, round(0.06 * steps))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        error = _squared_error(model, x, y)
        return error if penalty is None else error + penalty(model)

    train(
        model,
        array_batches(task.x_train, task.y_train, batch=min(128, len(task.x_train)), seed=seed),
        loss,
        optimizer,
        steps=steps,
        schedule=lambda step: min((step + 1) / warm, (steps - step) / (steps - warm)),
        actions=actions(model, optimizer) if actions else (),
        evaluate=evaluate,
        every=every,
        progress=False,
    )
    return model


@torch.no_grad()
def measure_planted(task: PlantedRank, model: nn.Module, *, tolerance: float = 1e-4) -> dict[str, float]:
    """Compare a trained student with the truth.

    The rank of a layer is the number of singular values of its update above `tolerance`; planted ones are 1. The
    default counts what the update holds at all. Noise alone gives values of about 0.02 to 0.05, so 0.25 counts
    what a reader of the spectrum would call real.

    Args:
        task: the task it was trained on.
        model: layers at the paths of `task.base`: adapters (`delta_weight()`), or plain layers, whose update is their
            weight minus the base's.
        tolerance: smallest singular value that counts, > 0.

    Returns:
        "mse", the mean squared error on the noiseless test rows; "train mse" on the noisy ones; "rank", the sum of the
        ranks; and for each layer i "rank i" and "error i", the Frobenius distance of its update to the planted one.
    """
    numbers = {
        "mse": _squared_error(model, task.x_test, task.y_test).item(),
        "train mse": _squared_error(model, task.x_train, task.y_train).item(),
        "rank": 0.0,
    }
    for i, (base, planted) in enumerate(zip(task.base.layers, task.updates)):
        layer: Any = model.get_submodule(f"layers.{i}")
        update = layer.delta_weight() if isinstance(layer, AdaptedLinear) else layer.weight - base.weight
        rank = int((torch.linalg.svdvals(update.double()) > tolerance).sum())
        numbers |= {f"rank {i}": float(rank), f"error {i}": (update - planted).norm().item()}
        numbers["rank"] += rank
    return numbers
