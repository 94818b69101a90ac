"""The README's drawings: `python -m monai_iunet.drawings.draw` writes them beside this file."""
