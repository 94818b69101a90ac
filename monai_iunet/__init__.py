"""Invertible U-Nets for MONAI: volumetric segmentation networks whose training memory does not grow with depth.

`IUNet` is the bijective network, `SegIUNet` the same between a convolutional stem and head; `plan_training` says what a
training step will hold, `reconstruction_error` how well activations are rebuilt; `segment` applies a bundle to an
image, and `SimpleITKReader` reads DICOM series, NRRD and MetaImage for MONAI's `LoadImage`. Names are loaded on first
use, so that importing the package is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monai_iunet.diagnostics import reconstruction_error
    from monai_iunet.inference import segment
    from monai_iunet.networks.nets.iunet import IUNet
    from monai_iunet.networks.nets.seg_iunet import SegIUNet
    from monai_iunet.plan import TrainingPlan, plan_training
    from monai_iunet.readers import SimpleITKReader

__all__ = [
    "IUNet",
    "SegIUNet",
    "SimpleITKReader",
    "TrainingPlan",
    "plan_training",
    "reconstruction_error",
    "segment",
]

_MODULES = {
    "IUNet": "monai_iunet.networks.nets.iunet",
    "SegIUNet": "monai_iunet.networks.nets.seg_iunet",
    "SimpleITKReader": "monai_iunet.readers",
    "TrainingPlan": "monai_iunet.plan",
    "plan_training": "monai_iunet.plan",
    "reconstruction_error": "monai_iunet.diagnostics",
    "segment": "monai_iunet.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
