"""One table: whatever people do around a network, gradients are those of plain autograd with the same weights.

Each row is a way to get gradients; it is walked with activations that are rebuilt and with stored ones, in float64.
"""

from __future__ import annotations

import copy
import gc
import io
import random
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from monai.networks.layers.drop_path import DropPath
from monai.transforms import Compose, RandScaleIntensity
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from monai_iunet import IUNet, SegIUNet
from monai_iunet.engine import repetition
from monai_iunet.engine.pytorch_private import TorchDispatchMode
from monai_iunet.engine.reversible import InvertibleLayer
from monai_iunet.networks.blocks.chain import InvertibleChain
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.helpers import randomize, relative_errors

MODES = ("store", "invert", "convolutions")  # the first is plain autograd


def network(**options: Any) -> SegIUNet:
    torch.manual_seed(0)
    return randomize(SegIUNet(2, 1, 3, (4, 8), **{"act": "TANH", **options})).double()


def image() -> Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> list[Tensor]:
    """Gradients of the image and of all parameters, after a way that ends with backward passes."""
    net.zero_grad()
    x = image().requires_grad_()
    torch.manual_seed(5)
    run(net, x)
    found = [tensor.grad for tensor in (x, *net.parameters())]
    assert all(gradient is not None for gradient in found)
    return found


def compare(run: Callable[[Any, Tensor], Any], **options: Any) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations, **options)
        before = dict(net.named_parameters()), {name: module.training for name, module in net.named_modules()}
        found.append(gradients(net, run))
        after = dict(net.named_parameters()), {name: module.training for name, module in net.named_modules()}
        assert all(before[0][name] is parameter for name, parameter in after[0].items())
        assert before[1] == after[1]
    assert largest_error(found) < 1e-10


def largest_error(found: list[Any]) -> float:
    """Of the gradients found in each of several ways, beside those of the first."""
    return max(error for others in found[1:] for error in relative_errors(others, found[0]))


def loss(y: Tensor) -> Tensor:
    return y.square().mean()


def plain(net: Any, x: Tensor) -> None:
    loss(net(x)).backward()


# -- hooks on saved tensors, checkpointing


def same(tensor: Tensor) -> Tensor:
    return tensor


def through_numpy(tensor: Tensor) -> Any:
    return tensor.detach().numpy().copy()


HOOKS: dict[str, Callable[[], Any]] = {
    "identity": lambda: saved_tensors_hooks(same, same),
    "save_on_cpu": save_on_cpu,
    "copies": lambda: saved_tensors_hooks(through_numpy, torch.from_numpy),
}


@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_outside(hooks: str) -> None:
    def run(net: Any, x: Tensor) -> None:
        with HOOKS[hooks]():
            y = net(x)
        loss(y).backward()

    compare(run)


def test_hooks_nested() -> None:
    def run(net: Any, x: Tensor) -> None:
        with saved_tensors_hooks(through_numpy, torch.from_numpy), save_on_cpu():
            y = net(x)
        loss(y).backward()

    compare(run)


def test_hooks_around_both_passes() -> None:
    def run(net: Any, x: Tensor) -> None:
        with save_on_cpu():
            loss(net(x)).backward()

    compare(run)


class Within(nn.Sequential):
    """A branch that evaluates itself within something."""

    way: Callable[..., Any]

    def forward(self, x: Tensor) -> Tensor:
        return type(self).way(super().forward, x)


def under_hooks(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with save_on_cpu():
        return forward(x)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    "way",
    [under_hooks, partial(checkpoint, use_reentrant=False), partial(checkpoint, use_reentrant=True)],
    ids=["hooks", "checkpoint", "reentrant checkpoint"],
)
def test_hooks_and_checkpoints_within_a_branch(way: Callable[..., Any], outside: bool) -> None:
    branch = type("Branch", (Within,), {"way": staticmethod(way)})

    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        return branch(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.Tanh())

    def run(net: Any, x: Tensor) -> None:
        with save_on_cpu() if outside else saved_tensors_hooks(same, same):
            y = net(x)
        loss(y).backward()

    compare(run, make_branch=make)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"norm": "BATCH"}], ids=str)
def test_a_checkpoint_around(use_reentrant: bool, options: dict[str, Any]) -> None:
    compare(lambda net, x: loss(checkpoint(net, x, use_reentrant=use_reentrant)).backward(), **options)


def test_a_checkpoint_wrapper_of_each_part() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    def run(net: Any, x: Tensor) -> None:
        apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, AdditiveCoupling | IUNet))
        loss(net(x)).backward()

    found = []
    for activations in MODES:
        net = network(activations=activations)
        parameters = list(net.parameters())
        x = image().requires_grad_()
        run(net, x)
        found.append([x.grad, *(parameter.grad for parameter in parameters)])
    assert largest_error(found) < 1e-10


# -- graphs


def test_retained_graphs() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        for last in (False, False, True):
            value.backward(retain_graph=not last)

    compare(run)


def test_two_forward_passes_then_two_backward_passes() -> None:
    def run(net: Any, x: Tensor) -> None:
        first, second = loss(net(x)), loss(net(2 * x))
        first.backward()
        second.backward()

    compare(run)
    compare(run, dropout=0.3)


def test_second_derivatives() -> None:
    def run(net: Any, x: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss(net(x)), x, create_graph=True)
        (gradient.square().sum() + loss(net(x))).backward()

    compare(run)
    net = randomize(IUNet(1, (2, 2), couplings=1, act="TANH", norm=None)).double()
    x = torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(net, (x,))


@pytest.mark.parametrize("options", [{}, {"channel_mixing": 1, "norm": None}, {"act": "LEAKYRELU"}], ids=str)
def test_second_derivatives_by_parameters(options: dict[str, Any]) -> None:
    """The graph of the first ones holds what was rebuilt, which nothing else may be written over."""

    def run(net: Any, x: Tensor) -> None:
        inputs = [x, *net.parameters()]
        first = torch.autograd.grad(loss(net(x)), inputs, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()

    compare(run, **options)


def test_second_derivatives_beside_gradients_of_the_first_order() -> None:
    """What a pass that records its gradients has rebuilt, another one in the same graph may take."""

    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        first = torch.autograd.grad(value, list(net.iunet.decoder.parameters()), create_graph=True)
        torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
        (sum(gradient.square().sum() for gradient in first) + value).backward()

    compare(run)


def test_gradients_of_a_part_then_of_the_rest() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        torch.autograd.grad(value, list(net.iunet.decoder.parameters()), retain_graph=True)
        torch.autograd.grad(value, net.stem.weight, retain_graph=True)
        value.backward()

    compare(run)


@pytest.mark.parametrize("keep_output", [False, True])
@pytest.mark.parametrize(
    "place", ["encoder.0.0", "encoder.1.0", "decoder.1.1", "encoder.0.1.branch.0", "downsamplings.0"]
)
def test_a_loss_on_what_a_hook_caught(place: str, keep_output: bool) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations)
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any, caught: list[Tensor] = caught) -> None:
            caught.extend(output if isinstance(output, tuple) else [output])

        handle = net.iunet.get_submodule(place).register_forward_hook(catch)
        x = image().requires_grad_()
        y = net(x)
        handle.remove()
        if not keep_output:
            del y
        inner = sum(tensor.sin().sum() for tensor in caught)
        for retain in (True, False):
            inner.backward(retain_graph=retain)
        found.append([tensor.grad for tensor in (x, *net.stem.parameters())])
    assert largest_error(found) < 1e-10


def test_a_loss_on_the_inside_after_the_one_on_the_output() -> None:
    def run(net: Any, x: Tensor) -> None:
        caught = []
        handle = net.iunet.encoder[1][0].register_forward_hook(lambda module, args, output: caught.extend(output))
        y = net(x)
        handle.remove()
        loss(y).backward(retain_graph=True)
        del y
        caught[1].sin().sum().backward()

    compare(run)


def test_what_a_hook_caught_while_rebuilding_says_so() -> None:
    net, caught = network(), []
    net.iunet.encoder[0][0].branch.register_forward_hook(lambda module, args, output: caught.append(output))
    plain(net, image())
    assert len(caught) == 2
    with pytest.raises(RuntimeError, match="computed while activations were rebuilt"):
        caught[1].sum().backward()


def test_tensor_hooks_and_module_hooks_see_the_same_gradients() -> None:
    seen: dict[str, list[Tensor]] = {}
    for activations in MODES:
        net, noted = network(activations=activations), []
        for part in (net.iunet.encoder[0][0], net.iunet.decoder[1][1].branch, net.iunet.upsamplings[0]):
            part.register_full_backward_hook(lambda module, grads, outs, noted=noted: noted.extend([*grads, *outs]))
        plain(net, image().requires_grad_())
        seen[activations] = [gradient for gradient in noted if gradient is not None]
    assert largest_error(list(seen.values())) < 1e-10


# -- modes, weights and buffers between the passes


class Doubling(TorchFunctionMode):
    """Doubles what convolutions give."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is nn.functional.conv2d else result


@pytest.mark.parametrize("around", ["the forward pass", "both passes"])
def test_a_mode_that_changes_functions(around: str) -> None:
    def run(net: Any, x: Tensor) -> None:
        with Doubling():
            value = loss(net(x))
            if around == "both passes":
                value.backward()
        if around == "the forward pass":
            value.backward()

    compare(run)


class Inquisitive(nn.Conv2d):
    """Adds the gradient of its output to it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).tanh()
        return y + torch.autograd.grad(y.square().sum(), self.weight, create_graph=True)[0].sum()


@pytest.mark.parametrize("activations", MODES[1:])
def test_gradients_within_a_branch_are_refused(activations: str) -> None:
    net = network(
        activations=activations,
        make_branch=lambda dims, inputs, outputs, *_: Inquisitive(inputs, outputs, 3, padding=1),
    )
    with pytest.raises(RuntimeError, match="computes gradients while it is evaluated"):
        net(image())


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"norm": "BATCH"}], ids=str)
@pytest.mark.parametrize("modes", [(True, False), (False, True), (False, False)])
def test_a_mode_that_changes_between_the_passes(options: dict[str, Any], modes: tuple[bool, bool]) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations, **options).train(modes[0])
        x = image().requires_grad_()
        torch.manual_seed(2)
        value = loss(net(x))
        net.train(modes[1])
        value.backward()
        assert all(module.training == modes[1] for module in net.modules())
        found.append([tensor.grad for tensor in (x, *net.parameters())])
    assert largest_error(found) < 1e-10


def set_all(net: nn.Module, kind: type, **settings: Any) -> None:
    for module in net.modules():
        if isinstance(module, kind):
            for name, value in settings.items():
                setattr(module, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: set_all(net, nn.Dropout, p=0.0),
        lambda net: set_all(net, nn.InstanceNorm2d, eps=1.0),
        lambda net: set_all(net, nn.LeakyReLU, negative_slope=1.0),
        lambda net: set_all(net, nn.Conv2d, padding=(1, 1), dilation=(1, 1)),  # as before, in other words
        lambda net: net.requires_grad_(False).requires_grad_(True),
        lambda net: setattr(net, "activations", "store"),
    ],
    ids=["dropout", "eps", "slope", "padding", "requires_grad", "activations"],
)
def test_settings_that_change_between_the_passes(change: Any) -> None:
    def run(net: nn.Module, x: Tensor) -> None:
        value = loss(net(x))
        change(net)
        value.backward()

    compare(run, dropout=0.3, act="LEAKYRELU")


def test_settings_that_a_branch_changes_itself() -> None:
    """A branch that depends on how often it was called, and counts."""

    class Alternating(nn.Conv2d):
        calls, last = 0, ""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__(inputs, outputs, 3, padding=1)
            self.calls, self.last = 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = self.calls * super().forward(x).tanh()
            return self.last

    found, counts = [], []
    for activations in MODES:
        net = network(
            activations=activations, make_branch=lambda dims, inputs, outputs, *_: Alternating(inputs, outputs)
        )
        for _ in range(2):
            net.zero_grad()
            x = image().requires_grad_()
            (loss(net(x)) + loss(net(2 * x))).backward()
        found.append([tensor.grad for tensor in (x, *net.parameters())])
        counts.append([module.calls for module in net.modules() if isinstance(module, Alternating)])
    assert largest_error(found) < 1e-10
    assert counts == [[4] * len(counts[0])] * len(MODES)


class Gain(nn.Conv1d):
    """Has a setting of its class, and is taken for empty."""

    gain: Any = 2.0

    def __init__(self) -> None:
        super().__init__(2, 2, 1)

    def __len__(self) -> int:
        return 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__dict__":
            raise AttributeError("This module cannot be changed as a whole.")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return ((self.gain.value if isinstance(self.gain, Enum) else self.gain) * super().forward(x)).tanh()


class FirstCall(Gain):
    """Notes in its first call that there was one."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "called"):
            self.called, x = True, 3 * x
        return super().forward(x)


Strength = Enum("Strength", {"HIGH": 3.0})


def gradients_of_a_branch(branch: nn.Module, change: Callable[[nn.Module], Any], rebuilds: bool) -> list[Tensor]:
    layer = AdditiveCoupling(nn.Sequential(branch)).double()
    layer.rebuilds = rebuilds
    inputs = [torch.ones(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    value = sum(map(loss, layer(*inputs)))
    change(branch)
    return list(torch.autograd.grad(value, [*inputs, *layer.parameters()]))


@pytest.mark.parametrize("kind", [Gain, FirstCall])
@pytest.mark.parametrize("gain", [None, 3.0, np.float32(3), Strength.HIGH])
def test_settings_of_a_class_that_are_set_between_the_passes(gain: Any, kind: type[Gain]) -> None:
    """Also set once more, before, and in whatever type."""
    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        branch = kind()
        if gain is not None:
            branch.gain = gain
        found.append(gradients_of_a_branch(branch, lambda module: setattr(module, "gain", 0.5), rebuilds))
    assert largest_error(found) < 1e-10


class Adjusted(nn.Conv1d):
    """Has settings that are no numbers."""

    act = staticmethod(torch.tanh)

    def __init__(self) -> None:
        super().__init__(2, 2, 1)
        self.scales: Any = [1.0, [2.0]]
        self.offsets = {"first": torch.ones((), dtype=torch.double)}
        self.names = {"first"}
        self.condition = torch.ones((), dtype=torch.double)
        self.way: Any = torch.sin
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(super().forward(x) * self.scales[0] * self.scales[1][0] * self.condition)
        self.seen.append(y)
        return torch.stack([self.way(y) + offset for name, offset in self.offsets.items() if name in self.names]).sum(0)


@pytest.mark.parametrize(
    "change",
    [
        lambda branch: branch.scales[1].__setitem__(0, 5.0),
        lambda branch: setattr(branch, "scales", (5.0, (5.0,))),
        lambda branch: branch.offsets.update(first=torch.zeros((), dtype=torch.double)),
        lambda branch: branch.names.clear(),
        lambda branch: setattr(branch, "condition", 5 * branch.condition),
        lambda branch: setattr(branch, "way", lambda y: 5 * y),
        lambda branch: setattr(branch, "act", torch.sigmoid),
    ],
    ids=["item", "list", "dict", "set", "tensor", "function", "of the class"],
)
def test_settings_of_any_kind_that_change_between_the_passes(change: Any) -> None:
    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        found.append(gradients_of_a_branch(Adjusted(), change, rebuilds))
    assert largest_error(found) < 1e-10


class Named(NamedTuple):
    last: Tensor
    calls: int = 0


@dataclass
class Record:
    last: Tensor
    calls: int = 0


@dataclass(frozen=True)
class Frozen:
    last: Tensor
    calls: int = 0


@dataclass(slots=True)
class Slots:
    last: Tensor
    calls: int = 0


# The state of a branch made of a tensor, and the tensor in it.
STATES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda last: last, lambda state: state),
    "deque": (lambda last: deque([last], 2), lambda state: state[-1]),
    "dictionary": (lambda last: {"last": last}, lambda state: state["last"]),
    "named tuple": (Named, lambda state: state.last),
    "dataclass": (Record, lambda state: state.last),
    "frozen dataclass": (Frozen, lambda state: state.last),
    "dataclass with slots": (Slots, lambda state: state.last),
    "namespace": (lambda last: SimpleNamespace(last=last), lambda state: state.last),
}


class Remembering(nn.Conv1d):
    """Reads what its former call has left, and replaces it or changes it."""

    def __init__(self, kind: str, detach: bool = True) -> None:
        super().__init__(2, 2, 1)
        self.kind, self.detach = kind, detach
        self.make, self.last = STATES[kind]
        self.state: Any = self.make(torch.ones(1, 2, 1, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(super().forward(x)) * self.last(self.state)
        left = 1 + y.mean((0, 2), keepdim=True)
        left = left.detach() if self.detach else left
        if self.kind == "deque":
            self.state.append(left)
        elif self.kind in ("dataclass", "namespace"):
            self.state.last = left
        else:
            self.state = self.make(left)
        return y


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_goes_on_from_call_to_call(kind: str, compiled: bool) -> None:
    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        layer = AdditiveCoupling(Remembering(kind)).double()
        layer.rebuilds = rebuilds
        if compiled:
            layer.branch.compile(backend="eager")
        inputs = [torch.rand(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
        value = sum(sum(map(loss, layer(*inputs))) for _ in range(3))
        gradients = list(torch.autograd.grad(value, [*inputs, *layer.parameters()]))
        found.append([*gradients, layer.branch.last(layer.branch.state)])
    assert largest_error(found) < 1e-10


@pytest.mark.parametrize("keep", [lambda state: [state], lambda state: {"first": (state,)}], ids=["list", "nested"])
def test_a_state_in_a_container_that_a_branch_changes_in_place(keep: Callable[[Tensor], Any]) -> None:
    class Moving(nn.Conv1d):
        state: Any = None

        def forward(self, x: Tensor) -> Tensor:
            state = self.state[0] if isinstance(self.state, list) else self.state["first"][0]
            y = torch.tanh(super().forward(x)) * state.clone()
            state.mul_(0.5).add_(y.detach().mean((0, 2), keepdim=True))
            return y

    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        layer = AdditiveCoupling(Moving(2, 2, 1)).double()
        layer.rebuilds = rebuilds
        state = torch.ones(1, 2, 1, dtype=torch.double)
        layer.branch.state = keep(state)
        inputs = [torch.rand(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
        value = sum(sum(map(loss, layer(*inputs))) for _ in range(3))
        found.append([*torch.autograd.grad(value, [*inputs, *layer.parameters()]), state])
    assert largest_error(found) < 1e-10


@pytest.mark.parametrize("kind", STATES)
def test_a_state_with_the_graph_of_the_former_call_is_refused(kind: str) -> None:
    layer = AdditiveCoupling(Remembering(kind, detach=False)).double()
    inputs = [torch.rand(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    value = sum(sum(map(loss, layer(*inputs))) for _ in range(3))
    with pytest.raises(RuntimeError, match="Let it keep what is detached"):
        value.backward()


@pytest.mark.parametrize(
    "scales",
    [([2.0],), ({0: 2.0},), (np.array([2.0]),), OrderedDict({0: 2.0}), defaultdict(float, {0: 2.0}), deque([2.0], 1)],
    ids=["list in a tuple", "dict in a tuple", "array in a tuple", "OrderedDict", "defaultdict", "deque"],
)
def test_settings_in_containers_that_change_between_the_passes(scales: Any) -> None:
    def holder(branch: Any) -> Any:
        return branch.scales[0] if isinstance(branch.scales, tuple) else branch.scales

    class Scaled(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(super().forward(x) * float(holder(self)[0]))

    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        branch: Any = Scaled(2, 2, 1)
        branch.scales = copy.deepcopy(scales)
        found.append(gradients_of_a_branch(branch, lambda branch: holder(branch).__setitem__(0, 5.0), rebuilds))
    assert largest_error(found) < 1e-10


@pytest.mark.parametrize("settings", [SimpleNamespace(scale=2.0), Slots(torch.ones(()), 2)], ids=["namespace", "slots"])
def test_settings_in_records_that_change_between_the_passes(settings: Any) -> None:
    name = "scale" if hasattr(settings, "scale") else "calls"

    class Scaled(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(super().forward(x) * float(getattr(self.settings, name)))

    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        branch: Any = Scaled(2, 2, 1)
        branch.settings = copy.deepcopy(settings)
        found.append(gradients_of_a_branch(branch, lambda branch: setattr(branch.settings, name, 5), rebuilds))
    assert largest_error(found) < 1e-10


def test_objects_that_hold_others_are_left_alone() -> None:
    @dataclass
    class Node:
        children: list[Any] = field(default_factory=list)
        parent: Any = None

    branch: Any = nn.Conv1d(2, 2, 1)
    branch.tree = Node([Node()])
    branch.tree.children[0].parent = branch.tree
    branch.sizes = torch.Size([1, 2])
    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        found.append(gradients_of_a_branch(branch, lambda branch: None, rebuilds))
    assert largest_error(found) < 1e-10
    assert branch.tree.children[0].parent is branch.tree


@pytest.mark.parametrize("tensor", [lambda branch: branch.condition, lambda branch: branch.offsets["first"]])
def test_a_tensor_that_is_a_setting_and_changes_in_place_is_noticed(tensor: Callable[[Any], Tensor]) -> None:
    """Also in a list or a dictionary."""
    with pytest.raises(RuntimeError, match=r"attribute of shape .* has been modified by an inplace operation"):
        gradients_of_a_branch(Adjusted(), lambda branch: tensor(branch).mul_(2), rebuilds=True)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_all_modules_that_come_or_go_between_the_passes_are_noticed(before: bool) -> None:
    handles: list[Any] = []

    def register() -> None:
        hook = lambda module, args, y: 2 * y if isinstance(module, nn.Conv1d) else None  # noqa: E731
        handles.append(nn.modules.module.register_module_forward_hook(hook))

    if before:
        register()
    try:
        with pytest.raises(RuntimeError, match=r"Forward hooks of all modules .* have come or gone"):
            gradients_of_a_branch(
                nn.Conv1d(2, 2, 1), lambda _: handles[0].remove() if before else register(), rebuilds=True
            )
    finally:
        handles[0].remove()


def test_a_mode_that_is_computed() -> None:
    class AlwaysDropped(nn.Conv1d):
        training = property(lambda self: True, lambda self, mode: None)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training).tanh()

    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        found.append(gradients_of_a_branch(AlwaysDropped(2, 2, 1), nn.Module.eval, rebuilds))
    assert largest_error(found) < 1e-10


def hook_all(net: nn.Module) -> list[Any]:
    convolutions = [module for module in net.iunet.modules() if isinstance(module, nn.Conv2d)]
    return [
        handle
        for module in convolutions
        for handle in (
            module.register_forward_hook(lambda module, args, y: 2 * y),
            module.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True),
        )
    ]


@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_come_or_go_between_the_passes(before: bool) -> None:
    def run(net: nn.Module, x: Tensor) -> None:
        handles = hook_all(net) if before else []
        value = loss(net(x))
        if before:
            for handle in handles:
                handle.remove()
        else:
            hook_all(net)
        value.backward()

    compare(run, dropout=0.3)


def test_a_branch_that_was_compiled_is_left_alone_where_something_else_changes() -> None:
    """Only what has changed, and what contains it, is replicated: a replaced `forward` elsewhere is no obstacle."""
    fixed = nn.Conv1d(2, 2, 1)
    forward = fixed.forward
    fixed.forward = lambda x: forward(x).tanh()
    found = []
    for rebuilds in (True, False):
        layer = AdditiveCoupling(nn.Sequential(fixed, nn.Dropout(0.5))).double()
        layer.rebuilds = rebuilds
        torch.manual_seed(3)
        inputs = [torch.ones(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
        value = sum(map(loss, layer(*inputs)))
        layer.branch[1].p = 0.1
        found.append(torch.autograd.grad(value, [*inputs, *layer.parameters()]))
    assert largest_error(found) < 1e-10


def spectral(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.Tanh())


def old_spectral(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.Tanh())


def weighted(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(inputs, outputs, 3, padding=1)), nn.Tanh())


class Counting(nn.Module):
    """Puts a new tensor in the place of its buffer in each evaluation, and depends on it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.conv(x).tanh() * self.count


@pytest.mark.parametrize(
    "make", [spectral, old_spectral, weighted, lambda dims, inputs, outputs, *_: Counting(inputs, outputs)]
)
def test_branches_that_change_their_own_buffers(make: Any) -> None:
    buffers = []

    def run(net: Any, x: Tensor) -> None:
        first = loss(net(x))
        (first + loss(net(x + 1))).backward()
        plain(net, x)
        buffers.append([buffer.clone() for buffer in net.buffers()])

    compare(run, make_branch=make)
    for stored, *others in zip(*buffers, strict=True):
        for rebuilt in others:
            torch.testing.assert_close(rebuilt, stored)


class Counters(nn.Conv2d):
    """Counts its evaluations in several places, in place, and depends on one of them."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.name = name
        self.register_buffer("buffer", torch.ones(()))
        self.register_buffer("through_data", torch.ones(()))
        self.attribute = torch.ones((), dtype=torch.double)
        self.list, self.array, self.dictionary = [1.0], np.ones(1), {"in": [1.0]}

    def count(self) -> dict[str, Any]:
        self.list[0] += 1
        self.array += 1
        self.dictionary["in"][0] += 1
        counts = {"list": self.list[0], "array": float(self.array[0]), "dictionary": self.dictionary["in"][0]}
        tensors = {"buffer": self.buffer.add_(1), "attribute": self.attribute.add_(1)}
        self.through_data.data.add_(1)
        return counts | {name: tensor.clone() for name, tensor in tensors.items()} | {"data": self.through_data.clone()}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() * self.count()[self.name]


@pytest.mark.parametrize("name", ["buffer", "attribute", "data", "list", "array", "dictionary"])
def test_branches_that_change_in_place_what_they_depend_on(name: str) -> None:
    counts = []

    def run(net: Any, x: Tensor) -> None:
        (loss(net(x)) + loss(net(x + 1))).backward(retain_graph=True)
        value = loss(net(x))
        value.backward(retain_graph=True)
        value.backward()
        counts.append(net.iunet.encoder[0][0].branch.count())

    compare(run, make_branch=lambda _, inputs, outputs, *__: Counters(name, inputs, outputs))
    assert counts[0] == counts[1] == dict.fromkeys(counts[0], 5.0)


def test_quantization_that_moves_its_range_unnoticed_by_autograd() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    branch = nn.Sequential(nn.Conv1d(2, 2, 1), quantization.default_fused_act_fake_quant(), nn.Tanh())
    found = []
    for rebuilds in (True, False):
        layer = AdditiveCoupling(copy.deepcopy(branch))
        layer.rebuilds = rebuilds
        state = [torch.ones(1, 2, 4) * torch.linspace(0, 1, 4) for _ in range(2)]
        values = [loss(layer(state[0], scale * state[1])[1]) for scale in (1, 3)]
        found.append(torch.autograd.grad(sum(values), list(layer.parameters())))
    assert largest_error(found) < 1e-4


def test_observers_that_give_their_ranges_a_shape_in_their_first_evaluation() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    branch = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh()).train()
    branch.qconfig = quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    quantization.prepare_qat(branch, inplace=True)
    found = []
    for rebuilds in (True, False):
        layer = AdditiveCoupling(copy.deepcopy(branch))
        layer.rebuilds = rebuilds
        state = [torch.ones(1, 2, 4, 4) * torch.linspace(0, 1, 4) for _ in range(2)]
        value = sum(loss(layer(state[0], scale * state[1])[1]) for scale in (1, 3))
        found.append(
            [
                *torch.autograd.grad(value, list(layer.parameters()), retain_graph=True),
                *torch.autograd.grad(value, list(layer.parameters())),
                *(buffer.float() for buffer in layer.buffers()),
            ]
        )
    assert largest_error(found) < 1e-4


class Limited(nn.Conv1d):
    """Changes its weight before it uses it."""

    change = staticmethod(lambda weight: weight.clamp_(-0.1, 0.1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.change(self.weight)
        return super().forward(x).tanh()


def test_a_branch_may_limit_its_weights() -> None:
    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        found.append(gradients_of_a_branch(Limited(2, 2, 1), lambda _: None, rebuilds))
    assert largest_error(found) < 1e-10


def test_a_weight_that_is_no_number_is_not_blamed_on_the_branch_that_limits_it() -> None:
    branch = Limited(2, 2, 1)
    with torch.no_grad():
        branch.weight.fill_(torch.nan)
    assert all(gradient.isnan().any() for gradient in gradients_of_a_branch(branch, lambda _: None, True)[:1])


def test_a_branch_that_changes_its_weights_again_and_again_is_refused() -> None:
    branch = Limited(2, 2, 1)
    branch.change = lambda weight: weight.mul_(0.9)
    before = 0.9 * branch.weight.detach().double()
    with pytest.raises(RuntimeError, match="changes a parameter in place whenever it is evaluated"):
        gradients_of_a_branch(branch, lambda _: None, rebuilds=True)
    torch.testing.assert_close(branch.weight.detach(), before)


@pytest.mark.parametrize("way", ["hook", "method", "closure", "alias", "dictionary"])
def test_buffers_that_are_known_by_another_way_than_the_module(way: str) -> None:
    """They are those of the network in the second evaluation, too, as a replica cannot have them."""

    class Known(nn.Conv2d):
        def __init__(self, dims: int, inputs: int, outputs: int, *_: Any) -> None:
            super().__init__(inputs, outputs, 3, padding=1)
            self.register_buffer("count", torch.zeros((), dtype=torch.double))
            self.counting: Any = {"method": self.counted, "closure": lambda: self.counted()}.get(way)
            self.others: Any = {"alias": self.count, "dictionary": {...: self.count}}.get(way)
            if way == "hook":
                self.register_forward_hook(lambda _, inputs, output: output * self.counted())

        def counted(self) -> Tensor:
            self.count.add_(1)
            count: Tensor = self.count if self.others is None else self.others[...]
            return count.clone()

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x).tanh()
            return y if way == "hook" else y * (self.counting or self.counted)()

    counts = []

    def run(net: Any, x: Tensor) -> None:
        (loss(net(x)) + loss(net(x + 1))).backward()
        counts.append([float(buffer) for name, buffer in net.named_buffers() if name.endswith("count")])

    compare(run, make_branch=Known)
    assert counts[0] == counts[1] == counts[2] == [2.0] * len(counts[0])


def test_what_is_saved_of_a_buffer_stays_as_it_was_in_its_evaluation() -> None:
    """Plain autograd refuses a second evaluation before the backward pass, unless a copy is saved."""

    class Buffer(Counters):
        copies = False

        def forward(self, x: Tensor) -> Tensor:
            self.buffer.add_(1)
            return nn.Conv2d.forward(self, x).tanh() * (self.buffer.clone() if self.copies else self.buffer)

    found = []
    for copies in (False, True):
        Buffer.copies = copies
        net = network(make_branch=lambda _, inputs, outputs, *__: Buffer("buffer", inputs, outputs))
        found.append(gradients(net, lambda net, x: (loss(net(x)) + loss(net(x + 1))).backward()))
    assert largest_error(found) < 1e-10


def test_statistics_of_a_graph_in_evaluation_are_not_counted_as_changed() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net.train()(x))
        other = loss(net.eval()(x))
        value.backward()  # puts the statistics back for a moment
        other.backward()
        net.train()

    compare(run, norm="BATCH")


def test_statistics_that_moved_since_an_evaluation_are_noticed() -> None:
    net = network(norm="BATCH").eval()
    value = loss(net(image()))
    net.train()(image())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_parameters_replaced_between_the_passes() -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations)
        x = image().requires_grad_()
        value = loss(net(x))
        before = list(net.parameters())
        for module in net.iunet.encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(torch.zeros_like(module.weight))
        value.backward()
        found.append([x.grad, *(parameter.grad for parameter in before)])
    assert largest_error(found) < 1e-10


@pytest.mark.parametrize("frozen", ["forward", "backward"])
def test_parameters_that_are_frozen_in_one_of_the_passes(frozen: str) -> None:
    """As those of a discriminator are, around the loss of a generator; what a linear layer saves depends on it."""

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).tanh().movedim(-1, 1)

    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        return nn.Sequential(Linear(inputs, 5), Linear(5, outputs))

    def run(net: nn.Module, x: Tensor) -> None:
        net.requires_grad_(frozen == "backward")
        value = loss(net(x))
        net.requires_grad_(frozen == "forward")
        value.backward()
        net.requires_grad_()
        plain(net, x)

    compare(run, make_branch=make)


def test_a_bias_that_changes_between_the_passes_is_noticed() -> None:
    """Plain autograd does not need it, but computing activations again does."""
    net = network(norm=None)
    value = loss(net(image()))
    with torch.no_grad():
        net.iunet.encoder[0][0].branch[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_other_memory_of_a_parameter_is_noticed(name: str) -> None:
    """Plain autograd has saved the values of before, where neither the parameter nor its version changes."""
    net = network(norm=None)
    value = loss(net(image()))
    parameter = getattr(net.iunet.encoder[0][0].branch[0], name)
    parameter.data = parameter.data + 1
    with pytest.raises(RuntimeError, match=r"was given other memory"):
        value.backward()


def test_a_network_that_is_saved_between_the_passes_is_as_it_was() -> None:
    net = network()
    value = loss(net(image()))
    torch.save(net.state_dict(), io.BytesIO())
    gc.collect()  # before PyTorch 2.13 that takes the objects of the storages with it
    value.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_state_dict_that_is_assigned_between_the_passes_changes_no_gradient() -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations)
        x = image().requires_grad_()
        value, before = loss(net(x)), list(net.parameters())
        net.load_state_dict({name: tensor + 0.1 for name, tensor in net.state_dict().items()}, assign=True)
        value.backward()
        found.append([x.grad, *(parameter.grad for parameter in before)])
    assert largest_error(found) < 1e-10


# -- functional transforms


def values(net: nn.Module, scale: float) -> dict[str, Tensor]:
    return {name: (scale * tensor.detach()).requires_grad_() for name, tensor in net.named_parameters()}


def parametrized(net: SegIUNet) -> list[nn.Module]:
    """Convolutions of the branches, whose weights are the products of two parameters from now on."""
    convolutions = [module for module in net.iunet.modules() if isinstance(module, nn.Conv2d)]
    return [nn.utils.parametrizations.weight_norm(module) for module in convolutions]


@pytest.mark.parametrize("backward_within", [False, True])
@pytest.mark.parametrize("make", [spectral, weighted], ids=["spectral", "weighted"])
def test_parametrizations_that_are_cached(make: Any, backward_within: bool) -> None:
    def run(net: Any, x: Tensor) -> None:
        with nn.utils.parametrize.cached():
            value = loss(net(x) + net(2 * x))
            if backward_within:
                value.backward()
        if not backward_within:
            value.backward()
        plain(net, x)

    compare(run, make_branch=make)


def test_parametrizations_that_come_between_the_passes() -> None:
    found = []
    for activations in MODES:
        net, x = network(activations=activations, norm=None), image().requires_grad_()
        used = list(net.parameters())
        value = loss(net(x))
        parametrized(net)
        found.append(torch.autograd.grad(value, [x, *used]))
    assert largest_error(found) < 1e-10


def test_parametrizations_that_go_between_the_passes_are_noticed() -> None:
    net = network()
    convolutions = parametrized(net)
    value = loss(net(image()))
    for module in convolutions:
        nn.utils.parametrize.remove_parametrizations(module, "weight")
    with pytest.raises(RuntimeError, match="ParametrizedConv2d has lost its parametrizations"):
        value.backward()


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("leaf", [False, True])
def test_functional_call_with_the_backward_pass_outside(scale: float, leaf: bool) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations, norm="BATCH")
        given = values(net, scale)
        passed = given if leaf else {name: 1.0 * tensor for name, tensor in given.items()}
        value = loss(functional_call(net, passed, (image(),)))
        found.append(torch.autograd.grad(value, list(given.values())))
        assert all(parameter.grad is None for parameter in net.parameters())
    assert largest_error(found) < 1e-10


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], dict[str, Tensor]], Any]] = {
    "grad": lambda function, given: torch.func.grad(function)(given),
    "vjp": lambda function, given: torch.func.vjp(function, given)[1](torch.ones((), dtype=torch.double))[0],
    "jvp": lambda function, given: {"": torch.func.jvp(function, (given,), (given,))[1]},
    "hvp": lambda function, given: torch.func.jvp(torch.func.grad(function), (given,), (given,))[1],
    "grad of grad": lambda function, given: torch.func.grad(
        lambda inner: sum(part.square().sum() for part in torch.func.grad(function)(inner).values())
    )(given),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_transforms(name: str, options: dict[str, Any]) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations, norm=None, channel_mixing=1, **options)
        given = {key: tensor.detach() for key, tensor in net.named_parameters()}
        result = TRANSFORMS[name](lambda given, net=net: loss(functional_call(net, given, (image(),))), given)
        found.append(list(result.values()))
    assert largest_error(found) < 1e-10
    if name == "grad":
        expected = network(norm=None, channel_mixing=1, activations="store")
        plain(expected, image())
        parameters = [parameter.grad for parameter in expected.parameters()]
        assert max(relative_errors(found[1], parameters)) < (1e-3 if options else 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activations", MODES)
def test_vmap_over_images_and_over_networks(activations: str, training: bool) -> None:
    nets = [network(activations=activations, channel_mixing=1).train(training) for _ in range(2)]
    randomize(nets[1])
    parameters, buffers = torch.func.stack_module_state(nets)
    x = image()
    with torch.no_grad():
        expected = torch.stack([net(x) for net in nets])
        outputs = torch.vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(torch.vmap(lambda one: nets[0](one[None])[0])(x), expected[0])


@pytest.mark.parametrize("activations", MODES)
def test_forward_mode_outside_of_functional_transforms(activations: str) -> None:
    from torch.autograd import forward_ad

    net, x = network(activations=activations), image()
    expected = torch.func.jvp(lambda given: loss(net(given)), (x,), (x,))[1]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(net(forward_ad.make_dual(x, x)))).tangent
    torch.testing.assert_close(tangent, expected)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(net(forward_ad.make_dual(x, x)))).tangent
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batch", "dropout": 0.3},
        {"channel_mixing": None, "learnable_resampling": False, "act": "LEAKYRELU"},
        {"exact": True},
    ],
)
def test_several_gradients_at_once(options: dict[str, Any]) -> None:
    """They are those of one after the other, also differentiated once more."""
    for activations in MODES:
        net = network(activations=activations, **options)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        x = image()[..., :4, :4].requires_grad_()

        def three(x: Tensor, net: nn.Module = net) -> Tensor:
            torch.manual_seed(5)
            values: Tensor = net(x).flatten()[:3]
            return values

        y = three(x)
        found = torch.autograd.grad(y, [x, *trained], torch.eye(3).double(), retain_graph=True, is_grads_batched=True)
        each = [torch.autograd.grad(part, [x, *trained], retain_graph=True) for part in y]
        assert max(relative_errors(found, [torch.stack(of_one) for of_one in zip(*each)])) < 1e-10
        second = []
        for batched in (True, False):
            jacobian = torch.autograd.functional.jacobian(three, x, create_graph=True, vectorize=batched)
            value = jacobian.square().sum()
            second.append(torch.autograd.grad(value, [x, *trained], materialize_grads=True))
        assert max(relative_errors(*second)) < 1e-10


@pytest.mark.parametrize("exact", [False, True])
def test_several_gradients_at_once_under_autocast(exact: bool) -> None:
    net = network(exact=exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(image().float()).flatten()[:3]
    one = torch.eye(3, dtype=y.dtype)
    found = torch.autograd.grad(y, list(net.parameters()), one, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(part, list(net.parameters()), retain_graph=True) for part in y]
    assert max(relative_errors(found, [torch.stack(of_one) for of_one in zip(*each)])) < 0.05


@pytest.mark.parametrize(
    ("autocast", "options"),
    [
        (False, {}),
        (False, {"norm": "batch", "dropout": 0.3}),
        (False, {"exact": True}),
        (True, {"exact": True, "norm": None}),  # PyTorch maps no gradients of a normalization of bfloat16
    ],
)
def test_gradients_that_are_mapped(autocast: bool, options: dict[str, Any]) -> None:
    """By `torch.vmap`, as its documentation has it for Jacobians."""
    found = []
    for activations in MODES:
        net = network(activations=activations, **options).to(torch.float32 if autocast else torch.double)
        x = image().to(net.head.weight.dtype).requires_grad_()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        leaves = [x, *net.parameters()]
        directions = torch.stack([torch.ones_like(y), y.detach()])
        mapped = torch.vmap(lambda of_y, y=y, to=leaves: torch.autograd.grad(y, to, of_y, retain_graph=True))(
            directions
        )
        found.append([*mapped, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert largest_error(found) < 1e-10


def test_saved_tensor_hooks_that_are_forbidden() -> None:
    def run(net: Any, x: Tensor) -> None:
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            plain(net, x)

    compare(run)


def test_saved_tensor_hooks_that_are_forbidden_in_the_backward_pass() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            value.backward()
            with pytest.raises(RuntimeError, match="none here"), saved_tensors_hooks(same, same):
                pass

    compare(run, dropout=0.3)


def test_gradients_within_a_transform_of_a_graph_outside() -> None:
    def run(net: Any, x: Tensor) -> None:
        y = loss(net(x))

        def product(z: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(y, x, retain_graph=True)
            return (gradient * z).sum()

        torch.func.grad(product)(image())
        y.backward()

    compare(run)


# -- several at a time


def test_replicas_of_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    replicate = import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[(tensor.detach() if detach else tensor).clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: 0)

    def run(net: Any, x: Tensor) -> None:
        outputs = [part(half) for part, half in zip(replicate.replicate(net, [0, 1]), x.chunk(2))]
        loss(torch.cat(outputs)).backward()

    compare(run)
    compare(run, norm="BATCH", channel_mixing=1)


def work_in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(jobs)

    def work(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Normalized(nn.Sequential):
    """A branch of one's own with statistics and a counter."""

    def __init__(self, dims: int, inputs: int, outputs: int, *_: Any) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs))
        self.register_buffer("num_batches_tracked", torch.zeros(()))
        self.act = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return self.act(super().forward(x))


@pytest.mark.parametrize("options", [{}, {"norm": "batch"}, {"make_branch": Normalized}], ids=["", "batch", "own"])
@pytest.mark.parametrize("kinds", [("train", "train", "train"), ("train", "infer"), ("infer", "infer")])
def test_threads(kinds: tuple[str, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch does not guard `buffer.add_(1)`: where two threads meet in it, one of the two is lost.
    add, lock = Tensor.add_, threading.Lock()

    def add_alone(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        with lock:
            return add(self, *arguments, **options)

    monkeypatch.setattr(Tensor, "add_", add_alone)
    net = network(**options)
    parameters = dict(net.named_parameters())
    x = image()

    def train(steps: int = 12) -> list[list[Tensor]]:
        return [list(torch.autograd.grad(loss(net(x)), list(net.parameters()))) for _ in range(steps)]

    def infer(steps: int = 12) -> list[list[Tensor]]:
        with torch.no_grad():
            return [[net(x)] for _ in range(steps)]

    ways = {"train": train, "infer": infer}
    expected = {kind: way(1)[0] for kind, way in ways.items()}
    for kind, found in zip(kinds, work_in_threads([ways[kind] for kind in kinds])):
        for each in found:
            assert max(relative_errors(each, expected[kind])) < 1e-10
    for name, parameter in net.named_parameters():
        assert parameter is parameters[name]
    assert all(not isinstance(module, nn.Dropout) or module.training for module in net.modules())
    counts = [int(buffer) for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [2 + 12 * len(kinds)] * len(counts)


class Writes(TorchDispatchMode):
    """Notes which memory is written to by copies."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.aten.copy_.default:
            self.places.add(args[0].data_ptr())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True])
def test_statistics_are_not_written_to_while_another_thread_may_use_them(training: bool) -> None:
    net = network(norm="batch").train(training)
    value = loss(net(image()))
    with Writes() as writes:
        value.backward()
    assert not writes.places & {buffer.data_ptr() for buffer in net.buffers()}


def test_two_backward_passes_over_one_graph_in_two_threads() -> None:
    net = network()
    value = loss(net(image()))
    parameters = list(net.parameters())
    expected = torch.autograd.grad(value, parameters, retain_graph=True)

    def differentiate() -> list[tuple[Tensor, ...]]:
        return [torch.autograd.grad(value, parameters, retain_graph=True) for _ in range(8)]

    for found in work_in_threads([differentiate] * 2):
        for each in found:
            assert max(relative_errors(each, expected)) < 1e-10


class Drawing(nn.Conv2d):
    """Scales its output by a random number."""

    def __init__(self, draw: Callable[[Any], float], inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.draw = draw
        self.of_torch, self.of_python = torch.Generator().manual_seed(0), random.Random(0)
        self.of_numpy, self.new_of_numpy = np.random.RandomState(0), np.random.default_rng(0)
        self.several = [random.Random(0), {"one": np.random.default_rng(0)}]
        self.transform = Compose([RandScaleIntensity(1.0, prob=1.0)]).set_random_state(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.draw(self))


DRAWS: dict[str, Callable[[Any], float]] = {
    "python": lambda _: random.random(),
    "numpy": lambda _: np.random.rand(),
    "own of torch": lambda branch: float(torch.rand((), generator=branch.of_torch)),
    "own of python": lambda branch: branch.of_python.random(),
    "own of numpy": lambda branch: 0.1 * branch.of_numpy.randn(),
    "own new one of numpy": lambda branch: branch.new_of_numpy.random(),
    "in a list": lambda branch: branch.several[0].random(),
    "in a dictionary in it": lambda branch: branch.several[1]["one"].random(),
    "of MONAI's transforms": lambda branch: float(branch.transform(torch.ones(1))),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_from_other_generators_than_pytorch_s_are_drawn_again(draw: str) -> None:
    following = []

    def run(net: Any, x: Tensor) -> None:
        random.seed(0)
        np.random.seed(0)
        plain(net, x)
        following.append(DRAWS[draw](net.iunet.encoder[0][0].branch))

    compare(run, make_branch=lambda _, inputs, outputs, *__: Drawing(DRAWS[draw], inputs, outputs))
    assert following[0] == following[1]


def test_a_class_that_a_parametrization_has_made_of_one_s_own_draws_its_numbers_again() -> None:
    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        return nn.utils.parametrizations.weight_norm(Drawing(DRAWS["python"], inputs, outputs))

    def run(net: Any, x: Tensor) -> None:
        random.seed(0)
        plain(net, x)

    compare(run, make_branch=make)


class Scale:
    """A hook that draws."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __call__(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.generator.random()

    def method(self, _: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self(_, inputs, output)


@pytest.mark.parametrize("hook_of", [lambda scale: scale, lambda scale: scale.method], ids=["object", "method"])
def test_numbers_of_a_hook_s_own_generator_are_drawn_again(hook_of: Callable[[Scale], Any]) -> None:
    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        branch = nn.Conv2d(inputs, outputs, 3, padding=1)
        branch.register_forward_hook(hook_of(Scale()))
        return branch

    compare(plain, make_branch=make)


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU(), DropPath(0.5), FunctionalDropout()])
def test_draws_from_a_generator_that_another_thread_used_are_noticed(layer: nn.Module) -> None:
    coupling = AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), layer))
    draw: list[Callable[[], Any]] = [lambda: torch.rand(3)]
    states = torch.ones(4, 2, 4), -torch.ones(4, 2, 4)
    conditions = repetition.Conditions(coupling, states[0].device)
    with conditions.recorded():
        coupling.branch(states[1])
        work_in_threads(draw)
    with pytest.raises(RuntimeError, match="another thread has drawn"), conditions.repeated():
        coupling.branch(states[1])


def test_a_branch_that_draws_nothing_is_not_blamed_for_another_thread() -> None:
    layer = AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh()))
    to_draw: list[Callable[[], Any]] = [lambda: torch.rand(3)]
    layer.branch.register_forward_hook(lambda *_: work_in_threads(to_draw) and None)
    outputs = layer(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    to_draw[0] = int
    outputs[1].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


# -- errors on the way


class Failing(nn.Sequential):
    """Fails in an evaluation of a number."""

    fails_at = 0
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).count += 1
        if type(self).count == type(self).fails_at:
            raise ZeroDivisionError
        return super().forward(x)


@pytest.mark.parametrize("fails_at", [1, 3, 8, 9, 11, 16])  # 8 couplings, each evaluated twice
def test_an_error_in_the_middle_of_a_pass_leaves_the_network_as_it_was(fails_at: int) -> None:
    branch = type("Branch", (Failing,), {})

    def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
        return branch(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.Dropout(0.3))

    def run(net: Any, x: Tensor) -> None:
        branch.count, branch.fails_at = 0, fails_at if "store" not in net.chosen_activations else 0
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        if branch.fails_at:
            with pytest.raises(ZeroDivisionError):
                plain(net, x)
            branch.fails_at = 0
            for name, buffer in net.named_buffers():
                assert buffer is dict(net.named_buffers())[name]
                buffer.copy_(buffers[name])
            net.zero_grad()
            x.grad = None
        torch.manual_seed(3)
        plain(net, x)

    compare(run, make_branch=make)


# -- views, copies and changes of states


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda state: state,
    "transposed": lambda state: state.transpose(-1, -2),
    "view_as": lambda state: state.view_as(state),
    "detached, without gradient": lambda state: state.detach(),
    "sliced": lambda state: state[..., 1:],
    "sliced to nothing less": lambda state: state[:],
    "flipped": lambda state: state.flip(-1),
    "expanded": lambda state: state[:1].expand(2, -1, -1, -1),
    "other strides, same shape": lambda state: state.as_strided(state.shape, (50, 25, 1, 5)),
    "contiguous": lambda state: state.contiguous(),
    "cloned": lambda state: state.clone(),
    "viewed as one axis and back": lambda state: state.flatten().view(state.shape),
    "squeezed and back": lambda state: state.unsqueeze(0).squeeze(0),
    "shifted": lambda state: state + 1,
}


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_views_of_states(name: str, both: bool) -> None:
    view = VIEWS[name]
    both = both or name == "sliced"
    layers = nn.ModuleList(AdditiveCoupling(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())) for _ in range(3))
    randomize(layers).double()
    inputs = [torch.randn(2, 2, 5, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    found = []
    for rebuilds in (True, False):
        state: tuple[Tensor, ...] = tuple(inputs)
        for layer in layers:
            layer.rebuilds = rebuilds
            first, second = layer(*state)
            state = (view(first) if both else first), view(second)
        value = sum(tensor.sin().sum() for tensor in state)
        if value.requires_grad:
            found.append(torch.autograd.grad(value, [*inputs, *layers.parameters()], allow_unused=True))
    for rebuilt, stored in zip(*found, strict=True) if found else ():
        assert (rebuilt is None) == (stored is None)
    if found:
        pairs = [(one, other) for one, other in zip(*found) if other is not None]
        assert max(relative_errors(*zip(*pairs))) < 1e-12


def test_a_conjugated_state_is_not_the_state() -> None:
    layers = nn.ModuleList(AdditiveCoupling(nn.Linear(3, 3)) for _ in range(2)).to(torch.cdouble)
    inputs = [torch.randn(2, 3, dtype=torch.cdouble, requires_grad=True) for _ in range(2)]
    found = []
    for rebuilds in (True, False):
        for layer in layers:
            layer.rebuilds = rebuilds
        first, second = layers[0](*inputs)
        value = sum(tensor.abs().square().sum() for tensor in layers[1](first.conj(), second.conj()))
        found.append(torch.autograd.grad(value, [*inputs, *layers.parameters()]))
    assert max(relative_errors(*([tensor.abs() for tensor in each] for each in found))) < 1e-10


class Masked(InvertibleLayer):
    """A coupling that changes what a mask marks, and passes the mask on."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(4, 4)

    def shift(self, kept: Tensor, mask: Tensor) -> Tensor:
        return self.branch(kept).tanh() * mask

    def transform(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed, kept, mask = inputs
        return kept, changed + self.shift(kept, mask), mask

    def restore(self, outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept, changed, mask = outputs
        return changed - self.shift(kept, mask), kept, mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_mask_may_be_a_part_of_the_state(dtype: torch.dtype) -> None:
    chain = InvertibleChain(Masked() for _ in range(3)).double()
    inputs = [torch.randn(2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([True, False, True, False]).expand(2, 4).to(dtype)
    found = []
    for rebuilds in (True, False):
        for layer in chain:
            layer.rebuilds = rebuilds
        first, second, _ = chain(*inputs, mask)
        found.append(torch.autograd.grad((first * second).sum(), [*inputs, *chain.parameters()]))
    assert largest_error(found) < 1e-12


class Exponential(InvertibleLayer):
    def transform(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].exp(),)

    def restore(self, outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (outputs[0].log(),)


def test_a_negated_view_of_a_state_is_not_the_state() -> None:
    first, second = Exponential(), Exponential()
    x = torch.randn(5, dtype=torch.double, requires_grad=True)
    value = second(torch._neg_view(first(x)[0]))[0].sum()  # what `.conj().imag` makes of complex numbers
    (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found, -(x - x.exp()).exp())


def test_a_state_that_several_layers_take() -> None:
    layers = nn.ModuleList(AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh())) for _ in range(4)).double()
    inputs = [torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    for uses_both in (True, False):
        found = []
        for rebuilds in (True, False):
            for layer in layers:
                layer.rebuilds = rebuilds
            state = layers[0](*inputs)
            one = layers[2](*layers[1](*state))
            other = layers[3](*state)
            value = sum(tensor.sin().sum() for tensor in (*one, *(other if uses_both else ())))
            found.append(torch.autograd.grad(value, [*inputs, *layers[:3].parameters()]))
        assert largest_error(found) < 1e-12


def test_an_error_where_outputs_are_saved_leaves_a_state_as_it_was() -> None:
    """As of a hook that has no memory left; a checkpoint, too, stops what it evaluates again by an error."""
    layers = nn.ModuleList(AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh())) for _ in range(2)).double()
    inputs = [torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    found = []
    for rebuilds in (False, True):
        for layer in layers:
            layer.rebuilds = rebuilds
        state = layers[0](*inputs)
        with pytest.raises(MemoryError), saved_tensors_hooks(without_memory, same):
            layers[1](*state, keep=True)
        value = sum(tensor.sin().sum() for tensor in state)
        found.append(torch.autograd.grad(value, [*inputs, *layers[0].parameters()]))
    assert largest_error(found) < 1e-12


def without_memory(_: Tensor) -> Tensor:
    raise MemoryError


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_state_that_a_checkpoint_takes(use_reentrant: bool, retain: bool) -> None:
    """What is evaluated again in the backward pass is freed before the state is asked for."""
    layers = [AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh())).double() for _ in range(3)]
    inputs = [torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    leaves = [*inputs, *nn.ModuleList(layers).parameters()]
    found = []
    for rebuilds in (False, True):
        for layer in layers:
            layer.rebuilds = rebuilds
        state = layers[0](*inputs)
        after = checkpoint(InvertibleChain(layers[1:]), *state, use_reentrant=use_reentrant)
        value = sum(tensor.sin().sum() for tensor in after)
        for leaf in leaves:
            leaf.grad = None
        if retain:
            value.backward(retain_graph=True)
        value.backward()
        found.append([leaf.grad for leaf in leaves])
    assert largest_error(found) < 1e-12


class AsksTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x = ctx.saved_tensors[0]
        weight = ctx.saved_tensors[1]
        return gradient * weight, (gradient * x).sum()


class Scaling(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(AsksTwice.apply(x, self.scale)).tanh()


@pytest.mark.parametrize("retain", [False, True])
def test_a_function_that_asks_twice_for_what_it_has_saved(retain: bool) -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        if retain:
            value.backward(retain_graph=True)
        value.backward()

    compare(run, make_branch=lambda _, before, after, *__: Scaling(before, after, 3, 1, 1))


def test_a_backward_pass_in_inference_mode() -> None:
    def run(net: Any, x: Tensor) -> None:
        value = loss(net(x))
        with torch.inference_mode():
            value.backward()

    compare(run, dropout=0.3)


def test_lazy_branches() -> None:
    """Their first evaluation makes their parameters."""
    found = []
    for activations in MODES:

        def make(dims: int, inputs: int, outputs: int, *_: Any) -> nn.Module:
            return nn.Sequential(nn.LazyConv2d(outputs, 3, padding=1), nn.LazyBatchNorm2d(), nn.Tanh())

        torch.manual_seed(0)
        net = SegIUNet(2, 1, 3, (4, 8), activations=activations, make_branch=make).double()
        for _ in range(2):
            torch.manual_seed(0)
            x = image().requires_grad_()
            plain(net, x)
        found.append([tensor.grad for tensor in (x, *net.parameters())])
    assert largest_error(found) < 1e-10


def test_a_branch_that_changes_its_input_in_place_is_refused() -> None:
    coupling = AdditiveCoupling(nn.Sequential(nn.ReLU(inplace=True), nn.Conv1d(2, 2, 1)))
    x = torch.randn(1, 2, 4)
    for coupling.rebuilds in (True, False):
        with pytest.raises(RuntimeError, match="must leave its input as it is"):
            coupling(x, x - 1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must leave its input as it is"):
        coupling.inverse(x, x - 1)


class ChangedInPlace(nn.Conv1d):
    """Changes, in place, what autograd has saved."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh().mul_(2)


@pytest.mark.parametrize("rebuilds", [True, False])
def test_a_branch_that_changes_what_autograd_has_saved_is_refused(rebuilds: bool) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_of_a_branch(ChangedInPlace(2, 2, 1), lambda _: None, rebuilds)


@pytest.mark.parametrize("activations", MODES)
def test_a_parameter_that_changes_between_two_passes_through_a_branch_is_noticed(activations: str) -> None:
    """The first pass evaluates the branch again, of which the second uses what is left."""
    net, caught = network(activations=activations), []
    convolution, norm, *_ = net.iunet.encoder[0][0].branch
    convolution.register_forward_hook(lambda module, args, output: caught.append(output))
    x = image().requires_grad_()
    torch.autograd.grad(loss(net(x)), norm.weight, retain_graph=True)
    with torch.no_grad():
        convolution.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        caught[0].sin().sum().backward()


def test_a_wrong_inverse_is_noticed() -> None:
    class Wrong(InvertibleLayer):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0))

        def transform(self, inputs: Any, weights: Any) -> Any:
            return (inputs[0] * self.factor,)

        def restore(self, outputs: Any, weights: Any) -> Any:
            return (outputs[0] / 3,)

    (y,) = Wrong()(torch.randn(3))
    with pytest.raises(RuntimeError, match="does not undo"):
        y.sum().backward()


def test_a_branch_that_does_not_repeat_is_noticed() -> None:
    class Moody(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return self.conv(x) if type(self).calls % 2 else self.conv(x).tanh()

    outputs = AdditiveCoupling(Moody())(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    with pytest.raises(RuntimeError, match="cannot be evaluated again"):
        outputs[1].sum().backward()


# -- types


@pytest.mark.parametrize("how", ["cast", "half", "default type"])
def test_networks_of_16_bits(how: str) -> None:
    found = []
    for activations in MODES:
        torch.manual_seed(0)
        arguments = {"channels": (8, 16), "couplings": 2, "activations": activations, "act": "TANH"}
        if how == "default type":
            torch.set_default_dtype(torch.bfloat16)
            try:
                net = SegIUNet(2, 1, 3, **arguments)
            finally:
                torch.set_default_dtype(torch.float32)
        else:
            net = SegIUNet(2, 1, 3, **arguments).to(torch.half if how == "half" else torch.bfloat16)
        dtype = next(net.parameters()).dtype
        y = net(image().to(dtype))
        assert y.dtype == dtype
        loss(y.float()).backward()
        found.append([parameter.grad.float() for parameter in net.parameters()])
    whole = [torch.cat([tensor.flatten() for tensor in each])[None] for each in found]
    assert largest_error(whole) < 0.02


def test_channels_last() -> None:
    def run(net: Any, x: Tensor) -> None:
        plain(net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))

    found = []
    for activations in MODES:
        net = network(activations=activations)
        run(net, image())
        found.append([parameter.grad for parameter in net.parameters()])
    assert largest_error(found) < 1e-10


def test_chains_share_modules() -> None:
    branch = randomize(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh())).double()
    layer = AdditiveCoupling(branch)
    inputs = [torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    found = []
    for layer.rebuilds in (True, False):
        outputs = InvertibleChain([layer] * 5)(*inputs)
        found.append(torch.autograd.grad(sum(map(loss, outputs)), [*inputs, *layer.parameters()]))
    assert largest_error(found) < 1e-12


def test_copies_are_independent() -> None:
    net = network()
    other = copy.deepcopy(net)
    value = loss(net(image()))
    randomize(other)
    plain(other, image())
    value.backward()
    expected = network(activations="store")
    plain(expected, image())
    assert max(relative_errors([p.grad for p in net.parameters()], [p.grad for p in expected.parameters()])) < 1e-10


# -- branches that something else has compiled


def as_script(branch: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.script(branch)


def as_trace(branch: nn.Module, x: Tensor) -> nn.Module:
    return torch.jit.trace(branch, x, check_trace=False)


def as_compiled(branch: nn.Module, x: Tensor) -> nn.Module:
    return torch.compile(branch, backend="aot_eager")


def compiled_in_place(branch: nn.Module, x: Tensor) -> nn.Module:
    branch.compile(backend="aot_eager")
    return branch


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("wrap", [as_script, as_trace, as_compiled, compiled_in_place])
def test_compiled_and_scripted_branches(wrap: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    x = torch.randn(2, 2, 6)
    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        branches = [
            nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.BatchNorm1d(2, momentum=0.5), nn.Tanh()) for _ in range(3)
        ]
        chain = InvertibleChain([AdditiveCoupling(wrap(branch, x)) for branch in branches])
        for layer in chain:
            layer.rebuilds = rebuilds
        found.append([])
        for _ in range(4):  # in which TorchScript is optimized
            value = sum(map(loss, chain(x, x + 1)))
            found[-1] += torch.autograd.grad(value, list(chain.parameters()))
        found[-1] += [buffer.float() for buffer in chain.buffers()]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_branch_whose_forward_was_replaced_is_not_evaluated_in_another_mode() -> None:
    branch = nn.Sequential(nn.Conv1d(2, 2, 1), nn.Dropout(0.5))
    forward = branch.forward
    branch.forward = lambda x: forward(x)
    layer = AdditiveCoupling(branch)
    value = sum(map(loss, layer(torch.ones(1, 2, 4), torch.ones(1, 2, 4))))
    layer.eval()
    with pytest.raises(RuntimeError, match="its `forward` was replaced"):
        value.backward()


def test_compiled_branches_with_other_parameters_than_the_network_s() -> None:
    found = []
    for activations in MODES:
        torch._dynamo.reset()
        net = network(activations=activations)
        if activations != "store":
            for module in net.iunet.modules():
                if isinstance(module, AdditiveCoupling):
                    module.branch.compile(backend="aot_eager")
        given = values(net, 0.7)
        value = loss(functional_call(net, given, (image(),)))
        found.append(torch.autograd.grad(value, list(given.values())))
    assert largest_error(found) < 1e-10


@pytest.mark.parametrize("part", ["branch", "layer"])
def test_a_compiled_branch_is_not_compiled_again_for_the_backward_pass(part: str) -> None:
    """A half of an image is a view with gaps, what is rebuilt has none, and compilers ask for the strides they saw."""
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("eager")
    layer = torch.compile(nn.Conv1d(2, 2, 3, padding=1), backend=counted)
    branch = layer if part == "branch" else nn.Sequential(layer, nn.Tanh())
    chain = InvertibleChain([AdditiveCoupling(branch), AdditiveCoupling(nn.Conv1d(2, 2, 1))])
    sum(map(loss, chain(*torch.randn(2, 4, 6).split(2, 1)))).backward()
    assert counted.frame_count == 1


def test_what_could_not_be_evaluated_again_leaves_nothing_wrong_behind() -> None:
    """A first layer may be differentiated after the second one has failed."""

    class Moody(nn.Conv1d):
        twice = True

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.tanh().exp() if self.twice else 3 * y

    found = []
    for rebuilds in (True, False):
        torch.manual_seed(0)
        first, second = (AdditiveCoupling(module) for module in (nn.Conv1d(2, 2, 1), Moody(2, 2, 1)))
        first.rebuilds = second.rebuilds = rebuilds
        x = torch.ones(1, 2, 4)
        state = first(x, x)
        outputs = second(*state)
        Moody.twice = False
        if rebuilds:
            with pytest.raises(RuntimeError, match="cannot be evaluated again"):
                outputs[1].sum().backward(retain_graph=True)
            Moody.twice = True
        first.zero_grad()
        state[1].square().sum().backward()
        found.append([parameter.grad for parameter in first.parameters()])
    torch.testing.assert_close(*found)


def test_hooks_around_the_backward_pass_see_nothing_of_the_engine() -> None:
    net = network()
    value = loss(net(image()))
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: seen.append(tensor), same):
        value.backward()
    assert not seen
