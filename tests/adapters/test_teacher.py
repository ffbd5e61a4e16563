"""The teacher is the pretrained model, whatever trains; and which tokens a response consists of."""

from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import DoRALinear, LoRALinear, PiSSALinear, response_logits, teacher_logits
from lowrank_ref.core.layers import replace_linears


def network(make, dropout=0.0):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    plain = nn.Sequential(*model)
    wanted = plain.eval()(gaussian(5, 6)).detach()
    replace_linears(model, "", partial(make, rank=2, dropout=dropout, generator=seeded()))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3)
    return model, wanted


@pytest.mark.parametrize("make", [LoRALinear, PiSSALinear, DoRALinear])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_pretrained_model_and_leaves_no_trace(make, training):
    model, wanted = network(make, dropout=0.3)
    model.train(training)
    model[2].train(not training)  # modes that differ must come back as they were
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    got = teacher_logits(model, gaussian(5, 6))
    assert torch.equal(got, wanted) and not got.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # BatchNorm's too
    assert not torch.allclose(model.eval()(gaussian(5, 6)), wanted)


def test_a_failing_forward_leaves_the_adapters_on():
    model, _ = network(LoRALinear)
    model.train()
    with pytest.raises(RuntimeError):
        teacher_logits(model, gaussian(5, 7))
    assert isinstance(model[0], LoRALinear) and all(module.training for module in (model, model[0], model[2]))


def test_a_transformers_model_gives_its_logits(bert, tokens):
    plain, model = bert(), bert()
    replace_linears(model, r"attention\.self\.(query|value)$", partial(PiSSALinear, rank=4, alpha=4))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    assert torch.equal(teacher_logits(model, input_ids=tokens), plain(tokens).logits)


def test_a_head_that_trains_is_part_of_the_teacher_as_it_is_now():
    model, _ = network(LoRALinear)
    model[3].base.weight.data.zero_(), model[3].base.bias.data.zero_()
    assert not teacher_logits(model, gaussian(5, 6)).any()


def test_without_adapters_there_is_no_teacher():
    with pytest.raises(ValueError, match="model: got Sequential, wanted a model that contains an adapter"):
        teacher_logits(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3))


def test_response_logits_by_a_loop():
    logits, labels = gaussian(3, 6, 4), torch.full((3, 6), -100)
    labels[0, 2:5], labels[1, 0], labels[2, 5] = 1, 2, 3  # the first label of a sentence is predicted by nothing
    rows = [logits[b, t] for b in range(3) for t in range(5) if labels[b, t + 1] != -100]
    assert torch.equal(response_logits(logits, labels), torch.stack(rows))
    assert len(rows) == 4
    # the same places as those of transformers' loss
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    assert int((shifted != 0).sum()) == len(rows)


def test_padding_changes_nothing():
    logits, labels = gaussian(2, 5, 4), torch.randint(4, (2, 5), generator=seeded())
    padded = torch.cat([logits, gaussian(2, 3, 4, seed=5)], 1), torch.cat([labels, torch.full((2, 3), -100)], 1)
    assert torch.equal(response_logits(*padded), response_logits(logits, labels))


def test_bad_labels_are_named(no_shape_checks):
    with pytest.raises(ValueError, match=r"labels: got shape \(2, 4\), wanted \(2, 5\)"):
        response_logits(gaussian(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64))
    labels = torch.full((2, 5), -100)
    labels[:, 0] = 1
    with pytest.raises(ValueError, match="labels: got none but -100"):
        response_logits(gaussian(2, 5, 3), labels)
