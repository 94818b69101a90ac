"""Labels on the grid of the image: those of MONAI's sliding windows and `Invertd`, up to ties."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Compose,
    CropForegroundd,
    Invertd,
    Orientationd,
    SaveImaged,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)
from torch import Tensor, nn

from monai_iunet import LabelInferer, LargestComponentsd, LiveBytes, MirrorInferer, SaveImageLabelsd, is_scanned
from monai_iunet.errors import InputError
from monai_iunet.inference.image_grid import ImageGrid
from monai_iunet.inference.images import WholeImage
from monai_iunet.inference.prepare import prepare
from monai_iunet.io.labels import write_probability_image
from monai_iunet.io.scratch import scratch_array
from tests.inference.test_streaming import Network

TIE = 1e-5  # difference of probabilities
WINDOWS: dict[str, Any] = {"roi_size": (8, 8, 8), "overlap": 0.5, "mode": "gaussian", "cval": -1.0}


def preprocessing(*, crop: bool = True, spacing: tuple[float, ...] = (2.0, 1.0, 1.7), scale: bool = True) -> Compose:
    steps: list[Any] = [Orientationd("image", "RAS", labels=None)]
    steps += [CropForegroundd("image", "image", select_fn=is_scanned, allow_smaller=True)] if crop else []
    steps += [Spacingd("image", spacing, mode="bilinear")]
    steps += [ScaleIntensityRanged("image", -160, 240, -1, 1, clip=True)] if scale else []
    return Compose(steps)


def scan(affine: np.ndarray | None = None, shape: tuple[int, ...] = (17, 22, 13)) -> MetaTensor:
    """A CT as it was read, with a margin that was not scanned."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(-900, 900, (1, *shape), generator=generator).short()
    data[:, :3] = data[..., -2:] = -1024
    affine = np.diag([1.0, 1.2, 0.9, 1.0]) if affine is None else affine
    return MetaTensor(data, affine=torch.as_tensor(affine), meta={"original_affine": affine})


@torch.no_grad()
def reference(transform: Compose, image: MetaTensor, network: nn.Module, windows: Any = None) -> Tensor:
    """Probabilities on the grid of the image, as MONAI makes them."""
    prepared = transform({"image": image.float()})["image"]
    logits = (windows or SlidingWindowInferer(**WINDOWS))(prepared[None], network)[0]
    item = {"pred": MetaTensor(torch.softmax(torch.as_tensor(logits), 0)), "image": prepared}
    return torch.as_tensor(Invertd("pred", transform, "image", nearest_interp=False, to_tensor=True)(item)["pred"])


def assert_same_labels(labels: Any, probabilities: Tensor) -> None:
    """Labels may differ where the two most probable classes are as probable as each other."""
    first, second = probabilities.topk(2, dim=0).values
    differs = torch.as_tensor(np.ascontiguousarray(labels)) != probabilities.argmax(0)
    assert not differs[(first - second) > TIE].any()
    assert differs.float().mean() < 0.01


@torch.no_grad()
def from_file(transform: Compose, image: MetaTensor, network: Any, windows: Any = WINDOWS, **options: Any) -> Any:
    """Labels of an image that is preprocessed where windows are cut."""
    inferer = LabelInferer(transform, **windows, shrink=False)
    prepared, meta = prepare(transform, image, "cpu")
    return inferer.segment(prepared, meta, network, **options)


def affine_of(order: tuple[int, ...], flips: tuple[int, ...]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = (np.diag([1.0, 1.2, 0.9]) * flips)[:, order]
    affine[:3, 3] = [-20, 30, 5]
    return affine


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_every_orientation(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    image, transform, network = scan(affine_of(order, flips)), preprocessing(), Network()
    probabilities = reference(transform, image, network)
    labels, found = from_file(transform, image, network, probabilities=np.float32)
    assert_same_labels(labels, probabilities)
    torch.testing.assert_close(torch.as_tensor(np.ascontiguousarray(found)), probabilities, atol=1e-5, rtol=0)


CHAINS: dict[str, tuple[Compose, dict[str, Any]]] = {
    "not resampled": (preprocessing(spacing=(1.0, 1.2, 0.9)), {}),
    "not cropped": (preprocessing(crop=False), {}),
    "much finer": (preprocessing(spacing=(0.5, 0.6, 0.5)), {}),
    "much coarser": (preprocessing(spacing=(4.0, 5.0, 3.0)), {}),
    "one slice": (preprocessing(), {"shape": (17, 22, 3)}),
    "one voxel thick": (preprocessing(crop=False), {"shape": (1, 22, 13)}),
    "oblique": (
        preprocessing(),
        {"affine": nibabel.affines.from_matvec(np.array([[1, 0.3, 0], [-0.3, 1, 0], [0, 0, 0.9]]))},
    ),
    "sheared, undone by MONAI": (
        preprocessing(),
        {"affine": nibabel.affines.from_matvec(np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 0.9]]))},
    ),
    "padded": (Compose([*preprocessing().transforms, SpatialPadd("image", (20, 30, 20))]), {}),
    "not resampled, padded": (
        Compose([*preprocessing(spacing=(1.0, 1.2, 0.9)).transforms, SpatialPadd("image", (27, 22, 30))]),
        {},
    ),
    "padded behind": (Compose([*preprocessing().transforms, SpatialPadd("image", (20, 30, 20), method="end")]), {}),
    "padded, then resampled, undone by MONAI": (
        Compose([SpatialPadd("image", (20, 30, 20)), *preprocessing(crop=False).transforms]),
        {},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_preprocessing(name: str) -> None:
    transform, options = CHAINS[name]
    image, network = scan(**options), Network()
    probabilities = reference(transform, image, network)
    grid = ImageGrid.of(transform({"image": image.float()})["image"])
    assert (grid is None) == name.endswith("undone by MONAI")
    labels, found = from_file(transform, image, network, probabilities=np.float32)
    assert_same_labels(labels, probabilities)
    torch.testing.assert_close(torch.as_tensor(np.ascontiguousarray(found)), probabilities, atol=1e-5, rtol=0)
    assert_same_labels(from_file(transform, image, network)[0], probabilities)


@pytest.mark.parametrize("overlap", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(17, 22, 13), (17, 22, 1)])
def test_every_overlap(overlap: float, shape: tuple[int, ...]) -> None:
    transform, image, network = preprocessing(crop=False), scan(shape=shape), Network()
    windows = {**WINDOWS, "overlap": overlap}
    probabilities = reference(transform, image, network, SlidingWindowInferer(**windows))
    assert_same_labels(from_file(transform, image, network, windows)[0], probabilities)


NETWORKS: dict[str, tuple[Any, str]] = {
    "several outputs": (lambda x: (x, x), "returns a tuple, one tensor is needed"),
    "another size": (lambda x: x[..., ::2].expand(-1, 3, -1, -1, -1), "batch and spatial size must stay"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_does_not_fit_is_refused_in_one_line(name: str) -> None:
    network, message = NETWORKS[name]
    with pytest.raises(ValueError, match=message) as caught:
        from_file(preprocessing(), scan(), network)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("longest", [0, 1, 2])
def test_as_the_inferer_of_an_evaluator(longest: int, tmp_path: Path) -> None:
    shape = [12, 13, 11]
    shape[longest] = 26
    transform, network, image = preprocessing(), Network(), scan(shape=tuple(shape))
    image.meta["filename_or_obj"] = "folder/case.nii.gz"
    batch: Any = list_data_collate([transform({"image": image.float()})])["image"]
    options: Any = {"shrink": False, **WINDOWS}
    inferer = LabelInferer(transform, tmp_path, mirror={"swap": [[1, 3]]}, **options)
    with torch.no_grad():
        labels = inferer(batch, network)
    assert labels.shape == (1, 1, *shape)
    probabilities = reference(transform, image, network, MirrorInferer(swap=[[1, 3]], **options))
    assert_same_labels(labels[0, 0].numpy(), probabilities)
    written = nibabel.load(tmp_path / "case_prob.nii.gz")
    np.testing.assert_allclose(written.get_fdata(), probabilities.movedim(0, -1).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="a MetaTensor is needed"):
        inferer(batch.as_tensor(), network)


@pytest.mark.parametrize(("axcodes", "is_refused"), [("RAS", False), ("LPS", False), ("ASR", True)])
def test_classes_change_places_only_in_the_mirror_image_of_left_and_right(axcodes: str, is_refused: bool) -> None:
    transform = Compose([Orientationd("image", axcodes, labels=None)])
    batch = list_data_collate([transform({"image": scan().float()})])["image"]
    inferer = LabelInferer(transform, mirror={"swap": [[1, 3]]}, **WINDOWS)
    message = f"image: is turned {axcodes}, so spatial_axis 0 does not run from left to right"
    with pytest.raises(InputError, match=message) if is_refused else nullcontext():
        assert inferer(batch, Network()).shape == (1, 1, *scan().shape[1:])


@torch.no_grad()
def test_probabilities_of_images_of_one_name_are_not_one_file(tmp_path: Path) -> None:
    transform, network = preprocessing(), Network()
    inferer = LabelInferer(transform, tmp_path, **WINDOWS)

    def infer(**meta: str) -> Any:
        image = scan()
        image.meta.update(meta)
        return inferer(list_data_collate([transform({"image": image.float()})])["image"], network)

    for _ in range(2):  # of the same image they are written again
        infer(filename_or_obj="one/case.nii.gz")
    before = (tmp_path / "case_prob.nii.gz").read_bytes()
    with pytest.raises(InputError, match=r"two.case.nii.gz and one.case.nii.gz: the result of both would be"):
        infer(filename_or_obj="two/case.nii.gz")
    assert (tmp_path / "case_prob.nii.gz").read_bytes() == before
    with pytest.raises(ValueError, match="whose meta data name their file"):
        infer()


@torch.no_grad()
def test_monai_saves_labels_under_the_names_of_their_images(tmp_path: Path) -> None:
    """Files named 0, 1, ... would be replaced by those of the next run, or of another process."""
    transform, network = preprocessing(), Network()
    inferer = LabelInferer(transform, **WINDOWS)
    for name in ("first", "second"):
        image = scan()
        image.meta["filename_or_obj"] = str(tmp_path / f"{name}.nii.gz")
        labels = inferer(list_data_collate([transform({"image": image.float()})["image"]]), network)
        SaveImaged("pred", output_dir=str(tmp_path), separate_folder=False, print_log=False)({"pred": labels[0]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first_trans.nii.gz", "second_trans.nii.gz"]
    found = nibabel.load(tmp_path / "first_trans.nii.gz")
    np.testing.assert_allclose(found.affine, image.meta["original_affine"])
    np.testing.assert_array_equal(found.get_fdata(), labels[0, 0])


@torch.no_grad()
def test_left_and_right_stay_of_an_image_in_lps(tmp_path: Path) -> None:
    """As readers of MONAI give it with `affine_lps_to_ras=False`."""
    affine = np.array([[0, 0, 1.1, -20], [1.2, 0, 0, 7], [0, 0.9, 0, 3], [0, 0, 0, 1]])
    network, found = Network(), {}
    nibabel.save(nibabel.Nifti1Image(scan(affine)[0].numpy(), affine), tmp_path / "LPS.nii.gz")
    for space, to_space in (("RAS", np.eye(4)), ("LPS", np.diag([-1.0, -1, 1, 1]))):
        image = scan(to_space @ affine)
        image.meta.update({"space": space, "filename_or_obj": str(tmp_path / f"{space}.nii.gz")})
        transform = Compose([Spacingd("image", (2.0, 1.0, 1.7))])
        batch = list_data_collate([transform({"image": image.float()})])["image"]
        (found[space],) = decollate_batch(LabelInferer(transform, tmp_path, **WINDOWS)(batch, network))
        assert found[space].meta["space"] == space
        np.testing.assert_allclose(found[space].affine, to_space @ affine)
    assert torch.equal(found["RAS"].as_tensor(), found["LPS"].as_tensor())
    SaveImageLabelsd("pred", tmp_path)({"image": batch[0], "pred": found["LPS"]})
    labels = nibabel.load(tmp_path / "LPS_seg.nii.gz")
    np.testing.assert_allclose(labels.affine, affine)
    np.testing.assert_array_equal(labels.dataobj, found["RAS"][0])
    written = [nibabel.load(tmp_path / f"{space}_prob.nii.gz") for space in found]
    np.testing.assert_allclose(written[0].affine, affine)
    np.testing.assert_allclose(written[1].affine, affine)
    np.testing.assert_allclose(written[0].get_fdata(), written[1].get_fdata(), atol=1e-6)


def test_windows_of_the_raw_image_are_those_of_the_preprocessed_one() -> None:
    transform, image = preprocessing(), scan()
    whole = transform({"image": image.float()})["image"].as_tensor()
    prepared, meta = prepare(transform, image, "cpu")
    assert prepared.tensor.dtype == torch.int16
    assert prepared.shape == tuple(meta.shape) == tuple(whole.shape)
    for region in ((slice(0, 3), slice(2, 9), slice(1, 2)), tuple(slice(0, extent) for extent in whole.shape[1:])):
        torch.testing.assert_close(prepared.cut(region), whole[:, region[0], region[1], region[2]], atol=1e-6, rtol=0)


def test_classes_that_cannot_win_are_left_out_and_no_other() -> None:
    """Class 2 is nowhere the most probable one on the network's grid, but between its voxels it is."""
    logits = torch.log(torch.tensor([[0.5, 0.02], [0.02, 0.5], [0.46, 0.46], [0.02, 0.02]])).reshape(4, 2, 1, 1)
    transform = Compose([Spacingd("image", (2.0, 1.0, 1.0), mode="bilinear")])
    image = MetaTensor(torch.zeros(1, 3, 1, 1), affine=torch.eye(4), meta={"original_affine": np.eye(4)})
    inferer = LabelInferer(transform, roi_size=(2, 1, 1))
    labels = inferer(transform({"image": image})["image"][None], lambda _: logits[None])
    assert labels.flatten().tolist() == [0, 2, 1]


@pytest.mark.parametrize("probabilities", [None, np.float32])
@pytest.mark.parametrize("sheared", [False, True], ids=["slab by slab", "by inversion"])
def test_of_what_is_no_number_no_labels_are_made(probabilities: Any, sheared: bool) -> None:
    affine = np.diag([1.0, 1.2, 0.9, 1.0])
    affine[0, 1] = 0.5 if sheared else 0.0
    transform = preprocessing(crop=False)
    image = transform({"image": scan(affine).float()})["image"]
    network: Any = lambda windows: torch.cat([windows, windows * float("nan")], 1)  # noqa: E731
    with pytest.raises(ValueError, match="NaN or infinite"):
        LabelInferer(transform, **WINDOWS).segment(WholeImage(image.as_tensor()), image, network, probabilities)


def test_images_of_a_batch_keep_their_places() -> None:
    transform = Compose([Spacingd("image", (2.0, 2.0, 2.0))])
    affines = [np.diag([1.0, 1.2, 0.9, 1.0]) for _ in range(2)]
    affines[1][:3, 3] = 10, 20, 30
    batch = list_data_collate([transform({"image": scan(affine).float()})["image"] for affine in affines])
    labels = LabelInferer(transform, **WINDOWS)(batch, Network())  # with gradients, which labels have none of
    assert labels.shape == (2, 1, 17, 22, 13)
    for found, affine in zip(decollate_batch(labels), affines):
        np.testing.assert_allclose(found.affine, affine)


def test_batches_that_cannot_be_segmented_are_refused() -> None:
    transform = Compose([Spacingd("image", (2.0, 2.0, 2.0))])
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    inferer = LabelInferer(transform, **WINDOWS)
    larger = [transform({"image": scan(affine, shape).float()})["image"] for shape in ((16, 16, 15), (16, 16, 16))]
    assert larger[0].shape == larger[1].shape
    with pytest.raises(ValueError, match="one by one"):
        inferer(list_data_collate(larger), Network())
    with pytest.raises(ValueError, match="without images"):
        inferer(list_data_collate(larger[:1])[:0], Network())
    for join in (torch.stack, lambda images: torch.cat([image[None] for image in images])):
        with pytest.raises(ValueError, match="meta data of the first one alone"):  # in whose place all would be
            inferer(join(larger), Network())
    pending = Spacingd("image", (2.0, 2.0, 2.0), lazy=True)({"image": scan(affine).float()})["image"]
    with pytest.raises(ValueError, match="pending"):
        inferer(pending[None], Network())


def test_one_channel_tells_no_classes_apart() -> None:
    for classes in (1, 257):
        with pytest.raises(ValueError, match=f"has {classes} output channels"):
            from_file(preprocessing(), scan(), Network(classes))


def test_memory_grows_with_image_and_labels_only() -> None:
    transform, network, peaks = preprocessing(crop=False), Network(classes=30), []
    for length in (40, 160):
        image = scan(shape=(16, 18, length))
        with LiveBytes(ignore=[image, *network.parameters()]) as live:
            from_file(transform, image, network)
        peaks.append(live.peak)
    turned = 2 * 16 * 18 * (160 - 40)  # int16
    assert peaks[1] - peaks[0] <= turned
    with LiveBytes(ignore=[image, *network.parameters()]) as live:
        reference(transform, image, network)
    assert peaks[1] < 0.3 * live.peak


def test_the_grid_of_a_file_is_not_guessed() -> None:
    image = preprocessing()({"image": scan().float()})["image"]
    grid = ImageGrid.of(image)
    assert grid is not None
    np.testing.assert_array_equal(grid.affine, np.diag([1.0, 1.2, 0.9, 1.0]))
    image.applied_operations[0]["extra_info"]["original_affine"] = np.diag([1.0, 1.3, 0.9, 1.0])  # led to another image
    assert ImageGrid.of(image) is None
    assert ImageGrid.of(MetaTensor(torch.zeros(1, 4, 4, 4))) is None


def test_large_arrays_lie_in_files_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = scratch_array((5, 6, 7), np.float32, largest_in_memory=10)
    assert isinstance(array, np.memmap)
    assert not array.any()
    array[1, 2, 3] = 4
    assert array[1, 2, 3] == 4
    assert not list(tmp_path.iterdir())
    assert not isinstance(scratch_array((5, 6, 7), np.float32), np.memmap)


def test_a_full_disk_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"GiB do not fit.*TMPDIR"):
        scratch_array((2**20, 2**20, 2**10), np.uint8)


@pytest.mark.parametrize(("dtype", "stored"), [(np.float32, np.float32), (np.float16, np.uint16)])
def test_probabilities_in_a_file(dtype: Any, stored: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((3, 4, 5, 6)).astype(dtype)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    write_probability_image(values, affine, tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == stored
    np.testing.assert_array_equal(image.affine, affine)
    np.testing.assert_allclose(np.moveaxis(image.get_fdata(), -1, 0), values, atol=1e-5)
    values[0, 0, 0, :2] = -1e-3, 1.001  # what 1 minus a sum of rounded numbers may be
    write_probability_image(values, affine, tmp_path / "a.nii.gz")
    written = nibabel.load(tmp_path / "a.nii.gz").get_fdata()
    np.testing.assert_allclose(np.moveaxis(written, -1, 0), values, atol=2e-3)


def test_largest_components_are_those_of_monai() -> None:
    from monai.transforms import KeepLargestConnectedComponentd

    labels = torch.randint(0, 5, (1, 9, 8, 7), dtype=torch.uint8)
    expected = KeepLargestConnectedComponentd("pred", applied_labels=[1, 2, 3])({"pred": labels.clone()})["pred"]
    found = LargestComponentsd("pred", [1, 2, 3, 9])({"pred": labels.clone()})["pred"]
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    assert not torch.equal(torch.as_tensor(found), labels)


def test_an_image_without_foreground_is_refused_in_clear_words() -> None:
    image = MetaTensor(torch.randint(-2000, -1000, (1, 9, 9, 9)), affine=torch.eye(4))
    with pytest.raises(ValueError, match=r"CropForegroundd leaves no voxel .* Hounsfield units"):
        prepare(preprocessing(), image, "cpu")
