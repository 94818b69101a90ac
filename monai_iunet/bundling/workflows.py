"""The configs of a bundle: to train, to evaluate and to segment, in one process or several."""

from __future__ import annotations

from monai_iunet.bundling.preprocessing import (
    IMAGE_AND_LABEL,
    READER,
    label_transforms,
    largest_component,
    loading,
    map_labels,
    other_contrasts,
    preprocessing,
    random_transforms,
)
from monai_iunet.bundling.sections import (
    Config,
    begin,
    beyond,
    case_dataset,
    case_loader,
    check_record,
    datalist,
    end,
    evaluator,
    header,
    inferer,
    load_checkpoint,
    log_of_loss,
    loss,
    record,
    sliding_window,
    split,
    trained_network,
)
from monai_iunet.bundling.task import Task

__all__ = ["any_contrast_config", "evaluate_config", "inference_config", "train_config"]


def train_config(task: Task, distributed: bool = False) -> Config:
    """Return `train.json`, or `multi_gpu_train.json`."""
    return {
        **header(task, distributed, training=True),
        "growing": [list(size) for size in task.growing],
        "network": _network_in_training(distributed),
        "ckpt_dir": "$os.path.join(@bundle_root, 'models')",
        "output_dir": "$os.path.join(@bundle_root, 'train')",
        "seed": 0,
        "resume": False,
        "pretrained": None,
        "check_data": True,
        "skip_bad_cases": False,
        "max_epochs": task.max_epochs,
        "val_interval": task.val_interval,
        "patience": 20,
        "batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "cache_rate": 1.0,
        "loss": loss(task),
        **_optimization(task),
        **datalist(task, training=True),
        "deterministic_transforms": preprocessing(task, IMAGE_AND_LABEL),
        "train": _train_section(task, distributed),
        "validate": _validate_section(task, distributed),
        **_saving(task),
        # Nothing here that reads data: `monai.bundle.load` initializes too.
        "initialize": [*begin(distributed, "resume"), "$monai.utils.set_determinism(seed=@seed)"],
        "run": ["$@train#trainer.run()"],
        "finalize": end(distributed),
    }


def _network_in_training(distributed: bool) -> str:
    network = "@network_def.to(@device)"
    return f"$torch.nn.parallel.DistributedDataParallel({network})" if distributed else f"${network}"


def kept_components(task: Task) -> bool | list[int]:
    """Return of which structures the largest component alone is kept, as the configs say it."""
    kept = task.largest_component
    return kept if isinstance(kept, bool) else list(kept)


def _optimization(task: Task) -> Config:
    """Return the optimizer, its schedule, and the average of the weights."""
    schedule: Config = {"_target_": "torch.optim.lr_scheduler.PolynomialLR", "total_iters": "@max_epochs"}
    if task.max_seconds is not None:
        timed = {"max_seconds": "@max_seconds", "validator": "@validate#evaluator", "val_interval": "@val_interval"}
        schedule = {"_target_": "monai_iunet.TimedDecay", **timed}
    return {
        **({} if task.max_seconds is None else {"max_seconds": task.max_seconds}),
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "params": "$@network.parameters()",
            "lr": "@learning_rate",
            "weight_decay": 0.01,
        },
        "lr_scheduler": {**schedule, "optimizer": "@optimizer", "power": 0.9},
        # The average of the weights over about the last 300 steps is validated and saved.
        "average": {"_target_": "monai_iunet.WeightAverage", "model": "@network", "momentum": 0.003},
    }


def any_contrast_config(task: Task) -> Config:
    """Return `any_contrast.json`, to be laid over `train.json`: goes on from the weights, and learns other contrasts.

    What it makes is `train/any_contrast/model_final.pt`.
    """
    return {
        "pretrained": "$os.path.join(@bundle_root, 'models', 'model.pt')",
        "ckpt_dir": "$os.path.join(@output_dir, 'any_contrast')",
        "max_epochs": 100,
        "learning_rate": 1.5e-3,
        "val_interval": 10,
        "patience": 1000,  # validation cases have one contrast, which is not what is to be learned
        "train#label_transforms": label_transforms(task) + other_contrasts(task),
    }


def _train_section(task: Task, distributed: bool) -> Config:
    not_first = {"_disabled_": "$@rank > 0"}
    first = "train#label_maps" if task.synthetic else "deterministic_transforms"
    validation = {
        "_target_": "ValidationHandler",
        "validator": "@validate#evaluator",
        "epoch_level": True,
        "interval": "@val_interval",
    }
    return {
        **({"label_maps": loading(IMAGE_AND_LABEL)} if task.synthetic else {}),
        "label_transforms": label_transforms(task),
        "random_transforms": random_transforms(task),
        "preprocessing": {
            "_target_": "Compose",
            "transforms": f"$@{first} + @train#label_transforms + @train#random_transforms",
        },
        "dataset": case_dataset("$@datalist['training']", "@train#preprocessing"),
        "dataloader": {
            **case_loader("@train#dataset", "@batch_size", distributed, shuffle=True),
            "collate_fn": {"_target_": "monai_iunet.CollatePadded", "cval": beyond(task)},
            # Unless nothing would be left: MONAI's trainer then skips the training.
            "drop_last": "$len(@train#dataset) >= @batch_size * int(os.environ.get('WORLD_SIZE', 1))",
        },
        "inferer": {"_target_": "monai_iunet.AutocastInferer" if task.autocast else "SimpleInferer"},
        # Whoever runs the trainer has all that a training needs: every handler attaches itself.
        "handlers": [
            {
                "_target_": "monai_iunet.StartFrom",
                "path": "@pretrained",
                "networks": ["@network_def", "$@average.ema_model"],
                "_disabled_": "$not @pretrained",
            },
            {
                "_target_": "monai_iunet.GrowingPatches",
                "sizes": "$[*@growing, @roi_size]",
                "schedule": "@lr_scheduler",
                "_disabled_": "$not @growing",
            },
            {"_target_": "ignite.handlers.ProgressBar", "disable": "$@rank > 0"},
            {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler", "print_lr": "$@rank == 0"},
            *([] if task.max_seconds else [validation]),  # a timed training validates by its time
            {"_target_": "StatsHandler", **log_of_loss(), **not_first},
            {"_target_": "TensorBoardStatsHandler", "log_dir": "@output_dir", **log_of_loss(), **not_first},
            # Last, so that what the others do at the end of an epoch is in what is saved.
            {
                "_target_": "monai_iunet.HandlerGroup",
                "handlers": ["@average", *(["@lr_scheduler"] if task.max_seconds else []), "@checkpoints"],
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
    }


def _validate_section(task: Task, distributed: bool) -> Config:
    not_first = {"_disabled_": "$@rank > 0"}
    one_hot = {
        "_target_": "AsDiscreted",
        "keys": ["pred", "label"],
        "argmax": [True, False],
        "to_onehot": "@num_classes",
    }
    return {
        "preprocessing": {"_target_": "Compose", "transforms": "@deterministic_transforms"},
        "dataset": case_dataset("$@datalist['validation']", "@validate#preprocessing"),
        "dataloader": case_loader("@validate#dataset", 1, distributed),
        "inferer": sliding_window(task),
        "postprocessing": {"_target_": "Compose", "transforms": [one_hot]},
        "key_metric": {
            "val_mean_dice": {
                "_target_": "MeanDice",
                "include_background": False,
                "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
            }
        },
        "handlers": [
            {"_target_": "StatsHandler", "iteration_log": False, **not_first},
            {"_target_": "TensorBoardStatsHandler", "log_dir": "@output_dir", "iteration_log": False, **not_first},
            {"_target_": "monai_iunet.PictureHandler", "log_dir": "@output_dir", **not_first},
            "@early_stop",
        ],
        "evaluator": evaluator("@validate#", "$@average.ema_model", key_metric=True),
    }


def _flips(task: Task) -> list[str]:
    """Return the switch of the mean over mirror images, of a task that has it."""
    return [] if task.mirrored is None else ["test_time_flips"]


def _saving(task: Task) -> Config:
    """Return what stops a training early and saves its state."""
    return {
        "early_stop": {
            "_target_": "monai_iunet.EarlyStop",
            "patience": "@patience",
            "metric": "val_mean_dice",
        },
        "checkpoints": {
            "_target_": "monai_iunet.Checkpoints",
            "folder": "@ckpt_dir",
            "model": "$@average.ema_model",
            "state": {
                "network": "@network_def",
                "optimizer": "@optimizer",
                "lr_scheduler": "@lr_scheduler",
            },
            "seed": "$@seed + 1000 * @rank",
            "resume": "@resume",
            "writes": "$@rank == 0",
            "validator": "@validate#evaluator",
            "early_stop": "@early_stop",
            "record": f"${_record_of_training(task)}",
        },
    }


def _record_of_training(task: Task) -> str:
    """Return the expression of what a training is given, with what the weights that it begins with were trained on."""
    seen = "@pretrained and monai_iunet.trained_value(@pretrained, 'trained_on', None)"
    return record(task, "@deterministic_transforms", "growing", *split(task), trained_on=seen)


def evaluate_config(task: Task, distributed: bool = False) -> Config:
    """Return `evaluate.json`, or `multi_gpu_evaluate.json`: validation cases, compared on the grids of their images.

    It may be used alone, or laid over `train.json`, as other programs do; its own sections replace those of training.
    """
    return {
        **header(task, distributed),
        **trained_network(),
        "check_data": True,
        "skip_bad_cases": False,
        "fit_quality": task.in_channels == 1 and task.label_values is None,  # what a quality model is made for
        "structures": list(task.classes),
        **datalist(task, "judges" if task.judges and task.members > 1 else "validation"),
        **inferer(task, "@validate#preprocessing"),
        "largest_component": kept_components(task),
        "validate": {
            "preprocessing": {
                "_target_": "Compose",
                "transforms": [
                    # The labels as they are in the file, beside those on the grid of the network.
                    {"_target_": "CopyItemsd", "keys": "label", "names": "reference"},
                    {"_target_": "LoadImaged", "keys": "reference", "reader": READER, "ensure_channel_first": True},
                    *map_labels(task, "reference"),
                    *preprocessing(task, IMAGE_AND_LABEL),
                ],
            },
            "dataset": {
                "_target_": "Dataset",
                "data": "$@datalist['validation']",
                "transform": "@validate#preprocessing",
            },
            "dataloader": case_loader("@validate#dataset", 1, distributed),
            "inferer": "@inferer",
            "postprocessing": {
                "_target_": "Compose",
                "transforms": [largest_component()],
            },
            "handlers": [
                load_checkpoint(),
                {
                    "_target_": "monai_iunet.CaseReport",
                    "output_dir": "@output_dir",
                    "structures": "@structures",
                    "label_key": "reference",
                },
                {"_target_": "StatsHandler", "iteration_log": False, "_disabled_": "$@rank > 0"},
            ],
            "evaluator": evaluator("@validate#", "@network"),
        },
        # By these names programs for inference find them.
        "dataset": "@validate#dataset",
        "evaluator": "@validate#evaluator",
        "initialize": [
            *begin(distributed, "fit_quality", "largest_component", *_flips(task)),
            "$monai.utils.set_determinism(seed=0)",
            check_record(task, "@validate#preprocessing", *split(task)),
            "$monai_iunet.check_postprocessing(@validate#inferer, @validate#postprocessing)",
        ],
        "run": [_check_structures(task), _check_unseen(), "$@validate#evaluator.run()", _fit_quality()],
        "finalize": end(distributed),
    }


def _check_structures(task: Task) -> str:
    """Return what refuses a data set of other structures."""
    values = "" if task.label_values is None else f", {list(task.label_values)}"
    return f"$monai_iunet.check_structures(@dataset_dir, @structures{values})"


def _check_unseen() -> str:
    """Return what says which cases the weights were trained on."""
    return "$monai_iunet.check_unseen(@checkpoint, @datalist['validation']) if @rank == 0 else None"


def _fit_quality() -> str:
    """Return what fits the model of the quality of segmentations, unless there is one of these weights.

    Nor where other weights than the bundle's are evaluated, whose cases may be those that these were trained on.
    """
    fit = "monai_iunet.evaluate_quality(@bundle_root, @datalist, @device, required=False)"
    own = "os.path.realpath(@checkpoint) == os.path.realpath(os.path.join(@bundle_root, 'models', 'model.pt'))"
    return f"${fit} if @fit_quality and @rank == 0 and {own} else None"


def inference_config(task: Task, distributed: bool = False) -> Config:
    """Return `inference.json`, or `multi_gpu_inference.json`: segments images into label maps on their grids."""
    channels = "" if task.in_channels == 1 else f", channels={task.in_channels}"
    images = f"monai_iunet.images_to_segment(@dataset_dir, @output_dir, skip_done=@skip_done{channels})"
    checked = f"monai_iunet.check_images(@images, @check_data, @skip_bad_cases, @max_field_of_view{channels})"
    return {
        **header(task, distributed),
        **trained_network(),
        "skip_done": True,
        "largest_component": kept_components(task),
        "save_probabilities": False,
        "check_data": True,
        "skip_bad_cases": False,
        "max_field_of_view": task.max_field_of_view,
        "images": f"${images}",
        "datalist": f"${checked}",
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing(task, "image")},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": case_loader("@dataset", 1, distributed),
        **inferer(task, "@preprocessing", save_probabilities=True),
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                largest_component(),
                {
                    "_target_": "monai_iunet.SaveImageLabelsd",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                },
            ],
        },
        "handlers": [
            load_checkpoint(),
            {"_target_": "StatsHandler", "iteration_log": False, "_disabled_": "$@rank > 0"},
        ],
        "evaluator": evaluator("@", "@network"),
        "initialize": [
            *begin(distributed, "largest_component", "save_probabilities", "skip_done", *_flips(task)),
            "$monai.utils.set_determinism(seed=0)",
            check_record(task, "@preprocessing"),
            "$monai_iunet.check_postprocessing(@inferer, @postprocessing)",
        ],
        "run": ["$@evaluator.run()"],
        "finalize": end(distributed),
    }
