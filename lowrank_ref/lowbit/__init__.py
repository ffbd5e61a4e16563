"""Few bits, ternary weights."""
