"""Checks, linear algebra, layers and surgery, accounting, registry, files."""
