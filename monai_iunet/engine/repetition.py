"""Evaluating a module a second time with the result of the first.

A result depends on more than the inputs: on the autocast setting, modes of the user that change functions of PyTorch,
the random numbers (see `random_numbers.py`), the parameters and which of them are trained, the buffers, which an
evaluation may change, the hooks, and the settings of each part: attributes that are numbers, texts or switches, such as
the mode (training or evaluation) and the rate of a dropout, or arrays, lists, tuples, dictionaries, sets and records
(dataclasses and SimpleNamespaces) of them. Other attributes, such as functions, tensors and lists of tensors, count as
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

import copy
import dataclasses
import operator
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from monai.networks.layers.drop_path import DropPath
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_iunet.engine.foreign_code import runs_foreign_code
from monai_iunet.engine.pytorch_private import (
    cached_parametrizations,
    compiled_part,
    function_modes,
    has_values,
    hooks_of,
    hooks_of_all_modules,
    is_compiled,
    keep_versions,
    memory_of,
    version,
)
from monai_iunet.engine.random_numbers import RandomNumbers, generators, is_same_state

__all__ = ["Conditions"]

# What is known to draw random numbers.
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, DropPath)
DRAWING = (*DROPOUT, nn.RReLU, nn.MultiheadAttention, nn.RNNBase)
SETTINGS = (bool, int, float, complex, np.generic, str, Enum, type(None), torch.dtype)
# What may change inside, as arrays do; beside them records and all kinds of tuples.
LISTS = (list, deque, set)
DICTIONARIES = (dict, OrderedDict, defaultdict)
# Attributes of every module, which are looked at in their own ways, and what `module.compile()` sets.
OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"} | {"_compiled_call_impl"}


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
        self._parts = [_Part(part) for part in module.modules()]
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
        buffers -= {id(tensor) for part in self._parts for tensor in _tensors_in(part.settings)}
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


class _Part:
    """Holds the state of a module in a tree of modules at some moment."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)  # which a parametrization changes
        self.attributes = set(module.__dict__)
        self.settings = {name: _noted(value) for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE}
        # Its attributes until an evaluation has put another object in the place of one, and which of them were copied.
        self._objects: dict[str, Any] | None = module.__dict__.copy()
        self._copied = [name for name, value in self.settings.items() if value is not module.__dict__[name]]
        self.hooks = hooks_of(module)
        self.parameters = dict(module._parameters)
        self.trained = {name for name, tensor in self.parameters.items() if tensor is not None and tensor.requires_grad}
        self.buffers = dict(module._buffers)
        self.children = dict(module._modules)
        self.cached: dict[str, Tensor] = {}  # what its parametrizations have made for more than this evaluation

    def tensors(self) -> Iterator[Tensor]:
        for value in (*self.parameters.values(), *self.buffers.values(), *self.settings.values()):
            yield from _tensors_in(value)

    def own_buffers(self) -> Iterator[Tensor]:
        return (buffer for buffer in self.buffers.values() if buffer is not None)

    def own_tensors(self) -> Iterator[Tensor]:
        """Yield buffers, and tensors of attributes but those that autograd has computed."""
        yield from self.own_buffers()
        for value in self.settings.values():
            yield from (tensor for tensor in _tensors_in(value) if not tensor.requires_grad)

    def forget_what_it_changed(self) -> None:
        """Count as settings, behind the evaluation, what it has left as it was, and numbers, texts and switches."""
        now = self.module.__dict__
        if self._has_the_same_objects() and self._copies_are_equal():
            return
        self._objects = None
        self.attributes |= {name for name, value in now.items() if not _is_setting(value)}
        before, self.settings = self.settings, {}
        for name, value in before.items():
            stays = name in now and (_is_equal(now[name], value) or (_is_plain(now[name]) and _is_plain(value)))
            if stays or _is_setting(value):
                self.settings[name] = value
            elif isinstance(value, Tensor) or _parts(value) is not None:
                # A state, which an evaluation reads and replaces.
                self.settings[name] = _noted(value, with_graphs=False)

    def is_as_it_was(self) -> bool:
        return (
            type(self.module) is self.kind
            and not self.cached
            and self._has_the_same_attributes()
            and hooks_of(self.module) == self.hooks
            and self._has_the_same_parameters()
            and _same(self.module._buffers, self.buffers)
            and self.module._modules == self.children
        )

    def _has_the_same_parameters(self) -> bool:
        return _same(self.module._parameters, self.parameters) and all(
            tensor is None or tensor.requires_grad == (name in self.trained) for name, tensor in self.parameters.items()
        )

    def _has_the_same_attributes(self) -> bool:
        if self._has_the_same_objects():
            return self._copies_are_equal()
        now = self.module.__dict__
        return (
            all(name in now and _is_equal(now[name], value) for name, value in self.settings.items())
            and not now.keys() - self.attributes - OF_EVERY_MODULE
        )

    def _has_the_same_objects(self) -> bool:
        """Return whether every attribute is the object that it was; this alone is quick."""
        now = self.module.__dict__
        return (
            self._objects is not None
            and now.keys() == self._objects.keys()
            and all(map(operator.is_, now.values(), self._objects.values()))
        )

    def _copies_are_equal(self) -> bool:
        return all(_is_equal(self.module.__dict__[name], self.settings[name]) for name in self._copied)

    def is_compiled(self) -> bool:
        """Return whether what the module runs is compiled, or one of its attributes is."""
        return compiled_part(self.module) is not None or any(map(is_compiled, self.module.__dict__.values()))

    def may_be_known_by_others(self) -> bool:
        """Return whether what the module runs may know it by another way than as itself, as hooks and methods do."""
        hooks = [hook for name, of_name in self.hooks.items() if "forward" in name for hook in of_name.values()]
        return (
            "forward" in self.module.__dict__
            or any(callable(hook) and not _is_of_weights(hook) for hook in hooks)
            or not all(map(_knows_no_module, self.settings.values()))
        )

    def replica(self, children: dict[str, nn.Module | None], copies: dict[int, Tensor]) -> nn.Module:
        """Return a module that shares everything with this one except for what has changed since.

        Args:
            children: of the replica.
            copies: what takes the place of buffers in the replica, by their identity.
        """
        if "forward" in self.module.__dict__:  # as of `torch.compile(module)`, which runs the module itself
            raise RuntimeError(
                f"{type(self.module).__name__} has another mode, other parameters, settings or hooks in the backward "
                "pass than it had in the forward pass, and cannot be evaluated as it was then, because its `forward` "
                "was replaced. Leave it as it is until after the backward pass, or store activations "
                '(activations="store").'
            )
        if "parametrizations" in self.children and type(self.module) is not self.kind:  # which has lost what they made
            raise RuntimeError(
                f"{self.kind.__name__} has lost its parametrizations between the forward and the backward pass, and "
                "cannot be evaluated as it was then. Remove them after the backward pass, or store activations "
                '(activations="store").'
            )
        # What has come since may hide something of the class.
        attributes = {name: value for name, value in self.module.__dict__.items() if name in self.attributes}
        settings = {name: _noted(value) for name, value in self.settings.items()}  # which the replica may change
        attributes |= {**settings, **self.hooks, "_modules": children}
        attributes["_compiled_call_impl"] = None  # that of `module.compile()` runs the module itself
        if not self._has_the_same_parameters():
            attributes["_parameters"] = {
                name: tensor
                if tensor is None or tensor.requires_grad == (name in self.trained)
                else tensor.detach().requires_grad_(name in self.trained)
                for name, tensor in self.parameters.items()
            }
        if copies or not _same(self.module._buffers, self.buffers):
            attributes["_buffers"] = {name: copies.get(id(buffer), buffer) for name, buffer in self.buffers.items()}
        kind = self.kind
        if self.cached:  # as attributes of the class that it was before it was parametrized
            kind = parametrize.type_before_parametrizations(self.module)
            attributes |= {name: made.detach().requires_grad_(made.requires_grad) for name, made in self.cached.items()}
        # Without the methods of the class, which may build a new module, or refuse to change one.
        replica = object.__new__(kind)
        replica.__dict__.update(attributes)
        return replica


class _LetGo:
    """Stands for a tensor with a graph that an evaluation has replaced: to keep it would keep all steps before.

    An evaluation that only puts something in its place, such as an output that is looked at later, does not use it.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "A module reads a tensor of its former evaluation, with the graph of that, which is not there when it is "
            "evaluated once more in the backward pass. Let it keep what is detached from the graph, or store "
            'activations (activations="store").'
        )

    def __getattr__(self, name: str) -> Any:
        return self.__torch_function__()

    def __bool__(self) -> bool:
        return bool(self.__torch_function__())

    def __getitem__(self, index: Any) -> Any:
        return self.__torch_function__()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield a tensor itself, and those in containers and records."""
    if isinstance(value, Tensor):
        yield value
    for part in (_parts(value) or {}).values():
        yield from _tensors_in(part)


def _is_setting(value: Any) -> bool:
    """Return whether an attribute of a module is a number, a text, a switch or nothing, or a tuple of them."""
    return isinstance(value, SETTINGS) or (isinstance(value, tuple) and all(map(_is_setting, value)))


def _is_plain(value: Any) -> bool:
    """Return whether a setting, an array, a container or a record is made of settings all through."""
    parts = _parts(value)
    if parts is not None:
        return all(map(_is_plain, parts.values()))
    return _is_setting(value) or type(value) is np.ndarray


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return what a container or a record holds, by its place or name; None for anything else.

    Records are dataclasses and SimpleNamespaces of tensors, arrays and settings. One that holds other objects, such as
    itself, is an object like any other.
    """
    kind = type(value)
    if kind in DICTIONARIES:
        return dict(value)
    if kind in LISTS or isinstance(value, tuple):
        return dict(enumerate(value))
    if not (dataclasses.is_dataclass(kind) or isinstance(value, SimpleNamespace)):
        return None
    names = vars(value) if hasattr(value, "__dict__") else [field.name for field in dataclasses.fields(value)]
    parts = {name: getattr(value, name, None) for name in names}
    is_flat = all(isinstance(part, (Tensor, _LetGo, np.ndarray)) or _is_setting(part) for part in parts.values())
    return parts if is_flat else None


def _knows_no_module(value: Any) -> bool:
    """Return whether an attribute is data, or a function that knows nothing but what it is given."""
    parts = _parts(value)
    if parts is not None:
        return all(map(_knows_no_module, parts.values()))
    if isinstance(value, FunctionType):
        return value.__closure__ is None and all(map(_knows_no_module, value.__defaults__ or ()))
    if isinstance(value, BuiltinFunctionType):
        return not isinstance(value.__self__, Tensor)
    return isinstance(value, (Tensor, torch.Generator)) or _is_plain(value)


def _is_of_weights(hook: Any) -> bool:
    """Return whether a hook is PyTorch's own, of weights that are normalized or pruned."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _noted(value: Any, with_graphs: bool = True) -> Any:
    """Return copies of arrays, containers and records, also of those in them, and anything else as it is.

    Args:
        value: an attribute.
        with_graphs: whether tensors that have a graph are kept, too; stand-ins if not.
    """
    if isinstance(value, Tensor):
        return value if with_graphs or value.is_leaf else _LetGo()
    if type(value) is np.ndarray:
        return value.copy()
    parts = _parts(value)
    if parts is None:
        return value
    parts = {name: _noted(part, with_graphs) for name, part in parts.items()}
    if isinstance(value, tuple):
        if all(map(operator.is_, parts.values(), value)):
            return value
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    if isinstance(value, set):
        return set(parts.values())
    noted = copy.copy(value)
    for name, part in parts.items():
        if type(value) in (*LISTS, *DICTIONARIES):
            noted[name] = part
        else:
            object.__setattr__(noted, name, part)  # a frozen dataclass refuses setattr
    return noted


def _is_equal(now: Any, then: Any) -> bool:
    """Return whether a setting has the same value, or is the same object; what it became need not be a setting."""
    if type(now) is type(then) is np.ndarray:
        return (now.dtype, now.shape, now.tobytes()) == (then.dtype, then.shape, then.tobytes())
    parts, parts_then = (_parts(now), _parts(then)) if type(now) is type(then) else (None, None)
    if parts is None or parts_then is None:
        return now is then or (_is_setting(now) and _is_setting(then) and bool(now == then))
    if isinstance(now, set):
        return bool(now == then)
    return list(parts) == list(parts_then) and all(
        part is parts_then[name] or _is_equal(part, parts_then[name]) for name, part in parts.items()
    )


def _same(now: Any, then: dict[str, Any]) -> bool:
    """Return whether tensors are the same objects, or, in fully sharded training, have the same values."""
    return now.keys() == then.keys() and all(
        tensor is then[name] or hasattr(tensor, "full_tensor") or hasattr(then[name], "full_tensor")
        for name, tensor in now.items()
    )


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
            tensor.copy_(value)
