"""Segmentation of volumes with a MONAI bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, SaveImaged

from monai_iunet.images import InputError
from monai_iunet.outputs import SaveLabelsd

__all__ = ["BundleSegmenter", "default_bundle"]

REQUIRED = ("configs/inference.json", "configs/metadata.json", "models/model.pt")
SOFT_TISSUE = (-160.0, 240.0)
DEFAULT_BUNDLE = "iunet_hippocampus_mri_segmentation"


def default_bundle() -> Path:
    """Folder of the bundle that is used when none is named: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for parent in (package, package.parent):
        folder = parent / "bundles" / DEFAULT_BUNDLE
        if folder.is_dir():
            return folder
    raise InputError(
        f"The bundle {DEFAULT_BUNDLE} is not installed. Install the package again, or name a bundle folder."
    )


class BundleSegmenter:
    """Segments images in memory with the network, the transforms and the inferer of a bundle.

    Args:
        folder: the bundle. Its `configs/inference.json` defines `network_def`, `preprocessing`, `inferer` and
            `postprocessing`; loading and saving of files are left out.
        device: where the network runs; None for the first GPU, or the CPU if there is none.

    Raises:
        InputError: when the folder is not a bundle, or its weights are not those of its network.
    """

    def __init__(self, folder: str | Path, device: str | torch.device | None = None) -> None:
        self.folder = Path(folder)
        missing = [name for name in REQUIRED if not (self.folder / name).is_file()]
        if missing:
            raise InputError(f"{folder}: not a bundle with weights, {', '.join(missing)} is missing. Name its folder.")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        parser = ConfigParser()
        parser.read_config(self.folder / "configs" / "inference.json")
        self.metadata: dict[str, Any] = json.loads((self.folder / "configs" / "metadata.json").read_text())
        parser["bundle_root"] = str(self.folder)
        parser["device"] = self.device
        self.network = parser.get_parsed_content("network_def")
        try:
            weights = torch.load(self.folder / "models" / "model.pt", map_location="cpu", weights_only=True)
            self.network.load_state_dict(weights)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{folder}: models/model.pt does not fit the network of the bundle: {reason}") from error
        self.network.to(self.device).eval()
        self.inferer = parser.get_parsed_content("inferer")
        self.preprocessing = _without(parser.get_parsed_content("preprocessing"), LoadImaged)
        self.postprocessing = _without(parser.get_parsed_content("postprocessing"), SaveImaged, SaveLabelsd)

    @property
    def labels(self) -> dict[int, str]:
        """Name of each label but the background."""
        channels = self.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        return {int(value): name for value, name in channels.items() if int(value) > 0}

    @property
    def window(self) -> tuple[float, float] | None:
        """Intensities to show as black and white: those of soft tissue where they are Hounsfield units."""
        image = self.metadata["network_data_format"]["inputs"]["image"]
        return SOFT_TISSUE if image["format"] == "hounsfield" else None

    def finds_region(self, image: nibabel.Nifti1Image, name: str) -> bool:
        """Whether an image shows more than the network has learned from, so that the region has to be found first.

        Raises:
            InputError: when an axis is longer than the metadata allow, and they name no way to find the region.
        """
        limit = self.metadata.get("max_field_of_view_mm")
        extent = np.array(image.shape) * np.sqrt((image.affine[:3, :3] ** 2).sum(0))
        if limit is None or extent.max() <= limit:
            return False
        if self.metadata.get("region_finder") != "whole_head":
            raise InputError(
                f"{name}: {' x '.join(f'{length:.0f}' for length in extent)} mm, but {self.folder.name} has only seen "
                f"images of up to {limit} mm. Crop the image around the structure first."
            )
        return True

    @torch.no_grad()
    def __call__(self, image: nibabel.Nifti1Image, mirrored: bool = False) -> np.ndarray:
        """Segment an image.

        Args:
            image: 3D volume in any orientation.
            mirrored: segment the left-right mirror image, and mirror the result back.

        Returns:
            Labels, uint8, on the grid of the image.
        """
        data = image.get_fdata(dtype=np.float32)
        axis = next(axis for axis, letter in enumerate(nibabel.aff2axcodes(image.affine)) if letter in "LR")
        if mirrored:
            data = np.flip(data, axis)
        tensor = MetaTensor(torch.from_numpy(data.copy())[None], affine=torch.from_numpy(image.affine))
        item = self.preprocessing({"image": tensor})
        item["pred"] = self.inferer(item["image"][None].to(self.device), self.network)[0]
        labels = self.postprocessing(item)["pred"][0].cpu().numpy().astype(np.uint8)
        return np.flip(labels, axis) if mirrored else labels


def _without(transforms: Compose, *kinds: type) -> Compose:
    return Compose([transform for transform in transforms.transforms if not isinstance(transform, kinds)])
