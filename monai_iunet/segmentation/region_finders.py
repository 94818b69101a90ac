"""The region finders that there are, by the name that a bundle's metadata give as `region_finder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from monai_iunet.segmentation.regions import CoarseSegmenter, RegionFinder
from monai_iunet.segmentation.segmented_head import SegmentedHead
from monai_iunet.segmentation.whole_head import WholeHead

__all__ = ["BY_BRAIN", "REGION_FINDERS"]

# Each is made from the names of a crop's labels, and what opens the brain bundle.
REGION_FINDERS: Mapping[str, Callable[[dict[int, str], Callable[[], CoarseSegmenter]], RegionFinder]] = {
    "whole_head": lambda parts, open_brain: WholeHead(parts),
    "segmented_head": SegmentedHead,
}
BY_BRAIN = ("segmented_head",)  # those whose regions depend on the weights of the brain bundle
