"""Functional transforms: functional_call, vmap, jvp, several gradients at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.engine.helpers import MODES, compare, image, largest_error, loss, network, plain, values
from tests.helpers import randomize, relative_errors


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("leaf", [False, True])
def test_functional_call_with_the_backward_pass_outside(scale: float, leaf: bool) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations, norm="BATCH")
        given = values(net, scale)
        passed = given if leaf else {name: 1.0 * tensor for name, tensor in given.items()}
        value = loss(functional_call(net, passed, (image(),)))
        found.append(torch.autograd.grad(value, list(given.values())))
        assert all(parameter.grad is None for parameter in net.parameters())
    assert largest_error(found) < 1e-10


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], dict[str, Tensor]], Any]] = {
    "grad": lambda function, given: torch.func.grad(function)(given),
    "vjp": lambda function, given: torch.func.vjp(function, given)[1](torch.ones((), dtype=torch.double))[0],
    "jvp": lambda function, given: {"": torch.func.jvp(function, (given,), (given,))[1]},
    "hvp": lambda function, given: torch.func.jvp(torch.func.grad(function), (given,), (given,))[1],
    "grad of grad": lambda function, given: torch.func.grad(
        lambda inner: sum(part.square().sum() for part in torch.func.grad(function)(inner).values())
    )(given),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", [{}, {"exact": True}], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_functional_transforms(name: str, options: dict[str, Any]) -> None:
    found = []
    for activations in MODES:
        net = network(activations=activations, norm=None, channel_mixing=1, **options)
        given = {key: tensor.detach() for key, tensor in net.named_parameters()}
        result = TRANSFORMS[name](lambda given, net=net: loss(functional_call(net, given, (image(),))), given)
        found.append(list(result.values()))
    assert largest_error(found) < 1e-10
    if name == "grad":
        expected = network(norm=None, channel_mixing=1, activations="store")
        plain(expected, image())
        parameters = [parameter.grad for parameter in expected.parameters()]
        assert max(relative_errors(found[1], parameters)) < (1e-3 if options else 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activations", MODES)
def test_vmap_over_images_and_over_networks(activations: str, training: bool) -> None:
    nets = [network(activations=activations, channel_mixing=1).train(training) for _ in range(2)]
    randomize(nets[1])
    parameters, buffers = torch.func.stack_module_state(nets)
    x = image()
    with torch.no_grad():
        expected = torch.stack([net(x) for net in nets])
        outputs = torch.vmap(lambda p, b: functional_call(nets[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(torch.vmap(lambda one: nets[0](one[None])[0])(x), expected[0])


@pytest.mark.parametrize("activations", MODES)
def test_forward_mode_outside_of_functional_transforms(activations: str) -> None:
    from torch.autograd import forward_ad

    net, x = network(activations=activations), image()
    expected = torch.func.jvp(lambda given: loss(net(given)), (x,), (x,))[1]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(net(forward_ad.make_dual(x, x)))).tangent
    torch.testing.assert_close(tangent, expected)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(net(forward_ad.make_dual(x, x)))).tangent
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batch", "dropout": 0.3},
        {"channel_mixing": None, "learnable_resampling": False, "act": "LEAKYRELU"},
        {"exact": True},
    ],
)
def test_several_gradients_at_once(options: dict[str, Any]) -> None:
    """They are those of one after the other, also differentiated once more."""
    for activations in MODES:
        net = network(activations=activations, **options)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        x = image()[..., :4, :4].requires_grad_()

        def three(x: Tensor, net: nn.Module = net) -> Tensor:
            torch.manual_seed(5)
            values: Tensor = net(x).flatten()[:3]
            return values

        y = three(x)
        found = torch.autograd.grad(y, [x, *trained], torch.eye(3).double(), retain_graph=True, is_grads_batched=True)
        each = [torch.autograd.grad(part, [x, *trained], retain_graph=True) for part in y]
        assert max(relative_errors(found, [torch.stack(of_one) for of_one in zip(*each)])) < 1e-10
        second = []
        for batched in (True, False):
            jacobian = torch.autograd.functional.jacobian(three, x, create_graph=True, vectorize=batched)
            value = jacobian.square().sum()
            second.append(torch.autograd.grad(value, [x, *trained], materialize_grads=True))
        assert max(relative_errors(*second)) < 1e-10


@pytest.mark.parametrize("exact", [False, True])
def test_several_gradients_at_once_under_autocast(exact: bool) -> None:
    net = network(exact=exact).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(image().float()).flatten()[:3]
    one = torch.eye(3, dtype=y.dtype)
    found = torch.autograd.grad(y, list(net.parameters()), one, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(part, list(net.parameters()), retain_graph=True) for part in y]
    assert max(relative_errors(found, [torch.stack(of_one) for of_one in zip(*each)])) < 0.05


@pytest.mark.parametrize(
    ("autocast", "options"),
    [
        (False, {}),
        (False, {"norm": "batch", "dropout": 0.3}),
        (False, {"exact": True}),
        (True, {"exact": True, "norm": None}),  # PyTorch maps no gradients of a normalization of bfloat16
    ],
)
def test_gradients_that_are_mapped(autocast: bool, options: dict[str, Any]) -> None:
    """By `torch.vmap`, as its documentation has it for Jacobians."""
    found = []
    for activations in MODES:
        net = network(activations=activations, **options).to(torch.float32 if autocast else torch.double)
        x = image().to(net.head.weight.dtype).requires_grad_()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(x)
        leaves = [x, *net.parameters()]
        directions = torch.stack([torch.ones_like(y), y.detach()])
        mapped = torch.vmap(lambda of_y, y=y, to=leaves: torch.autograd.grad(y, to, of_y, retain_graph=True))(
            directions
        )
        found.append([*mapped, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    assert largest_error(found) < 1e-10


def test_gradients_within_a_transform_of_a_graph_outside() -> None:
    def run(net: Any, x: Tensor) -> None:
        y = loss(net(x))

        def product(z: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(y, x, retain_graph=True)
            return (gradient * z).sum()

        torch.func.grad(product)(image())
        y.backward()

    compare(run)
