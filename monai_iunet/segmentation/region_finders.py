"""The region finders that there are, by the name that a bundle's metadata give as `region_finder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from monai_iunet.segmentation.regions import CoarseSegmenter, RegionFinder
from monai_iunet.segmentation.whole_head import WholeHead

__all__ = ["REGION_FINDERS"]

# Each is made from the names of a crop's labels, and what opens the brain bundle, on whose weights regions depend.
REGION_FINDERS: Mapping[str, Callable[[dict[int, str], Callable[[], CoarseSegmenter]], RegionFinder]] = {
    "whole_head": WholeHead,
}
