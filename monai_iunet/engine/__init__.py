"""The reversible engine: what invertible layers need so that autograd rebuilds their activations."""
