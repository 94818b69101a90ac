"""The configs of all bundles: from one template, complete, and what MONAI expects."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata

from monai_iunet.benchmark.comparison import as_markdown
from monai_iunet.bundling.fit_quality import as_markdown as quality_as_markdown
from monai_iunet.bundling.new_bundle import bundle_configs
from monai_iunet.bundling.task import HIPPOCAMPUS, TASKS, Task
from monai_iunet.errors import InputError
from monai_iunet.segmentation.quality import quality_file, read_quality
from tests.bundles.helpers import BUNDLES, SCHEMA, TRAINED

TRAINED_BY_NAME = pytest.mark.parametrize("task", TRAINED, ids=lambda task: task.name)
BY_NAME = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@BY_NAME
def test_the_configs_are_those_of_the_template(task: Task) -> None:
    folder = BUNDLES / task.name / "configs"
    for name, config in bundle_configs(task).items():
        assert json.loads((folder / name).read_text()) == json.loads(json.dumps(config)), (
            f"{name}: write the configs again with `python -m monai_iunet.bundling.new_bundle`"
        )


def test_every_bundle_is_made_by_the_template() -> None:
    assert {path.name for path in BUNDLES.iterdir() if path.is_dir()} == {task.name for task in TASKS}


@BY_NAME
@pytest.mark.parametrize(("name", "purpose"), [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_the_configs_have_the_properties_that_monai_asks_for(
    task: Task, name: str, purpose: str, tmp_path: Path
) -> None:
    image = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    (tmp_path / "labels").mkdir()
    for case in "ab":
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / f"{case}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(image % 2, np.eye(4)), tmp_path / "labels" / f"{case}.nii.gz")
    training, validation = ({"image": file, "label": f"labels/{file}"} for file in ("a.nii.gz", "b.nii.gz"))
    sections = {"training": [training], "validation": [validation], "test": ["a.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(sections))
    folder = BUNDLES / task.name / "configs"
    workflow = ConfigWorkflow(
        str(folder / f"{name}.json"),
        meta_file=str(folder / "metadata.json"),
        logging_file=str(folder / "logging.conf"),
        workflow_type=purpose,
        bundle_root=str(BUNDLES / task.name),
        dataset_dir=str(tmp_path),
        ckpt_dir=str(tmp_path / "ckpt"),
        output_dir=str(tmp_path / "out"),
        check_data=False,
        device="cpu",
    )
    workflow.initialize()
    assert not workflow.check_properties()


@BY_NAME
def test_every_file_that_a_bundle_needs_is_there(task: Task) -> None:
    bundle = BUNDLES / task.name
    for name in ("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"):
        assert (bundle / name).stat().st_size > 0, name
    if task in TRAINED:
        for weights in ("model", *(["any_contrast"] if task.any_contrast_where_doubted else [])):
            assert 0 < (bundle / "models" / f"{weights}.pt").stat().st_size < 25e6
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["version"] in metadata["changelog"]
    # The command reads it from the metadata, the inference from its config.
    assert metadata.get("max_field_of_view_mm") == task.max_field_of_view
    assert metadata.get("weights_where_doubted") == ("any_contrast" if task.any_contrast_where_doubted else None)


@BY_NAME
def test_the_metadata_have_the_structure_that_monai_specifies(task: Task) -> None:
    # Given a file that exists, MONAI does not download the schema.
    verify_metadata(BUNDLES / task.name / "configs" / "metadata.json", str(SCHEMA))


def test_metadata_without_channels_are_refused(tmp_path: Path) -> None:
    metadata = json.loads((BUNDLES / TASKS[0].name / "configs" / "metadata.json").read_text())
    del metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="channel_def"):
        verify_metadata(tmp_path / "metadata.json", str(SCHEMA))


@BY_NAME
def test_the_metadata_describe_the_network(task: Task) -> None:
    metadata = json.loads((BUNDLES / task.name / "configs" / "metadata.json").read_text())
    image = metadata["network_data_format"]["inputs"]["image"]
    pred = metadata["network_data_format"]["outputs"]["pred"]
    names = {str(number): name for number, name in enumerate(("background", *task.classes))}
    assert pred["channel_def"] == names
    assert pred["num_channels"] == len(names)
    assert image["spatial_shape"] == pred["spatial_shape"] == list(task.roi_size)
    assert image["modality"] == task.modality


@TRAINED_BY_NAME
def test_the_readme_shows_what_was_measured(task: Task) -> None:
    bundle = BUNDLES / task.name
    readme = (bundle / "docs" / "README.md").read_text()
    comparison = bundle / "docs" / "comparison.json"
    if comparison.exists():
        assert as_markdown(json.loads(comparison.read_text())) in readme
    stated = json.loads((bundle / "configs" / "metadata.json").read_text())["eval_metrics"]
    rows = {line.split("|")[1].strip(): line for line in readme.splitlines() if line.startswith("| ")}
    for name in task.classes:
        assert f"| {stated['dice_' + name.replace(' ', '_')]:.3f} |" in rows[name]
    for picture in ("cases.png", "training.png"):
        assert f"]({picture})" in readme
        assert (bundle / "docs" / picture).is_file()


@BY_NAME
def test_a_bad_case_stops_the_training_before_it_begins(task: Task, tmp_path: Path) -> None:
    training, validation = ([{"image": f"{name}.nii.gz", "label": f"{name}_too.nii.gz"}] for name in ("gone", "away"))
    (tmp_path / "dataset.json").write_text(json.dumps({"training": training, "validation": validation}))
    parser = ConfigParser()
    parser.read_config(BUNDLES / task.name / "configs" / "train.json")
    parser.update({"bundle_root": str(BUNDLES / task.name), "dataset_dir": str(tmp_path)})
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("datalist")
    assert isinstance(error.value.__cause__, InputError)
    assert "gone.nii.gz: no such file" in str(error.value.__cause__)


@BY_NAME
@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
def test_every_switch_that_is_text_is_refused(task: Task, config: str) -> None:
    path = BUNDLES / task.name / "configs" / f"{config}.json"
    switches = {name for name, value in json.loads(path.read_text()).items() if isinstance(value, bool)} | {"amp"}
    assert len(switches) > 2
    for name in switches:
        parser = ConfigParser()
        parser.read_config(path)
        parser.update({"bundle_root": str(BUNDLES / task.name), name: "false"})
        with pytest.raises(RuntimeError) as error:
            parser.get_parsed_content("initialize")
        assert f"--{name} false: is text" in str(error.value.__cause__)


@pytest.mark.parametrize(("config", "section"), [("train", "train#random_transforms"), ("evaluate", "inferer")])
def test_other_classes_do_not_change_places_as_those_of_the_bundle(config: str, section: str) -> None:
    """The labels 3 and 4 of somebody else are no parotids; they were swapped in silence."""
    parser = ConfigParser()
    parser.read_config(BUNDLES / "iunet_headneck_ct_segmentation" / "configs" / f"{config}.json")
    parser["num_classes"] = 9
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content(section)
    assert "num_classes 9: which of them change places in a mirror image is not known" in str(error.value.__cause__)
    parser[f"{section}#1#swap" if config == "train" else f"{section}#mirror#swap"] = [[1, 2]]
    parser.get_parsed_content(section)


@BY_NAME
def test_the_largest_component_of_all_classes_is_kept(task: Task) -> None:
    parser = ConfigParser()
    parser.read_config(BUNDLES / task.name / "configs" / "inference.json")
    parser.update({"num_classes": 4, "largest_component": True, "inferer": None})
    assert parser.get_parsed_content("postprocessing").transforms[0].applied_labels == [1, 2, 3]


INVERT = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}


ENSEMBLE = {**INVERT, "keys": ["pred0", "pred1"]}  # as an EnsembleEvaluator may name them


@pytest.mark.parametrize(
    "more", [INVERT, ENSEMBLE, ARGMAX, SIGMOID], ids=lambda more: f"{more['_target_']} of {more['keys']}"
)
@pytest.mark.parametrize(("config", "section"), [("inference", ""), ("evaluate", "validate#")])
def test_labels_are_not_made_labels_again(config: str, section: str, more: dict[str, Any]) -> None:
    """As bundles with MONAI's sliding windows do with logits; the labels would be wrong in silence."""
    folder = BUNDLES / "iunet_hippocampus_mri_segmentation"
    parser = ConfigParser()
    parser.read_config(folder / "configs" / f"{config}.json")
    parser.update({"bundle_root": str(folder), "device": "cpu"})
    added = {name: f"@{section}preprocessing" if name == "transform" else value for name, value in more.items()}
    parser[f"{section}postprocessing#transforms"] = [added]
    with pytest.raises(RuntimeError) as error:
        parser.get_parsed_content("initialize")
    assert isinstance(error.value.__cause__, InputError)
    assert f"has {more['_target_']}, but the labels of a LabelInferer are " in str(error.value.__cause__)
    parser[f"{section}inferer"] = {"_target_": "SlidingWindowInferer", "roi_size": [40, 56, 40]}
    parser.get_parsed_content("initialize")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
def test_what_workers_of_a_data_loader_need_is_pickled(task: Task, config: str) -> None:
    parser = ConfigParser()
    parser.read_config(BUNDLES / task.name / "configs" / f"{config}.json")
    parser["bundle_root"] = str(BUNDLES / task.name)
    prefixes = {"train": ["train#", "validate#"], "evaluate": ["validate#"], "inference": [""]}
    for prefix in prefixes[config]:
        for section in ("preprocessing", "dataset"):
            parser["datalist"] = {"training": [], "validation": []} if config != "inference" else []
            pickle.loads(pickle.dumps(parser.get_parsed_content(prefix + section)))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("config", ["evaluate", "inference"])
def test_the_inferer_can_be_changed_by_the_command(task: Task, config: str) -> None:
    parser = ConfigParser()
    parser.read_config(BUNDLES / task.name / "configs" / f"{config}.json")
    options = {"roi_size": [16, 16, 16], "overlap": 0.125, "sw_batch_size": 7}
    parser.update({f"inferer#{name}": value for name, value in options.items()})
    classes = task.num_classes
    inferer = parser.get_parsed_content("inferer").inferer
    assert (tuple(inferer.roi_size), inferer.overlap, inferer.sw_batch_size) == ((16, 16, 16), 0.125, 7)
    logits = inferer(torch.rand(1, 1, 20, 20, 20), lambda image: image.repeat(1, classes, 1, 1, 1))
    assert logits.shape == (1, classes, 20, 20, 20)


@BY_NAME
def test_the_readme_shows_how_well_quality_is_predicted(task: Task) -> None:
    bundle = BUNDLES / task.name
    if not quality_file(bundle).is_file():
        pytest.skip("no quality model was fitted")
    model = read_quality(bundle, task.classes)
    assert model is not None, "it belongs to other weights: fit it again with `monai-iunet quality`"
    readme = (bundle / "docs" / "README.md").read_text()
    assert quality_as_markdown(model) in readme
    assert f"warns if it is below {model.warn_below:.2f}" in readme
    assert model.held_out["correlation"] > 0.8
    if task is HIPPOCAMPUS:  # the contours of the other data set do not allow it, as its README says
        second = read_quality(bundle, task.classes, "any_contrast")
        assert second is not None
        assert quality_as_markdown(second) in readme
        for held_out in (model.held_out, second.held_out):
            assert held_out["bad_that_pass"] <= 0.02
            assert held_out["good_that_are_doubted"] <= 0.05
