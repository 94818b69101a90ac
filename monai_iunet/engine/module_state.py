"""A module as it was at some moment, and a replica of it if it has changed since."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from monai_iunet.engine.attributes import is_equal, is_plain, is_setting, knows_no_module, noted, parts_of, tensors_in
from monai_iunet.engine.pytorch_private import compiled_part, hooks_of, is_compiled

__all__ = ["ModuleState"]

# Attributes of every module, which are looked at in their own ways, and what `module.compile()` sets.
OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"} | {"_compiled_call_impl"}


class ModuleState:
    """Holds the state of a module in a tree of modules at some moment.

    Attributes:
        module: the module itself, which may have changed since.
        settings: its attributes that count for an evaluation, by name; see `forget_what_it_changed`.
        cached: what its parametrizations have made for more than one evaluation, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)  # which a parametrization changes
        self.attributes = set(module.__dict__)
        self.settings = {name: noted(value) for name, value in module.__dict__.items() if name not in OF_EVERY_MODULE}
        # Its attributes until an evaluation has put another object in the place of one, and which of them were copied.
        self._objects: dict[str, Any] | None = module.__dict__.copy()
        self._copied = [name for name, value in self.settings.items() if value is not module.__dict__[name]]
        self.hooks = hooks_of(module)
        self.parameters = dict(module._parameters)
        self.trained = {name for name, tensor in self.parameters.items() if tensor is not None and tensor.requires_grad}
        self.buffers = dict(module._buffers)
        self.children = dict(module._modules)
        self.cached: dict[str, Tensor] = {}

    def tensors(self) -> Iterator[Tensor]:
        """Yield parameters, buffers, and tensors of attributes."""
        for value in (*self.parameters.values(), *self.buffers.values(), *self.settings.values()):
            yield from tensors_in(value)

    def own_buffers(self) -> Iterator[Tensor]:
        """Return the buffers."""
        return (buffer for buffer in self.buffers.values() if buffer is not None)

    def own_tensors(self) -> Iterator[Tensor]:
        """Yield buffers, and tensors of attributes but those that autograd has computed."""
        yield from self.own_buffers()
        for value in self.settings.values():
            yield from (tensor for tensor in tensors_in(value) if not tensor.requires_grad)

    def forget_what_it_changed(self) -> None:
        """Count as settings, behind the evaluation, what it has left as it was, and numbers, texts and switches."""
        now = self.module.__dict__
        if self._has_the_same_objects() and self._copies_are_equal():
            return
        self._objects = None
        self.attributes |= {name for name, value in now.items() if not is_setting(value)}
        before, self.settings = self.settings, {}
        for name, value in before.items():
            stays = name in now and (is_equal(now[name], value) or (is_plain(now[name]) and is_plain(value)))
            if stays or is_setting(value):
                self.settings[name] = value
            elif isinstance(value, Tensor) or parts_of(value) is not None:
                # A state, which an evaluation reads and replaces.
                self.settings[name] = noted(value, with_graphs=False)

    def is_as_it_was(self) -> bool:
        """Return whether an evaluation of the module now is one of what it was."""
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
            all(name in now and is_equal(now[name], value) for name, value in self.settings.items())
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
        return all(is_equal(self.module.__dict__[name], self.settings[name]) for name in self._copied)

    def is_compiled(self) -> bool:
        """Return whether what the module runs is compiled, or one of its attributes is."""
        return compiled_part(self.module) is not None or any(map(is_compiled, self.module.__dict__.values()))

    def may_be_known_by_others(self) -> bool:
        """Return whether what the module runs may know it by another way than as itself, as hooks and methods do."""
        hooks = [hook for name, of_name in self.hooks.items() if "forward" in name for hook in of_name.values()]
        return (
            "forward" in self.module.__dict__
            or any(callable(hook) and not _is_of_weights(hook) for hook in hooks)
            or not all(map(knows_no_module, self.settings.values()))
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
        settings = {name: noted(value) for name, value in self.settings.items()}  # which the replica may change
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


def _is_of_weights(hook: Any) -> bool:
    """Return whether a hook is PyTorch's own, of weights that are normalized or pruned."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _same(now: Any, then: dict[str, Any]) -> bool:
    """Return whether tensors are the same objects, or, in fully sharded training, have the same values."""
    return now.keys() == then.keys() and all(
        tensor is then[name] or hasattr(tensor, "full_tensor") or hasattr(then[name], "full_tensor")
        for name, tensor in now.items()
    )
