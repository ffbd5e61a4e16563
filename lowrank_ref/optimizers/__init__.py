"""Low-rank gradients."""
