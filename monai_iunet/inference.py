"""Segmentation of volumes with a MONAI bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
import SimpleITK
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.utils import MetaKeys
from nibabel.affines import voxel_sizes

from monai_iunet.geometry import from_simpleitk
from monai_iunet.images import (
    InputError,
    check_extent,
    check_image,
    check_not_constant,
    label_image,
    read_image,
)
from monai_iunet.installed import bundle_folder
from monai_iunet.weights import read_weights, weights_file
from monai_iunet.whole_head import hippocampus_labels, register_template, segment_whole_head

__all__ = ["BundleSegmenter", "Segmentation", "segment"]

REQUIRED = ("configs/inference.json", "configs/metadata.json")
SOFT_TISSUE = (-160.0, 240.0)

Image = TypeVar("Image")


@dataclass(frozen=True)
class Segmentation:
    """What was found in an image.

    Attributes:
        image: the image.
        labels: uint8, on its grid.
        names: name of each label but the background.
        probabilities: of the background and each label, `(1 + len(names), *spatial)`, float32; None unless asked for.

    Example:
        >>> image = nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.diag([1, 1, 3, 1]))
        >>> Segmentation(image, np.ones((2, 2, 2), np.uint8), {1: "liver", 2: "tumor"}).volumes()["tumor"]
        0.0
    """

    image: nibabel.Nifti1Image
    labels: np.ndarray
    names: dict[int, str]
    probabilities: np.ndarray | None = None

    def volumes(self) -> dict[str, float]:
        """Volume of each structure in mm³; where parts of both sides were segmented, of each side as a whole too."""
        voxel = abs(float(np.linalg.det(self.image.affine[:3, :3])))
        counts = np.bincount(self.labels.ravel(), minlength=max(self.names) + 1)
        found = {name: float(counts[value]) * voxel for value, name in self.names.items()}
        for side in ("left", "right"):
            parts = [volume for name, volume in found.items() if name.startswith(f"{side} ")]
            if len(parts) > 1:
                found[f"{side}, whole"] = sum(parts)
        return found


def segment(
    image: Image | str | Path,
    bundle: str | Path | BundleSegmenter | None = None,
    *,
    affine: np.ndarray | None = None,
    mirrored: bool = False,
    device: str | torch.device | None = None,
    series: str | None = None,
) -> Any:
    """Segment an image with a bundle: in comes any of the usual kinds of images, out comes the same kind.

    Args:
        image: path of an image file or of a folder with a DICOM series; or a nibabel image, a SimpleITK image, a
            `MetaTensor` or, with `affine`, an array or a tensor. 3D, with or without a channel in front where it is a
            tensor or an array.
        bundle: name or folder of a bundle, see `monai-iunet bundles`; or a `BundleSegmenter`, so that the weights of
            many images are loaded once. By default the hippocampus bundle.
        affine: 4 x 4, from voxels to millimeters in RAS, for an array without one.
        mirrored: segment the left-right mirror image, and mirror the result back: for crops of the other side.
        device: where the network runs; None for the first GPU, or the CPU if there is none.
        series: which DICOM series, where a folder holds several.

    Returns:
        Labels, uint8, on the grid of the image; for a path, as a nibabel image. Nothing is written.

    Raises:
        InputError: when the image or the bundle cannot be used.

    Example:
        >>> import numpy
        >>> labels = segment(numpy.random.rand(35, 51, 36), bundle="hippocampus", affine=numpy.eye(4), device="cpu")
        >>> labels.shape, labels.dtype
        ((35, 51, 36), dtype('uint8'))
    """
    if affine is not None and not isinstance(image, (np.ndarray, torch.Tensor)):
        raise InputError(f"affine: {type(image).__name__} has an affine of its own. Leave the argument out.")
    segmenter = bundle if isinstance(bundle, BundleSegmenter) else BundleSegmenter(bundle_folder(bundle), device)
    volume, name = _as_nibabel(image, affine, series)
    found = segmenter.segment(volume, segmenter.locate(volume, name), mirrored)
    return _as_kind_of(image, found)


def _as_nibabel(image: Any, affine: np.ndarray | None, series: str | None) -> tuple[nibabel.Nifti1Image, str]:
    """The image as the segmenter takes it, and what errors call it."""
    if isinstance(image, (str, Path)):
        return read_image(image, series), str(image)
    name = f"image ({type(image).__name__})"
    if isinstance(image, nibabel.spatialimages.SpatialImage):
        return check_image(nibabel.Nifti1Image.from_image(image), name), name
    if isinstance(image, SimpleITK.Image):
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() > 1:
            raise InputError(f"{name}: has the size {image.GetSize()}, a 3D volume of scalars is needed.")
        return check_image(from_simpleitk(image), name), name
    if isinstance(image, MetaTensor) and affine is None:
        affine = np.asarray(image.affine, dtype=float)
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise InputError(
            f"{name}: a path, a nibabel or SimpleITK image, a MetaTensor, or an array with an affine is needed."
        )
    if affine is None or np.shape(affine) != (4, 4) or not np.linalg.det(affine):
        raise InputError(f"{name}: has no valid affine. Pass the 4 x 4 matrix from voxels to millimeters as `affine`.")
    data = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    data = data[0] if data.ndim == 4 and len(data) == 1 else data
    if data.dtype.kind in "iub" or data.dtype == np.float16:  # NIfTI has neither bool nor float16
        data = data.astype(np.float32)
    volume = nibabel.Nifti1Image(data, np.asarray(affine, dtype=float))
    return check_image(volume, name), name


def _as_kind_of(image: Any, found: Segmentation) -> Any:
    labels = found.labels
    if isinstance(image, SimpleITK.Image):
        converted = SimpleITK.GetImageFromArray(np.ascontiguousarray(labels.T))
        converted.CopyInformation(image)
        return converted
    if isinstance(image, (np.ndarray, torch.Tensor)):
        labels = labels.reshape(tuple(image.shape))
        if isinstance(image, np.ndarray):
            return labels
        tensor = torch.from_numpy(labels.copy()).to(image.device)
        return MetaTensor(tensor, affine=image.affine) if isinstance(image, MetaTensor) else tensor
    return label_image(labels, found.image)


class BundleSegmenter:
    """Segments images in memory with the network, the transforms and the inferer of a bundle.

    Args:
        folder: the bundle. Its `configs/inference.json` defines `network_def`, `preprocessing`, `inferer` and
            `postprocessing`; loading and saving of files are left out.
        device: where the network runs; None for the first GPU, or the CPU if there is none.
        probabilities: whether to give probabilities too; each class then takes a volume of floats.
        progress: whether to show a bar of the patches that are done.

    Raises:
        InputError: when the folder is not a bundle, or its weights are not those of its network.

    Example:
        >>> segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
        >>> segmenter.labels
        {1: 'anterior hippocampus', 2: 'posterior hippocampus'}
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | torch.device | None = None,
        probabilities: bool = False,
        progress: bool = False,
    ) -> None:
        self.folder = Path(folder)
        weights = weights_file(self.folder)
        missing = [name for name in REQUIRED if not (self.folder / name).is_file()]
        missing += [] if weights.is_file() else ["models/model.pt"]
        if missing:
            raise InputError(f"{folder}: not a bundle with weights, {', '.join(missing)} is missing. Name its folder.")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        parser = ConfigParser()
        parser.read_config(self.folder / "configs" / "inference.json")
        self.metadata: dict[str, Any] = json.loads(
            (self.folder / "configs" / "metadata.json").read_text(encoding="utf-8")
        )
        parser["bundle_root"] = str(self.folder)
        parser["device"] = self.device
        self.gives_probabilities = probabilities
        if probabilities:
            if "save_probabilities" not in parser.get():
                raise InputError(f"{folder}: its inference.json has no `save_probabilities`. Segment without them.")
            parser["save_probabilities"] = True
        _leave_out(parser, "preprocessing", "LoadImaged")
        _leave_out(parser, "postprocessing", "SaveImaged", "SaveImageLabelsd")
        self.network = parser.get_parsed_content("network_def")
        try:
            self.network.load_state_dict(read_weights(weights))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{weights}: does not fit the network of the bundle: {reason}") from error
        self.network.to(self.device).eval()
        self.inferer = parser.get_parsed_content("inferer")
        sliding_window = getattr(self.inferer, "inferer", self.inferer)  # the inner one of a MirrorInferer
        if progress and hasattr(sliding_window, "progress"):
            sliding_window.progress = True
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.postprocessing = parser.get_parsed_content("postprocessing")

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

    def locate(self, image: nibabel.Nifti1Image, name: str) -> np.ndarray | None:
        """Find the region of the structures in an image that shows more than the network has learned from.

        Args:
            image: the image.
            name: what an error calls it.

        Returns:
            Where the region is, as `segment` takes it; None where the image is segmented as it is.

        Raises:
            InputError: when the image is constant; when an axis is longer than the metadata allow, and they name no way
                to find the region, or it was not found.
        """
        check_not_constant(image, name)
        limit = self.metadata.get("max_field_of_view_mm")
        if limit is None or (voxel_sizes(image.affine) * image.shape).max() <= limit:
            return None
        if self.metadata.get("region_finder") != "whole_head":
            check_extent(image, limit, name, "Crop the image around the structure first.")
        try:
            return register_template(image)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def segment(
        self, image: nibabel.Nifti1Image, region: np.ndarray | None = None, mirrored: bool = False
    ) -> Segmentation:
        """Segment an image, or the region of it that `locate` has found.

        Args:
            image: 3D volume in any orientation.
            region: what `locate` said.
            mirrored: segment the left-right mirror image, and mirror the result back; without meaning where there is a
                region, which both sides are in.
        """
        if region is None:
            labels, probabilities = self(image, mirrored)
            return Segmentation(image, labels, self.labels, probabilities)
        labels, probabilities = segment_whole_head(image, self, region)
        return Segmentation(image, labels, hippocampus_labels(self.labels), probabilities)

    @torch.no_grad()
    def __call__(self, image: nibabel.Nifti1Image, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """Segment an image of what the network has learned from.

        Args:
            image: 3D volume in any orientation.
            mirrored: segment the left-right mirror image, and mirror the result back.

        Returns:
            Labels, uint8, on the grid of the image, and, if asked for, probabilities `(classes, *spatial)`, float32.
        """
        data = image.get_fdata(dtype=np.float32)
        axis = next(axis for axis, letter in enumerate(nibabel.aff2axcodes(image.affine)) if letter in "LR")
        if mirrored:
            data = np.flip(data, axis)
        tensor = MetaTensor(
            torch.from_numpy(data.copy())[None],
            affine=torch.from_numpy(image.affine),
            meta={MetaKeys.ORIGINAL_CHANNEL_DIM: 0},
        )
        item = self.preprocessing({"image": tensor})
        item["pred"] = self.inferer(item["image"][None].to(self.device), self.network)[0]
        item = self.postprocessing(item)
        labels = item["pred"][0].cpu().numpy().astype(np.uint8)
        probabilities = item["prob"].cpu().numpy().astype(np.float32) if self.gives_probabilities else None
        if mirrored:
            labels = np.flip(labels, axis)
            probabilities = None if probabilities is None else np.flip(probabilities, 1 + axis)
        return labels, probabilities


def _leave_out(parser: ConfigParser, section: str, *names: str) -> None:
    """Take transforms out of the `Compose` of a section, by the names of their classes."""
    transforms = parser[section]["transforms"]
    parser[section]["transforms"] = [
        each for each in transforms if str(each.get("_target_")).rpartition(".")[2] not in names
    ]
