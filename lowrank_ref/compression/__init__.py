"""Making a trained network low-rank."""
