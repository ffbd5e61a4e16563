"""Which layers a user means, and what an error says."""

import pytest
import torch
from torch import nn

from lowrank_ref.core.bases import AdaptedLinear
from lowrank_ref.core.layers import replace_linears
from lowrank_ref.core.matching import capped, matcher


class Zero(AdaptedLinear):
    adapter_names = ("shift",)

    def __init__(self, base):
        super().__init__(base)
        self.shift = nn.Parameter(torch.zeros(base.weight.shape))

    def delta_weight(self):
        return self.shift


def model(layers=3):
    block = lambda: nn.ModuleDict({"q_proj": nn.Linear(4, 4), "mq_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})  # noqa: E731
    return nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(layers)), "score": nn.Linear(4, 2)})


def adapted(net):
    return [path for path, module in net.named_modules() if isinstance(module, Zero)]


def test_names_are_ends_of_paths_and_expressions_are_searched():
    assert adapted(replace_linears(model(1), ["q_proj"], Zero)) == ["layers.0.q_proj"]
    assert adapted(replace_linears(model(1), ("score", "mq_proj"), Zero)) == ["layers.0.mq_proj", "score"]
    assert adapted(replace_linears(model(2), ["layers.1.q_proj"], Zero)) == ["layers.1.q_proj"]
    assert adapted(replace_linears(model(1), "q_proj", Zero)) == ["layers.0.q_proj", "layers.0.mq_proj"]


def test_layer_1_is_not_layer_10():
    assert adapted(replace_linears(model(11), ["1.q_proj"], Zero)) == ["layers.1.q_proj"]
    assert adapted(replace_linears(model(11), r"layers\.1\.q_proj$", Zero)) == ["layers.1.q_proj"]


def test_all_linear_leaves_out_heads_and_output_layers():
    net = model(1)
    assert adapted(replace_linears(net, "all-linear", Zero)) == ["layers.0.q_proj", "layers.0.mq_proj"]
    net = model(1)
    net["answer"] = nn.Linear(4, 9)
    net.get_output_embeddings = lambda: net["answer"]
    assert "answer" not in adapted(replace_linears(net, "all-linear", Zero))


@pytest.mark.parametrize(
    "pattern, error, message",
    [
        ("*q_proj", ValueError, r"no regular expression .*'q_proj\$' or the list \['q_proj'\]"),
        (["q_proj", "k_proj"], ValueError, r"of which 'k_proj' matches nothing; near candidates are: .*layers"),
        (["q_proj$"], ValueError, r"of which 'q_proj\$' matches nothing"),
        ([], ValueError, "got an empty list"),
        ([3], TypeError, "wanted a regular expression or a list of names|Expected type"),
        (nn.Linear, TypeError, "wanted a regular expression or a list of names|Expected type"),
        ("norm", ValueError, r"matches nothing that can be replaced, only 3 LayerNorm; near candidates"),
        (["norm"], ValueError, r"of which 'norm' matches nothing that can be replaced, only 3 LayerNorm"),
    ],
)
def test_what_an_error_says(pattern, error, message):
    with pytest.raises(error, match=message):
        replace_linears(model(), pattern, Zero)


@pytest.mark.parametrize(
    "trainable, message",
    [
        ("*score", "no regular expression"),
        (["scor"], "of which 'scor' matches nothing; near candidates are: score"),
        (["score", "nrom"], "of which 'nrom' matches nothing; near candidates are: .*norm"),
        (["q_proj"], "matches only weights of adapted layers"),
    ],
)
def test_trainable_is_read_alike(trainable, message):
    with pytest.raises(ValueError, match=f"trainable: got .*{message}"):
        replace_linears(model(), ["q_proj"], Zero, trainable=trainable)


def test_trainable_takes_names_of_modules_and_parameters():
    net = replace_linears(model(1), ["q_proj"], Zero, trainable=["score.bias", "norm"])
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained == ["layers.0.q_proj.shift", "layers.0.norm.weight", "layers.0.norm.bias", "score.bias"]


def test_near_candidates_are_of_several_kinds():
    """Names of another model are told by what this one has, not by one name of four layers."""
    with pytest.raises(ValueError, match=r"near candidates are: layers\.0\.q_proj, layers\.0\.mq_proj, score$"):
        replace_linears(model(12), ["q_prj"], Zero)


def test_trainable_takes_the_second_name_of_a_tied_weight():
    net = model(1)
    net["answer"] = nn.Linear(4, 4, bias=False)
    net["answer"].weight = net["layers"][0]["norm"].weight
    assert replace_linears(net, ["q_proj"], Zero, trainable=["answer"])["answer"].weight.requires_grad


def test_adapted_already():
    net = replace_linears(model(), "q_proj", Zero)
    with pytest.raises(ValueError, match=r"only 6 Zero \(adapted already\); near candidates are: score"):
        replace_linears(net, "q_proj", Zero)
    with pytest.raises(ValueError, match="only 6 Linear inside one"):
        replace_linears(net, "base$", Zero)


def test_quantised_layers_are_named():
    net = model(6)
    for block in net["layers"]:
        block["q_proj"].weight = nn.Parameter(torch.ones(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"6 quantised layers \(bitsandbytes\?\): layers\.0\.q_proj.* and 2 more"):
        replace_linears(net, "q_proj", Zero)
    assert not adapted(net)
    assert len(adapted(replace_linears(net, ["mq_proj"], Zero))) == 6


def test_bitsandbytes_itself():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(bitsandbytes.nn.Linear8bitLt(4, 4, has_fp16_weights=False))
    net[0].weight.data = net[0].weight.data.to(torch.int8)
    with pytest.raises(TypeError, match="1 quantised layers"):
        replace_linears(net, "0", Zero)


def test_long_lists_are_capped():
    assert capped("abc") == "a, b, c" and capped(range(673)) == "0, 1, 2, 3 and 669 more"
    with pytest.raises(ValueError) as error:
        replace_linears(model(100), "nothing like it", Zero)
    assert len(str(error.value)) < 300


def test_a_matcher_tells_paths():
    assert matcher("pattern", ["a.b"])("x.a.b") and not matcher("pattern", ["a.b"])("x.aa.b")
