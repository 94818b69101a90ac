"""Where the outputs of convolutions are kept, no convolution is computed twice, and gradients are those of storing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from monai_iunet import IUNet, SegIUNet, plan_training
from monai_iunet.engine.pytorch_private import TorchDispatchMode
from monai_iunet.networks.blocks.branch import Branch
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from monai_iunet.networks.layers import slab_convolution
from monai_iunet.networks.layers.kept_convolution import KeptConvolutions
from monai_iunet.networks.layers.slab_convolution import convolve
from monai_iunet.planning.live_bytes import LiveBytes
from tests.helpers import randomize, relative_errors
from tests.networks.layers.test_slab_convolution import count_slabs, cut_small_tensors


class CountConvolutions(TorchDispatchMode):
    """Counts the convolutions that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def network(activations: Any, dims: int = 2, **options: Any) -> IUNet:
    torch.manual_seed(0)
    return randomize(IUNet(dims, (4, 8), activations=activations, **{"couplings": 2, **options}), std=0.2).double()


def image(dims: int = 2) -> Tensor:
    shape = (2, 4, *[8] * dims)
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(net: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = net(x)
    found = torch.autograd.grad(y.sin().sum(), [x, *net.parameters()])
    return [*found, *(buffer.clone().double() for buffer in net.buffers())]


class TwoPaths(nn.Module):
    """A branch with a convolution for which another one stands twice, strides, groups and a transposed convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.twice = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
        self.down = nn.Conv2d(inputs, 3, 2, stride=2, bias=False)
        self.up = nn.ConvTranspose2d(3, outputs, 2, stride=2)
        self.wide = nn.Conv2d(inputs, outputs, (4, 3), padding="same", padding_mode="reflect")
        self.even = nn.Conv2d(outputs, outputs, 2, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).tanh())
        return self.even(self.up(self.down(x).sigmoid()) + self.wide(x))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "two convolutions": {"convs_per_coupling": 2},
    "residual": {"branch": "residual"},
    "MedNeXt": {"branch": "mednext", "kernel_size": 5},
    "no normalization, in place": {"norm": None, "act": ("LEAKYRELU", {"inplace": True})},
    "no normalization, no activation": {"norm": None, "act": None},
    "batch normalization, dropout": {"norm": "BATCH", "dropout": 0.3},
    "group normalization": {"norm": ("GROUP", {"num_groups": 1}), "channel_mixing": 1},
    "a branch of one's own": {"make_branch": lambda dims, inputs, outputs, *_: TwoPaths(inputs, outputs)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_stored_activations(name: str) -> None:
    expected, found = (gradients(network(way, **OPTIONS[name]), image()) for way in ("store", "convolutions"))
    assert max(relative_errors(found, expected)) < 1e-10


@pytest.mark.parametrize("dims", [1, 3])
def test_in_other_dimensions(dims: int) -> None:
    expected, found = (gradients(network(way, dims), image(dims)) for way in ("store", "convolutions"))
    assert max(relative_errors(found, expected)) < 1e-10


@pytest.mark.parametrize("name", ["default", "two convolutions", "residual", "MedNeXt"])
def test_no_convolution_is_computed_again(name: str) -> None:
    counts = {}
    for activations in ("store", "convolutions", "invert"):
        with CountConvolutions() as counted:
            gradients(network(activations, **OPTIONS[name]), image())
        counts[activations] = counted.count
    assert counts["invert"] == 2 * counts["store"]
    assert counts["convolutions"] == counts["store"]


def test_rounding_of_16_bits_does_not_add_up() -> None:
    """A branch is taken away as it was added, not as it is of a rebuilt input."""
    torch.manual_seed(0)
    net, x = SegIUNet(3, 1, 2, (16, 32, 64), couplings=3), torch.rand(1, 1, 16, 16, 16, requires_grad=True)
    found = {}
    for way in ("store", "convolutions", "invert"):
        net.iunet.activations = way
        found[way] = torch.cat([each.flatten() for each in gradients(net, x, torch.bfloat16)])
    errors = {way: float((found[way] - found["store"]).norm() / found["store"].norm()) for way in found}
    assert errors["invert"] > 1e-3
    assert errors["convolutions"] < errors["invert"] / 10


def test_memory_grows_by_the_outputs_of_convolutions() -> None:
    held = {}
    for activations in ("invert", "convolutions", "store"):
        net = network(activations, channel_mixing=None, couplings=6)
        with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live:
            y = net(image().detach())
            held[activations] = live.now()
            del y
    half = image().nbytes // 2
    states = 2 * 6 * (half + half // 2)  # of both levels, whose second one has half as many values
    assert held["convolutions"] - held["invert"] == pytest.approx(states, rel=0.02)
    assert held["store"] - held["invert"] > 2 * states


def test_kept_outputs_are_free_behind_the_backward_pass() -> None:
    net = network("convolutions")
    with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live:
        x = image().detach()
        y = net(x)
        y.sum().backward()
        net.zero_grad()
        assert live.now() == x.nbytes + y.nbytes


def test_what_a_plan_says_of_it_lies_between_the_other_two() -> None:
    def peak(activations: Any) -> int:
        return plan_training(SegIUNet(3, 1, 2, (8, 16), activations=activations), (32,) * 3).training_peak

    assert peak("invert") < peak(("invert", "convolutions")) < peak("convolutions") < peak("store")


def compare(run: Callable[[nn.Module, Tensor], Any], **options: Any) -> None:
    found = []
    for activations in ("store", "convolutions"):
        net, x = network(activations, **options), image()
        run(net, x)
        found.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    assert max(relative_errors(*reversed(found))) < 1e-10


def test_offloaded_to_the_host() -> None:
    """Hooks on saved tensors see what is kept."""
    seen: dict[str, int] = {}

    def run(net: Any, x: Tensor) -> None:
        with save_on_cpu(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = net(x)
        y.sin().sum().backward()

    def note(tensor: Tensor) -> Tensor:
        seen["bytes"] = seen.get("bytes", 0) + tensor.nbytes
        return tensor

    for activations in ("invert", "convolutions"):
        seen.clear()
        run(network(activations), image())
        seen[activations] = seen.pop("bytes")
        kept = seen[activations]
    compare(run)
    assert kept > 4 * image().nbytes


def test_within_a_checkpoint_nothing_stays() -> None:
    held = {}
    for activations in ("invert", "convolutions"):
        net = network(activations, couplings=6)
        with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live:
            y = checkpoint(net, image().detach(), use_reentrant=False)
            held[activations] = live.now()
            y.sum().backward()
    assert held["convolutions"] == held["invert"]
    compare(lambda net, x: checkpoint(net, x, use_reentrant=False).sin().sum().backward())


def test_a_choice_that_changes_between_the_passes() -> None:
    def run(net: Any, x: Tensor) -> None:
        values = [net(x).sin().sum()]
        for net.activations in ("invert", "convolutions", "store"):
            values.append(net(x).cos().sum())
        net.activations = "invert"
        sum(values).backward()

    compare(run)


def test_what_is_changed_in_place_is_computed_again() -> None:
    layer = nn.Conv1d(2, 2, 3, padding=1)
    with KeptConvolutions() as first:
        layer(torch.rand(1, 2, 8))
        layer(torch.rand(1, 2, 8)).relu_()
    kept = first.outputs()
    assert kept[0] is not None
    assert kept[1] is None
    with CountConvolutions() as counted, KeptConvolutions(kept):
        assert torch.equal(layer(torch.rand(1, 2, 8)), kept[0])
        layer(torch.rand(1, 2, 8))
    assert counted.count == 1


def test_a_compiled_branch_keeps_nothing() -> None:
    def run(net: Any, x: Tensor) -> None:
        torch._dynamo.reset()
        for coupling in net.couplings_of(0):
            coupling.branch.compile(backend="aot_eager")
        net(x).sin().sum().backward()

    compare(run, channel_mixing=None)
    coupling = AdditiveCoupling(torch.compile(nn.Conv1d(1, 1, 1), backend="eager"))
    branch = Branch(nn.Conv1d(1, 1, 1))
    branch.compile(backend="eager")
    for compiled in (coupling, AdditiveCoupling(branch)):
        compiled.keeps_convolutions = True
        with compiled.watch() as watch:
            assert watch is None


def test_large_convolutions_in_slabs_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network("store"), image()
    expected = torch.autograd.grad(net(x).sin().sum(), [x, *net.parameters()])
    cut_small_tensors(monkeypatch)
    monkeypatch.setattr(slab_convolution, "autocast_type", lambda device: None)
    monkeypatch.setattr("monai_iunet.networks.layers.normalized_activation._parts", lambda x: 1)
    counts = count_slabs(monkeypatch)
    net, x = network("convolutions"), image()
    y = net(x)
    forward = len(counts)
    found = torch.autograd.grad(y.sin().sum(), [x, *net.parameters()])
    assert forward > 0
    assert len(counts) == 2 * forward  # once in the forward pass, once for the gradients
    assert max(relative_errors(found, expected)) < 1e-10


@pytest.mark.parametrize("frozen", ["nothing", "x", "parameters"])
def test_finite_differences(frozen: str) -> None:
    layer = nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=1, dilation=(2, 1), groups=2, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=frozen != "x")
    for parameter in layer.parameters():
        parameter.requires_grad_(frozen != "parameters")

    def keep(x: Tensor, *_: Tensor) -> Tensor:
        with KeptConvolutions() as kept:
            y: Tensor = layer(x)
        assert len(kept.outputs()) == 1
        return y

    assert torch.equal(keep(x), layer(x))
    assert torch.autograd.gradcheck(keep, (x, layer.weight, layer.bias))
    assert torch.autograd.gradgradcheck(keep, (x, layer.weight, layer.bias))


@pytest.mark.parametrize("activations", ["store", "invert", "convolutions"])
def test_layers_used_twice_count_twice_where_a_graph_of_gradients_is_created(activations: str) -> None:
    net, x = network(activations, 1), image(1)
    wanted = [x, *net.parameters()]
    found = torch.autograd.grad(net(net(x)).sin().sum(), wanted, create_graph=True)
    assert max(relative_errors(found, torch.autograd.grad(net(net(x)).sin().sum(), wanted))) < 1e-10


def jacobian_product(layer: nn.Module, x: Tensor) -> Tensor:
    product: Tensor = torch.func.jvp(lambda x: layer(x).tanh(), (x,), (x,))[1]
    return product


@pytest.mark.parametrize("compute", [lambda layer, x: torch.vmap(layer)(x).tanh(), jacobian_product])
def test_branches_that_use_torch_func(compute: Callable[..., Tensor]) -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return compute(super().forward, x)

    compare(run_once, make_branch=lambda dims, inputs, outputs, *_: Own(inputs, outputs, 3, padding=1))


def run_once(net: nn.Module, x: Tensor) -> None:
    net(x).sin().sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def test_no_gradient_stays_none() -> None:
    """Weights without one are left alone by an optimizer that would let those with zeros decay."""
    layer = nn.Conv1d(1, 1, 3)
    with KeptConvolutions():
        NoGradient.apply(layer(torch.rand(1, 1, 8))).sum().backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"padding": "same", "stride": 2}, "strided"), ({"padding": "other"}, "Invalid padding"), ({}, "type")],
)
def test_what_pytorch_refuses(options: dict[str, Any], message: str) -> None:
    weight = torch.rand(1, 1, 3, dtype=torch.float32 if options else torch.float64)
    with KeptConvolutions(), torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=message):
        functional.conv1d(torch.rand(1, 1, 8), weight, **options)


def test_integers_of_numpy() -> None:
    x, weight = torch.rand(1, 1, 8), torch.rand(1, 1, 3)
    with KeptConvolutions():
        kept = functional.conv1d(x, weight, padding=np.int64(1))
    assert torch.equal(kept, functional.conv1d(x, weight, padding=1))


def test_errors_of_convolutions_are_those_of_pytorch() -> None:
    layer = nn.Conv1d(2, 2, 3).bfloat16()
    with KeptConvolutions():
        with pytest.raises(RuntimeError, match="type"):
            layer(torch.rand(1, 2, 8))
        with pytest.raises(RuntimeError, match="channels"):
            convolve(torch.rand(1, 3, 8).bfloat16(), layer)
        assert layer(torch.rand(2, 8).bfloat16()).shape == (2, 6)  # a single image
