"""Readable, tested reference implementations of low-rank, sparse and ternary methods for neural networks."""

__version__ = "0.1.0"
