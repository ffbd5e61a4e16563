"""Both directions against the real peft package: what we write it computes, and what it writes we compute."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lowrank_ref.adapters import (
    DoRALinear,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    PiSSALinear,
    load_peft,
    rslora_scaling,
    save_peft,
)
from lowrank_ref.core.layers import AdaptedLinear, adapters, merge_adapters, replace_linears, replace_modules
from lowrank_ref.ranks.sora import SoRALinear, prune

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
ATTENTION = r"attention\.self\.(query|value)$"


class Mixed(nn.Module):
    """Embedding, convolution and linear layers; `head` also ends the path of `block.head`."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 6)})
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        image = self.emb(ids).reshape(len(ids), 2, 4, 4)  # ids (batch, 4)
        hidden = self.conv(image).reshape(len(ids), 2, 8).mean(1)
        return self.head(torch.relu(self.block.head(self.block.norm(self.block.fc(hidden)))))


@pytest.fixture
def ids():
    return torch.arange(20).reshape(5, 4) % 11


def move(model):
    """Put random numbers into everything that trains, so that no update is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def logits(model, batch):
    with torch.no_grad():
        out = model.eval()(batch)
    return getattr(out, "logits", out)


def assert_same(got, wanted, base):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (wanted - base).abs().max() > 1e-2  # the negative control: the adapter does something


def three_kinds(model, **options):
    replace_modules(
        model, r"^emb$", partial(LoRAEmbedding, rank=2, **options), accepts=lambda m: isinstance(m, nn.Embedding)
    )
    replace_modules(
        model, r"^conv$", partial(LoRAConv2d, rank=3, **options), accepts=lambda m: isinstance(m, nn.Conv2d)
    )
    return replace_linears(model, r"^(block\.fc|head)$", partial(LoRALinear, rank=2, **options))


# Ours to peft.


def test_bert_with_its_head_opens_in_peft(bert, tokens, tmp_path):
    model = move(replace_linears(bert(), ATTENTION, partial(LoRALinear, rank=2, alpha=3), trainable=r"^classifier\."))
    save_peft(model, tmp_path, base_model="tiny", task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path)
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    assert_same(logits(theirs, tokens), logits(model, tokens), logits(bert(), tokens))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(path for path, _ in adapters(model))
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (2, 3, False)


def test_a_task_head_that_did_not_train_is_saved_too(bert, tokens, tmp_path, recwarn):
    model = move(replace_linears(bert(), ATTENTION, partial(LoRALinear, rank=2)))
    save_peft(model, tmp_path, task_type="SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(bert(), tmp_path)
    assert not [w for w in recwarn if "missing" in str(w.message)]
    assert_same(logits(theirs, tokens), logits(model, tokens), logits(bert(), tokens))


@pytest.mark.parametrize("task_type, saved", [("SEQ_CLS", ["classifier"]), (None, ["classifier.out_proj"])])
def test_a_head_with_parts_opens_in_peft(task_type, saved, tokens, tmp_path):
    transformers = pytest.importorskip("transformers")

    def roberta():
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
        config = transformers.RobertaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
        return transformers.RobertaForSequenceClassification(config).eval()

    lora = partial(LoRALinear, rank=2)
    model = move(replace_linears(roberta(), ATTENTION, lora, trainable=r"classifier\.out_proj"))
    save_peft(model, tmp_path, task_type=task_type)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == saved
    theirs = peft.PeftModel.from_pretrained(roberta(), tmp_path)
    assert_same(logits(theirs, tokens), logits(model, tokens), logits(roberta(), tokens))
    torch.testing.assert_close(logits(load_peft(roberta(), tmp_path), tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, PiSSALinear])
def test_gpt2_opens_in_peft(kind, gpt2, tokens, tmp_path):
    layers = r"c_(attn|fc)$|lm_head"  # Conv1D, and a linear layer whose weight is tied to the embedding
    model = move(replace_linears(gpt2(), layers, partial(kind, rank=3, alpha=5)))
    save_peft(model, tmp_path, task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path)
    assert_same(logits(theirs, tokens), logits(model, tokens), logits(gpt2(), tokens))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["r"] == (6 if kind is PiSSALinear else 3)
    assert config["use_dora"] == (kind is DoRALinear)


def test_embedding_convolution_and_a_path_that_ends_another_open_in_peft(ids, tmp_path):
    model = move(three_kinds(Mixed(), alpha=5))
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Mixed(), tmp_path)
    assert_same(logits(theirs, ids), logits(model, ids), logits(Mixed(), ids))
    assert not isinstance(theirs.base_model.model.block["head"], peft.tuners.lora.LoraLayer)


def test_layers_of_different_rank_and_scale_open_in_peft(ids, tmp_path):
    model = replace_linears(Mixed(), r"^block\.fc$", partial(LoRALinear, rank=5, alpha=7, scaling=rslora_scaling))
    model = move(replace_linears(model, r"^head$", partial(LoRALinear, rank=1, alpha=1.3)))
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Mixed(), tmp_path)
    assert_same(logits(theirs, ids), logits(model, ids), logits(Mixed(), ids))


class Pool(nn.Module):
    """A module with a parameter of its own and a child: trained in full, it is one entry of modules_to_save."""

    def __init__(self):
        super().__init__()
        self.gain, self.dense, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.gain * self.dense(x))


def with_pool():
    model = Mixed()
    torch.manual_seed(5)
    model.head = Pool()
    return model


def test_a_module_with_children_trained_in_full_opens_in_peft_and_here(ids, tmp_path):
    lora = partial(LoRALinear, rank=2)
    model = move(replace_linears(with_pool(), r"block\.fc", lora, trainable=r"^head\.(gain|dense\.bias)"))
    save_peft(model, tmp_path)
    # block.head did not train, but PEFT takes every path that ends with "head"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["block.head", "head"]
    theirs = peft.PeftModel.from_pretrained(with_pool(), tmp_path)
    assert_same(logits(theirs, ids), logits(model, ids), logits(with_pool(), ids))
    torch.testing.assert_close(logits(load_peft(with_pool(), tmp_path), ids), logits(model, ids))


def test_the_file_is_plain(ids, tmp_path):
    model = move(three_kinds(Mixed().double()))
    save_peft(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    shapes = {
        "block.fc.lora_A.weight": (2, 8),
        "block.fc.lora_B.weight": (6, 2),
        "conv.lora_A.weight": (3, 2, 3, 3),
        "conv.lora_B.weight": (4, 3, 1, 1),
        "emb.lora_embedding_A": (2, 11),
        "emb.lora_embedding_B": (8, 2),
        "head.lora_A.weight": (2, 6),
        "head.lora_B.weight": (3, 2),
    }
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {f"base_model.model.{k}": v for k, v in shapes.items()}
    text = (tmp_path / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_cannot_be_said_in_the_format_is_refused(gpt2, tmp_path):
    class Shift(AdaptedLinear):
        adapter_names = ("shift",)

        def __init__(self, base):
            super().__init__(base)
            self.shift = nn.Parameter(torch.zeros(self.out_features, self.in_features))

        def delta_weight(self):
            return self.shift

    lora = partial(LoRALinear, rank=2)
    with pytest.raises(ValueError, match="Shift at 'head'"):
        save_peft(replace_linears(Mixed(), "^head$", Shift), tmp_path)
    with pytest.raises(ValueError, match="base frozen"):
        save_peft(replace_linears(Mixed(), r"block\.fc", lora, trainable=r"block\.fc\.bias"), tmp_path)
    with pytest.raises(ValueError, match="DoRA"):
        mixed = replace_linears(Mixed(), r"block\.fc", lora)
        save_peft(replace_linears(mixed, r"^head$", partial(DoRALinear, rank=2)), tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        save_peft(Mixed(), tmp_path)
    with pytest.raises(ValueError, match="two places"):  # PEFT would train a copy of wte and leave the output layer
        save_peft(replace_linears(gpt2(), "c_attn", lora, trainable="wte"), tmp_path)
    with pytest.raises(ValueError, match="hide"):  # PEFT never adapts what lies under a module trained in full
        save_peft(replace_linears(Mixed(), r"block\.head", lora, trainable=r"^head\."), tmp_path)
    with pytest.raises(ValueError, match="empty module path"):
        save_peft(LoRALinear(nn.Linear(3, 3), 2), tmp_path)
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="two places"):
        save_peft(replace_linears(nn.Sequential(shared, shared), "0", lora), tmp_path)
    assert not list(tmp_path.iterdir())


def test_plain_lora_refuses_the_rest(tmp_path):
    lora = partial(LoRALinear, rank=2)
    save_peft(replace_linears(Mixed(), "head", lora), tmp_path, plain_lora=True)
    with pytest.raises(ValueError, match="use_dora"):
        save_peft(replace_linears(Mixed(), "head", partial(DoRALinear, rank=2)), tmp_path, plain_lora=True)
    with pytest.raises(ValueError, match="modules_to_save"):
        save_peft(replace_linears(Mixed(), "head", lora, trainable="norm"), tmp_path, plain_lora=True)
    with pytest.raises(ValueError, match="rank_pattern"):
        mixed = replace_linears(Mixed(), "head", lora)
        save_peft(replace_linears(mixed, r"block\.fc", partial(LoRALinear, rank=3)), tmp_path, plain_lora=True)


def conv(options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, **options))


SPECIAL = [{"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")] + [{"dilation": 2}]


@pytest.mark.parametrize("options", SPECIAL, ids=lambda options: str(list(options.values())[-1]))
def test_a_convolution_that_peft_would_adapt_otherwise_is_refused_both_ways(options, tmp_path):
    model = replace_modules(conv(options), "0", partial(LoRAConv2d, rank=2), accepts=lambda m: type(m) is nn.Conv2d)
    with pytest.raises(ValueError, match="PEFT leaves out what is special in Conv2d"):
        save_peft(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    saved_by_peft(conv(options), tmp_path, target_modules=["0"])  # peft itself says nothing
    with pytest.raises(ValueError, match="0: PEFT leaves out what is special in Conv2d"):
        load_peft(conv(options), tmp_path)


def test_strides_and_named_padding_of_a_convolution_are_pefts_too(tmp_path):
    for options in ({"stride": 2, "padding": 1}, {"padding": "same"}):
        build = partial(conv, options)
        model = replace_modules(build(), "0", partial(LoRAConv2d, rank=2), accepts=lambda m: type(m) is nn.Conv2d)
        save_peft(move(model), tmp_path)
        x = torch.randn(2, 2, 7, 7)
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
        assert_same(logits(theirs, x), logits(model, x), logits(build(), x))
        torch.testing.assert_close(logits(load_peft(build(), tmp_path), x), logits(model, x))


class Ends(nn.Module):
    """Names that end like those of PEFT's own modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.dropout, self.out, self.lists = (
            nn.Linear(4, 4),
            nn.Dropout(0.0),
            nn.Linear(4, 3),
            nn.ParameterList(),
        )
        self.lists.append(nn.Parameter(torch.ones(4)))

    def forward(self, x):
        return self.out(self.dropout(self.fc(x) * self.lists[0]))


def test_trained_modules_that_peft_cannot_train_are_refused(tmp_path):
    lora = partial(LoRALinear, rank=2)
    with pytest.raises(ValueError, match=r"'out'.*\], which PEFT takes for parts of its layers"):
        save_peft(replace_linears(Ends(), "fc", lora, trainable=r"^out\."), tmp_path)
    with pytest.raises(TypeError, match="modules_to_save"):  # the right answer: peft cannot do it either
        peft.get_peft_model(Ends(), peft.LoraConfig(target_modules=["fc"], modules_to_save=["out"]))
    with pytest.raises(ValueError, match=r"\['lists'\], lists without a forward"):
        save_peft(replace_linears(Ends(), "fc", lora, trainable="lists"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_gate_without_rank_asks_for_pruning(tmp_path):
    model = replace_linears(Mixed(), r"fc|^head", partial(SoRALinear, rank=2))
    with torch.no_grad():
        model.head.g.zero_()
    with pytest.raises(ValueError, match=r"SoRALinear at 'head', rank 0, wanted prune\(model\)"):
        save_peft(model, tmp_path / "x")
    save_peft(prune(model), tmp_path / "x")
    assert [path for path, _ in adapters(load_peft(Mixed(), tmp_path / "x"))] == ["block.fc"]


def test_dropout_goes_there_and_back(ids, tmp_path):
    lora = partial(LoRALinear, rank=2, dropout=0.25)
    conv = partial(LoRAConv2d, rank=2, dropout=0.25)
    model = replace_linears(Mixed(), "fc", lora)
    model = move(replace_modules(model, "conv", conv, accepts=lambda m: isinstance(m, nn.Conv2d)))
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Mixed(), tmp_path, is_trainable=True)
    again = load_peft(Mixed(), tmp_path)
    drops = [m.p for m in theirs.modules() if isinstance(m, nn.Dropout)]
    assert drops == [m.p for m in again.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    assert not torch.equal(again.train()(ids), again(ids))  # it acts
    assert torch.equal(logits(again, ids), logits(model, ids))
    saved_by_peft(Mixed(), tmp_path, target_modules=["emb", "fc"], lora_dropout=0.1)
    assert load_peft(Mixed(), tmp_path).block.fc.dropout.p == 0.1


def test_peft_finds_base_and_class_by_itself(bert, gpt2, tokens, tmp_path):
    """The model's own name goes into the folder, and what AutoPeftModel... needs beside it."""
    bert().save_pretrained(tmp_path / "base")
    base = type(bert()).from_pretrained(tmp_path / "base")
    model = move(replace_linears(base, ATTENTION, partial(LoRALinear, rank=2))).eval()
    for task, auto in (("seq_cls", peft.AutoPeftModelForSequenceClassification), (None, peft.AutoPeftModel)):
        save_peft(model, tmp_path / "adapter", task_type=task)
        theirs = auto.from_pretrained(tmp_path / "adapter", num_labels=3)
        assert_same(logits(theirs, tokens), logits(model, tokens), logits(bert(), tokens))
    save_peft(model, tmp_path / "adapter", base_model="elsewhere")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "elsewhere"


@pytest.mark.usefixtures("group_of_one")
def test_a_compiled_or_parallel_model_is_saved_as_the_plain_one(ids, tmp_path):
    build = partial(replace_linears, pattern=r"fc|^head", factory=partial(LoRALinear, rank=2), trainable="norm|conv")
    plain = move(build(Mixed()))
    save_peft(plain, tmp_path / "plain")
    parallel = nn.parallel.DistributedDataParallel(plain)
    inside = move(build(Mixed()))
    inside.block["fc"] = torch.compile(inside.block["fc"], backend="eager")
    inside.conv = torch.compile(inside.conv, backend="eager")
    models = {"DDP": parallel, "compiled": torch.compile(plain, backend="eager"), "inside": inside}
    for name, model in models.items():
        save_peft(model, tmp_path / name)
        old, new = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", name))
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
        configs = [(tmp_path / n / "adapter_config.json").read_bytes() for n in ("plain", name)]
        assert configs[0] == configs[1]
    with pytest.raises(ValueError, match="load first, then wrap"):
        load_peft(nn.parallel.DistributedDataParallel(Mixed()), tmp_path / "plain")


def test_a_compiled_model_takes_a_folder_and_is_compiled_anew(no_shape_checks, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    model, x = move(replace_linears(build(), "0", partial(LoRALinear, rank=2))), torch.randn(3, 4)
    save_peft(model, tmp_path)
    again = torch.compile(build(), backend="eager")
    before = logits(again, x)
    assert load_peft(again, tmp_path) is again
    assert_same(logits(again, x), logits(model, x), before)


# peft's to ours.


def saved_by_peft(base, folder, **options):
    """Let peft adapt a model, give it non-zero factors and save it; return its model."""
    theirs = move(peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **options)))
    theirs.save_pretrained(folder)
    return theirs


CONFIGS = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["query", "value"]},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["query"]},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["query", "dense"]},
    "head": {"r": 3, "task_type": "SEQ_CLS", "target_modules": ["query"]},
    "patterns": {
        "r": 3,
        "target_modules": ["query", "value"],
        "use_rslora": True,
        "rank_pattern": {"value": 2, r"^bert\.encoder\.layer\.1\.attention\.self\.query": 5},
        "alpha_pattern": {r"layer\.0\..*": 2.5},
    },
    "all-linear": {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "expression": {"r": 2, "target_modules": r".*layer\.1\..*dense"},
    "some layers": {"r": 2, "target_modules": ["query"], "layers_to_transform": [1]},
    "without": {"r": 2, "target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
    "higher than the matrix": {"r": 20, "target_modules": ["query"]},
    "absent": {"r": 2, "target_modules": ["query", "k_proj"], "exclude_modules": ["layer.0.attention.self.query"]},
    "idle patterns": {"r": 2, "target_modules": ["query"], "rank_pattern": {"nose": 5}, "alpha_pattern": {"ear": 1}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bert_from_peft_opens_here(name, bert, tokens, tmp_path):
    theirs = saved_by_peft(bert(), tmp_path, **CONFIGS[name])
    model = load_peft(bert(), tmp_path)
    assert_same(logits(model, tokens), logits(theirs, tokens), logits(bert(), tokens))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == theirs.get_nb_trainable_parameters()[0]
    merged = logits(merge_adapters(model), tokens)
    torch.testing.assert_close(merged, logits(theirs.merge_and_unload(), tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_from_peft_opens_here(dora, gpt2, tokens, tmp_path):
    theirs = saved_by_peft(gpt2(), tmp_path, r=3, target_modules=["c_attn", "c_proj"], use_dora=dora)
    model = load_peft(gpt2(), tmp_path)
    assert_same(logits(model, tokens), logits(theirs, tokens), logits(gpt2(), tokens))


def test_embedding_and_convolution_from_peft_open_here(ids, tmp_path):
    options = {"r": 4, "target_modules": ["emb", "conv", "fc"], "modules_to_save": ["norm"], "rank_pattern": {"fc": 2}}
    theirs = saved_by_peft(Mixed(), tmp_path, **options)
    model = load_peft(Mixed(), tmp_path)
    assert [type(layer) for _, layer in adapters(model)] == [LoRAEmbedding, LoRAConv2d, LoRALinear]
    assert_same(logits(model, ids), logits(theirs, ids), logits(Mixed(), ids))


def test_base_weights_that_peft_adds_are_loaded(gpt2, tokens, tmp_path):
    theirs = move(peft.get_peft_model(gpt2(), peft.LoraConfig(init_lora_weights=False, target_modules=["lm_head"])))
    theirs.save_pretrained(tmp_path)  # writes lm_head's base weight as well
    assert any("lm_head.base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model = load_peft(gpt2(), tmp_path)
    assert_same(logits(model, tokens), logits(theirs, tokens), logits(gpt2(), tokens))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"lm_head.A", "lm_head.B"}


def test_a_larger_vocabulary_that_peft_saved_is_loaded(gpt2, tokens, tmp_path):
    """The new rows exist in the file only; PEFT and we read them into a model that was resized in the same way."""

    def resized(seed):
        torch.manual_seed(seed)
        model = gpt2()
        model.resize_token_embeddings(53)
        with torch.no_grad():
            model.transformer.wte.weight[50:] = torch.randn(3, 16) * seed
        return model

    theirs = move(peft.get_peft_model(resized(1), peft.LoraConfig(init_lora_weights=False, target_modules=["c_attn"])))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    new = tokens + 3  # up to 52
    model = load_peft(resized(2), tmp_path)
    assert_same(logits(model, new), logits(theirs, new), logits(resized(2), new))
    assert not model.transformer.wte.weight.requires_grad
    with pytest.raises(ValueError, match=r"shape: transformer\.wte\.weight is \(53, 16\) in the file"):
        load_peft(gpt2(), tmp_path)
    damage(tmp_path, lambda t, c: t.update({P + "transformer.ln_f.weight": torch.ones(16)}))
    with pytest.raises(ValueError, match="unknown key: .*ln_f"):
        load_peft(resized(2), tmp_path)


def test_a_trained_module_with_a_tied_weight_is_refused(gpt2, tmp_path):
    saved_by_peft(gpt2(), tmp_path, target_modules=["c_attn"], modules_to_save=["wte"])
    with pytest.raises(ValueError, match="two places"):  # in peft only the embedding trains, here both would
        load_peft(gpt2(), tmp_path)


def test_our_own_folder_opens_here(ids, tmp_path):
    model = move(replace_linears(Mixed(), r"fc|head", partial(DoRALinear, rank=2), trainable=r"norm|^conv"))
    save_peft(model, tmp_path)
    again = load_peft(Mixed(), tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    save_peft(again, tmp_path / "again")
    old, new = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_loading_leaves_the_global_generator_alone(tmp_path):
    save_peft(three_kinds(Mixed()), tmp_path)
    model, state = Mixed(), torch.get_rng_state()
    load_peft(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


# Training.


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_and_three_adam_steps_equal_pefts(dora, bert, tokens, tmp_path):
    theirs = saved_by_peft(bert(), tmp_path, r=3, lora_alpha=5, target_modules=["query", "value"], use_dora=dora)
    ours = load_peft(bert(), tmp_path).eval()
    theirs.eval()
    labels = torch.tensor([0, 1, 2])
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens).logits, labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    live = theirs.base_model.model
    for path, layer in adapters(ours):
        other = live.get_submodule(path)
        pairs = [(layer.A, other.lora_A["default"].weight), (layer.B, other.lora_B["default"].weight)]
        if dora:
            pairs.append((layer.magnitude, other.lora_magnitude_vector["default"].weight))
        for mine, its in pairs:
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


# Damaged folders. Each edit takes the tensors and the config of a good folder and spoils one of them.


def damage(folder, edit):
    tensors, config = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    edit(tensors, fields)
    save_file(tensors, folder / "adapter_model.safetensors")
    config.write_text(json.dumps(fields))


P = "base_model.model."
EDITS = {
    "missing half": (lambda t, c: t.pop(P + "head.lora_B.weight"), "head: got"),
    "missing pair": (lambda t, c: [t.pop(P + f"head.lora_{x}.weight") for x in "AB"], "missing: no factors"),
    "missing bias": (lambda t, c: t.pop(P + "block.norm.bias"), r"missing: block\.norm\.bias"),
    "extra": (lambda t, c: t.update({P + "head.lora_C.weight": torch.ones(1)}), "unknown key: .*lora_C"),
    "extra base weight": (lambda t, c: t.update({P + "conv.weight": torch.ones(1)}), "unknown key"),
    "prefix": (lambda t, c: t.update({"block.norm.extra": torch.ones(1)}), "unknown key"),
    "extra saved": (lambda t, c: t.update({P + "block.norm.x": torch.ones(1)}), r"extra: block\.norm\.x"),
    "no such module": (
        lambda t, c: (
            c["target_modules"].append("nose"),
            t.update({P + "nose.lora_A.weight": torch.ones(2, 6), P + "nose.lora_B.weight": torch.ones(3, 2)}),
        ),
        "nose: .*no such layer",
    ),
    "not a target": (lambda t, c: c["target_modules"].remove("head"), "head is no target"),
    "target without factors": (lambda t, c: c["target_modules"].append("conv"), "missing: no factors .*conv"),
    "wider target": (lambda t, c: c.update(target_modules=["fc", "head"]), r"block\.head is a target without"),
    "shape of A": (lambda t, c: t.update({P + "head.lora_A.weight": torch.ones(2, 5)}), "head: the file adapts"),
    "shape of B": (lambda t, c: t.update({P + "head.lora_B.weight": torch.ones(3, 1)}), "head: A, B"),
    "shape saved": (lambda t, c: t.update({P + "block.norm.bias": torch.ones(5)}), r"shape: block\.norm\.bias"),
    "NaN": (lambda t, c: t[P + "head.lora_A.weight"][0].fill_(float("nan")), "head: A: got 6 NaN"),
    "infinite head": (lambda t, c: t[P + "block.norm.bias"].fill_(float("inf")), "not finite"),
    "rank": (lambda t, c: c.update(r=3), "got rank 2, wanted 3"),
    "magnitudes": (lambda t, c: c.update(use_dora=True), "magnitude"),
    "pattern": (lambda t, c: c.update(rank_pattern={"head": 3}), "head: A: got rank 2, wanted 3"),
    "too fine": (
        lambda t, c: t.update({P + "head.lora_A.weight": torch.ones(2, 6).double() + 1e-12}),
        "head: factors of torch.float64 would change",
    ),
    "too large": (
        lambda t, c: t.update({P + "block.norm.bias": torch.ones(6).double() * 1e300}),
        r"dtype: block\.norm\.bias is torch\.float64",
    ),
    "method": (lambda t, c: c.update(peft_type="LOHA"), "peft_type: got 'LOHA'"),
    "bias": (lambda t, c: c.update(bias="all"), "bias: got 'all'"),
    "lora_bias": (lambda t, c: c.update(lora_bias=True), "lora_bias: got True"),
    "replication": (lambda t, c: c.update(layer_replication=[[0, 1]]), "layer_replication"),
    "tokens": (lambda t, c: c.update(trainable_token_indices=[1]), "trainable_token_indices"),
    "parameters": (lambda t, c: c.update(target_parameters=["w"]), "target_parameters"),
    "residual base": (lambda t, c: c.update(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "alpha": (lambda t, c: c.update(lora_alpha=0), "lora_alpha: got 0"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_damaged_folder_raises_and_changes_nothing(name, tmp_path):
    lora = partial(LoRALinear, rank=2)
    save_peft(move(replace_linears(Mixed(), r"fc|^head", lora, trainable="norm")), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    if isinstance(fields["target_modules"], str):  # an expression, since block.head ends with head
        damage(tmp_path, lambda t, c: c.update(target_modules=["block.fc", "head"], exclude_modules=["block.head"]))
    load_peft(Mixed(), tmp_path)  # good so far
    edit, message = EDITS[name]
    if name == "wider target":
        damage(tmp_path, lambda t, c: c.update(exclude_modules=None))
    damage(tmp_path, edit)
    model = Mixed()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_peft(model, tmp_path)
    assert not list(adapters(model)) and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_that_is_adapted_already_is_refused(tmp_path):
    model = replace_linears(Mixed(), "fc", partial(LoRALinear, rank=2))
    save_peft(model, tmp_path)
    with pytest.raises(ValueError, match="adapter: block.fc"):
        load_peft(model, tmp_path)


def test_what_a_layer_refuses_leaves_the_rest_as_it_was(tmp_path):
    """DoRA's layer is built when the norm's values are in the model; a zero row, which has no direction, stops it."""
    save_peft(move(replace_linears(Mixed(), "fc", partial(DoRALinear, rank=2), trainable="norm")), tmp_path)
    model = Mixed()
    with torch.no_grad():
        model.block.fc.weight[1] = 0
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="zero, NaN or infinite rows"):
        load_peft(model, tmp_path)
    assert not list(adapters(model)) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_without_memory_is_refused(tmp_path):
    save_peft(replace_linears(Mixed(), "fc", partial(LoRALinear, rank=2)), tmp_path)
    with pytest.raises(ValueError, match=r"block\.fc: the layer is on the meta device"):
        load_peft(Mixed().to("meta"), tmp_path)
