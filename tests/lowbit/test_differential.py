"""Differential attention against a loop over heads and places, its limits, and transformers' DiffLlama."""

import math

import pytest
import torch
from ternary_cases import attention
from torch import nn
from torch.nn import functional as F

from lowrank_ref.lab.models import GPT
from lowrank_ref.lowbit import DifferentialAttention
from lowrank_ref.lowbit import differential as d


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def maps(q, k, causal):
    """The softmax maps (batch, heads, 2, length, length), formed."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1)


def test_lambda_init_table():
    assert [round(d.lambda_init(depth), 3) for depth in range(3)] == [0.2, 0.356, 0.471]
    assert d.lambda_init(1000) == pytest.approx(0.8)


def test_lambda_by_hand():
    v = torch.tensor([[1.0, 2.0], [0.5, 0.25], [1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    assert d.lambda_value(v, 0.3).item() == pytest.approx(math.exp(1.0) - math.exp(0.0) + 0.3)
    assert abs(d.lambda_value(attention(generator=seeded()).vectors, d.lambda_init(1)) - d.lambda_init(1)) < 0.1


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_difference_of_two_maps(causal):
    q, k, v, lam = randn(2, 3, 2, 5, 4), randn(2, 3, 2, 5, 4, seed=1), randn(2, 3, 5, 8, seed=2), randn(())
    A = maps(q, k, causal)
    difference = A[:, :, 0] - lam * A[:, :, 1]
    torch.testing.assert_close(difference.sum(-1), (1 - lam).expand(2, 3, 5))  # rows sum to 1 - λ
    torch.testing.assert_close(d.differential_attention(q, k, v, lam, causal=causal), difference @ v)


def test_limits_of_lambda():
    q, k, v = randn(2, 3, 2, 5, 4), randn(2, 3, 2, 5, 4, seed=1), randn(2, 3, 5, 8, seed=2)
    plain = F.scaled_dot_product_attention(q[:, :, 0], k[:, :, 0], v, is_causal=True)
    none = d.differential_attention(q, k, v, torch.tensor(0.0), causal=True)
    torch.testing.assert_close(none, plain)
    q, k = (x[:, :, :1].expand(-1, -1, 2, -1, -1) for x in (q, k))  # twice the same map
    same = d.differential_attention(q, k, v, torch.tensor(0.3), causal=True)
    torch.testing.assert_close(same, 0.7 * plain)


def test_layer_by_a_loop():
    layer, x = attention(generator=seeded()), randn(2, 5, 12)
    layer.gain.data.add_(0.1 * randn(6))
    lam, dh, out = d.lambda_value(layer.vectors, layer.initial).item(), 3, torch.zeros(2, 5, 12, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            q, k, v = (f.weight.detach() @ x[b].T for f in (layer.q, layer.k, layer.v))
            A = [
                maps(q[rows].T, k[rows].T, True)
                for rows in (slice((2 * h + i) * dh, (2 * h + i + 1) * dh) for i in range(2))
            ]
            y = (A[0] - lam * A[1]) @ v[2 * dh * h : 2 * dh * (h + 1)].T
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.gain.detach() * (1 - layer.initial)
            out[b, :, 2 * dh * h : 2 * dh * (h + 1)] = y
    torch.testing.assert_close(layer(x), out @ layer.o.weight.T)


def test_agrees_with_diffllama():
    """Their heads pair up as (i, i + h), ours as (2i, 2i + 1); their norm has no gain."""
    module = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    dim, maps_, length = 16, 4, 6
    config = module.DiffLlamaConfig(
        hidden_size=dim, num_attention_heads=maps_, num_key_value_heads=maps_, rms_norm_eps=1e-5, lambda_std_dev=0.1
    )
    config._attn_implementation = "eager"
    theirs = module.DiffLlamaAttention(config, layer_idx=2).eval()
    base = GPT(5, dim=dim, layers=1, heads=maps_, length=length, generator=seeded())
    ours = DifferentialAttention(base.blocks[0].attn, depth=2)
    order = torch.tensor([0, 2, 1, 3])  # our map j is their head order[j]
    ours.vectors.data.copy_(torch.stack([theirs.lambda_q1, theirs.lambda_k1, theirs.lambda_q2, theirs.lambda_k2]))
    for ours_, theirs_ in ((ours.q, theirs.q_proj), (ours.k, theirs.k_proj)):
        ours_.weight.data.copy_(theirs_.weight.unflatten(0, (maps_, -1))[order].flatten(0, 1))
    # Value head i of ours is the pair (i, i + h) of theirs, side by side.
    ours.v.weight.data.copy_(theirs.v_proj.weight.unflatten(0, (maps_, -1))[order].flatten(0, 1))
    ours.o.weight.data.copy_(theirs.o_proj.weight)
    x = torch.randn(2, length, dim, generator=seeded(1))
    cos, sin = base.cos, base.sin  # (length, half); theirs are doubled
    wide = tuple(torch.cat([table, table], dim=-1).expand(2, -1, -1) for table in (cos, sin))
    mask = torch.full((length, length), -math.inf).triu(1)[None, None]
    wanted = theirs(x, position_embeddings=wide, attention_mask=mask)[0]
    torch.testing.assert_close(ours(x, (cos, sin)), wanted, rtol=1e-4, atol=1e-5)


def test_rotation_turns_pairs():
    x, angle = randn(2, 3, 4), randn(3, 2, seed=1)
    y = d.rotate(x, angle.cos(), angle.sin())
    wanted = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(y, torch.cat([wanted.real, wanted.imag], dim=-1))


def test_in_a_gpt_it_sees_no_future_and_takes_over_the_matrices():
    model = GPT(11, dim=16, layers=2, heads=4, length=8, generator=seeded())
    before = model.blocks[0].attn
    for depth, block in enumerate(model.blocks):
        block.attn = DifferentialAttention(block.attn, depth=depth, generator=seeded())
    layer = model.blocks[0].attn
    assert layer.q is before.q and layer.o is before.o and layer.heads == 2
    own = sum(p.numel() for p in layer.parameters())
    assert own == 4 * 16**2 + 4 * 4 + 2 * 4  # 4d² + 4d_h + 2d_h
    tokens = torch.randint(11, (2, 8), generator=seeded())
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_bad_arguments_are_refused():
    odd = GPT(5, dim=12, layers=1, heads=3, length=4, rope=False).blocks[0].attn
    with pytest.raises(ValueError, match="base.heads: got 3"):
        DifferentialAttention(odd, depth=0)
    even = GPT(5, dim=12, layers=1, heads=2, length=4).blocks[0].attn
    for depth, error in ((-1, ValueError), (0.5, TypeError)):
        with pytest.raises(error):
            DifferentialAttention(even, depth=depth)
    assert isinstance(DifferentialAttention(even, depth=0).q, nn.Linear)
