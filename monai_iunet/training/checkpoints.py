"""Checkpoints of a training: the last state, to go on from, and the best and the final network, to use.

Going on means that a training which was killed at any moment and started again ends as if it had not been. The state is
saved after each epoch, and the random numbers of an epoch depend on the seed and the number of the epoch alone: all
generators are seeded anew when an epoch begins. Files are written under another name and renamed, so each is whole.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.utils import set_determinism
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR

from monai_iunet.errors import InputError
from monai_iunet.io.files import check_folder
from monai_iunet.io.text import first_line
from monai_iunet.io.weights import write_state
from monai_iunet.training.early_stop import EarlyStop
from monai_iunet.training.record import differences, write_record
from monai_iunet.training.seen_cases import TRAINED_ON, image_digests
from monai_iunet.training.time_limit import TimedDecay

__all__ = ["FINAL", "Checkpoints"]

logger = logging.getLogger(__name__)

FINAL = "model_final.pt"  # which a training has when it is done

# Names in the file of the last state.
TAKEN = ("epoch", "best", "scaler", "model", "record", "cases", "given", "kinds", TRAINED_ON)
GIVEN = ("base_lrs", "total_iters", "power")  # of a schedule that can go on with others, not its progress
STEPPED = torch.optim.Optimizer, LRScheduler


class Checkpoints:
    """Saves `last.pt` after each epoch of a trainer, `model.pt` whenever its validator finds a better network, and
    `model_final.pt` at the end; where no validation has found a network, `model.pt` is that of the end, too.

    A training whose loss or weights are not finite is stopped with a `FloatingPointError`, before an epoch with them is
    saved.

    What others do at the end of an epoch is in what is saved, in whatever order handlers were attached.

    A `PolynomialLR` or a `TimedDecay` that goes on with another learning rate or length lowers the rate as if it had
    been given them at the beginning; other schedules go on as they were saved, and a warning says so. What an optimizer
    is given beside a schedule, such as its weight decay, is as it is given, too.

    Args:
        folder: where the files go; created if need be.
        model: the network whose weights `model.pt` holds.
        state: what else goes on: anything with `state_dict` and `load_state_dict`, by name. The optimizer, say. It may
            not be named "model", "epoch", "best", "scaler", "record", "cases", "given", "kinds" or "trained_on".
        seed: of the random numbers.
        resume: whether to go on from `last.pt`; a training without one begins at the beginning.
        writes: whether this process writes; one of a distributed training.
        validator: the evaluator that validates the network; may be named when attaching instead.
        early_stop: what stops the training early; gets its trainer, and its state is saved.
        record: what the training is given, written beside the weights with the digests of the images that it is
            trained on; see `training_record`.

    Raises:
        InputError: when `last.pt` is of another training, or of one that was given something else, such as another
            kind of optimizer, or other cases.
        ValueError: when a part of `state` has a name that is taken.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> Checkpoints(tempfile.mkdtemp(), model, {"optimizer": optimizer}).last.name
        'last.pt'
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        state: Mapping[str, Any],
        seed: int = 0,
        resume: bool = False,
        writes: bool = True,
        validator: Engine | None = None,
        early_stop: EarlyStop | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(str(folder))  # the command line makes a number of a folder that is named 2024
        self.model = model
        self.state = dict(state)
        if taken := [name for name in TAKEN if name in self.state]:
            raise ValueError(f"state: the name {taken[0]} is taken, one of {', '.join(TAKEN)}. Give it another.")
        self.validator = validator
        self.early_stop = early_stop
        if early_stop is not None:
            self.state["early_stop"] = early_stop
        self.seed = seed
        self.resume = resume
        self.writes = writes
        self.record = dict(record or {})
        # Digests of the images that the network is trained on, and was before this training.
        self._trained_on = set(self.record.pop(TRAINED_ON, None) or ())
        self._given: dict[str, Any] = {}  # options of optimizers and schedules, before a state is loaded
        self._kinds: dict[str, str] = {}  # of these optimizers and schedules, and the metric
        self._best_before: tuple[Any, int] | None = None  # metric and epoch when a validation began

    @property
    def last(self) -> Path:
        """File of the last state."""
        return self.folder / "last.pt"

    def attach(self, trainer: Engine, validator: Engine | None = None) -> None:
        """Attach to a `monai.engines.Trainer` and the evaluator that validates its network.

        Raises:
            ValueError: when no evaluator is named, here or before; when a part of the state could not be read again.
        """
        validator = validator or self.validator
        if validator is None:
            raise ValueError("Checkpoints needs the evaluator that validates the network. Pass it as `validator`.")
        if self.early_stop is not None:
            self.early_stop.set_trainer(trainer)
        check_folder(self.folder)
        if self.resume and self.writes:
            for unfinished in self.folder.glob(".*.pt.*.pt"):  # of a process that was killed while it wrote
                unfinished.unlink(missing_ok=True)
        if self.writes:
            _check_readable(self.state)
            if self.record:
                self._trained_on.update(image_digests(_cases(trainer)))
        self._given = {
            name: _with_plain_numbers(_settings(part.state_dict()))
            if isinstance(part, LRScheduler)
            else _options(part, self.state.values())
            for name, part in self.state.items()
            if isinstance(part, STEPPED)
        }
        self._kinds = {name: type(self.state[name]).__name__ for name in self._given}
        if metric := getattr(validator.state, "key_metric_name", None):
            self._kinds["key metric"] = metric  # of which the best value is saved
        if self.resume and self.last.is_file():
            self._load(trainer, validator)
        trainer.add_event_handler(Events.STARTED, self._save_last_of_all, validator)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._stop_at_nan)
        trainer.add_event_handler(Events.EPOCH_STARTED, self._seed)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save, validator)
        trainer.add_event_handler(Events.COMPLETED, self._save_final, validator)
        validator.add_event_handler(Events.STARTED, self._keep_best, trainer)
        validator.add_event_handler(Events.COMPLETED, self._save_best)

    def _save_last_of_all(self, trainer: Engine, validator: Engine) -> None:
        """Let the state be saved behind handlers that were attached later, such as a validation."""
        trainer.remove_event_handler(self._save, Events.EPOCH_COMPLETED)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save, validator)

    def _stop_at_nan(self, trainer: Any) -> None:
        """Stop a training that has diverged before an epoch with it is saved; one whose output has a loss."""
        output = trainer.state.output
        output = output[0] if isinstance(output, list) else output  # as it is without `decollate`
        if "loss" in output and not math.isfinite(loss := float(output["loss"])):
            raise self._diverged(trainer, f", iteration {trainer.state.iteration}: the loss is {loss}")

    def _stop_at_ruined_weights(self, trainer: Engine) -> None:
        """Stop a training whose last step had a finite loss, but a gradient that was none."""
        networks = [self.model, *(part for part in self.state.values() if isinstance(part, nn.Module))]
        if not all(parameter.isfinite().all() for network in networks for parameter in network.parameters()):
            raise self._diverged(trainer, ": weights are NaN or infinite")

    def _diverged(self, trainer: Engine, what: str) -> FloatingPointError:
        goes_on = "Begin again" if trainer.state.epoch == 1 else f"{self.last} is that of the epoch before. Go on"
        return FloatingPointError(
            f"Epoch {trainer.state.epoch}{what}, the training has diverged. {goes_on} with a lower learning rate."
        )

    def _seed(self, trainer: Any) -> None:
        seed = self.seed + trainer.state.epoch
        set_determinism(seed)
        # Also of data sets in others, as in a `Subset`; a list of batches has none.
        set_rnd(getattr(trainer.data_loader, "dataset", None), seed)

    def _save(self, trainer: Any, validator: Any) -> None:
        self._stop_at_ruined_weights(trainer)
        if not self.writes:
            return
        scaler = getattr(trainer, "scaler_", None) or getattr(trainer, "scaler", None)
        saved = {
            "epoch": trainer.state.epoch,
            "best": [float(validator.state.best_metric), int(validator.state.best_metric_epoch)],
            "scaler": scaler.state_dict() if scaler is not None else {},
            "model": self.model.state_dict(),
            "record": self.record,
            "cases": _image_names(trainer),
            "given": self._given,
            "kinds": self._kinds,
            TRAINED_ON: sorted(self._trained_on),
            **{name: _with_plain_numbers(part.state_dict()) for name, part in self.state.items()},
        }
        write_state(saved, self.last)

    def _keep_best(self, validator: Any, trainer: Any) -> None:
        self._stop_at_ruined_weights(trainer)
        self._best_before = (validator.state.best_metric, validator.state.best_metric_epoch)

    def _save_best(self, validator: Any) -> None:
        if math.isnan(validator.state.best_metric):  # MONAI takes the first one as it is; none is better than NaN
            validator.state.best_metric, validator.state.best_metric_epoch = -1, -1
        best = (validator.state.best_metric, validator.state.best_metric_epoch)
        # A trainer that is run again counts from epoch 1: the best epoch of the run before may have the same number.
        if self.writes and best[1] == validator.state.epoch and best != self._best_before:
            self._save_weights(self.folder / "model.pt")
            logger.info("Best network so far: %s", self.folder / "model.pt")

    def _save_final(self, _: Any, validator: Any) -> None:
        if not self.writes:
            return
        self._save_weights(self.folder / FINAL)
        if validator.state.best_metric_epoch < 0:
            # What is there may be of another training, which was given something else than the record says.
            self._save_weights(self.folder / "model.pt")
            logger.warning(
                "No validation has found a network, so %s is that of the end. If none took place, validate at least "
                "once: lower val_interval, or raise max_epochs.",
                self.folder / "model.pt",
            )

    def _save_weights(self, path: Path) -> None:
        if self.record:
            write_record({**self.record, TRAINED_ON: sorted(self._trained_on)}, path)
        weights = self.model.state_dict()  # changed in place, since a copy would lose what modules note beside them
        weights.update({name: tensor.cpu() for name, tensor in weights.items()})
        write_state(weights, path)

    def _load(self, trainer: Any, validator: Any) -> None:
        try:
            saved = torch.load(self.last, map_location="cpu", weights_only=True)
            changed = [
                f"{name} is {kind}, was {saved['kinds'][name]}"
                for name, kind in self._kinds.items()
                if saved.get("kinds", {}).get(name, kind) != kind
            ]
            if changed:
                raise self._given_something_else(changed)
            self.model.load_state_dict(saved["model"])
            for name, part in self.state.items():
                part.load_state_dict(saved[name])
            epoch, best, scaler = saved["epoch"], saved["best"], saved["scaler"]
            record, cases = saved.get("record", {}), set(saved.get("cases", ()))
            given_before = saved.get("given", {})
            self._trained_on.update(saved.get(TRAINED_ON, ()))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.last}: not a state of this training. Remove it, or start without resuming. {error}"
            ) from error
        changed = [f"{name} is {now}, was {before}" for name, before, now in differences(record, self.record)]
        if changed:
            raise self._given_something_else(changed)
        here = set(_image_names(trainer))
        if cases and here and cases != here:
            other, change = min(cases - here or here - cases), "was" if cases - here else "was not"
            raise InputError(
                f"{self.last}: this training has other cases, {other} {change} one of them. "
                "Give it the same data set and fold to go on, lest it be validated on what it has learned, or start "
                "without resuming."
            )
        if best[1] >= 0 and not (self.folder / "model.pt").is_file():
            logger.warning(
                "%s: no such file, so the best network so far, of epoch %d, is lost. Copy it beside %s; else it is the "
                "best one from here on.",
                self.folder / "model.pt",
                best[1],
                self.last.name,
            )
            best = -1, -1
        validator.state.best_metric, validator.state.best_metric_epoch = best
        if end := self._end_of(epoch, trainer.state.max_epochs):
            self._save_final(trainer, validator)  # it may have been killed before that
            raise InputError(f"{self.last}: this training {end} to go on, or start without resuming.")
        for name, given in self._given.items():
            if isinstance(self.state[name], LRScheduler):
                _go_on_as_given(self.state[name], given_before.get(name, {}), given)
            else:
                _go_on_with_options(name, self.state[name], given_before.get(name, []), given)
        trainer.state.epoch = epoch
        trainer.state.iteration = epoch * trainer.state.epoch_length
        if scaler:
            # The trainer makes its scaler when it runs.
            trainer.add_event_handler(Events.STARTED, lambda engine: engine.scaler.load_state_dict(scaler))
        logger.info("Going on after epoch %d of %d", epoch, trainer.state.max_epochs)
        _warn_of_another_order(trainer)

    def _given_something_else(self, changed: Sequence[str]) -> InputError:
        return InputError(
            f"{self.last}: this training was given something else: {'; '.join(changed[:3])}. Give it the same, or "
            "start without resuming."
        )

    def _end_of(self, epoch: int, max_epochs: int) -> str | None:
        """Return how a training has ended, and what to raise for it to go on; None if it has not."""
        if epoch >= max_epochs:
            return f"has finished its {epoch} epochs. Raise max_epochs"
        for part in self.state.values():
            if isinstance(part, EarlyStop) and part.has_stopped:
                return f"was stopped early, after epoch {epoch}. Raise its patience of {part.patience} validations"
            if isinstance(part, TimedDecay) and part.share == 1:
                return f"has used its time, {part.used:.0f} seconds, in {epoch} epochs. Raise max_seconds"
        return None


def _go_on_as_given(schedule: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Let a schedule that was loaded go on with the learning rate and the length that it is given now, if it can."""
    can = isinstance(schedule, (PolynomialLR, TimedDecay))
    was = {name: getattr(schedule, name) for name in GIVEN if name in now} if can else before
    said = "; ".join(f"{name} is {now[name]}, was {was[name]}" for name in was if now.get(name) != was[name])
    if not said:
        return
    if not can:
        logger.warning(
            "%s: %s. It goes on as it was saved; to change it, start without resuming.", type(schedule).__name__, said
        )
        return
    vars(schedule).update({name: now[name] for name in was})
    if isinstance(schedule, TimedDecay):
        rates = schedule.get_lr()
    else:  # whose `get_lr` goes on from the rate that was saved
        left = max(0.0, 1 - schedule.last_epoch / schedule.total_iters) ** schedule.power
        rates = [base * left for base in schedule.base_lrs]
    for group, base, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, rates):
        group["initial_lr"], group["lr"] = base, rate
    logger.info("The learning rate goes on as it is given now: %s", said)


def _settings(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a schedule is given, of its state before the first step, with that of schedules in it."""
    settings = {name: part for name, part in schedule.items() if name[0] != "_" and name != "last_epoch"}
    if inner := schedule.get("_schedulers"):
        settings["schedules"] = [_settings(part) for part in inner]
    return settings


def _with_plain_numbers(state: Any) -> Any:
    """Return a state whose numbers are Python's where they were NumPy's, as those of `numpy.geomspace`.

    PyTorch writes both, but does not read NumPy's from a file that may run no code.
    """
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {name: _with_plain_numbers(part) for name, part in state.items()}
    return type(state)(map(_with_plain_numbers, state)) if type(state) in (list, tuple) else state


def _check_readable(state: Mapping[str, Any]) -> None:
    """Check, before a training begins, that what it will save of each part can be read again."""
    for name, part in state.items():
        if isinstance(part, nn.Module):
            continue
        buffer = io.BytesIO()
        try:
            torch.save(_with_plain_numbers(part.state_dict()), buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:  # whatever an object of the user brings about
            raise ValueError(
                f"state: {name} could not be read again from last.pt ({first_line(error)}). Let its state_dict "
                "return tensors, numbers and text alone, in dictionaries and lists."
            ) from error


def _options(optimizer: Any, others: Iterable[Any]) -> list[dict[str, Any]]:
    """Return what each group of an optimizer's parameters is given, without a learning rate that a schedule lowers."""
    lowered = any(hasattr(part, "base_lrs") and getattr(part, "optimizer", None) is optimizer for part in others)
    left_out = ("params", "initial_lr", *(["lr"] if lowered else []))
    groups = [{name: group[name] for name in group if name not in left_out} for group in optimizer.param_groups]
    groups = _with_plain_numbers(groups)
    return [{name: part for name, part in group.items() if isinstance(part, (int, float, tuple))} for group in groups]


def _go_on_with_options(
    name: str, optimizer: Any, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> None:
    """Let an optimizer that was loaded go on with what it is given now, but for what others have changed meanwhile."""
    said = {}
    for group, old, new in zip(optimizer.param_groups, before, now):
        for option in new:
            if option not in old or old[option] == new[option]:
                continue
            taken = group[option] == old[option]
            if taken:
                group[option] = new[option]
            said[f"{name}: {option} is {new[option]}, was {old[option]}"] = taken
    for change, taken in said.items():
        if taken:
            logger.info("%s. It goes on as it is given now.", change)
        else:
            logger.warning("%s. It goes on as it was saved; to change it, start without resuming.", change)


def _cases(trainer: Any) -> Sequence[Any]:
    """Return what a trainer's data set makes its items of; nothing where it does not say it."""
    data = getattr(getattr(getattr(trainer, "data_loader", None), "dataset", None), "data", None)
    return data if isinstance(data, Sequence) else ()


def _image_names(trainer: Any) -> list[str]:
    """Return the names of the image files that a trainer trains on; none where its data do not say them."""
    images = [case.get("image") if isinstance(case, Mapping) else None for case in _cases(trainer)]
    firsts = [image[0] if isinstance(image, list) and image else image for image in images]
    return [Path(image).name for image in firsts if isinstance(image, (str, Path))]


def _warn_of_another_order(trainer: Any) -> None:
    """Say where a training that goes on will see cases in another order than one that was never interrupted."""
    loader, reasons = trainer.data_loader, []
    batches = len(loader) if hasattr(getattr(loader, "dataset", loader), "__len__") else 1
    if trainer.state.epoch_length % batches:
        reasons.append(f"its epochs end within a pass over the data (give no epoch_length, or a multiple of {batches})")
    if any(getattr(part, "generator", None) is not None for part in (loader, getattr(loader, "sampler", None))):
        reasons.append("its data loader has a random generator of its own (give none: all others are seeded)")
    if getattr(loader, "num_workers", 0) and loader.persistent_workers:
        reasons.append("its workers keep random numbers from epoch to epoch (set persistent_workers to False)")
    if reasons:
        logger.warning("The training will not end as if it had not been interrupted: %s.", "; ".join(reasons))
