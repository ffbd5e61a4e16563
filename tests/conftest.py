"""What all tests share: one thread, no network, fixed seeds, and tiny transformers models."""

import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: without a GPU they run as plain Python
sys.path.insert(0, str(Path(__file__).parent))  # for `import battery`, also in processes that a test spawns

import jaxtyping
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=15)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def group_of_one():
    """A process group of this process alone, for what only wraps a model.

    Its destructor can wait for gloo's thread while that waits for the interpreter's lock (see `processes`): the pause
    lets the thread finish first.
    """
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


@pytest.fixture
def no_shape_checks():
    """Switch jaxtyping's checks off: torch.compile cannot trace them, and they would answer before ours."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def gpt2():
    """Build a GPT-2 of one block with large random weights: Conv1D layers, output layer tied to the embedding."""
    transformers = pytest.importorskip("transformers")

    def build(seed: int = 0):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 50, "n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()

    return build


@pytest.fixture
def bert():
    """Build a BERT classifier of two layers with large random weights, so that every layer matters."""
    transformers = pytest.importorskip("transformers")

    def build(seed: int = 0):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
        config = transformers.BertConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12, num_labels=3
        )
        return transformers.BertForSequenceClassification(config).eval()

    return build


@pytest.fixture
def tokens():
    """Token ids (3, 7) for the tiny models."""
    return torch.arange(21).reshape(3, 7) % 50
