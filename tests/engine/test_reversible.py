"""The engine, in the ways people train; each case against plain autograd on the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from monai_iunet import IUNet, SegIUNet
from monai_iunet.engine.reversible import InvertibleLayer
from monai_iunet.networks.blocks.coupling import AdditiveCoupling
from monai_iunet.networks.layers.orthogonal import OrthogonalMatrix
from monai_iunet.planning.live_bytes import LiveBytes
from tests.helpers import randomize, relative_errors


def network(**kwargs: object) -> SegIUNet:
    return randomize(SegIUNet(2, 1, 3, (4, 8), **kwargs)).double()


def image() -> torch.Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.double, requires_grad=True)


def step(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of all parameters and the image after one ordinary backward pass."""
    net.zero_grad()
    x.grad = None
    torch.manual_seed(1)
    net(x).square().mean().backward()
    return [tensor.grad for tensor in (x, *net.parameters()) if tensor.grad is not None]


def compare(net: nn.Module, x: torch.Tensor) -> None:
    inverted = step(net, x)
    net.activations = "store"
    stored = step(net, x)
    net.activations = "invert"
    assert len(inverted) == len(stored)
    assert max(relative_errors(inverted, stored)) < 1e-10


@pytest.mark.parametrize("norm", ["BATCH", "INSTANCE", ("GROUP", {"num_groups": 2}), None])
def test_norms(norm: object) -> None:
    compare(network(norm=norm), image())


def test_layer_norm() -> None:
    # It fixes the size of its input, so the network has a single level.
    compare(randomize(SegIUNet(2, 1, 3, (4,), norm=("LAYER", {"normalized_shape": (8, 8)}))).double(), image())


def test_dropout_repeats_its_mask_and_leaves_the_generator_as_autograd_does() -> None:
    net, x = network(dropout=0.5), image()
    compare(net, x)
    states = []
    for net.activations in ("invert", "store"):
        step(net, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_batch_norm_moves_its_statistics_once_a_step() -> None:
    net = network(norm="BATCH")
    other = copy.deepcopy(net)
    other.activations = "store"
    x = image()
    for _ in range(2):
        step(net, x)
        step(other, x)
    for (name, buffer), expected in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    assert any(name.endswith("num_batches_tracked") and int(buffer) == 2 for name, buffer in net.named_buffers())


def test_activation_in_place() -> None:
    compare(network(act=("LEAKYRELU", {"inplace": True})), image())


def test_a_branch_that_keeps_its_output() -> None:
    # tanh saves its output for the gradient, so the engine must not write over it.
    compare(network(act="TANH"), image())


def test_frozen_parameters() -> None:
    net = network()
    for parameter in net.iunet.encoder.parameters():
        parameter.requires_grad_(False)
    compare(net, image())
    for parameter in net.iunet.parameters():
        parameter.requires_grad_(False)
    compare(net, image())
    for parameter in net.stem.parameters():
        parameter.requires_grad_(False)
    compare(net, image().detach().requires_grad_(False))


def test_an_input_without_gradient() -> None:
    net = randomize(IUNet(2, (4, 8))).double()
    compare(net, torch.randn(2, 4, 8, 8, dtype=torch.double))


def test_unused_parameters_get_no_gradient() -> None:
    def make_branch(dims: int, in_channels: int, out_channels: int, *_: object) -> nn.Module:
        branch = nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        branch.unused = nn.Parameter(torch.zeros(1))
        return branch

    net = network(make_branch=make_branch)
    compare(net, image())
    assert net.iunet.encoder[0][0].branch.unused.grad is None


def test_gradient_accumulation_and_two_forwards_before_one_backward() -> None:
    net, first, second = network(), image(), image()
    found = []
    for net.activations in ("invert", "store"):
        net.zero_grad()
        first.grad = second.grad = None
        one, two = net(first), net(second)
        (one.square().mean() + two.sin().mean()).backward()
        net(first).mean().backward()
        found.append([first.grad, second.grad, *(parameter.grad for parameter in net.parameters())])
    assert max(relative_errors(*found)) < 1e-10


def test_a_retained_graph_can_be_used_again() -> None:
    net, x = network(), image()
    loss = net(x).square().mean()
    once = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(net.parameters()))
    assert max(relative_errors(again, once)) < 1e-10
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(net.parameters()))


def test_the_caller_s_tensors_stay_as_they_are() -> None:
    net = randomize(IUNet(2, (4, 8)))
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    y = net(x)
    before = x.detach().clone(), y.detach().clone()
    y.square().mean().backward()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    with torch.no_grad():
        net.inverse(y)
    assert torch.equal(y, before[1])


def test_changing_the_output_in_place_is_noticed() -> None:
    net = IUNet(2, (4, 8))
    y = net(torch.randn(1, 4, 8, 8))
    loss = (y * 2).sum()  # does not save y
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(1, 4, 8, 8\), .* Use an operation that is not in place"):
        loss.backward()


def test_changing_a_parameter_before_the_backward_pass_is_noticed() -> None:
    net = IUNet(2, (4, 8))
    loss = net(torch.randn(1, 4, 8, 8)).sum()
    with torch.no_grad():
        net.encoder[0][0].branch[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_on_parameters_fire_once_and_hooks_on_modules_again() -> None:
    net, x = network(), image()
    branch = net.iunet.encoder[0][0].branch
    counts = {"parameter": 0, "module": 0}
    branch[0].weight.register_hook(lambda grad: counts.update(parameter=counts["parameter"] + 1) or 2 * grad)
    branch.register_forward_hook(lambda *_: counts.update(module=counts["module"] + 1))
    compare(net, x)
    assert counts == {"parameter": 2, "module": 3}  # one step each; the module runs twice when rebuilding


def test_each_branch_is_evaluated_twice_a_step_and_each_matrix_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[OrthogonalMatrix] = []
    compute = OrthogonalMatrix._compute
    monkeypatch.setattr(
        OrthogonalMatrix, "_compute", lambda self, *sources: computed.append(self) or compute(self, *sources)
    )
    net, evaluated = network(), []
    branches = [module.branch for module in net.modules() if isinstance(module, AdditiveCoupling)]
    for branch in branches:
        branch.register_forward_hook(lambda module, args, output: evaluated.append(module))
    step(net, image())
    assert sorted(map(id, evaluated)) == sorted(map(id, 2 * branches))
    matrices = [module for module in net.modules() if isinstance(module, OrthogonalMatrix)]
    assert sorted(map(id, computed)) == sorted(map(id, matrices))


def test_float32_after_training_is_as_accurate_as_plain_autograd() -> None:
    net = IUNet(2, (8, 16), couplings=12)  # 12 in each of two levels, in the encoder and in the decoder: 48
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)

    def loss(network: IUNet) -> torch.Tensor:
        x = torch.randn(1, 8, 16, 16, dtype=torch.double).to(next(network.parameters()).dtype)
        return nn.functional.mse_loss(network(x), x.flip(-1))

    for _ in range(60):
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()

    def gradient(dtype: torch.dtype, activations: str, seed: int) -> torch.Tensor:
        copied = copy.deepcopy(net).to(dtype)
        copied.activations = activations
        torch.manual_seed(seed)
        loss(copied).backward()
        return torch.cat([parameter.grad.flatten().double() for parameter in copied.parameters()])

    errors = []
    for seed in range(5):
        exact = gradient(torch.double, "store", seed)
        errors.append([(gradient(torch.float, mode, seed) - exact).norm() for mode in ("invert", "store")])
    # The median, because now and then rounding takes a value over the kink of an activation, in either mode.
    inverted, stored = torch.tensor(errors).median(0).values
    assert inverted < 2 * stored


def test_the_stem_keeps_the_image_and_the_head_what_the_engine_keeps() -> None:
    net = SegIUNet(3, 1, 3, (8, 16, 32), couplings=2)
    x = torch.rand(1, 1, 16, 16, 16)
    with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live:
        logits = net(x)
        alive = live.now()
    matrices = sum(module.weight.numel() for module in net.modules() if isinstance(module, OrthogonalMatrix))
    voxels = x.numel() * 4
    kept = voxels * (1 + 8 + 3)  # image, output of the invertible part, logits
    # Beside these only the orthogonal matrices, with what autograd keeps of the maps that made them.
    assert kept <= alive < kept + 10 * 4 * matrices
    assert 10 * 4 * matrices < 4 * voxels
    logits.sum().backward()


def test_no_grad_and_inference_mode_give_the_same_output() -> None:
    net, x = network(), image()
    expected = net(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(net(x), expected)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    # At this depth, rounding inside the branches leaves the rebuilt gradients close to the stored ones.
    net = randomize(SegIUNet(2, 1, 3, (8, 16), couplings=1), std=0.2)
    x = torch.randn(2, 1, 16, 16, requires_grad=True)
    seen = []
    net.iunet.encoder[0][0].register_forward_hook(lambda module, args, output: seen.append(output[1].dtype))
    found = []
    for net.activations in ("invert", "store"):
        net.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    assert set(seen) == {torch.float32}
    assert max(relative_errors(*found)) < 0.1
    norms = [torch.stack([grad.norm() for grad in grads]) for grads in found]
    assert (norms[0] > 0).equal(norms[1] > 0)


def test_states_may_leave_the_chain() -> None:
    layers = nn.ModuleList(AdditiveCoupling(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Tanh())) for _ in range(3)).double()
    inputs = [torch.randn(1, 2, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    found = []
    for rebuilds in (True, False):
        state, extra = tuple(inputs), 0.0
        for index, layer in enumerate(layers):
            layer.rebuilds = rebuilds
            state = layer(*state)
            extra = extra + (index + 1) * state[1].square().sum()
        found.append(torch.autograd.grad(extra + state[0].sum(), [*inputs, *layers.parameters()]))
    assert max(relative_errors(*found)) < 1e-10


def test_a_layer_of_ones_own_needs_only_a_transform_and_its_inverse() -> None:
    class Rotation(InvertibleLayer):
        def __init__(self) -> None:
            super().__init__()
            self.angle = nn.Parameter(torch.tensor(0.3, dtype=torch.double))

        def transform(self, inputs, weights):
            (angle,), (a, b) = weights, inputs
            return a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()

        def restore(self, outputs, weights):
            return self.transform(outputs, (-weights[0],))

    layer = Rotation()
    inputs = [torch.randn(3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(layer, inputs)
    found = []
    for layer.rebuilds in (True, False):
        found.append(torch.autograd.grad(layer(*inputs)[0].sin().sum(), [*inputs, layer.angle]))
    assert max(relative_errors(*found)) < 1e-12


def test_autocast_that_is_nested_or_disabled_inside_is_repeated() -> None:
    seen: list[torch.dtype] = []

    class Branch(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = self.first(x)
            with torch.autocast("cpu", enabled=False):
                high = self.second(x.float())
            seen.extend([low.dtype, high.dtype])
            return low.float().tanh() + high.tanh()

    net = randomize(IUNet(2, (4, 8), couplings=1, make_branch=lambda dims, width, *_: Branch(width)), std=0.2)
    branches = [module for module in net.modules() if isinstance(module, Branch)]
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        with torch.autocast("cpu", enabled=False):
            y.square().mean().backward()
    assert branches
    assert seen == [torch.bfloat16, torch.float32] * 2 * len(branches)  # forward and repetition
    for branch in branches:
        assert branch.first.weight.grad.norm() > 0


def test_the_gradient_of_a_leaf_input_is_not_doubled() -> None:
    net = randomize(IUNet(2, (4, 8))).double()
    x = torch.randn(1, 4, 8, 8, dtype=torch.double, requires_grad=True)
    found = []
    for net.activations in ("invert", "store"):
        x.grad = None
        net(x).sin().sum().backward()
        found.append(x.grad)
    assert max(relative_errors(*[[grad] for grad in found])) < 1e-10


def test_meta_tensors_keep_their_geometry() -> None:
    from monai.data import MetaTensor

    net = SegIUNet(2, 1, 3, (4, 8))
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    for mode in (net.train, net.eval):
        mode()
        logits = net(MetaTensor(torch.rand(1, 1, 8, 8), affine=affine))
        assert isinstance(logits, MetaTensor)
        torch.testing.assert_close(logits.affine.float(), affine)
    net.train()
    logits = net(MetaTensor(torch.rand(1, 1, 8, 8), affine=affine))
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("taken", [False, True])
def test_a_state_changed_in_place_is_noticed(taken: bool) -> None:
    layers = [AdditiveCoupling(nn.Conv1d(2, 2, 1)) for _ in range(2)]
    first, second = layers[0](torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    second.add_(1)
    outputs = layers[1](first, second) if taken else (first, second)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(output.sum() for output in outputs).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_a_gpu(dtype: torch.dtype) -> None:
    net = randomize(SegIUNet(3, 1, 3, (8, 16), couplings=1), std=0.2).cuda()
    x = torch.randn(2, 1, 16, 16, 16, device="cuda")
    found = []
    for net.activations in ("invert", "store"):
        net.zero_grad()
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with torch.autocast("cuda", dtype=dtype):
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        found.append([parameter.grad for parameter in net.parameters()])
    assert max(relative_errors(*found)) < 0.1


@pytest.mark.gpu
def test_dropout_on_a_gpu_repeats_its_mask() -> None:
    net = network(dropout=0.5).cuda()
    x = image().detach().cuda().requires_grad_()
    compare(net, x)
    states = []
    for net.activations in ("invert", "store"):
        step(net, x)
        states.append(torch.cuda.get_rng_state())
    assert torch.equal(*states)
