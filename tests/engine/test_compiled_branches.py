"""Branches that something else has compiled, and backward passes that go on after an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call

from monai_iunet.networks.blocks.chain import InvertibleChain
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from tests.engine.helpers import MODES, image, largest_error, loss, network, values


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
