import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_ref.lab.data import array_batches
from lowrank_ref.lab.models import MLP
from lowrank_ref.lab.train import linear_decay, train, warmup_cosine

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


SCRIPT = textwrap.dedent(
    """
    import sys, time, torch
    from torch.nn import functional as F
    from lowrank_ref.lab.data import array_batches
    from lowrank_ref.lab.models import MLP
    from lowrank_ref.lab.train import train

    torch.set_num_threads(1)
    path, slow = sys.argv[1], float(sys.argv[2])
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=g), torch.randn(64, 1, generator=g)
    torch.manual_seed(0)
    model = MLP((4, 8, 1), generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(model, x, y):
        time.sleep(slow)
        return F.mse_loss(F.dropout(model(x), 0.1), y)

    train(model, array_batches(x, y, batch=16, seed=0), loss, optimizer, steps=40, checkpoint=path, save_every=3,
          progress=False)
    """
)


def test_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    subprocess.run([sys.executable, script, whole, "0"], check=True)

    process = subprocess.Popen([sys.executable, script, part, "0.25"])
    for _ in range(600):  # until it has written something, at most a minute
        if part.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(torch.load(part, weights_only=True)["history"]["loss"])
    assert 3 <= done < 40

    subprocess.run([sys.executable, script, part, "0"], check=True)
    one, two = (torch.load(p, weights_only=True) for p in (whole, part))
    assert one["history"] == two["history"] and len(one["history"]["loss"]) == 40
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    assert torch.equal(one["rng"], two["rng"])


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
        state = torch.load(path, weights_only=True)
        torch.save({**state, "actions": [{"other": 1}]}, path)
    elif kind == "no action":
        state = torch.load(path, weights_only=True)
        torch.save({**state, "actions": []}, path)
    elif kind == "past the end":
        state = torch.load(path, weights_only=True)
        torch.save({**state, "history": {"loss": [0.0] * 9, "evaluations": []}}, path)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "text", "empty", "weights of something else", "another model", "another optimizer",
        "another action", "no action", "past the end",
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
