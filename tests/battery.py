"""The cases of the battery, and what they are run on: every adapter and optimizer that a paper's card names.

A new paper adds the parameter count of its adapter to `COUNTS`, or its layer to `WEIGHT_LAYERS`, and what acts in its
training to `ACTIONS`, nothing else. `test_battery.py` holds the tests.
"""

import copy
import importlib
import io
import pkgutil
from functools import partial

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lowrank_ref
from lowrank_ref.adapters import (
    DoRALinear,
    LoRALinear,
    LoRASBLinear,
    LoRASqueezer,
    LoRAXSLinear,
    MomentRestart,
    PiSSALinear,
    ProgressiveSelection,
    SaRALinear,
    SingularCoreLinear,
)
from lowrank_ref.adapters.lora_sb import first_step, update_approximation
from lowrank_ref.compression import (
    JointRankSampler,
    MaestroLinear,
    RankSampler,
    RankShrinker,
    TrainedRankPruning,
    WeLoreLinear,
    decompose,
)
from lowrank_ref.core.actions import Action
from lowrank_ref.core.checks import check_rank
from lowrank_ref.core.layers import replace_linears, weight_of
from lowrank_ref.core.registry import papers
from lowrank_ref.lowbit import RECIPES, BitLinear, GateSchedule, HGFLinear, QuantLinear
from lowrank_ref.lowbit.ternary import PackedLinear
from lowrank_ref.pretraining import SLTrainLinear
from lowrank_ref.ranks import (
    BayesianLoRALinear,
    DiffoRALinear,
    GateSampler,
    IncreLoRALinear,
    ModuleSearch,
    ProximalGates,
    RankGrowth,
    RankSelection,
    SoRALinear,
    SparsifyingSchedule,
    gate_groups,
    growth_groups,
    logit_groups,
    start_task,
)
from lowrank_ref.robustness import GradientProjection

#: The base layer of all cases: m outputs, n inputs.
M, N = 10, 12
#: Where and in which precision the cases live, read at every call. `gpu/` sets others.
DEVICE, DTYPE = "cpu", torch.float64


def lora_sb(base, rank=8, *, generator):
    """A LoRA-SB layer that starts from the sign of noise, in the place of a gradient."""
    G = torch.randn(weight_of(base).shape, generator=generator, dtype=torch.float64)
    return LoRASBLinear(base, *update_approximation(first_step(G, 0.1), rank))


def sara(base, rank=4, *, generator):
    """A SaRA layer that trains rank/min(m, n) of the weights: all at the largest rank."""
    W = weight_of(base)
    check_rank(rank, W.shape)
    return SaRALinear(base, rank / min(W.shape))


#: Name -> adapter(base, generator=...), with its default options. These have no card of their own, or take no rank.
LAYERS = {name: make for info in papers().values() for name, make in info.layers.items()}
LAYERS |= {"DoRALinear": DoRALinear, "PiSSALinear": PiSSALinear, "SingularCoreLinear": SingularCoreLinear}
LAYERS |= {"LoRAXSLinear": LoRAXSLinear, "LoRASBLinear": lora_sb, "SaRALinear": sara}
#: Name -> numbers it trains on an (m, n) layer, by the formula of its docstring.
COUNTS = {
    "IncreLoRALinear": lambda m, n: m + n + 1 + m + n,  # one component and the vectors of the reserve
    "LoRALinear": lambda m, n: 8 * (m + n),
    "DiffoRALinear": lambda m, n: 8 * (m + n) + 1,
    "DoRALinear": lambda m, n: 8 * (m + n) + m,
    "PiSSALinear": lambda m, n: 8 * (m + n),
    "MPSLinear": lambda m, n: 8 * m + 8 * 3 * 4 + 4 * 4,  # n = 12 = 3·4
    "NOLALinear": lambda m, n: 64 + 64,
    "RandLoRALinear": lambda m, n: -(-min(m, n) // 8) * (8 + min(m, n)),
    "CoDyRALinear": lambda m, n: 8 * (m + n + 1),
    "SoRALinear": lambda m, n: 8 * (m + n + 1),
    "BayesianLoRALinear": lambda m, n: 8 * (m + n + 1) + 7 + 3 * 3,
    "SVFitLinear": lambda m, n: min(m, n),
    "SingularCoreLinear": lambda m, n: min(m, n) ** 2,
    "LoLDULinear": lambda m, n: min(m, n),
    "ALLoRALinear": lambda m, n: 8 * (m + n),
    "LoRAXSLinear": lambda m, n: 8 * 8,
    "LoRASBLinear": lambda m, n: 8 * 8,
    "SaRALinear": lambda m, n: round(4 / min(m, n) * m * n),
}
#: Adapters that do not start at the base model, each with the reason.
STARTS_ELSEWHERE = {
    "IncreLoRALinear": "λ of its reserve is 1e-5",
    "LoRAXSLinear": "its core is drawn, with a deviation of 1e-5",
    "LoRASBLinear": "its start is one step of full fine-tuning, truncated",
}
#: Adapters without randomness: the generator changes nothing.
NOT_RANDOM = {"LoLDULinear", "PiSSALinear", "SVFitLinear", "SaRALinear", "SingularCoreLinear"}
#: Name -> layer(base, generator=...) of those that are the weight themselves.
WEIGHT_LAYERS = {
    "SLTrainLinear": partial(SLTrainLinear.from_linear, rank=4, density=0.2),
    "MaestroLinear": lambda base, generator=None: MaestroLinear.from_linear(base),
    "WeLoreLinear": lambda base, generator=None: WeLoreLinear.from_linear(base, rank=4),
    "BitLinear": lambda base, generator=None: BitLinear(base),
    "HGFLinear": partial(HGFLinear, rank=3),
    "QuantLinear": partial(QuantLinear, recipe=RECIPES["int8"]),
    "PackedLinear": lambda base, generator=None: PackedLinear(BitLinear(base)),
}
#: Name -> optimizer(parameter groups).
OPTIMIZERS = {name: make for info in papers().values() for name, make in info.optimizers.items()}


@st.composite
def shapes(draw):
    """(m, n, r): tall, wide, square; r from 1 to min(m, n), and often one of the two ends."""
    m, n = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return m, n, draw(st.sampled_from([1, min(m, n)]) | st.integers(1, min(m, n)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def tolerance(atol):
    """A bound meant for float64, with as many machine epsilons in the precision of the cases."""
    return atol * torch.finfo(DTYPE).eps / torch.finfo(torch.float64).eps


def linear(dtype=None):
    """The base layer, always the same."""
    base = nn.Linear(N, M, device=DEVICE, dtype=dtype or DTYPE)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(7)) / 3)
    return base


def adapter(name, *, base=None, seed=0, moved=True):
    """An adapter on the base layer; `moved` shifts every trained number, as training would."""
    layer = LAYERS[name](linear() if base is None else base, generator=seeded(seed))
    if moved:
        with torch.no_grad():
            for p in layer.adapter_parameters().values():
                p.add_(torch.randn(p.shape, generator=seeded(8), dtype=p.dtype).to(p.device), alpha=0.2)
    return layer


def network(dtype=None):
    """A small network to optimise, always the same."""
    model = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, 6)).to(DEVICE, dtype or DTYPE)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(7)) / 3)
    return model


def optimizer(name, model):
    """An optimizer in the way of all low-rank ones: matrices with a rank, the rest without. Two steps share a basis."""
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == flat] for flat in (True, False))
    return OPTIMIZERS[name]([{"params": matrices, "rank": 2, "gap": 2}, {"params": rest}])


class Twins(nn.Module):
    """A model and its copy, trained by one optimizer on different losses."""

    def __init__(self, model):
        super().__init__()
        self.model, self.twin = model, copy.deepcopy(model)

    def forward(self, x):
        return self.model(x) + 0.3 * self.twin(x.flip(0))


def _sora():
    model = replace_linears(network(), "", partial(SoRALinear, rank=4, generator=seeded()))
    steps = torch.optim.Adam(gate_groups(model), lr=0.2)
    return model, steps, [ProximalGates(model, steps, penalty=0.5)]


def _schedule():
    model, steps, [proximal] = _sora()
    return model, steps, [proximal, SparsifyingSchedule(proximal, [0.1, 0.5, 0.9], first=2, later=2)]


def _search():
    """The steps of the gates see other rows than those of the factors."""
    model = replace_linears(network(), "", partial(DiffoRALinear, rank=4, generator=seeded()))
    steps = torch.optim.Adam(model.parameters(), lr=0.2)
    return model, steps, [ModuleSearch(model, loss, lambda i: (batch(50 + i),), lr=0.1, warmup=1)]


def _codyra():
    model = start_task(network(), "", 4, gate="normal", generator=seeded())
    steps = torch.optim.Adam(gate_groups(model), lr=0.2)
    return model, steps, [RankSelection(model, steps, steps=6, shrink=0.9, levels=2, dense=0.3)]


def _growth():
    model = replace_linears(network(), "", partial(IncreLoRALinear, capacity=4, generator=seeded()))
    steps = torch.optim.Adam(growth_groups(model), lr=0.1)
    return model, steps, [RankGrowth(model, steps, budget=5, every=2, warmup=1)]


def _bayesian():
    make = partial(BayesianLoRALinear, rank=4, gate=0.0, generator=seeded())
    model = replace_linears(network(), "", make)
    steps = torch.optim.Adam(logit_groups(model, 0.1, ratio=2.0))
    return model, steps, [GateSampler(model, generator=seeded(1))]


def _momentum(model, make):
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), [make(model)]


def _sara():
    model = replace_linears(network(), "", lambda base: SaRALinear(base, 0.6))
    steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    return model, steps, [ProgressiveSelection(model, steps, at=3)]


def _lora(make):
    model = replace_linears(network(), "", partial(LoRALinear, rank=4, generator=seeded()))
    steps = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, steps, [make(model, steps)]


#: Name of an action -> its case: a model, its optimizer, and the actions in the order in which they attach.
ACTIONS = {
    "ProximalGates": _sora,
    "SparsifyingSchedule": _schedule,
    "ModuleSearch": _search,
    "RankSelection": _codyra,
    "RankGrowth": _growth,
    "GateSampler": _bayesian,
    "RankSampler": lambda: _momentum(decompose(network()), partial(RankSampler, generator=seeded())),
    "JointRankSampler": lambda: _momentum(decompose(network()), partial(JointRankSampler, generator=seeded())),
    "RankShrinker": lambda: _momentum(decompose(network()), partial(RankShrinker, threshold=0.5, every=3)),
    "TrainedRankPruning": lambda: _momentum(
        network(), partial(TrainedRankPruning, pattern="", energy=0.8, every=3, penalty=0.1)
    ),
    "GateSchedule": lambda: _momentum(
        replace_linears(network(), "0", partial(HGFLinear, rank=3, generator=seeded()), trainable="2"),
        partial(GateSchedule, warmup=2, freeze=5),
    ),
    "LoRASqueezer": lambda: _lora(
        lambda model, steps: LoRASqueezer(model, steps, {2: 3, 5: {"2": 1}}, moments="carry", scale=1.5)
    ),
    "ProgressiveSelection": _sara,
    "MomentRestart": lambda: _lora(lambda model, steps: MomentRestart(steps, [2, 5])),
    "GradientProjection": lambda: _momentum(
        Twins(network()), lambda both: GradientProjection(both.model, both.twin, every=2)
    ),
}


def action_names():
    """Names of all actions that the package defines."""
    for module in pkgutil.walk_packages(lowrank_ref.__path__, "lowrank_ref."):
        if not module.name.startswith(("lowrank_ref.kernels", "lowrank_ref.lab")):
            importlib.import_module(module.name)
    found, todo = set(), [Action]
    while todo:
        todo += todo[0].__subclasses__()
        kind = todo.pop(0)
        found |= {kind.__name__} if kind.__module__.startswith("lowrank_ref.") and kind is not Action else set()
    return found


def batch(step, dtype=None, rows=8):
    return torch.randn(rows, N, generator=seeded(100 + step), dtype=torch.float64).to(DEVICE, dtype or DTYPE)


def loss(model, x):
    """Distance of all outputs from 1, a mean over the rows."""
    y = model(x).float()
    return F.smooth_l1_loss(y, torch.ones_like(y))


def train(model, optimizer, steps, rows=slice(None), dtype=None):
    """Take the given steps, each on its own batch, of which this process sees `rows`."""
    for step in steps:
        optimizer.zero_grad()
        loss(model, batch(step, dtype)[rows]).backward()
        optimizer.step()


def subject(name, seed=0):
    """Model and optimizer of one distributed case: an adapter with Adam, or a network with the named optimizer."""
    if name in LAYERS:
        model = replace_linears(nn.Sequential(linear()), "0", lambda base: adapter(name, base=base, seed=seed))
        return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model = network()
    return model, optimizer(name, model)


def distributed(rank, world, folder):
    """One process of a DDP run over all cases: its share of the rows of each batch. Rank 0 saves what came out.

    Every process draws from another seed: all go on from what the first one drew.
    """
    results = {}
    for name in (*LAYERS, *OPTIMIZERS):
        model, steps = subject(name, seed=rank)
        train(nn.parallel.DistributedDataParallel(model), steps, range(3), rows=slice(rank, None, world))
        results[name] = model.state_dict()
    if rank == 0:
        torch.save(results, f"{folder}/results")


def distributed_layer(rank, world, folder, make):
    """One process of a DDP run over a layer that replaces the weight, built by make(base, generator=...).

    Every process draws from another seed: DDP must send rank 0's parameters and buffers to all.
    """
    model = make(linear(), generator=seeded(rank))
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    train(nn.parallel.DistributedDataParallel(model), steps, range(3), rows=slice(rank, None, world))
    torch.save(model.state_dict(), f"{folder}/rank {rank}")


def assert_dropout_on_the_update(layer, x, atol=1e-12):
    """Dropout of one half acts on what the update reads, and not on what the base reads."""
    torch.manual_seed(0)
    out = layer(x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(out, layer.base(x) + dropped @ layer.delta_weight().T, rtol=0, atol=atol)
    assert not torch.equal(dropped, x)


def assert_resumes(build, gradient):
    """Save an optimizer's run after four steps, load it elsewhere with weights_only, and go on to the same bits.

    `build()` returns (weights, optimizer), the same each time; `gradient(W, t)` is the gradient of W at step t. State
    keeps its dtypes, and a run without the saved state ends elsewhere.
    """

    def steps(weights, optimizer, times):
        for t in times:
            for W in weights:
                W.grad = gradient(W, t)
            optimizer.step()

    weights, optimizer = build()
    steps(weights, optimizer, range(4))  # with a gap of 3, in the middle of one
    file = io.BytesIO()
    torch.save({"weights": weights, "optimizer": optimizer.state_dict()}, file)
    steps(weights, optimizer, range(4, 9))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = build()
    for W, V in zip(resumed, saved["weights"]):
        W.data.copy_(V)
    again.load_state_dict(saved["optimizer"])
    for W, V in zip(weights, resumed):
        dtypes = [
            {key: value.dtype for key, value in o.state[p].items() if key != "step"}
            for o, p in ((optimizer, W), (again, V))
        ]
        assert dtypes[0] == dtypes[1]
    steps(resumed, again, range(4, 9))
    assert all(torch.equal(W, V) for W, V in zip(weights, resumed))
    fresh, forgetful = build()
    steps(fresh, forgetful, range(4, 9))
    assert not torch.equal(fresh[0], weights[0])
