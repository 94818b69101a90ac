"""Where numbers end: NaN, a batch of one, a structure of one voxel."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from monai_iunet import IUNet, SegIUNet
from monai_iunet.losses.chunked_dice_ce import ChunkedDiceCELoss
from monai_iunet.training.evaluation import compare

NORMS = [
    None,
    "INSTANCE",
    ("INSTANCE", {"affine": True}),
    "BATCH",
    ("GROUP", {"num_groups": 2}),
    ("LOCALRESPONSE", {"size": 3}),
]


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
