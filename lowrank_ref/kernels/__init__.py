"""Triton fast paths; each stands beside a plain PyTorch definition in its paper's file."""
