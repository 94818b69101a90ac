"""Bundles: those that are installed, and new ones from a description of a task."""
