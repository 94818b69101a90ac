"""What is no upright human head with both hippocampi is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.io.read import read_image
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.segmentation.whole_head import load_template
from tests.conftest import SHARED_DATA

SHAPE = (90, 108, 90)

Make = Callable[[], nibabel.Nifti1Image]


def volume(data: np.ndarray, zoom: float = 2.0) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(data.astype(np.float32), np.diag([zoom, zoom, zoom, 1.0]))


def grid() -> np.ndarray:
    return np.stack(np.meshgrid(*(np.linspace(-1, 1, extent) for extent in SHAPE), indexing="ij"))


def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE)


def nested_balls() -> np.ndarray:
    radius = np.sqrt((grid() ** 2).sum(0))
    return np.select([radius < 0.3, radius < 0.6, radius < 0.85], [0.3, 0.8, 0.5], 0.0)


def template(change: Callable[[np.ndarray], np.ndarray] = lambda data: data, scale: float = 1.0) -> nibabel.Nifti1Image:
    """The MNI152 template at 2 mm, changed, with a header that makes it larger or smaller."""
    head = load_template(resolution=2)
    return nibabel.Nifti1Image(change(head.get_fdata(dtype=np.float32)), head.affine @ np.diag([scale] * 3 + [1]))


def without(part: tuple[slice, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        cut = data.copy()
        cut[part] = 0
        return cut

    return change


def shared(*names: str) -> nibabel.Nifti1Image:
    path = SHARED_DATA.joinpath(*names)
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the checkout (in ../shared/data)")
    return read_image(path)


EVERYTHING = slice(None)
MADE: dict[str, Make] = {
    "white noise": lambda: volume(noise()),
    "blobs": lambda: volume(ndimage.gaussian_filter(noise(), 4)),
    "fine blobs": lambda: volume(ndimage.gaussian_filter(noise(), 1.5)),
    "a ramp": lambda: volume(grid().sum(0)),
    "a ball": lambda: volume((grid() ** 2).sum(0) < 0.5),
    "nested balls": lambda: volume(nested_balls()),
    "a checkerboard": lambda: volume(np.indices(SHAPE).sum(0) // 9 % 2),
    "a noisy cylinder": lambda: volume(((grid()[:2] ** 2).sum(0) < 0.7) + 0.1 * noise()),
    "upside down with a wrong header": lambda: template(lambda data: data[:, :, ::-1].copy()),
    "face to the back with a wrong header": lambda: template(lambda data: data[:, ::-1].copy()),
    "lying down with a wrong header": lambda: template(lambda data: np.rot90(data, axes=(1, 2)).copy()),
    "on its side with a wrong header": lambda: template(lambda data: np.rot90(data, axes=(0, 2)).copy()),
    "zoomed four times": lambda: template(lambda data: ndimage.zoom(data[30:60, 35:75, 25:55], 3, order=1)),
    "with voxels that are 1.7 times as long": lambda: template(scale=1.7),
    "with voxels that are 0.45 times as long": lambda: template(scale=0.45),
    "without its left half": lambda: template(without((slice(0, 49),))),
    "without its lower half": lambda: template(without((EVERYTHING, EVERYTHING, slice(0, 50)))),
    "without its temporal lobes": lambda: template(without((EVERYTHING, slice(36, 75), slice(0, 40)))),
}
REAL: dict[str, Make] = {
    "CT of a torso": lambda: shared("examples", "ct_torso.nii.gz"),
    "MRI of a torso": lambda: shared("examples", "mr_torso.nii.gz"),
    "CT of a neck": lambda: shared("OpenKBP_HeadNeck", "imagesTr", "pt_201.nii.gz"),
    "slices of a CT": lambda: shared("examples", "ct_dicom"),
}


@pytest.fixture(scope="module")
def segmenter() -> BundleSegmenter:
    return BundleSegmenter(bundle_folder(), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MADE, *REAL])
def test_what_is_no_head_is_refused(name: str, segmenter: BundleSegmenter) -> None:
    image = (MADE | REAL)[name]()
    with pytest.raises(InputError) as error:
        segmenter.segment(image, name)
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_template_is_not_refused(segmenter: BundleSegmenter) -> None:
    assert set(np.unique(segmenter.segment(template()).labels)) == {0, 1, 2, 3, 4}
