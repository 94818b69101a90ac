"""DICOM: each slice or frame has its own geometry and rescaling; what is no volume is refused by its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.encaps import encapsulate, generate_frames

from monai_iunet.errors import InputError
from monai_iunet.io.dicom_series import list_series, series_files
from monai_iunet.io.read import read_image
from monai_iunet.segmentation.dicom_seg import write_dicom_seg
from monai_iunet.segmentation.result import Segmentation
from tests.io.dicom_files import AXIAL, UID, dataset, group, write_multiframe, write_slices

CORONAL = [1, 0, 0, 0, 0, -1]
HEIGHTS = [0, 2, 4, 6, 8, 10]


def stored(dtype: str = "int16", frames: int = 6, low: int = 0, high: int = 200) -> np.ndarray:
    """Values `(frames, rows, columns)`."""
    return np.random.default_rng(0).integers(low, high, (frames, 9, 8)).astype(dtype)


def expected(values: np.ndarray) -> np.ndarray:
    """The volume of frames, `(columns, rows, frames)`."""
    return values.transpose(2, 1, 0).astype(np.float32)


AFFINE = np.array([[-1.5, 0, 0, 10], [0, -1.25, 0, -20], [0, 0, 2, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 2, 1, 4, 3, 5], [5, 4, 3, 2, 1, 0]])
def test_frames_are_sorted_by_position(order: list[int], tmp_path: Path) -> None:
    values = stored()
    path = write_multiframe(tmp_path / "a.dcm", values[order], [HEIGHTS[index] for index in order])
    for source in (path, path.parent):
        image = read_image(source)
        np.testing.assert_array_equal(image.get_fdata(), expected(values))
        np.testing.assert_allclose(image.affine, AFFINE)


def test_each_frame_has_its_own_rescaling(tmp_path: Path) -> None:
    values, slopes, intercepts = stored(), [1, 2, 3, 0.5, 5, 1e-3], [0, -7, 100, 0.25, 1e4, 0]
    path = write_multiframe(tmp_path / "a.dcm", values, HEIGHTS, slopes, intercepts)
    wanted = values * np.array(slopes)[:, None, None] + np.array(intercepts)[:, None, None]
    np.testing.assert_allclose(read_image(path).get_fdata(), expected(wanted), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("slope", {"RescaleSlope": 100}),
        ("intercept", {"RescaleIntercept": 40000}),
        ("negative", {"RescaleIntercept": -70000}),
        ("fraction", {"RescaleSlope": 0.3, "RescaleIntercept": -0.7}),
    ],
)
def test_each_slice_has_its_own_rescaling(name: str, changes: dict[str, float], tmp_path: Path) -> None:
    values = stored().astype(np.float64)
    folder = write_slices(tmp_path / name, stored(), {3: changes})
    values[3] = values[3] * changes.get("RescaleSlope", 1) + changes.get("RescaleIntercept", 0)
    np.testing.assert_allclose(read_image(folder).get_fdata(), expected(values), rtol=1e-6)


def test_slices_may_differ_in_sign_and_bits(tmp_path: Path) -> None:
    signed, unsigned, narrow = stored(low=-200), stored("uint16", high=60000), stored("uint8")
    folder = write_slices(tmp_path / "mixed", [signed[0], unsigned[1], narrow[2], signed[3]])
    wanted = np.stack([signed[0], unsigned[1], narrow[2], signed[3]]).astype(np.float64)
    np.testing.assert_array_equal(read_image(folder).get_fdata(), expected(wanted))


def test_bits_above_those_stored_are_no_values(tmp_path: Path) -> None:
    values = stored("uint16", high=4096)
    dirty = values | 0xF000
    folder = write_slices(tmp_path / "dirty", dirty, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read_image(folder).get_fdata(), expected(values))


def test_values_that_begin_above_the_lowest_bit_are_not_read(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "old", stored("uint16", high=4096) << 4, BitsStored=12, HighBit=15)
    with pytest.raises(InputError, match="High Bit is 15, of 12 Bits Stored; 11 is needed"):
        read_image(folder)


@pytest.mark.parametrize("multiframe", [False, True])
def test_how_a_viewer_shows_values_does_not_change_them(multiframe: bool, tmp_path: Path) -> None:
    values = stored()
    if multiframe:
        path = write_multiframe(tmp_path / "a.dcm", values, HEIGHTS, PhotometricInterpretation="MONOCHROME1")
    else:
        path = write_slices(
            tmp_path / "a", values, PhotometricInterpretation="MONOCHROME1", WindowWidth=1, WindowCenter=0
        )
    np.testing.assert_array_equal(read_image(path).get_fdata(), expected(values))


def write_echoes(path: Path, times: list[float]) -> Path:
    """A multi-frame file whose frames have echo times of their own."""
    made = pydicom.dcmread(write_multiframe(path, stored(), HEIGHTS))
    for frame, time in zip(made.PerFrameFunctionalGroupsSequence, times):
        frame.MREchoSequence = group(EffectiveEchoTime=time)
    made.save_as(path)
    return path


def test_echo_times_may_differ_a_little(tmp_path: Path) -> None:
    read_image(write_echoes(tmp_path / "a.dcm", [4.598, 4.6, 4.602, 4.6, 4.6, 4.6]))
    read_image(write_slices(tmp_path / "b", stored(), {2: {"EchoTime": ""}}, EchoTime=4.6))


Write = Callable[[Path], Path]
REFUSED: dict[str, tuple[Write, str]] = {
    "gap": (lambda path: write_multiframe(path, stored(), [0, 2, 4, 10, 12, 14]), "6.00 mm between 4.0 and 10.0 mm"),
    "two phases": (lambda path: write_multiframe(path, stored(), [0, 2, 4] * 2), "3 slices lie where another one lies"),
    "two orientations": (
        lambda path: write_multiframe(path, stored(), HEIGHTS, orientations=[AXIAL] * 3 + [CORONAL] * 3),
        "several orientations.*frame 1.*frame 4",
    ),
    "shifted frame": (
        lambda path: write_slices(path.parent / "s", stored(), {2: {"ImagePositionPatient": [-10, 25, 4]}}),
        r"Image Position \(Patient\) lies 5.00 mm beside the line",
    ),
    "not at right angles": (
        lambda path: write_slices(path.parent / "s", stored(), ImageOrientationPatient=[1, 0, 0, 0.5, 0.5, 0]),
        "not made of two directions at right angles",
    ),
    "spacing": (
        lambda path: write_slices(path.parent / "s", stored(), {4: {"PixelSpacing": [1.25, 1.6]}}),
        r"differ in Pixel Spacing, \(1.25, 1.5\) in .*, \(1.25, 1.6\) in",
    ),
    "size": (
        lambda path: write_slices(path.parent / "s", [*stored()[:3], *stored()[3:, :8]]),
        r"differ in size \(Rows, Columns\), \(9, 8\) in .*, \(8, 8\) in",
    ),
    "modality": (
        lambda path: write_slices(path.parent / "s", stored(), {1: {"Modality": "PT"}}),
        "differ in Modality, CT in .*, PT in",
    ),
    "frame of reference": (
        lambda path: write_slices(path.parent / "s", stored(), {1: {"FrameOfReferenceUID": "1.2.3"}}),
        "differ in FrameOfReferenceUID",
    ),
    "rescale missing in one": (
        lambda path: write_slices(path.parent / "s", stored(), {1: {"RescaleSlope": None, "RescaleIntercept": None}}),
        "differ in Rescale Slope and Intercept, given in .*, missing in",
    ),
    "intercept missing in one": (
        lambda path: write_slices(path.parent / "s", stored(), {1: {"RescaleIntercept": None}}),
        "without a valid Rescale Slope and Intercept",
    ),
    "slope of zero": (
        lambda path: write_slices(path.parent / "s", stored(), {1: {"RescaleSlope": 0}}),
        "without a valid",
    ),
    "no position": (
        lambda path: write_slices(path.parent / "s", stored(), {1: {"ImagePositionPatient": None}}),
        "without a valid position",
    ),
    "no orientation": (
        lambda path: write_slices(path.parent / "s", stored(), ImageOrientationPatient=None),
        "without a valid orientation",
    ),
    "spacing of zero": (
        lambda path: write_slices(path.parent / "s", stored(), PixelSpacing=[0, 1]),
        "without a valid spacing",
    ),
    "color": (
        lambda path: write_slices(
            path.parent / "s", stored("uint8"), SamplesPerPixel=3, PhotometricInterpretation="RGB"
        ),
        "color images",
    ),
    "color of a palette": (
        lambda path: write_slices(path.parent / "s", stored(), PhotometricInterpretation="PALETTE COLOR"),
        "color images",
    ),
    "patient": (
        lambda path: write_slices(path.parent / "s", stored(), {1: {"PatientID": "other"}}, PatientID="one"),
        "differ in PatientID, one in .*, other in",
    ),
    "two echoes that alternate": (
        lambda path: write_slices(
            path.parent / "s", stored(), {index: {"EchoTime": 4.6} for index in (1, 3, 5)}, EchoTime=2.3
        ),
        "have the echo times in ms 2.3, 4.6,",
    ),
    "two echoes of each slice": (
        lambda path: write_slices(
            path.parent / "s",
            stored(),
            {n: {"EchoTime": 4, "ImagePositionPatient": [-10, 20, 2 * n - 6]} for n in (3, 4, 5)},
            EchoTime=2,
        ),
        "have the echo times in ms 2, 4,",
    ),
    **{
        f"{attribute} alternates": (
            lambda path, name=attribute, values=values: write_slices(
                path.parent / "s",
                stored(),
                {n: {name: values[1]} for n in (1, 3, 5)},
                **{"Modality": "MR", name: values[0]},
            ),
            message,
        )
        for attribute, values, message in (
            ("InversionTime", (700, 2500), "inversion times in ms 700, 2500"),
            ("DiffusionBValue", (0.0, 1000.0), "diffusion b-values 0, 1000"),
            ("KVP", (80, 140), "tube voltages in kV 80, 140"),
            ("ConvolutionKernel", ("B30", "B70"), "differ in ConvolutionKernel, B30 in .*, B70 in"),
            (
                "ImageType",
                (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
                "part of complex numbers, M in .*P in",
            ),
        )
    },
    "two echoes of frames": (lambda path: write_echoes(path, [2.3, 4.6] * 3), "have the echo times in ms 2.3, 4.6,"),
}
NO_GEOMETRY = {
    "secondary capture": "1.2.840.10008.5.1.4.1.1.7.3",
    "ultrasound": "1.2.840.10008.5.1.4.1.1.3.1",
    "angiography": "1.2.840.10008.5.1.4.1.1.12.1",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_is_refused(name: str, tmp_path: Path) -> None:
    write, message = REFUSED[name]
    path = write(tmp_path / "f" / "a.dcm")
    with pytest.raises(InputError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NO_GEOMETRY)
def test_frames_without_geometry_are_refused(name: str, tmp_path: Path) -> None:
    made = dataset(stored(), NO_GEOMETRY[name], FrameTime=33, PixelSpacing=[1, 1], ImagePositionPatient=[0, 0, 0])
    made.save_as(tmp_path / "a.dcm")
    with pytest.raises(InputError, match="6 frames without the geometry of each"):
        read_image(tmp_path / "a.dcm")


def test_a_position_of_the_file_is_not_that_of_its_frames(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "a.dcm", stored(), HEIGHTS, ImagePositionPatient=[0, 0, 0])
    made = pydicom.dcmread(path)
    del made.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    made.save_as(path)
    with pytest.raises(InputError, match=r"a\.dcm, frame 3: DICOM without a valid position"):
        read_image(path)


def test_frames_that_are_not_all_described_are_refused(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "a.dcm", stored(), HEIGHTS)
    made = pydicom.dcmread(path)
    made.NumberOfFrames = 5
    made.save_as(path)
    with pytest.raises(InputError, match=r"a\.dcm: Number of Frames is 5, but 6 frames are described"):
        read_image(path)


def test_a_tilted_gantry_is_resampled_to_right_angles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A ramp along each axis of the patient is the same ramp afterwards, wherever something was scanned."""
    shift, heights = 0.4, 2.0 * np.arange(12)
    rows, columns = np.meshgrid(np.arange(40), np.arange(30), indexing="ij")
    for axis in range(3):
        frames = []
        for height in heights:
            world = (-10 + 1.5 * columns, 20 + shift * height + 1.25 * rows, np.full(rows.shape, height))
            frames.append(np.round(100 + 10 * world[axis]).astype(np.int16))
        path = write_multiframe(tmp_path / f"{axis}.dcm", np.stack(frames), heights.tolist(), shift=shift)
        image = read_image(path)
        assert "tilted by 21.8 degrees" in caplog.text
        np.testing.assert_allclose(image.affine[:3, :3], np.diag([-1.5, -1.25, 2]), atol=1e-9)
        data = image.get_fdata()
        lps = np.diag([-1, -1, 1, 1]) @ image.affine
        world = nibabel.affines.apply_affine(lps, np.stack(np.meshgrid(*map(np.arange, data.shape), indexing="ij"), -1))
        inside = (world[..., 1] >= 20 + shift * world[..., 2]) & (
            world[..., 1] <= 20 + shift * world[..., 2] + 1.25 * 39
        )
        assert inside.sum() > 0.9 * np.stack(frames).size
        np.testing.assert_allclose(data[inside], 100 + 10 * world[inside][:, axis], atol=1.1)
        assert (data[~inside] <= data[inside].max()).all()


def test_a_small_tilt_is_rounding(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "a.dcm", stored(), HEIGHTS, shift=0.01)
    np.testing.assert_array_equal(read_image(path).get_fdata(), expected(stored()))


def test_a_small_tilt_of_many_slices_is_no_rounding(tmp_path: Path) -> None:
    """At 0.9 degrees the last of 101 slices lies 3 mm farther back than the first."""
    values, shift = np.zeros((101, 9, 8), np.int16), 0.0157
    values[-1, 4, 3] = 1000
    image = read_image(write_multiframe(tmp_path / "a.dcm", values, (2.0 * np.arange(101)).tolist(), shift=shift))
    data = image.get_fdata()
    center = np.argwhere(data > 0).T @ data[data > 0] / data.sum()
    lps = np.diag([-1, -1, 1, 1]) @ image.affine
    wanted = [-10 + 1.5 * 3, 20 + shift * 200 + 1.25 * 4, 200]
    np.testing.assert_allclose(nibabel.affines.apply_affine(lps, center), wanted, atol=0.05)


def test_a_whole_uid_is_not_the_beginning_of_another(tmp_path: Path) -> None:
    for number in ("1", "10", "11"):
        write_slices(tmp_path / number, stored(), SeriesInstanceUID=f"{UID}.{number}")
        for file in (tmp_path / number).iterdir():
            file.rename(tmp_path / f"{number}_{file.name}")
        (tmp_path / number).rmdir()
    assert len(list_series(tmp_path)) == 3
    assert read_image(tmp_path, f"{UID}.1").shape == (8, 9, 6)
    with pytest.raises(InputError, match="3 DICOM series, choose one"):
        read_image(tmp_path, UID)


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: not a folder"):
        list_series(tmp_path / "missing")


def test_slices_with_a_series_of_their_own_are_one_volume(tmp_path: Path) -> None:
    changed = {index: {"SeriesInstanceUID": f"{UID}.9.{index}"} for index in range(6)}
    folder = write_slices(tmp_path / "a", stored(), changed)
    np.testing.assert_array_equal(read_image(folder).get_fdata(), expected(stored()))
    changed[2]["ImagePositionPatient"] = [-10, 20, 2]
    changed[3]["StudyInstanceUID"] = "1.2.3"
    with pytest.raises(InputError, match="slices lie where another"):
        read_image(write_slices(tmp_path / "b", stored(), {**changed, 3: {"SeriesInstanceUID": f"{UID}.9.3"}}))
    with pytest.raises(InputError, match="6 DICOM series, choose one"):
        read_image(write_slices(tmp_path / "c", stored(), changed))


def test_a_link_to_a_slice_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "series", list(stored()))
    ends = max(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    away = ends.rename(tmp_path / ends.name)
    ends.symlink_to(away)
    assert read_image(folder).shape[2] == 6
    away.unlink()
    with pytest.raises(InputError, match=f"{ends.name}: a link to a file that is not there"):
        read_image(folder)


def test_files_that_have_become_empty_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_slices(tmp_path / "series", list(stored()))
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"IM{number:04}")  # by names without a suffix nobody knows them for DICOM
    ends = max(folder.iterdir(), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))
    ends.write_bytes(b"")
    assert read_image(folder).shape[2] == 5
    assert f"1 empty files, such as {ends.name}, are left out" in caplog.text


def test_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored())
    (folder / "notes.txt").write_text("no image")
    (folder / "._000.dcm").write_bytes(b"no image")
    (folder / "more").mkdir()
    report = dataset(stored()[0], "1.2.840.10008.5.1.4.1.1.88.11", Rows=None, Columns=None, PixelData=None)
    report.save_as(folder / "report.dcm")
    np.testing.assert_array_equal(read_image(folder).get_fdata(), expected(stored()))


@pytest.mark.parametrize("content", [b"", b"not DICOM", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 50])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored())
    (folder / "000.dcm").write_bytes(content)
    for path in (folder, folder / "000.dcm"):
        with pytest.raises(InputError, match=r"000\.dcm"):
            read_image(path)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"])
def test_compressed_pixels_are_read(syntax: str, tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored())
    for file in folder.iterdir():
        made = pydicom.dcmread(file)
        if syntax == "1.2.840.10008.1.2.5":
            made.compress(pydicom.uid.RLELossless)
        else:
            made.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        made.save_as(file)
    np.testing.assert_array_equal(read_image(folder).get_fdata(), expected(stored()))


def test_what_pydicom_cannot_decode_simpleitk_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_iunet.io import dicom_frames
    from monai_iunet.io.dicom_series import read_dicom

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no decoder")

    monkeypatch.setattr(dicom_frames, "pixel_array", fail)
    folder = write_slices(tmp_path / "a", stored(), {2: {"RescaleSlope": 3}}, RescaleIntercept=-1000)
    values = stored().astype(np.float64)
    values[2] *= 3
    np.testing.assert_array_equal(read_dicom(folder).get_fdata(), expected(values - 1000))
    path = write_multiframe(tmp_path / "a.dcm", stored(), HEIGHTS, slopes=[1, 2, 3, 4, 5, 6])
    with pytest.raises(InputError, match="cannot be decoded"):
        read_dicom(path)
    inverted = write_slices(tmp_path / "b", stored(), PhotometricInterpretation="MONOCHROME1")
    with pytest.raises(InputError, match="cannot be decoded"):
        read_dicom(inverted)
    secondary = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.3", "Modality": "CT"}
    path = write_multiframe(tmp_path / "c.dcm", stored("uint16"), HEIGHTS, intercepts=[-1000] * 6, **secondary)
    with pytest.raises(InputError, match="cannot be decoded"):  # SimpleITK would leave the rescale out
        read_dicom(path)


@pytest.mark.parametrize("orientations", [None, 6 * [AXIAL]])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 1, 2, 0, 5, 4]])
def test_labels_of_frames_lie_over_their_frames(
    order: list[int], orientations: list[list[int]] | None, tmp_path: Path
) -> None:
    values = stored(high=1000)
    patient = {"PatientID": "made-up", "PatientName": "Made^Up", "StudyDate": "20200101", "StudyTime": "120000"}
    heights = [HEIGHTS[index] for index in order]
    path = write_multiframe(
        tmp_path / "a.dcm", values[order], heights, orientations=orientations, InstanceNumber=1, **patient
    )
    image = read_image(path)
    labels = (image.get_fdata() > 500).astype(np.uint8)
    write_dicom_seg([str(path)], Segmentation(image, labels, {1: "liver"}), tmp_path / "seg.dcm")
    written = SimpleITK.ReadImage(tmp_path / "seg.dcm")
    import highdicom

    volume = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    points = np.argwhere(volume.array > 0)
    lps = np.array([volume.map_indices_to_reference(point[None])[0] for point in points])
    ours = nibabel.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ image.affine, np.argwhere(labels))
    assert written.GetSize()[:2] == (8, 9)
    np.testing.assert_allclose(sorted(map(tuple, lps.round(3))), sorted(map(tuple, ours.round(3))))


@pytest.mark.parametrize(
    ("character_set", "patient"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
    ],
)
def test_structures_and_patients_keep_names_of_any_script(character_set: Any, patient: str, tmp_path: Path) -> None:
    folder = write_slices(
        tmp_path / "a", stored(), SpecificCharacterSet=character_set, PatientName=patient, PatientID="made-up"
    )
    image = read_image(folder)
    found = Segmentation(image, np.ones(image.shape, np.uint8), {1: "肝臓", 2: "Tumör"})
    write_dicom_seg(series_files(folder), found, tmp_path / "seg.dcm")
    written = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [segment.SegmentLabel for segment in written.SegmentSequence] == ["肝臓", "Tumör"]
    assert written.SpecificCharacterSet == "ISO_IR 192"
    assert str(written.PatientName) == patient


def test_labels_lie_over_their_slices_in_whatever_order_files_are_named(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored(high=1000), PatientID="made-up")
    image = read_image(folder)
    labels = np.zeros(image.shape, np.uint8)
    labels[:, :, 1] = 1
    found = Segmentation(image, labels, {1: "liver"})
    for name, files in {"in order": series_files(folder), "by name": sorted(map(str, folder.iterdir()))}.items():
        write_dicom_seg(files, found, tmp_path / f"{name}.dcm")
        (frame,) = pydicom.dcmread(tmp_path / f"{name}.dcm").PerFrameFunctionalGroupsSequence
        assert frame.PlanePositionSequence[0].ImagePositionPatient[2] == 2, name


@pytest.mark.parametrize("turned", ["flipped", "moved", "cut"])
def test_labels_on_another_grid_are_no_dicom_seg(turned: str, tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored(), PatientID="made-up")
    image = read_image(folder)
    others = {
        "flipped": nibabel.as_closest_canonical(image),
        "moved": nibabel.Nifti1Image(image.dataobj, nibabel.affines.from_matvec(np.eye(3), [3, 0, 0]) @ image.affine),
        "cut": image.slicer[:, :, :5],
    }
    found = Segmentation(others[turned], np.zeros(others[turned].shape, np.uint8), {1: "liver"})
    with pytest.raises(InputError, match="not on the grid of the series"):
        write_dicom_seg(series_files(folder), found, tmp_path / "seg.dcm")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({1: "liver\\tumor"}, "without backslash"),
        ({1: "liver\ntumor"}, "end of a line"),
        ({1: "a" * 65}, "1 to 64 characters"),
        ({1: " "}, "1 to 64 characters"),
        ({1: "liver", 3: "tumor"}, "must be 1, 2"),
    ],
)
def test_names_that_dicom_does_not_allow_are_refused(names: dict[int, str], message: str, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((8, 9, 6), np.float32), AFFINE)
    found = Segmentation(image, np.zeros(image.shape, np.uint8), names)
    with pytest.raises(InputError, match=message):
        write_dicom_seg(["a.dcm"], found, tmp_path / "seg.dcm")


def test_a_folder_is_no_list_of_its_files(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "series", stored())
    image = read_image(folder)
    segmentation = Segmentation(image, np.ones(image.shape, np.uint8), {1: "liver"})
    wrong: Any
    for wrong in (folder, str(folder), []):
        with pytest.raises(InputError, match=r"the files of a series are needed, as series_files\(folder\) returns"):
            write_dicom_seg(wrong, segmentation, tmp_path / "labels.dcm")
    write_dicom_seg(series_files(folder), segmentation, tmp_path / "labels.dcm")


def test_labels_of_a_tilted_gantry_are_no_dicom_seg(tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "a.dcm", stored(), HEIGHTS, shift=0.4)
    image = read_image(path)
    with pytest.raises(InputError, match="gantry was tilted"):
        write_dicom_seg(
            [str(path)], Segmentation(image, np.zeros(image.shape, np.uint8), {1: "liver"}), tmp_path / "s.dcm"
        )


@pytest.mark.parametrize("length", [150, 300, 450, 600, 700, 780])
def test_a_truncated_slice_is_not_left_out(length: int, tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored())
    last = sorted(folder.iterdir())[-1]
    content = last.read_bytes()
    assert len(content) > 780
    last.write_bytes(content[:length])
    with pytest.raises(InputError, match=last.name):
        read_image(folder)


@pytest.mark.parametrize("syntax", ["native", "RLE"])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.97])
def test_pixels_that_end_too_early_are_not_made_up(left: float, syntax: str, tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored())
    path = sorted(folder.iterdir())[2]
    slice_ = pydicom.dcmread(path)
    if syntax == "native":
        slice_.PixelData = slice_.PixelData[: int(left * len(slice_.PixelData)) // 2 * 2]
    else:
        slice_.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
        frame = next(generate_frames(slice_.PixelData, number_of_frames=1))
        slice_.PixelData = encapsulate([frame[: 64 + int(left * (len(frame) - 64)) // 2 * 2]])
    slice_.save_as(path)
    with pytest.raises(InputError, match=rf"{path.name}: its pixels cannot be decoded"):
        read_image(folder)


def test_a_ct_without_a_rescale_says_what_its_values_are_taken_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_slices(tmp_path / "a", stored(), RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_array_equal(read_image(folder).get_fdata(), expected(stored()))
    assert "its values are taken for Hounsfield units" in caplog.text


@pytest.mark.parametrize(("kind", "is_said"), [("Z_EFF", True), ("HU", False), ("US", False), (None, False)])
def test_a_ct_of_other_values_than_hounsfield_units_is_said(
    kind: str | None, is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the maps of a spectral CT are."""
    read_image(write_slices(tmp_path / "a", stored(), RescaleType=kind))
    assert ("values are Z_EFF by its Rescale Type, not Hounsfield units" in caplog.text) == is_said
    caplog.clear()
    if kind == "Z_EFF":
        path = write_multiframe(tmp_path / "b.dcm", stored(), HEIGHTS, Modality="CT")
        frames = pydicom.dcmread(path)
        for frame in frames.PerFrameFunctionalGroupsSequence:
            frame.PixelValueTransformationSequence[0].RescaleType = kind
        frames.save_as(path)
        read_image(path)
        assert "values are Z_EFF" in caplog.text


def test_a_folder_of_other_images_is_told_from_one_of_a_series(tmp_path: Path) -> None:
    (tmp_path / "b.nii.gz").touch()
    with pytest.raises(InputError, match=r"no DICOM series .* Name the images in it, such as .*b\.nii\.gz"):
        read_image(tmp_path)


def test_two_scouts_are_no_volume(tmp_path: Path) -> None:
    changed = {index: {"SeriesInstanceUID": f"{UID}.9.{index}"} for index in range(2)}
    with pytest.raises(InputError, match="2 DICOM series, choose one"):
        read_image(write_slices(tmp_path / "a", stored()[:2], changed))


@pytest.mark.parametrize("attribute", ["Rows", "PixelSpacing", "BitsAllocated", "PixelRepresentation"])
def test_an_attribute_without_a_value_is_a_damaged_file(attribute: str, tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored())
    for file in folder.iterdir():
        made = pydicom.dcmread(file)
        setattr(made, attribute, None)
        made.save_as(file)
    with pytest.raises(InputError) as caught:
        read_image(folder)
    assert "\n" not in str(caught.value)


def test_slices_whose_number_of_frames_is_empty_are_single(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored(), NumberOfFrames=None)
    np.testing.assert_array_equal(read_image(folder).get_fdata(), expected(stored()))


def test_values_that_may_be_signed_or_not_are_not_read(tmp_path: Path) -> None:
    folder = write_slices(tmp_path / "a", stored())
    for file in folder.iterdir():
        made = pydicom.dcmread(file)
        del made.PixelRepresentation
        made.save_as(file)
    with pytest.raises(InputError, match="without a valid Pixel Representation"):
        read_image(folder)
