"""The notebooks run from a fresh kernel, and what is committed of their outputs is clean and small."""

from __future__ import annotations

import locale
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import nibabel
import numpy as np
import pytest
import SimpleITK

from monai_iunet import bundle_facts, bundle_folder, read_image, to_simpleitk
from tests.helpers import GLOO_AVERAGES
from tests.notebooks import NOTEBOOKS, execute

# What makes each run in seconds.
SMALL: dict[str, dict[str, Any]] = {
    "01_invertible_unet_first_steps": {"steps": 40, "batch_size": 8},
    "02_segment_mri": {"resolution": 2},
    "03_segment_ct": {"phantom_spacing": 5.0},
    "04_train_your_own": {"cases": 4, "shape": (20, 24), "folds": 2, "time": "4s"},
    "05_memory": {
        "depths": (2, 4),
        "gpu_memory": "6 GiB",
        "patch_multiple": 64,
        "patch_networks": ("SegIUNet", "UNet"),
        "precision_depths": (1, 4),
    },
    "06_scale_out": {"max_epochs": 2, "cases": 4},
    "07_whole_images": {},
}
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that is printed in the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.long
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_from_a_fresh_kernel(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADNECK_CT", raising=False)
    notebook = execute(path, SMALL[path.stem])
    assert pictures(notebook) == pictures(nbformat.read(path, as_version=4))
    if path.stem.startswith("06"):
        assert texts(notebook).count("exit code 0") == 2
        assert "exit code -9" in texts(notebook)
        whole, sharded = re.findall(r"^(?:whole|sharded) +([\d. ]+?)  ", texts(notebook), flags=re.MULTILINE)
        assert whole == sharded or not GLOO_AVERAGES


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_in_full(path: Path) -> None:
    assert pictures(execute(path)) > 0


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_committed_is_executed_clean_and_small(path: Path) -> None:
    assert path.stem in SMALL
    assert path.stat().st_size < 2 * 2**20
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not re.search(r"(^|[\s'\"=:(])/(tmp|home|root|usr|work|mnt|opt|Users|var)\b", texts(notebook))
    assert "Warning" not in texts(notebook)
    assert pictures(notebook) > 0


def test_what_is_committed_is_what_the_bundle_says() -> None:
    committed = texts(nbformat.read(NOTEBOOKS / "02_segment_mri.ipynb", as_version=4))
    for name, value in bundle_facts(bundle_folder("hippocampus")).items():
        assert f"{name:<13}{value}\n" in committed


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_begins_as_those_of_monai(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert "Licensed under the Apache License, Version 2.0" in notebook.cells[0].source
    headings = [line for cell in notebook.cells[1:] for line in cell.source.splitlines() if line.startswith("## ")]
    assert headings[:2] == ["## Setup environment", "## Setup imports"]
    assert "print_config()" in notebook.cells[5].source
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1


def test_there_are_seven() -> None:
    assert [path.stem for path in PATHS] == list(SMALL)


def cell(name: str, beginning: str) -> str:
    """The code of the cell that a line begins in, from there on."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    sources = (f"\n{cell.source}" for cell in notebook.cells if cell.cell_type == "code")
    (source,) = (source for source in sources if f"\n{beginning}" in source)
    return str(source[source.index(f"\n{beginning}") + 1 :])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("degrees", [0, 12])
def test_a_ct_of_ones_own_is_written_as_a_series_that_lies_where_it_lies(degrees: float, tmp_path: Path) -> None:
    names = {"Path": Path, "nibabel": nibabel, "np": np, "SimpleITK": SimpleITK, "locale": locale}
    names["to_simpleitk"] = to_simpleitk
    exec(cell("03_segment_ct", "def write_series").partition("\nif ct is None")[0], names)
    turn = nibabel.eulerangles.euler2mat(*np.radians([degrees, degrees, -degrees]))
    affine = nibabel.affines.from_matvec(turn @ np.diag([-2, -2, 3]), [40, 30, -20])
    voxels = np.random.default_rng(0).normal(0, 100, (12, 10, 8)).round().astype(np.float32)
    read = read_image(names["write_series"](nibabel.Nifti1Image(voxels, affine), tmp_path / "ct"))  # type: ignore[operator]
    np.testing.assert_allclose(read.affine, affine, atol=1e-3)
    np.testing.assert_array_equal(read.get_fdata(), voxels)


@pytest.mark.parametrize("region", [None, np.eye(4)])
def test_a_head_of_ones_own_is_drawn_with_the_structures_of_both_sides(region: Any) -> None:
    drawn: list[Any] = []
    own, crop, head = object(), {1: "anterior"}, {1: "left anterior", 2: "right anterior"}
    names = {
        "read_image": lambda path: own,
        "own_image": "a.nii.gz",
        "plt": SimpleNamespace(figure=lambda **options: None, show=lambda: None),
        "segmenter": SimpleNamespace(labels=crop, locate=lambda image, name: region),
        "found": SimpleNamespace(names=head),
        "values": np.ones(3),
        "draw_overlay": lambda figure, *arguments, **options: drawn.append(arguments),
    }
    exec(cell("02_segment_mri", "own = read_image"), names)
    assert drawn[0][2] is (crop if region is None else head)


def test_what_is_kept_with_the_package_is_not_replaced_by_arms_of_ones_own(tmp_path: Path) -> None:
    kept, shown = tmp_path / "kept", []
    names = {
        **{"kept": kept, "arms_dir": str(tmp_path), "dataset_dir": "data", "shown": [], "Path": Path},
        "plt": SimpleNamespace(
            figure=lambda **options: SimpleNamespace(savefig=lambda path, dpi: Path(path).write_bytes(b"")),
            close=lambda figure: None,
        ),
        **{"BundleSegmenter": lambda folder: None, "Image": lambda path: path, "display": shown.append},
    }
    exec(cell("07_whole_images", "picture = kept"), names)
    assert shown == [tmp_path / "cases.png"]
    assert not kept.exists()


def test_a_training_that_was_killed_and_resumed_begins_anew_when_its_cell_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "last.pt").touch()
    names = {"workspace": tmp_path, "shutil": shutil, "max_epochs": 2, "command": lambda *config, **options: []}
    exec(cell("06_scale_out", 'shutil.rmtree(workspace / "one"').partition("\ntraining = ")[0], names)
    assert not list(tmp_path.iterdir())
