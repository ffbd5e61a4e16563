"""Actions in transformers' Trainer and in accelerate: a run that was cut off goes on in the same bits."""

import warnings
from functools import partial

import pytest
import torch
from battery import seeded
from torch import nn

from lowrank_ref.adapters import LoRALinear, LoRASqueezer
from lowrank_ref.compression import MaestroLinear, RankSampler, RankShrinker
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.lowbit import GateSchedule, HGFLinear
from lowrank_ref.lowbit.hgf import hgf_layers
from lowrank_ref.ranks import ProximalGates, SoRALinear, SparsifyingSchedule

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from lowrank_ref.core.trainer import TrainerActions  # noqa: E402


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x, labels):
        return {"loss": (self.body(x) - labels).square().mean()}


DATA = [{"x": x, "labels": x.flip(0)} for x in torch.randn(64, 8, generator=seeded())]


def sora():
    """With an optimizer of one's own, and actions that are attached by hand."""
    model = replace_linears(Regression(), "", lambda layer: SoRALinear(layer, 4, generator=seeded()))
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=0.05, weight_decay=0.1))
    proximal = ProximalGates(model, optimizer, penalty=0.0)
    schedule = SparsifyingSchedule(proximal, [0.5, 1.0, 4.0], first=2, later=2)
    return model, [proximal.attach(optimizer), schedule.attach(optimizer)], optimizer


def hgf():
    """With the optimizer that the Trainer makes."""
    model = replace_linears(Regression(), "", partial(HGFLinear, rank=2, generator=seeded()))
    return model, [GateSchedule(model, warmup=4, freeze=5)], None


def maestro():
    model = replace_linears(Regression(), "", MaestroLinear.from_linear)
    return model, [RankShrinker(model, threshold=0.5, every=3), RankSampler(model, generator=seeded())], None


def squeezed():
    """With parameters that become others between the start and the checkpoint."""
    model = replace_linears(Regression(), "", lambda layer: LoRALinear(layer, 4, generator=seeded()))
    optimizer = torch.optim.AdamW(optimizer_groups(model, lr=0.05, weight_decay=0.1))
    return model, [LoRASqueezer(model, optimizer, {2: 3, 5: {"2": 1}}, scale=1.5)], optimizer


def run(made, folder, steps, callbacks=None, stop=None, **options):
    """Train to the end of the schedule, or up to a step at which the run is cut off."""
    model, actions, optimizer = made
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.05, save_steps=3, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    callbacks = [TrainerActions(*actions)] if callbacks is None else callbacks
    trainer = transformers.Trainer(
        model, arguments, train_dataset=DATA, callbacks=callbacks, optimizers=(optimizer, None)
    )

    class Cut(transformers.TrainerCallback):
        def on_save(self, args, state, control, **_):
            control.should_training_stop = state.global_step == stop

    trainer.add_callback(Cut())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=stop is None and any(folder.glob("checkpoint-*")))
    return model


def equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("make", [sora, hgf, maestro, squeezed])
def test_a_resumed_run_ends_in_the_same_bits(make, tmp_path):
    whole, first, second = make(), make(), make()
    run(whole, tmp_path / "a", 7)
    run(first, tmp_path / "b", 7, stop=3)
    run(second, tmp_path / "b", 7)
    assert equal(whole[0], second[0]) and not equal(whole[0], first[0])
    assert repr([a.state_dict() for a in whole[1]]) == repr([a.state_dict() for a in second[1]])
    assert make is not hgf or all(not layer.open for layer in hgf_layers(second[0]))


def test_without_the_state_the_weights_would_be_others(tmp_path):
    """What the callback is for, and the control of the test above."""
    run(sora(), tmp_path, 7, stop=3)
    blind = run(sora(), tmp_path, 7, callbacks=[])
    assert not equal(blind, run(sora(), tmp_path / "a", 7))


def test_what_was_attached_here_comes_off_and_what_was_not_stays(tmp_path):
    mine, theirs = hgf(), sora()
    run(mine, tmp_path / "a", 2)
    run(theirs, tmp_path / "b", 2)
    assert not mine[1][0].attached and all(action.attached for action in theirs[1])


def test_a_checkpoint_without_the_state_or_with_another_is_refused(tmp_path):
    run(hgf(), tmp_path / "a", 7, callbacks=[], stop=3)
    with pytest.raises(ValueError, match=r"no state of actions.*made with TrainerActions\(GateSchedule\)"):
        run(hgf(), tmp_path / "a", 7)
    run(hgf(), tmp_path / "b", 7, stop=3)
    model, actions, _ = hgf()
    with pytest.raises(ValueError, match=r"got the state of \['GateSchedule'\], wanted \['GateSchedule', 'GateSch"):
        run((model, [*actions, GateSchedule(model, warmup=1, freeze=2)], None), tmp_path / "b", 7)
    longer = GateSchedule(model, warmup=4, freeze=6)
    with pytest.raises(ValueError, match=r"checkpoint: got a state that cannot be loaded \(state: got .*'freeze': 5"):
        run((model, [longer], None), tmp_path / "b", 7)
    assert longer.steps == 0 and not longer.attached
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True builds callbacks without"):
        run(hgf(), tmp_path / "b", 7, restore_callback_states_from_checkpoint=True)


def test_two_callbacks_are_refused_when_they_resume(tmp_path):
    callbacks = lambda: [TrainerActions(*hgf()[1]), TrainerActions(*hgf()[1])]  # noqa: E731
    run(hgf(), tmp_path, 7, callbacks=callbacks(), stop=3)
    with pytest.raises(ValueError, match="got several TrainerActions; wanted one"):
        run(hgf(), tmp_path, 7, callbacks=callbacks())


def test_bad_actions_are_named(tmp_path, no_shape_checks):
    with pytest.raises(TypeError, match="actions: got Linear, wanted actions"):
        TrainerActions(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="actions: got none, wanted at least one"):
        run(hgf(), tmp_path, 1, callbacks=[TrainerActions()])


def test_an_action_on_another_optimizer_would_never_act(tmp_path):
    model, actions, _ = sora()
    with pytest.raises(ValueError, match=r"ProximalGates that is attached to another.*optimizers=\(optimizer, None"):
        run((model, actions, None), tmp_path, 1)
    model, actions, _ = sora()
    actions[0].detach()
    with pytest.raises(ValueError, match=r"ProximalGates that was made for another.*optimizers=\(optimizer, None"):
        run((model, actions, None), tmp_path, 1)


@pytest.mark.parametrize("make", [sora, hgf, maestro, squeezed])
def test_accelerate_saves_registered_actions(make, tmp_path):
    def run(stop=None, start=None):
        model, actions, optimizer = make()
        optimizer = optimizer or torch.optim.AdamW(optimizer_groups(model, lr=0.05))
        accelerator = accelerate.Accelerator(cpu=True)
        model, prepared = accelerator.prepare(model, optimizer)
        for action in actions:
            accelerator.register_for_checkpointing(action if action.attached else action.attach(prepared))
        if start:
            accelerator.load_state(str(tmp_path / "x"))
        for i in range(start or 0, stop or 7):
            prepared.zero_grad()
            accelerator.backward(model(**{k: v[None] for k, v in DATA[i].items()})["loss"])
            prepared.step()
        if stop:
            accelerator.save_state(str(tmp_path / "x"))
        return model

    whole = run()
    run(stop=3)
    assert equal(run(start=3), whole)
