"""Cases, checkpoints, evaluation and pictures of a training."""
