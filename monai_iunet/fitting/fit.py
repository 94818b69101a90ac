"""From images and labels to a bundle: fingerprint, plan, folds, cross-validation, and the best of the networks.

Asked for, one more network is trained on all cases, and is the bundle's: no case is left to judge it, so the figures
are those of the folds' networks, which were trained alike.

All state is in the folder of the bundle, so a fit that was killed goes on when it is called again: the fingerprint and
the plan are read, folds that are done are left out, and the training of the others goes on after its last epoch. For
the same reason several processes can share the folds: torchrun starts them, and each does its part.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic, process_time, sleep
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from rich.console import Console

from monai_iunet.bundling.evaluation_data import bundle_cases
from monai_iunet.bundling.fit_quality import as_markdown, evaluate_quality
from monai_iunet.bundling.new_bundle import write_bundle, write_configs
from monai_iunet.bundling.report import draw_cases, draw_training
from monai_iunet.bundling.task import Task
from monai_iunet.bundling.workflows import evaluate_config
from monai_iunet.errors import InputError
from monai_iunet.fitting.cross_validation import (
    Score,
    best_fold,
    choose_clean_up,
    mean_dice,
    read_scores,
    score_table,
    summarize,
)
from monai_iunet.fitting.ensemble import Comparison, Judged, write_ensemble
from monai_iunet.fitting.fingerprint import (
    Fingerprint,
    draw_fingerprint,
    fingerprint_tables,
    read_fingerprint,
    take_fingerprint,
    write_fingerprint,
)
from monai_iunet.fitting.limits import measure_limits
from monai_iunet.fitting.page import Evaluated, write_page, write_results
from monai_iunet.fitting.plan import FitPlan, plan_table, read_plan
from monai_iunet.fitting.planner import Wishes, count_parts, make_plan
from monai_iunet.fitting.state import FitState
from monai_iunet.io.bundles import parsed_content, read_config
from monai_iunet.io.files import (
    check_folder,
    check_whole_folder,
    hold_folder,
    whole_folder,
    write_atomically,
    write_text,
)
from monai_iunet.planning.budget import for_a_step
from monai_iunet.segmentation.quality import QualityModel, weights_digest, write_quality
from monai_iunet.segmentation.share import Share
from monai_iunet.training.cases import image_of
from monai_iunet.training.checkpoints import FINAL
from monai_iunet.training.dataset import LabeledData, list_cases, read_labeled_data
from monai_iunet.training.evaluation import write_rows
from monai_iunet.training.record import record_file
from monai_iunet.transforms.patches import read_size

__all__ = ["FitOptions", "fit", "parse_seconds"]

logger = logging.getLogger(__name__)

TABLE = "cases.csv"  # which an evaluation has when it is done
ENSEMBLE = "ensemble"
ALL_CASES = "all_cases"  # in place of a fold
WAIT = 1.0  # seconds between two looks for what another process writes
MOST_RESTARTS = 3  # of a training that diverges, each with half of the learning rate
MOST_WORKERS = 8  # of a data loader beside a GPU
BYTES_PER_VOXEL = 8  # of a case in memory: image and label, float32

Fold = int | str | None  # its number; None for the data set's own split; or ALL_CASES


@dataclass(frozen=True)
class FitOptions:
    """What a fit may take and which folds it trains; see `fit`.

    Example:
        >>> FitOptions(seconds=3600).folds is None
        True
    """

    memory: int | None = None
    seconds: float | None = None
    folds: int | None = None
    fold: int | None = None
    modality: str | None = None
    device: str | None = None
    skip_bad_cases: bool = False
    wishes: Wishes = field(default_factory=Wishes)


def fit(
    dataset: str | Path,
    output: str | Path,
    *,
    gpu_memory: int | str | None = None,
    time: float | str | None = None,
    folds: int | None = None,
    fold: int | None = None,
    modality: str | None = None,
    spacing: Sequence[float] | None = None,
    roi_size: Sequence[int] | str | None = None,
    growing: bool = False,
    missing_labels: str | None = None,
    all_cases: bool = False,
    device: str | None = None,
    skip_bad_cases: bool = False,
    plan_only: bool = False,
    console: Console | None = None,
) -> Path:
    """Train and evaluate a bundle from images and labels, without another choice.

    Called again after an interruption it goes on. Of several processes that torchrun starts, each trains its share of
    the folds.

    Args:
        dataset: folder of a data set, see `list_cases`.
        output: folder of the bundle; its name becomes the bundle's.
        gpu_memory: of the GPU, in bytes or such as "24 GiB", of which a step takes at most nine tenths; by default what
            there is, or half of the memory of the machine.
        time: seconds that everything may take, or such as "12h" or "90min"; by default as long as about 10,000 steps of
            each fold take.
        folds: number of folds that are trained; by default five where the time is enough, else one of five.
        fold: the only fold to train.
        modality: "MR" or "CT", where the names of the channels do not say it.
        spacing: of the voxels that the network sees, in mm; by default as the images and the time say.
        roi_size: patch, in voxels, or "whole" to train on whole images and to segment them whole; by default a patch as
            large as the images, memory and time say.
        growing: begin with smaller patches.
        missing_labels: what a structure is in a case whose label has no voxel of it: "background", it is absent, or
            "unlabeled", which is no part of the loss; by default unlabeled where it is of like size in other cases.
        all_cases: train one more network at the end, on all labeled cases, for the bundle: its figures are those of the
            folds, and folds are not made an ensemble. A fit that is finished can be asked for it, too; it then takes as
            long again as a fold.
        device: where the network is trained; by default the first GPU, or the CPU if there is none.
        skip_bad_cases: leave out cases that cannot be learned from, saying so.
        plan_only: stop when the plan is made.
        console: where tables are printed; nowhere by default.

    Returns:
        The folder of the bundle.

    Raises:
        InputError: when the data set or an option cannot be used; all bad cases are listed together.

    Example:
        >>> import tempfile
        >>> fit(tempfile.mkdtemp(), "bundle")
        Traceback (most recent call last):
            ...
        monai_iunet.errors.InputError: ...: not a data set. It must have ...
    """
    try:
        memory = None if gpu_memory is None else for_a_step(gpu_memory)
    except ValueError as error:
        raise InputError(f"gpu_memory {gpu_memory}: {error}") from error
    seconds = None if time is None else parse_seconds(time)
    size = None if roi_size is None else read_size(roi_size)
    voxels = None if spacing is None else tuple(map(float, spacing))
    wishes = Wishes(voxels, size, growing, missing_labels, all_cases)
    options = FitOptions(memory, seconds, folds, fold, modality, device, skip_bad_cases, wishes)
    run = _Fit(Path(dataset), Path(output), options, console or Console(quiet=True))
    run.prepare()
    if plan_only or run.is_finished:
        return Path(output)
    # Of the processes that torchrun has started, the first one holds the folder for all.
    with hold_folder(run.folder) if run.share.index == 0 else contextlib.nullcontext():
        run.train()
        run.evaluate()
        if run.share.index == 0:
            run.wait()
            run.finish()
    return Path(output)


def parse_seconds(duration: float | str) -> float:
    """Return seconds, from a number or from text such as "12h" or "90 min".

    Raises:
        InputError: for anything else.

    Example:
        >>> parse_seconds("1.5h"), parse_seconds("90 min"), parse_seconds("1h 30min")
        (5400.0, 5400.0, 5400.0)
    """
    units = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1}
    text = f"{duration}s" if isinstance(duration, (int, float)) else duration.strip()
    parts = re.findall(r"([0-9.]+)\s*(d|h|min|m|s)\b\s*", text)
    try:
        seconds = sum(float(number) * units[unit] for number, unit in parts)
    except ValueError:
        seconds = 0.0
    if seconds <= 0 or re.sub(r"([0-9.]+)\s*(d|h|min|m|s)\b\s*", "", text):
        raise InputError(f"time {duration}: must be such as 12h, 90min or 1h 30min.")
    return seconds


class _Fit:
    """A fit, step by step."""

    def __init__(self, dataset: Path, output: Path, options: FitOptions, console: Console) -> None:
        # Absolute, since MONAI evaluates text in a config that begins with $, @ or %.
        self.dataset = dataset.absolute()
        self.folder = output.absolute()
        self.state = FitState(self.folder, self.dataset)
        self.options = options
        self.share = Share.parse("auto") if "RANK" in os.environ else Share()
        self.console = console if self.share.index == 0 else Console(quiet=True)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda" and self.share.count > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        self.plan: FitPlan
        self.fingerprint: Fingerprint

    def prepare(self) -> None:
        """Take the fingerprint and make the plan, or read both."""
        docs = self.folder / "docs"
        asked = {
            "dataset": os.path.realpath(self.dataset),
            "memory": self.options.memory,
            "seconds": self.options.seconds,
            "folds": self.options.folds,
            "fold": self.options.fold,
            "modality": self.options.modality,
            **json.loads(json.dumps(asdict(self.options.wishes))),
        }
        while self.share.index > 0 and not self.state.file.is_file():
            sleep(WAIT)  # the first process makes the plan
        if self.state.file.is_file():
            self.state.check_asked({name: value for name, value in asked.items() if name != ALL_CASES})  # it adds only
            self.plan, self.fingerprint = read_plan(docs / "plan.json"), read_fingerprint(docs / "fingerprint.json")
            if not self.is_finished:
                planned = [Path(case.name).name for case in self.fingerprint.cases]
                self.state.check_cases(planned, self._cases(None, None))
            logger.info("%s: going on with the fit that is there", self.folder)
        else:
            self._begin(asked)
        self.console.print(fingerprint_tables(self.fingerprint))
        self.console.print(plan_table(self.plan))

    def _begin(self, asked: Mapping[str, Any]) -> None:
        """Read the data set, make the plan, and write the folder, whole or not at all."""
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder}: exists and is not an empty folder. Name another --output.")
        data = read_labeled_data(self.dataset)
        # Before all images are read, though bad ones may be left out then.
        count_parts(len(data.training), self.options.folds, self.options.fold, bool(data.validation))
        check_whole_folder(self.folder)
        self.fingerprint = take_fingerprint(data, self.options.modality, self.options.skip_bad_cases)
        self.plan = self._make_plan(data)
        try:
            with whole_folder(self.folder) as folder:
                write_bundle(self.plan.task, folder)
                docs = folder / "docs"
                write_fingerprint(self.fingerprint, docs / "fingerprint.json")
                draw_fingerprint(self.fingerprint, docs / "fingerprint.png")
                write_text(docs / "plan.json", json.dumps(self.plan.as_json(), indent=1) + "\n")
                self.state.write(folder, asked, [*data.training, *(data.validation or [])])
        except OSError as error:
            if not self.state.file.is_file():
                raise
            raise InputError(
                f"{self.folder}: another process has begun a fit in it meanwhile. Call it again to go on with that "
                "one, or name another --output."
            ) from error

    def _make_plan(self, data: LabeledData) -> FitPlan:
        memory = self.options.memory or _memory(self.device)
        limits = replace(measure_limits(self.device, memory, self.options.seconds), at_once=self.share.count)
        own = set(map(image_of, data.validation or []))
        name = re.sub(r"\W+", "_", os.path.basename(os.path.realpath(self.folder)), flags=re.ASCII)
        return make_plan(
            self.fingerprint,
            name,
            self.dataset.resolve().name,
            limits,
            self.options.folds,
            self.options.fold,
            validation_cases=sum(case.name in own for case in self.fingerprint.cases),
            wishes=self.options.wishes,
        )

    @property
    def is_finished(self) -> bool:
        """Whether the bundle is complete."""
        state = self.state.read()
        return bool(state.get("finished")) and (not self._has_all_cases or bool(state.get(ALL_CASES)))

    @property
    def _has_all_cases(self) -> bool:
        return self.options.wishes.all_cases

    def train(self) -> None:
        """Train each fold that is not done, of several processes each its share of them; and so with all cases."""
        for fold in self._own_trainings():
            is_evaluated = fold != ALL_CASES and (self._evaluation(fold, True) / TABLE).is_file()
            if not is_evaluated and not (self._models(fold) / FINAL).is_file():
                self._train_fold(fold)

    def _own_trainings(self) -> Sequence[Fold]:
        trainings: tuple[Fold, ...] = (*self.plan.folds, *([ALL_CASES] if self._has_all_cases else []))
        return trainings[self.share.index :: self.share.count]

    def _train_fold(self, fold: Fold) -> None:
        noted = check_folder(self._models(fold)) / "learning_rate.json"
        for restart in range(MOST_RESTARTS + 1):
            factor = json.loads(noted.read_text(encoding="utf-8"))["factor"] if noted.is_file() else 1.0
            try:
                self._run_training(fold, factor)
                return
            except FloatingPointError as error:
                if restart == MOST_RESTARTS:
                    raise InputError(f"{_name(fold)}: still diverges after {restart} restarts. {error}") from error
                logger.warning("%s: %s It goes on with half of its learning rate.", _name(fold), error)
                write_text(noted, json.dumps({"factor": factor / 2}) + "\n")

    def _run_training(self, fold: Fold, factor: float) -> None:
        parser = self._parser("train.json", fold)
        parser.update(
            {
                "ckpt_dir": str(self._models(fold)),
                "output_dir": str(self.folder / "train" / _name(fold)),
                "resume": True,
                "patience": 1_000_000,
                "learning_rate": self.plan.task.learning_rate * factor,  # lower after it has diverged
                "cache_rate": self._cache_rate(),
                # Of as many processes, each trains a fold of its own.
                "train#dataloader#drop_last": "$len(@train#dataset) >= @batch_size",
                "num_workers": 0 if self.device.type == "cpu" else min(MOST_WORKERS, os.cpu_count() or 1),
            }
        )
        if fold == ALL_CASES:
            # No case is left to choose the best epoch by: the last one is used, and looked at with cases of a fold.
            cases = {"training": self._cases(None, None), "validation": self._cases("validation", self.plan.folds[0])}
            parser.update({"datalist": cases, "val_interval": parser["max_epochs"]})
        for handler in parser["train"]["handlers"]:
            if isinstance(handler, dict) and handler["_target_"].endswith("ProgressBar"):
                handler["disable"] = not sys.stderr.isatty()
        parsed_content(parser, "initialize")  # first, so that the network begins with weights that the seed gives
        try:
            trainer, validator = parsed_content(parser, "train#trainer"), parsed_content(parser, "validate#evaluator")
        except InputError:
            if (self._models(fold) / FINAL).is_file():  # it was killed when all epochs were done
                return
            raise

        def report(engine: Any) -> None:
            state = engine.state
            logger.info(
                "%s, epoch %d: Dice %.3f, best %.3f after epoch %d",
                _name(fold),
                trainer.state.epoch,
                state.metrics["val_mean_dice"],
                state.best_metric,
                state.best_metric_epoch,
            )

        validator.add_event_handler(Events.COMPLETED, report)
        trainer.run()
        if validator.state.best_metric_epoch < 0:
            raise InputError(f"{_name(fold)}: no network was better than none. Check the labels, or give it more time.")

    def _cache_rate(self) -> float:
        """Return the share of the cases that half of the machine's memory holds."""
        spacing = self.plan.task.spacing
        voxels = sum(
            float(torch.tensor(case.extent).prod() / torch.tensor(spacing).prod()) for case in self.fingerprint.cases
        )
        needed = voxels * BYTES_PER_VOXEL * self.plan.task.in_channels
        return min(1.0, _memory(torch.device("cpu")) / needed)

    def evaluate(self) -> None:
        """Evaluate each fold on the cases that it was not trained on, with and without clean-up."""
        for fold in self._own_trainings():
            if fold == ALL_CASES:
                continue
            for largest in (False, True):
                folder = self._evaluation(fold, largest)
                if not (folder / TABLE).is_file():
                    self._run_evaluation(self._parser("evaluate.json", fold), self._models(fold), folder, largest)

    def _run_evaluation(
        self, parser: ConfigParser, models: Path, folder: Path, largest: bool | list[int], **changes: Any
    ) -> float:
        """Evaluate a network; return how many seconds that took, of the processor if there is no GPU."""
        place = {"checkpoint": str(models / "model.pt"), "output_dir": str(folder)}
        parser.update({**place, "largest_component": largest, **changes})
        parsed_content(parser, "initialize")
        evaluator = parsed_content(parser, "validate#evaluator")
        clock = monotonic if self.device.type == "cuda" else process_time
        begun = clock()
        evaluator.run()
        return clock() - begun

    def wait(self) -> None:
        """Wait until all processes have done their part; where one fails, the launcher ends all."""
        missing = [self._evaluation(fold, True) / TABLE for fold in self.plan.folds]
        missing += [self._models(ALL_CASES) / FINAL] if self._has_all_cases else []
        while missing := [table for table in missing if not table.is_file()]:
            sleep(WAIT)

    def _compare(self, best: int | None, kept: Sequence[int]) -> Comparison | None:
        """Compare the best network and the ensemble of all folds; None if there is one, or the bundle gets another."""
        if len(self.plan.folds) < 2 or self._has_all_cases:
            return None
        task = replace(self.plan.task, largest_component=tuple(kept), members=len(self.plan.folds))
        write_ensemble([self._models(fold) / "model.pt" for fold in self.plan.folds], task, self._ensemble / "model.pt")
        judges = self._judges()
        cases = judges or self._cases("validation", best)
        judged = []
        for name, models, members in ((_name(best), self._models(best), 1), (ENSEMBLE, self._ensemble, task.members)):
            parser = ConfigParser(evaluate_config(replace(task, members=members)))
            folder = self.folder / "eval" / f"judged_{name}"
            lists = {"training": [], "validation": cases}
            seconds = self._run_evaluation(
                self._pointed(parser, best), models, folder, list(kept), datalist=lists, fit_quality=False
            )
            judged.append(Judged(name, read_scores([folder / TABLE]), seconds / len(cases)))
        unit = "s" if self.device.type == "cuda" else "CPU s"
        return Comparison(judged[0], judged[1], self.fingerprint.structures, bool(judges), unit)

    def _judges(self) -> list[dict[str, Any]]:
        """Return the cases that no fold was trained or validated on."""
        if self.plan.task.judges:
            return self._cases("judges", None)
        return self._cases("validation", None) if read_labeled_data(self.dataset).validation else []

    def _cases(self, section: str | None, fold: int | None) -> list[dict[str, Any]]:
        task = self.plan.task
        skip_bad = self.options.skip_bad_cases
        return list_cases(self.dataset, section, fold, task.folds, skip_bad, task.left_out, task.judges)

    @property
    def _ensemble(self) -> Path:
        return self.folder / "models" / ENSEMBLE

    def finish(self) -> None:
        """Choose clean-up and network, and write the bundle's configs, weights, pictures and page."""
        structures = self.fingerprint.structures
        scores, kept = self._cleaned_scores()
        rows = summarize(_joined(scores), structures)
        best = best_fold(scores, structures)
        comparison = self._compare(best, kept)
        task = replace(self.plan.task, largest_component=tuple(kept), fold=best)
        models, evaluation = self._models(best), self._evaluation(best, False)
        if comparison is not None and comparison.ensemble_is_better:
            # Where there are judges, they are its validation cases whatever the fold.
            task = replace(task, members=len(self.plan.folds), fold=best if task.judges else None)
            models, evaluation = self._ensemble, self.folder / "eval" / f"judged_{ENSEMBLE}"
        write_configs(task, self.folder)
        self._take_weights(models)
        write_rows(self.folder / "eval" / "cross_validation.csv", rows)
        docs = self.folder / "docs"
        log, cases = self.folder / "train" / _name(best), evaluation / TABLE
        draw_training(log, docs / "training.png")
        quality = self._fit_quality(task)
        draw_cases(self.folder, self.dataset, cases, docs / "cases.png")
        if self._has_all_cases:
            self._take_network_of_all_cases(quality)
        members = {_name(fold): mean_dice(scores[fold], structures) for fold in self.plan.folds}
        evaluated = Evaluated(
            rows,
            members,
            _name(best),
            comparison,
            [structures[label - 1] for label in kept],
            "" if quality is None else as_markdown(quality),
            self._has_all_cases,
        )
        write_page(self.folder, task, self.plan, self.fingerprint, evaluated)
        write_results(self.folder, task, self.fingerprint.channels, rows)
        # From these the pictures can be drawn again; those of cases only by the network that was evaluated on them.
        drawn = {"log": log} if self._has_all_cases else {"log": log, "cases": cases}
        places = {name: str(path.relative_to(self.folder)) for name, path in drawn.items()}
        self.state.note(finished=True, drawn=places, **{ALL_CASES: self._has_all_cases})
        self._remove_states()
        self.console.print(score_table(rows))
        if comparison is not None:
            self.console.print(comparison.table())

    def _cleaned_scores(self) -> tuple[dict[int | None, list[Score]], list[int]]:
        """Return the scores of each fold, cleaned up where that helps, and the labels of the structures that are."""
        structures = self.fingerprint.structures
        as_is, largest = (
            {fold: read_scores([self._evaluation(fold, kind) / TABLE]) for fold in self.plan.folds}
            for kind in (False, True)
        )
        kept = choose_clean_up(_joined(as_is), _joined(largest), structures)
        cleaned = {structures[label - 1] for label in kept}
        return {
            fold: [after if after.structure in cleaned else before for before, after in zip(as_is[fold], largest[fold])]
            for fold in self.plan.folds
        }, kept

    def _fit_quality(self, task: Task) -> QualityModel | None:
        """Fit the model of the quality; return None if there is none."""
        if task.in_channels > 1 or task.label_values is not None:
            logger.warning("No quality model is fitted: that is for images of one channel and labels 1, 2, ... only")
            return None
        return evaluate_quality(self.folder, bundle_cases(self.folder, self.dataset), self.device, required=False)

    def _take_network_of_all_cases(self, quality: QualityModel | None) -> None:
        """Put the network of all cases in the place of a fold's, whose model of the quality is its, too."""
        self._take_weights(self._models(ALL_CASES))
        if quality is not None:
            write_quality(replace(quality, digest=weights_digest(self.folder)), self.folder)

    def _take_weights(self, models: Path) -> None:
        """Copy the weights of a folder, and what their training was given, to where the bundle has them."""
        for source in (models / "model.pt", record_file(models / "model.pt")):
            copy = source.read_bytes()
            write_atomically(self.folder / "models" / source.name, partial(Path.write_bytes, data=copy))

    def _remove_states(self) -> None:
        """Remove what trainings would go on from, and what the bundle has a copy of."""
        shutil.rmtree(self._ensemble, ignore_errors=True)
        for fold in (*self.plan.folds, ALL_CASES):
            for name in ("last.pt", FINAL):
                (self._models(fold) / name).unlink(missing_ok=True)

    def _parser(self, config: str, fold: Fold) -> ConfigParser:
        return self._pointed(read_config(self.folder / "configs" / config), fold)

    def _pointed(self, parser: ConfigParser, fold: Fold) -> ConfigParser:
        """Point a config to the data set, and to a fold."""
        parser.update(
            {
                "bundle_root": str(self.folder),
                "dataset_dir": str(self.dataset),
                "device": self.device,
                "fold": None if fold == ALL_CASES else fold,
                # They were checked for the fingerprint.
                "check_data": False,
                "skip_bad_cases": self.options.skip_bad_cases,
            }
        )
        return parser

    def _models(self, fold: Fold) -> Path:
        return self.folder / "models" / _name(fold)

    def _evaluation(self, fold: Fold, largest: bool) -> Path:
        return self.folder / "eval" / f"{_name(fold)}{'_largest' if largest else ''}"


def _name(fold: Fold) -> str:
    if fold == ALL_CASES:
        return ALL_CASES
    return "training" if fold is None else f"fold_{fold}"


def _joined(scores: dict[Any, list[Score]]) -> list[Score]:
    return [score for part in scores.values() for score in part]


def _memory(device: torch.device) -> int:
    """Return the bytes of a GPU, or half of those of the machine."""
    if device.type == "cuda":
        return for_a_step(torch.cuda.get_device_properties(device).total_memory)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
