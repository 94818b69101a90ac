"""What this package uses of PyTorch beyond its public interface, and why; nothing else does.

The three dictionaries of a module, which `repetition.py` reads, are the exception. Each name has a test in
`tests/engine/test_pytorch_private.py`, which is run with every version of PyTorch that is supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._functorch import config as functorch_config
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "cached_parametrizations",
    "can_pack_saved_tensors",
    "compiled_part",
    "current_backward_pass",
    "dispatch_modes",
    "frees_gradients_before_converting",
    "function_modes",
    "graph_is_retained",
    "has_hooks",
    "has_values",
    "hooks_of",
    "hooks_of_all_modules",
    "is_batched",
    "is_compiled",
    "is_exporting",
    "is_in_forward_mode",
    "is_view",
    "keep_versions",
    "memory_of",
    "out_of_batches",
    "saved_tensor_hooks",
    "saving_a_part_of_activations",
    "tree_leaves",
    "tree_map",
    "version",
    "without_modes",
]

Result = TypeVar("Result")

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def cached_parametrizations(module: nn.Module) -> dict[str, Tensor]:
    """Return, within `parametrize.cached()`, the tensors that a module is parametrized by, which are computed once."""
    if not parametrize._cache_enabled or not parametrize.is_parametrized(module):
        return {}
    parametrizations: Any = module.parametrizations
    return {name: getattr(module, name) for name in parametrizations}


def can_pack_saved_tensors() -> bool:
    """Return whether saved-tensor hooks may be set: not in `torch.func`, nor where a user has forbidden them.

    `torch.func` refuses or ignores them; there is no public question for either.
    """
    enabled: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return enabled and not torch._C._are_functorch_transforms_active()


def compiled_part(module: nn.Module) -> nn.Module | None:
    """Return the module of which a call of this one runs what it was compiled to: this, or what it wraps; else None."""
    if isinstance(module, OptimizedModule):
        return module._orig_mod
    return None if module._compiled_call_impl is None else module


def current_backward_pass() -> int:
    """Return the number of the backward pass that runs in this thread, -1 without one; others may share the pass."""
    return torch._C._current_graph_task_id()


def dispatch_modes() -> list[Any]:
    """Return what sees every operation, outermost first: modes of users, which may change results; none of ours."""
    return [mode for mode in _get_current_dispatch_mode_stack() if not _is_ours(mode)]


def frees_gradients_before_converting() -> bool:
    """Return whether autograd lets go of a node's incoming gradients before it converts those that the node returned.

    It converts what has not the type of the node's input; before PyTorch 2.13 it holds both meanwhile.
    """
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def function_modes() -> list[Any]:
    """Return what sees every call of a function of PyTorch, outermost first: modes of users, which may change results.

    Not the default device, and no modes of this package.
    """
    modes = _get_current_function_mode_stack()
    return [mode for mode in modes if not (isinstance(mode, DeviceContext) or _is_ours(mode))]


def _is_ours(mode: Any) -> bool:
    return type(mode).__module__.partition(".")[0] == __name__.partition(".")[0]


def graph_is_retained(ctx: Any) -> bool:
    """Return whether the graph survives the backward pass that is running; if not, free what the node `ctx` saved."""
    ctx.maybe_clear_saved_tensors()
    try:
        ctx.saved_tensors  # noqa: B018 - raises once the saved tensors are freed
    except RuntimeError:
        return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks of a module see what goes in and comes out, in the forward or the backward pass."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or torch.nn.modules.module._has_any_global_hook()


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values that can be looked at: no fake, sharded or functional one, none on "meta"."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and can_pack_saved_tensors()


def hooks_of(module: nn.Module) -> dict[str, dict[int, Any]]:
    """Return the hooks that a call of a module runs, copies of its dictionaries by their names."""
    return {name: getattr(module, name).copy() for name in HOOKS}


def hooks_of_all_modules() -> list[dict[int, Any]]:
    """Return the forward hooks that a call of any module runs, copies of the two dictionaries."""
    hooks = torch.nn.modules.module
    return [hooks._global_forward_pre_hooks.copy(), hooks._global_forward_hooks.copy()]


def is_batched(*tensors: Tensor) -> bool:
    """Return whether tensors stand for several, as gradients do by `torch.autograd.grad(..., is_grads_batched=True)`.

    So do those of `torch.autograd.functional.jacobian(..., vectorize=True)`. These have views and products, but no
    `flatten`, and nothing can be written into a tensor made before.
    """
    return any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def is_compiled(value: Any) -> bool:
    """Return whether a value is a function that `torch.compile` has made."""
    return callable(value) and hasattr(value, "_torchdynamo_orig_callable")


def is_exporting() -> bool:
    """Return whether `torch.export` is tracing.

    `torch.compiler.is_exporting()`, which is public, says so of every compiled graph, too, up to PyTorch 2.11.
    """
    return torch.compiler._is_exporting_flag


def is_in_forward_mode() -> bool:
    """Return whether there may be tangents of forward-mode differentiation: within `forward_ad.dual_level()`."""
    return forward_ad._current_level >= 0


def is_view(tensor: Tensor) -> bool:
    """Return whether a tensor shares the memory of another tensor that it is a view of.

    PyTorch does not follow views of tensors made in inference mode; there it is told by a memory that is larger, or by
    strides with which values share a place, as those of windows that overlap.
    """
    if tensor.is_inference():
        dense = torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # which keeps no other strides
        return not dense or tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor._is_view()


def keep_versions(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Change tensors in place without the knowledge of autograd, which must find them as they were afterwards."""
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))


def memory_of(tensor: Tensor) -> StorageWeakRef:
    """Return what stands for the memory of a tensor, equal for no other one, without keeping it.

    A `weakref` to the storage does not: before PyTorch 2.13 Python may collect that object, as part of a cycle, and
    another one of the same memory takes its place.
    """
    return StorageWeakRef(tensor.untyped_storage())


@contextmanager
def out_of_batches() -> Iterator[None]:
    """Compute what belongs to no batch of `is_batched`, within which PyTorch refuses to draw random numbers.

    Nor to a transform of `torch.func`, as where `torch.vmap` maps `torch.autograd.grad`. Saved-tensor hooks may be set,
    which some of these, or the user, have forbidden.
    """
    levels = torch._C._vmapmode_increment_nesting()
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    hooks: Any = torch._C._autograd
    forbidden = hooks._saved_tensors_hooks_get_disabled_error_message()
    hooks._saved_tensors_hooks_enable()
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        if forbidden is not None:
            hooks._saved_tensors_hooks_disable(forbidden)
        for _ in range(levels - 1):
            torch._C._vmapmode_increment_nesting()


def saved_tensor_hooks() -> Any:
    """Return the innermost hooks that see what autograd saves, and may hold it; None without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def saving_a_part_of_activations(part: float) -> AbstractContextManager[None]:
    """Return a context in which what is compiled saves this part of its activations, and evaluates the others again.

    Source: `activation_memory_budget` of `torch._functorch.config`.
    """
    patched: AbstractContextManager[None] = functorch_config.patch(activation_memory_budget=part)
    return patched


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place, as far as autograd counts: not in inference, nor compiled."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def without_modes(function: Callable[[], Result]) -> Result:
    """Call a function with real tensors where operators are counted, or only pretend, by a dispatch mode."""
    with _disable_current_modes():
        return function()
