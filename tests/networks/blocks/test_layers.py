"""Every invertible layer: forward and inverse undo each other, and rebuilding gives autograd's gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from monai_iunet.engine.reversible import InvertibleLayer
from monai_iunet.networks.blocks import resampling
from monai_iunet.networks.blocks.branch import Branch
from monai_iunet.networks.blocks.coupling import AdditiveCoupling, WholeCoupling
from monai_iunet.networks.blocks.mixing import ChannelMixing
from monai_iunet.networks.blocks.partition import ChannelPartition
from monai_iunet.networks.blocks.resampling import OrthogonalDownsampling, resampling_base
from tests.helpers import randomize, relative_errors


class Scaling(nn.Module):
    """An invertible module as a user may write one."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(1) * self.log_scale.exp()

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return (y * (-self.log_scale).exp()).flip(1)


LAYERS = {
    "coupling": (lambda: AdditiveCoupling(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Tanh())), [2, 3], (8, 6)),
    "coupling without parameters": (lambda: AdditiveCoupling(nn.Tanh()), [2, 2], (8, 6)),
    "whole coupling": (lambda: WholeCoupling(Scaling(), (2, 3), (3, 2)), [2, 3], (8, 6)),
    "mixing": (lambda: ChannelMixing((2, 3), (4, 1)), [2, 3], (8, 6)),
    "partition": (lambda: ChannelPartition((2, 3), (4, 1)), [2, 3], (8, 6)),
    "partition of one": (lambda: ChannelPartition((5,), (2, 3)), [5], (8, 6)),
    "same partition": (lambda: ChannelPartition((2, 3), (2, 3)), [2, 3], (8, 6)),
    "downsampling 1D": (lambda: OrthogonalDownsampling(3, (3,), (4, 5), "random"), [3], (12,)),
    "downsampling 2D": (lambda: OrthogonalDownsampling(3, (2, 4), (7, 17)), [3], (8, 12)),
    "downsampling 3D": (lambda: OrthogonalDownsampling(2, (2, 1, 2), (4, 4), "pixel_shuffle"), [2], (4, 3, 6)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[InvertibleLayer, list[torch.Tensor]]:
    build, channels, size = LAYERS[request.param]
    layer = randomize(build()).double()
    return layer, [torch.randn(2, count, *size, dtype=torch.double, requires_grad=True) for count in channels]


def test_inverse_undoes_forward(case: tuple[InvertibleLayer, list[torch.Tensor]]) -> None:
    layer, inputs = case
    for tensor, back in zip(inputs, layer.inverse(*layer(*inputs)), strict=True):
        torch.testing.assert_close(back, tensor)


@pytest.mark.parametrize("inverse", [False, True])
def test_rebuilding_gives_the_gradients_of_autograd(
    case: tuple[InvertibleLayer, list[torch.Tensor]], inverse: bool
) -> None:
    layer, inputs = case
    if inverse:
        inputs = [tensor.detach().requires_grad_() for tensor in layer(*inputs)]
    found = []
    for layer.rebuilds in (True, False):
        outputs = (layer.inverse if inverse else layer)(*inputs)
        torch.manual_seed(1)
        loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
        found.append(torch.autograd.grad(loss, [*inputs, *layer.parameters()]))
    assert max(relative_errors(*found)) < 1e-10


def test_gradients_agree_with_finite_differences(case: tuple[InvertibleLayer, list[torch.Tensor]]) -> None:
    layer, inputs = case
    assert torch.autograd.gradcheck(lambda *tensors: layer(*tensors), inputs, fast_mode=True)


def test_gradient_of_one_output_only(case: tuple[InvertibleLayer, list[torch.Tensor]]) -> None:
    layer, inputs = case
    for index in range(len(layer(*inputs))):
        found = []
        for layer.rebuilds in (True, False):
            loss = layer(*inputs)[index].square().sum()
            grads = torch.autograd.grad(loss, [*inputs, *layer.parameters()], allow_unused=True)
            found.append([torch.zeros(1).double() if grad is None else grad for grad in grads])
        assert max(float((a - b).abs().max()) for a, b in zip(*found)) < 1e-10


def test_downsampling_of_haar_is_orthogonal_and_averages_first() -> None:
    layer = OrthogonalDownsampling(1, (2, 2, 2), (1, 7))
    x = torch.rand(1, 1, 4, 4, 4)
    mean, detail = layer(x)
    torch.testing.assert_close(mean, nn.functional.avg_pool3d(x, 2) * 8**0.5)
    torch.testing.assert_close(mean.square().sum() + detail.square().sum(), x.square().sum())


def test_haar_by_four_is_haar_by_two_twice() -> None:
    x = torch.rand(1, 1, 16)
    four = OrthogonalDownsampling(1, (4,), (4,))(x)[0]
    two = OrthogonalDownsampling(1, (2,), (2,))(x)[0]
    torch.testing.assert_close(four, OrthogonalDownsampling(2, (2,), (4,))(two)[0])


def test_pixel_shuffle_is_that_of_torch() -> None:
    x = torch.rand(2, 3, 4, 6)
    torch.testing.assert_close(
        OrthogonalDownsampling(3, (2, 2), (12,), "pixel_shuffle")(x)[0], nn.functional.pixel_unshuffle(x, 2)
    )


def test_resampling_equals_a_strided_grouped_convolution() -> None:
    layer = randomize(OrthogonalDownsampling(3, (2, 2, 2), (24,)))
    x = torch.rand(2, 3, 4, 4, 4)
    kernel = layer.matrix().reshape(24, 1, 2, 2, 2)
    torch.testing.assert_close(layer(x)[0], nn.functional.conv3d(x, kernel, stride=2, groups=3))


def test_large_resampling_goes_through_the_channels_in_groups() -> None:
    # Five channels of two samples exceed a group; the pieces meet within the values of the third channel.
    layer = randomize(OrthogonalDownsampling(5, (2, 2, 2), (18, 22)))
    x = torch.randn(2, 5, 32, 64, 64, requires_grad=True)
    assert len(list(resampling._groups(x.shape, x.device))) == 5
    back = layer.inverse(*layer(x))[0]
    torch.testing.assert_close(back, x)
    weights = [torch.randn_like(piece) for piece in layer(x)]
    found: dict[bool, list[torch.Tensor]] = {}
    for layer.rebuilds in (True, False):
        pieces = layer(x)
        up = layer.inverse(*pieces)[0]
        loss = sum((piece * weight).sum() for piece, weight in zip(pieces, weights)) + up.sin().sum()
        found[layer.rebuilds] = [*pieces, up, *torch.autograd.grad(loss, [x, layer.matrix.weight])]
    assert max(relative_errors(found[True], found[False])) < 1e-5


@pytest.mark.parametrize("stride", list(itertools.product((1, 2, 4), repeat=2)))
def test_haar_is_orthogonal(stride: tuple[int, int]) -> None:
    matrix = resampling_base("haar", stride, 1)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(len(matrix), dtype=torch.double))


def test_a_matrix_as_start() -> None:
    layer = OrthogonalDownsampling(2, (2,), (4,), [[0.0, 1.0], [-1.0, 0.0]])
    x = torch.arange(8.0).reshape(1, 2, 4)
    torch.testing.assert_close(layer(x)[0], torch.tensor([[[1.0, 3], [0, -2], [5, 7], [-4, -6]]]))


@pytest.mark.parametrize(
    ("init", "stride", "message"),
    [
        ("haar", (3,), "needs strides of 1, 2 or 4"),
        ("wavelet", (2,), "must be"),
        ([[1.0, 0.0]], (2,), "shape"),
        ([[1.0, 1.0], [1.0, 1.0]], (2,), "orthogonal"),
    ],
)
def test_bad_resampling(init: object, stride: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrthogonalDownsampling(2, stride, (4,), init)


def test_a_branch_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"must map \(1, 3, 4\) to \(1, 2, 4\)"):
        AdditiveCoupling(nn.Identity())(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4))


def test_the_input_of_a_branch_in_another_type_has_the_gradients_of_a_cast() -> None:
    branch = Branch(nn.Conv1d(3, 2, 3, padding=1, dtype=torch.bfloat16))
    coupling = AdditiveCoupling(branch)
    coupling.rebuilds = False
    changed, kept = torch.randn(1, 2, 9, requires_grad=True), torch.randn(1, 3, 9, requires_grad=True)
    first, second = coupling(changed, kept)
    for output, expected in ((first, kept), (second, changed + branch(kept.to(torch.bfloat16)))):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        weights = torch.randn_like(output)
        of_ours, of_plain = (torch.autograd.grad(y, kept, weights, retain_graph=True)[0] for y in (output, expected))
        torch.testing.assert_close(of_ours, of_plain, rtol=0, atol=0)
    (of_both,) = torch.autograd.grad([first.sum(), second.sum()], kept)
    (of_shift,) = torch.autograd.grad(branch(kept.to(torch.bfloat16)).sum(), kept)
    torch.testing.assert_close(of_both, of_shift + 1, rtol=0, atol=0)


def test_a_branch_that_begins_with_an_activation_in_place_is_refused() -> None:
    coupling = AdditiveCoupling(Branch(nn.ReLU(inplace=True), nn.Conv1d(2, 2, 1)))
    with pytest.raises(RuntimeError, match="leave its input as it is"):
        coupling(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
