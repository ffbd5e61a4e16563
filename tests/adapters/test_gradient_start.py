"""LoRA-SB's gradient pass and its start of a model: sums against autograd, what may stand in between, faults."""

import copy
import weakref
from functools import partial

import pytest
import torch
from battery import gaussian, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_ref.adapters import LoRALinear, LoRASBLinear, gradient_start, start_lora_sb
from lowrank_ref.adapters.gradient_start import gradient_sums
from lowrank_ref.adapters.lora_sb import first_step, update_approximation
from lowrank_ref.core.layers import adapters, merge_adapters, replace_linears


def network(dtype=torch.float64):
    """An MLP with dropout and a BatchNorm, the same each time."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh())
    model.append(nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) / 2)
    return model.to(dtype)


def batches(count=3, dtype=torch.float64):
    return [(gaussian(5, 6, seed=i).to(dtype), torch.arange(5) % 3) for i in range(count)]


def loss_fn(model, x, y):
    return F.cross_entropy(model(x), y)


def linears(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def by_autograd(model, data):
    """The sums as PyTorch makes them for weights that train, in eval mode."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    sum(loss_fn(model, *batch) for batch in data).backward()
    return {path: layer.weight.grad for path, layer in linears(model).items()}


def state(model):
    """All that a pass could leave behind: numbers, modes, flags, gradients, hooks."""
    numbers = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    return numbers, modes, [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


def assert_same(got, wanted):
    assert str(got[1:]) == str(wanted[1:])
    assert all(torch.equal(value, wanted[0][key]) for key, value in got[0].items())


def assert_sums(found, wanted, atol=1e-12):
    for path, G in found.items():
        torch.testing.assert_close(G, wanted[path].to(G), rtol=0, atol=atol)


# The pass.


def test_sums_are_those_of_autograd_and_nothing_is_left_behind():
    model = network()
    model[0].requires_grad_(False)
    model[6].weight.grad = torch.ones(3, 8, dtype=torch.float64)
    model[1].eval()
    before = state(model)
    found = gradient_sums(model, linears(model), loss_fn, batches())
    assert list(found) and found.keys() == {"0", "4", "6"}
    assert_sums(found, by_autograd(model, batches()))
    assert_same(state(model), before)


def test_the_order_of_samples_does_not_matter_and_a_mean_counts_batches_alike():
    """Invariant 10; and one batch of all is their mean where they are of one size, which has the same sign."""
    model, data = network(), batches(4)
    found = gradient_sums(model, linears(model), loss_fn, data)
    assert_sums(gradient_sums(model, linears(model), loss_fn, data[::-1]), found, 1e-14)
    whole = [tuple(torch.cat(parts) for parts in zip(*data))]
    mean = gradient_sums(model, linears(model), loss_fn, whole)
    assert_sums({path: 4 * G for path, G in mean.items()}, found)


def test_one_layer_alone_and_under_no_grad():
    """A first layer has nothing before it that asks for a gradient."""
    model = network()
    with torch.no_grad():
        found = [gradient_sums(model, {p: model.get_submodule(p)}, loss_fn, batches()) for p in ("0", "6")]
    assert [list(sums) for sums in found] == [["0"], ["6"]]
    for sums in found:
        assert_sums(sums, by_autograd(model, batches()))


def test_what_follows_may_work_in_place():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()
    assert_sums(gradient_sums(model, linears(model), loss_fn, batches()), by_autograd(model, batches()))


def test_any_shape_of_input():
    base = nn.Linear(4, 3, dtype=torch.float64)
    for shape in ((4,), (5, 4), (2, 5, 4)):
        x, model = gaussian(*shape), nn.Sequential(base)
        found = gradient_sums(model, {"0": base}, lambda m, x: m(x).pow(3).sum(), [(x,)])["0"]
        base.weight.grad = None
        base(x).pow(3).sum().backward()
        torch.testing.assert_close(found, base.weight.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing(reentrant):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(6, 8).double(), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
            self.body.double()

        def forward(self, x):
            return checkpoint(self.body, self.first(x), use_reentrant=reentrant)

    model = Saving()
    found = gradient_sums(model, linears(model), loss_fn, batches())
    assert_sums(found, by_autograd(model, batches()))


def test_a_tied_weight_counts_where_its_layer_is_called_and_a_shared_layer_at_both_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4).double(), nn.Linear(4, 5, bias=False).double()
            self.head.weight = self.table.weight

        def forward(self, tokens):
            return self.head(self.table(tokens))

    model, tokens = Tied(), torch.tensor([1, 3, 4])
    found = gradient_sums(model, {"head": model.head}, lambda m, t: m(t).pow(3).sum(), [(tokens,)])["head"]
    W = model.head.weight.detach().clone().requires_grad_()
    F.linear(model.table(tokens).detach(), W).pow(3).sum().backward()
    torch.testing.assert_close(found, W.grad, rtol=0, atol=1e-12)  # without the embedding's part

    layer = nn.Linear(6, 6).double()
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 3).double())
    assert_sums(gradient_sums(model, {"0": layer}, loss_fn, batches()), by_autograd(model, batches()))
    start_lora_sb(model, "0|2", loss_fn, batches(), rank=2, eta=0.1)
    assert model[0] is model[2] and isinstance(model[0], LoRASBLinear)


def test_the_gradient_is_that_of_an_adapters_update():
    """Also where the base has hooks or a weight that is computed anew: ΔW is added beside all of it."""
    model = network()
    nn.utils.parametrizations.weight_norm(model[4])
    model[6].register_forward_hook(lambda module, inputs, y: 2 * y)
    found = gradient_sums(model, {"4": model[4], "6": model[6]}, lambda m, x, y: m(x).pow(3).sum(), batches(1))
    for path, (m, n) in {"4": (8, 8), "6": (3, 8)}.items():
        other = copy.deepcopy(model).eval()
        start = torch.eye(m, dtype=torch.float64)[:, :m], torch.zeros(m, m), torch.eye(n, dtype=torch.float64)[:m]
        replace_linears(other, f"^{path}$", lambda base, s=start: LoRASBLinear(base, s[2], s[1], s[0]))
        other(batches(1)[0][0]).pow(3).sum().backward()
        torch.testing.assert_close(found[path][:, :m], other.get_submodule(path).R.grad, rtol=0, atol=1e-10)


def test_pytorchs_encoder_calls_its_layers_in_the_pass_and_those_it_never_calls_are_named():
    """In eval mode it would multiply with their weights itself, if it saw no hook."""
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dtype=torch.float64)
    loss = lambda m, x: m(x).pow(3).sum()  # noqa: E731
    wanted, x = copy.deepcopy(model).eval(), gaussian(2, 4, 6)
    loss(wanted, x).backward()
    found = gradient_sums(model, {"linear1": model.linear1, "linear2": model.linear2}, loss, [(x,)])
    assert_sums(found, {path: wanted.get_submodule(path).weight.grad for path in found}, 1e-10)
    with pytest.raises(ValueError, match="layers: got no gradient for self_attn.out_proj, wanted"):
        start_lora_sb(model, "", loss, [(x,)], rank=2, eta=0.1)
    assert not list(adapters(model))


def test_half_precision_is_summed_in_float32():
    model = network(torch.bfloat16)
    found = gradient_sums(model, linears(model), loss_fn, batches(dtype=torch.bfloat16))
    wanted = by_autograd(network(torch.float32), batches(dtype=torch.float32))
    assert {G.dtype for G in found.values()} == {torch.float32}
    for path, G in found.items():
        assert (G - wanted[path]).norm() < 0.1 * wanted[path].norm()


def test_no_two_gradients_are_alive_together(monkeypatch):
    """Each is made in its layer's turn, added to a sum, and dropped: a deep model needs one more than its sums."""
    model = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(6)), nn.Linear(6, 3).double())
    made, most, plain = [], [], torch.Tensor.to

    def spy(tensor, *args, **options):
        if args == ("cpu",):  # a gradient on its way to its sum; the first of each layer is the sum
            made.append(weakref.ref(tensor))
            most.append(sum(ref() is not None for ref in made))
        return plain(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    gradient_sums(model, linears(model), loss_fn, batches(4))
    assert len(made) == 28 and max(most) == 8
    assert start_lora_sb(model, "0", loss_fn, batches(), rank=2, eta=0.1, device="cpu")[0].rank == 2


def test_inputs_are_let_go_in_their_layers_turn():
    """So a pass needs no more at once than one batch of training does."""
    model, inputs, alive = network(), [], []

    def watched(model, x, y):
        handles = [
            layer.register_forward_hook(lambda module, xs, y: inputs.append(weakref.ref(xs[0])))
            for layer in (model[4], model[6])
        ]
        alive.append(sum(ref() is not None for ref in inputs))
        loss = loss_fn(model, x, y)
        for handle in handles:
            handle.remove()
        return loss

    gradient_sums(model, linears(model), watched, batches(3))
    assert alive == [0, 0, 0] and len(inputs) == 6


def test_of_one_group_after_the_other_no_sum_is_left(monkeypatch):
    before, plain = [], gradient_start.gradient_sums

    def spy(model, layers, *args, **options):
        assert len(layers) == 1 and not any(ref() is not None for ref in before)
        found = plain(model, layers, *args, **options)
        before.extend(weakref.ref(G) for G in found.values())
        return found

    monkeypatch.setattr(gradient_start, "gradient_sums", spy)
    started(at_once=1)
    assert len(before) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batches": []}, "batches: got none"),
        ({"loss_fn": lambda model, x, y: model[0](x).sum()}, "layers: got no gradient for 4, 6, wanted"),
        ({"loss_fn": lambda model, x, y: x.sum()}, "layers: got no gradient for 0, 4, 6"),
        ({"loss_fn": lambda model, x, y: loss_fn(model, x, y) * torch.inf}, "gradient of .: got .* NaN or infinite"),
    ],
)
def test_faults_of_the_pass_are_named_and_the_model_is_as_it_was(change, message):
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        gradient_sums(model, linears(model), **{"loss_fn": loss_fn, "batches": batches()} | change)
    assert_same(state(model), before)


def test_an_error_inside_the_loss_leaves_no_hook_and_no_mode():
    model = network()
    before = state(model)
    with pytest.raises(IndexError):
        gradient_sums(model, linears(model), lambda m, x, y: [m(x)][1], batches())
    assert_same(state(model), before)


# The start of a model.


def started(model=None, **options):
    how = {"rank": 2, "eta": 0.01} | options
    return start_lora_sb(network() if model is None else model, "0|4|6", loss_fn, batches(), **how)


def test_every_layer_starts_at_its_own_truncated_step():
    plain, model = network(), started(rank=5)
    sums = by_autograd(plain, batches())
    assert [path for path, _ in adapters(model)] == ["0", "4", "6"]
    for path, layer in adapters(model):
        r = min(5, *layer.base.weight.shape)  # a small layer takes what it can
        A, R, B = update_approximation(first_step(sums[path], 0.01), r)
        assert layer.rank == r
        torch.testing.assert_close(layer.delta_weight(), B @ R @ A, rtol=0, atol=1e-12)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.R", "4.R", "6.R"}
    loss = [loss_fn(m.eval(), *batches()[0]).item() for m in (plain, model)]
    assert loss[1] < loss[0]


def test_groups_give_the_same_start_and_pass_once_a_group():
    passes = []

    def counted(model, x, y):
        passes.append(len(linears(model)))
        return loss_fn(model, x, y)

    wanted = started().state_dict()
    for at_once, times in ((1, 3), (2, 2), (3, 1), (9, 1)):
        passes.clear()
        model = start_lora_sb(network(), "0|4|6", counted, iter(batches()), rank=2, eta=0.01, at_once=at_once)
        assert len(passes) == 3 * times
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


def test_options_and_trainable_arrive():
    model = started(scale=0.5, dropout=0.25, trainable=r"^1\.")
    assert {(layer.scale, layer.dropout.p) for _, layer in adapters(model)} == {(0.5, 0.25)}
    assert model[1].weight.requires_grad and not model[0].base.weight.requires_grad


def test_conv1d_starts_as_the_transposed_linear_layer():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    linear, conv = nn.Sequential(nn.Linear(6, 3).double()), nn.Sequential(Conv1D(3, 6).double())
    conv[0].weight, conv[0].bias = nn.Parameter(linear[0].weight.T.detach().clone()), linear[0].bias
    ours, theirs = (start_lora_sb(m, "", loss_fn, batches(), rank=2, eta=0.1) for m in (conv, linear))
    torch.testing.assert_close(ours[0].delta_weight(), theirs[0].delta_weight(), rtol=0, atol=1e-12)


def test_a_second_kind_of_adapter_beside_the_first():
    model = replace_linears(network(), "4", partial(LoRALinear, rank=2, generator=seeded()))
    start_lora_sb(model, "0", loss_fn, batches(), rank=2, eta=0.1)
    assert [type(layer) for _, layer in adapters(model)] == [LoRASBLinear, LoRALinear]
    with pytest.raises(ValueError, match="pattern: got"):  # what is inside an adapter is none of ours
        start_lora_sb(model, "base", loss_fn, batches(), rank=2, eta=0.1)


def test_it_trains_resumes_and_merges(tmp_path):
    def steps(model, optimizer, times):
        for t in times:
            optimizer.zero_grad()
            loss_fn(model, *batches(6)[t]).backward()
            optimizer.step()

    def build():
        model = started().eval()
        return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)

    straight, optimizer = build()
    before = loss_fn(straight, *batches()[0]).item()
    steps(straight, optimizer, range(6))
    assert loss_fn(straight, *batches()[0]).item() < before
    first, optimizer = build()
    steps(first, optimizer, range(3))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x")
    saved = torch.load(tmp_path / "x", weights_only=True)
    second = replace_linears(network(), "0|4|6", partial(LoRASBLinear.empty, rank=2)).eval()  # no gradients needed
    optimizer = torch.optim.Adam([p for p in second.parameters() if p.requires_grad], lr=0.05)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(second, optimizer, range(3, 6))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in straight.state_dict().items())
    y = straight(batches()[0][0])
    torch.testing.assert_close(merge_adapters(straight)(batches()[0][0]), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rank": 0}, ValueError, "rank: got 0"),
        ({"rank": 2.0}, TypeError, "rank: got 2.0"),
        ({"eta": 0.0}, ValueError, "eta: got 0.0"),
        ({"eta": float("nan")}, ValueError, "eta: got nan"),
        ({"at_once": 0}, ValueError, "at_once: got 0"),
        ({"at_once": True}, TypeError, "at_once: got True"),
        ({"batches": []}, ValueError, "batches: got none"),
        ({"pattern": "layer9"}, ValueError, "pattern: got 'layer9', which matches nothing"),
        ({"pattern": ["9"]}, ValueError, "of which '9' matches nothing"),
        ({"pattern": "*"}, ValueError, "no regular expression"),
        ({"trainable": "^9"}, ValueError, "trainable: got '.9'"),
        ({"scale": -1.0}, ValueError, "scale: got -1.0 .*|scale: got -1.0"),
        ({"dropout": 2.0}, ValueError, "dropout: got 2.0"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, error, message, no_shape_checks):
    model = network()
    before, kinds = state(model), [type(m) for m in model.modules()]
    good = {"pattern": "0|4|6", "loss_fn": loss_fn, "batches": batches(), "rank": 2, "eta": 0.1}
    with pytest.raises(error, match=message):
        start_lora_sb(model, **good | change)
    assert_same(state(model), before)
    assert [type(m) for m in model.modules()] == kinds


def test_a_layer_behind_which_a_head_of_zeros_stands_has_no_first_step():
    model = network()
    nn.init.zeros_(model[6].weight)
    with pytest.raises(ValueError, match="step: got zeros only"):
        started(model)
    assert not list(adapters(model))
    assert len(list(adapters(start_lora_sb(model, "6", loss_fn, batches(), rank=2, eta=0.1)))) == 1
