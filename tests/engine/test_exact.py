"""With `exact=True`, rebuilt activations and the gradients are those of stored ones, to the last bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monai_iunet import IUNet, SegIUNet
from monai_iunet.engine.reversible import InvertibleLayer
from monai_iunet.networks.blocks import grid
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from monai_iunet.networks.blocks.grid import INTEGER_STEP, LIMIT, STEP, add_, enter, pack, round_to_grid, unpack, values
from monai_iunet.networks.blocks.mixing import ChannelMixing
from monai_iunet.networks.blocks.orthogonal_layer import OrthogonalLayer
from tests.helpers import relative_errors

# At 2 x 2 x 2 voxels oneDNN gives NaN for the bfloat16 gradient of a convolution, whatever the network around it.
EXTENT = {1: 32, 2: 16, 3: 16}


def trained(
    spatial_dims: int, couplings: int, amp: bool, steps: int = 10, **options: Any
) -> tuple[IUNet, Tensor, Tensor]:
    """A network that has learned for a while, an image and its target."""
    channels = (4, 4 * 2 ** (spatial_dims - 1), 4 * 4 ** (spatial_dims - 1))
    net = IUNet(spatial_dims, channels, couplings=couplings, exact=True, **options)
    shape = (2, 4, *[EXTENT[spatial_dims]] * spatial_dims)
    x, target = torch.randn(shape), torch.randn(shape)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    return net, x, target


def results(net: IUNet, x: Tensor, target: Tensor, amp: bool, activations: str) -> list[Tensor]:
    """Output, gradient of the input and of each parameter."""
    net.activations = activations
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = net(leaf)
    (y - target).square().mean().backward()
    return [y.detach(), leaf.grad, *(each.grad for each in net.parameters() if each.requires_grad)]


def assert_equal_to_the_last_bit(net: IUNet, x: Tensor, target: Tensor, amp: bool) -> None:
    stored, *others = (results(net, x, target, amp, way) for way in ("store", "invert", "convolutions"))
    assert len(stored) > 5
    for rebuilt in others:
        for one, other in zip(rebuilt, stored):
            assert torch.equal(one, other)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_gradients_are_equal_to_the_last_bit(spatial_dims: int, amp: bool) -> None:
    assert_equal_to_the_last_bit(*trained(spatial_dims, couplings=3, amp=amp), amp)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("couplings", [8, 16])  # 48 and 96 in all three levels, encoder and decoder
def test_gradients_of_deep_networks_are_equal_to_the_last_bit(couplings: int, spatial_dims: int, amp: bool) -> None:
    assert_equal_to_the_last_bit(*trained(spatial_dims, couplings, amp, steps=50), amp)


def test_without_it_bfloat16_gradients_drift() -> None:
    """What `exact` is for: if this fails, it is no longer needed."""
    net, x, target = trained(2, couplings=8, amp=True)
    net.exact = False
    rebuilt, stored = (results(net, x, target, True, activations)[2:] for activations in ("invert", "store"))
    error = sum((one - other).square().sum() for one, other in zip(rebuilt, stored))
    assert error / sum(other.square().sum() for other in stored) > 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"channel_mixing": 1},
        {"channel_mixing": None},
        {"dropout": 0.3},
        {"norm": "BATCH"},
        {"orthogonal_map": "householder", "resampling_init": "random"},
        {"learnable_resampling": False},
    ],
    ids=str,
)
def test_with_every_kind_of_layer(options: dict[str, Any]) -> None:
    assert_equal_to_the_last_bit(*trained(2, couplings=2, amp=False, **options), False)


@pytest.mark.parametrize("amp", [False, True])
def test_with_channels_last(amp: bool) -> None:
    net, x, target = trained(3, couplings=2, amp=amp)
    net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    assert_equal_to_the_last_bit(net, x.contiguous(memory_format=torch.channels_last_3d), target, amp)


def test_it_changes_little() -> None:
    net, x, _ = trained(3, couplings=3, amp=False)
    exact = net(x)
    net.exact = False
    torch.testing.assert_close(exact, net(x), rtol=1e-3, atol=1e-2)
    assert not torch.equal(exact, net(x))


def test_double_precision_too() -> None:
    net, x, target = trained(2, couplings=3, amp=False)
    assert_equal_to_the_last_bit(net.double(), x.double(), target.double(), False)


def test_the_inverse_is_right_to_a_few_steps_of_the_grid() -> None:
    net, x, _ = trained(2, couplings=3, amp=False)
    with torch.no_grad():
        restored = net.inverse(net(x))
    assert (restored - x).abs().max() < 200 * STEP


def test_the_segmentation_network_takes_it_along() -> None:
    net = SegIUNet(2, 1, 3, channels=(4, 8), couplings=2, exact=True)
    x = torch.randn(1, 1, 16, 16)
    gradients = []
    for activations in ("invert", "store"):
        net.activations = activations
        net.zero_grad()
        net(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))
    net.exact = False
    assert not net.iunet.exact


def test_a_layer_of_one_s_own_is_refused_or_sees_values() -> None:
    class Double(InvertibleLayer):
        def transform(self, inputs, weights):
            return tuple(2 * each for each in inputs)

        def restore(self, outputs, weights):
            return tuple(each / 2 for each in outputs)

    net, x = IUNet(2, (4, 8), couplings=1, exact=True), torch.randn(1, 4, 8, 8)
    net.encoder[0].append(Double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net(x)
        net.exact = False
        torch.testing.assert_close(found, net(x), atol=0.2, rtol=0)
    with pytest.raises(ValueError, match=r"no invertible layers of one's own\. Here are Double\."):
        net.exact = True


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("activations", ["invert", "store"])
def test_it_may_be_set_between_the_passes(exact: bool, amp: bool, activations: str) -> None:
    """The backward pass is that of the forward pass that was."""
    net = IUNet(2, (4, 8), couplings=2, activations=activations)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 4, 8, 8)
    found = []
    for changes in (False, True):
        net.zero_grad()
        net.exact = exact
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = net(x)
        net.exact = exact != changes
        y.square().mean().backward()
        found.append([parameter.grad for parameter in net.parameters() if parameter.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_rounding_is_straight_through() -> None:
    x = torch.tensor([0.3, -100.7], requires_grad=True)
    y = round_to_grid(x)
    assert torch.equal(y / STEP, (y / STEP).round())
    assert (y - x).abs().max() <= STEP / 2
    (3 * y).sum().backward()
    assert x.grad.tolist() == [3, 3]


@pytest.mark.parametrize("where", ["input", "coupling"])
def test_values_beyond_the_grid_are_reported(where: str) -> None:
    net = IUNet(2, (4, 8), couplings=2, exact=True)
    x = torch.randn(1, 4, 8, 8)
    if where == "input":
        x[0, 0, 3, 3] = 2 * LIMIT
    else:
        nn.init.constant_(net.decoder[0][0].branch[1].weight, 1000.0)
    for direction in (net.forward, net.inverse, net.encode, net.decode_inverse):
        if where == "input" or direction in (net.forward, net.inverse, net.decode_inverse):
            with pytest.raises(OverflowError, match="must stay below 256, but they reach"):
                direction(x)
        net(torch.zeros(1, 4, 8, 8))  # what was out of range is not held against the next image


@pytest.mark.parametrize("amp", [False, True])
def test_in_a_cuda_graph_outputs_beyond_the_grid_are_nan(amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No error can be raised there, and no value looked at."""
    net, x = IUNet(2, (4, 8), couplings=2, exact=True), torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        expected = net(x)
        monkeypatch.setattr(grid, "is_captured", lambda tensor: True)
        assert torch.equal(net(x), expected)
        x[0, 0, 3, 3] = 2 * LIMIT
        for tensors in ([net(x)], [net.inverse(x)], net.encode(x), net.decode_inverse(x)):
            assert all(tensor.isnan().all() for tensor in tensors)
        codes = [2 * LIMIT * torch.ones_like(code) for code in net.encode(x)]
        assert net.decode(codes).isnan().all()
        assert net.encode_inverse(codes).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_digits_are_lost_by_the_default_type(dtype: torch.dtype) -> None:
    """In which PyTorch would multiply integers by a number on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        on_a_gpu: Any = SimpleNamespace(is_cuda=True)
        steps = torch.tensor([32767, -12345], dtype=torch.int16)
        loses = bool(((steps * 1.0).double() != steps.double()).any())
        assert grid._multiplied_at_once(on_a_gpu) is not loses
        stream = steps.view(torch.bfloat16).reshape(1, 1, 2)
        assert torch.equal(grid.read(stream).double().flatten(), steps.double() * INTEGER_STEP)
    finally:
        torch.set_default_dtype(before)


def test_what_it_cannot_do_is_refused() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

        inverse = forward

    with pytest.raises(ValueError, match="additive couplings"):
        IUNet(2, (4, 8), exact=True, make_branch=lambda *_: Whole())


def test_networks_of_16_bits_too() -> None:
    net, x, target = trained(2, couplings=3, amp=False)
    assert_equal_to_the_last_bit(net.bfloat16(), x.bfloat16(), target.bfloat16(), False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_16_bits_compute_what_others_do(dtype: torch.dtype) -> None:
    net, x = IUNet(2, (4, 8), exact=True).to(dtype), torch.randn(2, 4, 8, 8, dtype=dtype)
    expected = copy.deepcopy(net).float()(x.float())
    torch.testing.assert_close(net(x).float(), expected, rtol=0.05, atol=0.05)
    with torch.no_grad():
        torch.testing.assert_close(net(x).float(), expected, rtol=0.05, atol=0.05)


def test_exported_it_gives_the_same() -> None:
    net = IUNet(2, (4, 8), couplings=2, exact=True).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(torch.jit.trace(net, x)(x), expected, rtol=0, atol=2 * STEP)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exported = torch.export.export(net, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=0, atol=2 * STEP)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "export",
    [
        lambda net, x: torch.jit.trace(net, x, check_trace=False),
        lambda net, x: torch.export.export(net, (x,)).module(),
    ],
    ids=["trace", "export"],
)
def test_exported_for_training_it_has_the_same_gradients(export: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    net = IUNet(2, (4, 8), couplings=2, act="TANH", exact=True)
    x = torch.randn(1, 4, 8, 8)
    exported = export(copy.deepcopy(net), x)
    for module in (net, exported):
        module(x).square().mean().backward()
    found = [exported.get_parameter(name).grad for name, _ in net.named_parameters()]
    assert all(gradient is not None for gradient in found)
    assert max(relative_errors(found, [parameter.grad for parameter in net.parameters()])) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
def test_gradients_on_a_gpu_are_equal_to_the_last_bit(amp: bool) -> None:
    """Where the kernels of a convolution repeat, as cuDNN has to be asked for."""
    net = IUNet(3, (8, 16, 32), couplings=4, exact=True).cuda()
    x, target = torch.randn(2, 1, 8, 32, 32, 32, device="cuda")
    gradients = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for activations in ("invert", "store"):
            net.activations = activations
            net.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                y = net(x)
            (y - target).square().mean().backward()
            gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_text_is_no_switch() -> None:
    with pytest.raises(ValueError, match="exact must be True or False, got 'false'"):
        IUNet(2, (4, 8), exact="false")  # type: ignore[arg-type]


def stream_types(net: IUNet, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """The types of what the couplings get."""
    seen: set[torch.dtype] = set()
    transform = AdditiveCoupling.transform

    def watched(self: AdditiveCoupling, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Any:
        seen.update(tensor.dtype for tensor in inputs)
        return transform(self, inputs, weights)

    monkeypatch.setattr(AdditiveCoupling, "transform", watched)
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
    return seen


def test_under_autocast_the_stream_is_of_integers_unless_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = IUNet(2, (4, 8), couplings=2, exact=True), torch.randn(1, 4, 8, 8)
    assert stream_types(net, x, monkeypatch) == {torch.bfloat16}
    inputs: list[Tensor] = []
    hook = net.encoder[0][0].register_forward_pre_hook(lambda _, state: inputs.extend(state))
    assert stream_types(net, x, monkeypatch) == {torch.float32}
    assert torch.equal(inputs[1], round_to_grid(x[:, 2:]))
    hook.remove()
    assert stream_types(net, x, monkeypatch) == {torch.bfloat16}


@pytest.mark.parametrize("how", ["in place", "wrapped", "forward"])
def test_a_coupling_compiled_by_itself_adds_no_integers_as_numbers(how: str) -> None:
    net, x = IUNet(1, (4, 6), couplings=1, exact=True), torch.randn(1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(x)
        last = net.decoder[0][0]
        if how == "in place":
            last.compile(backend="eager")
        elif how == "wrapped":
            net.decoder[0][0] = torch.compile(last, backend="eager")
        else:
            last.forward = torch.compile(last.forward, backend="eager")
        assert (net(x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("exact", [False, True])
def test_a_loss_on_a_code_where_kernels_depend_on_whether_there_are_gradients(exact: bool) -> None:
    """On a CPU in bfloat16, convolutions of two slices with gradients are computed in float32."""
    net, x = IUNet(3, (8, 16), couplings=2, exact=exact, norm=None), torch.randn(1, 8, 4, 8, 8)
    weights, found = list(net.encoder[0].parameters()), []
    for activations in ("invert", "store"):
        net.activations = activations
        with torch.autocast("cpu", torch.bfloat16):
            finest, _ = net.encode(x)
        gradients = torch.autograd.grad(finest.square().mean(), weights)
        found.append(torch.cat([each.flatten() for each in gradients]))
    assert (found[0] - found[1]).norm() <= (0 if exact else 1e-4) * found[1].norm()


def test_values_of_integers_are_those_of_the_image_to_half_a_step() -> None:
    x = torch.randn(2, 3, 5, 4) * 50
    stream = enter(x, torch.bfloat16)
    assert (values(stream, torch.float32) - x).abs().max() <= INTEGER_STEP / 2
    again = enter(values(stream, torch.float32), torch.bfloat16)
    assert torch.equal(again.view(torch.int16), stream.view(torch.int16))


def test_what_is_added_to_integers_is_taken_back_whatever_it_is() -> None:
    stream, shift = enter(torch.randn(1, 2, 300, 7) * 40, torch.bfloat16), torch.randn(1, 2, 300, 7) * 40
    total = add_(stream, shift, 1, torch.empty_like(stream), check=True)
    torch.testing.assert_close(values(total, torch.float32), values(stream, torch.float32) + shift, rtol=0, atol=0.01)
    back = add_(total, shift, -1, total, check=False)
    assert torch.equal(back.view(torch.int16), stream.view(torch.int16))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("dtype", "most", "size"), [(torch.bfloat16, 2, 1), (torch.float32, 19, 2)])
def test_three_residues_fit_into_an_integer_and_larger_ones_are_reported(
    channels: int, dtype: torch.dtype, most: int, size: int
) -> None:
    stream = torch.empty(1, channels, 500, dtype=dtype)
    steps = torch.randint(-most, most + 1, (1, channels, 500)).float()
    steps[..., :2] = torch.tensor([-most, most])
    packed = pack(steps.clone(), stream)
    assert packed.nbytes <= (channels + 2) // 3 * 500 * size
    assert torch.equal(unpack(packed, stream, channels), steps)
    steps[0, -1, 3] = most + 1
    with pytest.raises(OverflowError):
        pack(steps, stream)


def test_products_of_values_near_the_limit_are_taken_back() -> None:
    mixing = ChannelMixing((256, 256), (300, 212))
    mixing.exact = True
    with torch.no_grad():
        for parameter in mixing.parameters():
            parameter.normal_()
    pieces = tuple(round_to_grid(torch.randn(1, 256, 200).mul_(40)).requires_grad_() for _ in range(2))
    assert LIMIT / 2 < max(float(piece.detach().abs().max()) for piece in pieces) < LIMIT
    states = mixing(*pieces)
    with torch.no_grad():
        weights = mixing.weights()
        remembered = mixing.remember(pieces, states, weights, False)
        back = mixing.recover(states, weights, remembered, False)
    assert all(torch.equal(one, other) for one, other in zip(back, pieces))


def test_second_derivatives_through_integers_are_those_of_float32() -> None:
    net, x = IUNet(2, (4, 8), couplings=2, exact=True, act="tanh", activations="store"), torch.randn(1, 4, 8, 8)
    results = []
    for watched in (False, True):
        hook = net.encoder[0][0].register_forward_hook(lambda *_: None) if watched else None
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(leaf)
        (first,) = torch.autograd.grad(y.square().mean(), leaf, create_graph=True)
        weights = [each.matrix.weight for each in net.modules() if isinstance(each, OrthogonalLayer)]
        results.append(torch.cat([each.flatten() for each in torch.autograd.grad(first.square().sum(), weights)]))
        if hook:
            hook.remove()
    error = (results[0] - results[1]).norm() / results[1].norm()
    assert error < 0.05


def test_codes_and_inverses_under_autocast() -> None:
    net, x = IUNet(2, (4, 8, 16), couplings=2, exact=True), torch.randn(1, 4, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(net.inverse(y), x, rtol=0, atol=0.1)
        codes = net.encode(x)
        torch.testing.assert_close(net.decode(codes), y, rtol=0, atol=1e-6)
        torch.testing.assert_close(net.encode_inverse(codes), x, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_that_cannot_be_taken_back_is_an_error_of_its_own(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixing = ChannelMixing((2, 2), (2, 2))
    mixing.exact = True
    monkeypatch.setattr(mixing, "weights", lambda: (1.2 * torch.eye(4).requires_grad_(),))
    halves = [enter(torch.rand(1, 2, 8), dtype) if dtype != torch.float32 else torch.rand(1, 2, 8) for _ in range(2)]
    with pytest.raises(OverflowError, match="must be taken back within a few steps"):
        mixing(*halves)
