"""Inference with sliding windows that holds a slab of the logits at a time, never all of them."""
