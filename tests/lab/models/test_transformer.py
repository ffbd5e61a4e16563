import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_ref.lab import models
from lowrank_ref.lab.models import transformer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_gpt(**changes):
    shape = dict(vocab_size=11, dim=16, layers=2, heads=4, length=12, generator=seeded())
    return models.GPT(**{**shape, **changes})


@pytest.mark.parametrize(
    "make",
    [
        lambda g: models.MLP((4, 5, 3), generator=g),
        lambda g: models.ConvNet((3, 4), 2, generator=g),
        lambda g: tiny_gpt(generator=g),
        lambda g: models.ViT(8, 4, dim=8, layers=1, heads=2, classes=3, generator=g),
    ],
)
def test_weights_are_a_function_of_the_generator(make):
    one, two, other = make(seeded(1)), make(seeded(1)), make(seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_gpt_names_and_shapes():
    m = tiny_gpt(ffn=40)
    linears = {n: tuple(x.weight.shape) for n, x in m.named_modules() if isinstance(x, nn.Linear)}
    assert {n: s for n, s in linears.items() if n.startswith("blocks.1.")} == {
        "blocks.1.attn.q": (16, 16),
        "blocks.1.attn.k": (16, 16),
        "blocks.1.attn.v": (16, 16),
        "blocks.1.attn.o": (16, 16),
        "blocks.1.mlp.gate": (40, 16),
        "blocks.1.mlp.up": (40, 16),
        "blocks.1.mlp.down": (16, 40),
    }
    assert linears["head"] == (11, 16)
    assert all(x.bias is None for x in m.modules() if isinstance(x, nn.Linear))
    assert not any("cos" in name for name in m.state_dict())


@pytest.mark.parametrize("rope", [True, False])
def test_gpt_sees_only_the_past(rope):
    m = tiny_gpt(rope=rope)
    tokens = torch.randint(11, (2, 12), generator=seeded())
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    before, after = m(tokens), m(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-6)


@pytest.mark.parametrize("rope", [True, False])
def test_gpt_knows_places(rope):
    # Without positions the last logits would not change when two earlier tokens swap.
    m = tiny_gpt(rope=rope, layers=1).double()
    with torch.no_grad():
        for p in m.blocks.parameters():
            p.mul_(10)  # small initial weights hide the effect
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 3, 4]])
    assert (m(a)[0, -1] - m(b)[0, -1]).abs().max() > 1e-6


def test_rotation_depends_on_distance_only():
    cos, sin = transformer._rotation_table(20, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=seeded())

    def score(i, j):
        return float((transformer._rotate(q, cos[i], sin[i]) * transformer._rotate(k, cos[j], sin[j])).sum())

    assert score(3, 1) == pytest.approx(score(17, 15), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(5, 1), abs=1e-3)
    assert transformer._rotate(q, cos[9], sin[9]).norm() == pytest.approx(float(q.norm()), rel=1e-6)


def test_gpt_agrees_with_transformers_llama():
    transformers = pytest.importorskip("transformers")
    m = tiny_gpt(ffn=40)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()
    renames = [
        ("embed.", "model.embed_tokens."), ("blocks.", "model.layers."), ("attn_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"), (".attn.", ".self_attn."),
    ]  # fmt: skip
    state = {}
    for name, value in m.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        for part in "qkvo":
            name = name.replace(f"self_attn.{part}.", f"self_attn.{part}_proj.")
        for part in ("gate", "up", "down"):
            name = name.replace(f"mlp.{part}.", f"mlp.{part}_proj.")
        state["model.norm.weight" if name == "norm.weight" else name.replace("head.", "lm_head.")] = value
    peer.load_state_dict(state)
    tokens = torch.randint(11, (3, 12), generator=seeded())
    with torch.no_grad():
        assert torch.allclose(m(tokens), peer(tokens).logits, atol=1e-5)


def test_gpt_loss_is_nats_per_token():
    m = tiny_gpt()
    x, y = torch.randint(11, (2, 3, 12), generator=seeded())
    want = -torch.log_softmax(m(x), -1).gather(-1, y.unsqueeze(-1)).mean()
    assert torch.allclose(m.loss(x, y), want)
    assert m.loss(x, y).item() == pytest.approx(math.log(11), abs=0.05)  # untrained: all tokens alike


def test_gpt_tied_weights_are_one_tensor():
    tied, loose = tiny_gpt(tie=True), tiny_gpt()
    assert tied.head.weight is tied.embed.weight
    count = {m: sum(p.numel() for p in m.parameters()) for m in (tied, loose)}
    assert count[loose] - count[tied] == 11 * 16


def test_gpt_generates_reproducibly_beyond_its_window():
    m = tiny_gpt()
    start = torch.zeros(2, 3, dtype=torch.int64)
    out = m.generate(start, 20, generator=seeded(5))
    assert out.shape == (2, 23) and torch.equal(out[:, :3], start)
    assert torch.equal(out, m.generate(start, 20, generator=seeded(5)))
    # Nearly cold sampling takes the likeliest token.
    cold = m.generate(start, 1, temperature=1e-4, generator=seeded())
    assert torch.equal(cold[:, -1], m(start)[:, -1].argmax(-1))


@pytest.mark.parametrize(
    "changes, message",
    [(dict(heads=3), "heads: got 3"), (dict(dim=12, heads=4), "dim / heads: got 3")],
)
def test_gpt_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_gpt(**changes)


def test_gpt_refuses_long_windows():
    with pytest.raises(ValueError, match="tokens: got 13"):
        tiny_gpt()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize(
    "name, millions", [("60M", 58_073_600), ("130M", 134_105_856), ("350M", 367_969_280), ("1B", 1_339_082_752)]
)
def test_llama_shapes_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        m = models.GPT(**models.llama_shape(name), length=256)
    assert sum(p.numel() for p in m.parameters()) == millions


def test_llama_shape_refuses():
    with pytest.raises(ValueError, match="7B"):
        models.llama_shape("7B")


def test_vit_patches_are_the_picture():
    m = models.ViT(4, 2, dim=8, layers=1, heads=2, classes=3, generator=seeded())
    x = torch.arange(16.0).view(1, 1, 4, 4)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)
    assert patches[0, 1].tolist() == [2, 3, 6, 7]  # top right
    assert m.embed.weight.shape == (8, 4) and m.places.shape == (4, 8)
    assert m(x).shape == (1, 3)


def test_vit_looks_both_ways():
    m = models.ViT(4, 2, dim=8, layers=1, heads=2, classes=3, generator=seeded())
    hidden = torch.randn(1, 4, 8, generator=seeded())
    changed = hidden.clone()
    changed[:, 3] += 1
    block = m.blocks[0]
    assert not torch.allclose(block(hidden)[:, 0], block(changed)[:, 0], atol=1e-7)
    with pytest.raises(ValueError, match="patch: got 3"):
        models.ViT(4, 3, dim=8, layers=1, heads=2, classes=3)
