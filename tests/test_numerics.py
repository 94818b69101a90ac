"""Where numbers end: nothing becomes NaN without a word."""

from __future__ import annotations

import warnings

import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from monai_iunet import IUNet, SegIUNet
from monai_iunet.evaluation import compare
from monai_iunet.losses import ChunkedDiceCELoss

NORMS = [
    None,
    "INSTANCE",
    ("INSTANCE", {"affine": True}),
    "BATCH",
    ("GROUP", {"num_groups": 2}),
    ("LOCALRESPONSE", {"size": 3}),
]


@pytest.mark.parametrize("rate", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("orthogonal_map", ["cayley", "matrix_exp", "householder"])
def test_a_hundred_steps_at_an_absurd_learning_rate_do_not_go_to_nan_in_silence(
    rate: float, orthogonal_map: str
) -> None:
    net = IUNet(2, (4, 8), couplings=1, orthogonal_map=orthogonal_map)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    finite = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(100):
            x = torch.rand(2, 4, 8, 8)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), x.flip(-1))
            loss.backward()
            optimizer.step()
            finite = finite and bool(loss.isfinite())
    assert any("training has diverged" in str(warning.message) for warning in caught) != finite
    assert not (rate == 1e8 and finite)


def test_the_warning_is_not_for_sound_training_nor_for_evaluation() -> None:
    net = IUNet(2, (4, 8), couplings=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.rand(1, 4, 8, 8) * 1e6).square().mean().backward()
            optimizer.step()
        net.eval()
        for _ in range(2):
            net(torch.full((1, 4, 8, 8), torch.inf))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms_are_left_alone() -> None:
    net = IUNet(2, (4, 8), couplings=1, activations="store")
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, parameters, (x[None],)).square().mean()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    images = torch.rand(3, 4, 8, 8)
    for _ in range(2):
        found = per_image(parameters, images)
    net(images)
    expected = torch.autograd.grad(loss(dict(net.named_parameters()), images[1]), list(net.parameters()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name][1], gradient)


def test_exact_says_that_activations_are_not_finite() -> None:
    net = IUNet(2, (4, 8), couplings=1, exact=True)
    x = torch.rand(1, 4, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(OverflowError, match="reach nan"):
        net(x)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("size", [4, 8])
def test_a_batch_of_one_with_each_norm(norm: object, size: int) -> None:
    """Gradients are those of plain autograd, or the norm says itself that one value has no variance."""
    arguments = {"spatial_dims": 2, "channels": (8, 16, 32), "couplings": 1, "norm": norm}
    net = IUNet(**arguments)
    x = torch.rand(1, 8, size, size)
    found = []
    for activations in ("invert", "store"):
        net.activations = activations
        net.zero_grad()
        try:
            net(x).square().mean().backward()
        except ValueError as error:
            found.append(str(error))
            continue
        gradients = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        found.append(gradients)
    if isinstance(found[0], list):
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    else:
        assert "more than 1" in found[0]
        assert found[0] == found[1]


@pytest.mark.parametrize("loss_class", [DiceCELoss, ChunkedDiceCELoss])
def test_a_structure_of_one_voxel_trains(loss_class: type[nn.Module]) -> None:
    net = SegIUNet(3, 1, 3, (8, 16), couplings=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loss_function = loss_class(to_onehot_y=True, softmax=True, include_background=False)
    images, labels = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    images[..., 3, 4, 5] = 1
    labels[..., 3, 4, 5] = 2
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_function(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_a_structure_of_one_voxel_is_measured() -> None:
    truth, found = (torch.zeros(6, 6, 6, dtype=torch.uint8) for _ in range(2))
    truth[2, 2, 2] = 1
    found[2, 2, 4] = 1
    (row,) = compare(found, truth, (1.0, 1.0, 1.5), ["dot"])
    assert row["dice"] == 0
    assert row["hausdorff95_mm"] == pytest.approx(3.0)
    assert row["volume_mm3"] == 1.5
    (row,) = compare(truth, truth, (1.0, 1.0, 1.5), ["dot"])
    assert [row["dice"], row["hausdorff95_mm"], row["surface_distance_mm"]] == [1, 0, 0]
