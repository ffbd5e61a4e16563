"""Losses of attacks against loops over the sorted logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_ref.robustness.attack_losses import check_labels, cross_entropy, dlr, ranked_class, targeted_dlr


def logits(n, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


@given(st.integers(4, 8), st.integers(0, 1000))
def test_each_loss_equals_a_loop(classes, seed):
    z, y = logits(6, classes, seed)
    for i, (row, label) in enumerate(zip(z.tolist(), y.tolist())):
        top = sorted(row, reverse=True)
        wrong = sorted((v for k, v in enumerate(row) if k != label), reverse=True)
        entropy = math.log(sum(map(math.exp, row))) - row[label]
        assert cross_entropy(z, y)[i].item() == pytest.approx(entropy, abs=1e-12)
        assert dlr(z, y)[i].item() == pytest.approx(-(row[label] - wrong[0]) / (top[0] - top[2]), abs=1e-9)
        for target in range(1, classes):
            wanted = -(row[label] - wrong[target - 1]) / (top[0] - (top[2] + top[3]) / 2)
            assert targeted_dlr(z, y, target=target)[i].item() == pytest.approx(wanted, abs=1e-9)


def test_dlr_does_not_see_scale_and_shift_and_is_positive_iff_fooled():
    z, y = logits(50, 10)
    for loss in (dlr, targeted_dlr):
        torch.testing.assert_close(loss(100 * z + 3, y), loss(z, y))
        assert torch.equal(loss(z, y) > 0, z.argmax(1) != y)


def test_dlr_has_a_gradient_where_cross_entropy_has_none():
    z = torch.tensor([[500.0, 0.0, -1.0, -2.0]], requires_grad=True)
    y = torch.tensor([0])
    assert not torch.autograd.grad(cross_entropy(z, y).sum(), z)[0].any()
    assert torch.autograd.grad(dlr(z, y).sum(), z)[0].any()


def test_a_class_of_the_clean_image_stays_the_target():
    """By rank at each point the loss would aim at class 1 in the end, and be below 0 where class 2 has won."""
    clean, now, y = torch.tensor([[5.0, 4, 3, 0]]), torch.tensor([[5.0, 4, 6, 0]]), torch.tensor([0])
    classes = ranked_class(clean, y, 2)
    assert classes.tolist() == [2] and ranked_class(clean, y).tolist() == [1]
    assert targeted_dlr(now, y, classes=classes).item() == 0.25
    assert targeted_dlr(now, y, target=2).item() == -0.25
    with pytest.raises(ValueError, match="target: got 4 with 4 classes"):
        ranked_class(clean, y, 4)


def test_no_label_is_ignored():
    """By PyTorch's default a label of -100 had the loss 0."""
    z, y = logits(4, 5)
    y[1] = -100
    for loss in (cross_entropy, dlr, targeted_dlr):
        with pytest.raises((IndexError, RuntimeError)):
            loss(z, y)
    with pytest.raises(ValueError, match="y: got labels from -100 to"):
        check_labels(y, 5)


def test_equal_logits_stay_finite():
    for loss in (dlr, targeted_dlr):
        assert bool(torch.isfinite(loss(torch.zeros(2, 5), torch.tensor([0, 1]))).all())


def test_too_few_classes_are_refused():
    z, y = logits(4, 2)
    with pytest.raises(ValueError, match="2 classes"):
        dlr(z, y)
    with pytest.raises(ValueError, match="target: got 1 with 2 classes"):
        targeted_dlr(z, y)
    z, y = logits(4, 5)
    for target in (0, 5):
        with pytest.raises(ValueError, match=f"target: got {target}"):
            targeted_dlr(z, y, target=target)
