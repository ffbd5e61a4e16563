"""Reading and writing a layer's weight, whatever keeps it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lowrank_ref.core.weights import (
    carry_hooks,
    current,
    has_hooks,
    has_own_forward,
    is_quantised,
    linear_like,
    updated,
    weight_of,
    with_weight,
)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Named(nn.Linear):
    """A subclass that computes what its parent does, with things of its own."""

    def __init__(self, n, m):
        super().__init__(n, m)
        self.name, self.inner = "kept", nn.Linear(1, 1)
        self.register_buffer("seen", torch.tensor([3.0]))


def padded(**options):
    return nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", stride=2, **options)


LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), torch.randn(4, 3)),
    "no bias": (lambda: nn.Linear(3, 2, bias=False), torch.randn(4, 3)),
    "subclass": (lambda: Named(3, 2), torch.randn(4, 3)),
    "convolution": (padded, torch.randn(1, 2, 5, 5)),
    "embedding": (lambda: nn.Embedding(5, 3, padding_idx=1, scale_grad_by_freq=True), torch.tensor([0, 1, 4])),
    "sparse embedding": (lambda: nn.Embedding(5, 3, sparse=True), torch.tensor([0, 1, 4])),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("norm", [None, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_new_weight_in_a_layer_of_the_same_class(name, norm):
    make, x = LAYERS[name]
    layer = make().eval()
    wanted, plain = copy.deepcopy(layer), make()
    if norm is not None:
        layer = norm(layer)
    new_weight = torch.randn(layer.weight.shape)
    with torch.no_grad():
        wanted.weight.copy_(new_weight)
    new = with_weight(layer, new_weight)
    assert type(new) is type(plain) and not new.training and not any(p.requires_grad for p in new.parameters())
    assert new.state_dict().keys() == plain.state_dict().keys() and repr(new) == repr(plain)
    assert torch.equal(new(x), wanted(x))
    new_weight.zero_()
    assert torch.equal(new(x), wanted(x))  # no shared memory
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(new.parameters(), layer.parameters()))


def test_a_subclass_keeps_what_it_has():
    old = Named(3, 2)
    new = with_weight(old, torch.zeros(2, 3))
    assert new.name == "kept" and torch.equal(new.seen, old.seen) and new.seen is not old.seen
    assert torch.equal(new.inner.weight, old.inner.weight) and new.inner is not old.inner


def test_what_would_be_lost_is_refused():
    with pytest.raises(TypeError, match="Halved with a forward of its own"):
        with_weight(Halved(3, 2), torch.zeros(2, 3))
    layer = nn.Linear(3, 2)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook, layer.register_full_backward_hook):
        handle = register(lambda *_: None)
        with pytest.raises(TypeError, match="1 hooks"):
            with_weight(layer, torch.zeros(2, 3))
        handle.remove()
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match="Linear with a forward of its own"):
        with_weight(layer, torch.zeros(2, 3))
    layer.forward = nn.Linear.forward.__get__(layer)  # as accelerate leaves it behind
    assert "forward" not in vars(with_weight(layer, torch.zeros(2, 3)))


def test_own_forwards():
    assert not any(map(has_own_forward, (nn.Linear(1, 1), Named(1, 1), padded(), nn.Embedding(2, 2))))
    assert not has_own_forward(parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not has_own_forward(nn.MultiheadAttention(2, 1).out_proj)
    set_on_it = nn.Linear(1, 1)
    set_on_it.forward = set_on_it.forward
    assert not has_own_forward(set_on_it)
    set_on_it.forward = partial(set_on_it.forward)
    assert all(map(has_own_forward, (Halved(1, 1), set_on_it, nn.Bilinear(1, 1, 1), nn.ReLU())))


def test_hooks_for_all_modules_count():
    layer = nn.Linear(1, 1)
    assert not has_hooks(layer)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "norm",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", amount=0.5)],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_the_weight_of_an_old_style_hook_is_that_of_the_next_forward(norm):
    torch.manual_seed(1)
    saved = norm(nn.Linear(4, 3)).eval()
    saved(torch.ones(1, 4))
    layer = norm(nn.Linear(4, 3)).eval()
    layer.load_state_dict(saved.state_dict())
    assert not torch.equal(layer.weight, saved.weight)  # stale
    W = weight_of(layer).detach().clone()
    layer(torch.ones(1, 4))
    assert torch.equal(W, layer.weight) and torch.equal(current(layer), layer.weight)
    torch.testing.assert_close(W, saved.weight)


def test_a_sum_that_is_not_finite_is_refused():
    W = torch.full((2, 2), 6e4, dtype=torch.float16)
    assert torch.equal(updated(W, torch.full((2, 2), -1.0)), (W.double() - 1).half())
    with pytest.raises(ValueError, match=r"entries beyond 65504, wanted what torch.float16 can hold"):
        updated(W, torch.full((2, 2), 1e4))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="delta_weight: got NaN or infinite"):
            updated(W, torch.full((2, 2), bad))


def test_quantised_layers():
    layer = nn.Linear(2, 2)
    assert not is_quantised(layer) and not is_quantised(nn.ReLU())
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    assert is_quantised(layer)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_a_class(bias):
    W, b = torch.randn(2, 3), torch.randn(2) if bias else None
    linear = linear_like(nn.Linear, W, b)
    assert type(linear) is nn.Linear and all(p.requires_grad for p in linear.parameters())
    assert torch.equal(linear(torch.ones(3)), F.linear(torch.ones(3), W, b)) and repr(linear) == repr(
        nn.Linear(3, 2, bias)
    )
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    if bias:
        conv = linear_like(Conv1D, W, b)
        assert type(conv) is Conv1D and conv.weight.shape == (3, 2) and (conv.nf, conv.nx) == (2, 3)
        torch.testing.assert_close(conv(torch.ones(1, 3)), F.linear(torch.ones(1, 3), W, b))


def test_hooks_go_along_with_their_handles():
    old, new, seen = nn.Linear(2, 2), nn.Linear(2, 2), []
    handles = [
        old.register_forward_hook(lambda module, inputs, y: seen.append("after")),
        old.register_forward_pre_hook(lambda module, inputs, options: seen.append("before"), with_kwargs=True),
        old.register_full_backward_hook(lambda module, dx, dy: seen.append("back")),
    ]
    new.register_forward_hook(lambda module, inputs, y: seen.append("own"))
    carry_hooks(old, new)
    new(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "own", "back"]
    for handle in handles:
        handle.remove()
    new(torch.ones(1, 2))
    assert seen[4:] == ["own"]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_hook_that_computes_the_old_weight_stays_behind():
    new = nn.Linear(2, 2)
    carry_hooks(nn.utils.weight_norm(nn.Linear(2, 2)), new)
    assert not has_hooks(new)
    assert not parametrize.is_parametrized(with_weight(parametrizations.weight_norm(nn.Linear(2, 2)), torch.eye(2)))
