"""Other networks in the place of a bundle's own: the same cases, recipe and number of steps, side by side."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.inferers import Inferer
from scipy.stats import bootstrap
from torch import Tensor, nn

from monai_iunet.benchmark.measure import peak_of_training, time_alternately
from monai_iunet.bundling.evaluation_data import bundle_cases
from monai_iunet.errors import InputError
from monai_iunet.io.bundles import parsed_content, read_config
from monai_iunet.io.files import check_folder, files_digest, files_in, hold_folder, write_text
from monai_iunet.io.text import first_line, times
from monai_iunet.training.cases import image_of
from monai_iunet.training.checkpoints import FINAL
from monai_iunet.training.evaluation import mean_dice_of_cases, read_rows
from monai_iunet.transforms.patches import WHOLE

__all__ = [
    "NETWORKS",
    "Config",
    "as_markdown",
    "check_asked",
    "compare_networks",
    "difference",
    "facts_of_cases",
    "interval_text",
    "run_config",
    "run_training",
    "scores",
]

Config = dict[str, Any]

# Of MONAI, in sizes whose training step takes 1.3 and 0.7 times as long as that of the hippocampus bundle.
NETWORKS: dict[str, Config] = {
    "DynUNet": {
        "_target_": "DynUNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "@num_classes",
        "kernel_size": [3, 3, 3, 3],
        "strides": [1, 2, 2, 2],
        "upsample_kernel_size": [2, 2, 2],
        "filters": [20, 40, 80, 160],
    },
    "SegResNet": {
        "_target_": "SegResNet",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": "@num_classes",
        "init_filters": 16,
    },
}
OURS = "SegIUNet"


def compare_networks(
    bundle: str | Path,
    dataset_dir: str | Path,
    output_dir: str | Path,
    max_epochs: int,
    rounds: int = 5,
    networks: Sequence[str] = tuple(NETWORKS),
) -> Config:
    """Train and evaluate the network of a bundle and those in `NETWORKS`, then measure what they cost, in turn.

    Each is trained by the bundle's `train.json`, validated after the last epoch only, so that there is no epoch to
    choose, and evaluated by its `evaluate.json`. A training that was interrupted goes on; one that is done is not
    repeated.

    Args:
        bundle: folder of the bundle.
        dataset_dir: folder with `dataset.json`.
        output_dir: folder for weights, logs and tables of each network, and for `comparison.json`.
        max_epochs: epochs that each is trained.
        rounds: times that a training step and the inference of a case are timed.
        networks: which of `NETWORKS` to compare with.

    Returns:
        What `comparison.json` holds: "max_epochs"; "steps", of each training; "cases" of the evaluation; "networks",
        which has, per network, "dice" and "hausdorff95_mm" per structure, "mean_dice", "parameters",
        "training_bytes", the peak of a training step beside parameters and gradients, and the medians
        "training_step_seconds" and "inference_seconds" of a case; and "ours_minus", which has, per other network, the
        "mean" difference of the cases' mean Dice, and "low" and "high" of its 95 % bootstrap interval, which one case
        does not have. The Dice of a structure that no case has is None.

    Raises:
        InputError: for folders that are none, a bundle that is trained for a time, or a network that does not take its
            patches; when the output folder is that of another bundle or data set, or of other cases, and when a
            training or an evaluation fails.
    """
    bundle, output_dir = Path(bundle), Path(output_dir)
    for needed in (bundle / "configs" / "train.json", Path(dataset_dir, "dataset.json")):
        if not needed.is_file():
            raise InputError(f"{needed}: no such file. Needed are the folder of a bundle and that of a data set.")
    common = {"bundle_root": str(bundle.resolve()), "dataset_dir": str(Path(dataset_dir).resolve())}
    training = _parser(bundle, "train.json", common)
    if "max_seconds" in training:
        raise InputError(
            f"{bundle}: is trained for a time, so networks would be trained for other numbers of steps than "
            "--max-epochs. Use a bundle that is trained for epochs, as fit makes it without --time."
        )
    definitions = _definitions(training, networks)
    cases = bundle_cases(bundle, dataset_dir)  # refuses a data set of other structures
    parsed_content(training, "datalist")  # reads all cases, and lists the bad ones
    folder = check_folder(output_dir.resolve() / f"{max_epochs}_epochs")
    configs = files_digest([bundle / "configs" / name for name in ("train.json", "evaluate.json")])
    asked = {"dataset": common["dataset_dir"], **facts_of_cases(cases), "bundle": bundle.name, "configs": configs}
    with hold_folder(output_dir):
        check_asked(folder, asked)
        figures, dice = {}, {}
        for name, definition in definitions.items():
            settings = {**common, "network_def": definition, "check_data": False}
            _train(bundle, check_folder(folder / name), settings, max_epochs)
            _evaluate(bundle, folder / name, settings)
            rows = read_rows(folder / name / "eval" / "cases.csv")
            figures[name] = scores(rows)
            dice[name] = np.array(list(mean_dice_of_cases(rows).values()))
        for name, costs in _costs(bundle, common, definitions, rounds).items():
            figures[name].update(costs)
        state = torch.load(folder / OURS / "last.pt", map_location="cpu", weights_only=True)
        result = {
            "max_epochs": max_epochs,
            "steps": max(int(parameter["step"]) for parameter in state["optimizer"]["state"].values()),
            "cases": len(dice[OURS]),
            "networks": figures,
            "ours_minus": {name: difference(dice[OURS], dice[name]) for name in networks},
        }
        text = json.dumps(result, indent=4) + "\n"
        write_text(output_dir / "comparison.json", text)
    return result


def _definitions(training: ConfigParser, networks: Sequence[str]) -> dict[str, Config]:
    """Return the networks for the images of a bundle, ours first.

    Raises:
        InputError: when one does not take what the bundle trains on, before hours of training tell.
    """
    ours, size = training["network_def"], training["roi_size"]
    if size == WHOLE:  # three times what images are padded to, which a network does not take that divides by more
        size = [3 * factor for factor in np.broadcast_to(training["validate#inferer#divisible_by"], 3).tolist()]
    definitions = {OURS: ours}
    for name in networks:
        definitions[name] = {**NETWORKS[name], "in_channels": ours.get("in_channels", 1)}
        network = ConfigParser({**training.get(), "network_def": definitions[name]}).get_parsed_content("network_def")
        try:
            network.to("meta")(torch.empty(1, definitions[name]["in_channels"], *size, device="meta"))
        except RuntimeError as error:
            raise InputError(
                f"{name}: takes no images of {times(size)} voxels, as the bundle trains on ({first_line(error)}). "
                "Leave it out of --networks."
            ) from error
    return definitions


def check_asked(folder: Path, asked: Mapping[str, Any]) -> None:
    """Note in a folder what its results are of; refuse to go on with those of something else.

    Args:
        folder: of results.
        asked: what JSON knows.

    Raises:
        InputError: when the folder has results of something else.
    """
    path = folder / "asked.json"
    if not path.is_file():
        write_text(path, json.dumps(asked, indent=1) + "\n")
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged, so that nobody knows what is there. Name another --output.") from error
    changed = [name for name, value in asked.items() if before.get(name) != value]
    if changed:
        raise InputError(
            f"{folder}: a comparison with another {' and another '.join(changed)} is there ({path.name}). Ask for the "
            "same to go on with it, or name another --output."
        )


def facts_of_cases(cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> Config:
    """Return what tells the cases of a comparison from others: names, and a digest of all images and labels."""
    parts = [part for section in cases.values() for case in section for part in (case["image"], case["label"])]
    paths = [Path(file) for part in parts for file in (part if isinstance(part, list) else [part])]
    names = {section: [Path(image_of(case)).name for case in cases[section]] for section in cases}
    return {"cases": names, "contents": files_digest([file for path in paths for file in files_in(path)])}


def as_markdown(result: Mapping[str, Any]) -> str:
    """Return the tables of a README: Dice and 95 % Hausdorff distance per structure, costs, and the differences."""
    networks = result["networks"]
    lines = [_row("", *networks), _row("---", *["---"] * len(networks))]
    for structure in networks[OURS]["dice"]:
        scores = ((network["dice"][structure], network["hausdorff95_mm"][structure]) for network in networks.values())
        lines.append(
            _row(f"{structure}, Dice / HD95", *(f"{_dice(dice)} / {_millimeters(hd95)}" for dice, hd95 in scores))
        )
    figures = {
        "mean Dice": lambda network: f"**{network['mean_dice']:.3f}**",
        "parameters": lambda network: f"{network['parameters'] / 1e6:.1f} M",
        "memory of a training step": lambda network: f"{network['training_bytes'] / 2**20:.0f} MiB",
        "training step": lambda network: f"{network['training_step_seconds']:.2f} s",
        "inference of a case": lambda network: f"{network['inference_seconds']:.2f} s",
    }
    lines += [_row(name, *map(write, networks.values())) for name, write in figures.items()]
    lines += ["", _row(f"{OURS} minus", "mean Dice", "95 % interval"), _row("---", "---", "---")]
    for name, found in result["ours_minus"].items():
        lines.append(_row(name, "{mean:+.4f}".format(**found), interval_text(found)))
    return "\n".join(lines) + "\n"


def interval_text(found: Mapping[str, Any]) -> str:
    """Return the interval of a difference as text; one case has none."""
    return "none" if found["low"] is None else "{low:+.4f} to {high:+.4f}".format(**found)


def _dice(dice: float | None) -> str:
    """Return a Dice as text; there is none of a structure that no case has."""
    return "none" if dice is None else f"{dice:.3f}"


def _millimeters(distance: float | None) -> str:
    """Return a distance as text; there is none to a structure that was not found at all."""
    return "none" if distance is None else f"{distance:.1f} mm"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _train(bundle: Path, folder: Path, settings: Config, max_epochs: int) -> None:
    last, final = folder / "last.pt", folder / FINAL
    if last.is_file() and _epochs_done(last) == max_epochs and final.is_file():
        return
    options = {"max_epochs": max_epochs, "val_interval": max_epochs, "resume": True}
    run_training(bundle, {**settings, **options, "ckpt_dir": str(folder), "output_dir": str(folder / "log")}, final)


def _epochs_done(last: Path) -> int:
    try:
        return int(torch.load(last, map_location="cpu", weights_only=True)["epoch"])
    except Exception as error:  # whatever damaged files bring about
        raise InputError(f"{last}: not a state of a training. Remove it to train anew.") from error


def _evaluate(bundle: Path, folder: Path, settings: Config) -> None:
    if not (folder / "eval" / "summary.csv").is_file():
        options = {"checkpoint": str(folder / "model.pt"), "output_dir": str(folder / "eval")}
        run_config(bundle, "evaluate.json", {**settings, **options})


def run_training(bundle: Path, settings: Config, final: Path) -> None:
    """Run the training of a bundle, which ends with a file that is not there yet.

    One that was killed when its last state was written, or found no room for more, writes that file when it is called
    again, and then refuses to go on.

    Raises:
        InputError: when it fails.
    """
    try:
        run_config(bundle, "train.json", settings)
    except InputError:
        if not final.is_file():
            raise


def run_config(bundle: Path, config: str, settings: Config) -> None:
    """Run a config of a bundle by `python -m monai.bundle run`, with its output where ours goes.

    Raises:
        InputError: when it fails.
    """
    configs = bundle.resolve() / "configs"
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(configs / config)]
    words += ["--logging_file", str(configs / "logging.conf")]
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    # One that outlives this process goes on to hold the folder that this one holds.
    code = subprocess.run(words, check=False, close_fds=False).returncode
    if code:
        network = f" with {settings['network_def']['_target_']}" if "network_def" in settings else ""
        raise InputError(f"{config} of {bundle}{network}: failed with code {code}.")


def scores(rows: list[dict[str, str]]) -> Config:
    """Return means over the cases of a table: "dice" and "hausdorff95_mm" per structure, and "mean_dice".

    A structure that no case has, has no Dice and no part in the mean.
    """
    structures = list(dict.fromkeys(row["structure"] for row in rows))

    def means(measure: str) -> dict[str, float | None]:
        values = {name: [float(row[measure]) for row in rows if row["structure"] == name] for name in structures}
        known = {name: [number for number in numbers if not np.isnan(number)] for name, numbers in values.items()}
        found = {name: float(np.mean(numbers)) if numbers else np.nan for name, numbers in known.items()}
        return {name: mean if np.isfinite(mean) else None for name, mean in found.items()}

    dice = means("dice")
    known = [mean for mean in dice.values() if mean is not None]
    if not known:
        raise InputError("No case has a structure, so there is nothing to compare. Name a data set with labels.")
    return {"dice": dice, "hausdorff95_mm": means("hausdorff95_mm"), "mean_dice": float(np.mean(known))}


def difference(ours: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """Return the mean difference of the same cases, and "low" and "high" of its 95 % bootstrap interval.

    One case tells nothing of others: it has no interval.
    """
    gains = ours - other
    if len(gains) == 1:
        return {"mean": float(gains[0]), "low": None, "high": None}
    if np.ptp(gains) == 0:
        return dict.fromkeys(("mean", "low", "high"), float(gains[0]))
    interval = bootstrap((gains,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return {"mean": float(gains.mean()), "low": float(interval.low), "high": float(interval.high)}


def _parser(bundle: Path, config: str, settings: Mapping[str, Any]) -> ConfigParser:
    parser = read_config(bundle / "configs" / config)
    parser.update(dict(settings))
    return parser


def _costs(bundle: Path, common: Config, definitions: Mapping[str, Config], rounds: int) -> dict[str, Config]:
    """Measure parameters, memory of a training step, and times, taken in turn so that all meet the same machine."""
    settings = {**common, "check_data": False, "cache_rate": 0.0}
    steps: dict[str, Callable[[], object]] = {}
    inferences: dict[str, Callable[[], object]] = {}
    costs: dict[str, Config] = {}
    batch: Any = None
    case: Any = None
    for name, definition in definitions.items():
        training = _parser(bundle, "train.json", {**settings, "network_def": definition})
        network = training.get_parsed_content("network")
        loss, device = training.get_parsed_content("loss"), training.get_parsed_content("device")
        if batch is None:
            batch = next(iter(training.get_parsed_content("train#dataloader")))
        evaluation = _parser(bundle, "evaluate.json", {**settings, "network_def": definition})
        inferer = evaluation.get_parsed_content("inferer")
        if case is None:
            case = next(iter(evaluation.get_parsed_content("validate#dataloader")))["image"]
        image, label = (torch.as_tensor(batch[key]).to(device) for key in ("image", "label"))
        steps[name] = partial(_step, network, loss, image, label)
        inferences[name] = partial(_infer, network, inferer, torch.as_tensor(case).to(device))
        costs[name] = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "training_bytes": peak_of_training(network, steps[name]),
        }
    device = torch.device(device)
    for key, actions in (("training_step_seconds", steps), ("inference_seconds", inferences)):
        for name, seconds in time_alternately(actions, rounds, device).items():
            costs[name][key] = statistics.median(seconds)
    return costs


def _step(network: nn.Module, loss: nn.Module, image: Tensor, label: Tensor) -> None:
    network.train()
    loss(network(image), label).backward()


def _infer(network: nn.Module, inferer: Inferer, image: Tensor) -> None:
    network.eval()
    with torch.no_grad():
        inferer(image, network)
