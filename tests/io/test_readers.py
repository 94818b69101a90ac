"""Images in every format that people have, and what is refused."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from monai.transforms import LoadImaged

from monai_iunet.errors import InputError
from monai_iunet.io.dicom_series import list_series
from monai_iunet.io.geometry import from_simpleitk, to_simpleitk
from monai_iunet.io.read import read_image
from monai_iunet.io.reader import SimpleITKReader
from monai_iunet.io.simpleitk import read_with_simpleitk
from tests.io.dicom_files import UID, write_series

EXAMPLES = Path(__file__).parents[3] / "shared" / "data" / "examples"


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(-900, 900, (7, 6, 5)).astype(np.float32)


def oblique() -> np.ndarray:
    """An affine that turns, scales and moves."""
    a, b = 0.3, -0.2
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    return nibabel.affines.from_matvec(turn * [-1.5, 1.25, 2.0], [3.0, -20.0, 7.0])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_every_format_gives_the_same_volume(suffix: str, volume: np.ndarray, tmp_path: Path) -> None:
    original = nibabel.Nifti1Image(volume, oblique())
    SimpleITK.WriteImage(to_simpleitk(original), tmp_path / f"image{suffix}")
    image = read_image(tmp_path / f"image{suffix}")
    np.testing.assert_allclose(image.affine, oblique(), atol=1e-5)
    np.testing.assert_array_equal(image.get_fdata(), volume)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("place", [0.2, 0.6, 0.95])
def test_a_bit_that_changed_in_compressed_data_is_noticed(
    place: float, suffix: str, volume: np.ndarray, tmp_path: Path
) -> None:
    image, path = nibabel.Nifti1Image(np.tile(volume, (3, 3, 3)), oblique()), tmp_path / f"übel{suffix}"
    SimpleITK.WriteImage(to_simpleitk(image), path, useCompression=True)
    assert np.array_equal(read_image(path).get_fdata(), image.get_fdata())
    data = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    start = len(content) - len(content.split(b"\n\n" if suffix == ".nrrd" else b"LOCAL\n", 1)[-1])
    content[start + int(place * (len(content) - start))] ^= 4
    data.write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(path.name)}: (truncated or damaged|not a readable)"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_raw_data_of_another_image_are_refused(suffix: str, volume: np.ndarray, tmp_path: Path) -> None:
    """More than what the header needs would be read as if they were its own."""
    path = tmp_path / f"image{suffix}"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, oblique())), path)
    header = path.read_bytes()
    path.write_bytes(header.replace(b"MET_FLOAT", b"MET_SHORT").replace(b"type: float", b"type: short"))
    with pytest.raises(InputError, match=rf"{suffix}: its size and type need {2 * volume.size} bytes, image.*raw has"):
        read_with_simpleitk(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("planes", [4, 9])
def test_compressed_data_of_another_image_are_refused(
    planes: int, suffix: str, volume: np.ndarray, tmp_path: Path
) -> None:
    """SimpleITK fills what a MetaImage has too little of with whatever is in memory."""
    path = tmp_path / f"image{suffix}"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, oblique())), path, useCompression=True)
    path.write_bytes(path.read_bytes().replace(b"7 6 5\n", b"7 6 %d\n" % planes, 1))
    with pytest.raises(InputError, match=rf"{suffix}: its size and type need {168 * planes} bytes, image.* has 840:"):
        read_with_simpleitk(path)


@pytest.mark.parametrize("line", [b"", b"CompressedDataSize = 90\n"])
def test_compressed_data_that_would_be_read_in_part_are_refused(
    line: bytes, volume: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "image.mha"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, oblique())), path, useCompression=True)
    path.write_bytes(re.sub(rb"CompressedDataSize = \d+\n", line, path.read_bytes(), count=1))
    with pytest.raises(InputError, match=r"image.mha: its CompressedDataSize is (0|90), its data take \d+ bytes"):
        read_with_simpleitk(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("ElementSpacing", "says nothing of the size of its voxels"), ("TransformMatrix", "has no orientation")],
)
@pytest.mark.parametrize("other", ["Comment", ""], ids=["missing", "lower case, which SimpleITK passes over"])
def test_a_metaimage_without_spacing_or_directions_is_refused(
    other: str, name: str, message: str, volume: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "image.mha"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, oblique())), path)
    path.write_bytes(path.read_bytes().replace(name.encode(), (other or name.lower()).encode()))
    with pytest.raises(InputError, match=message):
        read_with_simpleitk(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"DistanceUnits = cm", "in the unit cm, millimeters are needed"),
        (b"ElementToIntensityFunctionSlope = 0.5", "its ElementToIntensityFunctionSlope is 0.5"),
        (b"ElementToIntensityFunctionOffset = -1024", "its ElementToIntensityFunctionOffset is -1024"),
    ],
)
def test_what_simpleitk_does_not_apply_is_refused(
    line: bytes, message: str, volume: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "image.mha"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, oblique())), path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"ElementType", line + b"\nElementType"))
    with pytest.raises(InputError, match=message):
        read_with_simpleitk(path)
    neutral = b"DistanceUnits = mm\nElementToIntensityFunctionSlope = 1\nElementToIntensityFunctionOffset = 0.0\n"
    path.write_bytes(content.replace(b"ElementType", neutral + b"ElementType"))
    np.testing.assert_array_equal(read_with_simpleitk(path).get_fdata(), volume)


@pytest.mark.parametrize("following", [b"", b"\0" * 512, b"from a tape"])
def test_gzip_files_in_several_parts_are_read(following: bytes, volume: np.ndarray, tmp_path: Path) -> None:
    image, path = nibabel.Nifti1Image(volume, oblique()), tmp_path / "image.nii.gz"
    image.set_sform(oblique(), code=1)
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content[:600]) + gzip.compress(content[600:]) + following)
    assert np.array_equal(read_image(path).get_fdata(), image.get_fdata())
    path.write_bytes(gzip.compress(content[:600]) + gzip.compress(content[600:])[:-3])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_image(path)


def test_to_simpleitk_and_back(volume: np.ndarray) -> None:
    image = from_simpleitk(to_simpleitk(nibabel.Nifti1Image(volume, oblique())))
    np.testing.assert_allclose(image.affine, oblique(), atol=1e-10)
    np.testing.assert_array_equal(image.get_fdata(), volume)


def test_a_point_is_where_simpleitk_says_it_is(volume: np.ndarray) -> None:
    image = nibabel.Nifti1Image(volume, oblique())
    left, posterior, superior = to_simpleitk(image).TransformIndexToPhysicalPoint((4, 2, 3))
    np.testing.assert_allclose(nibabel.affines.apply_affine(image.affine, (4, 2, 3)), [-left, -posterior, superior])


def test_a_dicom_series_is_sorted_by_position(volume: np.ndarray, tmp_path: Path) -> None:
    image = read_image(write_series(tmp_path / "ct", volume))
    np.testing.assert_array_equal(image.get_fdata(), volume)
    np.testing.assert_allclose(image.affine, [[-1.5, 0, 0, 10], [0, -1.25, 0, -20], [0, 0, 2, 0], [0, 0, 0, 1]])
    assert int(image.header["sform_code"]) == 1


@pytest.mark.parametrize("way", ["class", "instance"])
def test_monai_loads_with_the_reader(way: str, volume: np.ndarray, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct", volume)
    reader = SimpleITKReader if way == "class" else SimpleITKReader(series=f"{UID}.1")
    item = LoadImaged(keys="image", reader=reader, ensure_channel_first=True)({"image": folder})
    np.testing.assert_array_equal(item["image"][0].numpy(), volume)
    np.testing.assert_allclose(item["image"].affine.numpy(), read_image(folder).affine)
    assert item["image"].meta["filename_or_obj"] == str(folder)


@pytest.mark.parametrize("order", [[1, 0, 2], [1, 2, 0]], ids=["two axes", "all axes"])
def test_a_cube_whose_axes_have_changed_places_is_another_grid(order: list[int], tmp_path: Path) -> None:
    cube, affine = np.random.default_rng(0).normal(size=(6, 6, 6)).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -6
    turned = affine[:, [*order, 3]]  # the same corners, named differently
    nibabel.save(nibabel.Nifti1Image(cube, affine), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(cube.transpose(order), turned), tmp_path / "b.nii")
    with pytest.raises(InputError, match=r"b\.nii: its grid and that of the first channel are up to 12 mm apart"):
        read_image([tmp_path / "a.nii", tmp_path / "b.nii"])


def test_several_files_become_channels(volume: np.ndarray, tmp_path: Path) -> None:
    for number in (1, 2):
        nibabel.save(nibabel.Nifti1Image(volume * number, oblique()), tmp_path / f"{number}.nii")
    paths = [tmp_path / "1.nii", tmp_path / "2.nii"]
    item = LoadImaged(keys="image", reader=SimpleITKReader, ensure_channel_first=True)({"image": paths})
    assert item["image"].shape == (2, 7, 6, 5)
    np.testing.assert_array_equal(item["image"][1].numpy(), 2 * volume)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "2.nii")
    with pytest.raises(InputError, match=r"2\.nii: its grid and that of the first channel are"):
        SimpleITKReader().read(paths)
    nibabel.save(nibabel.Nifti1Image(np.stack([volume, 2 * volume], -1), oblique()), tmp_path / "4.nii")
    joint = LoadImaged("image", SimpleITKReader, ensure_channel_first=True, channels=2)({"image": tmp_path / "4.nii"})
    np.testing.assert_array_equal(joint["image"].numpy(), item["image"].numpy())
    with pytest.raises(InputError, match=r"4\.nii: has 2 channels, 3 are needed"):
        SimpleITKReader(channels=3).read(tmp_path / "4.nii")


def test_the_reader_knows_its_suffixes(tmp_path: Path) -> None:
    reader = SimpleITKReader()
    assert reader.verify_suffix(["a.nrrd", "b.mha"])
    assert not reader.verify_suffix("a.png")
    assert reader.verify_suffix(tmp_path)


def test_of_several_series_one_is_chosen(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path, volume)
    write_series(tmp_path, volume[:, :, :4] / 2, number=2)
    assert [len(series.files) for series in list_series(tmp_path)] == [5, 4]
    with pytest.raises(
        InputError, match=r"2 DICOM series, choose one with --series UID: .*made series 1.*made series 2"
    ):
        read_image(tmp_path)
    assert read_image(tmp_path, series=f"{UID}.2").shape == (7, 6, 4)
    assert read_image(tmp_path, series=".1").shape == (7, 6, 5)
    with pytest.raises(InputError, match="no series 9"):
        read_image(tmp_path, series="9")


BAD_SERIES: dict[str, tuple[dict[str, Any], str]] = {
    "missing slice": ({"heights": [0, 2, 4, 8, 10]}, r"2.00 mm apart, but 4.00 mm between 4.0 and 8.0 mm"),
    "repeated slice": ({"heights": [0, 2, 4, 4, 6]}, "1 slices lie where another one lies"),
    "two phases": ({"heights": [0, 2, 4, 0, 2]}, "2 slices lie where another one lies"),
    "no positions": ({"heights": [0, 0, 0]}, "2 slices lie where another one lies"),
    "orientations": (
        {"orientations": ["1\\0\\0\\0\\1\\0"] * 4 + ["0\\1\\0\\0\\0\\-1"]},
        "several orientations, as localizers do",
    ),
}


@pytest.mark.parametrize("name", BAD_SERIES)
def test_a_series_that_is_no_volume_is_refused(name: str, volume: np.ndarray, tmp_path: Path) -> None:
    changed, message = BAD_SERIES[name]
    with pytest.raises(InputError, match=message):
        read_image(write_series(tmp_path / "ct", volume, **changed))


def test_positions_may_be_rounded(volume: np.ndarray, tmp_path: Path) -> None:
    image = read_image(write_series(tmp_path / "ct", volume, heights=[0, 2.05, 3.95, 6, 8.04]))
    assert image.header.get_zooms()[2] == pytest.approx(2.01)


def test_what_is_no_volume_is_refused(volume: np.ndarray, tmp_path: Path) -> None:
    write_series(tmp_path / "one", volume[:, :, :1])
    with pytest.raises(InputError, match="a single slice"):
        read_image(tmp_path / "one")
    with pytest.raises(InputError, match="3D volume"):
        read_image(next((tmp_path / "one").iterdir()))
    SimpleITK.WriteImage(SimpleITK.Image(5, 5, SimpleITK.sitkFloat32), tmp_path / "flat.mha")
    with pytest.raises(InputError, match="3D volume"):
        read_image(tmp_path / "flat.mha")
    color = SimpleITK.Image([5, 5, 5], SimpleITK.sitkVectorFloat32, 3)
    SimpleITK.WriteImage(color, tmp_path / "color.nrrd")
    with pytest.raises(InputError, match="with 3 components"):
        read_image(tmp_path / "color.nrrd")
    (tmp_path / "text.nrrd").write_text("no image")
    with pytest.raises(InputError, match="not readable"):
        read_image(tmp_path / "text.nrrd")


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_data_of_a_header_may_lie_in_another_folder(suffix: str, compressed: bool, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, (90, 90, 90)).astype(np.int16)  # larger than a header can tell
    header, folder = tmp_path / f"image.{suffix}", tmp_path / "data"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(values, np.eye(4)), values), header, compressed)
    data = next(path for path in tmp_path.iterdir() if path != header)
    folder.mkdir()
    data.rename(folder / data.name)
    header.write_bytes(header.read_bytes().replace(data.name.encode(), f"data/{data.name}".encode()))
    np.testing.assert_array_equal(read_image(header).dataobj, values)


def test_a_header_that_lies_is_refused_before_memory_is_taken(volume: np.ndarray, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume, np.eye(4))
    nibabel.save(image, tmp_path / "image.nii")
    content = bytearray((tmp_path / "image.nii").read_bytes())
    content[42:48] = np.array([30000, 30000, 30000], dtype="<i2").tobytes()  # dim[1:4]
    (tmp_path / "image.nii").write_bytes(content)
    with pytest.raises(InputError, match="promises 108000000000000 bytes"):
        read_image(tmp_path / "image.nii")
    SimpleITK.WriteImage(to_simpleitk(image), tmp_path / "image.nrrd")
    content = (tmp_path / "image.nrrd").read_bytes().replace(b"sizes: 7 6 5", b"sizes: 70000 60000 50000")
    (tmp_path / "image.nrrd").write_bytes(content)
    with pytest.raises(InputError, match="promises"):
        read_image(tmp_path / "image.nrrd")


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs ../shared/data/examples")
@pytest.mark.parametrize(
    ("folder", "shape", "zooms"),
    [("ct_dicom", (512, 512, 20), (0.98, 0.98, 2.0)), ("mr_dicom_hippocampus_crop", (35, 51, 32), (1, 1, 1))],
)
def test_series_of_scanners(folder: str, shape: tuple[int, ...], zooms: tuple[float, ...]) -> None:
    image = read_image(EXAMPLES / folder)
    assert image.shape == shape
    np.testing.assert_allclose(image.header.get_zooms(), zooms, atol=0.01)
    if folder == "ct_dicom":
        assert image.get_fdata().min() <= -1000  # Hounsfield units


@pytest.fixture
def metaimage(tmp_path: Path) -> Path:
    data = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(data), tmp_path / "image.mha")
    return tmp_path / "image.mha"


def test_a_header_that_ends_the_process_of_its_reader(metaimage: Path) -> None:
    metaimage.write_bytes(metaimage.read_bytes().replace(b"NDims = 3", b"NDims = -1"))
    with pytest.raises(InputError, match=r"image.mha: .*damaged"):
        read_image(metaimage)


def test_a_probe_that_cannot_start_is_no_damaged_file(metaimage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(OSError, match="could not be read"):
        read_image(metaimage)


def test_a_qform_that_contradicts_the_sform_is_told_from_it(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.random.default_rng(0).random((6, 5, 4)), np.eye(4))
    image.set_sform(np.diag([1.0, -1.0, 1.0, 1.0]), code=1)
    image.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), code=1)
    nibabel.save(image, tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match="run to RPS by its sform, to LPS by its qform"):
        read_image(tmp_path / "image.nii.gz")


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_header_is_not_read_as_voxels(kind: type, volume: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "image.nii"
    nibabel.save(kind(volume, np.eye(4)), path)
    content, place = bytearray(path.read_bytes()), 108 if kind is nibabel.Nifti1Image else 168  # of vox_offset
    content[place : place + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"voxels begin at byte 0 \(vox_offset\)"):
        read_image(path)


@pytest.mark.parametrize("turn", [0, 5, 30])
def test_forms_near_45_degrees_may_name_axes_differently(turn: float, volume: np.ndarray, tmp_path: Path) -> None:
    def turned(angle: float) -> np.ndarray:
        cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        rotation = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        return nibabel.affines.from_matvec(rotation, [-93.3, 21.7, 55.1])

    for angle in (45, 135, -45):
        image = nibabel.Nifti1Image(volume, turned(angle))
        image.set_sform(turned(angle + turn / 2), code=2)
        image.set_qform(turned(angle - turn / 2), code=1)
        nibabel.save(image, tmp_path / "image.nii")
        if turn < 20:
            np.testing.assert_allclose(read_image(tmp_path / "image.nii").affine, image.affine, atol=1e-5)
        else:
            with pytest.raises(InputError, match="left and right are in doubt"):
                read_image(tmp_path / "image.nii")


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_values_that_float32_does_not_tell_apart_are_refused(dtype: type, suffix: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(1, 200, (6, 5, 4)).astype(dtype)
    values[0] = -(2**30)  # which is zero with the offset
    path = tmp_path / f"image{suffix}"
    for offset in (2**30, 2**20):
        image = nibabel.Nifti1Image(values + dtype(offset), oblique())
        if suffix == ".nii.gz":
            nibabel.save(image, path)
        else:
            SimpleITK.WriteImage(to_simpleitk(image, np.asarray(image.dataobj)), path)
        if offset == 2**30:
            with pytest.raises(InputError, match=r"between 107374\d+ and 107374\d+, which float32, .*, hardly tells"):
                read_image(path)
        else:
            assert np.unique(read_image(path).get_fdata()).size == np.unique(values).size


@pytest.mark.parametrize("unit", ["meter", "micron"])
def test_sizes_in_another_unit_are_refused(unit: str, volume: np.ndarray, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume, oblique())
    SimpleITK.WriteImage(to_simpleitk(image), tmp_path / "image.nrrd")
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "image.nii.gz")
    with pytest.raises(InputError, match=rf"in the unit {unit}, millimeters are needed"):
        read_image(tmp_path / "image.nii.gz")
    content = (tmp_path / "image.nrrd").read_bytes()
    units = " ".join([f'"{unit}"'] * 3).encode()
    (tmp_path / "image.nrrd").write_bytes(content.replace(b"sizes:", b"space units: " + units + b"\nsizes:"))
    with pytest.raises(InputError, match=rf"in the unit {unit}, millimeters are needed"):
        read_image(tmp_path / "image.nrrd")
    (tmp_path / "image.nrrd").write_bytes(content.replace(b"sizes:", b'space units: "mm" "mm" "mm"\nsizes:'))
    assert read_image(tmp_path / "image.nrrd").shape == volume.shape


def without_lines(path: Path, *beginnings: bytes) -> Path:
    """Take lines out of the header of a file."""
    header, separator, data = path.read_bytes().partition(b"LOCAL\n" if path.suffix == ".mha" else b"\n\n")
    lines = [line for line in header.split(b"\n") if not line.startswith(beginnings)]
    path.write_bytes(b"\n".join(lines) + separator + data)
    return path


@pytest.mark.parametrize(
    ("suffix", "beginnings"),
    [
        (".nrrd", (b"space:", b"space directions:", b"space origin:")),
        (".mha", (b"TransformMatrix",)),
        (".mha", (b"TransformMatrix", b"Offset", b"CenterOfRotation", b"AnatomicalOrientation")),
    ],
)
def test_a_file_without_orientation_is_refused(
    suffix: str, beginnings: tuple[bytes, ...], volume: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / f"image{suffix}"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, oblique())), path)
    assert read_image(path).shape == (7, 6, 5)
    with pytest.raises(InputError, match="has no orientation, so left and right cannot be told apart"):
        read_image(without_lines(path, *beginnings))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_each_format_is_judged_by_the_same_rules(suffix: str, volume: np.ndarray, tmp_path: Path) -> None:
    image = to_simpleitk(nibabel.Nifti1Image(volume, oblique()))
    SimpleITK.WriteImage(SimpleITK.JoinSeries([image, image]), tmp_path / f"4d{suffix}")
    with pytest.raises(InputError, match=r"has the shape \(7, 6, 5, 2\), a 3D volume .*Extract one volume of it first"):
        read_image(tmp_path / f"4d{suffix}")
    SimpleITK.WriteImage(image[:, :, :1], tmp_path / f"thin{suffix}")
    assert read_image(tmp_path / f"thin{suffix}").shape == (7, 6, 1)


@pytest.mark.parametrize("space", ["scanner-xyz", "3D-right-handed", "3D-left-handed"])
def test_a_space_that_does_not_tell_left_from_right_is_refused(space: str, volume: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "image.nrrd"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, oblique())), path)
    path.write_bytes(path.read_bytes().replace(b"space: left-posterior-superior", f"space: {space}".encode()))
    with pytest.raises(InputError, match="has no orientation"):
        read_image(path)


@pytest.mark.parametrize(("space", "axcodes"), [("RAS", "RAS"), ("left-anterior-superior", "LAS"), ("LPS", "LPS")])
def test_spaces_of_patients_are_read(space: str, axcodes: str, volume: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "image.nrrd"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume.T.copy()), path)
    path.write_bytes(path.read_bytes().replace(b"space: left-posterior-superior", f"space: {space}".encode()))
    assert "".join(nibabel.aff2axcodes(read_image(path).affine)) == axcodes


@pytest.mark.parametrize(("shape", "is_vector"), [((5, 6), False), ((4, 5, 6, 2), True)], ids=["2D", "vectors"])
def test_simpleitk_images_that_are_no_volume_of_scalars_are_refused(shape: tuple[int, ...], is_vector: bool) -> None:
    image = SimpleITK.GetImageFromArray(np.zeros(shape, np.float32), isVector=is_vector)
    with pytest.raises(InputError, match="one of 3 axes and 1 component is needed"):
        from_simpleitk(image)


@pytest.mark.parametrize("call", ["from_simpleitk(image)", pytest.param("segment(image)", marks=pytest.mark.long)])
def test_a_label_map_of_simpleitk_does_not_end_the_process(call: str) -> None:
    convert = "SimpleITK.LabelImageToLabelMap(SimpleITK.Image([4, 5, 6], SimpleITK.sitkUInt8))"
    code = f"import SimpleITK, monai_iunet; image = {convert}; monai_iunet.{call}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "InputError: a SimpleITK label map: an image is needed" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("unknown", ["none", "(nan,nan,nan)"])
@pytest.mark.parametrize("axis", [0, 2])
def test_an_axis_without_a_direction_is_refused(axis: int, unknown: str, volume: np.ndarray, tmp_path: Path) -> None:
    """SimpleITK would take its voxels for 1 mm long."""
    path = tmp_path / "image.nrrd"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, np.diag([-1.5, -2, 2.5, 1]))), path)
    content = path.read_bytes()
    vectors = [b"(1.5,0,0)", b"(0,2,0)", b"(0,0,2.5)"]
    assert b" ".join(vectors) in content
    vectors[axis] = unknown.encode()
    path.write_bytes(content.replace(b"(1.5,0,0) (0,2,0) (0,0,2.5)", b" ".join(vectors)))
    with pytest.raises(InputError, match="so an axis has none in space and no size of a voxel"):
        read_image(path)


@pytest.mark.parametrize("first", [True, False])
def test_a_list_of_one_volume_is_that_volume(first: bool, volume: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "image.nrrd"
    SimpleITK.WriteImage(to_simpleitk(nibabel.Nifti1Image(volume, np.diag([-1.5, -2, 2.5, 1]))), path)
    content = path.read_bytes().replace(b"dimension: 3\n", b"dimension: 4\n", 1)
    for of_list, of_volume in (
        (b"1", b"7 6 5"),
        (b"list", b"domain domain domain"),
        (b"none", b"(1.5,0,0) (0,2,0) (0,0,2.5)"),
    ):
        assert content.count(of_volume) == 1
        together = [of_list, of_volume] if first else [of_volume, of_list]
        content = content.replace(of_volume, b" ".join(together))
    path.write_bytes(content)
    image = read_image(path)
    np.testing.assert_allclose(image.get_fdata(), volume, rtol=1e-6)
    np.testing.assert_allclose(image.affine, np.diag([-1.5, -2, 2.5, 1]))
