"""Actions: attached to an optimizer they act after its steps, and only then. Those of the papers are in the battery."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lowrank_ref.core.actions import Action, innermost
from lowrank_ref.lab.train import train


class Recorder(Action):
    """Notes the learning rate at which it acts."""

    state_names = ("rates",)

    def __init__(self, optimizer):
        self.watched, self.rates = optimizer, []

    def act(self):
        self.rates.append(self.watched.param_groups[0]["lr"])


def linear():
    return nn.Linear(3, 2)


def backward(model):
    model(torch.ones(4, 3)).square().mean().backward()


def test_it_acts_after_the_step_and_before_the_schedule_until_it_is_detached():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    recorder = Recorder(optimizer).attach(optimizer)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    recorder.detach()
    optimizer.step()
    recorder.detach()  # once more does nothing
    assert recorder.rates == [1.0, 0.5, 0.25]
    recorder.step()
    recorder.attach(optimizer)
    optimizer.step()
    assert recorder.rates[3:] == [0.125, 0.125]


def test_several_act_in_the_order_of_attachment():
    optimizer, order = torch.optim.SGD(linear().parameters(), lr=1.0), []

    class Named(Action):
        def __init__(self, name):
            self.name = name

        def act(self):
            order.append(self.name)

    for name in "abc":
        Named(name).attach(optimizer)
    optimizer.step()
    assert order == ["a", "b", "c"]


def test_a_step_that_raises_or_is_skipped_is_followed_by_nothing():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recorder = Recorder(optimizer).attach(optimizer)

    def closure():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 3)).mean()).backward()
        if bad:
            model.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert len(recorder.rates) == (not bad)


def test_what_is_no_optimizer_is_named(no_shape_checks):
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(linear().parameters(), lr=1.0), 1)
    for wrong in (None, linear(), schedule):
        with pytest.raises(TypeError, match=f"optimizer: got {type(wrong).__name__}, wanted a torch.optim.Optimizer"):
            Recorder(None).attach(wrong)


def test_wrappers_are_taken_off():
    optimizer = torch.optim.SGD(linear().parameters(), lr=1.0)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.optimizer = inner  # like accelerate's, without PyTorch's own set-up

    assert innermost(Wrapper(Wrapper(optimizer))) is optimizer is innermost(optimizer)


def test_state_is_copied_and_checked():
    recorder = Recorder(torch.optim.SGD(linear().parameters(), lr=1.0))
    recorder.step()
    state = recorder.state_dict()
    recorder.step()
    assert state == {"rates": [1.0]}
    with pytest.raises(ValueError, match=r"state: got keys \['rate'\], wanted \['rates'\]"):
        recorder.load_state_dict({"rate": [3.0]})
    recorder.load_state_dict(state)
    recorder.step()
    assert state == {"rates": [1.0]} and recorder.rates == [1.0, 1.0]


def test_copies_and_pickles_are_not_attached():
    optimizer = torch.optim.SGD(linear().parameters(), lr=1.0)
    recorder = Recorder(optimizer).attach(optimizer)
    for twin in (copy.deepcopy(recorder), pickle.loads(pickle.dumps(recorder))):
        assert not twin.attached and recorder.attached
        twin.step()
    optimizer.step()
    assert recorder.rates == [1.0]


def test_the_training_loop_saves_attached_actions_and_does_not_call_them(tmp_path):
    def run(steps, attached, checkpoint=None):
        torch.manual_seed(0)
        model = linear()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        recorder = Recorder(optimizer)
        if attached:
            recorder.attach(optimizer)
        options = {"schedule": lambda t: 1 / (t + 1), "progress": False, "checkpoint": checkpoint}
        loss = lambda model, x: model(x).square().mean()  # noqa: E731
        train(model, lambda i: (torch.ones(4, 3),), loss, optimizer, steps=steps, actions=[recorder], **options)
        return recorder.rates

    wanted = [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert run(4, False) == run(4, True) == wanted
    run(2, True, tmp_path / "x")
    assert run(4, True, tmp_path / "x") == wanted


@pytest.mark.slow
def test_inside_transformers_trainer(tmp_path):
    """Its own place for callbacks, on_step_end, comes after the schedule: rates would be those of the next step."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, x, labels):
            return {"loss": (self.linear(x) - labels).square().mean()}

    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 4)
    recorder = Recorder(optimizer).attach(optimizer)
    data = [{"x": torch.ones(3), "labels": torch.zeros(2)}] * 16
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule)).train()
    assert recorder.rates == [1.0, 0.75, 0.5, 0.25]
