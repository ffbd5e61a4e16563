"""Checks, linear algebra, layers and surgery, actions, groups of optimizers, accounting, registry, files."""
