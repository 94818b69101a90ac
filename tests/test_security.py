"""What strangers' files can do here: nothing but fail, unless a person was told."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from monai_iunet import SegIUNet
from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.io.weights import read_weights
from monai_iunet.segmentation.segmenter import BundleSegmenter
from monai_iunet.training.cases import images_to_segment
from monai_iunet.training.fine_tuning import start_from
from tests.bundles.helpers import command
from tests.bundles.made_data import HIPPOCAMPUS, make_hippocampus_data
from tests.io.dicom_files import write_series
from tests.test_cli import call, save
from tests.training.test_checkpoints import training

PACKAGE = Path(__file__).parents[1] / "monai_iunet"


class Intruder:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HIPPOCAMPUS, tmp_path / "a_bundle", ignore=shutil.ignore_patterns("train", "docs")))


def test_weights_that_run_code_are_refused_unrun(bundle: Path, tmp_path: Path) -> None:
    mark, weights = tmp_path / "mark", bundle / "models" / "model.pt"
    torch.save({"a": torch.zeros(1), "b": Intruder(mark)}, weights)
    with pytest.raises(InputError, match="not the weights"):
        BundleSegmenter(bundle, "cpu")
    with pytest.raises(InputError, match="not the weights"):
        start_from(weights, SegIUNet(2, 1, 2, (4, 8)))
    shutil.copy(weights, tmp_path / "last.pt")
    with pytest.raises(InputError, match="not a state of this training"):
        training(tmp_path, resume=True)
    images = make_hippocampus_data(tmp_path / "data", training=1) / "imagesTr"
    words = command(bundle, "inference.json", dataset_dir=images, output_dir=tmp_path / "out")
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Weights only load failed" in result.stderr
    assert not mark.exists()
    torch.load(weights, weights_only=False)
    assert mark.exists()  # the intruder is one


def test_nothing_of_ours_unpickles_or_evaluates() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [f"{path.name}: {name}" for name in names if name in ("pickle", "marshal", "shelve", "dill")]
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if called in ("eval", "exec", "os.system", "yaml.load") or keywords.get("shell") == "True":
                    found.append(f"{path.name}: {called}")
                if called == "torch.load" and keywords.get("weights_only") != "True":
                    found.append(f"{path.name}: torch.load")
                if called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                    found.append(f"{path.name}: {called}")
    assert found == []


def test_safetensors_are_taken(bundle: Path, tmp_path: Path) -> None:
    weights = read_weights(bundle / "models" / "model.pt")
    save_file(weights, bundle / "models" / "model.safetensors")
    (bundle / "models" / "model.pt").unlink()
    network = BundleSegmenter(bundle, "cpu").network
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    other = SegIUNet(3, 1, 3, (32, 64, 128, 256), couplings=2)
    start_from(bundle / "models" / "model.safetensors", other)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\0\0\0\0\0\0\0\x01{}", b"PK\x03\x04 no archive"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_weights_are_named(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"weights{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=f"weights{suffix}: not the weights"):
        read_weights(tmp_path / f"weights{suffix}")


def test_tensors_by_number_are_no_weights(tmp_path: Path) -> None:
    torch.save({0: torch.zeros(1), 1: torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt: not the weights of a network alone"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.long
def test_a_bundle_of_somebody_is_run_only_after_a_word(bundle: Path, tmp_path: Path) -> None:
    config = bundle / "configs" / "inference.json"
    changed = json.loads(config.read_text())
    changed["inferer"] = f"$__import__('pathlib').Path({str(tmp_path / 'mark')!r}).write_text('ran')"
    config.write_text(json.dumps(changed))
    image = save(tmp_path / "image.nii.gz")
    words = [sys.executable, "-c", "from monai_iunet.cli import main; main()", "segment", image, "--bundle", bundle]
    result = subprocess.run([*words, "--output", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert (tmp_path / "mark").exists()  # so the word is in place
    assert "configs can run any code" in result.stderr.splitlines()[0]


def test_bundles_of_the_package_need_no_word(caplog: pytest.LogCaptureFixture) -> None:
    bundle_folder("hippocampus")
    bundle_folder(HIPPOCAMPUS)
    assert not caplog.records


def test_no_name_in_a_file_leads_out_of_the_output_folder(tmp_path: Path) -> None:
    inside = tmp_path / "work" / "out"
    data = 300 * np.random.default_rng(0).random((35, 50, 6))
    series = write_series(
        tmp_path / "series", data, spacing=(1.0, 1.0, 1.0), modality="MR", description="../../../evil"
    )
    image = save(tmp_path / "image.nii.gz")
    (tmp_path / "list.json").write_text(json.dumps(["../" + tmp_path.name + "/image.nii.gz"]))
    before = set(tmp_path.rglob("*"))
    code, _, _ = call("segment", series, image, "--output", inside, "--format", "input", "--no-overlay")
    assert code == 0
    (entry,) = images_to_segment(tmp_path / "list.json", inside, skip_done=False)
    assert Path(entry["image"]).resolve() == image
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.parent for path in written} == {inside}
    assert len(written) == 2
