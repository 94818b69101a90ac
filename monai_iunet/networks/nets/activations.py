"""The choice between rebuilding and storing activations, which `IUNet` and `SegIUNet` share.

Per level, the backward pass has the activations of the couplings in one of three ways:

- "invert": it rebuilds them, and evaluates each branch once more. Nothing is kept.
- "convolutions": likewise, but the outputs of the branches' convolutions are kept, so that they are not computed once
  more: in float32 most of the time is saved, under autocast a fifth to two thirds of it, for a quarter to a half of the
  memory that "store" adds. Gradients are closer to those of stored activations, too, because what a branch adds is
  taken away as it was, not as it is of a rebuilt input.
  A branch must not write to `.data` of a convolution's output, of which nothing tells.
- "store": plain autograd, which keeps all of them.

A level is the cheaper, the coarser it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from monai_iunet.engine.pytorch_private import is_exporting
from monai_iunet.engine.recording import is_transformed
from monai_iunet.networks.layers.autocast import autocast_type
from monai_iunet.planning.budget import WAYS, best_activations, parse_bytes

__all__ = ["ChosenActivations"]


class ChosenActivations(nn.Module):
    """Base of networks whose levels rebuild or store their activations.

    A subclass defines `levels`, their number, `set_levels` and `couplings_of`.
    """

    _memory_budget: int | str | None = None
    _automatic = False
    _chosen: tuple[str, ...] = ()
    _chosen_for: object = None

    @property
    def memory_budget(self) -> int | str | None:
        """What a step may hold beside optimizer and loss where activations are chosen: bytes, or such as "20 GiB"."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, value: int | str | None) -> None:
        if value is not None:
            parse_bytes(value)
        elif self._automatic:
            raise ValueError('activations="auto" needs a memory_budget, such as "20 GiB", got None.')
        self._memory_budget = value

    @property
    def activations(self) -> str | tuple[str, ...]:
        """What the backward pass has: "invert", "convolutions", "store", one of them per level, or "auto"."""
        if self._automatic:
            return "auto"
        return self._chosen[0] if len(set(self._chosen)) == 1 else self._chosen

    @activations.setter
    def activations(self, value: str | Sequence[str]) -> None:
        automatic = isinstance(value, str) and value == "auto"
        if automatic and self.memory_budget is None:
            raise ValueError('activations="auto" needs a memory_budget, such as "20 GiB".')
        every = "invert" if automatic else value
        choice = (every,) * self.levels if isinstance(every, str) else tuple(every)
        if len(choice) != self.levels or not set(choice) <= set(WAYS):
            raise ValueError(
                f'activations must be "invert", "convolutions", "store", "auto" or one of the first three for each of '
                f"the {self.levels} levels, got {value!r}."
            )
        self._automatic, self._chosen_for = automatic, None
        self._choose(choice)

    @property
    def chosen_activations(self) -> tuple[str, ...]:
        """The choice per level, finest first, which "auto" makes when it sees images."""
        return self._chosen

    @property
    def levels(self) -> int:
        """Number of levels."""
        raise NotImplementedError(f"{type(self).__name__} does not define `levels`.")

    def set_levels(self, choice: Sequence[str]) -> None:
        """Let each level "invert", keep "convolutions", or "store"."""
        raise NotImplementedError(f"{type(self).__name__} does not define `set_levels`.")

    def couplings_of(self, level: int) -> Iterable[nn.Module]:
        """Return the couplings of a level, which are evaluated again if it rebuilds its activations."""
        raise NotImplementedError(f"{type(self).__name__} does not define `couplings_of`.")

    def _choose(self, choice: tuple[str, ...]) -> None:
        self._chosen = choice
        self.set_levels(choice)

    def activations_for(self, image_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
        """Return the choice per level for images of a shape, trained in float32 or under autocast to `dtype`.

        Args:
            image_shape: `(batch, channels, *spatial)`.
            dtype: of autocast; float32 for none.
        """
        if not self._automatic or self.memory_budget is None:
            return self._chosen
        return best_activations(self, self.memory_budget, image_shape, dtype)

    def _fit(self, x: Tensor) -> None:
        """Choose for images like these, once for each shape and precision, if the choice is "auto"."""
        if self._automatic and torch.is_grad_enabled() and not (torch.jit.is_tracing() or is_exporting()):
            self._fit_uncompiled(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _fit_uncompiled(self, x: Tensor) -> None:
        if is_transformed(x):  # where plain autograd stores activations, whatever is chosen
            return
        dtype = autocast_type(x.device) or torch.float32
        key = (tuple(x.shape), dtype, self.memory_budget)
        if key != self._chosen_for:
            # In a thread of its own no mode and no hook of the user, such as a counter of operations or a checkpoint,
            # takes what is only planned for a part of the step.
            with ThreadPoolExecutor(1) as thread:
                choice = thread.submit(self.activations_for, x.shape, dtype).result()
            self._choose(choice)
            self._chosen_for = key
