"""Segmentation of images in memory with the network, the transforms and the inferer of a bundle."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import MetaKeys
from nibabel.affines import voxel_sizes
from numpy.typing import DTypeLike

from monai_iunet.errors import InputError
from monai_iunet.inference.images import Image, WholeImage
from monai_iunet.inference.labels import LabelInferer
from monai_iunet.inference.plan import InferencePlan, plan_inference
from monai_iunet.inference.prepare import prepare
from monai_iunet.inference.streaming import Slab, class_numbers
from monai_iunet.io.bundles import bundle_folder, installed_bundles
from monai_iunet.io.channels import CHANNEL_FILES, first_channel
from monai_iunet.io.checks import check_extent, check_image, check_not_constant, grids_apart, raw_voxels
from monai_iunet.io.weights import weights_file
from monai_iunet.segmentation.bundle_parts import read_parts
from monai_iunet.segmentation.quality import read_quality, weights_digest
from monai_iunet.segmentation.quality_features import Description, SlabBySlab
from monai_iunet.segmentation.region_finders import REGION_FINDERS
from monai_iunet.segmentation.regions import Labels, RegionFinder
from monai_iunet.segmentation.result import Segmentation
from monai_iunet.segmentation.sides import side_pairs
from monai_iunet.system import available_memory, usable_device
from monai_iunet.transforms.outputs import check_numbers

__all__ = ["BundleSegmenter"]

logger = logging.getLogger(__name__)

SOFT_TISSUE = (-160.0, 240.0)
BRAIN = "iunet_brain_mri_segmentation"


class BundleSegmenter:
    """Segments images in memory with the network, the transforms and the inferer of a bundle.

    Args:
        folder: the bundle. Its `configs/inference.json` defines `network_def`, `preprocessing`, `inferer` and
            `postprocessing`; loading and saving of files are left out.
        device: where the network runs; None for the first GPU, or the CPU if there is none.
        probabilities: whether to give probabilities too; each class then takes a volume of floats.
        progress: whether to show a bar of the patches that are done.
        probabilities_dtype: type of the probabilities, float32 or float16.
        weights: name of the weights. With "model", a crop whose segmentation is doubtful is segmented again with the
            weights that the metadata name as `weights_where_doubted`, if there are any; that result is taken if it is
            not doubtful.

    Attributes:
        channels: of the images; several are the last axis of a 4D image.
        digests: SHA-256 of all weights that results depend on, by their names.

    Raises:
        InputError: when the folder is not a bundle, its weights are not of its network, or there is no such device or
            type of probabilities.

    Example:
        >>> from monai_iunet import bundle_folder
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
        probabilities_dtype: DTypeLike = np.float32,
        weights: str = "model",
    ) -> None:
        self.folder = Path(folder)
        self.weights = weights
        self.device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.gives_probabilities = probabilities
        self.probabilities_dtype = _probabilities_dtype(probabilities_dtype)
        parts = read_parts(self.folder, weights, self.device, probabilities)
        self.metadata, self.channels = parts.metadata, parts.channels
        self.network, self.inferer = parts.network.to(self.device).eval(), parts.inferer
        self.preprocessing, self.postprocessing = parts.preprocessing, parts.postprocessing
        self.quality = read_quality(self.folder, list(self.labels.values()), weights)
        self.windows = self.inferer.inferer if isinstance(self.inferer, LabelInferer) else self.inferer
        if progress and hasattr(self.windows, "progress"):
            self.windows.progress = True
        self.second = self._open_second()
        # Now, since the files may change while a batch runs.
        used = [weights] if self.second is None else [weights, self.second.weights]
        self.digests = {name: weights_digest(self.folder, name) for name in used}
        brain = installed_bundles().get(BRAIN)
        if brain is not None and "region_finder" in self.metadata:
            self.digests["brain bundle"] = weights_digest(brain)

    def _open_second(self) -> BundleSegmenter | None:
        """Open the bundle with its second weights; None if it has none, or nothing tells what is doubtful."""
        name = self.metadata.get("weights_where_doubted") if self.weights == "model" else None
        if name is None or self.quality is None:
            return None
        if not str(name).isidentifier():
            raise InputError(
                f"{self.folder}: metadata.json names the weights {name!r} for what is doubtful. Name a file of the "
                "folder models without its ending, such as any_contrast."
            )
        kind = self.probabilities_dtype
        second = BundleSegmenter(self.folder, self.device, self.gives_probabilities, False, kind, weights=str(name))
        if second.quality is None:
            logger.warning(
                "%s: not used, without a model of their quality. Fit one with `monai-iunet quality --weights %s`.",
                weights_file(self.folder, second.weights),
                name,
            )
            return None
        return second

    @property
    def title(self) -> str:
        """Name and version of the bundle."""
        return f"{self.folder.resolve().name} {self.metadata.get('version', '')}".strip()

    @property
    def labels(self) -> dict[int, str]:
        """Name of each label of the network but the background."""
        channels = self.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
        return {int(value): name for value, name in channels.items() if int(value) > 0}

    @property
    def window(self) -> tuple[float, float] | None:
        """Intensities to show as black and white: those of soft tissue if images are in Hounsfield units."""
        image = self.metadata["network_data_format"]["inputs"]["image"]
        return SOFT_TISSUE if image["format"] == "hounsfield" else None

    @property
    def region_finder(self) -> RegionFinder | None:
        """What finds the structures in larger images, by the name in the metadata; None if nothing does.

        Raises:
            InputError: when the metadata name a finder that there is not.
        """
        name = self.metadata.get("region_finder")
        if name is None:
            return None
        if name not in REGION_FINDERS:
            raise InputError(
                f"{self.folder}: metadata.json names the region finder {name!r}, there is {', '.join(REGION_FINDERS)}. "
                "Install a newer version of this package, or leave the entry out."
            )
        return REGION_FINDERS[name](self.labels, partial(_brain_segmenter, self.device))

    def example(self) -> tuple[nibabel.Nifti1Image, np.ndarray]:
        """Return an image that comes with the package, and the region to pass to `segment`.

        Raises:
            InputError: when there is none that the bundle segments.
        """
        if self.region_finder is None:
            raise InputError(f"{self.folder.name}: the example is a head, which it does not segment. Name images.")
        return self.region_finder.example()

    def check_mirror(self) -> None:
        """Check that labels stay what they are in a mirror image.

        Raises:
            InputError: when the network tells a left structure from a right one, which change places there.
        """
        structures = list(self.labels.values())
        for first, second in side_pairs(structures)[0]:
            raise InputError(
                f"{self.folder.name}: tells {structures[first - 1]} from {structures[second - 1]}, whose labels would "
                "change places in the mirror image. Segment the image as it is, without --mirror."
            )

    def locate(self, image: nibabel.Nifti1Image, name: str) -> np.ndarray | None:
        """Find the region of the structures in an image that shows more than the network has learned from.

        Args:
            image: the image, with several channels 4D.
            name: name of the image in errors.

        Returns:
            Where the region is, as `segment` takes it; None if the image is segmented as it is.

        Raises:
            InputError: when the image has other channels, or is constant; when an axis is longer than the metadata
                allow, and they name no way to find the region, or it was not found.
        """
        self._check_channels(image, name)
        check_not_constant(image, name)
        limit = self.metadata.get("max_field_of_view_mm")
        if limit is None or (voxel_sizes(image.affine) * image.shape[:3]).max() <= limit:
            return None
        if self.region_finder is None:
            check_extent(image, limit, name, "Crop the image around the structure first.")
            return None
        try:
            return self.region_finder.find(image)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _check_channels(self, image: nibabel.Nifti1Image, name: str) -> None:
        count = image.shape[3] if image.ndim == 4 else 1
        if count != self.channels:
            found = f"{count} channel{'s' if count > 1 else ''}"
            raise InputError(f"{name}: has {found}, {self.folder.name} takes {self.channels}: {CHANNEL_FILES}")

    def _checked(self, image: nibabel.Nifti1Image, name: str) -> nibabel.Nifti1Image:
        """Return an image as `read_image` does, of which left, right and size are known, with its voxels in memory."""
        if not isinstance(image, nibabel.spatialimages.SpatialImage):
            raise InputError(
                f"{name}: a nibabel image is needed, got {type(image).__name__}. Read it by read_image, or call "
                "monai_iunet.segment, which takes other kinds of images."
            )
        image = image if isinstance(image, nibabel.Nifti1Image) else nibabel.Nifti1Image.from_image(image)
        self._check_channels(image, name)
        image = first_channel(image) if image.shape[3:] == (1,) else image
        return check_image(image, name, self.channels)

    def segment(
        self,
        image: nibabel.Nifti1Image,
        name: str = "image",
        mirrored: bool = False,
        region: np.ndarray | None = None,
    ) -> Segmentation:
        """Segment an image, or the region of it that holds the structures.

        Args:
            image: in any orientation, with several channels 4D.
            name: name of the image in errors.
            mirrored: segment the left-right mirror image, and mirror the result back; of no effect if a region is
                segmented, which holds both sides.
            region: where the structures are, if that is known; None to locate them.

        Raises:
            InputError: when `read_image` would refuse the image, and see `locate` and `check_mirror`.
        """
        if mirrored:
            self.check_mirror()
        image = self._checked(image, name)
        region = self.locate(image, name) if region is None else region
        finder = self.region_finder
        if region is None or finder is None:
            names, found = self.labels, self.segment_crop(image, mirrored)
        else:
            names, found = finder.names, finder.segment(image, region, self.segment_crop, self.gives_probabilities)
        quality = None if found.quality is None else {names[value]: dice for value, dice in found.quality.items()}
        warn_below = None if self.quality is None else self.quality.warn_below
        weights = {names[value]: weights for value, weights in found.weights.items()}
        probabilities = None
        if self.gives_probabilities and found.probabilities is not None:
            probabilities = found.probabilities.astype(self.probabilities_dtype, copy=False)
        return Segmentation(first_channel(image), found.labels, names, probabilities, quality, warn_below, weights)

    def segment_crop(self, image: nibabel.Nifti1Image, mirrored: bool = False) -> Labels:
        """Segment an image of the kind that the network has learned from.

        Args:
            image: in any orientation, with several channels 4D.
            mirrored: segment the left-right mirror image, and mirror the result back.

        Returns:
            Labels on the grid of the image, with probabilities if they were asked for or crops of larger images are put
            together, and quality if the bundle has a model of it.
        """
        weights = dict.fromkeys(self.labels, self.weights)
        if self.quality is None:
            return Labels(*self._segment(image, mirrored)[:2], None, weights)
        labels, probabilities, described = self.describe_crop(image, mirrored)
        predicted = self.quality.predict(described)
        quality = {value: predicted[name] for value, name in self.labels.items()}
        found = Labels(labels, probabilities, quality, weights)
        if self.second is not None and self._doubts(found):
            second = self.second.segment_crop(image, mirrored)
            return found if self.second._doubts(second) else second
        return found

    def _doubts(self, found: Labels) -> bool:
        """Return whether a structure is doubtful by the quality model."""
        bound = -math.inf if self.quality is None else self.quality.warn_below
        return min((found.quality or {}).values(), default=math.inf) < bound

    def describe_crop(
        self, image: nibabel.Nifti1Image, mirrored: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None, dict[str, Description]]:
        """Segment an image as `segment_crop` does, and describe each structure by what its quality shows in."""
        watch = SlabBySlab()
        labels, probabilities, prepared, spacing = self._segment(image, mirrored, watch.add)
        described = watch.describe(
            prepared,
            spacing.tolist(),
            getattr(self.windows, "roi_size", None),
            lambda part: self.network(part.to(self.device)),
            getattr(self.windows, "divisible_by", None),
        )
        nameless = sorted(set(described) - set(self.labels))
        if nameless:
            raise InputError(
                f"{self.folder}: labels {', '.join(map(str, nameless))} have no name in its metadata.json, which names "
                f"{', '.join(map(str, self.labels))}. Add them to channel_def."
            )
        return labels, probabilities, {self.labels[value]: description for value, description in described.items()}

    def prepare(self, image: nibabel.Nifti1Image, mirrored: bool = False) -> tuple[Image, MetaTensor]:
        """Return an image, or its mirror image, as the network sees it, and a tensor with its meta data."""
        return prepare(self.preprocessing, _as_tensor(image, mirrored), self.device)

    @torch.no_grad()
    def _segment(
        self, image: nibabel.Nifti1Image, mirrored: bool, watch: Callable[[Slab], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, Image, np.ndarray]:
        """Segment an image.

        Args:
            image: see `segment_crop`.
            mirrored: see `segment_crop`.
            watch: is shown each slab of logits.

        Returns:
            Labels and probabilities, on the grid of the image; the image as the network sees it, and its spacing in mm.
        """
        tensor = _as_tensor(image, mirrored)
        segment = self._slab_by_slab if isinstance(self.inferer, LabelInferer) else self._as_a_whole
        labels, probabilities, prepared, spacing = segment(tensor, watch)
        if mirrored:
            axis = _left_right(image)
            labels = np.flip(labels, axis)
            probabilities = None if probabilities is None else np.flip(probabilities, 1 + axis)
        return labels, probabilities, prepared, spacing

    def _slab_by_slab(
        self, image: MetaTensor, watch: Callable[[Slab], object] | None
    ) -> tuple[np.ndarray, np.ndarray | None, Image, np.ndarray]:
        """Segment an image as it was read, `(channels, *spatial)`, with an inferer that returns labels on its grid."""
        spacing = voxel_sizes(np.asarray(image.affine))
        whole = self.inferer.inferer.whole  # then the network decides how large windows are
        self._check_memory(self.plan(image.shape[1:], spacing.tolist(), image.element_size(), with_network=whole))
        prepared, meta = prepare(self.preprocessing, image, self.device)
        kind = self.probabilities_dtype if self.gives_probabilities else None
        # Crops of larger images are put together by their probabilities, whatever is made of these then.
        kind = kind if self.region_finder is None else np.dtype(np.float32)
        show = partial(self._show, watch)
        labels, probabilities = self.inferer.segment(prepared, meta, self.network, kind, show)
        item = self.postprocessing({"image": meta, "pred": MetaTensor(torch.from_numpy(labels)[None])})
        return item["pred"][0].numpy(), probabilities, prepared, voxel_sizes(np.asarray(meta.affine))

    def _show(self, watch: Callable[[Slab], object] | None, slab: Slab) -> None:
        """Check that each name is that of a class, which would be said to be absent otherwise; show the slab."""
        names, classes = len(self.labels) + 1, len(slab.values)
        if names > classes:
            raise InputError(
                f"{self.folder}: its metadata.json names {names} classes, its network tells {classes} apart. Take the "
                "names out of channel_def that are too many."
            )
        if watch is not None:
            watch(slab)

    def plan(
        self,
        image_size: Sequence[int],
        spacing: Sequence[float],
        itemsize: int = 2,
        with_network: bool = False,
    ) -> InferencePlan:
        """Count what the segmentation of an image, without a region to be found in it, holds in memory.

        Args:
            image_size: in voxels.
            spacing: in mm.
            itemsize: bytes of a voxel as it was read: 2 for most CT, 4 for what is read as float32.
            with_network: whether to count what the network takes too, for which it is run without values.

        Raises:
            InputError: when the bundle has an inferer of which nothing is known.
        """
        if not isinstance(self.inferer, LabelInferer):
            raise InputError(f"{self.folder}: has no LabelInferer, whose memory can be planned.")
        return plan_inference(
            self.preprocessing,
            self.inferer.inferer,
            len(self.metadata["network_data_format"]["outputs"]["pred"]["channel_def"]),
            tuple(image_size),
            tuple(spacing),
            itemsize,
            self.network if with_network else None,
            self.channels,
        )

    def _check_memory(self, plan: InferencePlan) -> None:
        """Refuse before the start what will not fit."""
        available = available_memory()
        if available is not None and plan.beside_image > available:
            raise InputError(
                f"{self.folder.name}: a segmentation of this size takes {plan.beside_image / 2**30:.1f} GiB beside the "
                f"image, {available / 2**30:.1f} GiB are available. Crop the image, or free memory."
            )

    def _as_a_whole(
        self, image: MetaTensor, watch: Callable[[Slab], object] | None
    ) -> tuple[np.ndarray, np.ndarray | None, Image, np.ndarray]:
        """Segment an image as it was read, `(channels, *spatial)`, as inferer and transforms of the bundle do."""
        item = self.preprocessing({"image": image.float()})
        seen = item["image"]
        item["pred"] = self.inferer(seen[None].to(self.device), self.network)[0]
        check_numbers(torch.as_tensor(item["pred"]))
        if watch is not None:
            watch(Slab(0, 0, torch.as_tensor(item["pred"])))
        item = self.postprocessing(item)
        for key in ("pred", "prob") if self.gives_probabilities else ("pred",):
            self._check_place(item[key], seen, image)
        labels = self._label_map(torch.as_tensor(item["pred"]))
        probabilities = item["prob"].cpu().numpy().astype(np.float32) if self.gives_probabilities else None
        return labels, probabilities, WholeImage(seen.as_tensor()), voxel_sizes(np.asarray(seen.affine))

    def _check_place(self, prediction: Any, seen: MetaTensor, image: MetaTensor) -> None:
        """Check that a prediction is on the grid of the image, as far as its meta data say.

        Args:
            prediction: what the transforms of the bundle have made, `(channels, *spatial)`.
            seen: the image as the network saw it.
            image: as it was read.
        """
        shape, is_apart = image.shape[1:], False
        if isinstance(prediction, MetaTensor):
            affine, of_seen, of_image = (np.asarray(each.affine, dtype=float) for each in (prediction, seen, image))
            # The identity is also the affine of what does not say.
            is_said = not np.array_equal(affine, np.eye(4)) or np.array_equal(of_seen, np.eye(4))
            is_apart = is_said and grids_apart(affine, of_image, shape) > 0
        if prediction.shape[1:] != shape or is_apart:
            raise InputError(
                f"{self.folder}: the postprocessing of its inference.json leaves labels on the grid of the network, "
                "not on that of the image. Add MONAI's Invertd of the preprocessing to it: saving, which may resample "
                "labels, is left out here."
            )

    def _label_map(self, prediction: torch.Tensor) -> np.ndarray:
        """Return what the transforms of the bundle have made of a prediction, `(1, *spatial)`, as labels."""
        if len(prediction) != 1 or not torch.equal(prediction, prediction.to(torch.uint8).to(prediction.dtype)):
            raise InputError(
                f"{self.folder}: the postprocessing of its inference.json gives {len(prediction)} channels of "
                f"{prediction.dtype}, one with whole numbers from 0 to 255, the labels, is needed. End it with MONAI's "
                "AsDiscreted, `argmax` alone."
            )
        labels: np.ndarray = prediction[0].cpu().numpy().astype(np.uint8)
        return labels

    @torch.no_grad()
    def segment_coarsely(self, image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
        """Segment an image on the grid of the network, in one piece: what is needed to find structures.

        Returns:
            Labels, uint8, and the affine of their grid.
        """
        preprocessed = self.preprocessing({"image": _as_tensor(image, mirrored=False).float()})["image"]
        logits = self.network(preprocessed.as_tensor()[None].to(self.device))
        labels = class_numbers(logits[0]).cpu().numpy()
        return labels, preprocessed.affine.cpu().numpy().astype(float)


def _probabilities_dtype(dtype: Any) -> np.dtype[Any]:
    """Return a type of probabilities, after checking that it is one that they can be given and written in."""
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = np.dtype(object)
    if kind not in (np.float32, np.float16):
        raise InputError(f"probabilities_dtype {dtype}: float32 or float16, of NumPy, is needed.")
    return kind


def _as_tensor(image: nibabel.Nifti1Image, mirrored: bool) -> MetaTensor:
    """Return an image as it was read, `(channels, *spatial)`, or its mirror image."""
    data = raw_voxels(image)
    data = np.flip(data, _left_right(image)) if mirrored else data
    data = data.copy() if min(data.strides) < 0 else data  # PyTorch takes no flipped arrays
    return MetaTensor(
        torch.from_numpy(data[None] if data.ndim == 3 else np.moveaxis(data, -1, 0)),
        affine=torch.from_numpy(image.affine),
        meta={MetaKeys.ORIGINAL_CHANNEL_DIM: 0, MetaKeys.ORIGINAL_AFFINE: image.affine},
    )


def _left_right(image: nibabel.Nifti1Image) -> int:
    """Return the axis of an image that runs between left and right."""
    return next(axis for axis, letter in enumerate(nibabel.aff2axcodes(image.affine)) if letter in "LR")


@cache
def _brain_segmenter(device: torch.device) -> BundleSegmenter:
    """Return the brain bundle, opened once."""
    return BundleSegmenter(bundle_folder(BRAIN), device)
