"""Transforms and inferers that the configs of bundles name."""
