"""Labels on the grid of the image's file, without holding the probabilities of all classes anywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import Inferer
from monai.transforms import Activationsd, AsDiscreted, Invertd, InvertibleTransform
from monai.utils import MetaKeys, SpaceKeys
from numpy.typing import DTypeLike
from torch import Tensor

from monai_iunet.errors import InputError
from monai_iunet.inference.blocks import probability_blocks
from monai_iunet.inference.image_grid import ImageGrid
from monai_iunet.inference.images import Image, WholeImage
from monai_iunet.inference.mirror import MirrorInferer
from monai_iunet.inference.streaming import Slab, StreamingInferer
from monai_iunet.io.channels import result_name
from monai_iunet.io.files import check_folder, check_target, write_atomically
from monai_iunet.io.geometry import RAS_TO_LPS
from monai_iunet.io.labels import write_probability_image
from monai_iunet.io.scratch import scratch_array
from monai_iunet.transforms.outputs import LabelsOnImageGridd, check_numbers

__all__ = ["LabelInferer", "check_postprocessing"]

logger = logging.getLogger(__name__)

GIVEN = ("image", "label", "reference")  # entries of a case that no network has made
LARGEST_NUMBER = 256  # classes, whose numbers are written as uint8


class LabelInferer(Inferer):
    """Returns the most probable class of each voxel, on the grid of the image's file.

    Logits are stitched slab by slab, turned into probabilities, brought back to the grid of the file by linear
    interpolation, so that borders stay smooth, and reduced to labels. Beside the image and its labels a slab of logits
    is held. What was done to the image is read from its meta data; where it was something else than to turn, crop and
    resample it to parallel axes, the logits are held as a whole and brought back one class after another.

    Args:
        transform: the preprocessing, which is undone.
        probabilities_dir: folder for the probabilities of all classes, `NAME_prob.nii.gz`; None to write none.
        mirror: arguments of `MirrorInferer`, such as `swap`, to stitch the mean over an image and its mirror image;
            None for the image alone.
        options: of `StreamingInferer`, which stitches the logits, such as `roi_size` and `overlap`.

    Attributes:
        inferer: stitches the logits.

    Example:
        >>> from monai.transforms import Compose, Spacingd
        >>> transform = Compose([Spacingd("image", (2, 2, 2))])
        >>> image = MetaTensor(torch.rand(1, 9, 9, 9), affine=torch.eye(4), meta={"original_affine": np.eye(4)})
        >>> inferer = LabelInferer(transform, roi_size=(8, 8, 8))
        >>> network = lambda windows: torch.cat([windows, 0.5 - windows], 1)
        >>> inferer(transform({"image": image})["image"][None], network).shape
        torch.Size([1, 1, 9, 9, 9])
    """

    def __init__(
        self,
        transform: InvertibleTransform,
        probabilities_dir: str | Path | None = None,
        mirror: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.inferer = StreamingInferer(**options) if mirror is None else MirrorInferer(**{**mirror, **options})
        self.probabilities_dir = None if probabilities_dir is None else Path(str(probabilities_dir))
        self._targets: dict[Path, str] = {}

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> MetaTensor:
        """Return labels, `(batch, 1, *spatial)`, uint8, on the grid of the image's file.

        Args:
            inputs: preprocessed images, `(batch, channels, *spatial)`, with their meta data.
            network: maps windows to logits of their spatial size.
            args: passed on to the network.
            kwargs: passed on to the network.

        Raises:
            ValueError: when the inputs have no meta data of their own, or pending transforms, their files differ in
                size, or the output of the network does not fit.
            InputError: when the file for probabilities would be that of another image, too.
        """
        if not isinstance(inputs, MetaTensor):
            raise ValueError("LabelInferer: a MetaTensor is needed, whose meta data say what was done to the image.")
        if not len(inputs):
            raise ValueError("LabelInferer: a batch without images came.")
        if len(inputs) > 1 and not inputs.is_batch:  # as `torch.stack` and `torch.cat` make it
            raise ValueError(
                f"LabelInferer: a batch of {len(inputs)} images has the meta data of the first one alone. Make it "
                "by MONAI's DataLoader or list_data_collate, or pass images one by one."
            )
        results: list[MetaTensor] = []
        image: Any
        for image in inputs:
            if image.pending_operations:
                raise ValueError(
                    "LabelInferer: the image has pending transforms, which are not done yet. Apply them by MONAI's "
                    "ApplyPendingd, or preprocess without `lazy`."
                )
            path = self._probabilities_file(image)
            space = str(image.meta.get(MetaKeys.SPACE) or SpaceKeys.RAS)
            labels, probabilities = self.segment(
                WholeImage(image.as_tensor()),
                image,
                # As it is if it can be, so that its memory can be planned.
                (lambda windows: network(windows, *args, **kwargs)) if args or kwargs else network,
                None if path is None else np.float32,
            )
            if path is not None and probabilities is not None:
                check_folder(path.parent)
                to_ras = RAS_TO_LPS if space == SpaceKeys.LPS else np.eye(4)
                affine = to_ras @ np.asarray(image.meta[MetaKeys.ORIGINAL_AFFINE])
                write_atomically(path, partial(write_probability_image, probabilities, affine))
            affine = image.meta.get(MetaKeys.ORIGINAL_AFFINE)
            affine = None if affine is None else torch.as_tensor(affine)
            meta: dict[str, Any] = {MetaKeys.SPACE: space}
            if "filename_or_obj" in image.meta:  # by which MONAI's SaveImaged names what it writes
                meta["filename_or_obj"] = image.meta["filename_or_obj"]
            results.append(MetaTensor(torch.from_numpy(labels)[None], affine=affine, meta=meta))
        sizes = sorted({tuple(labels.shape[1:]) for labels in results})
        if len(sizes) > 1:
            raise ValueError(f"LabelInferer: the files of a batch have {sizes} voxels. Pass images one by one.")
        batch: MetaTensor = list_data_collate(results)
        return batch

    def _probabilities_file(self, image: MetaTensor) -> Path | None:
        """Return the file for the probabilities of an image, after checking that it is that of no other image."""
        if self.probabilities_dir is None:
            return None
        source = image.meta.get("filename_or_obj")
        if source is None or MetaKeys.ORIGINAL_AFFINE not in image.meta:
            raise ValueError(
                "LabelInferer: probabilities are written for images whose meta data name their file and its affine, as "
                "LoadImaged notes them. Leave probabilities_dir out for others."
            )
        path = self.probabilities_dir / f"{result_name(source, len(image))}_prob.nii.gz"
        check_target(path, source, self._targets)
        return path

    @torch.no_grad()
    def segment(
        self,
        image: Image,
        meta: MetaTensor,
        network: Callable[..., Any],
        probabilities: DTypeLike | None = None,
        watch: Callable[[Slab], object] | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Segment one image.

        Args:
            image: as the network shall see it.
            meta: a tensor of its shape, `(channels, *spatial)`, whose meta data say what was done to it.
            network: maps windows to logits of their spatial size.
            probabilities: type of the probabilities, float32 or float16; None for none.
            watch: is shown each slab of logits, on the grid of the network.

        Returns:
            Labels, uint8, and probabilities of all classes, `(classes, *spatial)`, if asked for, on the grid of the
            file. Large ones lie in temporary files.

        Raises:
            InputError: when classes change places in a mirror image that is not that of left and right.
        """
        if isinstance(self.inferer, MirrorInferer):
            self.inferer.check_axis(meta)
        grid = ImageGrid.of(meta)
        if grid is None:
            return self._by_inversion(image, meta, network, probabilities, watch)
        labels: np.ndarray = scratch_array(grid.shape, np.uint8)
        of_classes: np.ndarray | None = None
        slabs = map(partial(_of_classes, watch), self.inferer.slabs(image, network))
        for block in probability_blocks(slabs, grid.axes, all_classes=probabilities is not None):
            if probabilities is not None:
                if of_classes is None:
                    of_classes = np.moveaxis(scratch_array((*grid.shape, len(block.values)), probabilities), -1, 0)
                everywhere = (slice(None), *block.region)
                grid.view(of_classes)[everywhere] = block.values.cpu().numpy()
            grid.view(labels)[block.region] = block.labels().cpu().numpy()
        return labels, of_classes

    def _by_inversion(
        self,
        image: Image,
        meta: MetaTensor,
        network: Callable[..., Any],
        probabilities: DTypeLike | None,
        watch: Callable[[Slab], object] | None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Segment an image whose preprocessing MONAI has to undo."""
        logger.info("The preprocessing is undone by MONAI, for which the logits of all classes are held.")
        everything = tuple(slice(0, extent) for extent in image.shape[1:])
        logits = self.inferer(image.cut(everything)[None], network)[0]
        prob = torch.softmax(_of_classes(watch, Slab(0, 0, logits)).values.float(), 0)
        item: dict[Any, Any] = {"pred": prob, "image": meta}
        labels = LabelsOnImageGridd("pred", self.transform)(item)["pred"]
        of_classes = None
        if probabilities is not None:
            invert = Invertd("pred", self.transform, "image", nearest_interp=False, to_tensor=True)
            of_classes = np.asarray(invert({"pred": MetaTensor(prob), "image": meta})["pred"]).astype(probabilities)
        return np.asarray(labels[0].cpu()).astype(np.uint8), of_classes


def _of_classes(watch: Callable[[Slab], object] | None, slab: Slab) -> Slab:
    """Check that a network tells classes apart by numbers, and show the slab to who watches."""
    classes = len(slab.values)
    if not 2 <= classes <= LARGEST_NUMBER:
        raise ValueError(
            f"LabelInferer: the network has {classes} output channels, one per class with the background is needed, 2 "
            f"to {LARGEST_NUMBER}."
        )
    check_numbers(slab.values)
    if watch is not None:
        watch(slab)
    return slab


def check_postprocessing(inferer: Any, postprocessing: Any) -> None:
    """Check that the labels of a `LabelInferer` are not taken for logits, or brought to the image's grid once more.

    Args:
        inferer: any inferer; the logits of others need both.
        postprocessing: a `Compose`.

    Raises:
        InputError: when the labels would be turned by an `Invertd`, or changed by an `Activationsd` or an argmax.

    Example:
        >>> from monai.transforms import Compose
        >>> inferer = LabelInferer(Compose([]), roi_size=(8, 8, 8))
        >>> check_postprocessing(inferer, Compose([AsDiscreted("pred", to_onehot=3)]))
    """
    if not isinstance(inferer, LabelInferer):
        return
    for transform in getattr(postprocessing, "transforms", ()):
        # An EnsembleEvaluator gives what its networks find other names than "pred".
        found = [key for key in getattr(transform, "keys", ()) if key not in GIVEN]
        if isinstance(transform, Invertd) and found:
            wrong = "on the grid of the image already, and would be turned once more"
        elif (isinstance(transform, Activationsd) and found) or (
            isinstance(transform, AsDiscreted)
            and any(argmax for key, argmax in zip(transform.keys, transform.argmax) if key in found)
        ):
            wrong = "no logits, and would be changed"
        else:
            continue
        raise InputError(
            f"postprocessing: has {type(transform).__name__}, but the labels of a LabelInferer are {wrong}. Take it "
            "out."
        )
