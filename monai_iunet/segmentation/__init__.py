"""Segmentation of images with a bundle."""
