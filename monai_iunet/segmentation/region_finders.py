"""The region finders that there are, by the name that a bundle's metadata give as `region_finder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from monai_iunet.segmentation.regions import RegionFinder
from monai_iunet.segmentation.whole_head import WholeHead

__all__ = ["REGION_FINDERS"]

# Each is made from the names of a crop's labels.
REGION_FINDERS: Mapping[str, Callable[[dict[int, str]], RegionFinder]] = {"whole_head": WholeHead}
