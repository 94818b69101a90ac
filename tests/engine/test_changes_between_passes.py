"""Modes, settings and hooks that change between the passes are followed, or refused."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.engine.helpers import MODES, compare, gradients_of_a_branch, image, largest_error, loss, network


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
