"""Ways through the engine that networks seldom take: parts of a chain without a gradient, graphs kept, views."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from monai_iunet import IUNet
from monai_iunet.engine.repetition import Conditions
from monai_iunet.engine.reversible import InvertibleLayer
from monai_iunet.engine.saved_tensors import Converted
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from monai_iunet.networks.blocks.mixing import ChannelMixing
from monai_iunet.networks.blocks.partition import ChannelPartition
from monai_iunet.planning.live_bytes import LiveBytes
from tests.helpers import randomize, relative_errors

Run = Callable[[Tensor, Tensor], Tensor]


class Cut(InvertibleLayer):
    """Takes a channel off each of two inputs: two states become four."""

    def transform(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for tensor in inputs for part in (tensor[:, :1], tensor[:, 1:]))

    def restore(self, outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.cat(outputs[:2], 1), torch.cat(outputs[2:], 1)


class HandOn(InvertibleLayer):
    """One state in, the same out, in the same memory."""

    def transform(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].view_as(inputs[0]),)

    restore = transform


class Scale(InvertibleLayer):
    """One state in, one out."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.double))

    def transform(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * self.factor,)

    def restore(self, outputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (outputs[0] / self.factor,)


def coupling(channels: int = 2) -> AdditiveCoupling:
    branch = nn.Sequential(nn.Conv1d(channels, channels, 3, padding=1), nn.Tanh())
    return randomize(AdditiveCoupling(branch)).double()


def halves(channels: int = 2) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, channels, 5, dtype=torch.double, requires_grad=True) for _ in range(2))  # type: ignore[return-value]


def compare(layers: Sequence[nn.Module], run: Run, backward_passes: int = 1) -> None:
    """Gradients of the inputs and the parameters against plain autograd; and outputs keep their values."""
    a, b = halves()
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    found = []
    for rebuilds in (True, False):
        for layer in layers:
            layer.rebuilds = rebuilds
        loss = run(a, b)
        for _ in range(backward_passes - 1):
            torch.autograd.grad(loss, [a, b, *parameters], retain_graph=True, allow_unused=True)
        found.append(torch.autograd.grad(loss, [a, b, *parameters], allow_unused=True))
    for mine, plain in zip(*found, strict=True):
        assert (mine is None) == (plain is None)
    pairs = [(mine, plain) for mine, plain in zip(*found) if plain is not None]
    assert len(pairs) > 2
    assert max(relative_errors([mine for mine, _ in pairs], [plain for _, plain in pairs])) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("backward_passes", [1, 3])
def test_a_branch_of_the_chain_without_a_gradient(length: int, backward_passes: int) -> None:
    """Its states are rebuilt from its kept end, over one call or several."""
    first, cut = coupling(), Cut()
    scales = [Scale(0.5 + index) for index in range(length)]

    def run(a: Tensor, b: Tensor) -> Tensor:
        one, two, three, four = cut(*first(a, b))
        for scale in scales:
            (one,) = scale(one)
        ends = [Scale(1.0)(tensor)[0] for tensor in (two, three, four)]
        assert one.requires_grad  # and yet without a gradient
        return sum(end.square().sum() for end in ends)

    compare([first, cut, *scales], run, backward_passes)


def test_a_branch_without_a_gradient_that_takes_two_states() -> None:
    first, cut, last = coupling(), Cut(), [coupling(1), coupling(1), coupling(1)]

    def run(a: Tensor, b: Tensor) -> Tensor:
        one, two, three, four = cut(*first(a, b))
        state = (one, three)
        for layer in last:
            state = layer(*state)
        return two.square().sum() + four.square().sum()

    compare([first, cut, *last], run)


def test_a_branch_without_a_gradient_that_also_takes_what_no_layer_made() -> None:
    first, cut, last = coupling(), Cut(), coupling(1)
    foreign = torch.randn(2, 1, 5, dtype=torch.double)

    def run(a: Tensor, b: Tensor) -> Tensor:
        one, two, three, four = cut(*first(a, b))
        last(foreign, one)
        return two.square().sum() + three.square().sum() + four.square().sum()

    compare([first, cut, last], run)


def test_a_branch_without_a_gradient_that_a_storing_layer_ends() -> None:
    """The storing layer keeps its input, which is as good as a kept end."""
    first, cut, scales = coupling(), Cut(), [Scale(0.5), Scale(2.0)]

    def run(a: Tensor, b: Tensor) -> Tensor:
        one, two, three, four = cut(*first(a, b))
        scales[1].rebuilds = False
        for scale in scales:
            (one,) = scale(one)
        return two.square().sum() + three.square().sum() + four.square().sum()

    compare([first, cut, *scales], run)


def test_a_branch_that_had_a_gradient_only_the_first_time() -> None:
    """What a call keeps outlives its backward pass if the graph does."""
    first, cut, scale = coupling(), Cut(), Scale(0.5)
    a, b = halves()
    found = []
    for rebuilds in (True, False):
        for layer in (first, cut, scale):
            layer.rebuilds = rebuilds
        one, two, three, four = cut(*first(a, b))
        (end,) = scale(one)
        rest = two.square().sum() + three.square().sum() + four.square().sum()
        whole = torch.autograd.grad(rest + end.square().sum(), [a, b], retain_graph=True)
        found.append([*whole, *torch.autograd.grad(rest, [a, b])])
    assert max(relative_errors(*found)) < 1e-12


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_rebuilt_from_a_held_output_is_not_written_over(keep: bool) -> None:
    """The end of the branch hands on its memory, so the rebuilt state is the output that the caller holds."""
    first, hand_on = coupling(), HandOn()
    one, two = first(*halves())
    (end,) = hand_on(two, keep=keep)
    before = end.detach().clone()
    one.square().sum().backward()  # writes over the second state, where it may
    assert torch.equal(end.detach(), before)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_only_private_outputs_are_written_over(private: bool, retained: bool, hooked: bool) -> None:
    layer, other = coupling(), coupling()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor) if hooked else nullcontext():
        outputs = layer(*other(*halves()), keep=True, private=private)
    before = [output.detach().clone() for output in outputs]
    sum(output.sum() for output in outputs).backward(retain_graph=retained)
    same = all(torch.equal(output.detach(), then) for output, then in zip(outputs, before))
    assert same == (not private or retained or hooked)


LAYERS: dict[str, Callable[[], InvertibleLayer]] = {
    "coupling": coupling,
    "mixing": lambda: randomize(ChannelMixing((2, 2), (3, 1))).double(),
    "partition": lambda: ChannelPartition((2, 2), (3, 1)),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_that_the_caller_holds_are_not_written_over(kind: str, keep: bool) -> None:
    before, layer = coupling(), LAYERS[kind]()
    a, b = (torch.randn(1, 2, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    outputs = layer(*before(a, b), keep=keep)
    then = [output.detach().clone() for output in outputs]
    sum(output.sum() for output in outputs).backward()
    assert all(torch.equal(output.detach(), value) for output, value in zip(outputs, then))


def test_memory_of_rebuilding_a_branch_does_not_grow_with_its_length() -> None:
    peaks = []
    for length in (3, 30):
        first, layers = coupling(), [coupling() for _ in range(length)]
        parameters = [parameter for layer in (first, *layers) for parameter in layer.parameters()]
        taken = state = first(*halves())
        for layer in layers:
            state = layer(*state)
        with LiveBytes(ignore=parameters) as live:
            taken[1].sum().backward()
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("backward_passes", [1, 2])
@pytest.mark.parametrize("stored", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_layers_that_store_among_layers_that_rebuild(stored: tuple[int, ...], backward_passes: int) -> None:
    layers = [coupling() for _ in range(3)]
    a, b = halves()
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    found = []
    for storing in ((0, 1, 2), stored):
        for index, layer in enumerate(layers):
            layer.rebuilds = index not in storing
        states = [(a, b)]
        for layer in layers:
            states.append(layer(*states[-1]))
        loss = sum(tensor.square().sum() for tensor in states[-1])
        before = [tensor.detach().clone() for state in states for tensor in state]
        for _ in range(backward_passes):
            gradients = torch.autograd.grad(loss, [a, b, *parameters], retain_graph=True)
        found.append(gradients)
        for tensor, expected in zip([tensor for state in states for tensor in state], before):
            assert torch.equal(tensor.detach(), expected)
    assert max(relative_errors(*reversed(found))) < 1e-12


def test_a_state_that_a_storing_layer_took_is_guarded() -> None:
    first, second = coupling(), coupling()
    second.rebuilds = False
    state = first(*halves())
    loss = sum(tensor.sum() for tensor in second(*state))
    with torch.no_grad():
        state[0].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_weights_used_inside_and_outside_of_a_layer_under_autocast() -> None:
    layer = AdditiveCoupling(nn.Conv1d(2, 2, 3, padding=1))
    conv = next(layer.children())
    x = torch.randn(2, 2, 5)
    found = []
    for layer.rebuilds in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            first, second = layer(x, x)
            loss = (conv(x) + second + first).float().square().sum()
        loss.backward()
        found.append([parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*found, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_random_numbers_are_remembered_only_where_they_are_drawn(dropout: float) -> None:
    module = nn.Dropout(dropout)
    conditions = Conditions(module, torch.device("cpu"))
    with conditions.recorded():
        first = module(torch.ones(9))
    assert bool(conditions._random) == (dropout > 0)
    before = torch.get_rng_state()
    with conditions.repeated():
        assert torch.equal(module(torch.ones(9)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stand_in_is_taken_for_no_tensor_that_gets_the_memory_of_the_one_it_stands_for() -> None:
    source = torch.randn(1, 4, 64)
    for _ in range(20):
        tensor = source.bfloat16()
        stand_in = Converted(tensor, source, Tensor.bfloat16)
        assert stand_in.is_of(tensor)
        assert stand_in.is_of(tensor.detach())
        assert not stand_in.is_of(tensor[:, :2])
        torch.testing.assert_close(stand_in.tensor(), tensor, rtol=0, atol=0)
        del tensor
        assert not stand_in.is_of(source.bfloat16())


@pytest.mark.parametrize("backward", [False, True])
def test_graphs_do_not_pile_up_where_a_branch_keeps_its_output(backward: bool) -> None:
    """As attention keeps its map, in the place of that of the step before."""

    class Keeping(nn.Conv1d):
        kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    layer, x = AdditiveCoupling(Keeping(2, 2, 1)), torch.rand(1, 2, 8)
    kept = []
    for _ in range(5):
        outputs = layer(x, x, keep=True)
        if backward:
            outputs[1].sum().backward()
        kept.append(weakref.ref(layer.branch.kept))
        del outputs
    gc.collect()
    assert [reference() is not None for reference in kept] == [False] * 4 + [True]


def triple_by_numpy(tensor: Tensor) -> None:
    values = tensor.detach().numpy()
    values *= 3


def change_one_value(tensor: Tensor) -> None:
    tensor.data[..., -1, -1] += 1e-3


def sort_by_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy().ravel().sort()


def mirror_by_numpy(tensor: Tensor) -> None:
    values = tensor.detach().numpy()
    values[:] = values[..., ::-1].copy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("write", [triple_by_numpy, change_one_value, sort_by_numpy, mirror_by_numpy])
def test_an_output_that_is_written_to_without_a_version_is_noticed(
    write: Callable[[Tensor], None], dtype: torch.dtype
) -> None:
    """As results on a CPU are by what is made of them in NumPy before the backward pass."""
    network = IUNet(2, (4, 8)).to(dtype)
    output = network(torch.rand(1, 4, 8, 8, dtype=dtype))
    loss = output.sum()
    write(output)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation before its backward pass"):
        loss.backward()


@pytest.mark.parametrize("way", [IUNet.encode, IUNet.decode_inverse])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_code_that_is_written_to_without_a_version_is_noticed(way: Callable[..., Any], level: int) -> None:
    codes = way(IUNet(2, (4, 8, 16)), torch.rand(1, 4, 8, 8))
    loss = sum(code.sum() for code in codes)
    triple_by_numpy(codes[level])
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation before its backward pass"):
        loss.backward()


@pytest.mark.parametrize("write", [triple_by_numpy, mirror_by_numpy])
@pytest.mark.parametrize("kind", ["channels last", "with gaps", "in one row"])
def test_it_is_noticed_in_whatever_order_values_lie(write: Callable[[Tensor], None], kind: str) -> None:
    first, second = torch.rand(2, 2, 2, 4, 6)
    if kind == "channels last":
        first, second = (half.contiguous(memory_format=torch.channels_last) for half in (first, second))
    elif kind == "with gaps":
        first, second = torch.cat([first, second], 1).split(2, 1)
    else:
        first, second = torch.rand(2, 1, 2, 1, 6)
    outputs = AdditiveCoupling(nn.Conv2d(2, 2, 1))(first, second, keep=True)
    loss = outputs[0].sum() + outputs[1].sum()
    write(outputs[0])
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


def test_hooks_that_round_what_is_saved_may_do_so() -> None:
    network = IUNet(2, (4, 8))
    with saved_tensors_hooks(lambda tensor: tensor.bfloat16(), lambda tensor: tensor.float()):
        output = network(torch.rand(1, 4, 8, 8))
    output.sum().backward()


def test_an_output_with_complex_values_is_known_by_them() -> None:
    couplings = [AdditiveCoupling(nn.Conv2d(2, 2, 1, dtype=torch.complex128)) for _ in range(2)]
    state = tuple(torch.rand(1, 2, 4, 4, dtype=torch.complex128, requires_grad=True).conj() for _ in range(2))
    outputs = couplings[1](*couplings[0](*state), keep=True)
    loss = outputs[1].abs().sum()
    loss.backward(retain_graph=True)
    outputs[1].data.mul_(2)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()
