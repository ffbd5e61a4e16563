"""What a user of transformers does, on tiny models from a config: ties, saving, Trainer, accelerate, mistakes.

Exchange with PEFT's folders is in `adapters/test_peft_format.py`.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
from battery import LAYERS, WEIGHT_LAYERS, seeded
from safetensors.torch import load_file
from torch import nn

from lowrank_ref.adapters import LoRAConv2d, LoRAEmbedding, LoRALinear, load_peft, save_peft
from lowrank_ref.compression import decompose, deployed
from lowrank_ref.core.groups import optimizer_groups
from lowrank_ref.core.io import load_adapters, save_adapters
from lowrank_ref.core.layers import (
    adapters,
    disabled,
    is_linear,
    merge_adapters,
    put_in_place,
    replace_linears,
    replace_modules,
)
from lowrank_ref.lowbit import BitLinear
from lowrank_ref.pretraining import SLTrainLinear

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained. the model holds")

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 12}
BART |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}
BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.4}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
T5 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "initializer_factor": 3.0}
PICTURE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE |= {"image_size": 8, "patch_size": 4}
TOKENS = torch.arange(14).reshape(2, 7) + 3


def model_of(kind, config, **options):
    """A model with large random weights, so that every layer matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{config}Config")(**options)
    return getattr(transformers, kind)(config).eval()


def bert(**options):
    return model_of("BertForMaskedLM", "Bert", **SIZES, max_position_embeddings=12, initializer_range=0.4, **options)


def gpt2():
    sizes = {"vocab_size": 50, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.4}
    return model_of("GPT2LMHeadModel", "GPT2", **sizes, bos_token_id=0, eos_token_id=0)


def llama():
    options = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.4}
    return model_of("LlamaForCausalLM", "Llama", **options)


def pair():
    torch.manual_seed(0)
    one = transformers.BertConfig(**SIZES, max_position_embeddings=12, initializer_range=0.4)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(one, copy.deepcopy(one))
    return transformers.EncoderDecoderModel(both).eval()


def logits(model, tokens=TOKENS):
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens), **decoder).logits


def moved(model):
    """Shift every trained number of the adapters, as training would."""
    with torch.no_grad():
        for _, layer in adapters(model):
            for p in layer.adapter_parameters().values():
                p.add_(torch.randn(p.shape, generator=seeded(p.numel())).to(p), alpha=0.1)
    return model


def adapt(model, pattern):
    """Linear layers and embeddings that match become LoRA layers, with numbers as after training."""
    make = lambda layer: (LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear)(layer, 2)  # noqa: E731
    accepts = lambda layer: is_linear(layer) or type(layer) is nn.Embedding  # noqa: E731
    return moved(replace_modules(model, pattern, make, accepts=accepts))


# Tied weights.

TIED = {
    "Bart": (partial(model_of, "BartForConditionalGeneration", "Bart", **BART), ["lm_head"]),
    "Marian": (partial(model_of, "MarianMTModel", "Marian", **BART), ["lm_head", "embed_tokens"]),
    "BERT": (bert, ["decoder", "word_embeddings"]),
    "GPT-2": (gpt2, ["lm_head", "wte"]),
    "Llama": (llama, ["lm_head", "embed_tokens"]),
    "T5": (partial(model_of, "T5ForConditionalGeneration", "T5", **T5), ["lm_head", "embed_tokens", "shared"]),
    "Switch": (
        partial(model_of, "SwitchTransformersForConditionalGeneration", "SwitchTransformers", **T5),
        ["lm_head", "embed_tokens"],  # the output is scaled only if the config says that weights are tied
    ),
    "encoder and decoder": (pair, ["decoder.cls.predictions.decoder", "decoder.bert.embeddings.word_embeddings"]),
}


@pytest.mark.parametrize("name, target", [(name, target) for name, (_, targets) in TIED.items() for target in targets])
def test_a_merged_tied_weight_is_saved_and_comes_back(name, target, tmp_path):
    make = TIED[name][0]
    model, start = make(), logits(make())
    others = {n: p for n, p in make().named_parameters(remove_duplicate=False)}
    adapted = logits(adapt(model, [target]))
    assert target == "shared" or (adapted - start).abs().max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapters(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-4)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    saved = logits(model)
    model.tie_weights()  # as `resize_token_embeddings` does
    assert torch.equal(logits(model), saved)
    for path, p in model.named_parameters(remove_duplicate=False):  # what was not adapted has its old value
        assert torch.equal(p, others[path]) or (target in path and path.endswith("weight")), path


def test_only_what_must_come_loose_does():
    model = merge_adapters(adapt(TIED["Bart"][0](), ["lm_head"]))
    assert (
        model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight is model.model.shared.weight
    )
    assert model.lm_head.weight is not model.model.shared.weight and model.config.tie_word_embeddings
    assert (
        merge_adapters(adapt(gpt2(), ["lm_head"])).config.tie_word_embeddings is False
    )  # readers that look there only
    kept = merge_adapters(adapt(gpt2(), ["c_proj"]))
    assert kept.lm_head.weight is kept.transformer.wte.weight and kept.config.tie_word_embeddings


@pytest.mark.parametrize(
    "name, target", [("BERT", "decoder"), ("GPT-2", "wte"), ("T5", "lm_head"), ("Bart", "lm_head")]
)
def test_a_checkpoint_with_an_adapted_tied_layer_resumes(name, target, tmp_path):
    """As Trainer saves and loads it: `save_pretrained`, then a state dict with gaps, then the ties again."""
    model, fresh = (adapt(TIED[name][0](), [target]) for _ in range(2))
    moved(model).save_pretrained(tmp_path)
    missing, unexpected = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    fresh.tie_weights()
    assert not unexpected and set(missing) <= set(fresh._tied_weights_keys)
    assert torch.equal(logits(fresh), logits(model))
    with disabled(model):
        assert torch.equal(logits(model), logits(TIED[name][0]()))
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(TIED[name][0]()))


# Saving.


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*LAYERS, *WEIGHT_LAYERS])
def test_save_pretrained_warns_of_layers_that_from_pretrained_cannot_build(name, tmp_path):
    make = LAYERS.get(name) or WEIGHT_LAYERS[name]
    options = {"rank": 2} if name in LAYERS else {}
    if name == "MPSLinear":
        options["bond"] = 2
    model = replace_linears(bert(), r"query$", partial(make, generator=seeded(), **options))
    message = f"the model holds 1 .*{name}.*save_adapters or save_peft.*merge_adapters"
    for part in (model, model.bert):
        with pytest.warns(UserWarning, match=message):
            part.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=message):
        copy.deepcopy(model).save_pretrained(tmp_path)
    bert().save_pretrained(tmp_path)
    if name in LAYERS:
        with disabled(model):
            model.save_pretrained(tmp_path)
        merge_adapters(model).save_pretrained(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", [lambda m: m.bert, lambda m: m.bert.encoder, lambda m: m.bert.encoder.layer[0]])
def test_a_model_warns_of_surgery_on_a_part_of_it(part, tmp_path):
    model = bert()
    replace_linears(part(model), r"query$", BitLinear)
    for save in (model.save_pretrained, partial(type(model).save_pretrained, model)):
        with pytest.warns(UserWarning, match="the model holds 1 BitLinear, which") as seen:
            save(tmp_path)
        assert len(seen) == 1
    bert().save_pretrained(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_class_that_calls_its_parent_warns_once(tmp_path):
    class Own(transformers.BertModel):
        def save_pretrained(self, *args, **options):
            super().save_pretrained(*args, **options)

    model = replace_linears(Own(bert().config), r"query$", BitLinear)
    with pytest.warns(UserWarning, match="the model holds 1 BitLinear") as seen:
        model.save_pretrained(tmp_path)
    assert len(seen) == 1


def test_a_guarded_model_is_copied_and_pickled(tmp_path):
    model = adapt(bert(), ["query"])
    torch.save(model, tmp_path / "x")
    again = torch.load(tmp_path / "x", weights_only=False)
    assert torch.equal(logits(again), logits(model))
    other = copy.deepcopy(model)
    assert other.save_pretrained.__self__ is other
    assert torch.equal(logits(merge_adapters(other)), logits(merge_adapters(model)))


@pytest.mark.parametrize(
    "make", [partial(SLTrainLinear.from_linear, rank=4, density=0.3), WEIGHT_LAYERS["MaestroLinear"]]
)
def test_plain_layers_of_gpt2_are_conv1d_again_and_come_back(make, tmp_path):
    """A square nn.Linear in their place would be loaded transposed, without a word."""
    model = replace_linears(gpt2(), r"attn\.c_proj$", make)
    wanted = logits(model)
    plain = {
        id(m): m.to_linear() if hasattr(m, "to_linear") else m.plain() for m in model.modules() if hasattr(m, "kind")
    }
    assert [type(layer).__name__ for layer in plain.values()] == ["Conv1D"]
    put_in_place(model, plain)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("rank, warned", [(3, 2), (None, 0)])
def test_thin_layers_in_the_place_of_one_are_told(rank, warned, tmp_path):
    """What Maestro deploys is plain PyTorch, and still no model that `from_pretrained` builds, unless at full rank."""
    model = decompose(gpt2(), "mlp")
    plain = deployed(model, None if rank is None else [rank, rank])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plain.save_pretrained(tmp_path)
    assert [f"the model holds {warned} Sequential" in str(w.message) for w in seen] == [True] * bool(warned)
    if not warned:
        assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(plain))


# Models that multiply with the weights of their layers themselves, or ask for a dtype.

READERS = {
    "T5": (TIED["T5"][0], {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
    "LongT5": (
        partial(model_of, "LongT5ForConditionalGeneration", "LongT5", **T5),
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
    ),
    "Switch": (TIED["Switch"][0], {"input_ids": TOKENS, "decoder_input_ids": TOKENS}),
    "Mamba": (
        partial(model_of, "MambaModel", "Mamba", vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4),
        {"input_ids": TOKENS},
    ),
    "SigLIP": (
        partial(model_of, "SiglipVisionModel", "SiglipVision", **PICTURE),
        {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)},
    ),
    "CLIP": (
        partial(model_of, "CLIPVisionModel", "CLIPVision", **PICTURE),
        {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)},
    ),
    "WavLM": (
        partial(
            model_of,
            "WavLMModel",
            "WavLM",
            **{k: v for k, v in PICTURE.items() if k not in ("image_size", "patch_size")},
            conv_dim=(8,),
            conv_kernel=(10,),
            conv_stride=(5,),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_buckets=8,
        ),
        {"input_values": torch.linspace(-1, 1, 200).reshape(2, 100).sin()},
    ),
}


def outputs(model, inputs):
    """What the model says, in one row."""
    found = model.eval()(**inputs)
    found = found.logits if "logits" in found else found.pooler_output if "pooler_output" in found else found[0]
    return found.flatten()


@pytest.mark.parametrize("name", READERS)
def test_models_that_read_weights_compute_with_the_update(name):
    make, inputs = READERS[name]
    model = make()
    start = outputs(model, inputs).detach()
    replace_linears(model, "", partial(LoRALinear, rank=1, generator=seeded()))
    if name in ("SigLIP", "CLIP"):
        replace_modules(model, "", partial(LoRAConv2d, rank=2), accepts=lambda m: isinstance(m, nn.Conv2d))
    y = outputs(moved(model), inputs)
    assert (y - start).abs().max() > 1e-2
    y.square().sum().backward()
    idle = [path for path, layer in adapters(model) if layer.A.grad is None]
    assert not idle
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, inputs), y, rtol=1e-4, atol=1e-4)
    merged = outputs(merge_adapters(model), inputs)
    torch.testing.assert_close(merged, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())


@pytest.mark.parametrize(
    "name, where", [("Mamba", "MambaMixer"), ("SigLIP", "MultiheadAttention"), ("WavLM", "WavLMAttention")]
)
@pytest.mark.parametrize("make", [BitLinear, partial(LoRALinear, rank=1, dropout=0.1)])
def test_what_a_weight_cannot_say_is_refused_there(name, where, make):
    model = READERS[name][0]()
    before = outputs(model, READERS[name][1])
    with pytest.raises(ValueError, match=f"in {where}, which takes its `weight`.*leave it out of the pattern"):
        replace_linears(model, "", make)
    assert torch.equal(outputs(model, READERS[name][1]), before) and not list(adapters(model))


@pytest.mark.parametrize("name", ["T5", "Switch", "CLIP"])
@pytest.mark.parametrize("make", [BitLinear, WEIGHT_LAYERS["PackedLinear"], partial(LoRALinear, rank=1, dropout=0.1)])
def test_who_only_asks_for_a_dtype_gets_it(name, make):
    make_model, inputs = READERS[name]
    model = make_model().to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    y = outputs(replace_linears(model, "all-linear", make), inputs)
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


# accelerate.


def test_hooks_of_accelerate_run_and_are_not_merged_away():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Shift(ModelHook):
        def post_forward(self, module, output):
            return output + 1

    model = bert()
    layer = model.bert.encoder.layer[0].attention.self.query
    add_hook_to_module(layer, Shift())
    wanted = logits(model)
    replace_linears(model, "query", partial(LoRALinear, rank=2))
    assert torch.equal(logits(model), wanted)
    adapted = logits(moved(model))
    with pytest.raises(TypeError, match=r"forward of its own.*query"):
        merge_adapters(model)
    remove_hook_from_module(layer)
    merge_adapters(model)
    assert accelerate and not torch.equal(logits(model), adapted)


def test_an_offloaded_base_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(bert(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloaded by accelerate.* \(at bert\.encoder"):
        replace_linears(model, "query", partial(LoRALinear, rank=2))


# Trainer.


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"input_ids": TOKENS[0] + i, "labels": TOKENS[0] + i}


def trainer(model, folder, steps, **options):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=Texts(), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda layer: LoRALinear(layer, 2, generator=seeded()), BitLinear])
def test_trainer_trains_saves_and_resumes_to_the_same_numbers(make, tmp_path):
    """Resuming: build and change the model in the same way, then `train(resume_from_checkpoint=True)`."""

    def model():
        return replace_linears(gpt2(), ["c_attn", "lm_head"], make)  # lm_head is tied

    straight, half, resumed = (model() for _ in range(3))
    trainer(straight, tmp_path / "a", 4).train()
    trainer(half, tmp_path / "b", 2).train()
    trainer(resumed, tmp_path / "b", 4).train(resume_from_checkpoint=True)
    assert not torch.equal(logits(straight), logits(half))
    assert torch.equal(logits(resumed), logits(straight))
    names = {name for name, p in straight.named_parameters() if p.requires_grad}
    start = dict(model().named_parameters())
    assert all(torch.equal(p, start[name]) != (name in names) for name, p in straight.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_trainer_with_an_optimizer_from_before_the_surgery_stops_at_the_first_step(tmp_path):
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    replace_linears(model, ["c_attn"], partial(LoRALinear, rank=2))
    with pytest.raises(ValueError, match="build the optimizer after replace_linears"):
        trainer(model, tmp_path, 1, optimizers=(optimizer, None)).train()


# Ten mistakes people make, and what they see.


def classifier():
    sizes = {**SIZES, "max_position_embeddings": 12, "initializer_range": 0.4, "num_labels": 3}
    return model_of("BertForSequenceClassification", "Bert", **sizes)


LORA = partial(LoRALinear, rank=2)


def test_mistake_1_a_wrong_name():
    with pytest.raises(ValueError, match=r"'q_proj'.*matches nothing; near candidates are: .*(query|pooler|dense)"):
        replace_linears(classifier(), ["q_proj"], LORA)
    with pytest.raises(ValueError, match="no regular expression"):
        replace_linears(classifier(), "*query", LORA)


def test_mistake_2_a_list_of_names_is_none():
    one, two = (
        replace_linears(classifier(), ["query", "value"], LORA),
        replace_linears(classifier(), r"(query|value)$", LORA),
    )
    assert [path for path, _ in adapters(one)] == [path for path, _ in adapters(two)]


def test_mistake_3_a_rank_too_big_names_the_layer():
    with pytest.raises(ValueError, match=r"rank: got 17, wanted 1 <= rank <= 16 .*\(at bert\.encoder\.layer\.0\.att"):
        replace_linears(classifier(), ["query"], partial(LoRALinear, rank=17))


def test_mistake_4_a_new_head_forgotten(caplog):
    replace_linears(classifier(), ["query"], LORA)
    assert "froze the head 'classifier'" in caplog.text and 'trainable=["classifier"]' in caplog.text
    caplog.clear()
    model = replace_linears(classifier(), ["query"], LORA, trainable=["classifier"])
    assert not caplog.text and model.classifier.weight.requires_grad


ROBERTA = {**SIZES, "max_position_embeddings": 16, "num_labels": 3}
DISTIL = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 12}
#: Kind of model -> its config, and the heads that are new when it is fine-tuned.
HEADED = {
    "RobertaForSequenceClassification": ("Roberta", ROBERTA, ["classifier"]),
    "ElectraForSequenceClassification": ("Electra", {**ROBERTA, "embedding_size": 16}, ["classifier"]),
    "DistilBertForSequenceClassification": ("DistilBert", DISTIL, ["classifier", "pre_classifier"]),
    "DistilBertForQuestionAnswering": ("DistilBert", DISTIL, ["qa_outputs"]),
    "BartForSequenceClassification": ("Bart", BART, ["classification_head"]),
    "ViTForImageClassification": ("ViT", PICTURE, ["classifier"]),
    "RobertaForMaskedLM": ("Roberta", ROBERTA, []),
}


@pytest.mark.parametrize("kind", HEADED)
def test_mistake_4_and_10_a_head_of_several_layers(kind, caplog):
    config, sizes, heads = HEADED[kind]
    model = replace_linears(model_of(kind, config, **sizes), "all-linear", LORA)
    assert not any(path.startswith(tuple(heads)) for path, _ in adapters(model) if heads)
    assert [f"froze the head {head!r}" in caplog.text for head in heads] == [True] * len(heads)
    assert caplog.text.count("froze the head") == len(heads)
    caplog.clear()
    replace_linears(model_of(kind, config, **sizes), "", LORA)
    assert all(f"adapts the output layer '{head}" in caplog.text for head in heads)


@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("query,value", r"several names are a list: \['query', 'value'\]"),
        ("query value", r"several names are a list: \['query', 'value'\]"),
        ("all_linear", 'the text "all-linear"'),
        (["all-linear"], 'the text "all-linear"'),
    ],
)
def test_mistake_2_names_in_one_text_get_a_hint(pattern, hint):
    with pytest.raises(ValueError, match=f"{hint}.*near candidates are"):
        replace_linears(classifier(), pattern, LORA)


def test_mistake_5_an_optimizer_from_before():
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    replace_linears(model, ["query"], LORA, trainable=["classifier"])
    logits_of = model(input_ids=TOKENS).logits
    logits_of.sum().backward()
    with pytest.raises(ValueError, match="LoRALinear now.*build the optimizer after"):
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax])
def test_mistake_6_the_rate_of_full_fine_tuning(kind, caplog):
    model = replace_linears(classifier(), ["query"], LORA, trainable=["classifier"])
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    model(input_ids=TOKENS).logits.sum().backward()
    optimizer.step()
    assert "adapters want about ten times as much" in caplog.text


@pytest.mark.parametrize("name, spared", [("SoRALinear", "g"), ("RandLoRALinear", "gamma"), ("LoRASBLinear", "R")])
def test_weight_decay_of_what_must_not_shrink_is_noticed(name, spared, caplog):
    def step(**options):
        model = replace_linears(classifier(), ["query"], partial(LAYERS[name], rank=2, generator=seeded()))
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = optimizer_groups(model, 1e-3, 0.1) if options.pop("groups", False) else trained
        model(input_ids=TOKENS).logits.sum().backward()
        torch.optim.AdamW(groups, lr=1e-3, **options).step()
        return [r.getMessage() for r in caplog.records if "weight decay" in r.getMessage()]

    assert not step(groups=True) and not step(weight_decay=0.0)
    (message,) = step(weight_decay=0.1)
    assert f"weight decay 0.1 falls on {spared} of {name}" in message and "take optimizer_groups(model" in message


def test_mistake_7_a_merge_forgotten(tmp_path):
    model = adapt(classifier(), ["query"])
    with pytest.warns(UserWarning, match=r"save_adapters or save_peft.*merge_adapters"):
        model.save_pretrained(tmp_path)


def test_mistake_8_a_cast_after_wrapping_keeps_small_steps():
    model = replace_linears(classifier(), ["query"], LORA).to(torch.bfloat16)
    layer = model.bert.encoder.layer[0].attention.self.query
    assert layer.base.weight.dtype == torch.bfloat16 and layer.A.dtype == layer.B.dtype == torch.float32
    before = layer.A.detach().clone()
    optimizer = torch.optim.AdamW([layer.A, layer.B], lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=TOKENS).logits.float().square().sum().backward()
        optimizer.step()
    assert (before != layer.A).float().mean() > 0.99


def test_mistake_9_another_base(tmp_path):
    """Another size is an error; another weight of the same size is one for what starts from the weight."""
    save_adapters(adapt(classifier(), ["query"]), tmp_path / "x")
    larger = model_of("BertForSequenceClassification", "Bert", **{**SIZES, "hidden_size": 18}, num_labels=3)
    with pytest.raises(ValueError, match=r"shape: bert\.encoder.* is \(2, 16\) in the file, \(2, 18\) in the model"):
        load_adapters(replace_linears(larger, ["query"], LORA), tmp_path / "x")
    model = replace_linears(classifier(), ["query"], partial(LAYERS["DoRALinear"], rank=2))
    other = model_of("BertForSequenceClassification", "Bert", **{**SIZES, "initializer_range": 0.1}, num_labels=3)
    model.bert.encoder.layer[0].attention.self.query.base.load_state_dict(
        other.bert.encoder.layer[0].attention.self.query.state_dict()
    )
    with pytest.raises(ValueError, match="load the base first, then adapt it"):
        logits(model)


@pytest.mark.parametrize("kind", ["LoRALinear", "DoRALinear", "SoRALinear"])
def test_mistake_9_another_base_of_the_same_size_is_told(kind, caplog, tmp_path):
    """Another seed, as another fine-tuning of one architecture; not a cast, and not the same base once more."""
    make = lambda base: replace_linears(base, ["query", "key"], partial(LAYERS[kind], rank=2, generator=seeded()))  # noqa: E731
    save_adapters(moved(make(classifier())), tmp_path / "x")
    load_adapters(make(classifier()), tmp_path / "x")
    load_adapters(make(classifier().to(torch.bfloat16)), tmp_path / "x")
    assert "of the base beside which" not in caplog.text
    other = classifier()
    torch.manual_seed(1)
    nn.init.normal_(other.bert.encoder.layer[0].attention.self.query.weight, std=0.4)
    load_adapters(make(other), tmp_path / "x")
    assert "1 of 2 adapted weights are not those of the base beside which" in caplog.text
    assert "self.query); if that is not meant, load that base first" in caplog.text


def test_mistake_9_a_folder_of_another_base_is_told(caplog, tmp_path):
    model = moved(replace_linears(classifier(), ["query"], LORA))
    for name, base in (("a", "hub/small-one"), ("b", None)):
        save_peft(model, tmp_path / name, base_model=base)
    for name, base in (("a", ""), ("b", "hub/other"), ("a", "/home/me/small-one")):
        other = classifier()
        other.config._name_or_path = base
        load_peft(other, tmp_path / name)
    assert "load_peft" not in caplog.text
    other = classifier()
    other.config._name_or_path = "hub/other"
    load_peft(other, tmp_path / "a")
    assert "made for the base 'hub/small-one', the model is 'hub/other'" in caplog.text


def test_mistake_10_a_pattern_too_wide(caplog):
    replace_linears(classifier(), "", LORA)
    assert "adapts the output layer 'classifier' as well" in caplog.text and "all-linear" in caplog.text
    caplog.clear()
    narrow = replace_linears(classifier(), "all-linear", LORA, trainable=["classifier"])
    assert not caplog.text and not isinstance(narrow.classifier, LoRALinear)
    model = replace_linears(bert(), "all-linear", LORA)
    assert not isinstance(model.cls.predictions.decoder, LoRALinear)


def test_merged_and_unmerged_generate_the_same():
    model = adapt(gpt2(), ["c_attn", "c_fc"])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(TOKENS)}
    said = model.generate(TOKENS, **options)
    with disabled(model):
        assert torch.equal(model.generate(TOKENS, **options), gpt2().generate(TOKENS, **options))
    assert torch.equal(merge_adapters(model).generate(TOKENS, **options), said)
