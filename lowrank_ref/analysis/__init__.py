"""What the updates look like."""
