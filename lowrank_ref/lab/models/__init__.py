"""The networks of the chapters, each small enough to read in one sitting, and one real pretrained encoder.

    MLP, ConvNet            digits and MNIST
    GPT                     a causal language model in LLaMA's style: RMSNorm, rotary positions, SwiGLU
    ViT                     the same block without causality, on image patches
    llama_shape             the sizes that the GaLore, Fira, SLTrain, LOST and SST papers pretrain
    minilm, embed_sentences all-MiniLM-L6-v2 with its real weights, out of a pip package

Weights are drawn from `generator=`; None means PyTorch's global generator, as in PyTorch itself.
"""

from lowrank_ref.lab.models.minilm import embed_sentences, mean_pool, minilm, tokenize_sentences
from lowrank_ref.lab.models.small import MLP, ConvNet
from lowrank_ref.lab.models.transformer import GPT, ViT, llama_shape

__all__ = [
    "GPT",
    "MLP",
    "ConvNet",
    "ViT",
    "embed_sentences",
    "llama_shape",
    "mean_pool",
    "minilm",
    "tokenize_sentences",
]
