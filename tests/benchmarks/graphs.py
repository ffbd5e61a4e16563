"""A training step as a CUDA graph, for benchmarks whose steps are shorter than their launches."""

from collections.abc import Callable

import torch


def captured(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> torch.cuda.CUDAGraph:
    """Record a step. Its warm-up has the rate 0, and what it left in the moments is taken out again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    return graph
