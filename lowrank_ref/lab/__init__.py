"""What chapters share: data, models, training, comparison, explorers. Papers' files never import it."""
