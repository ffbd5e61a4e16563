"""The selection anew, half-way. Attachment, resuming and foreign states are in the battery."""

import copy

import pytest
import torch
from battery import network, seeded, train
from torch import nn

from lowrank_ref.adapters import ProgressiveSelection, SaRALinear
from lowrank_ref.adapters.sara import sara_layers
from lowrank_ref.core.layers import replace_linears


def trained(steps, *, at=3, decay=0.2, density=0.6, **options):
    model = replace_linears(network(), "", lambda layer: SaRALinear(layer, density))
    optimizer = torch.optim.AdamW([a.values for a in sara_layers(model).values()], lr=0.1, weight_decay=decay)
    selection = ProgressiveSelection(model, optimizer, at=at, **options).attach(optimizer)
    train(model, optimizer, range(steps))
    return model, optimizer, selection


def test_what_is_still_below_trains_on_and_the_rest_stays_to_the_bit():
    before, after = trained(2)[0], trained(3)[0]  # the same run, one step before and at the switch
    end = trained(8)[0]
    for a, b, c in zip(*(sara_layers(m).values() for m in (before, after, end))):
        assert bool(a.active.all())
        wanted = b.values.abs() < b.threshold
        assert torch.equal(b.active, wanted) and torch.equal(c.active, wanted) and 0 < int(wanted.sum()) < len(wanted)
        assert torch.equal(c.values[~wanted], b.values[~wanted])  # decay and momentum included
        assert (c.values[wanted] != b.values[wanted]).all()


def test_it_counts_what_it_keeps():
    model, _, selection = trained(4)
    for path, layer in sara_layers(model).items():
        assert selection.kept[path] == [len(layer.values), int(layer.active.sum())]


def test_kept_moments_go_on_as_masked_adam_and_reset_ones_start_again():
    """After the switch: Adam whose frozen entries have no gradient is Adam on the others alone."""
    for moments in ("keep", "reset"):
        model, optimizer, _ = trained(3, decay=0.0, moments=moments)
        layers = [*sara_layers(model).values()]
        alone = copy.deepcopy(layers)
        states = [optimizer.state.get(a.values) for a in layers]
        assert [s is None for s in states] == [moments == "reset"] * 2
        parts = [nn.Parameter(a.values[a.active].clone()) for a in alone]
        adam = torch.optim.AdamW(parts, lr=0.1, weight_decay=0.0)
        for p, a, state in zip(parts, layers, states):
            if state is not None:
                sliced = {key: v[a.active].clone() if v.ndim else v.clone() for key, v in state.items()}
                adam.state[p] = sliced
        for step in range(3, 6):
            optimizer.zero_grad()
            train(model, optimizer, [step])
            for p, a in zip(parts, layers):
                p.grad = a.values.grad[a.active].clone()
            adam.step()
        for p, a in zip(parts, layers):
            torch.testing.assert_close(a.values[a.active].detach(), p.detach(), rtol=0, atol=1e-12)


def test_the_control_freezes_as_many_drawn_ones():
    ours, drawn = (trained(5, rule=rule, generator=seeded())[0] for rule in ("below", "random"))
    for a, b in zip(sara_layers(ours).values(), sara_layers(drawn).values()):
        assert a.active.sum() == b.active.sum() and not torch.equal(a.active, b.active)


def test_a_second_narrowing_is_a_subset():
    model, optimizer, first = trained(3)
    first.detach()
    masks = [a.active.clone() for a in sara_layers(model).values()]
    ProgressiveSelection(model, optimizer, at=2).attach(optimizer)
    train(model, optimizer, range(3, 8))
    for a, mask in zip(sara_layers(model).values(), masks):
        assert not (a.active & ~mask).any()


def test_bad_input_is_named(no_shape_checks):
    model, optimizer, _ = trained(1)
    stranger = torch.optim.Adam(network().parameters())
    for call, name in (
        (lambda: ProgressiveSelection(network(), optimizer, at=1), "model"),
        (lambda: ProgressiveSelection(model, stranger, at=1), "optimizer"),
        (lambda: ProgressiveSelection(model, optimizer, at=0), "at"),
        (lambda: ProgressiveSelection(model, optimizer, at=1.5), "at"),
        (lambda: ProgressiveSelection(model, optimizer, at=1, moments="carry"), "moments"),
        (lambda: ProgressiveSelection(model, optimizer, at=1, rule="above"), "rule"),
        (lambda: ProgressiveSelection(model, optimizer, at=1).load_state_dict({"steps": -1, "kept": {}}), "steps"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got"):
            call()
