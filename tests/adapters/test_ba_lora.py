"""BA-LoRA's penalties: each against a loop, the identities in float64, their sum, training on PiSSA, bad input."""

import math
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import (
    LoRALinear,
    OutputPenalty,
    PiSSALinear,
    covariance_penalty,
    entropy_penalty,
    load_peft,
    normalised_mse,
    save_peft,
    singular_penalty,
    teacher_logits,
    temperature_kl,
)
from lowrank_ref.adapters.ba_lora import PUBLISHED
from lowrank_ref.core.layers import adapters, replace_linears
from lowrank_ref.core.peft import read_peft

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
sizes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
frobenius = partial(singular_penalty, norm="frobenius")
Z = torch.tensor([[2, 0, -1], [0, 1, 0], [1, 1, 1], [-1, 0, 2]], dtype=torch.float64)
TEACHER = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=torch.float64)
#: Name -> penalty of logits alone, or with a teacher beside them.
ALONE = {
    "covariance": covariance_penalty,
    "entropy": entropy_penalty,
    "entropy, K = 2": partial(entropy_penalty, kept=2),
    "nuclear": partial(singular_penalty, top=2),
    "frobenius": partial(frobenius, top=2),
    "sketch": lambda z: frobenius(z, top=1, sketch=1, generator=seeded(3)),
}
PAIRS = {"kl": temperature_kl, "kl, T = 1": partial(temperature_kl, temperature=1.0), "mse": normalised_mse}


def pair(n, d, seed):
    return gaussian(n, d, seed=seed), gaussian(n, d, seed=seed + 100)


# --- against loops ----------------------------------------------------------------------------------------------------


def softmax(row):
    whole = sum(math.exp(v) for v in row)
    return [math.exp(v) / whole for v in row]


@given(sizes, st.sampled_from([0.5, 1.0, 2.0]))
def test_consistency_by_loops(shape, T):
    z, teacher = pair(*shape)
    kl = mse = 0.0
    for a, b in zip(z.tolist(), teacher.tolist()):
        p, q = softmax([v / T for v in b]), softmax([v / T for v in a])
        kl += T * T * sum(u * math.log(u / v) for u, v in zip(p, q)) / len(z)
        norm_a, norm_b = math.hypot(*a), math.hypot(*b)
        mse += sum((u / norm_a - v / norm_b) ** 2 for u, v in zip(a, b)) / z.numel()
    assert temperature_kl(z, teacher, temperature=T).item() == pytest.approx(kl, abs=1e-12)
    assert normalised_mse(z, teacher).item() == pytest.approx(mse, abs=1e-12)


@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 99))
def test_covariance_by_loops(n, d, seed):
    z = gaussian(n, d, seed=seed)
    rows, mean = z.tolist(), z.mean(0).tolist()
    total = 0.0
    for i in range(d):
        for j in range(d):
            if i != j:
                total += (sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in rows) / (n - 1)) ** 2
    assert covariance_penalty(z).item() == pytest.approx(total / d, abs=1e-11)


@given(sizes, st.integers(1, 9))
def test_entropy_by_loops(shape, kept):
    z, _ = pair(*shape)
    ps = [softmax(sorted(row, reverse=True)[:kept]) for row in z.tolist()]
    assert entropy_penalty(z, kept=kept).item() == pytest.approx(
        sum(p * math.log(p) for row in ps for p in row) / len(z), abs=1e-12
    )


@given(sizes, st.integers(1, 9))
def test_singular_values_by_the_gram_matrix(shape, k):
    z, _ = pair(*shape)
    S = torch.linalg.eigvalsh(z.T @ z).clamp_min(0).sqrt().flip(0)
    torch.testing.assert_close(singular_penalty(z, top=k), -S[:k].sum() / S.sum(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(frobenius(z, top=k), -S[:k].sum() / z.square().sum().sqrt(), rtol=1e-6, atol=1e-7)


def test_golden_values():
    wanted = {
        normalised_mse(Z, TEACHER): 0.0657748,
        temperature_kl(Z, TEACHER, temperature=1.0): 0.1474268,
        temperature_kl(Z, TEACHER): 0.1864338,
        covariance_penalty(Z): 1.1851852,
        singular_penalty(Z, top=1): -0.5,
        frobenius(Z, top=2): -1.3363062,
        entropy_penalty(Z[:1]): -0.5242666,
        entropy_penalty(Z[:1], kept=2): -0.3653339,
    }
    for got, number in wanted.items():
        assert got.item() == pytest.approx(number, abs=5e-8)
    close(torch.linalg.svdvals(Z), torch.tensor([3.0, 2, 1], dtype=torch.float64))


# --- identities -------------------------------------------------------------------------------------------------------


@given(sizes)
def test_consistency_is_least_where_the_outputs_agree(shape):
    n, _, seed = shape
    z, teacher = pair(*shape)
    for name, term in PAIRS.items():
        same = teacher.clone().requires_grad_()
        term(same, teacher).backward()
        close(term(same, teacher), torch.zeros((), dtype=torch.float64))
        assert same.grad.abs().max() < 1e-12 and term(z, teacher) >= 0, name
    shift, stretch = gaussian(n, 1, seed=seed + 7), gaussian(n, 1, seed=seed + 8).exp()
    close(temperature_kl(z + shift, teacher), temperature_kl(z, teacher))
    close(normalised_mse(z * stretch, teacher), normalised_mse(z, teacher))


def test_at_a_high_temperature_the_kl_is_half_the_squared_distance_of_centred_logits():
    z, teacher = pair(5, 4, 0)
    d = z - teacher
    wanted = (d - d.mean(1, keepdim=True)).square().sum(1).mean() / (2 * 4)
    torch.testing.assert_close(temperature_kl(z, teacher, temperature=1e4), wanted, rtol=1e-3, atol=0)


def test_the_first_generations_sum_over_tokens_is_a_multiple():
    b, t, v = 3, 5, 7
    z, teacher = (part.unflatten(0, (b, t)) for part in pair(b * t, v, 1))
    official = F.kl_div(z.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")  # divides a 3-D input by b
    close(official, t * temperature_kl(z.flatten(0, 1), teacher.flatten(0, 1), temperature=1.0))


@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 99))
def test_identities_of_the_covariance(n, d, seed):
    z = gaussian(n, d, seed=seed)
    close(covariance_penalty(z + gaussian(d, seed=seed + 1)), covariance_penalty(z))
    close(covariance_penalty(3 * z), 81 * covariance_penalty(z))
    close(covariance_penalty(z[:, :1]), torch.zeros((), dtype=torch.float64))
    Q = torch.linalg.qr(torch.cat([torch.ones(d + 1, 1).double(), gaussian(d + 1, d, seed=seed)], 1)).Q[:, 1:]
    assert covariance_penalty(Q) < 1e-25  # centred, orthonormal columns


@given(sizes)
def test_identities_of_the_entropy(shape):
    n, d, _ = shape
    z, _ = pair(*shape)
    close(entropy_penalty(z, kept=d), entropy_penalty(z, kept=None))
    close(entropy_penalty(z, kept=1), torch.zeros((), dtype=torch.float64))
    for k in range(1, d + 1):
        assert -math.log(k) - 1e-12 <= entropy_penalty(z, kept=k) <= 0
        close(entropy_penalty(torch.ones_like(z), kept=k), torch.tensor(-math.log(k), dtype=torch.float64))


@given(sizes, st.integers(1, 7))
def test_identities_of_the_singular_values(shape, k):
    n, d, seed = shape
    z, _ = pair(*shape)
    low, high = torch.linalg.qr(gaussian(n, n, seed=seed + 1)).Q, torch.linalg.qr(gaussian(d, d, seed=seed + 2)).Q
    rank = min(n, d)
    for term, least in ((singular_penalty, -1.0), (frobenius, -math.sqrt(min(k, rank)))):
        close(term(5 * z, top=k), term(z, top=k))
        close(term(low @ z @ high, top=k), term(z, top=k))
        assert least - 1e-12 <= term(z, top=k) < 0
    assert singular_penalty(z, top=k) <= -min(k, rank) / rank + 1e-12
    close(singular_penalty(z, top=rank), torch.tensor(-1.0, dtype=torch.float64))
    if n <= d:
        flat = high[:n]  # orthonormal rows
        close(singular_penalty(flat, top=k), torch.tensor(-min(k, n) / n, dtype=torch.float64))
        close(frobenius(flat, top=k), torch.tensor(-min(k, n) / math.sqrt(n), dtype=torch.float64))


@pytest.mark.parametrize("term", [singular_penalty, frobenius])
def test_one_row_and_zeros_have_no_gradient(term):
    row = gaussian(1, 6).requires_grad_()
    term(row, top=3).backward()
    assert term(row, top=3).item() == pytest.approx(-1) and row.grad.abs().max() < 1e-12
    zeros = torch.zeros(3, 4, requires_grad=True)
    term(zeros, top=2).backward()
    assert term(zeros, top=2) == 0 and not zeros.grad.any()


def test_the_gradient_over_the_frobenius_norm_has_a_closed_form():
    z, k = gaussian(6, 5).requires_grad_(), 2
    frobenius(z, top=k).backward()
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(z, full_matrices=False)
        norm = z.norm()
        close(z.grad, -U[:, :k] @ Vh[:k] / norm + S[:k].sum() * z / norm**3)


def test_equal_singular_values_have_a_finite_gradient():
    z = torch.eye(4, dtype=torch.float64).requires_grad_()
    singular_penalty(z, top=2).backward()
    assert bool(z.grad.isfinite().all()) and bool(z.grad.any())


def test_a_sketch_finds_the_first_singular_values_and_their_gradient():
    z = torch.linalg.qr(gaussian(40, 30)).Q * (0.5 ** torch.arange(30.0)) @ torch.linalg.qr(gaussian(30, 30, seed=1)).Q
    ends = []
    for sketch in (None, 5):
        x = z.clone().requires_grad_()
        value = frobenius(x, top=4, sketch=sketch, generator=seeded())
        value.backward()
        ends.append((value.detach(), x.grad))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-6)
    close(frobenius(z, top=4, sketch=99, generator=seeded()), ends[0][0])  # larger than the matrix: all of it


@pytest.mark.parametrize("name", [name for name in (*ALONE, *PAIRS) if name != "sketch"])
def test_gradients(name):
    z, teacher = pair(5, 4, 3)
    term = ALONE.get(name) or (lambda x: PAIRS[name](x, teacher))
    assert torch.autograd.gradcheck(term, z.requires_grad_())


@pytest.mark.parametrize("name", PAIRS)
def test_the_teacher_gets_no_gradient(name):
    z, teacher = (part.requires_grad_() for part in pair(5, 4, 3))
    PAIRS[name](z, teacher).backward()
    assert teacher.grad is None and bool(z.grad.any())


@pytest.mark.parametrize("name", [*ALONE, *PAIRS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    z, teacher = (part.to(dtype) for part in pair(5, 4, 3))
    term = ALONE.get(name) or PAIRS[name]
    inputs = (z,) if name in ALONE else (z, teacher)
    got = term(*inputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), term(*(part.double() for part in inputs)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*ALONE, *PAIRS])
def test_large_logits_stay_finite(name):
    z = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]], requires_grad=True)
    loss = ALONE[name](z) if name in ALONE else PAIRS[name](z, z.detach().flip(0))
    loss.backward()
    assert bool(loss.isfinite()) and bool(z.grad.isfinite().all())


@pytest.mark.parametrize("name", [*ALONE, *PAIRS])
def test_compiles(name, no_shape_checks):
    z, teacher = pair(6, 4, 3)
    term = ALONE.get(name) or (lambda x: PAIRS[name](x, teacher))
    close(torch.compile(term, backend="aot_eager")(z), term(z))


# --- the sum ----------------------------------------------------------------------------------------------------------


def test_the_sum_is_the_weighted_sum():
    z, teacher = pair(6, 8, 3)
    wanted = 0.15 * temperature_kl(z, teacher) + 0.03 * covariance_penalty(z) + 0.03 * singular_penalty(z, top=5)
    close(OutputPenalty(penalties=PUBLISHED)(z, teacher), wanted)
    close(OutputPenalty()(z, teacher), 0.2 * temperature_kl(z, teacher))
    large = OutputPenalty.generation(singular=partial(frobenius, top=10))
    wanted = 0.025 * temperature_kl(z, teacher) + 0.005 * (entropy_penalty(z, kept=20) + frobenius(z, top=10))
    close(large(z, teacher), wanted)
    first = OutputPenalty(penalties=(1e-4, 3e-4, 1e-4), consistency=normalised_mse)
    close(first.terms(z, teacher)["consistency"], normalised_mse(z, teacher))


def test_a_term_without_weight_is_not_computed():
    z, teacher = pair(1, 8, 3)  # a single row has no covariance
    penalty = OutputPenalty(penalties=(0.2, 0.0, 0.1))
    assert list(penalty.terms(z, teacher)) == ["consistency", "singular"]
    assert OutputPenalty(penalties=(0.0, 0.0, 0.0))(z).item() == 0
    with pytest.raises(ValueError, match="teacher: got None, wanted the logits"):
        penalty(z)


def test_schedules_act_on_the_weights():
    penalty = OutputPenalty(penalties=(1.0, 2.0, 3.0))
    for done, wanted in {0.0: (1.0, 0, 0), 0.225: (None, 1.0, 1.5), 1.0: (0.1, 2.0, 3.0), None: (1, 2, 3)}.items():
        for got, number in zip(penalty.weights(done).values(), wanted):
            assert number is None or got == pytest.approx(number)
    z, teacher = pair(6, 8, 3)
    close(penalty(z, teacher, done=0.0), temperature_kl(z, teacher))


# --- training on PiSSA ------------------------------------------------------------------------------------------------


def network(make=PiSSALinear):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()
    return replace_linears(model, "", partial(make, rank=3, alpha=3, generator=seeded()))


def learn(model, penalty, steps=6, teacher=True):
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for i in range(steps):
        x, y = gaussian(16, 6, seed=i), torch.arange(16) % 5
        z = model(x)
        loss = F.cross_entropy(z, y)
        if penalty is not None:
            loss = loss + penalty(z, teacher_logits(model, x) if teacher else None)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


@pytest.mark.parametrize("make", [PiSSALinear, LoRALinear])
def test_without_weights_training_is_the_adapters_own_to_the_bit(make):
    plain = learn(network(make), None)
    same = learn(network(make), OutputPenalty(penalties=(0.0, 0.0, 0.0)), teacher=False)
    other = learn(network(make), OutputPenalty(penalties=PUBLISHED))
    for key, value in plain.state_dict().items():
        assert torch.equal(same.state_dict()[key], value)
    assert not torch.equal(other[0].A, plain[0].A)


def test_pissa_starts_at_the_teacher_with_the_energy_of_the_first_triples():
    model, x = network(), gaussian(7, 6)
    teacher = teacher_logits(model, x)
    assert (model(x) - teacher).abs().max() < 1e-12 and abs(temperature_kl(model(x), teacher)) < 1e-15
    for _, layer in adapters(model):
        S = torch.linalg.svdvals(layer.base.weight)
        BA = layer.scale * layer.B @ layer.A
        close(BA.square().sum(), S[:3].square().sum())
        rest = layer.base.weight - BA
        close(rest + BA, layer.base.weight)
        close(torch.linalg.svdvals(rest)[0], S[3])


def test_the_teacher_does_not_move():
    model, x = network(), gaussian(7, 6)
    before, weights = teacher_logits(model, x), model[0].base.weight.clone()
    learn(model, OutputPenalty())
    assert torch.equal(teacher_logits(model, x), before) and torch.equal(model[0].base.weight, weights)
    assert not torch.allclose(model(x), before)


def test_each_term_moves_what_it_penalises():
    """Against the same training without it, on data that it did not see."""
    x = gaussian(200, 6, seed=99)
    plain, teacher = learn(network(), None, 60)(x), teacher_logits(network(), x)
    for weights, measure in {
        (1.0, 0.0, 0.0): lambda z: temperature_kl(z, teacher),
        (0.0, 0.3, 0.0): covariance_penalty,
        (0.0, 0.0, 1.0): partial(singular_penalty, top=2),
    }.items():
        penalty = OutputPenalty(penalties=weights, singular=partial(singular_penalty, top=2))
        assert measure(learn(network(), penalty, 60)(x)) < measure(plain)


def test_what_was_trained_goes_to_peft_as_a_lora_of_twice_the_rank(tmp_path):
    model, x = learn(network(), OutputPenalty()).float(), gaussian(5, 6).float()
    save_peft(model, tmp_path)
    assert {layer.rank for layer in read_peft(tmp_path).layers.values()} == {6}
    torch.manual_seed(4)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
    torch.testing.assert_close(load_peft(plain, tmp_path)(x), model(x), rtol=1e-5, atol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALONE, *PAIRS])
def test_bad_logits_are_named(name, no_shape_checks):
    term = ALONE[name] if name in ALONE else (lambda z: PAIRS[name](z, z))
    for bad in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(0, 3), torch.ones(3, 0)):
        with pytest.raises(ValueError, match=r"z: got shape .*, wanted \(rows, classes\)"):
            term(bad)
    for bad in (torch.ones(3, 3, dtype=torch.int64), [[1.0]]):
        with pytest.raises((TypeError, AttributeError), match="z: got|shape"):
            term(bad)


@pytest.mark.parametrize("name", PAIRS)
def test_a_teacher_of_another_shape_is_named(name, no_shape_checks):
    with pytest.raises(ValueError, match=r"teacher: got shape \(2, 3\), wanted that of z, \(4, 3\)"):
        PAIRS[name](Z, TEACHER[:2])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: covariance_penalty(Z[:1]), "z: got shape .*at least 2 rows"),
        (lambda: entropy_penalty(Z, kept=0), "kept: got 0"),
        (lambda: entropy_penalty(Z, kept=2.0), "kept: got 2.0"),
        (lambda: singular_penalty(Z, top=0), "top: got 0"),
        (lambda: singular_penalty(Z, norm="l1"), "norm: got 'l1', wanted one of"),
        (lambda: singular_penalty(Z, sketch=5), "sketch: got 5 with norm 'nuclear'"),
        (lambda: frobenius(Z, sketch=-1), "sketch: got -1"),
        (lambda: OutputPenalty(penalties=(0.1, 0.1)), "penalties: got .*, wanted three"),
        (lambda: OutputPenalty(penalties=(0.1, -0.1, 0.0)), "penalties: got -0.1"),
        (lambda: OutputPenalty(penalties=(0.1, "1", 0.0)), "penalties: got '1'"),
        (lambda: OutputPenalty()(Z, TEACHER, done=1.5), "done: got 1.5"),
    ],
)
def test_bad_options_are_named(call, message, no_shape_checks):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
