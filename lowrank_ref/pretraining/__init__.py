"""Weights that are low-rank (and sparse) from the start."""
