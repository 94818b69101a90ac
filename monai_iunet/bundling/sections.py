"""Sections that the configs of a bundle share: data, networks, inferers, evaluators, handlers."""

from __future__ import annotations

from typing import Any

from monai_iunet.bundling.task import Task
from monai_iunet.transforms.patches import WHOLE

__all__ = [
    "Config",
    "begin",
    "beyond",
    "case_dataset",
    "case_loader",
    "check_record",
    "datalist",
    "divisor",
    "end",
    "evaluator",
    "given_values",
    "header",
    "inferer",
    "load_checkpoint",
    "log_of_loss",
    "loss",
    "mirrored",
    "record",
    "sliding_window",
    "split",
    "trained_network",
]

Config = dict[str, Any]
PERCENTILES = [0.5, 99.5]  # of an MR image, beyond which intensities are clipped
IMPORTS = ("ignite", "json", "monai_iunet", "os", "pathlib", "torch")


def given_values(task: Task) -> Config:
    """Return what a training is given and an override may change: the patch, the voxels and the intensities."""
    intensities = (
        {"intensity_window": list(task.window)} if task.modality == "CT" else {"intensity_percentiles": PERCENTILES}
    )
    return {"roi_size": _as_list(task.roi_size), "spacing": list(task.spacing), **intensities}


def mirrored(task: Task) -> str:
    """Return the expression of the pairs of classes that change places in a mirror image."""
    pairs = [list(pair) for pair in task.mirrored or ()]
    return f"$monai_iunet.mirrored_pairs({pairs}, @num_classes, {task.num_classes})"


def beyond(task: Task) -> float:
    """Return what voxels beyond an image are for the network: air, or the mean."""
    return -1.0 if task.modality == "CT" else 0.0


def divisor(task: Task) -> int | list[int]:
    """Return what the sizes of images shall divide by: a number, or one per axis."""
    return task.factors[0] if len(set(task.factors)) == 1 else list(task.factors)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _trained(name: str, value: Any) -> str:
    """Return the expression of the value that the training of the weights was given."""
    return f"$monai_iunet.trained_value(@checkpoint, '{name}', {value!r})"


def record(task: Task, transforms: str, *more: str, **expressions: str) -> str:
    """Return the expression of what a training is given; see `monai_iunet.training.record`.

    Args:
        task: the task.
        transforms: reference to what images are preprocessed by.
        more: entries of the config that are noted beside the number of classes and `given_values`.
        expressions: further values, by their names.
    """
    noted = {name: f"@{name}" for name in ("num_classes", *given_values(task), *more)} | expressions
    values = ", ".join(f"{name}={value}" for name, value in noted.items())
    return f"monai_iunet.training_record(@network_def, {transforms}, {values})"


def check_record(task: Task, transforms: str, *more: str) -> str:
    """Return the expression that compares what weights were trained with and what they are used with."""
    return f"$monai_iunet.check_training(@checkpoint, {record(task, transforms, *more)})"


def split(task: Task) -> tuple[str, ...]:
    """Return the entries that say which cases are trained on; none where a list does."""
    return () if task.validation_cases else ("fold", "folds")


def header(task: Task, distributed: bool, training: bool = False) -> Config:
    """Return what every config begins with: imports, folders, device, network.

    What weights were trained with is taken from beside them, unless the config is one to train with.
    """
    ensemble = task.members > 1 and not training
    device = "'cuda:' + os.environ['LOCAL_RANK']" if distributed else "'cuda'"
    return {
        "imports": [f"$import {module}" for module in IMPORTS],
        "bundle_root": ".",
        "dataset_dir": f"$os.path.join(@bundle_root, 'data', {task.dataset!r})",
        "rank": "$int(os.environ['RANK'])" if distributed else 0,
        "device": f"$torch.device({device} if torch.cuda.is_available() else 'cpu')",
        "amp": "$torch.device(@device).type == 'cuda'",
        "num_workers": 0,
        "num_classes": task.num_classes,
        **{name: value if training else _trained(name, value) for name, value in given_values(task).items()},
        "network_def": {
            "_target_": f"monai_iunet.{'SegEnsemble' if ensemble else 'SegIUNet'}",
            **({"members": task.members} if ensemble else {}),
            "spatial_dims": 3,
            "in_channels": task.in_channels,
            "out_channels": "@num_classes",
            "channels": list(task.channels),
            "couplings": list(task.couplings),
            **({} if task.strides is None else {"strides": [list(stride) for stride in task.strides]}),
            **({} if task.activations == "invert" else {"activations": _as_list(task.activations)}),
        },
    }


def trained_network() -> Config:
    """Return the entries of a config that applies trained weights."""
    return {
        "network": "$@network_def.to(@device)",
        "checkpoint": "$os.path.join(@bundle_root, 'models', 'model.pt')",
        "output_dir": "$os.path.join(@bundle_root, 'eval')",
    }


def begin(distributed: bool, *switches: str) -> list[str]:
    """Return what a run does first: it checks options and switches, by their names, and joins the other processes."""
    backend = "'nccl' if torch.cuda.is_available() else 'gloo'"
    named = ", ".join(f"{name}=@{name}" for name in ("amp", "check_data", "skip_bad_cases", *switches))
    join = [f"$torch.distributed.init_process_group({backend})"] if distributed else []
    return ["$monai_iunet.check_overrides()", f"$monai_iunet.check_switches({named})", *join]


def end(distributed: bool) -> list[str]:
    """Return what a distributed run does last."""
    return ["$torch.distributed.destroy_process_group()"] if distributed else []


def evaluator(section: str, network: str, key_metric: bool = False) -> Config:
    """Return an evaluator whose parts are in a section, such as `@validate#`."""
    config = {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": f"{section}dataloader",
        "network": network,
        "inferer": f"{section}inferer",
        "postprocessing": f"{section}postprocessing",
        "val_handlers": f"{section}handlers",
        "amp": "@amp",
    }
    return {**config, "key_val_metric": f"{section}key_metric"} if key_metric else config


def load_checkpoint() -> Config:
    """Return the handler that loads the trained weights."""
    return {
        "_target_": "CheckpointLoader",
        "load_path": "@checkpoint",
        "load_dict": {"model": "@network"},
        "map_location": "@device",
    }


def inferer(task: Task, preprocessing: str, save_probabilities: bool = False) -> Config:
    """Return the inferer of evaluation and segmentation, whose result are labels on the grid of the image.

    For tasks without a side it averages over mirror images.

    Args:
        task: the task.
        preprocessing: entry of the transforms that are undone.
        save_probabilities: whether the entry `save_probabilities` decides that probabilities are written.
    """
    labels: Config = {**sliding_window(task), "_target_": "monai_iunet.LabelInferer", "transform": preprocessing}
    flips: Config = {}
    if task.mirrored is not None:
        labels["mirror"] = {"swap": mirrored(task), "enabled": "@test_time_flips"}
        flips = {"test_time_flips": True}
    if save_probabilities:
        labels["probabilities_dir"] = "$@output_dir if @save_probabilities else None"
    return {**flips, "inferer": labels}


def sliding_window(task: Task) -> Config:
    """Return a sliding-window inferer; for images in one piece its window is the image.

    Where `roi_size` is "whole", so is an image that fits into memory.
    """
    return {
        "_target_": "monai_iunet.StreamingInferer",
        "roi_size": [-1, -1, -1] if task.one_piece else "@roi_size",
        "sw_batch_size": 4,
        "overlap": 0.5,
        "mode": "constant" if task.one_piece else "gaussian",
        "cval": beyond(task),
        "shrink": False,
        "divisible_by": divisor(task),
    }


def loss(task: Task) -> Config:
    """Return the loss of a task."""
    config = {"_target_": "DiceCELoss", "softmax": True, "include_background": False}
    if task.partial_labels:
        return {"_target_": "monai_iunet.MarginalLoss", "loss": config}
    if task.one_piece or task.roi_size == WHOLE:  # many voxels, often of many classes
        config["_target_"] = "monai_iunet.ChunkedDiceCELoss"
    return {**config, "to_onehot_y": True}


def log_of_loss() -> Config:
    """Return the arguments with which a handler logs the loss of a step."""
    return {"tag_name": "train_loss", "output_transform": "$monai.handlers.from_engine(['loss'], first=True)"}


def datalist(task: Task, validation: str = "validation", training: bool = False) -> Config:
    """Return the lists of training and validation cases, checked.

    Weights are evaluated on the fold that they were not trained on, unless the config is one to train with.

    Args:
        task: the task.
        validation: section of the data set that is validated on, see `list_cases`.
        training: whether it is.
    """

    without = f", @left_out{', @judges' if task.judges else ''}" if task.left_out or task.judges else ""
    folds = "None, 0" if task.validation_cases else "@fold, @folds"

    def section(name: str | None) -> str:
        return f"monai_iunet.list_cases(@dataset_dir, {name!r}, {folds}, @skip_bad_cases{without})"

    def check(cases: str) -> str:
        values = "" if task.label_values is None else f", label_values={[0, *task.label_values]}"
        values += "" if task.in_channels == 1 else f", channels={task.in_channels}"
        return f"$monai_iunet.check_cases({cases}, @num_classes, @check_data, @skip_bad_cases{values})"

    lists = {"left_out": list(task.left_out)} if without else {}
    lists |= {"judges": list(task.judges)} if task.judges else {}
    if not task.validation_cases:
        sections = {"training": check(section("training")), "validation": check(section(validation))}
        parts = {name: getattr(task, name) for name in split(task)}
        parts = parts if training else {name: _trained(name, value) for name, value in parts.items()}
        return {**parts, **lists, "datalist": sections}
    names = "json.loads(pathlib.Path(@bundle_root, 'configs', 'validation_cases.json').read_text())"
    kept = "[case for case in @cases if os.path.basename(case['image']) {} @validation_cases]"
    return {
        **lists,
        "validation_cases": f"${names}",
        "cases": f"${section(None)}",
        "datalist": {"training": check(kept.format("not in")), "validation": check(kept.format("in"))},
    }


def case_dataset(data: str, transform: str) -> Config:
    """Return a dataset that is kept in memory."""
    return {
        "_target_": "CacheDataset",
        "data": data,
        "transform": transform,
        "cache_rate": "@cache_rate",
        "progress": False,
    }


def case_loader(dataset: str, batch_size: str | int, distributed: bool, shuffle: bool = False) -> Config:
    """Return a data loader; with `shuffle` one to train with."""
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
