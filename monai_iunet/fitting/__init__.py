"""From a data set to a bundle: its fingerprint, the plan that follows from it, the training of its folds."""
