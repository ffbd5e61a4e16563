"""How much rank, and where."""
