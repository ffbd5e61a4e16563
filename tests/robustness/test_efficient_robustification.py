"""Efficient robustification: every formula against a loop, and what stays as it was."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import LoRALinear
from lowrank_ref.core.io import load_tensors, save_tensors
from lowrank_ref.core.layers import merge_adapters, replace_linears
from lowrank_ref.robustness import Heads, ThreeHeads, certainty, choose_head, student_loss, weighted_distillation
from lowrank_ref.robustness.efficient_robustification import entropy_of

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
seeds = st.integers(0, 1000)


def randoms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three(n, classes, seed=0):
    return Heads(*(2 * randoms(n, classes, seed=seed + k) for k in range(3)))


def softmax(row, T=1.0):
    total = sum(math.exp(v / T) for v in row)
    return [math.exp(v / T) / total for v in row]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


# --- formulas ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 6), seeds)
def test_certainty_equals_a_loop(n, classes, seed):
    p = randoms(n, classes, seed=seed).softmax(1)
    for row, omega, H in zip(p.tolist(), certainty(p).tolist(), entropy_of(p).tolist()):
        assert pytest.approx(-sum(v * math.log(v) for v in row), abs=1e-12) == H
        assert omega == pytest.approx(math.exp(-H / math.log(classes)), abs=1e-12)
        assert 1 / math.e - 1e-12 <= omega <= 1


def test_certainty_at_its_ends():
    close(certainty(torch.eye(3, dtype=torch.float64)), torch.ones(3, dtype=torch.float64))
    close(certainty(torch.full((1, 5), 0.2, dtype=torch.float64)), torch.full((1,), 1 / math.e, dtype=torch.float64))


@given(st.integers(1, 6), st.integers(2, 6), seeds, st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_distillation_equals_a_loop(n, classes, seed, T):
    z, g, omega = (
        randoms(n, classes, seed=seed),
        randoms(n, classes, seed=seed + 1),
        randoms(n, seed=seed + 2).sigmoid(),
    )
    rows = [kl(softmax(b, T), softmax(a, T)) for a, b in zip(z.tolist(), g.tolist())]
    wanted = T**2 * sum(w * v for w, v in zip(omega.tolist(), rows)) / n
    assert weighted_distillation(z, g, omega, temperature=T).item() == pytest.approx(wanted, abs=1e-11)
    plain = weighted_distillation(z, g, temperature=T)
    close(plain, weighted_distillation(z, g, torch.ones(n, dtype=torch.float64), temperature=T))
    assert plain >= 0


def test_a_student_that_is_its_teacher_has_no_gradient():
    z = randoms(5, 4).requires_grad_()
    weighted_distillation(z, z.detach().clone(), randoms(5).exp()).backward()
    close(z.grad, torch.zeros_like(z))


def test_at_a_high_temperature_the_gradient_is_the_difference_of_centred_logits():
    z, g = randoms(1, 5).requires_grad_(), randoms(1, 5, seed=1)
    weighted_distillation(z, g, temperature=1e4).backward()
    centred = [t - t.mean() for t in (z.detach(), g)]
    torch.testing.assert_close(z.grad, (centred[0] - centred[1]) / 5, rtol=1e-3, atol=1e-5)


def test_a_uniform_teacher_pulls_to_the_highest_entropy():
    z = randoms(1, 4).requires_grad_()
    optimizer = torch.optim.SGD([z], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        weighted_distillation(z, torch.zeros(1, 4, dtype=torch.float64)).backward()
        optimizer.step()
    assert entropy_of(z.detach().softmax(1)).item() == pytest.approx(math.log(4), abs=1e-6)


@given(st.integers(1, 6), st.integers(2, 5), seeds)
def test_the_loss_equals_a_loop(n, classes, seed):
    u, m, clean = three(n, classes, seed)
    g, omega = randoms(n, classes, seed=seed + 5), randoms(n, seed=seed + 6).sigmoid()
    y = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    total = 0.0
    for k in range(n):
        rows = [z[k].tolist() for z in (u, m, clean)]
        total += sum(-math.log(softmax(row)[y[k]]) for row in rows) / n
        total += 0.7 * sum(9 * omega[k].item() * kl(softmax(g[k].tolist(), 3), softmax(r, 3)) for r in rows[:2]) / n
    got = student_loss(u, m, clean, y, g, omega, kd_weight=0.7, temperature=3.0)
    assert got.item() == pytest.approx(total, abs=1e-10)


def test_the_limits_of_the_loss():
    u, m, clean = three(6, 4)
    y, g = torch.arange(6) % 4, randoms(6, 4, seed=9)
    alone = student_loss(u, m, clean, y)
    close(alone, sum(F.cross_entropy(z, y) for z in (u, m, clean)))
    close(student_loss(u, m, clean, y, g, kd_weight=0.0), alone)
    taught = student_loss(u, m, clean, y, g, label_weight=0.0)
    close(taught, weighted_distillation(u, g) + weighted_distillation(m, g))
    close(student_loss(u, m, clean, y, g), alone + taught)


# --- choosing a head --------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(2, 5), seeds, st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_the_choice_equals_a_loop(n, classes, seed, threshold):
    heads = three(n, classes, seed)
    index = choose_head(heads, threshold=threshold)
    for row in range(n):
        c, u, m = (softmax(z[row].tolist()) for z in heads)
        products = [-sum(v * math.log(v) for v in p) * kl(m, p) for p in (c, u)]
        wanted = 0 if products[0] <= products[1] else 1
        wanted = 2 if threshold is not None and min(products) > threshold else wanted
        assert index[row] == wanted
    picked = heads.pick(index)
    for row in range(n):
        assert torch.equal(picked[row], heads[index[row]][row])


def test_the_choice_does_not_mind_order_or_shifts_and_ties_are_clean():
    heads = three(9, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    index = choose_head(heads)
    assert torch.equal(choose_head(Heads(*(z[order] for z in heads))), index[order])
    assert torch.equal(choose_head(Heads(*(z + 3 for z in heads))), index)
    z = heads.clean
    assert choose_head(Heads(z, z.clone(), z.clone())).tolist() == [0] * 9
    assert choose_head(Heads(z, randoms(9, 4, seed=3), z.clone())).tolist() == [0] * 9
    assert choose_head(Heads(randoms(9, 4, seed=3), z, z.clone())).tolist() == [1] * 9


def test_a_head_without_any_doubt_always_wins():
    sure = torch.tensor([[800.0, 0.0, 0.0]], dtype=torch.float64)  # entropy 0 in float64
    other = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)
    assert choose_head(Heads(other, sure, torch.tensor([[0.0, 2.1, 0.0]], dtype=torch.float64))).item() == 1


# --- the student ------------------------------------------------------------------------------------------------------


def network(norm=nn.BatchNorm1d, dtype=torch.float64):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), norm(6), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(6, 4)).to(dtype)
    model(torch.randn(20, 6, dtype=dtype))  # running statistics of its own
    return model.eval()


def student_of(model, first=2):
    return ThreeHeads(model[:first], model[first:-1], model[-1])


def steps(student, count=4, **options):
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.05)
    for k in range(count):
        x, y = randoms(16, 6, seed=k).to(next(student.parameters()).dtype), torch.arange(16) % 4
        u, m = student.new_heads(torch.cat([x + 0.1, x]))
        teacher = randoms(16, 4, seed=50 + k).to(u)
        loss = student_loss(u[:16], m[:16], m[16:], y, teacher, certainty(teacher.softmax(1)), **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def test_before_the_first_step_all_heads_are_the_model():
    model, x = network(), randoms(7, 6)
    student = student_of(copy.deepcopy(model)).eval()
    heads = student(x)
    assert all(torch.equal(z, model(x)) for z in heads)
    assert torch.equal(heads.pick(choose_head(heads)), model(x))


def test_the_clean_path_stays_to_the_bit_and_the_rest_moves():
    model, x = network(), randoms(7, 6)
    before, student = copy.deepcopy(model), student_of(model).train()
    state = {k: v.clone() for k, v in student.state_dict().items()}
    steps(student)
    student.eval()
    assert torch.equal(student(x).clean, before(x)) and torch.equal(model(x), before(x))
    for name, value in student.state_dict().items():
        moved = not torch.equal(value, state[name])
        assert moved == (name.split(".")[0] in ("tuned", "unclean", "combined")), name
    for name, p in student.named_parameters():
        assert (p.grad is not None) == (name.split(".")[0] in ("tuned", "unclean", "combined"))


def test_the_frozen_parts_stay_in_eval_mode():
    student = student_of(network()).train()
    assert student.training and student.tuned.training and student.unclean.training
    assert not any(part.training for part in student.frozen())
    assert not any(m.training for m in student.eval().modules())


def test_the_prefix_may_be_computed_once():
    student, x = student_of(network()).eval(), randoms(7, 6)
    u, m = student.new_heads(x)
    heads = student(x)
    assert torch.equal(u, heads.unclean) and torch.equal(m, heads.combined)
    assert torch.equal(student.unclean(student.tuned(student.prefix(x))), u)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_counts(first):
    student = ThreeHeads(nn.Identity() if first == 0 else network()[:first], network()[first:-1], network()[-1])
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert trained == (3 - first) * (6 * 6 + 6 + 12) + 2 * (6 * 4 + 4)


def test_low_rank_updates_of_the_tuned_layers():
    model, x = network(), randoms(7, 6)
    student = ThreeHeads(nn.Identity(), model[:-1], model[-1])
    layer = partial(LoRALinear, rank=2, generator=torch.Generator().manual_seed(0))
    replace_linears(student, r"^tuned\.", layer, trainable=r"^(unclean|combined)\.")
    heads = student.eval()(x)
    assert torch.equal(heads.unclean, heads.clean)  # B = 0
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == 3 * 2 * 12 + 2 * 28
    steps(student)
    tuned = student.eval()(x)
    assert torch.equal(tuned.clean, heads.clean) and not torch.equal(tuned.unclean, heads.unclean)
    merged = merge_adapters(student)(x)
    close(merged.unclean, tuned.unclean)


def test_kd_weight_zero_is_augmentation_alone():
    one, two = (student_of(network()) for _ in range(2))
    steps(one, kd_weight=0.0)
    optimizer = torch.optim.Adam([p for p in two.parameters() if p.requires_grad], lr=0.05)
    for k in range(4):
        x, y = randoms(16, 6, seed=k), torch.arange(16) % 4
        u, m = two.new_heads(torch.cat([x + 0.1, x]))
        optimizer.zero_grad()
        student_loss(u[:16], m[:16], m[16:], y).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_state_round_trip(tmp_path):
    student = steps(student_of(network())).eval()
    save_tensors(student.state_dict(), tmp_path / "student", kind="student")
    other = student_of(network())
    other.load_state_dict(load_tensors(tmp_path / "student", kind="student"))
    x = randoms(5, 6)
    assert all(torch.equal(a, b) for a, b in zip(student(x), other.eval()(x)))
    again = copy.deepcopy(student)
    assert all(torch.equal(a, b) for a, b in zip(student(x), again(x)))


def test_bfloat16_is_finite_and_compiles():
    student = steps(student_of(network(partial(nn.LayerNorm), torch.bfloat16)))
    assert all(bool(torch.isfinite(z).all()) for z in student.eval()(randoms(3, 6).bfloat16()))
    student = student_of(network()).eval()
    x = randoms(5, 6)
    graph = torch.compile(student, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(graph(x), student(x)))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda z: certainty(z[:, :1]), ValueError, "p: got 1 classes"),
        (lambda z: weighted_distillation(z, z[:1]), ValueError, "z, teacher, omega"),
        (lambda z: weighted_distillation(z, z, z), ValueError, "z, teacher, omega"),
        (lambda z: weighted_distillation(z, z, temperature=0.0), ValueError, "temperature"),
        (lambda z: student_loss(z, z, z, torch.zeros(3).long(), z, kd_weight=-1.0), ValueError, "kd_weight"),
        (lambda z: student_loss(z, z, z, torch.zeros(3).long(), z, label_weight=math.nan), ValueError, "label_weight"),
        (lambda z: choose_head(Heads(z, z, z), threshold=-1.0), ValueError, "threshold"),
        (lambda z: ThreeHeads(nn.Identity(), nn.ReLU(), nn.Linear(2, 2)), ValueError, "chunk: got no parameter"),
        (lambda z: ThreeHeads(nn.Identity(), nn.Linear(2, 2), z), TypeError, "head: got Tensor"),
        (lambda z: ThreeHeads(None, nn.Linear(2, 2), nn.Linear(2, 2)), TypeError, "prefix: got NoneType"),
    ],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(randoms(3, 4))
