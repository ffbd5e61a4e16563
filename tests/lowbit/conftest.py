"""What the tests of the low-bit layers share."""

import jaxtyping
import pytest
import torch


@pytest.fixture
def no_shape_checks():
    """Switch jaxtyping's checks off: they are Python that torch.compile cannot trace."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
