"""What is said of rebuilt activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from monai_iunet import IUNet, SegIUNet, reconstruction_error
from monai_iunet.networks.blocks.coupling import AdditiveCoupling


def test_the_error_is_that_of_the_precision() -> None:
    network = IUNet(2, (4, 8, 16), couplings=4)
    x = torch.randn(2, 4, 32, 32)
    single = reconstruction_error(network, x)
    double = reconstruction_error(network.double(), x.double())
    assert len(single) == len(double) == 3
    assert all(1e-9 < error < 1e-5 for error in single)
    assert all(error < 1e-13 for error in double)


def test_autocast_shows_what_exact_mends() -> None:
    network = SegIUNet(2, 1, 3, (4, 8, 16), couplings=8, activations="store")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x = torch.randn(1, 1, 30, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        drift = reconstruction_error(network, x)
        network.exact = True
        exact = reconstruction_error(network, x)
    assert max(drift) > 1e-4
    assert exact == [0, 0, 0]
    assert network.activations == "store"
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_it_is_told_where_no_gradients_are_recorded() -> None:
    network, x = IUNet(2, (4, 8)).eval(), torch.randn(1, 4, 8, 8)
    expected = reconstruction_error(network, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert reconstruction_error(network, x.clone()) == expected


def test_a_level_that_is_rebuilt_wrongly_shows() -> None:
    class Forgetful(AdditiveCoupling):
        def rebuild(self, *arguments: Any) -> Any:
            inputs, saved = super().rebuild(*arguments)
            return tuple(1.01 * tensor for tensor in inputs), saved

    network = IUNet(2, (4, 8), couplings=2)
    network.encoder[1][1] = Forgetful(network.encoder[1][1].branch)
    errors = reconstruction_error(network, torch.randn(1, 4, 8, 8))
    assert errors[1] > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_error_is_told_of_activations_that_are_not_finite(value: float) -> None:
    x = torch.randn(1, 4, 8, 8)
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        reconstruction_error(IUNet(2, (4, 8), couplings=1), x)


@pytest.mark.parametrize("trained", [(), ("head",), ("head", "iunet.decoder")])
def test_frozen_parts_are_examined_as_trained_ones(trained: tuple[str, ...]) -> None:
    network, x = SegIUNet(2, 1, 2, (4, 8), couplings=2), torch.randn(1, 1, 8, 8)
    expected = reconstruction_error(network, x)
    network.requires_grad_(False)
    for name in trained:
        network.get_submodule(name).requires_grad_()
    assert reconstruction_error(network, x) == expected
    assert not network.iunet.encoder[0][0].branch[0].weight.requires_grad


@pytest.mark.parametrize("grows", [True, False])
def test_a_branch_that_does_not_repeat_itself_shows(grows: bool) -> None:
    """As one does that depends on something outside of it that it changes, of which the engine knows nothing."""
    calls: list[None] = []

    def count(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return output * (1 + 0.1 * grows * len(calls))

    def make_branch(_: int, before: int, after: int, *place: Any) -> nn.Module:
        branch = nn.Conv2d(before, after, 3, padding=1)
        branch.register_forward_hook(count)
        return branch

    network = IUNet(2, (4, 8), couplings=2, make_branch=make_branch)
    image = torch.randn(1, 4, 16, 16)
    if grows:
        with pytest.raises(RuntimeError, match="Conv2d returns something else in the backward pass"):
            reconstruction_error(network, image)
    else:
        assert max(reconstruction_error(network, image)) < 1e-5
