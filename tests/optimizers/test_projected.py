"""The base of the projected optimizers: which side, which options, the step loop, strict loading."""

import copy
import io

import pytest
import torch
from torch import nn

from lowrank_ref.optimizers import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreSGD
from lowrank_ref.optimizers.projected import ProjectedOptimizer, check_gradients, sides

GALORES = [GaLoreAdamW, GaLoreSGD, GaLoreAdafactor, GaLoreAdamW8bit]
BAD = [float("nan"), float("inf"), -float("inf")]


class Descent(ProjectedOptimizer):
    """The least subclass: W ← W - lr·G, counting steps in its state."""

    def __init__(self, params, **options):
        super().__init__(
            params, {"lr": 0.5, "rank": None, "gap": 1, "scale": 1.0, "side": "smaller", "weight_decay": 0.0} | options
        )

    def update(self, ps, group):
        for p in ps:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
            self.state[p]["last"] = p.grad.double()
            p.sub_(p.grad, alpha=group["lr"])


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def stepped(cls, *shapes, steps=1, **options):
    """Return parameters of these shapes and an optimizer that took some steps on them."""
    parameters = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    optimizer = cls(parameters, **options)
    for t in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + t))
        optimizer.step()
    return parameters, optimizer


def frozen(parameters, optimizer):
    """A deep copy of all that a failed call must leave alone."""
    return copy.deepcopy(([p.detach().clone() for p in parameters], optimizer.state_dict()))


def same(a, b) -> bool:
    """Equality to the bit, dtype included, through nested dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize(
    "shape, side, wanted",
    [
        ((5, 3), "smaller", (False, True)),
        ((3, 5), "smaller", (True, False)),
        ((4, 4), "smaller", (False, True)),
        ((5, 3), "larger", (True, False)),
        ((3, 5), "larger", (False, True)),
        ((4, 4), "larger", (True, False)),
        ((3, 5), "left", (True, False)),
        ((5, 3), "left", (True, False)),
        ((3, 5), "right", (False, True)),
        ((5, 3), "right", (False, True)),
        ((3, 5), "both", (True, True)),
    ],
)
def test_sides(shape, side, wanted):
    assert sides(shape, side) == wanted


def test_an_unknown_side_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"side: got 'up', wanted one of \['both', 'larger', 'left'"):
        sides((3, 3), "up")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rank": 0}, ValueError, r"rank: got 0, wanted 1 <= rank <= 4 for a \(6, 4\) matrix"),
        ({"rank": -1}, ValueError, "rank: got -1"),
        ({"rank": 5}, ValueError, r"rank: got 5, wanted 1 <= rank <= 4 for a \(6, 4\) matrix"),
        ({"rank": True}, TypeError, "rank: got True of type bool, wanted an integer"),
        ({"rank": 2, "side": "up"}, ValueError, "side: got 'up'"),
        ({"gap": 0}, ValueError, "gap: got 0"),
        ({"gap": True}, TypeError, "gap: got True"),
        ({"scale": 0.0}, ValueError, "scale: got 0.0"),
        ({"scale": -0.25}, ValueError, "scale: got -0.25"),
        ({"scale": float("inf")}, ValueError, "scale: got inf"),
        ({"lr": -0.01}, ValueError, "lr: got -0.01"),
        ({"lr": float("nan")}, ValueError, "lr: got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: got -0.1"),
    ],
)
@pytest.mark.parametrize("cls", GALORES)
def test_an_option_out_of_range_is_named(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls([parameter(6, 4)], **options)
    with pytest.raises(error, match=message):  # and in a group of its own
        cls([{"params": [parameter(6, 4)], **options}])


@pytest.mark.parametrize("cls", GALORES)
@pytest.mark.parametrize("shape", [(4,), (4, 3, 2), ()])
def test_a_projected_group_holds_matrices_only(cls, shape):
    with pytest.raises(ValueError, match="params: got shape .* in a projected group, wanted matrices"):
        cls([{"params": [parameter(4, 3), parameter(*shape)], "rank": 2}])
    stepped(cls, shape)  # without a rank it is welcome


@pytest.mark.parametrize("cls", GALORES)
def test_an_unknown_option_is_an_error(cls):
    with pytest.raises(TypeError, match="update_proj_gap"):  # the official name of gap
        cls([parameter(4, 3)], update_proj_gap=200)


@pytest.mark.parametrize("cls", GALORES)
@pytest.mark.parametrize(
    "key, near",
    [("update_proj_gap", "gap"), ("proj_type", "side"), ("ranks", "rank"), ("weigth_decay", "weight_decay")],
)
def test_an_unknown_key_of_a_group_names_its_neighbour(cls, key, near):
    message = f"params: got unknown '{key}' \\(near: '{near}'\\), wanted some of .*'scale'"
    with pytest.raises(ValueError, match=message):
        cls([{"params": [parameter(4, 3)], "rank": 2, key: 2}])
    _, optimizer = stepped(cls, (4, 3))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(3, 3)], key: 2})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", GALORES)
def test_groups_of_pytorch_are_known(cls):
    """Names of parameters and of groups, a scheduler's key, and the groups of another optimizer of the class."""
    p = parameter(4, 3)
    optimizer = cls([{"params": [("w", p)], "name": "matrices", "initial_lr": 0.1, "rank": 2}])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert cls(optimizer.param_groups).param_groups[0]["name"] == "matrices"


@pytest.mark.parametrize("cls", GALORES)
def test_a_parameter_flattened_since_is_named_before_anything_moves(cls):
    parameters, optimizer = stepped(cls, (6, 4), (4, 5), steps=1, rank=2)
    for p in parameters:
        p.grad = torch.ones(p.shape)
    parameters[1].data, parameters[1].grad = parameters[1].data.flatten(), torch.ones(20)
    before = frozen(parameters, optimizer)
    with pytest.raises(ValueError, match=r"params: got shape \(20,\), wanted \(4, 5\) as at construction"):
        optimizer.step()
    assert same(before, frozen(parameters, optimizer))


@pytest.mark.parametrize("cls", GALORES)
def test_a_sparse_gradient_is_named(cls):
    table = nn.Embedding(7, 4, sparse=True)
    optimizer = cls(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="grad: got a sparse gradient, wanted .*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("cls", GALORES)
@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("size", [3e-5, 300.0, 2e4])
def test_float16_takes_the_steps_of_float32(cls, rank, size):
    """Squares of these are 9e-10, which float16 rounds to 0, or above 65504."""
    rate = 0.1 / size if cls is GaLoreSGD else 0.1

    def run(dtype):
        p = nn.Parameter(parameter(6, 4).detach().half().to(dtype))
        optimizer = cls([p], rank=rank, gap=2, lr=rate)
        for t in range(4):
            p.grad = (size * parameter(6, 4, seed=10 + t).detach()).clamp(-6e4, 6e4).half().to(dtype)
            optimizer.step()
        return p.detach(), optimizer.state[p]

    (got, state), (wanted, _), start = run(torch.float16), run(torch.float32), parameter(6, 4).detach()
    assert got.dtype == torch.float16
    assert all(v.dtype == torch.float32 for key, v in state.items() if key in ("M", "V", "row", "col"))
    way = (wanted - start).norm()
    assert way > 0.01 and (got.float() - wanted).norm() < 0.02 * way + 4 * 2**-11 * start.norm()


def test_a_refused_group_is_not_kept():
    (p,), optimizer = stepped(GaLoreAdamW, (6, 4), rank=2)
    with pytest.raises(ValueError, match="rank"):
        optimizer.add_param_group({"params": [parameter(3, 3)], "rank": 4})
    assert len(optimizer.param_groups) == 1
    extra = parameter(3, 3)
    optimizer.add_param_group({"params": [extra], "rank": 3})
    extra.grad = torch.ones(3, 3)
    before = p.clone()
    p.grad = None
    optimizer.step()
    assert optimizer.state[extra]["right"].shape == (3, 3) and torch.equal(p, before)


def test_one_step_calls_update_once_for_each_gradient():
    a, b = parameter(3, 2), parameter(4)
    optimizer = Descent([a, b])
    a.grad, before, b_before = torch.ones(3, 2), a.detach().clone(), b.detach().clone()
    optimizer.step()
    torch.testing.assert_close(a.detach(), before - 0.5)
    assert torch.equal(b, b_before) and b not in optimizer.state


def test_parameters_step_in_chunks_each_once():
    seen = []

    class Watched(Descent):
        def update(self, ps, group):
            seen.append(len(ps))
            super().update(ps, group)

    ps = [parameter(2, 2, seed=i) for i in range(70)]
    optimizer = Watched([{"params": ps[:65]}, {"params": ps[65:]}])
    for p in ps[:-1]:
        p.grad = torch.ones(2, 2)
    optimizer.step()
    assert seen == [32, 32, 1, 4] and all(optimizer.state[p]["step"] == 1 for p in ps[:-1])


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    p = parameter(3, 2)
    optimizer, calls = Descent([p]), []

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure).item() == calls[0] and len(calls) == 1
    torch.testing.assert_close(p.detach(), before - 0.5 * 2 * before)
    assert optimizer.step() is None


@pytest.mark.parametrize("cls", GALORES)
@pytest.mark.parametrize("value", BAD)
def test_a_bad_gradient_changes_nothing(cls, value):
    parameters, optimizer = stepped(cls, (6, 4), (4, 5), steps=3, rank=2, gap=2)
    before = frozen(parameters, optimizer)
    for p in parameters:
        p.grad = torch.ones(p.shape)
    parameters[1].grad[2, 3] = value  # the last one: the first must not have moved either
    with pytest.raises(ValueError, match="grad: got NaN or infinity in 1 of 2 gradients"):
        optimizer.step()
    assert same(before, frozen(parameters, optimizer))


def test_check_gradients_counts_and_takes_mixed_dtypes():
    check_gradients([])
    check_gradients([torch.ones(2), torch.ones(2, 3, dtype=torch.float64), torch.ones(4, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="in 2 of 3"):
        check_gradients([torch.tensor([value]) for value in (1.0, *BAD[:2])])
    with pytest.raises(ValueError, match="grad: got squares that overflow in 1 of 2 gradients, wanted finite norms"):
        check_gradients([torch.full((2, 2), 1e20), torch.ones(2)])  # finite, but Adam would square it to infinity
    check_gradients([torch.full((100, 100), 6e4).half()])


@pytest.mark.parametrize("cls", GALORES)
def test_loading_restores_the_state_to_the_bit_and_shares_no_memory(cls):
    _, optimizer = stepped(cls, (6, 4), (3, 7), steps=3, rank=2)
    fresh = cls([parameter(6, 4), parameter(3, 7)], rank=1, lr=1.0)
    state = optimizer.state_dict()
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state) and fresh.param_groups[0]["rank"] == 2
    before = copy.deepcopy(state)
    for p in fresh.param_groups[0]["params"]:
        p.grad = torch.ones(p.shape)
    fresh.step()
    assert same(before, state)


def test_loading_keeps_dtypes_that_differ_from_the_weight():
    p = parameter(3, 2)
    optimizer = Descent([p])
    p.grad = torch.ones(3, 2)
    optimizer.step()
    again = Descent([p])
    again.load_state_dict(optimizer.state_dict())
    assert again.state[p]["last"].dtype == torch.float64  # PyTorch would cast it to the float32 of p


@pytest.mark.parametrize("cls", GALORES)
def test_the_state_of_another_optimizer_is_refused(cls):
    parameters, optimizer = stepped(cls, (6, 4), steps=2, rank=2)
    before = frozen(parameters, optimizer)
    foreign = [stepped(other, (6, 4))[1].state_dict() for other in [*GALORES, torch.optim.AdamW] if other is not cls]
    for state in [*foreign, {}]:
        with pytest.raises(ValueError, match=f"state_dict: got a state of .*, wanted {cls.__name__}"):
            optimizer.load_state_dict(state)
        assert same(before, frozen(parameters, optimizer))


@pytest.mark.parametrize("cls", GALORES)
@pytest.mark.parametrize(
    "rank, mine, theirs",
    [
        (2, [(4, 6)], [(4, 8)]),  # the left basis has the same shape
        (2, [(6, 4)], [(8, 4)]),
        (2, [(6, 4)], [(4, 6)]),
        (None, [(6, 4)], [(4, 6)]),
        (None, [(64, 80)], [(80, 64)]),  # large enough for 8-bit codes
        (None, [(6, 4), (3,)], [(6, 4)]),
        (None, [(6, 4)], [(6, 4), (3,)]),
    ],
)
def test_the_state_of_other_shapes_is_refused(cls, rank, mine, theirs):
    parameters, optimizer = stepped(cls, *mine, steps=2, rank=rank)
    before = frozen(parameters, optimizer)
    with pytest.raises(ValueError, match="state_dict: got shape .* for parameter [01], wanted"):
        optimizer.load_state_dict(stepped(cls, *theirs, rank=rank)[1].state_dict())
    assert same(before, frozen(parameters, optimizer))


def test_the_state_of_other_groups_is_refused():
    parameters, optimizer = stepped(GaLoreAdamW, (6, 4), (3, 3), rank=2)
    before = frozen(parameters, optimizer)
    split = GaLoreAdamW([{"params": [parameter(6, 4)]}, {"params": [parameter(3, 3)]}], rank=2)
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(split.state_dict())
    assert same(before, frozen(parameters, optimizer))


def test_a_truncated_file_raises():
    _, optimizer = stepped(GaLoreAdamW, (6, 4), rank=2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    with pytest.raises((RuntimeError, EOFError)):
        torch.load(io.BytesIO(file.getvalue()[:-200]), weights_only=True)
