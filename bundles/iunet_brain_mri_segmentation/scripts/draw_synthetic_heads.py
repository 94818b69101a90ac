"""Draw a sheet of the images that the network learns from.

    python scripts/draw_synthetic_heads.py SYNTHETIC_HEADS docs/synthetic_heads.png

The first is the folder that `convert_label_maps.py` writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from monai.bundle import ConfigParser
from monai.transforms import Compose

from monai_iunet.errors import InputError
from monai_iunet.io.files import write_atomically

ROWS, COLUMNS = 4, 6


def draw(dataset: Path, path: Path) -> None:
    """Draw one slice of each of some heads from above and one from the left."""
    parser = ConfigParser()
    parser.read_config(Path(__file__).parents[1] / "configs" / "train.json")
    parser.update({"dataset_dir": str(dataset), "check_data": False})
    cases = parser.get_parsed_content("datalist")["training"]
    make: Compose = parser.get_parsed_content("train#preprocessing")
    make.set_random_state(1)
    figure, axes = plt.subplots(ROWS, 2 * COLUMNS, figsize=(2 * COLUMNS, 1.1 * ROWS), facecolor="black")
    for number, pair in enumerate(axes.reshape(-1, 2)):
        image = make(cases[number % len(cases)])["image"][0].numpy()
        middle = [extent // 2 for extent in image.shape]
        for axis, plane in zip(pair, (image[:, :, middle[2]], image[middle[0]])):
            axis.imshow(plane.T, origin="lower", cmap="gray")
            axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 1, 0.03, 0.03)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90, facecolor="black", format="png"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Usage: python draw_synthetic_heads.py SYNTHETIC_HEADS PICTURE.png")
    try:
        draw(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as error:
        sys.exit(f"Error: {error}")
