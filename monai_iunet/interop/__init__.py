"""Other packages: `iunets` and nnU-Net."""
