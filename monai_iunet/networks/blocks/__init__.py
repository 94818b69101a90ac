"""Invertible layers, one per file: forward and inverse side by side."""
