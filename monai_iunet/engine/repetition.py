"""Evaluating a module a second time with the result of the first.

A result depends on more than the inputs: on the autocast setting, modes of the user that change functions of PyTorch,
the random numbers (see `random_numbers.py`), the parameters and which of them are trained, the buffers, which an
evaluation may change, the hooks, and the settings of each part (see `attributes.py`), such as the mode (training or
evaluation) and the rate of a dropout. Other attributes, such as functions, tensors and lists of tensors, count as
settings too, unless the evaluation itself puts something else in their place; of these, tensors that it may have read
before, as a state that goes on from call to call, are there again if they have no graph.
`Conditions` records all of it around the first evaluation and has it again around the second, after which everything
is as it was before that: running statistics move once, random numbers are drawn once.

The module itself is never changed for this, because another thread may be using it: where a setting, a hook, a
parameter or a buffer is another one by then, the second evaluation is that of a replica that has the parts of the
first. So it is where the module writes to its buffers, as to running statistics: the replica has copies of them. The
exception are buffers that something may know by another way, as a hook does, or what is compiled, and other tensors
that the module writes to: their values are put back for the time of the second evaluation, and afterwards.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from monai.networks.layers.drop_path import DropPath
from torch import Tensor, nn

from monai_iunet.engine.attributes import tensors_in
from monai_iunet.engine.foreign_code import runs_foreign_code
from monai_iunet.engine.module_state import ModuleState
from monai_iunet.engine.pytorch_private import (
    cached_parametrizations,
    function_modes,
    has_values,
    hooks_of_all_modules,
    keep_versions,
    memory_of,
    version,
)
from monai_iunet.engine.random_numbers import RandomNumbers, generators, is_same_state

__all__ = ["Conditions"]

# What is known to draw random numbers.
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, DropPath)
DRAWING = (*DROPOUT, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)


class Conditions:
    """Holds what the evaluation of a module depends on beside its inputs, so that it can be repeated.

    Args:
        module: is evaluated within `recorded()`, and what `module_then()` returns within `repeated()`.
        device: of its inputs.

    Attributes:
        foreign: parts of the module that are not known, see `foreign_code.py`.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((device.type, "cpu"))
            if torch.amp.is_autocast_available(kind)
        ]
        self._modes = function_modes()
        self._parts = [ModuleState(part) for part in module.modules()]
        self.foreign = [part.module for part in self._parts if runs_foreign_code(part.module)]
        self._hooks_of_all = hooks_of_all_modules()
        self._versions: list[tuple[Tensor, int]] = []
        self._places: list[tuple[Tensor, Any]] = []  # where the values of parameters and buffers lie
        self._moved: list[tuple[Tensor, Tensor]] = []  # what the module may write to, and the values before
        self._written: list[Tensor] = []  # parameters that the module writes to
        self._copies = _Copies()
        # The generators that were drawn from, with their states before and after.
        self._random: list[tuple[RandomNumbers, Any, Any]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note, around the first evaluation, what the second one needs."""
        for part in self._parts:
            part.cached = cached_parametrizations(part.module)
        tensors = [tensor for part in self._parts for tensor in part.tensors()]
        versions = [(tensor, version(tensor)) for tensor in tensors]
        self._places = [(tensor, _place(tensor)) for tensor in tensors if _stays_in_place(tensor)]
        values = [(tensor, tensor.detach().clone()) for part in self._parts for tensor in part.own_tensors()]
        states = [(generator, generator.state()) for generator in generators(self._device, self.foreign)]
        with self._autocast_again():
            yield
        for part in self._parts:
            part.forget_what_it_changed()
        now = [(generator, before, generator.state()) for generator, before in states]
        self._random = [drawn for drawn in now if not is_same_state(*drawn[1:])]
        self._versions = [(tensor, before) for tensor, before in versions if version(tensor) == before]
        unmoved = {id(tensor) for tensor, _ in self._versions}
        self._written = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter) and id(tensor) not in unmoved]
        # No version tells of what is written to `buffer.data`, or by operations such as those that quantize.
        buffers = {id(buffer) for part in self._parts for buffer in part.own_buffers()}
        unmoved -= {id(tensor) for tensor, value in values if id(tensor) in buffers and _may_differ(tensor, value)}
        self._moved = [(tensor, value) for tensor, value in values if id(tensor) not in unmoved]
        # What the evaluation has replaced, such as an output that is kept as an attribute, is not needed again; with it
        # the graph of the step before would stay, and so of all before that.
        needed = {id(tensor) for part in self._parts for tensor in part.tensors()}
        self._versions = [(tensor, before) for tensor, before in self._versions if id(tensor) in needed]
        self._places = [(tensor, place) for tensor, place in self._places if id(tensor) in needed]
        # A buffer that the evaluation has given another shape, as observers of ranges do at first, gets its former one
        # for the second evaluation. Other memory may belong to somebody else.
        moved = {id(tensor) for tensor, _ in self._moved}
        for number, (tensor, place) in enumerate(self._places):
            if id(tensor) in moved and memory_of(tensor) == place[0]:
                self._places[number] = tensor, _place(tensor)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Restore, around the second evaluation, what the first one met."""
        self._check_unchanged()
        copies = self._copies.by_identity
        with ExitStack() as stack:
            own = [buffer for part in self._parts for buffer in part.own_buffers() if id(buffer) not in copies]
            moved = [(tensor, value) for tensor, value in self._moved if id(tensor) not in copies]
            own += [tensor for tensor, _ in moved if all(tensor is not buffer for buffer in own)]
            for tensor, value in self._moved:
                if id(tensor) in copies:
                    _write([copies[id(tensor)]], [value])
            if own:
                stack.enter_context(keep_versions(own))
                stack.callback(_put_back, own, [tensor.detach().clone() for tensor in own])
                for tensor, value in moved:
                    _write([tensor], [value])
            for generator, before, _ in self._random:
                stack.callback(generator.go_to, generator.state())
                generator.go_to(before)
            stack.enter_context(self._autocast_again())
            for mode in self._modes:
                if all(mode is not other for other in function_modes()):
                    stack.enter_context(mode)
            written = [tensor.detach().clone() for tensor in self._written]
            yield
            self._check_random_numbers()
            self._check_written(written)

    def _check_unchanged(self) -> None:
        """Raise an error if a hook of all modules, a parameter or a buffer has changed and cannot be put back."""
        if hooks_of_all_modules() != self._hooks_of_all:
            raise RuntimeError(
                "Forward hooks of all modules (torch.nn.modules.module.register_module_forward_hook) have come or gone "
                "between the forward and the backward pass, which evaluates modules once more. Leave them as they are "
                'until after the backward pass, or store activations (activations="store").'
            )
        for tensor, before in self._versions:
            if version(tensor) != before:
                raise RuntimeError(
                    f"A parameter, buffer or attribute of shape {tuple(tensor.shape)} has been modified by an inplace "
                    "operation between the forward and the backward pass, which computes activations with it once "
                    'more. Step the optimizer after the backward pass, or store activations (activations="store").'
                )
        for tensor, place in self._places:
            if _place(tensor) != place:
                raise RuntimeError(
                    f"A parameter, buffer or attribute, now of shape {tuple(tensor.shape)}, was given other memory "
                    "(`tensor.data = ...`, `module.to(...)`) between the forward and the backward pass, which computes "
                    "activations with it once more. Do so after the backward pass, or store activations "
                    '(activations="store").'
                )

    def writes_to(self, tensor: Tensor) -> bool:
        """Return whether a tensor may have other values behind the second evaluation than in it."""
        return tensor.layout is torch.strided and any(
            moved.untyped_storage() is tensor.untyped_storage() for moved, _ in self._moved
        )

    def module_then(self) -> nn.Module:
        """Return the module, or a replica of it as it was in the first evaluation if it has changed since.

        The next `repeated()` of this thread is for an evaluation of what is returned.

        Raises:
            RuntimeError: when a part has changed since and cannot be replicated.
        """
        copies = self._copies.by_identity = self._copies_of_buffers()
        if not copies and all(part.is_as_it_was() for part in self._parts):
            return self._parts[0].module
        parts, then = {part.module: part for part in self._parts}, dict[nn.Module, nn.Module]()

        def as_it_was(module: nn.Module) -> nn.Module:
            if module not in then:
                part = parts[module]
                children = {name: child if child is None else as_it_was(child) for name, child in part.children.items()}
                changed = children != part.children or not part.is_as_it_was()
                changed = changed or any(id(buffer) in copies for buffer in part.own_buffers())
                then[module] = part.replica(children, copies) if changed else module
            return then[module]

        return as_it_was(self._parts[0].module)

    def _copies_of_buffers(self) -> dict[int, Tensor]:
        """Return copies of the buffers that the module writes to, by identity; none where they cannot take their place.

        They can where nothing but a module itself knows its buffers, none is compiled, and no other tensor shares their
        memory.
        """
        if not self._moved or any(self._hooks_of_all):
            return {}
        if any(part.is_compiled() or part.may_be_known_by_others() for part in self._parts):
            return {}
        buffers = {id(buffer) for part in self._parts for buffer in part.own_buffers()}
        buffers -= {id(tensor) for part in self._parts for tensor in tensors_in(part.settings)}
        tensors = {id(tensor): tensor for part in self._parts for tensor in part.tensors()}
        memories = Counter(map(memory_of, tensors.values()))
        if any(id(tensor) not in buffers or memories[memory_of(tensor)] > 1 for tensor, _ in self._moved):
            return {}
        return {id(tensor): value.clone() for tensor, value in self._moved}

    def _check_random_numbers(self) -> None:
        """Raise an error if another thread drew from a generator while the module did."""
        draws = any(isinstance(part.module, DRAWING) and part.settings["training"] for part in self._parts)
        for generator, before, after in self._random:
            # Of what is not known nobody can say whether it draws, but from what it leaves alone it does not.
            if self.foreign or (draws and generator.is_of_pytorch):
                now = generator.state()
                if not is_same_state(now, after) and not is_same_state(now, before):
                    raise RuntimeError(
                        "Random numbers, as those of a dropout, cannot be drawn again, because another thread has "
                        "drawn from the same generator meanwhile. Let one thread draw at a time, or store activations "
                        '(activations="store").'
                    )

    def _check_written(self, before: list[Tensor]) -> None:
        """Raise an error if a parameter that the module writes to, as to limit it, is another one for a second time."""
        # A parameter that is NaN, as of a training that diverged, is not another one for that.
        if not all(torch.allclose(*values, equal_nan=True) for values in zip(self._written, before)):
            _write(self._written, before)
            raise RuntimeError(
                f"{type(self._parts[0].module).__name__} changes a parameter in place whenever it is evaluated, which "
                "happens once more in the backward pass. Change it in the training loop, or store activations "
                '(activations="store").'
            )

    @contextmanager
    def _autocast_again(self) -> Iterator[None]:
        # Without its cache, which would keep a cast copy of every parameter until the end of the forward pass.
        with ExitStack() as stack:
            for kind, enabled, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
            yield


class _Copies(threading.local):
    """Holds, for each thread, what stands for buffers in the evaluation that comes next, by their identity."""

    def __init__(self) -> None:
        self.by_identity: dict[int, Tensor] = {}


def _may_differ(tensor: Tensor, value: Tensor) -> bool:
    """Return whether a tensor may have other values than it had, without waiting for a device that would tell."""
    is_comparable = has_values(tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    return not is_comparable or not torch.equal(tensor, value)


def _stays_in_place(tensor: Tensor) -> bool:
    """Return whether the values of a tensor lie in its own memory, and none that DeepSpeed gathers for each pass."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not hasattr(tensor, "ds_id")


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where the values of a tensor lie, without keeping them there."""
    return memory_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


def _put_back(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write to what has changed alone: another thread, which looks at the versions, may use the rest."""
    changed = [both for both in zip(tensors, values) if _may_differ(*both)]
    _write([tensor for tensor, _ in changed], [value for _, value in changed])


def _write(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values):
            if tensor.shape != value.shape:
                tensor.resize_(value.shape)
            tensor.copy_(value)
