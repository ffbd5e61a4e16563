"""All ways to fine-tune that are compared on one bed, and how large each may be at a budget of trained numbers.

A budget is what LoRA of rank 1, 2, 4 or 8 trains in the same layers. `fitting(name, model, bed, budget)` returns the
largest size of a method that trains (of the cut ones: stores) no more. `METHODS` has an entry for each method; a new
method is one more entry, and every bed then runs it.
"""

import copy
import fcntl
import math
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ref.adapters import (
    ALLoRALinear,
    DoRALinear,
    LoLDULinear,
    LoRALinear,
    LoRASqueezer,
    LoRAXSLinear,
    NOLALinear,
    OutputPenalty,
    PiSSALinear,
    RandLoRALinear,
    SaRALinear,
    SVFitLinear,
    start_lora_sb,
    teacher_logits,
)
from lowrank_ref.adapters.randlora import block_count
from lowrank_ref.adapters.squeeze_training import halving_plan
from lowrank_ref.analysis import MPSLinear
from lowrank_ref.analysis.mps_adapter import near_square
from lowrank_ref.core.accounting import nbytes, numel, state_bytes
from lowrank_ref.core.actions import Action
from lowrank_ref.core.layers import adapters, put_in_place, replace_linears
from lowrank_ref.core.linalg import svd
from lowrank_ref.ranks import prune_by_svd

RANKS = (1, 2, 4, 8)
LARGE = 8  # the rank that is cut
SAMPLES = 64  # of LoRA-SB's gradient pass
Shapes = Counter[tuple[int, int]]


@dataclass(frozen=True)
class Bed:
    """Where methods are compared.

    Attributes:
        name: of the bed, for the rates of the methods.
        layers: pattern of the linear layers that are adapted.
        head: pattern of what "head only" trains.
        beside: pattern of what trains in full beside every adapter, and counts in no budget; "" for nothing.
        loss_fn: as `start_lora_sb` calls it.
        samples: generator -> batches of the task, for methods that look at it before they start.
    """

    name: str
    layers: str
    head: str
    loss_fn: Callable[..., Tensor]
    samples: Callable[[torch.Generator], Iterable[Any]]
    beside: str = ""


@dataclass
class Setup:
    """What a method has set up: groups of the optimizer (None: one), what acts after steps, what ends the training.

    `penalty` (model -> a number that is added to the loss) is read on the planted ranks only.
    """

    groups: list[dict[str, Any]] | None = None
    actions: Callable[[nn.Module, torch.optim.Optimizer, int], Sequence[Any]] = lambda *_: ()
    finish: Callable[[nn.Module], Mapping[str, float] | None] = lambda _: None
    penalty: Callable[[nn.Module], Tensor] | None = None


Put = Callable[[nn.Module, int, Bed, torch.Generator], Setup | None]


def ranks(shapes: Shapes, budget: int) -> Iterable[int]:
    """Return all ranks that a layer can have."""
    return range(1, max(min(shape) for shape in shapes) + 1)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        trains: what trains, in words.
        put: (model, size, bed, generator) -> changes the model in place, tells what else belongs to it.
        numbers: (m, n, size) -> numbers of a layer that the budget counts; None: no size, the model is asked.
        rates: bed -> rate in the middle of the rates that are tried first.
        letter: of the size.
        sizes: which sizes there are.
        drawn: whether the start depends on the generator; if not, seeds can share it.
    """

    trains: str
    put: Put
    rates: Mapping[str, float]
    numbers: Callable[[int, int, int], int] | None = None
    letter: str = "r"
    sizes: Callable[[Shapes, int], Iterable[int]] = ranks
    drawn: bool = True


# --- how each is put on a model -----------------------------------------------------------------------------------


def each(make: Callable[[nn.Linear, int, torch.Generator], nn.Module]) -> Put:
    """Return what replaces every layer; a size above the rank that a layer can have is cut to it."""

    def put(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> None:
        replace_linears(model, bed.layers, lambda linear: make(linear, size, generator), trainable=bed.beside or None)

    return put


def capped(size: int, linear: nn.Linear) -> int:
    """Return the rank, or the largest that the layer can have."""
    return min(size, *linear.weight.shape)


def low_rank(layer: Any) -> Put:
    """Return what puts LoRA or a relative on every layer, with s = 2."""

    def make(linear: nn.Linear, size: int, generator: torch.Generator) -> nn.Module:
        r = capped(size, linear)
        return layer(linear, r, alpha=2.0 * r, generator=generator)

    return each(make)


def mps_size(m: int, n: int, size: int) -> tuple[int, int]:
    """Return rank and bond of the MPS adapter: half as much bond as rank."""
    n1, n2 = near_square(n)
    r = min(size, m, n)
    return r, min(-(-r // 2), r * n1, n2)


def mps(linear: nn.Linear, size: int, generator: torch.Generator) -> nn.Module:
    """Return an MPS adapter with s = 2."""
    r, bond = mps_size(*linear.weight.shape, size)
    return MPSLinear(linear, r, bond=bond, alpha=2.0 * r, generator=generator)


def mps_numbers(m: int, n: int, size: int) -> int:
    """Count the cores and B."""
    r, bond = mps_size(m, n, size)
    n1, n2 = near_square(n)
    return m * r + r * n1 * bond + bond * n2


def sara(linear: nn.Linear, r: int, generator: torch.Generator) -> nn.Module:
    """Return a layer whose smallest weights train, as many as LoRA of rank r has numbers."""
    m, n = linear.weight.shape
    return SaRALinear(linear, min(r * (m + n), m * n) / (m * n))


def ba_lora(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> Setup:
    """PiSSA, and the gradients of three penalties on the logits beside that of the loss."""
    low_rank(PiSSALinear)(model, size, bed, generator)
    penalty = OutputPenalty()

    def add(module: nn.Module, inputs: Any, z: Tensor) -> None:
        if z.requires_grad:  # not of the teacher, nor when the model is judged
            own, teacher = z.detach().requires_grad_(), teacher_logits(module, *inputs)
            (G,) = torch.autograd.grad(penalty(own, teacher), own)
            z.register_hook(lambda gradient: gradient + G)

    hook = model.register_forward_hook(add)
    return Setup(finish=lambda _: hook.remove())


def lora_sb(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> None:
    """Put LoRA-SB on every layer, from the gradients of a few samples."""
    device = next(model.parameters()).device
    how: dict[str, Any] = {"rank": size, "step_size": 1e-3, "trainable": bed.beside or None, "device": device}
    start_lora_sb(model, bed.layers, bed.loss_fn, bed.samples(generator), **how)


def only(part: Callable[[nn.Module, Bed], set[str]]) -> Put:
    """Return what leaves nothing to train but some parameters of the model, and what trains beside."""

    def put(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> None:
        wanted = part(model, bed)
        for path, p in model.named_parameters():
            p.requires_grad_(path in wanted or _beside(bed, path))

    return put


def adapted_paths(model: nn.Module, bed: Bed, name: str) -> set[str]:
    """Return the paths of the weights or biases of the layers that adapters change."""
    found = (f"{path}.{name}" for path, module in model.named_modules() if _target(bed, path, module))
    return {path for path in found if path in dict(model.named_parameters())}


def weights_cut(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> Setup:
    """Train all weights of the layers; in the end keep of their changes what the budget of LoRA's rank `size` holds."""
    only(lambda m, b: adapted_paths(m, b, "weight"))(model, size, bed, generator)
    before = {path: copy.deepcopy(m) for path, m in model.named_modules() if _target(bed, path, m)}
    budget = count(METHODS["LoRA"], layer_shapes(model, bed), size)

    def finish(trained: nn.Module) -> None:
        new = {}
        for path, base in before.items():
            moved = trained.get_submodule(path)
            change = (moved.weight - base.weight).detach()
            U, S, Vh = svd(change)
            layer = LoRALinear(base, len(S), alpha=float(len(S)), generator=torch.Generator(device=change.device))
            layer.A, layer.B = nn.Parameter(Vh.contiguous()), nn.Parameter((U * S).contiguous())
            new[id(moved)] = layer.train(moved.training)
        for p in trained.parameters():
            p.requires_grad_(False)
        put_in_place(trained, new)
        prune_by_svd(trained, budget)

    return Setup(finish=finish)


def lora_cut(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> Setup:
    """Train LoRA of the large rank; in the end cut it to the budget by its singular values."""
    budget = count(METHODS["LoRA"], layer_shapes(model, bed), size)
    low_rank(LoRALinear)(model, LARGE, bed, generator)

    def finish(trained: nn.Module) -> None:
        prune_by_svd(trained, budget)

    return Setup(finish=finish)


class ActAt(Action):
    """Does something once, `now`, after so many steps."""

    state_names = ("done",)

    def __init__(self, at: int) -> None:
        self.at, self.done = at, 0

    def act(self) -> None:
        """Count a step; is it time?"""
        self.done += 1
        if self.done == self.at:
            self.now()

    def now(self) -> None:
        """Do it."""
        raise NotImplementedError


class CutAt(ActAt):
    """Cuts LoRA layers to a budget by their singular values after so many steps, and starts Adam's moments anew."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, at: int, budget: int) -> None:
        super().__init__(at)
        self.model, self.optimizer, self.budget, self.most = model, optimizer, budget, 0

    def now(self) -> None:
        """Cut."""
        self.most = state_bytes(self.optimizer)
        prune_by_svd(self.model, self.budget)
        train_what_is_left(self.model, self.optimizer)


def train_what_is_left(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """After layers were replaced, let the optimizer forget what is gone and take what is new, without moments."""
    groups = optimizer.param_groups
    known = {id(p) for group in groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {id(p) for p in trained}
    for group in groups:
        for p in group["params"]:
            if id(p) not in held:
                optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) in held]
    groups[0]["params"] += [p for p in trained if id(p) not in known]


def lora_cut_halfway(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> Setup:
    """Train LoRA of the large rank for half of the steps, cut it to the budget, and go on."""
    budget = count(METHODS["LoRA"], layer_shapes(model, bed), size)
    low_rank(LoRALinear)(model, LARGE, bed, generator)
    cuts: list[CutAt] = []

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[CutAt]:
        cuts.append(CutAt(model, optimizer, at=max(1, steps // 2), budget=budget))
        return cuts[-1:]

    other = 8 * numel(p for path, p in model.named_parameters() if _beside(bed, path))  # Adam's two moments
    return Setup(actions=actions, finish=lambda _: {"state bytes": float(cuts[-1].most - other)})


def squeezed(model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> Setup:
    """Train LoRA of the large rank and halve the rank at equal intervals, down to `size`."""
    most = 8.0 * count(METHODS["LoRA"], layer_shapes(model, bed), LARGE)  # bytes of Adam's two moments
    low_rank(LoRALinear)(model, LARGE, bed, generator)

    def actions(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[LoRASqueezer]:
        return [LoRASqueezer(model, optimizer, halving_plan(LARGE, size, steps))]

    return Setup(actions=actions, finish=lambda _: {"state bytes": most})


def _target(bed: Bed, path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and re.search(bed.layers, path) is not None


def _beside(bed: Bed, path: str) -> bool:
    return bool(bed.beside) and re.search(bed.beside, path) is not None


def _lora(m: int, n: int, size: int) -> int:
    return min(size, m, n) * (m + n)


def _core(m: int, n: int, size: int) -> int:
    return min(size, m, n) ** 2


def _few(shapes: Shapes, budget: int) -> Iterable[int]:
    return (r for r in RANKS if r < LARGE)


BY_LORA = {"digits": 0.03, "verses": 0.008, "speeches": 0.008}
BY_CORE = {"digits": 0.1, "verses": 0.03, "speeches": 0.016}
#: Of what is cut, which the bed of the speeches leaves out.
BY_LARGE = {"digits": 0.03, "verses": 0.008}
#: The rates of what trains weights themselves.
BY_WEIGHT = {"digits": 0.012, "verses": 0.001, "speeches": 0.0008}

METHODS: dict[str, Method] = {
    "LoRA": Method("A and B of every layer", low_rank(LoRALinear), BY_LORA, _lora),
    "DoRA": Method(
        "A, B and a magnitude for each row", low_rank(DoRALinear), BY_LORA, lambda m, n, r: _lora(m, n, r) + m
    ),
    "PiSSA": Method(
        "A and B, from the top of W's SVD",
        low_rank(PiSSALinear),
        {"digits": 0.012, "verses": 0.002, "speeches": 0.002},
        _lora,
        drawn=False,
    ),
    "ALLoRA": Method(
        "A and B, rows that have moved less",
        each(lambda linear, r, g: ALLoRALinear(linear, capped(r, linear), generator=g)),
        BY_LORA,
        _lora,
    ),
    "BA-LoRA": Method("PiSSA under three penalties on its outputs", ba_lora, {"digits": 0.012}, _lora, drawn=False),
    "RandLoRA": Method(
        "Λ and Γ beside frozen random bases",
        each(lambda linear, r, g: RandLoRALinear(linear, capped(r, linear), generator=g)),
        {"digits": 0.012, "verses": 0.004, "speeches": 0.004},
        lambda m, n, r: block_count(min(m, n), min(r, m, n)) * (min(r, m, n) + min(m, n)),
    ),
    "NOLA": Method(
        "coefficients of random A and B of rank 8",
        each(lambda linear, k, g: NOLALinear(linear, capped(8, linear), bases=k, keep=True, generator=g)),
        {"digits": 0.05, "verses": 0.03, "speeches": 0.03},
        lambda m, n, k: 2 * k,
        letter="k",
        sizes=lambda shapes, budget: range(1, budget // (2 * shapes.total()) + 1),
    ),
    "SVFit": Method(
        "singular values of every layer",
        each(lambda linear, r, g: SVFitLinear(linear, capped(r, linear), store_bases=False, generator=g)),
        {"digits": 2.0, "verses": 0.125, "speeches": 0.06},
        lambda m, n, r: min(r, m, n),
        drawn=False,
    ),
    "LoLDU": Method(
        "the diagonal of the LDU factors of every layer",
        each(lambda linear, r, g: LoLDULinear(linear, capped(r, linear), store_bases=False, generator=g)),
        {"digits": 0.03, "verses": 0.03, "speeches": 0.03},
        lambda m, n, r: min(r, m, n),
        drawn=False,
    ),
    "LoRA-SB": Method("a core between frames of the first gradient", lora_sb, BY_CORE, _core),
    "LoRA-XS": Method(
        "a core between frames of W",
        each(lambda linear, r, g: LoRAXSLinear(linear, capped(r, linear), generator=g)),
        BY_CORE,
        _core,
    ),
    "SaRA": Method(
        "the smallest weights, as many as LoRA's numbers",
        each(sara),
        {"digits": 0.012, "verses": 0.001, "speeches": 0.001},
        lambda m, n, r: min(r * (m + n), m * n),
        drawn=False,
    ),
    "MPS": Method("B, and A as two cores", each(mps), BY_LORA, mps_numbers),
    "full cut": Method(
        "all weights, their change then cut by its SVD",
        weights_cut,
        {"digits": 0.012, "verses": 0.001},
        _lora,
        drawn=False,
    ),
    "SVD cut": Method(f"LoRA r={LARGE}, then cut by its SVD", lora_cut, BY_LARGE, _lora, sizes=_few),
    "cut, then finish": Method(
        f"LoRA r={LARGE} for half of the steps, then cut", lora_cut_halfway, BY_LARGE, _lora, sizes=_few
    ),
    "LoRA-Squeeze": Method(
        f"LoRA r={LARGE}, its rank halved at equal intervals", squeezed, BY_LARGE, _lora, sizes=_few
    ),
    "biases": Method(
        "biases of the same layers",
        only(lambda m, b: adapted_paths(m, b, "bias")),
        {"digits": 0.12, "verses": 0.03},
        drawn=False,
    ),
    "head only": Method(
        "the last layer",
        only(lambda m, b: {path for path, _ in m.named_parameters() if re.search(b.head, path)}),
        {"digits": 0.06, "verses": 0.01, "speeches": 0.0032},
        drawn=False,
    ),
    "full": Method(
        "everything",
        only(lambda m, b: {path for path, _ in m.named_parameters()}),
        BY_WEIGHT,
        drawn=False,
    ),
}


# --- sizes --------------------------------------------------------------------------------------------------------


def layer_shapes(model: nn.Module, bed: Bed) -> Shapes:
    """Return (m, n) -> how many layers of this shape are adapted."""
    return Counter(tuple(m.weight.shape) for path, m in model.named_modules() if _target(bed, path, m))


def count(method: Method, shapes: Shapes, size: int) -> int:
    """Count the numbers of all layers at this size."""
    assert method.numbers is not None
    return sum(times * method.numbers(m, n, size) for (m, n), times in shapes.items())


def budgets(model: nn.Module, bed: Bed, ranks: Sequence[int] = RANKS) -> list[int]:
    """Return what LoRA of these ranks trains."""
    return [count(METHODS["LoRA"], layer_shapes(model, bed), r) for r in ranks]


def fitting(name: str, model: nn.Module, bed: Bed, budget: int) -> int | None:
    """Return the size with the most numbers within the budget: 0 for a method without sizes, None if none fits."""
    method, shapes = METHODS[name], layer_shapes(model, bed)
    if method.numbers is None:
        probe = copy.deepcopy(model)
        method.put(probe, 0, bed, torch.Generator())
        return 0 if 0 < stored_size(probe, bed)["numbers"] <= budget else None
    counts = {size: count(method, shapes, size) for size in method.sizes(shapes, budget)}
    within = [size for size, numbers in counts.items() if numbers <= budget]
    return max(within, key=lambda size: counts[size], default=None)


def label(name: str, size: int) -> str:
    """Return what rows call an arm: "LoRA r=2", "NOLA k=97", "biases"."""
    return f"{name} {METHODS[name].letter}={size}" if METHODS[name].numbers else name


def arms(model: nn.Module, bed: Bed, wanted: Sequence[int]) -> dict[str, tuple[str, int]]:
    """Return label -> (method, size) of every method that has rates for this bed, at every budget.

    What has no size and fits no budget is there once: full fine-tuning, and the head where it trains beside adapters.
    """
    found = {}
    for name, method in METHODS.items():
        if bed.name in method.rates:
            outside = name == "full" or (name == "head only" and bool(bed.beside))
            sizes = {0} if outside else {fitting(name, model, bed, budget) for budget in wanted}
            found |= {label(name, size): (name, size) for size in sorted(sizes - {None})}  # type: ignore[type-var]
    return found


def put(name: str, model: nn.Module, size: int, bed: Bed, generator: torch.Generator) -> Setup:
    """Change the model in place as the method asks."""
    return METHODS[name].put(model, size, bed, generator) or Setup()


def stored_size(model: nn.Module, bed: Bed) -> dict[str, float]:
    """Count "numbers" that train in the end, and "bytes" that a task's file holds, without what trains beside.

    The file holds what adapters need to be loaded over the same base: LoRA-SB's frames too, of random bases the seed.
    """
    trained = [p for path, p in model.named_parameters() if p.requires_grad and not _beside(bed, path)]
    own = [
        tensor
        for _, layer in adapters(model)
        for path, tensor in layer.state_dict(keep_vars=True).items()
        if not path.startswith("base.")
    ]
    return {"numbers": float(numel(trained)), "bytes": float(nbytes([*trained, *own]))}


# --- rates --------------------------------------------------------------------------------------------------------


def widen(
    measure: Callable[[float], float],
    middle: float,
    *,
    first: int = 7,
    rates: int = 0,
    factor: float = 2.0,
    most: int = 6,
) -> list[float]:
    """Try rates a factor apart around `middle`; while the best is at an edge, the next one too; return those tried.

    Args:
        measure: rate -> mean validation loss, infinite if it diverged.
        middle: the rate in the middle of the first ones.
        first: how many those are.
        rates: when the best is inside, go on at the nearer end until there are as many.
        factor: between two of them.
        most: how many rates may be added because the best is at an edge.
    """
    places = [place - first // 2 for place in range(first)]

    def rate(place: int) -> float:
        return float(f"{middle * factor**place:.3g}")

    while True:
        best = min(places, key=lambda place: measure(rate(place)))
        edge = best in (places[0], places[-1]) and math.isfinite(measure(rate(best)))
        if not (edge and len(places) < first + most) and len(places) >= rates:
            return [rate(place) for place in places]
        down = best == places[0] or (best != places[-1] and best - places[0] < places[-1] - best)
        places = [places[0] - 1, *places] if down else [*places, places[-1] + 1]


@dataclass
class Sweep:
    """The rows of one arm: every rate with every seed, wider while the best is at an edge."""

    row: Callable[[float, int], Mapping[str, Any]]
    seeds: Sequence[int]
    metric: str = "valid loss"
    known: dict[float, float] = field(default_factory=dict)

    def mean(self, lr: float) -> float:
        """Return the mean validation loss over the seeds; a diverged run is infinitely bad."""
        if lr not in self.known:
            losses = [self.row(lr, seed).get(self.metric, math.inf) for seed in self.seeds]
            self.known[lr] = math.fsum(losses) / len(losses)
        return self.known[lr]


def rates_tried(rows: Iterable[Mapping[str, Any]], names: Iterable[str]) -> int:
    """Return the largest number of rates that any of these arms has rows of."""
    tried: dict[str, set[float]] = {name: set() for name in names}
    for row in rows:
        if row["method"] in tried:
            tried[row["method"]].add(row["lr"])
    return max(map(len, tried.values()), default=0)


@contextmanager
def claimed(path: Path, name: str) -> Iterator[bool]:
    """Tell whether this process may work on an arm; False while another one that fills the same file does."""
    mark = zlib.crc32(f"{path.resolve()} {name}".encode())
    with open(Path(tempfile.gettempdir()) / f"arm_{mark:08x}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
