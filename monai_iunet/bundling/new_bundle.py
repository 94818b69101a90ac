"""New bundles: the folder, with configs, metadata, logging, license and a README to complete."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from monai_iunet.bundling.sections import Config
from monai_iunet.bundling.task import TASKS, Task
from monai_iunet.bundling.workflows import any_contrast_config, evaluate_config, inference_config, train_config
from monai_iunet.errors import InputError
from monai_iunet.io.bundles import bundle_folder
from monai_iunet.io.files import check_folder, whole_folder, write_text
from monai_iunet.io.text import times
from monai_iunet.transforms.patches import WHOLE

__all__ = ["COMMANDS", "bundle_configs", "write_bundle", "write_configs"]

# What a bundle's page says of running and exporting it.
COMMANDS = """\
python -m monai.bundle run --config_file configs/train.json --dataset_dir DATA
python -m monai.bundle run --config_file configs/evaluate.json --dataset_dir DATA
python -m monai.bundle run --config_file configs/inference.json --dataset_dir IMAGES

# TorchScript, for images of any size
python -m monai.bundle ckpt_export network_def --filepath model.ts --ckpt_file models/model.pt \\
    --meta_file configs/metadata.json --config_file configs/inference.json

# TensorRT, on a machine with a GPU, torch-tensorrt and onnx; not tested
python -m monai.bundle trt_export network_def --filepath model_trt.ts --ckpt_file models/model.pt \\
    --meta_file configs/metadata.json --config_file configs/inference.json --use_onnx true --use_trace true"""
NUMPY = "2.2.6"  # the newest version for Python 3.10


def bundle_configs(task: Task) -> dict[str, Config]:
    """Return all configs of a bundle, by the name of their file in `configs`."""
    configs = {}
    for name, make in (("train", train_config), ("evaluate", evaluate_config), ("inference", inference_config)):
        configs[f"{name}.json"] = make(task)
        configs[f"multi_gpu_{name}.json"] = make(task, distributed=True)
    if task.any_contrast_where_doubted:
        configs["any_contrast.json"] = any_contrast_config(task)
    return configs


def write_configs(task: Task, bundle: str | Path) -> None:
    """Write all configs into the folder of a bundle."""
    folder = check_folder(Path(bundle, "configs"))
    for name, config in bundle_configs(task).items():
        write_text(folder / name, json.dumps(config, indent=4) + "\n")


def write_bundle(task: Task, folder: str | Path) -> Path:
    """Write a new bundle, without weights: configs, metadata, logging, license and a README to complete.

    Args:
        task: what the bundle segments.
        folder: is created, whole or not at all.

    Returns:
        The folder.

    Raises:
        InputError: when the folder exists and is not empty.

    Example:
        >>> import tempfile
        >>> task = Task("iunet_liver_ct", "CT", ("liver",), "data", spacing=(1.5, 1.5, 2.0), roi_size=(96, 96, 64))
        >>> folder = write_bundle(task, Path(tempfile.mkdtemp(), task.name))
        >>> sorted(path.name for path in folder.iterdir())
        ['LICENSE', 'configs', 'docs', 'models']
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder. Name another one.")
    with whole_folder(folder) as made:
        for part in ("configs", "docs", "models"):
            check_folder(made / part)
        write_configs(task, made)
        example = bundle_folder()
        for name in ("LICENSE", "configs/logging.conf"):
            write_text(made / name, (example / name).read_text(encoding="utf-8"))
        write_text(made / "configs" / "metadata.json", json.dumps(_metadata(task), indent=4) + "\n")
        write_text(made / "docs" / "README.md", _readme(task))
        license_of_data = f"The license of the data set {task.dataset}, and whom to cite.\n"
        write_text(made / "docs" / "data_license.txt", license_of_data)
    return folder


def _metadata(task: Task) -> Config:
    names = ("background", *task.classes)
    kind = {"MR": "magnitude", "CT": "hounsfield"}[task.modality]
    whole = task.roi_size == WHOLE
    # Of a whole image any multiple, but for a single voxel at the coarsest level.
    shape = [f"{2 * factor}*n" for factor in task.factors] if whole else list(task.roi_size)
    title = f"Segmentation of {', '.join(task.classes)} in {task.modality}"
    patch = {"type": "image", "spatial_shape": shape, "dtype": "float32", "is_patch_data": not whole}
    needed = ("nibabel", "pytorch-ignite", "scikit-image", "tensorboard")
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json",
        "name": f"{title} with an invertible U-Net",
        "version": "0.1.0",
        "changelog": {"0.1.0": "first version"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": NUMPY,
        "required_packages_version": {name: version(name) for name in needed},
        "supported_apps": {},
        "task": title,
        "description": f"An invertible 3D U-Net for the {title[0].lower()}{title[1:]}.",
        "authors": "",
        "copyright": "",
        "data_source": task.dataset,
        "data_type": "nifti",
        "image_classes": f"{task.in_channels} channel{'s' if task.in_channels > 1 else ''}, {task.modality}",
        "label_classes": "single channel, " + ", ".join(f"{value} {name}" for value, name in enumerate(names)),
        "pred_classes": f"{len(names)} channels of logits: {', '.join(names)}",
        "eval_metrics": {},
        **({} if task.max_field_of_view is None else {"max_field_of_view_mm": task.max_field_of_view}),
        **({"weights_where_doubted": "any_contrast"} if task.any_contrast_where_doubted else {}),
        "intended_use": "Research. Not a medical device, not for diagnosis or treatment.",
        "references": ["Etmann, Ke, Schönlieb: iUNets. 2020. arXiv:2005.05220"],
        "network_data_format": {
            "inputs": {
                "image": {
                    **patch,
                    "format": kind,
                    "modality": task.modality,
                    "num_channels": task.in_channels,
                    "value_range": [-5, 5] if task.modality == "MR" else [-1, 1],
                    "channel_def": {str(channel): "image" for channel in range(task.in_channels)},
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


def _readme(task: Task) -> str:
    spacing = times(task.spacing)
    names = ", ".join(f"{value} {name}" for value, name in enumerate(("background", *task.classes)))
    return f"""# {task.name}

Segments {", ".join(task.classes)} in {task.modality} with an invertible U-Net, whose training rebuilds its
activations instead of storing them.

Authors: to complete.

Tags: segmentation, {task.modality}, {", ".join(task.classes)}, invertible U-Net.

## Data

{task.dataset}: a folder of the Medical Segmentation Decathlon or of nnU-Net, or one with `images` and `labels` of equal
names. Where its `dataset.json` has no section "validation", every fifth case is for validation. To complete: how many
cases, from where, by which license.

## Input and output

### Input

{"One channel" if task.in_channels == 1 else f"{task.in_channels} channels"}: {task.modality}, in any orientation and
spacing.

### Output

{task.num_classes} channels of logits, turned into a label map on the grid of the image: {names}.

## System configuration

`monai-iunet plan --bundle .` says how much GPU memory a training step holds, part by part. To complete: the machine of
the training.

## Preprocessing

Images are brought to RAS and voxels of {spacing} mm, and their intensities are normalized.

## Performance

To complete, from `eval/summary.csv`.

## Commands

Install the package `monai-iunet`. In this folder:

```bash
{COMMANDS}
```

## Limitations

For research. Not a medical device, not for diagnosis or treatment.

## Citation

Cite the paper that introduced the architecture, and the data set.

## References

1. Etmann, Ke, Schönlieb, iUNets, 2020, arXiv:2005.05220.

## License

Configs: Apache-2.0. For the data see `data_license.txt`.
"""


if __name__ == "__main__":  # in a clone: python -m monai_iunet.bundling.new_bundle
    for task in TASKS:
        write_configs(task, Path(__file__).parents[2] / "bundles" / task.name)
