"""Both hippocampi in a whole head of any contrast: one network finds them, another, which has only seen crops, segments
them.

The brain bundle segments the head at 2 mm. The centers of its structures beside those of the MNI152 template give the
affine map from the template to the image, which takes the place of a registration.
"""

from __future__ import annotations

from collections.abc import Callable

import nibabel
import numpy as np

from monai_iunet.errors import InputError
from monai_iunet.segmentation.landmarks import check_sides, locate_head, structure_centers
from monai_iunet.segmentation.regions import CoarseSegmenter
from monai_iunet.segmentation.whole_head import WholeHead

__all__ = ["SegmentedHead"]


class SegmentedHead(WholeHead):
    """Finds both hippocampi by the structures of the head instead of by registration.

    Args:
        parts: name of each label of one hippocampus; those of the right one are counted on.
        open_brain: opens the brain bundle, when it is needed.

    Example:
        >>> SegmentedHead({1: "front", 2: "back"}, open_brain=lambda: None).names[3]
        'right front'
    """

    def __init__(self, parts: dict[int, str], open_brain: Callable[[], CoarseSegmenter]) -> None:
        super().__init__(parts)
        self.open_brain = open_brain

    def find(self, image: nibabel.Nifti1Image) -> np.ndarray:
        """Return the 4 x 4 matrix from millimeters of MNI space to those of an image of a head.

        Raises:
            InputError: when the image does not show a head with both hippocampi.
        """
        brain = self.open_brain()
        labels, affine = brain.segment_coarsely(image)
        centers = structure_centers(labels, affine, brain.labels)
        matrix = locate_head(centers)
        check_sides(labels, brain.labels)
        missing = [side for side in ("left", "right") if f"{side} hippocampus" not in centers]
        if missing:
            raise InputError(
                f"the {' and the '.join(missing)} hippocampus is not seen in this head. Use an image that shows both, "
                "or crop it around the other one."
            )
        return matrix
