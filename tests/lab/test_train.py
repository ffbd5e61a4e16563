import os
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear, RandLoRALinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lab import train as lab
from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.models import MLP
from lowrank_ref.lab.train import linear_decay, train, warmup_cosine
from lowrank_ref.optimizers import GaLoreAdamW, per_layer_updates
from lowrank_ref.pretraining.sltrain import SLTrainLinear
from lowrank_ref.ranks.sora import SoRALinear

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, :1] * X[:, 1:2]).sign()
BATCH = array_batches(X, Y, batch=16, seed=0)


def loss_fn(model, x, y):
    return F.mse_loss(model(x), y)


def setup(lr=0.05, optimizer=torch.optim.Adam, seed=0):
    model = MLP((4, 8, 1), generator=torch.Generator().manual_seed(seed))
    return model, optimizer(model.parameters(), lr=lr)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Counter:
    """An action that remembers how often it stepped."""

    def __init__(self):
        self.count = 0

    def step(self):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_train_is_the_loop_written_out():
    model, optimizer = setup()
    history = train(model, BATCH, loss_fn, optimizer, steps=7, schedule=linear_decay(10), clip=0.1, progress=False)

    other, optimizer = setup()
    losses = []
    for i in range(7):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 10)
        loss = loss_fn(other, *BATCH(i))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert history.loss == losses
    assert torch.equal(weights(model), weights(other))


def test_accumulating_equals_the_large_batch():
    model, optimizer = setup(optimizer=torch.optim.SGD)
    train(model, array_batches(X, Y, batch=16, seed=0), loss_fn, optimizer, steps=1, accumulate=4, progress=False)
    other, optimizer = setup(optimizer=torch.optim.SGD)
    train(other, lambda i: (X, Y), loss_fn, optimizer, steps=1, progress=False)
    assert torch.allclose(weights(model), weights(other), atol=1e-7)


def test_evaluation_runs_in_eval_mode_without_gradients_and_at_the_end():
    model = nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.5))
    seen = []

    def evaluate(m):
        seen.append((m.training, torch.is_grad_enabled()))
        return {"accuracy": torch.tensor(0.5)}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = train(model, BATCH, loss_fn, optimizer, steps=7, evaluate=evaluate, every=3, progress=False)
    assert [e["step"] for e in history.evaluations] == [3, 6, 7]
    assert history.evaluations[0] == {"step": 3, "accuracy": 0.5}
    assert seen == [(False, False)] * 3 and model.training


def test_model_mode_is_left_alone():
    model, optimizer = setup()
    model.eval()
    train(model, BATCH, loss_fn, optimizer, steps=1, evaluate=lambda m: {}, progress=False)
    assert not model.training


def test_what_trains_is_in_training_mode_and_the_rest_stays_as_it_came():
    parts = {
        "base": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)),
        "head": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    }
    model = nn.Sequential(*parts.values()).eval()
    model[0][2].train()  # as someone who wants this norm to follow the data leaves it
    replace_linears(model, r"^0\.0$", partial(LoRALinear, rank=2, dropout=0.5), trainable=r"^1\.")
    came = [m.training for m in model.modules()]
    seen = {}

    def loss_fn(model, x, y):
        seen.update({path: m.training for path, m in model.named_modules()})
        return F.mse_loss(model(x), y)

    def evaluate(model):
        assert not any(m.training for m in model.modules())
        return {}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, BATCH, loss_fn, optimizer, steps=3, evaluate=evaluate, every=1, progress=False)
    trains = {"0.0", "0.0.dropout", "0.2", "1", "1.0", "1.1", "1.2", "1.3"}
    assert {path for path, training in seen.items() if training} == trains
    assert [m.training for m in model.modules()] == came


def test_modes_are_given_back_after_an_error():
    model, optimizer = setup()
    model.eval()
    with pytest.raises(ZeroDivisionError):
        train(model, BATCH, lambda *_: 1 / 0, optimizer, steps=1, progress=False)
    assert not any(m.training for m in model.modules())


def test_actions_step_after_the_optimizer():
    model, optimizer = setup()
    order = []
    optimizer.register_step_post_hook(lambda *_: order.append("optimizer"))
    action = Counter()
    action.step = lambda: order.append("action")
    train(model, BATCH, loss_fn, optimizer, steps=2, actions=[action], progress=False)
    assert order == ["optimizer", "action"] * 2


def test_a_loss_that_is_not_finite_stops_with_its_step():
    model, optimizer = setup()

    def bad(model, x, y):
        return loss_fn(model, x, y) * (float("nan") if bad.calls.append(0) or len(bad.calls) == 3 else 1)

    bad.calls = []
    with pytest.raises(FloatingPointError, match="got nan at step 2"):
        train(model, BATCH, bad, optimizer, steps=5, progress=False)


def test_schedules():
    assert [linear_decay(4)(s) for s in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    cosine = warmup_cosine(12, warmup=2, final=0.2)
    assert [cosine(0), cosine(1), cosine(2)] == [0.5, 1.0, 1.0]
    assert cosine(7) == pytest.approx(0.6) and cosine(12) == pytest.approx(0.2) == cosine(99)
    assert warmup_cosine(4, warmup=0)(0) == 1
    with pytest.raises(ValueError, match="warmup: got 4"):
        warmup_cosine(4, warmup=4)


def test_schedule_scales_every_group_and_starts_from_the_first_rate_again():
    model, _ = setup()
    first, second = model.layers
    optimizer = torch.optim.SGD([{"params": first.parameters(), "lr": 1e-3}, {"params": second.parameters()}], lr=1e-2)
    for _ in range(2):
        train(model, BATCH, loss_fn, optimizer, steps=3, schedule=lambda s: 1 / (1 + s), progress=False)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3 / 3, 1e-2 / 3])


@pytest.mark.parametrize("options", [dict(steps=0), dict(steps=1, accumulate=0)])
def test_train_refuses(options):
    with pytest.raises(ValueError, match="steps, accumulate"):
        train(*setup()[:1], BATCH, loss_fn, setup()[1], progress=False, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(clip=-1.0), "clip: got -1.0"),
        (dict(clip=0.0), "clip: got 0.0"),
        (dict(clip=float("nan")), "clip: got nan"),
        (dict(every=-1), "every: got -1"),
        (dict(save_every=-1), "save_every: got -1"),
        (dict(save_every=5), "save_every: got 5 without a checkpoint"),
        (dict(schedule=lambda s: -1.0), r"schedule\(0\): got -1.0"),
        (dict(schedule=lambda s: float("nan")), r"schedule\(0\): got nan"),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(options, message):
    model, optimizer = setup()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        train(model, BATCH, loss_fn, optimizer, progress=False, **{"steps": 2, **options})
    assert torch.equal(weights(model), before)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    "options", [dict(steps=2.5), dict(steps=True), dict(accumulate=1.0), dict(every="3"), dict(clip="1")]
)
def test_arguments_of_a_wrong_type_are_named(options):
    model, optimizer = setup()
    with pytest.raises(TypeError, match=f"{next(iter(options))}: got"):
        train(model, BATCH, loss_fn, optimizer, progress=False, **{"steps": 2, **options})


def test_an_optimizer_that_trains_nothing_of_the_model_is_noticed():
    model, optimizer = setup()
    replace_linears(model, "0", partial(LoRALinear, rank=2))  # after the optimizer was built
    with pytest.raises(ValueError, match="none of the 2 trained parameters"):
        train(model, BATCH, loss_fn, optimizer, steps=2, progress=False)


@pytest.mark.parametrize("options", [dict(clip=1.0), dict(accumulate=2)])
def test_updates_inside_backward_cannot_be_clipped_or_accumulated(options):
    model, _ = setup()
    optimizer = GaLoreAdamW(model.parameters(), lr=0.01)
    hooks = per_layer_updates(optimizer)
    before = weights(model)
    with pytest.raises(ValueError, match="per-layer updates"):
        train(model, BATCH, loss_fn, optimizer, steps=2, progress=False, **options)
    assert torch.equal(weights(model), before)
    train(model, BATCH, loss_fn, optimizer, steps=2, progress=False)
    for hook in hooks:
        hook.remove()
    train(model, BATCH, loss_fn, optimizer, steps=2, progress=False, **options)  # ordinary steps again


# --- checkpoints ------------------------------------------------------------------------------------------------------


def noisy(model, x, y):
    """A loss that uses PyTorch's random state, which a checkpoint must restore too."""
    return F.mse_loss(F.dropout(model(x), 0.1), y)


def test_resume_is_bit_identical(tmp_path):
    def run(steps, path, seed):
        torch.manual_seed(seed)
        model, optimizer = setup()
        action = Counter()
        history = train(
            model, BATCH, noisy, optimizer, steps=steps, schedule=linear_decay(20), actions=[action],
            evaluate=lambda m: {"size": weights(m).norm()}, every=5, checkpoint=path, progress=False,
        )  # fmt: skip
        return model, optimizer, action, history

    whole = run(20, tmp_path / "whole.pt", 1)
    run(11, tmp_path / "part.pt", 1)
    resumed = run(20, tmp_path / "part.pt", 2)  # another seed: the checkpoint's random state counts
    assert torch.equal(weights(whole[0]), weights(resumed[0]))
    for one, two in zip(whole[1].state.values(), resumed[1].state.values()):
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert whole[2].count == resumed[2].count == 20
    assert whole[3].loss == resumed[3].loss
    # The run that ended at 11 evaluated there too.
    assert [e["step"] for e in resumed[3].evaluations] == [5, 10, 11, 15, 20]


def test_a_finished_run_is_not_trained_again(tmp_path):
    model, optimizer = setup()
    first = train(model, BATCH, loss_fn, optimizer, steps=3, checkpoint=tmp_path / "c.pt", progress=False)
    again, optimizer = setup(seed=9)
    second = train(again, pytest.fail, pytest.fail, optimizer, steps=3, checkpoint=tmp_path / "c.pt", progress=False)
    assert torch.equal(weights(model), weights(again)) and first == second


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    model, optimizer = setup()
    train(model, BATCH, loss_fn, optimizer, steps=2, checkpoint=path, progress=False)
    before = path.read_bytes()

    def torn(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        train(model, BATCH, loss_fn, optimizer, steps=3, checkpoint=path, progress=False)
    assert path.read_bytes() == before


def _damage(kind, path, tmp_path):
    model, optimizer = setup()
    train(model, BATCH, loss_fn, optimizer, steps=4, actions=[Counter()], checkpoint=path, progress=False)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "weights of something else":
        torch.save(model.state_dict(), path)
    elif kind == "another model":
        other = MLP((4, 8, 8, 1))
        optimizer = torch.optim.Adam(other.parameters())
        path.unlink()
        train(other, BATCH, loss_fn, optimizer, steps=4, actions=[Counter()], checkpoint=path, progress=False)
    elif kind == "another optimizer":
        groups = [{"params": [p]} for p in model.parameters()]
        path.unlink()
        train(model, BATCH, loss_fn, torch.optim.Adam(groups), steps=4, actions=[Counter()], checkpoint=path,
              progress=False)  # fmt: skip
    elif kind == "another action":
        reseal(path, lambda state: state.update(actions=[{"other": 1}]))
    elif kind == "an action of another class":
        reseal(path, lambda state: state["cards"].update(actions=["Other"]))
    elif kind == "no action":
        reseal(path, lambda state: (state.update(actions=[]), state["cards"].update(actions=[])))
    elif kind == "past the end":
        reseal(path, lambda state: state.update(history={"loss": [0.0] * 9, "evaluations": []}))
    elif kind == "no seal":
        path.write_bytes(path.read_bytes()[: -lab.SEAL])
    elif kind == "no random state":
        reseal(path, lambda state: state.update(rng=torch.zeros(3, dtype=torch.uint8)))
    elif kind == "an old format":
        reseal(path, lambda state: state.update(format="lowrank_ref.lab.train, version 1"))


def reseal(path, edit):
    """Write a checkpoint again with another content, as if train() had written that."""
    state = torch.load(path, weights_only=True)
    edit(state)
    path.write_bytes(lab._bytes(state))


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "text", "empty", "weights of something else", "another model", "another optimizer",
        "another action", "an action of another class", "no action", "past the end", "no seal", "no random state",
        "an old format",
    ],
)  # fmt: skip
def test_bad_checkpoints_raise_and_change_nothing(kind, tmp_path):
    path = tmp_path / "c.pt"
    _damage(kind, path, tmp_path)
    model, optimizer = setup(seed=5)
    train(model, BATCH, loss_fn, optimizer, steps=2, progress=False)  # so that there is optimizer state to lose
    action = Counter()
    action.count = 77
    before = weights(model)
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="checkpoint"):
        train(model, BATCH, loss_fn, optimizer, steps=8, actions=[action], checkpoint=path, progress=False)
    assert torch.equal(weights(model), before)
    assert all(torch.equal(s["exp_avg"], old) for s, old in zip(optimizer.state.values(), moments))
    assert action.count == 77 and torch.equal(torch.get_rng_state(), random)
    assert optimizer.param_groups[0]["lr"] == 0.05 and "initial_lr" not in optimizer.param_groups[0]


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.0),
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "betas": partial(torch.optim.Adam, betas=(0.8, 0.999)),
    "weight decay": partial(torch.optim.Adam, weight_decay=0.1),
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "lr": lambda params, lr: torch.optim.Adam(params, lr=2 * lr),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", [None, linear_decay(10)])
def test_another_optimizer_or_option_does_not_resume(name, schedule, tmp_path):
    for other in OPTIMIZERS:
        path = tmp_path / other
        model, optimizer = setup(optimizer=OPTIMIZERS[other])
        how = dict(checkpoint=path, schedule=schedule, progress=False)
        train(model, BATCH, loss_fn, optimizer, steps=2, **how)
        model, optimizer = setup(optimizer=OPTIMIZERS[name], seed=5)
        if other == name:
            train(model, BATCH, loss_fn, optimizer, steps=3, **how)
            train(model, BATCH, loss_fn, optimizer, steps=4, **how)  # with the same optimizer again
            continue
        before = weights(model)
        with pytest.raises(ValueError, match="optimizer.* in the file, .* here"):
            train(model, BATCH, loss_fn, optimizer, steps=3, **how)
        assert torch.equal(weights(model), before) and not optimizer.state


def test_the_same_number_of_other_parameters_does_not_resume(tmp_path):
    model, _ = setup()
    first, second = (list(layer.parameters()) for layer in model.layers)
    how = dict(checkpoint=tmp_path / "c", progress=False)
    train(model, BATCH, loss_fn, torch.optim.Adam(first), steps=2, **how)
    with pytest.raises(ValueError, match="optimizer, group 0, params"):
        train(model, BATCH, loss_fn, torch.optim.Adam(second), steps=3, **how)


def adapted(kind=LoRALinear, seed=0, **options):
    model, _ = setup(seed=seed)
    replace_linears(model, "", lambda base: kind(base, 1, generator=torch.Generator().manual_seed(seed), **options))
    return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)


def test_another_scale_or_class_of_a_layer_does_not_resume(tmp_path):
    how = dict(checkpoint=tmp_path / "c", progress=False)
    model, optimizer = adapted(alpha=16)
    train(model, BATCH, loss_fn, optimizer, steps=2, **how)
    for other in (adapted(alpha=64), adapted(SoRALinear, alpha=16, gate="ones")):
        with pytest.raises(ValueError, match="layer layers.0: .*in the file"):
            train(other[0], BATCH, loss_fn, other[1], steps=3, **how)
    model, optimizer = adapted(alpha=16, seed=3)
    train(model, BATCH, loss_fn, optimizer, steps=3, **how)


def test_another_scale_of_a_layer_that_is_the_weight_does_not_resume(tmp_path):
    def build(alpha):
        torch.manual_seed(0)
        model = nn.Sequential(SLTrainLinear.from_linear(nn.Linear(4, 4), rank=2, alpha=alpha), nn.Linear(4, 1))
        return model, torch.optim.Adam(model.parameters())

    how = dict(checkpoint=tmp_path / "c", progress=False)
    model, optimizer = build(8)
    train(model, BATCH, loss_fn, optimizer, steps=2, **how)
    model, optimizer = build(32)
    with pytest.raises(ValueError, match="layer 0: .*'scale': 4.0.*in the file.*'scale': 16.0"):
        train(model, BATCH, loss_fn, optimizer, steps=3, **how)


def test_a_layer_that_refuses_its_state_leaves_all_as_it_was(tmp_path):
    """RandLoRA's second layer finds that the recipe is not that of its seed, when the first layer is written."""
    path = tmp_path / "c"
    model, optimizer = adapted(RandLoRALinear)
    train(model, BATCH, loss_fn, optimizer, steps=2, checkpoint=path, progress=False)
    reseal(path, lambda state: state["model"]["layers.1.recipe"][1:].add_(5))
    model, optimizer = adapted(RandLoRALinear, seed=4)
    before, outputs = {k: v.clone() for k, v in model.state_dict().items()}, model(X)
    with pytest.raises(ValueError, match=r"layers\.1\.recipe"):
        train(model, BATCH, loss_fn, optimizer, steps=3, checkpoint=path, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not optimizer.state
    assert torch.equal(model(X), outputs)


@pytest.mark.parametrize("wrap", ["whole", "a layer"])
def test_compiled_and_plain_models_share_checkpoints(wrap, tmp_path):
    def build(compiled, seed):
        model, optimizer = setup(seed=seed)
        if compiled and wrap == "a layer":
            model.layers[0] = torch.compile(model.layers[0], backend="eager")
        whole = torch.compile(model, backend="eager") if compiled and wrap == "whole" else model
        return whole, optimizer, model

    def straight(compiled, x, y):  # the wrapper's names are what is tested, not the compiler
        return loss_fn(getattr(compiled, "_orig_mod", compiled) if wrap == "whole" else plain(compiled), x, y)

    def plain(model):
        return lambda x: model.layers[1](model.activation(getattr(model.layers[0], "_orig_mod", model.layers[0])(x)))

    ends = []
    for first, second in ((False, False), (True, False), (False, True)):
        how = dict(checkpoint=tmp_path / f"{first}{second}", progress=False)
        model, optimizer, _ = build(first, 0)
        train(model, BATCH, straight, optimizer, steps=2, **how)
        model, optimizer, inner = build(second, 1)
        train(model, BATCH, straight, optimizer, steps=4, **how)
        ends.append(weights(inner))
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def poison(where):
    """A loss that is finite, and whose gradient is NaN in the step with this number (from 0)."""

    def bad(model, i, x, y):
        loss = loss_fn(model, x, y)
        size = model.layers[0].weight.square().sum() - model.layers[0].weight.square().sum()  # 0
        return loss + size.sqrt() if i == where else loss  # d sqrt(0) = inf, times 0

    return bad, lambda i: (i, *BATCH(i))


@pytest.mark.parametrize("saves", [0, 3])
def test_weights_with_nan_never_replace_a_good_checkpoint(saves, tmp_path):
    path = tmp_path / "c"
    model, optimizer = setup()
    train(model, BATCH, loss_fn, optimizer, steps=3, checkpoint=path, progress=False)
    good = path.read_bytes()
    bad, numbered = poison(5)
    with pytest.raises(FloatingPointError, match=r"NaN or infinity in \['layers.0.weight'.*after step 5"):
        train(model, numbered, bad, optimizer, steps=6, checkpoint=path, save_every=saves, progress=False)
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["c"]
    again, optimizer = setup(seed=2)
    train(again, BATCH, loss_fn, optimizer, steps=6, checkpoint=path, progress=False)  # goes on from the good one


def test_the_last_step_is_checked_without_a_checkpoint_too():
    model, optimizer = setup()
    bad, numbered = poison(1)
    with pytest.raises(FloatingPointError, match="after step 1"):
        train(model, numbered, bad, optimizer, steps=2, progress=False)


def test_statistics_and_moments_are_checked_and_masks_are_not(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.register_buffer("mask", torch.full((2,), -torch.inf))
    optimizer = torch.optim.Adam(model.parameters())
    how = dict(checkpoint=tmp_path / "c", progress=False)
    train(model, BATCH, loss_fn, optimizer, steps=2, **how)
    train(model, BATCH, loss_fn, optimizer, steps=3, **how)  # and its own mask is read back
    model[0].running_mean[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"\['0.running_mean'\]"):
        train(model.eval(), BATCH, lambda m, x, y: loss_fn(m[1], x, y), optimizer, steps=4, progress=False)
    model[0].running_mean.zero_()
    optimizer.state[model[1].weight]["exp_avg_sq"].fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="optimizer's exp_avg_sq"):
        train(model, BATCH, loss_fn, optimizer, steps=4, progress=False)


class Silent:
    def step(self):
        raise AssertionError("a step was taken")


class Unsavable(Silent):
    def state_dict(self):
        return {"hook": lambda: None}

    def load_state_dict(self, state):
        pass


def never(*_):
    raise AssertionError("a step was taken")


def test_what_would_lose_the_work_at_its_end_is_noticed_at_its_beginning(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (tmp_path / "no" / "folder" / "c", [], FileNotFoundError, "whose folder does not exist"),
        (tmp_path, [], ValueError, "no regular file"),
        (tmp_path / "pipe", [], ValueError, "no regular file"),
        (tmp_path / "c", [Unsavable()], ValueError, "cannot be saved and read back"),
    ]
    for path, actions, error, message in cases:
        model, optimizer = setup()
        with pytest.raises(error, match=message):
            train(model, never, never, optimizer, steps=2, actions=actions, checkpoint=path, progress=False)
    model, optimizer = setup()
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(ValueError, match="cannot be saved and read back"):
        train(model, never, never, optimizer, steps=2, checkpoint=tmp_path / "c", progress=False)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.usefixtures("no_shape_checks")
def test_an_action_without_a_state_is_noticed_at_the_beginning(tmp_path):
    model, optimizer = setup()
    with pytest.raises(TypeError, match="actions: got Silent"):
        train(model, never, never, optimizer, steps=2, actions=[Silent()], checkpoint=tmp_path / "c", progress=False)
    with pytest.raises(TypeError, match="actions: got object"):
        train(model, never, never, optimizer, steps=2, actions=[object()], progress=False)
