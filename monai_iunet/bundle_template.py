"""The configs of a bundle, from a description of its task: one template for all bundles."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from monai_iunet.images import InputError, check_folder, write_atomically
from monai_iunet.installed import bundle_folder

__all__ = ["HEADNECK", "HIPPOCAMPUS", "TASKS", "Task", "configs", "write_bundle", "write_configs"]

Config = dict[str, Any]
# Reads what `monai-iunet segment` reads, and refuses what it refuses.
READER = "monai_iunet.SimpleITKReader"
Transforms = list[Config]

IMAGE_AND_LABEL = ["image", "label"]
IMPORTS = (
    "import ignite",
    "import json",
    "import os",
    "import pathlib",
    "import torch",
    "from monai_iunet.cases import checked",
    "from monai_iunet.cases import images_to_segment",
    "from monai_iunet.cases import segmentable",
    "from monai_iunet.checkpoints import start_from",
)


@dataclass(frozen=True)
class Task:
    """What is segmented, and how the network learns it.

    Attributes:
        name: folder of the bundle.
        modality: "MR" or "CT"; decides how intensities are normalized and varied.
        classes: names of the structures, in the order of their labels 1, 2, ...
        dataset: name of the folder with `dataset.json`.
        spacing: voxels that the network sees, in mm.
        roi_size: patch, in voxels.
        window: for CT, Hounsfield units that become -1 and 1.
        mirrored: pairs of labels that change places when left and right do; None if the side matters, so that
            images are not mirrored.
        partial_labels: whether structures that are there may not be contoured in some cases.
        largest_component: whether, unless asked otherwise, only the largest component of each structure is kept.
        max_field_of_view: longest axis, in mm, of the images that the network has learned from, if others must be
            cropped; None for any.
        validation_cases: whether the cases to validate on are listed in `configs/validation_cases.json`; otherwise
            they are the section "validation" of `dataset.json`.
        channels: of the network, per level.
        couplings: of the network, per level.
        max_epochs: epochs of the full training.
        batch_size: cases per step.
        learning_rate: at the beginning.

    Example:
        >>> task = Task("iunet_liver_ct", "CT", ("liver",), "data", spacing=(1.5, 1.5, 2.0), roi_size=(96, 96, 64))
        >>> configs(task)["train.json"]["network_def"]["_target_"]
        'monai_iunet.SegIUNet'
    """

    name: str
    modality: Literal["MR", "CT"]
    classes: tuple[str, ...]
    dataset: str
    spacing: tuple[float, float, float]
    roi_size: tuple[int, int, int]
    window: tuple[float, float] = (-160.0, 240.0)
    mirrored: tuple[tuple[int, int], ...] | None = None
    partial_labels: bool = False
    largest_component: bool = False
    max_field_of_view: float | None = None
    validation_cases: bool = False
    channels: tuple[int, ...] = (32, 64, 128, 256)
    couplings: tuple[int, ...] = (2, 2, 2, 2)
    max_epochs: int = 60
    batch_size: int = 2
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise InputError(f"name {self.name!r}: must consist of letters, digits and underscores.")
        if self.modality not in ("MR", "CT"):
            raise InputError(f"modality {self.modality!r}: must be MR or CT.")
        if not all(self.classes) or len(set(self.classes)) < len(self.classes):
            raise InputError(f"classes {', '.join(self.classes)!r}: must be names that differ from each other.")
        if min(self.spacing) <= 0:
            raise InputError(f"spacing {self.spacing}: must be positive.")
        factor = 2 ** (len(self.channels) - 1)
        if any(extent <= 0 or extent % factor for extent in self.roi_size):
            raise InputError(f"roi_size {self.roi_size}: must be multiples of {factor}.")

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.classes) + 1


HIPPOCAMPUS = Task(
    name="iunet_hippocampus_mri_segmentation",
    modality="MR",
    classes=("anterior hippocampus", "posterior hippocampus"),
    dataset="Task04_Hippocampus",
    spacing=(1.0, 1.0, 1.0),
    roi_size=(40, 56, 40),
    max_field_of_view=80.0,
    validation_cases=True,
    max_epochs=90,
)

HEADNECK = Task(
    name="iunet_headneck_ct_segmentation",
    modality="CT",
    classes=("brainstem", "spinal cord", "right parotid", "left parotid", "esophagus", "larynx", "mandible"),
    dataset="OpenKBP_HeadNeck",
    spacing=(3.906, 3.906, 2.5),
    roi_size=(56, 48, 48),
    mirrored=((3, 4),),
    partial_labels=True,
    largest_component=True,
    # Depth where it costs little: seven organs in a large field of view need more of it than one hippocampus.
    couplings=(2, 3, 4, 4),
    max_epochs=60,
)

TASKS = (HIPPOCAMPUS, HEADNECK)


def configs(task: Task) -> dict[str, Config]:
    """All configs of a bundle, by the name of their file in `configs`."""
    found = {}
    for name, make in (("train", train_config), ("evaluate", evaluate_config), ("inference", inference_config)):
        found[f"{name}.json"] = make(task)
        found[f"multi_gpu_{name}.json"] = make(task, distributed=True)
    return found


def write_configs(task: Task, bundle: str | Path) -> None:
    """Write all configs into the folder of a bundle."""
    folder = check_folder(Path(bundle, "configs"))
    for name, config in configs(task).items():
        text = json.dumps(config, indent=4) + "\n"
        write_atomically(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))


def write_bundle(task: Task, folder: str | Path) -> Path:
    """Write a new bundle, without weights: configs, metadata, logging, license and a README to complete.

    Raises:
        InputError: when the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder. Name another one.")
    for part in ("configs", "docs", "models"):
        check_folder(folder / part)
    write_configs(task, folder)
    example = bundle_folder()
    for name in ("LICENSE", "configs/logging.conf"):
        shutil.copyfile(example / name, folder / name)
    text = json.dumps(_metadata(task), indent=4) + "\n"
    write_atomically(folder / "configs" / "metadata.json", partial(Path.write_text, data=text, encoding="utf-8"))
    write_atomically(folder / "docs" / "README.md", partial(Path.write_text, data=_readme(task), encoding="utf-8"))
    license_text = f"The license of the data set {task.dataset}, and whom to cite.\n"
    write_atomically(folder / "docs" / "data_license.txt", partial(Path.write_text, data=license_text))
    return folder


def _metadata(task: Task) -> Config:
    names = ("background", *task.classes)
    kind = {"MR": "magnitude", "CT": "hounsfield"}[task.modality]
    shape = list(task.roi_size)
    title = f"Segmentation of {', '.join(task.classes)} in {task.modality}"
    patch = {"type": "image", "spatial_shape": shape, "dtype": "float32", "is_patch_data": True}
    needed = ("nibabel", "pytorch-ignite", "scikit-image", "monai-iunet", "tensorboard")
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "name": f"{title} with an invertible U-Net",
        "version": "0.1.0",
        "changelog": {"0.1.0": "first version"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in needed if _is_installed(name)},
        "supported_apps": {},
        "task": title,
        "description": f"An invertible 3D U-Net for the {title[0].lower()}{title[1:]}.",
        "authors": "",
        "copyright": "",
        "data_source": task.dataset,
        "data_type": "nifti",
        "image_classes": f"single channel {task.modality}",
        "label_classes": "single channel, " + ", ".join(f"{value} {name}" for value, name in enumerate(names)),
        "pred_classes": f"{len(names)} channels of logits: {', '.join(names)}",
        "eval_metrics": {},
        "intended_use": "Research. Not a medical device, not for diagnosis or treatment.",
        "references": ["Etmann, Ke, Schönlieb: iUNets. 2020. arXiv:2005.05220"],
        "network_data_format": {
            "inputs": {
                "image": {
                    **patch,
                    "format": kind,
                    "modality": task.modality,
                    "num_channels": 1,
                    "value_range": [-5, 5] if task.modality == "MR" else [-1, 1],
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    **patch,
                    "format": "labels",
                    "num_channels": len(names),
                    "value_range": [],
                    "channel_def": {str(value): name for value, name in enumerate(names)},
                }
            },
        },
    }


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _readme(task: Task) -> str:
    rows = "\n".join(f"| {value} | {name} |" for value, name in enumerate(task.classes, 1))
    return f"""# {task.name}

Segments in {task.modality}:

| label | structure |
|---|---|
{rows}

The data set is a folder with a `dataset.json` like those of the Medical Segmentation Decathlon, with the sections
"training" and "validation", each a list of entries with an "image" and a "label". In this folder:

```bash
python -m monai.bundle run --config_file configs/train.json --dataset_dir DATA
python -m monai.bundle run --config_file configs/evaluate.json --dataset_dir DATA
python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES
```
"""


def train_config(task: Task, distributed: bool = False) -> Config:
    """`train.json`, or `multi_gpu_train.json`."""
    return {
        **_header(task, distributed),
        "network": (
            "$torch.nn.parallel.DistributedDataParallel(@network_def.to(@device))"
            if distributed
            else "$@network_def.to(@device)"
        ),
        "ckpt_dir": "$os.path.join(@bundle_root, 'models')",
        "output_dir": "$os.path.join(@bundle_root, 'train')",
        "seed": 0,
        "resume": False,
        "pretrained": None,
        "check_data": True,
        "skip_bad_cases": False,
        "max_epochs": task.max_epochs,
        "val_interval": 5,
        "patience": 20,
        "batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "cache_rate": 1.0,
        "loss": _loss(task),
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "params": "$@network.parameters()",
            "lr": "@learning_rate",
            "weight_decay": 0.01,
        },
        "lr_scheduler": {
            "_target_": "torch.optim.lr_scheduler.PolynomialLR",
            "optimizer": "@optimizer",
            "total_iters": "@max_epochs",
            "power": 0.9,
        },
        # The average of the weights over about the last 300 steps is validated and saved.
        "average": {"_target_": "ignite.handlers.EMAHandler", "model": "@network", "momentum": 0.003},
        "start_average": "$lambda engine: engine.state.iteration or "
        "@average.ema_model.load_state_dict(@network_def.state_dict())",
        **_datalist(task),
        "preprocessing": _preprocessing(task, IMAGE_AND_LABEL),
        "train": {
            "label_transforms": _label_transforms(task),
            "random_transforms": _random_transforms(task),
            "preprocessing": {
                "_target_": "Compose",
                "transforms": "$@preprocessing + @train#label_transforms + @train#random_transforms",
            },
            "dataset": _dataset("$@datalist['training']", "@train#preprocessing"),
            "dataloader": {
                **_dataloader("@train#dataset", "@batch_size", distributed, shuffle=True),
                # Unless nothing would be left: MONAI's trainer then skips the training.
                "drop_last": "$len(@train#dataset) >= @batch_size * int(os.environ.get('WORLD_SIZE', 1))",
            },
            "inferer": {"_target_": "SimpleInferer"},
            "handlers": [
                {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler", "print_lr": "$@rank == 0"},
                {
                    "_target_": "ValidationHandler",
                    "validator": "@validate#evaluator",
                    "epoch_level": True,
                    "interval": "@val_interval",
                },
                {"_target_": "StatsHandler", **_loss_of_a_step(), "_disabled_": "$@rank > 0"},
                {
                    "_target_": "TensorBoardStatsHandler",
                    "log_dir": "@output_dir",
                    **_loss_of_a_step(),
                    "_disabled_": "$@rank > 0",
                },
            ],
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": "@max_epochs",
                "device": "@device",
                "train_data_loader": "@train#dataloader",
                "network": "@network",
                "optimizer": "@optimizer",
                "loss_function": "@loss",
                "inferer": "@train#inferer",
                "train_handlers": "@train#handlers",
                "amp": "@amp",
            },
        },
        "validate": {
            "preprocessing": {"_target_": "Compose", "transforms": "@preprocessing"},
            "dataset": _dataset("$@datalist['validation']", "@validate#preprocessing"),
            "dataloader": _dataloader("@validate#dataset", 1, distributed),
            "inferer": _sliding_window(task),
            "postprocessing": {
                "_target_": "Compose",
                "transforms": [
                    {
                        "_target_": "AsDiscreted",
                        "keys": ["pred", "label"],
                        "argmax": [True, False],
                        "to_onehot": "@num_classes",
                    }
                ],
            },
            "key_metric": {
                "val_mean_dice": {
                    "_target_": "MeanDice",
                    "include_background": False,
                    "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
                }
            },
            "handlers": [
                {"_target_": "StatsHandler", "iteration_log": False, "_disabled_": "$@rank > 0"},
                {
                    "_target_": "TensorBoardStatsHandler",
                    "log_dir": "@output_dir",
                    "iteration_log": False,
                    "_disabled_": "$@rank > 0",
                },
                {
                    "_target_": "monai_iunet.training_pictures.PictureHandler",
                    "log_dir": "@output_dir",
                    "_disabled_": "$@rank > 0",
                },
                "@early_stop",
            ],
            "evaluator": _evaluator("@validate#", "$@average.ema_model", key_metric=True),
        },
        "early_stop": {
            "_target_": "EarlyStopHandler",
            "patience": "@patience",
            "score_function": "$lambda validator: validator.state.metrics['val_mean_dice']",
        },
        "progress": {"_target_": "ignite.handlers.ProgressBar", "disable": "$@rank > 0"},
        "checkpoints": {
            "_target_": "monai_iunet.checkpoints.Checkpoints",
            "folder": "@ckpt_dir",
            "model": "$@average.ema_model",
            "state": {"network": "@network_def", "optimizer": "@optimizer", "lr_scheduler": "@lr_scheduler"},
            "seed": "$@seed + 1000 * @rank",
            "resume": "@resume",
            "writes": "$@rank == 0",
        },
        # Nothing here that reads data: `monai.bundle.load` initializes too.
        "initialize": [*_begin(distributed), "$monai.utils.set_determinism(seed=@seed)"],
        "run": [
            "$start_from(@pretrained, @network_def, @average.ema_model) if @pretrained else None",
            # Whatever a handler has loaded into the network, the average begins with it.
            "$@train#trainer.add_event_handler(ignite.engine.Events.STARTED, @start_average)",
            "$@early_stop.set_trainer(@train#trainer)",
            "$@progress.attach(@train#trainer)",
            "$@average.attach(@train#trainer)",
            "$@checkpoints.attach(@train#trainer, @validate#evaluator)",
            "$@train#trainer.run()",
        ],
        "finalize": _end(distributed),
    }


def evaluate_config(task: Task, distributed: bool = False) -> Config:
    """`evaluate.json`, or `multi_gpu_evaluate.json`: the validation cases, compared on the grids of their images."""
    return {
        **_header(task, distributed),
        **_trained_network(),
        "check_data": True,
        "skip_bad_cases": False,
        "structures": list(task.classes),
        **_datalist(task),
        "image_preprocessing": {"_target_": "Compose", "transforms": _preprocessing(task, "image")},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                "@image_preprocessing",
                {"_target_": "LoadImaged", "keys": "label", "reader": READER, "ensure_channel_first": True},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "$@datalist['validation']", "transform": "@preprocessing"},
        "dataloader": _dataloader("@dataset", 1, distributed),
        **_inferer(task),
        "largest_component": task.largest_component,
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [*_labels_on_image_grid("@image_preprocessing"), _largest_component(task)],
        },
        "handlers": [
            _load_checkpoint(),
            {
                "_target_": "monai_iunet.evaluation.CaseReport",
                "output_dir": "@output_dir",
                "structures": "@structures",
            },
            {"_target_": "StatsHandler", "iteration_log": False, "_disabled_": "$@rank > 0"},
        ],
        "evaluator": _evaluator("@", "@network"),
        "initialize": [*_begin(distributed), "$monai.utils.set_determinism(seed=0)"],
        "run": ["$@evaluator.run()"],
        "finalize": _end(distributed),
    }


def inference_config(task: Task, distributed: bool = False) -> Config:
    """`inference.json`, or `multi_gpu_inference.json`: segments images into label maps on their grids."""
    return {
        **_header(task, distributed),
        **_trained_network(),
        "skip_done": True,
        "largest_component": task.largest_component,
        "save_probabilities": False,
        "check_data": True,
        "skip_bad_cases": False,
        "max_field_of_view": task.max_field_of_view,
        "images": "$images_to_segment(@dataset_dir, @output_dir, skip_done=@skip_done)",
        "datalist": "$segmentable(@images, @check_data, @skip_bad_cases, @max_field_of_view)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(task, "image")},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": _dataloader("@dataset", 1, distributed),
        **_inferer(task),
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                *_labels_on_image_grid("@preprocessing", save_probabilities=True),
                _largest_component(task),
                {"_target_": "monai_iunet.outputs.SaveImageLabelsd", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
        "handlers": [
            _load_checkpoint(),
            {"_target_": "StatsHandler", "iteration_log": False, "_disabled_": "$@rank > 0"},
        ],
        "evaluator": _evaluator("@", "@network"),
        "initialize": [*_begin(distributed), "$monai.utils.set_determinism(seed=0)"],
        "run": ["$@evaluator.run()"],
        "finalize": _end(distributed),
    }


def _header(task: Task, distributed: bool) -> Config:
    device = "'cuda:' + os.environ['LOCAL_RANK']" if distributed else "'cuda'"
    return {
        "imports": [f"${line}" for line in IMPORTS],
        "bundle_root": ".",
        "dataset_dir": f"$os.path.join(@bundle_root, 'data', '{task.dataset}')",
        "rank": "$int(os.environ['RANK'])" if distributed else 0,
        "device": f"$torch.device({device} if torch.cuda.is_available() else 'cpu')",
        "amp": "$torch.device(@device).type == 'cuda'",
        "num_workers": 0,
        "num_classes": task.num_classes,
        "roi_size": list(task.roi_size),
        "network_def": {
            "_target_": "monai_iunet.SegIUNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": "@num_classes",
            "channels": list(task.channels),
            "couplings": list(task.couplings),
        },
    }


def _trained_network() -> Config:
    return {
        "network": "$@network_def.to(@device)",
        "checkpoint": "$os.path.join(@bundle_root, 'models', 'model.pt')",
        "output_dir": "$os.path.join(@bundle_root, 'eval')",
    }


def _begin(distributed: bool) -> list[str]:
    backend = "'nccl' if torch.cuda.is_available() else 'gloo'"
    return [f"$torch.distributed.init_process_group({backend})"] if distributed else []


def _end(distributed: bool) -> list[str]:
    return ["$torch.distributed.destroy_process_group()"] if distributed else []


def _evaluator(section: str, network: str, key_metric: bool = False) -> Config:
    evaluator = {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": f"{section}dataloader",
        "network": network,
        "inferer": f"{section}inferer",
        "postprocessing": f"{section}postprocessing",
        "val_handlers": f"{section}handlers",
        "amp": "@amp",
    }
    return {**evaluator, "key_val_metric": f"{section}key_metric"} if key_metric else evaluator


def _load_checkpoint() -> Config:
    return {
        "_target_": "CheckpointLoader",
        "load_path": "@checkpoint",
        "load_dict": {"model": "@network"},
        "map_location": "@device",
    }


def _labels_on_image_grid(preprocessing: str, save_probabilities: bool = False) -> Transforms:
    invert = {"transform": preprocessing, "orig_keys": "image"}
    transforms: Transforms = [{"_target_": "Activationsd", "keys": "pred", "softmax": True}]
    if save_probabilities:
        disabled = {"_disabled_": "$not @save_probabilities"}
        transforms += [
            {"_target_": "CopyItemsd", "keys": "pred", "names": "prob", **disabled},
            {"_target_": "Invertd", "keys": "prob", **invert, "nearest_interp": False, "to_tensor": True, **disabled},
            {
                "_target_": "SaveImaged",
                "keys": "prob",
                "output_dir": "@output_dir",
                "output_postfix": "prob",
                "resample": False,
                "separate_folder": False,
                **disabled,
            },
        ]
    return [*transforms, {"_target_": "monai_iunet.outputs.LabelsOnImageGridd", "keys": "pred", **invert}]


def _largest_component(task: Task) -> Config:
    return {
        "_target_": "KeepLargestConnectedComponentd",
        "keys": "pred",
        "applied_labels": list(range(1, task.num_classes)),
        "_disabled_": "$not @largest_component",
    }


def _inferer(task: Task) -> Config:
    sliding = {**_sliding_window(task), "_target_": "SlidingWindowInfererAdapt"}
    if task.mirrored is None:
        return {"inferer": sliding}
    return {
        "test_time_flips": True,
        "inferer": {
            "_target_": "monai_iunet.mirror.MirrorInferer",
            "inferer": sliding,
            "swap": [list(pair) for pair in task.mirrored],
            "enabled": "@test_time_flips",
        },
    }


def _loss(task: Task) -> Config:
    loss = {"_target_": "DiceCELoss", "softmax": True, "include_background": False}
    if task.partial_labels:
        return {"_target_": "monai_iunet.partial_labels.MarginalLoss", "loss": loss}
    return {**loss, "to_onehot_y": True}


def _loss_of_a_step() -> Config:
    return {"tag_name": "train_loss", "output_transform": "$monai.handlers.from_engine(['loss'], first=True)"}


def _datalist(task: Task) -> Config:
    def section(name: str) -> str:
        path = "os.path.join(@dataset_dir, 'dataset.json')"
        return f"monai.data.load_decathlon_datalist({path}, True, '{name}', @dataset_dir)"

    def check(cases: str) -> str:
        return f"$checked({cases}, @num_classes, @check_data, @skip_bad_cases)"

    if not task.validation_cases:
        return {"datalist": {name: check(section(name)) for name in ("training", "validation")}}
    names = "json.loads(pathlib.Path(@bundle_root, 'configs', 'validation_cases.json').read_text())"
    kept = "[case for case in @cases if os.path.basename(case['image']) {} @validation_cases]"
    return {
        "validation_cases": f"${names}",
        "cases": f"${section('training')}",
        "datalist": {"training": check(kept.format("not in")), "validation": check(kept.format("in"))},
    }


def _preprocessing(task: Task, keys: str | Sequence[str]) -> Transforms:
    both = not isinstance(keys, str)
    transforms: Transforms = [
        {"_target_": "LoadImaged", "keys": keys, "reader": READER},
        # Apart, because MONAI Deploy leaves out what loads.
        {"_target_": "EnsureChannelFirstd", "keys": keys},
        # The labels of an affine that leads to RAS, as all readers give it, whatever space the meta data name.
        {"_target_": "Orientationd", "keys": keys, "axcodes": "RAS", "labels": [["L", "R"], ["P", "A"], ["I", "S"]]},
    ]
    if task.modality == "CT":
        # What lies around the scanned region is air, or was never there.
        transforms.append(
            {
                "_target_": "CropForegroundd",
                "keys": keys,
                "source_key": "image",
                "select_fn": "$lambda image: image > -999",
                "allow_smaller": True,
            }
        )
    transforms.append(
        {
            "_target_": "Spacingd",
            "keys": keys,
            "pixdim": list(task.spacing),
            "mode": ["bilinear", "nearest"] if both else "bilinear",
        }
    )
    if task.modality == "CT":
        low, high = task.window
        scale = {"a_min": low, "a_max": high, "b_min": -1.0, "b_max": 1.0, "clip": True}
        transforms.append({"_target_": "ScaleIntensityRanged", "keys": "image", **scale})
    else:
        scale = {"lower": 0.5, "upper": 99.5, "b_min": 0.0, "b_max": 1.0, "clip": True}
        transforms.append({"_target_": "ScaleIntensityRangePercentilesd", "keys": "image", **scale})
        transforms.append({"_target_": "NormalizeIntensityd", "keys": "image"})
    return transforms


def _label_transforms(task: Task) -> Transforms:
    if not task.partial_labels:
        return []
    note = "monai_iunet.partial_labels.NoteContouredd"
    return [{"_target_": note, "keys": "label", "num_classes": "@num_classes"}]


def _random_transforms(task: Task) -> Transforms:
    keys = IMAGE_AND_LABEL
    deformation: Config = {
        "_target_": "RandAffined",
        "keys": keys,
        "prob": 0.7,
        "rotate_range": [0.3, 0.3, 0.3],
        "scale_range": [0.15, 0.15, 0.15],
        "shear_range": [0.05, 0.05, 0.05],
        "mode": ["bilinear", "nearest"],
        "padding_mode": "border",
    }
    pad: Config = {"_target_": "SpatialPadd", "keys": keys, "spatial_size": "@roi_size"}
    if task.modality == "CT":
        # Structures in a large field of view: look where they are, each class as often as the background, with a margin
        # that the deformation takes what it moves in from. Padding with the least value adds air, and background.
        larger = "$[extent * 5 // 4 for extent in @roi_size]"
        # Seldom: voxels of some 4 mm are not many across a parotid, and interpolation blurs them.
        shift: Config = {"prob": 0.2, "translate_range": [6.0, 6.0, 6.0], "spatial_size": "@roi_size"}
        transforms: Transforms = [
            {**pad, "spatial_size": larger, "mode": "minimum"},
            {
                "_target_": "RandCropByLabelClassesd",
                "keys": keys,
                "label_key": "label",
                "spatial_size": larger,
                "num_classes": "@num_classes",
                "warn": False,
            },
            {**deformation, **shift},
        ]
    else:
        # Shifts of 0.5 to 2 voxels that vary over some 5 voxels: one structure differs in shape, not in pose alone.
        elastic = {"_target_": "Rand3DElasticd", "sigma_range": [4.0, 7.0], "magnitude_range": [50.0, 250.0]}
        crop = {"_target_": "RandSpatialCropd", "keys": keys, "roi_size": "@roi_size", "random_size": False}
        transforms = [pad, {**deformation, **elastic}, crop]
    if task.mirrored is not None:
        transforms.append(
            {
                "_target_": "monai_iunet.mirror.RandMirrord",
                "keys": keys,
                "label_keys": "label",
                "swap": [list(pair) for pair in task.mirrored],
            }
        )
    if task.modality == "MR":
        transforms.append({"_target_": "RandGaussianSmoothd", "keys": "image", "prob": 0.15})
        transforms.append({"_target_": "RandBiasFieldd", "keys": "image", "prob": 0.15, "coeff_range": [0.0, 0.2]})
        transforms.append({"_target_": "RandAdjustContrastd", "keys": "image", "prob": 0.2, "gamma": [0.7, 1.5]})
    factor, offset, noise = (0.25, 0.25, 0.15) if task.modality == "MR" else (0.1, 0.1, 0.05)
    transforms += [
        {"_target_": "RandScaleIntensityd", "keys": "image", "prob": 0.3, "factors": factor},
        {"_target_": "RandShiftIntensityd", "keys": "image", "prob": 0.3, "offsets": offset},
        {"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.2, "std": noise},
    ]
    if task.partial_labels:
        transforms.append({"_target_": "monai_iunet.partial_labels.OneHotContouredd", "keys": "label"})
    return transforms


def _dataset(data: str, transform: str) -> Config:
    return {
        "_target_": "CacheDataset",
        "data": data,
        "transform": transform,
        "cache_rate": "@cache_rate",
        "progress": False,
    }


def _dataloader(dataset: str, batch_size: str | int, distributed: bool, shuffle: bool = False) -> Config:
    loader: Config = {
        "_target_": "DataLoader",
        "dataset": dataset,
        "batch_size": batch_size,
        "num_workers": "@num_workers",
        "shuffle": shuffle and not distributed,
    }
    if distributed:
        # To train, all processes take equally many cases; to evaluate, no case is taken twice.
        loader["sampler"] = {
            "_target_": "DistributedSampler",
            "dataset": dataset,
            "even_divisible": shuffle,
            "shuffle": shuffle,
        }
    return loader


def _sliding_window(task: Task) -> Config:
    return {
        "_target_": "SlidingWindowInferer",
        "roi_size": "@roi_size",
        "sw_batch_size": 4,
        "overlap": 0.5,
        "mode": "gaussian",
        "cval": -1.0 if task.modality == "CT" else 0.0,  # air, or the mean
    }


if __name__ == "__main__":  # in a clone: python -m monai_iunet.bundle_template
    for each in TASKS:
        write_configs(each, Path(__file__).parents[1] / "bundles" / each.name)
