"""Errors on the way, and views, copies and changes of the states between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from monai_iunet import SegIUNet
from monai_iunet.engine.reversible import InvertibleLayer
from monai_iunet.networks.blocks.chain import InvertibleChain
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.engine.helpers import MODES, compare, gradients_of_a_branch, image, largest_error, loss, network, plain, same
from tests.helpers import randomize, relative_errors


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
