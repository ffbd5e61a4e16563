"""BitNet layers of transformers and what `from_bitnet` makes of them: the same outputs in float32."""

import pytest
import torch
from torch import nn

from lowrank_ref.core.layers import replace_modules
from lowrank_ref.lowbit import BitLinear, PackedLinear, from_bitnet, is_bitnet
from lowrank_ref.lowbit.ternary import packed_bytes

bitnet = pytest.importorskip("transformers.integrations.bitnet")

M, N = 8, 11


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def codes(m=M, n=N):
    return torch.randint(-1, 2, (m, n), generator=seeded())


def packed(bias=True, norm=False, scale=2.5):
    """Their packed layer, filled as a checkpoint fills it."""
    layer = bitnet.BitLinear(N, M, bias=bias, dtype=torch.float32, use_rms_norm=norm, rms_norm_eps=1e-3)
    layer.weight.copy_(bitnet.pack_weights(codes()))
    layer.weight_scale.fill_(scale)
    return finished(layer)


def offline(bias=True, norm=False, scale=0.4):
    layer = bitnet.AutoBitLinear(N, M, bias=bias, use_rms_norm=norm, rms_norm_eps=1e-3)
    layer.weight.data.copy_(codes())
    layer.weight_scale.fill_(scale)
    return finished(layer)


def online(bias=True, norm=False):
    layer = bitnet.AutoBitLinear(N, M, bias=bias, online_quant=True, use_rms_norm=norm, rms_norm_eps=1e-3)
    layer.weight.data.copy_(torch.randn(M, N, generator=seeded(1)))
    return finished(layer)


def finished(layer):
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(M, generator=seeded(2)))
    if layer.rms_norm is not None:
        layer.rms_norm.weight.data.copy_(torch.rand(N, generator=seeded(3)) + 0.5)
    return layer


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [packed, offline, online])
def test_the_packed_layer_computes_what_theirs_does(make, bias, norm):
    theirs, x = make(bias, norm), torch.randn(2, 5, N, generator=seeded(4))
    ours = from_bitnet(theirs)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # their quantisers are compiled
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    inner = ours[1] if norm else ours
    assert type(inner) is PackedLinear and inner.codes.nbytes == packed_bytes(M, N)
    assert inner.beta.dtype == torch.float32 and not any(p.requires_grad for p in inner.parameters())


def test_beta_is_exact_and_a_weight_of_zeros_stays_one():
    assert from_bitnet(packed(scale=3.0)).beta == torch.tensor(3.0).reciprocal()
    assert from_bitnet(offline(scale=0.3)).beta == torch.tensor(0.3)
    layer = offline(bias=False)
    layer.weight.data.zero_()
    assert not from_bitnet(layer)(torch.randn(3, N)).any()


def test_a_bfloat16_layer():
    layer = offline().to(torch.bfloat16)
    made = from_bitnet(layer)
    assert made.beta == layer.weight_scale.float() and made.bias.dtype == torch.bfloat16
    x = torch.randn(4, N, generator=seeded(4)).bfloat16()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(made(x), layer(x), rtol=0.02, atol=0.05)


def test_a_whole_model_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)).eval()
    config = type("Config", (), {"linear_class": "autobitlinear", "quantization_mode": "offline"})()
    config.use_rms_norm, config.rms_norm_eps = False, 1e-6
    state = {name: torch.randint(-1, 2, p.shape, generator=seeded()).float() for name, p in model.named_parameters()}
    bitnet.replace_with_bitnet_linear(model, ["lm_head"], config)
    for name, module in list(model.named_modules()):
        if is_bitnet(module):
            module.to_empty(device="cpu").weight.data.copy_(state[f"{name}.weight"])
            module.weight_scale.fill_(0.2)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        wanted = model(tokens).logits
        replace_modules(model, "", from_bitnet, accepts=is_bitnet, own_forward=True)
        assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 7
        assert not any(is_bitnet(m) for m in model.modules())
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_no_bitnet_layer_or_holds_other_numbers_is_refused():
    for other in (nn.Linear(4, 4), BitLinear(nn.Linear(4, 4))):
        with pytest.raises(TypeError, match="wanted BitLinear or AutoBitLinear of transformers"):
            from_bitnet(other)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="weight_scale"):
            from_bitnet(offline(scale=scale))
        with pytest.raises(ValueError, match="weight_scale"):
            from_bitnet(packed(scale=scale))
    wrong = offline()
    wrong.weight.data[0, 0] = 0.5
    broken = packed()
    broken.weight[0, 0] = 255
    for layer in (wrong, broken):
        with pytest.raises(ValueError, match=r"T: got \d entries of 88 outside"):
            from_bitnet(layer)
    two = offline()
    two.weight_scale = torch.ones(2)
    with pytest.raises(ValueError, match="got 2 numbers"):
        from_bitnet(two)
    with pytest.raises(ValueError, match="meta"):
        from_bitnet(offline().to("meta"))
    with pytest.raises(TypeError, match="base: got AutoBitLinear with a forward of its own"):
        BitLinear(offline())  # its codes are not its weight
