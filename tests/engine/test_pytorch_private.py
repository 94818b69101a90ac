"""What is used of PyTorch beyond its public interface does what it is used for, in the version at hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from monai_iunet.engine import pytorch_private as private
from monai_iunet.networks.layers.kept_convolution import KeptConvolutions


def test_can_pack_saved_tensors() -> None:
    assert private.can_pack_saved_tensors()
    seen: list[bool] = []

    def note(x: Tensor) -> Tensor:
        seen.append(private.can_pack_saved_tensors())
        return x.sum()

    x = torch.ones(2)
    torch.func.grad(note)(x)
    torch.func.jvp(note, (x,), (x,))
    torch.vmap(note)(torch.ones(2, 2))
    with disable_saved_tensors_hooks("none"):
        note(x)
    assert seen == [False] * 4
    assert private.can_pack_saved_tensors()


def test_a_backward_pass_has_a_number() -> None:
    numbers = []
    x = torch.ones(1, requires_grad=True)
    for _ in range(2):
        y = 2 * x
        y.register_hook(lambda gradient: numbers.append(private.current_backward_pass()))
        y.backward()
    assert private.current_backward_pass() == -1
    assert -1 not in numbers
    assert len(set(numbers)) == 2


def test_version() -> None:
    x = torch.zeros(2)
    x.add_(1)
    assert private.version(x) == 1
    with torch.inference_mode():
        assert private.version(torch.zeros(2).add_(1)) == 0


@pytest.mark.parametrize("saved", [0, 1])
def test_graph_is_retained(saved: int) -> None:
    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(*[x] * saved)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(private.graph_is_retained(ctx))
            return gradient

    seen: list[bool] = []
    y = Ask.apply(torch.ones(1, requires_grad=True))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_is_exporting() -> None:
    class Note(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if private.is_exporting() else x

    assert not private.is_exporting()
    x = torch.zeros(2)
    assert torch.export.export(Note(), (x,)).module()(x).sum() == 2
    assert torch.compile(Note(), backend="eager")(x).sum() == 0


def test_is_in_forward_mode() -> None:
    assert not private.is_in_forward_mode()
    with forward_ad.dual_level():
        assert private.is_in_forward_mode()
    seen: list[bool] = []

    def note(x: Tensor) -> Tensor:
        seen.append(private.is_in_forward_mode())
        return x.sum()

    torch.func.jvp(note, (torch.ones(2),), (torch.ones(2),))
    assert seen == [True]
    assert not private.is_in_forward_mode()


def test_is_view() -> None:
    x = torch.zeros(4)
    assert private.is_view(x[1:])
    assert not private.is_view(x)
    with torch.inference_mode():
        whole = torch.zeros(3, 4)
        assert not any(map(private.is_view, (whole, whole.mT)))
        assert all(map(private.is_view, (whole[1:], whole[:, ::2], whole[:1].expand(3, 4))))
        assert private.is_view(torch.zeros(12).unfold(0, 4, 2))


def test_keep_versions() -> None:
    one, other = torch.zeros(2), torch.zeros(2)
    with private.keep_versions([one, other]):
        one.add_(1)
        other.add_(1)
    assert one._version == other._version == 0


def test_without_modes() -> None:
    with private.FakeTensorMode():
        assert not isinstance(private.without_modes(lambda: torch.ones(2)), private.FakeTensor)
        assert private.without_modes(lambda: torch.get_rng_state().numpy().tobytes())
        assert isinstance(torch.ones(2), private.FakeTensor)


def test_fake_tensors_say_that_they_have_no_values() -> None:
    with private.FakeTensorMode(), pytest.raises(private.DataDependentOutputException):
        torch.ones(()).item()


def test_dispatch_modes_see_operators_and_trees_have_leaves() -> None:
    seen = []

    class Note(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Note():
        torch.ones(2).sum()
    assert len(seen) == 2
    assert private.tree_leaves([1, {"a": 2}]) == [1, 2]
    assert private.tree_map(abs, (-1, {"a": [-2]})) == (1, {"a": [2]})


def test_frees_gradients_before_converting() -> None:
    """What the version says is what this version does."""
    incoming: list[weakref.ref[torch.UntypedStorage]] = []
    held: list[bool] = []

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            incoming.append(weakref.ref(gradient.untyped_storage()))
            return gradient.bfloat16()

    class Watch(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.bfloat16:
                held.append(incoming[0]() is not None)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    loss = (Rounded.apply(x) * torch.rand(3)).sum()
    with Watch():
        loss.backward()
    assert held == [not private.frees_gradients_before_converting()]


def test_has_hooks() -> None:
    module = torch.nn.Linear(1, 1)
    assert not private.has_hooks(module)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *_: None)
        assert private.has_hooks(module)
        handle.remove()
        assert not private.has_hooks(module)


def test_cached_parametrizations() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(1, 1))
    assert private.cached_parametrizations(layer) == {}
    with torch.nn.utils.parametrize.cached():
        assert private.cached_parametrizations(torch.nn.Linear(1, 1)) == {}
        found = private.cached_parametrizations(layer)
        assert [*found] == ["weight"]
        assert found["weight"] is layer.weight


def test_compiled_part() -> None:
    module = torch.nn.Linear(1, 1)
    assert private.compiled_part(module) is None
    assert private.compiled_part(torch.compile(module, backend="eager")) is module
    module.compile(backend="eager")
    assert private.compiled_part(module) is module


def test_batches_of_gradients() -> None:
    found: list[Any] = []

    def see(gradient: Tensor) -> None:
        found.append(private.is_batched(torch.ones(1), gradient))
        with private.out_of_batches():
            found.append(torch.rand(2).shape)
        with pytest.raises(RuntimeError, match="random operations"):
            torch.rand(2)

    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(see)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert found == [True, torch.Size([2])]
    assert not private.is_batched(x)
    with private.out_of_batches():
        assert torch.rand(2).shape == (2,)


def test_out_of_transforms_and_where_hooks_are_forbidden() -> None:
    def draw(x: Tensor) -> Tensor:
        with private.out_of_batches():
            assert private.can_pack_saved_tensors()
            assert torch.rand(2).shape == (2,)
        assert not private.can_pack_saved_tensors()
        return x.sum()

    torch.vmap(draw)(torch.ones(3, 2))
    torch.func.grad(draw)(torch.ones(2))
    with disable_saved_tensors_hooks("none here"):
        draw(torch.ones(2))
    assert private.can_pack_saved_tensors()


def test_is_compiled() -> None:
    assert private.is_compiled(torch.compile(torch.sin))
    assert not private.is_compiled(torch.sin)
    assert not private.is_compiled(None)


def test_function_modes() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    with torch.device("cpu"), KeptConvolutions():
        assert private.function_modes() == []
        with Mode() as outer, Mode() as inner:
            assert private.function_modes() == [outer, inner]


def test_dispatch_modes() -> None:
    class Mode(private.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    assert private.dispatch_modes() == []
    with Mode() as outer, Mode() as inner:
        assert private.dispatch_modes() == [outer, inner]


def test_saved_tensor_hooks() -> None:
    assert private.saved_tensor_hooks() is None
    with torch.autograd.graph.save_on_cpu():
        outer = private.saved_tensor_hooks()
        assert outer is not None
        with torch.autograd.graph.save_on_cpu():
            assert private.saved_tensor_hooks() != outer
        assert private.saved_tensor_hooks() == outer
    assert private.saved_tensor_hooks() is None


def test_hooks_of() -> None:
    module = torch.nn.Linear(1, 1)
    before = private.hooks_of(module)
    assert not any(before.values())
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        lambda hook: module.register_forward_hook(hook, with_kwargs=True, always_call=True),
        lambda hook: module.register_forward_pre_hook(hook, with_kwargs=True),
        module.register_full_backward_hook,
        module.register_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert private.hooks_of(module) != before
        handle.remove()
        assert private.hooks_of(module) == before


def test_hooks_of_all_modules() -> None:
    before = private.hooks_of_all_modules()
    for register in (
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert private.hooks_of_all_modules() != before
        handle.remove()
        assert private.hooks_of_all_modules() == before


def test_memory_of() -> None:
    x = torch.zeros(3)
    memory = private.memory_of(x)
    assert memory == private.memory_of(x[1:])
    assert memory != private.memory_of(x.clone())
    cycle: list[Any] = [x.untyped_storage()]  # as `torch.save` leaves one behind
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert memory == private.memory_of(x)
    del x
    assert memory.expired()
    assert memory not in [private.memory_of(torch.zeros(3)) for _ in range(100)]


def test_saving_a_part_of_activations() -> None:
    from torch._functorch import config

    before = config.activation_memory_budget
    with private.saving_a_part_of_activations(0.25):
        assert config.activation_memory_budget == 0.25
    assert config.activation_memory_budget == before
