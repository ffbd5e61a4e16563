"""PELA: equations against loops, the exact invariants in float64, and bad input."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from spectral_cases import gaussian, network, seeded
from torch import nn
from torch.nn import functional as F

from lowrank_ref.compression import (
    Repair,
    WeLoreLinear,
    cut_model,
    feature_loss,
    max_deviation,
    perturbation_loss,
    plan_by_ratio,
    rank_at_ratio,
    tapped,
)
from lowrank_ref.core.io import load_tensors, save_tensors
from lowrank_ref.lab.models import GPT
from lowrank_ref.lab.train import train

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
TAPS = r"^[13]$"
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 0])


def assert_close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


def pair(ratio=2.0):
    """A student and its teacher: two of three matrices are cut, as the last has six outputs."""
    teacher = network()
    return cut_model(copy.deepcopy(teacher), plan_by_ratio(teacher, ratio, "")), teacher


# Each equation against a loop.


@given(sizes, st.sampled_from([0.5, 1, 1.5, 2, 3, 7]))
def test_the_rank_is_the_largest_that_fits(shape, c):
    m, n = shape
    r = rank_at_ratio(m, n, c)
    fits = [k for k in range(1, min(m, n) + 1) if k * (m + n) <= m * n / c]
    assert r == max(fits, default=1)


def test_1_ranks_and_counts_of_the_card():
    assert [rank_at_ratio(768, n, c) for c in (2, 3) for n in (768, 3072)] == [192, 307, 128, 204]
    assert rank_at_ratio(100, 100, 1) == 50 and rank_at_ratio(1, 1, 9) == 1  # the code would take 0
    model = nn.Sequential(nn.Linear(768, 3072))
    plan = plan_by_ratio(model, 3, "")
    assert plan.parameters == 204 * (768 + 3072) and plan.kept <= 1 / 3
    assert sum(p.numel() for p in cut_model(model, plan).parameters()) == plan.parameters + 3072


@given(st.lists(sizes, min_size=1, max_size=4))
def test_feature_loss_by_loops(shapes):
    own = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)]
    wanted = [gaussian(*shape, seed=9 + i) for i, shape in enumerate(shapes)]
    total = 0.0
    for s, t in zip(own, wanted):
        squares = [(a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist())]
        total += sum(squares) / len(squares)
    assert float(feature_loss(own, wanted)) == pytest.approx(total / len(shapes), abs=1e-12)


@given(st.lists(sizes, min_size=1, max_size=4), st.data(), st.floats(0, 3))
def test_perturbation_by_loops_and_by_the_norm_of_the_code(shapes, data, target):
    total, found = 0.0, []
    for i, (m, n) in enumerate(shapes):
        r = data.draw(st.integers(1, min(m, n)))
        A, B, W = gaussian(r, n, seed=i), gaussian(m, r, seed=7 + i), gaussian(m, n, seed=20 + i)
        largest = 0.0
        for j in range(m):
            for k in range(n):
                entry = sum(float(B[j, q] * A[q, k]) for q in range(r)) - float(W[j, k])
                largest = max(largest, abs(entry))
        d = max_deviation(A, B, W)
        assert float(d) == pytest.approx(largest, abs=1e-12)
        assert_close(d, torch.norm(B @ A - W, float("inf")))
        total += (largest - target) ** 2 / len(shapes)
        found.append(d)
    assert float(perturbation_loss(found, target)) == pytest.approx(total, abs=1e-11)


def test_it_is_the_largest_entry_and_no_induced_norm():
    W = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    zero = torch.zeros(1, 2)
    assert max_deviation(zero, zero.T, W).item() == 4
    assert torch.linalg.matrix_norm(W, float("inf")).item() == 7


def test_the_whole_loss_by_hand():
    student, teacher = pair()
    x, (a, b, g, e) = gaussian(7, 8), (0.3, 0.7, 2.0, 0.05)
    repair = Repair(student, teacher, TAPS, F.cross_entropy, features=a, logits=b, penalty=g, target=e)
    h, t = x, x
    features = []
    for i in range(5):
        h, t = student[i](h), teacher[i](t)
        if i in (1, 3):
            features.append((h - t).square().mean())
    deviations = [(student[i].B @ student[i].A - teacher[i].weight).abs().max() for i in (0, 2)]
    wanted = {
        "task": F.cross_entropy(h, LABELS),
        "features": a * sum(features) / 2,
        "logits": b * (h - t).square().mean(),
        "penalty": g * sum((d - e) ** 2 for d in deviations) / 2,
    }
    got = repair.terms(student, x, LABELS)
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert_close(got[name], value)
    assert_close(repair(student, x, LABELS), sum(wanted.values()))


# Exact invariants, numbered as on the card.


def test_2_a_full_rank_changes_nothing():
    student, teacher = pair(ratio=0.4)
    assert [m.rank for m in student if isinstance(m, WeLoreLinear)] == [8, 12]
    x = gaussian(7, 8)
    assert_close(student(x), teacher(x))
    repair = Repair(student, teacher, TAPS, penalty=1.0, target=0.3)
    terms = repair.terms(student, x)
    assert_close(terms["features"], torch.zeros_like(terms["features"]))
    assert_close(terms["penalty"], torch.full_like(terms["penalty"], 0.09))


@given(sizes, st.sampled_from([1.0, 1.5, 3.0]))
def test_3_factors_are_balanced_and_lose_the_tail(shape, c):
    m, n = shape
    W = gaussian(m, n)
    base = nn.Linear(n, m).double()
    base.weight.data.copy_(W)
    layer = cut_model(nn.Sequential(base), plan_by_ratio(nn.Sequential(base), c, "", least_outputs=1))[0]
    A, B = layer.A.detach(), layer.B.detach()
    S = torch.linalg.svdvals(W)
    assert_close(B.T @ B, torch.diag(S[: layer.rank]), atol=1e-10)
    assert_close(A @ A.T, torch.diag(S[: layer.rank]), atol=1e-10)
    assert float((W - B @ A).square().sum()) == pytest.approx(float(S[layer.rank :].square().sum()), abs=1e-10)


def test_4_the_rest_is_the_same_to_the_bit():
    student, teacher = pair()
    assert isinstance(student[4], nn.Linear) and torch.equal(student[4].weight, teacher[4].weight)  # six outputs
    for i in (0, 2):
        assert torch.equal(student[i].bias, teacher[i].bias)
    only = plan_by_ratio(teacher, 2, r"^2$")
    assert only.low_rank == ("2",) and isinstance(cut_model(copy.deepcopy(teacher), only)[0], nn.Linear)


def test_5_the_teacher_stays_as_it_is():
    teacher = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 6)).double()
    student = cut_model(copy.deepcopy(teacher), plan_by_ratio(teacher, 2, r"^0$"))
    before = copy.deepcopy(teacher.state_dict())
    repair = Repair(student, teacher, r"^1$", F.cross_entropy, logits=1.0, penalty=1.0)
    assert not any(m.training for m in teacher.modules()) and all(m.training for m in student.modules())
    own = copy.deepcopy(student.state_dict())
    data = lambda i: (gaussian(7, 8, seed=i), LABELS)  # noqa: E731
    train(student, data, repair, torch.optim.AdamW(student.parameters(), lr=0.1), steps=3, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(not torch.equal(v, own[k]) for k, v in student.state_dict().items())


def test_6_the_gradient_of_the_penalty_has_rank_one():
    student, teacher = pair()
    target = 0.01
    Repair(student, teacher, TAPS, features=0.0, penalty=1.0, target=target)(student, gaussian(2, 8)).backward()
    for i in (0, 2):
        A, B = student[i].A.detach(), student[i].B.detach()
        E = B @ A - teacher[i].weight
        j, k = divmod(int(E.abs().argmax()), E.shape[1])
        slope = 2 * (E[j, k].abs() - target) / 2 * E[j, k].sign()  # M = 2 matrices
        G, H = torch.zeros_like(B), torch.zeros_like(A)
        G[j], H[:, k] = slope * A[:, k], slope * B[j]
        assert_close(student[i].B.grad, G)
        assert_close(student[i].A.grad, H)
    assert student[4].weight.grad is None or not student[4].weight.grad.any()


def test_equal_entries_share_the_gradient():
    A, B = torch.zeros(1, 2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    A += 1
    W = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    max_deviation(A, B, W).backward()  # E = [[1, 1], [0, 0]]
    assert B.grad.tolist() == [[1.0], [0.0]]  # half of each of two entries


def test_deviations_below_the_target_are_pushed_up():
    student, teacher = pair()
    start = max(d.item() for d in Repair(student, teacher, TAPS, penalty=1.0).deviations())
    repair = Repair(student, teacher, TAPS, features=0.0, penalty=1.0, target=start + 1)
    sgd = torch.optim.SGD(student.parameters(), lr=0.05)
    train(student, lambda i: (gaussian(2, 8),), repair, sgd, steps=20, progress=False)
    assert min(d.item() for d in repair.deviations()) > start


def test_7_without_terms_it_is_plain_training():
    plain, teacher = pair()
    student = copy.deepcopy(plain)
    repair = Repair(student, teacher, TAPS, F.cross_entropy, features=0.0)
    data = lambda i: (gaussian(7, 8, seed=i), LABELS)  # noqa: E731
    task = lambda model, x, y: F.cross_entropy(model(x), y)  # noqa: E731
    for model, loss in ((plain, task), (student, repair)):
        train(model, data, loss, torch.optim.AdamW(model.parameters(), lr=0.01), steps=4, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), student.parameters()))


def test_8_replace_and_load(tmp_path):
    model = GPT(11, dim=16, layers=2, heads=2, length=8, generator=seeded())
    teacher = copy.deepcopy(model)
    plan = plan_by_ratio(model, 2, r"^blocks\.")
    assert len(plan.low_rank) == 14
    student = cut_model(model, plan)
    repair = Repair(student, teacher, r"^blocks\.\d+$", penalty=1.0)
    tokens = torch.randint(11, (2, 8), generator=seeded())
    adam = torch.optim.Adam(student.parameters(), lr=1e-3)
    first = repair(student, tokens).item()
    train(student, lambda i: (tokens,), repair, adam, steps=15, progress=False)
    assert repair(student, tokens).item() < first
    save_tensors(student.state_dict(), tmp_path / "student", kind="pela")
    fresh = GPT(11, dim=16, layers=2, heads=2, length=8, generator=seeded(5))
    again = cut_model(fresh, plan_by_ratio(fresh, 2, r"^blocks\."))
    again.load_state_dict(load_tensors(tmp_path / "student", kind="pela"))
    assert torch.equal(student(tokens), again(tokens))


# Other models and ways of running.


def test_a_transformers_model_by_named_inputs(bert, tokens):
    teacher = bert()
    plan = plan_by_ratio(teacher, 2, r"(query|key|value|dense)$")
    student = cut_model(copy.deepcopy(teacher), plan)
    repair = Repair(student, teacher, r"encoder\.layer\.\d+$", F.cross_entropy, logits=1.0, penalty=1.0)
    terms = repair.terms(student, {"input_ids": tokens}, torch.tensor([0, 1, 2]))
    assert list(terms) == ["task", "features", "logits", "penalty"] and all(t > 0 for t in terms.values())
    with tapped(teacher, r"encoder\.layer\.\d+$") as found:
        teacher(tokens)
    assert [tuple(f.shape) for f in found] == [(3, 7, 16)] * 2


def test_gpt2s_conv1d(gpt2, tokens):
    teacher = gpt2()
    student = cut_model(copy.deepcopy(teacher), plan_by_ratio(teacher, 2, r"c_(attn|fc|proj)$"))
    repair = Repair(student, teacher, r"transformer\.h\.0$", penalty=1.0)
    for layer, old in repair.pairs:
        d = (layer.B @ layer.A - old.weight.T).abs().max()
        assert_close(max_deviation(layer.A, layer.B, old.weight.T), d, atol=1e-6)
    repair(student, tokens).backward()
    assert all(layer.A.grad.any() for layer, _ in repair.pairs)


def test_the_deviation_is_computed_in_float32_also_under_autocast():
    student, teacher = (model.float() for model in pair())
    repair = Repair(student, teacher, TAPS, penalty=1.0)
    plain = [d.item() for d in repair.deviations()]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = repair.deviations()
    assert [d.item() for d in mixed] == plain and mixed[0].dtype == torch.float32
    half = [M.to(torch.bfloat16) for M in (student[0].A, student[0].B, teacher[0].weight)]
    assert max_deviation(*half).dtype == torch.float32


def test_the_weights_may_move_after_the_repair_is_made():
    student, teacher = pair()
    repair = Repair(student, teacher, TAPS, penalty=1.0)
    student.float(), teacher.float()
    assert repair(student, gaussian(3, 8).float()).dtype == torch.float32


def distributed(rank, world, folder):
    """One process: its share of the rows of each batch."""
    student, teacher = pair()
    repair = Repair(student, teacher, TAPS, F.cross_entropy, penalty=1.0)
    steps(nn.parallel.DistributedDataParallel(student), repair, student, slice(rank, None, world))
    if rank == 0:
        torch.save(student.state_dict(), f"{folder}/results")


def steps(model, repair, student, rows):
    sgd = torch.optim.SGD(student.parameters(), lr=0.05)
    for i in range(3):
        sgd.zero_grad()
        repair(model, gaussian(6, 8, seed=i)[rows], LABELS[:6][rows]).backward()
        sgd.step()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    in_processes(distributed, tmp_path)
    student, teacher = pair()
    steps(student, Repair(student, teacher, TAPS, F.cross_entropy, penalty=1.0), student, slice(None))
    for key, value in torch.load(tmp_path / "results", weights_only=True).items():
        assert_close(value, student.state_dict()[key], 1e-6)


# Bad input.


def test_numbers_out_of_range():
    model = network()
    for call, message in [
        (lambda: rank_at_ratio(0, 3, 2), "m: got 0"),
        (lambda: rank_at_ratio(3, 0, 2), "n: got 0"),
        (lambda: rank_at_ratio(3, 3, 0), "ratio: got 0"),
        (lambda: rank_at_ratio(3, 3, float("nan")), "ratio: got nan"),
        (lambda: plan_by_ratio(model, -1, ""), "ratio: got -1"),
        (lambda: plan_by_ratio(model, 2, "", least_outputs=0), "least_outputs: got 0"),
        (lambda: plan_by_ratio(model, 2, "", least_outputs=13), "least_outputs: got 13, more than any of 3"),
        (lambda: plan_by_ratio(model, 2, "attention"), "pattern: got 'attention', which matches nothing"),
        (lambda: perturbation_loss([]), "deviations: got none"),
        (lambda: perturbation_loss([torch.tensor(1.0)], -1), "target: got -1"),
        (lambda: feature_loss([], []), "student: got features of shapes"),
        (lambda: feature_loss([gaussian(2, 3)], [gaussian(2, 2)]), "student: got features of shapes"),
        (lambda: feature_loss([gaussian(2, 3)], []), "student: got features of shapes"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_repair_that_cannot_be(no_shape_checks):
    student, teacher = pair()
    other = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    for call, message in [
        (lambda: Repair(student, teacher, TAPS, features=-1.0), "features: got -1.0"),
        (lambda: Repair(student, teacher, TAPS, logits=float("inf")), "logits: got inf"),
        (lambda: Repair(student, teacher, TAPS, penalty=-0.1), "penalty: got -0.1"),
        (lambda: Repair(student, teacher, TAPS, penalty=1.0, target=-2), "target: got -2"),
        (lambda: Repair(student, teacher, TAPS, features=0.0), "task: got None"),
        (lambda: Repair(student, teacher, "blocks"), "taps: got 'blocks', which matches nothing"),
        (lambda: Repair(teacher, teacher, TAPS), "student: got parameters of the teacher"),
        (lambda: Repair(network(), teacher, TAPS, penalty=1.0), "student: got Sequential without factors"),
        (lambda: Repair(student, other, TAPS, penalty=1.0), "teacher: got no matrix of the student's shape at '2'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(p.requires_grad for p in teacher.parameters()) and teacher.training  # nothing changed
    with pytest.raises(TypeError, match="penalty: got '1'"):
        Repair(student, teacher, TAPS, penalty="1")
    repair = Repair(student, teacher, TAPS)
    student.append(student[3])  # called twice
    with pytest.raises(ValueError, match="student: got features of shapes"):
        repair(student, gaussian(2, 8))


def test_only_what_is_asked_for_is_computed():
    student, teacher = pair()
    x, calls = gaussian(3, 8), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    assert list(Repair(student, teacher, TAPS, features=0.0, penalty=1.0).terms(student, x)) == ["penalty"]
    assert not calls  # the penalty reads weights alone
    terms = Repair(student, teacher, TAPS, features=0.0, logits=2.0).terms(student, x)
    assert list(terms) == ["logits"] and calls == [1]
    assert_close(terms["logits"], 2 * (student(x) - teacher(x)).square().mean())


def test_a_teacher_without_the_layer():
    student, teacher = pair()
    short = nn.Sequential(*list(teacher)[:2])
    with pytest.raises(ValueError, match="teacher: got no matrix of the student's shape at '2'"):
        Repair(student, short, r"^1$", penalty=1.0)
    assert short.training and all(p.requires_grad for p in short.parameters())


def test_small_outputs_stay_dense_whatever_the_pattern():
    model = nn.Sequential(nn.Linear(16, 24), nn.Conv2d(3, 16, 1), nn.Linear(24, 12), nn.Linear(12, 9))
    plan = plan_by_ratio(model, 2)  # the head is cut too, if it has ten outputs or more
    assert plan.low_rank == ("0", "2")
