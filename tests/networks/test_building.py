"""Networks built without values, averaged, replaced and scripted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from ignite.handlers import EMAHandler
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from monai_iunet import ChunkedDiceCELoss, IUNet, SegIUNet
from monai_iunet.engine.pytorch_private import FakeTensorMode
from monai_iunet.networks.layers.orthogonal import ORTHOGONAL_MAPS
from tests.helpers import randomize

OPTIONS: list[dict[str, Any]] = [
    {},
    {"resampling_init": "random", "channel_mixing": 1},
    {"norm": "BATCH", "channel_mixing": None},
    {
        "channels": (4, 6, 16),
        "strides": [(1, 2), (2, 2)],
        "learnable_resampling": False,
        "orthogonal_map": "householder",
    },
    {"exact": True, "orthogonal_map": "matrix_exp"},
]


def network(**options: Any) -> SegIUNet:
    return SegIUNet(2, 1, 3, **{"channels": (4, 8, 16), "couplings": 1, **options})


def trained(**options: Any) -> SegIUNet:
    return randomize(network(**options), std=0.2)


def image() -> Tensor:
    return torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_built_on_meta_fake_and_real_the_state_has_the_same_keys(options: dict[str, Any]) -> None:
    real = network(**options)
    with torch.device("meta"):
        meta = network(**options)
    with FakeTensorMode():
        fake = network(**options)
    for other in (meta, fake):
        assert list(other.state_dict()) == list(real.state_dict())
        assert [tensor.shape for tensor in other.state_dict().values()] == [
            tensor.shape for tensor in real.state_dict().values()
        ]
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "norm": "BATCH"}], ids=str)
def test_on_meta_it_runs_without_values(options: dict[str, Any], exact: bool) -> None:
    with torch.device("meta"):
        net, images = SegIUNet(3, 1, 2, (4, 8), couplings=1, exact=exact, **options), torch.empty(2, 1, 8, 7, 8)
        logits = net(images)
        ChunkedDiceCELoss(softmax=True, to_onehot_y=True)(logits, images).backward()
    assert logits.shape == (2, 2, 8, 7, 8)
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in net.parameters())
    with torch.no_grad():
        assert net.eval()(images).shape == logits.shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_built_on_meta_and_loaded_it_is_the_original(options: dict[str, Any], assign: bool) -> None:
    original = trained(**options)
    with torch.device("meta"):
        net = network(**options)
    if not assign:
        net.to_empty(device="cpu")
    net.load_state_dict(original.state_dict(), assign=assign)
    for mode in (True, False):
        with torch.no_grad():
            assert torch.equal(net.train(mode)(image()), original.train(mode)(image()))


def test_built_on_meta_and_reset_it_starts_as_others_do() -> None:
    with torch.device("meta"):
        net = network(resampling_init="random")
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.rand(1, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net.iunet.inverse(net.iunet(x)), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_buffers_are_the_same_in_training_and_evaluation(options: dict[str, Any]) -> None:
    net = network(**options)
    names = [[name for name, _ in net.train(mode).named_buffers()] for mode in (True, False)]
    assert names[0] == names[1]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_average_by_ignite(options: dict[str, Any], training: bool) -> None:
    net = network(**options)
    handler = EMAHandler(net, momentum=0.5)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    averaged = handler.ema_model
    averaged.train(training)
    expected = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with torch.no_grad():
        averaged(image())  # matrices of these weights are in use from here on
    for _ in range(2):
        randomize(net, std=0.2)
        engine.run([0], max_epochs=1)
        engine.state.epoch = 0
        for name, parameter in net.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * parameter.detach()
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    check_output(averaged)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_average_by_pytorch(options: dict[str, Any], training: bool, use_buffers: bool) -> None:
    net = trained(**options)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers).train(training)
    for _ in range(2):
        with torch.no_grad():
            averaged(image())
        averaged.update_parameters(randomize(net, std=0.2))
    check_output(averaged.module)


def write_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.copy_(0.2 * torch.randn_like(parameter))


def swap_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)


def from_vector(net: nn.Module) -> None:
    size = nn.utils.parameters_to_vector(net.parameters()).numel()
    nn.utils.vector_to_parameters(0.2 * torch.randn(size), net.parameters())


@pytest.mark.parametrize("orthogonal_map", sorted(ORTHOGONAL_MAPS))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", [write_data, swap_data, from_vector])
def test_weights_that_are_written_without_autograd_s_knowledge(write: Any, training: bool, orthogonal_map: str) -> None:
    net = trained(orthogonal_map=orthogonal_map, resampling_init="random").train(training)
    with torch.no_grad():
        before = net(image())
        write(net)
        assert not torch.allclose(net(image()), before, atol=1e-3)
    check_output(net)


def check_output(net: nn.Module) -> None:
    """The output is that of a network that was built with these weights."""
    fresh = copy.deepcopy(net)
    fresh.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(net(image()), fresh(image()))


# -- TorchScript


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("script", [False, True])
@pytest.mark.parametrize("options", [*OPTIONS, {"padding_mode": "reflect"}], ids=str)
def test_a_traced_or_scripted_network_takes_all_sizes(options: dict[str, Any], script: bool) -> None:
    net = trained(**options).eval()
    traced = torch.jit.script(net) if script else torch.jit.trace(net, image())
    with torch.no_grad():
        for shape in [(1, 1, 16, 16), (2, 1, 8, 24), (1, 1, 13, 18), (3, 1, 7, 9)]:
            x = torch.rand(shape)
            torch.testing.assert_close(traced(x), net(x), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_network_that_pads_nothing_refuses_in_one_line() -> None:
    net = trained(padding_mode=None).eval()
    traced = torch.jit.trace(net, image())
    with pytest.raises(torch.jit.Error, match=r"divisible by \[4, 4\], got \[13, 16\]"):
        traced(torch.rand(1, 1, 13, 16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [network, lambda: IUNet(2, (4, 8))])
def test_scripting_in_training_names_the_way_out(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"eval\(\), or use torch.jit.trace"):
        torch.jit.script(make())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_holds_a_scripted_network_is_not_trained_on() -> None:
    """PyTorch has put a trace into it, whose matrices do not change."""
    holder = nn.Sequential(trained(), nn.Softmax(1)).eval()
    torch.jit.script(holder)
    holder.eval()
    with pytest.raises(RuntimeError, match="trace in the place of this network, which cannot be trained"):
        holder.train()


def test_what_is_traced_or_exported_has_the_weights_of_that_moment() -> None:
    net = trained().eval()
    write_data(net)  # unseen by version counters, and not looked at since
    with torch.no_grad():
        exported = torch.export.export(net, (image(),)).module()
        torch.testing.assert_close(exported(image()), net(image()), atol=1e-5, rtol=1e-5)
    matrix = net.iunet.splits[0].matrix
    matrix.weight = nn.Parameter(torch.randn_like(matrix.weight))
    with torch.no_grad():
        exported = torch.export.export(net, (image(),)).module()
        torch.testing.assert_close(exported(image()), net(image()), atol=1e-5, rtol=1e-5)
    write_data(net)
    traced = torch.jit.trace(net, image(), check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(image()), net(image()), atol=1e-5, rtol=1e-5)


# -- settings


@pytest.mark.parametrize("value", ["much", 0, -3, "20 apples", 1.5])
@pytest.mark.parametrize("make", [network, lambda: IUNet(2, (4, 8))])
def test_a_memory_budget_is_checked_when_it_is_set(make: Any, value: Any) -> None:
    net = make()
    with pytest.raises(ValueError, match="must be bytes or text"):
        net.memory_budget = value
    assert net.memory_budget is None
    with pytest.raises(ValueError, match="must be bytes or text"):
        IUNet(2, (4, 8), memory_budget=value)
    net.memory_budget = "1 GiB"
    net.activations = "auto"
    with pytest.raises(ValueError, match="needs a memory_budget"):
        net.memory_budget = None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"norm": "BATCH"}, {"dropout": 0.3}], ids=str)
def test_compiled_branches(backend: str, options: dict[str, Any]) -> None:
    found = []
    for activations in ("invert", "store"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = trained(activations=activations, **options)
        names = list(net.state_dict())
        for module in net.iunet.modules():
            if hasattr(module, "branch"):
                module.branch.compile(backend=backend)
        assert list(net.state_dict()) == names
        for _ in range(2):
            net.zero_grad()
            torch.manual_seed(3)
            net(image()).square().mean().backward()
        found.append([*(parameter.grad for parameter in net.parameters()), *net.buffers()])
        copy.deepcopy(net)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_images_may_be_tensors_of_monai() -> None:
    net = SegIUNet(3, 1, 2, (4, 8), couplings=1)
    x = torch.rand(1, 1, 8, 8, 8)
    net(MetaTensor(x)).square().mean().backward()
    torch.testing.assert_close(torch.as_tensor(net(MetaTensor(x))), net(x))
