"""A training whose patches grow: it begins with small ones, of which a step takes less time and memory.

Source: Fischer et al., Progressive growing of patch size: curriculum learning for accelerated and improved medical
image segmentation, 2025 (arXiv 2510.23241). There each size gets as many epochs; so here, or as much time where the
length of a training is given as time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ignite.engine import Events
from monai.transforms import Compose

from monai_iunet.errors import InputError
from monai_iunet.training.time_limit import TimedDecay
from monai_iunet.transforms.patches import TrainingPatchd, read_size

__all__ = ["GrowingPatches"]

logger = logging.getLogger(__name__)


class GrowingPatches:
    """Gives, as a handler of a trainer, each size of patches an equal part of the training, one after another.

    The size follows from the epoch, or from the time that is used, which both are part of the state of a training, so
    one that was interrupted goes on with the size that it had.

    Args:
        sizes: in order; each as `TrainingPatchd` takes it. The last is what the network is made for.
        schedule: a `TimedDecay` by whose time the training is divided, instead of by epochs.

    Raises:
        InputError: when there are no sizes, or one is not valid.

    Example:
        >>> GrowingPatches([(32, 32, 16), (64, 64, 32), "whole"]).size_at(0.5)
        (64, 64, 32)
    """

    def __init__(self, sizes: Sequence[Any], schedule: Any = None) -> None:
        self.sizes = [read_size(size) for size in sizes]
        if not self.sizes:
            raise InputError('growing: no sizes. Name at least one, such as [[64, 64, 32], "whole"].')
        self.schedule = schedule

    def size_at(self, share: float) -> Any:
        """Return the size when a share of the training is done, from 0 to 1."""
        # The sum is rounded, lest 3 of 30 epochs begin the second of ten sizes late.
        return self.sizes[min(int(share * len(self.sizes) + 1e-9), len(self.sizes) - 1)]

    def attach(self, trainer: Any) -> None:
        """Attach to a `monai.engines.Trainer`.

        Raises:
            InputError: when the transforms of its data set have no `TrainingPatchd`; and from the trainer when it
                starts, if workers load its data beyond an epoch.
        """
        transform = getattr(getattr(trainer.data_loader, "dataset", None), "transform", None)
        steps: Any = transform.flatten().transforms if isinstance(transform, Compose) else [transform]  # type: ignore[no-untyped-call]
        patches = [step for step in steps if isinstance(step, TrainingPatchd)]
        if not patches:
            raise InputError("growing: the training cuts its patches by no TrainingPatchd, whose size could grow.")
        trainer.add_event_handler(Events.STARTED, self._check_workers)
        trainer.add_event_handler(Events.EPOCH_STARTED, self._set_size, patches)

    def _check_workers(self, trainer: Any) -> None:
        """Raise an error where workers load data beyond an epoch: they keep the transforms that they began with."""
        loader = trainer.data_loader
        if getattr(loader, "num_workers", 0) and (
            loader.persistent_workers or trainer.state.epoch_length % len(loader) != 0
        ):
            raise InputError(
                "growing: workers that load data keep the size of patches that they began with. Set persistent_workers "
                f"to False and give no epoch_length, or a multiple of {len(loader)}; or set num_workers to 0."
            )

    def _set_size(self, trainer: Any, patches: Sequence[TrainingPatchd]) -> None:
        done = (trainer.state.epoch - 1) / trainer.state.max_epochs
        size = self.size_at(self.schedule.share if isinstance(self.schedule, TimedDecay) else done)
        for patch in patches:
            if patch.roi_size != size or trainer.state.epoch == 1:
                logger.info("Epoch %d: patches of %s", trainer.state.epoch, size)
                patch.roi_size = size
