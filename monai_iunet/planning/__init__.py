"""What a training step holds in memory, and what fits a budget; beneath the networks."""
