"""Image files that are damaged in every way we could think of, and a process that segments them.

`python -m tests.io.damaged_images FOLDER FIRST LAST` makes images number FIRST to LAST - 1, segments them with the code
of the command and with the bundle's, and prints a line of JSON for each: what was done to the file, and the outcome.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from monai.bundle import ConfigParser

from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.io.geometry import to_simpleitk
from monai_iunet.segmentation.files import Settings, segment_files
from monai_iunet.segmentation.segmenter import BundleSegmenter
from tests.io.dicom_files import write_series

SECONDS = 120  # for one image
MEMORY = 3 * 2**30  # that one image may take beyond what is taken before
NUMBERS = (0.0, -0.0, -1.0, 1e-30, 1e-4, 1e3, 1e9, 1e30, -1e30, float("nan"), float("inf"), float("-inf"))
# Where the fields of a NIfTI header lie, and how they are packed (nifti1.h).
NIFTI_FIELDS = {
    "sizeof_hdr": (0, "i"),
    "dim": (40, "8h"),
    "intent_code": (68, "h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "slice_start": (74, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"),
    "cal_max": (124, "f"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern": (256, "3f"),
    "qoffset": (268, "3f"),
    "srow": (280, "12f"),
    "magic": (344, "4B"),
    "extension": (348, "4B"),
}
HEADER_LINES = {
    ".nrrd": {
        "type": ("int8", "double", "block", "nothing"),
        "dimension": ("0", "2", "4", "17", "-3"),
        "sizes": ("0 0 0", "-4 32 24", "100000 100000 100000", "29 32 24", "28 32", "4294967296 2 2"),
        "space directions": ("(0,0,0) (0,0,0) (0,0,0)", "none none none", "(nan,0,0) (0,1,0) (0,0,1)", "(1e9,0,0)"),
        "space": ("scanner-xyz", "nowhere", "right-anterior"),
        "encoding": ("raw", "gzip", "hex", "magic"),
        "endian": ("big", "middle"),
        "space origin": ("(nan,nan,nan)", "(1e300,0,0)", "()"),
    },
    ".mha": {
        "NDims": ("0", "2", "9", "-1"),
        "DimSize": ("0 0 0", "-28 32 24", "100000 100000 100000", "28 32 25", "28"),
        "ElementType": ("MET_DOUBLE", "MET_CHAR", "MET_NOTHING"),
        "ElementSpacing": ("0 0 0", "-1 1 1", "1e30 1 1", "nan 1 1", "500 500 500"),
        "TransformMatrix": ("0 0 0 0 0 0 0 0 0", "1 0 0 1 0 0 1 0 0", "1 0"),
        "CompressedData": ("False", "True"),
        "CompressedDataSize": ("1", "99999999999", "-5"),
        "ElementNumberOfChannels": ("0", "3", "1000000000"),
        "ElementDataFile": ("gone.raw", "/dev/zero", "LIST"),
        "HeaderSize": ("-1", "1000000000"),
    },
}


@cache
def sound_image() -> nibabel.Nifti1Image:
    """What the files show before they are damaged."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (28, 32, 24)), indexing="ij"))
    data = 300 * np.exp(-3 * (grid**2).sum(0)) + np.random.default_rng(0).normal(0, 20, grid.shape[1:])
    image = nibabel.Nifti1Image(data.astype(np.int16), np.diag([-1.0, -1.0, 1.2, 1.0]))
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    return image


def flip_bits(data: bytes, rng: np.random.Generator, first: int = 0, last: int | None = None) -> bytes:
    values = np.frombuffer(data, np.uint8).copy()
    for place in rng.integers(first, min(last or len(values), len(values)), rng.integers(1, 9)):
        values[place] ^= 1 << rng.integers(8)
    return values.tobytes()


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def set_fields(data: bytes, rng: np.random.Generator, name: str | None = None) -> bytes:
    """Other numbers in one or two fields of a NIfTI header."""
    changed = bytearray(data)
    for field in [name] if name else rng.choice(list(NIFTI_FIELDS), rng.integers(1, 3), replace=False):
        offset, kind = NIFTI_FIELDS[field]
        values = list(struct.unpack_from(f"<{kind}", data, offset))
        for index in rng.integers(len(values), size=rng.integers(1, len(values) + 1)):
            if kind[-1] == "f":
                values[index] = float(rng.choice(NUMBERS)) if rng.random() < 0.7 else float(rng.normal(0, 100))
            elif kind[-1] == "B":
                values[index] = int(rng.integers(256))
            else:
                values[index] = int(rng.choice([0, 1, -1, 2, 3, 7, 16, 64, 128, 512, 1024, 4096, 32767, -32768]))
        with contextlib.suppress(struct.error, OverflowError):
            struct.pack_into(f"<{kind}", changed, offset, *values)
    return bytes(changed)


def nifti(damage: Callable[[bytes, np.random.Generator], bytes], zipped: bool) -> Callable[..., Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        data = damage(sound_image().to_bytes(), rng)
        path = folder / f"image.nii{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(data, 1) if zipped else data)
        return path

    return make


def zipped_and_then(damage: Callable[[bytes, np.random.Generator], bytes]) -> Callable[..., Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        path = folder / "image.nii.gz"
        path.write_bytes(damage(gzip.compress(sound_image().to_bytes(), 1), rng))
        return path

    return make


def other_format(suffix: str, damage: Callable[[bytes, np.random.Generator], bytes]) -> Callable[..., Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        path = folder / f"image{suffix}"
        SimpleITK.WriteImage(to_simpleitk(sound_image()), path, useCompression=bool(rng.integers(2)))
        path.write_bytes(damage(path.read_bytes(), rng))
        return path

    return make


def set_lines(suffix: str) -> Callable[[bytes, np.random.Generator], bytes]:
    """Another value in a line of a text header."""
    lies = HEADER_LINES[suffix]

    def damage(data: bytes, rng: np.random.Generator) -> bytes:
        name = rng.choice(list(lies))
        lines = data.split(b"\n")
        for index, line in enumerate(lines[:20]):
            if line.startswith(name.encode()):
                between = b": " if suffix == ".nrrd" else b" = "
                lines[index] = name.encode() + between + str(rng.choice(lies[name])).encode()
        return b"\n".join(lines)

    return damage


def dicom(damage: Callable[[bytes, np.random.Generator], bytes]) -> Callable[..., Path]:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        volume = np.asarray(sound_image().dataobj)[..., :6]
        series = write_series(folder / "series", volume, spacing=(1.0, 1.0, 1.2), modality="MR")
        slices = sorted(series.iterdir())
        for path in rng.choice(slices, rng.integers(1, 3), replace=False):
            Path(path).write_bytes(damage(Path(path).read_bytes(), rng))
        return series

    return make


def anything(folder: Path, rng: np.random.Generator) -> Path:
    """A file that was never an image."""
    path = folder / f"image{rng.choice(['.nii', '.nii.gz', '.nrrd', '.mha', '.dcm'])}"
    path.write_bytes(rng.choice([b"", rng.bytes(rng.integers(1, 5000)), b"Not found\n", b"\0" * 4000]))
    return path


def of_numbers(folder: Path, rng: np.random.Generator) -> Path:
    """Voxels that are no intensities."""
    data = sound_image().get_fdata(dtype=np.float32).copy()
    data.reshape(-1)[rng.integers(data.size, size=rng.integers(1, 50))] = rng.choice(NUMBERS)
    nibabel.save(nibabel.Nifti1Image(data, sound_image().affine), folder / "image.nii.gz")
    return folder / "image.nii.gz"


def other_qform(folder: Path, rng: np.random.Generator, matrix: np.ndarray | None = None) -> Path:
    """A qform that contradicts the sform."""
    if matrix is None:
        matrix = np.diag([*rng.choice([(-1, 1, 1.2), (1, -1, 1.2), (-1, -1, 2.5), (-3, -1, 1.2)]), 1.0])
    image = nibabel.Nifti1Image(np.asarray(sound_image().dataobj), sound_image().affine)
    image.set_sform(sound_image().affine, 1)
    image.set_qform(matrix, int(rng.integers(1, 5)))
    nibabel.save(image, folder / "image.nii.gz")
    return folder / "image.nii.gz"


def registered(folder: Path, rng: np.random.Generator) -> Path:
    """A qform some degrees and millimeters from the sform, which counts: the image was registered to another one."""
    angle = rng.uniform(-0.2, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return other_qform(
        folder, rng, nibabel.affines.from_matvec(turn @ sound_image().affine[:3, :3], rng.normal(size=3))
    )


def other_remarks(folder: Path, rng: np.random.Generator) -> Path:
    """Nonsense in fields that mean nothing here."""
    data = bytearray(sound_image().to_bytes())
    data[148:252] = rng.bytes(104)  # descrip, aux_file
    data[328:344] = rng.bytes(16)  # intent_name
    (folder / "image.nii").write_bytes(bytes(data))
    return folder / "image.nii"


DAMAGES: dict[str, Callable[[Path, np.random.Generator], Path]] = {
    "bits of a NIfTI header": nifti(lambda data, rng: flip_bits(data, rng, 0, 352), zipped=False),
    "bits of a zipped NIfTI header": nifti(lambda data, rng: flip_bits(data, rng, 0, 352), zipped=True),
    "bits of NIfTI voxels": nifti(lambda data, rng: flip_bits(data, rng, 352), zipped=False),
    "bits of a gzip file": zipped_and_then(flip_bits),
    "NIfTI cut": nifti(cut, zipped=False),
    "gzip file cut": zipped_and_then(cut),
    "fields of a NIfTI header": nifti(set_fields, zipped=True),
    "shape of a NIfTI header": nifti(lambda data, rng: set_fields(data, rng, "dim"), zipped=True),
    "type of a NIfTI header": nifti(lambda data, rng: set_fields(data, rng, "datatype"), zipped=False),
    "offset of a NIfTI header": nifti(lambda data, rng: set_fields(data, rng, "vox_offset"), zipped=True),
    "spacing of a NIfTI header": nifti(lambda data, rng: set_fields(data, rng, "pixdim"), zipped=True),
    "affine of a NIfTI header": nifti(lambda data, rng: set_fields(data, rng, "srow"), zipped=True),
    "scaling of a NIfTI header": nifti(lambda data, rng: set_fields(data, rng, "scl_slope"), zipped=True),
    "qform against sform": other_qform,
    "qform beside sform": registered,
    "remarks of a NIfTI header": other_remarks,
    "bits of NRRD": other_format(".nrrd", flip_bits),
    "NRRD cut": other_format(".nrrd", cut),
    "lines of an NRRD header": other_format(".nrrd", set_lines(".nrrd")),
    "bits of MetaImage": other_format(".mha", flip_bits),
    "MetaImage cut": other_format(".mha", cut),
    "lines of a MetaImage header": other_format(".mha", set_lines(".mha")),
    "bits of DICOM": dicom(lambda data, rng: flip_bits(data, rng, 0, 1500)),
    "DICOM cut": dicom(cut),
    "numbers": of_numbers,
    "anything": anything,
}
HARMLESS = ("qform beside sform", "remarks of a NIfTI header")
REFUSED = ("qform against sform",)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def attempt(run: Callable[[], Any], output: Path) -> dict[str, Any]:
    """What comes of it: a result, a refusal, or a failure of ours."""
    signal.alarm(SECONDS)
    try:
        run()
    except BaseException as error:
        left = files_in(output)
        # MONAI wraps what is raised while a config is evaluated.
        reason = error.__cause__ if type(error) is RuntimeError else error
        while reason is not None and type(reason) is RuntimeError:
            reason = reason.__cause__
        if isinstance(reason, InputError):
            return {"outcome": "partial" if left else "refused", "message": str(reason), "files": left}
        return {"outcome": "failed", "message": f"{type(error).__name__}: {error}"[:500]}
    finally:
        signal.alarm(0)
    return {"outcome": "result", "files": files_in(output)}


def segment(path: Path, output: Path, segmenter: BundleSegmenter) -> dict[str, Any]:
    settings = Settings(overlay=False, fail_fast=True)
    return attempt(lambda: list(segment_files([path], segmenter, output, settings)), output)


def run_bundle(path: Path, output: Path, segmenter: BundleSegmenter) -> dict[str, Any]:
    """What `python -m monai.bundle run` does with `inference.json`."""

    def run() -> None:
        parser = ConfigParser()
        parser.read_config(segmenter.folder / "configs" / "inference.json")
        parser.update({"bundle_root": str(segmenter.folder), "dataset_dir": str(path), "output_dir": str(output)})
        parser["network"] = segmenter.network
        parser["device"] = "cpu"
        parser["handlers"] = []
        parser.get_parsed_content("run")

    return attempt(run, output)


def tell(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def work(folder: Path, first: int, last: int) -> None:
    warnings.simplefilter("ignore")
    segmenter = BundleSegmenter(bundle_folder("hippocampus"), "cpu")
    reference = segmenter.segment_crop(sound_image())[0]
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    for index in range(first, last):
        rng = np.random.default_rng(index)
        kind = list(DAMAGES)[index % len(DAMAGES)]
        place = folder / str(index)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        path = DAMAGES[kind](place, rng)
        tell({"begun": index, "kind": kind})
        found: dict[str, Any] = {"index": index, "kind": kind}
        found["segment"] = segment(path, place / "segmented", segmenter)
        found["bundle"] = run_bundle(path, place / "bundle", segmenter)
        found["wrong"] = what_is_wrong(found, path, reference)
        before, taken = taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if taken > before + MEMORY:
            found["wrong"].append("memory")
        tell(found)
        if not found["wrong"]:
            shutil.rmtree(place)


def what_is_wrong(found: dict[str, Any], path: Path, reference: np.ndarray) -> list[str]:
    wrong = []
    for way in ("segment", "bundle"):
        came = found[way]
        if came["outcome"] not in ("refused", "result"):
            wrong.append(f"{way}: {came['outcome']} {came.get('message')}")
        elif came["outcome"] == "refused" and (path.name not in came["message"] or "Error" in came["message"][:20]):
            wrong.append(f"{way}: unclear message: {came['message']}")
        elif came["outcome"] == "result" and len(came["files"]) != 1:
            wrong.append(f"{way}: files {came['files']}")
    results = [
        nibabel.load(path.parent / place / found[way]["files"][0])
        for way, place in (("segment", "segmented"), ("bundle", "bundle"))
        if found[way]["outcome"] == "result" and not wrong
    ]
    for result in results:
        labels = np.asarray(result.dataobj)
        if found["kind"] in HARMLESS and not np.array_equal(labels, reference):
            wrong.append("another result than that of the sound image")
        if path.name.endswith((".nii", ".nii.gz")):
            image = nibabel.load(path)
            if labels.shape != image.shape or not np.allclose(result.affine, image.affine):
                wrong.append("another geometry than the image's")
    if len(results) == 2 and not np.array_equal(results[0].dataobj, results[1].dataobj):
        wrong.append("the command and the bundle disagree")
    if found["kind"] in HARMLESS and len(results) < 2 and not wrong:
        wrong.append("a sound image was refused")
    if found["kind"] in REFUSED and results:
        wrong.append("a doubtful image was segmented")
    return wrong


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
