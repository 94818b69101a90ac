from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_iunet import IUNet, SegIUNet
from monai_iunet.planning.live_bytes import LiveBytes
from tests.helpers import randomize, relative_errors

SMALL = {1: ((5, 6, 8), 12), 2: ((4, 8, 16), 8), 3: ((4, 16, 32), 8)}
LAYOUT = """\
3-3-3-3-(1/2)----------------------------------------------------------------------------------------------------(1/2)-3-3-3-3
----------8-8-8-8-(4/4)-------------------------------------------------------------------------------(4/4)-8-8-8-8-----------
---------------------16-16-16-16-(8/8)--------------------------------------------------(8/8)-16-16-16-16---------------------
-----------------------------------32-32-32-32-(16/16)-----------------(16/16)-32-32-32-32------------------------------------
---------------------------------------------------64-64-64-64--64-64-64-64---------------------------------------------------"""


def small(dims: int, **kwargs: object) -> tuple[IUNet, torch.Tensor]:
    """A network with random parameters in float64 and an input for it."""
    channels, extent = SMALL[dims]
    net = randomize(IUNet(dims, channels, **kwargs)).double()
    return net, torch.randn(2, channels[0], *[extent] * dims, dtype=torch.double, requires_grad=True)


def gradients(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    y = net(x)
    loss = (y * torch.randn_like(y)).sum() + y.square().mean()
    return torch.autograd.grad(loss, [x, *(parameter for parameter in net.parameters() if parameter.requires_grad)])


@pytest.mark.parametrize("name", ["cayley", "matrix_exp", "householder"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_invert_gives_the_gradients_of_store(dims: int, name: str) -> None:
    net, x = small(dims, orthogonal_map=name, couplings=(3, 2, 1))
    inverted = gradients(net, x)
    net.activations = "store"
    assert max(relative_errors(inverted, gradients(net, x))) < 1e-10


@pytest.mark.parametrize("name", ["cayley", "matrix_exp", "householder"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradients_agree_with_finite_differences(dims: int, name: str) -> None:
    # A smooth activation: a difference across a kink is no derivative.
    net = randomize(IUNet(dims, (3, 2 ** (dims + 1)), orthogonal_map=name, act="GELU")).double()
    x = torch.randn(2, 3, *[4] * dims, dtype=torch.double, requires_grad=True)
    values = {"x": x, **dict(net.named_parameters())}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        parameters = {name: value for name, value in values.items() if name != "x"}
        return torch.func.functional_call(net, parameters, (values["x"],)).sin().sum()

    found = dict(zip(values, torch.autograd.grad(net(x).sin().sum(), list(values.values())), strict=True))
    groups = {
        "input": ["x"],
        "resampling": [name for name in values if "sampling" in name],
        "mixing": [name for name in values if "splits" in name or "merges" in name],
        "branches": [name for name in values if "branch" in name],
    }
    assert sum(map(len, groups.values())) == len(values)
    step = 1e-6
    for group, names in groups.items():
        for _ in range(3):
            direction = {name: torch.randn_like(values[name]) for name in names}
            with torch.no_grad():
                ahead, behind = (
                    loss({**values, **{name: values[name] + sign * direction[name] for name in names}})
                    for sign in (step, -step)
                )
            slope = (ahead - behind).item() / (2 * step)
            expected = sum((found[name] * direction[name]).sum().item() for name in names)
            scale = sum(found[name].norm().item() for name in names)
            assert abs(slope - expected) < 1e-6 * max(scale, 1), group


def test_memory_after_the_forward_pass_does_not_grow_with_depth() -> None:
    alive = {}
    for mode, couplings in itertools.product(("invert", "store"), (2, 8)):
        net = IUNet(3, (8, 16, 32), couplings=couplings, activations=mode)
        x = torch.rand(1, 8, 16, 16, 16)
        with LiveBytes(ignore=[*net.parameters(), *net.buffers()]) as live:
            y = net(x)
            alive[mode, couplings] = live.now()
        assert y.requires_grad
    assert alive["invert", 2] == alive["invert", 8]
    assert alive["store", 8] > 2 * alive["invert", 8]


def test_peak_of_a_training_step_does_not_grow_with_depth() -> None:
    peaks = []
    for couplings in (2, 8):
        net = IUNet(3, (8, 16, 32), couplings=couplings)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        held = [*net.parameters(), *net.buffers(), *(parameter.grad for parameter in net.parameters())]
        x = torch.rand(1, 8, 16, 16, 16)
        with LiveBytes(ignore=held) as live:
            net(x).square().mean().backward()
        peaks.append(live.peak)
    # Gradients of all parameters are not alive at once, but bookkeeping per parameter differs by some kilobytes.
    assert peaks[1] < 1.02 * peaks[0]


def test_layout_to_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    net = IUNet(spatial_dims=2, channels=(3, 8, 16, 32, 64), couplings=4)
    assert net.layout() == LAYOUT
    net.print_layout()
    assert capsys.readouterr().out == LAYOUT + "\n"


CONFIGURATIONS = {
    "one level": {"channels": (5,)},
    "odd channels and couplings": {"channels": (5, 8, 20), "couplings": (1, 3, 2)},
    "anisotropic strides": {"channels": (6, 8, 12), "strides": [(1, 2), (2, 1)]},
    "stride 4": {"channels": (4, 16), "strides": 4},
    "stride 3": {"channels": (4, 9), "strides": 3, "resampling_init": "random"},
    "pixel shuffle, fixed": {"resampling_init": "pixel_shuffle", "learnable_resampling": False},
    "no mixing": {"channel_mixing": None, "channels": (5, 8, 16), "couplings": 3},
    "mixing after each": {"channel_mixing": 1},
    "mixing after every second": {"channel_mixing": 2, "couplings": 5},
    "several convolutions": {"convs_per_coupling": 3},
    "anisotropic kernel": {"kernel_size": (1, 3)},
    "no norm, no act": {"norm": None, "act": None},
    "group norm": {"norm": ("GROUP", {"num_groups": 2}), "channels": (8, 16, 32)},
    "PReLU": {"act": ("PRELU", {"init": 0.2})},
    "residual": {"branch": "residual"},
    "residual, odd channels, two blocks": {"branch": "residual", "channels": (5, 8, 20), "convs_per_coupling": 2},
    "mednext": {"branch": "mednext", "kernel_size": 5},
    "mednext, odd channels": {"branch": ["mednext", {"expansion": 2}], "channels": (5, 8, 20), "kernel_size": (1, 3)},
    "mednext, no norm, two blocks": {"branch": "mednext", "norm": None, "convs_per_coupling": 2},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_invert_and_have_the_right_gradients(name: str) -> None:
    arguments = {"channels": (4, 8, 16), **CONFIGURATIONS[name]}
    net = randomize(IUNet(2, **arguments)).double()
    x = torch.randn(2, net.channels[0], 16, 16 if name != "stride 3" else 18, dtype=torch.double, requires_grad=True)
    x = x if name != "stride 3" else torch.randn(2, 4, 9, 18, dtype=torch.double, requires_grad=True)
    y = net(x)
    assert y.shape == x.shape
    torch.testing.assert_close(net.inverse(y), x)
    inverted = gradients(net, x)
    net.activations = "store"
    assert max(relative_errors(inverted, gradients(net, x))) < 1e-10


@pytest.mark.parametrize("channels", [(4, 8, 16), (5, 8, 20), (5,)])
def test_codes_and_their_inverses(channels: tuple[int, ...]) -> None:
    net = randomize(IUNet(2, channels, couplings=3)).double()
    x = torch.randn(2, channels[0], 8, 8, dtype=torch.double)
    codes = net.encode(x)
    assert isinstance(codes, tuple)
    assert sum(code.numel() for code in codes) == x.numel()
    torch.testing.assert_close(net.decode(codes), net(x))
    torch.testing.assert_close(net.encode_inverse(codes), x)
    for code, back in zip(codes, net.decode_inverse(net(x)), strict=True):
        torch.testing.assert_close(back, code)


@pytest.mark.parametrize("name", ["encode", "decode", "encode_inverse", "decode_inverse", "inverse"])
def test_every_direction_is_differentiated_by_the_engine(name: str) -> None:
    net = randomize(IUNet(2, (5, 8, 20), couplings=3)).double()
    x = torch.randn(2, 5, 8, 8, dtype=torch.double, requires_grad=True)
    takes_codes = name in ("decode", "encode_inverse")
    inputs = [code.detach().requires_grad_() for code in net.encode(x)] if takes_codes else [x]
    found = []
    for net.activations in ("invert", "store"):
        outputs = getattr(net, name)(tuple(inputs) if takes_codes else x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((index + 1) * output.square().sum() for index, output in enumerate(outputs))
        wanted = [*inputs, *net.parameters()]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        found.append([torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(wanted, grads)])
    assert max(relative_errors(*found)) < 1e-10


@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradient_of_some_codes_only(index: int) -> None:
    net = randomize(IUNet(2, (5, 8, 20), couplings=3)).double()
    x = torch.randn(2, 5, 8, 8, dtype=torch.double, requires_grad=True)
    found = []
    for net.activations in ("invert", "store"):
        grads = torch.autograd.grad(net.encode(x)[index].square().sum(), [x, *net.parameters()], allow_unused=True)
        found.append([torch.zeros(1).double() if grad is None else grad for grad in grads])
    assert max(relative_errors(*found)) < 1e-10


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_sizes_that_do_not_divide(mode: str) -> None:
    net = randomize(IUNet(3, (4, 8), couplings=2, strides=[(2, 1, 4)], padding_mode=mode)).double()
    x = torch.randn(1, 4, 7, 5, 9, dtype=torch.double, requires_grad=True)
    assert net(x).shape == x.shape
    y = net(x, crop=False)
    assert y.shape == (1, 4, 8, 5, 12)
    torch.testing.assert_close(net.inverse(y, spatial_size=x.shape[2:]), x)
    assert net.inverse(y).shape == y.shape
    with pytest.raises(ValueError, match=r"divisible by \(2, 1, 4\), got \(7, 5, 9\)"):
        net.inverse(net(x))
    with pytest.raises(ValueError, match="is padded to"):
        net.inverse(y, spatial_size=(3, 5, 9))
    inverted = gradients(net, x)
    net.activations = "store"
    assert max(relative_errors(inverted, gradients(net, x))) < 1e-10


def test_no_padding_refuses_and_names_the_factors() -> None:
    net = IUNet(2, (4, 8), padding_mode=None)
    with pytest.raises(ValueError, match=r"divisible by \[2, 2\], got \[7, 8\]"):
        net(torch.zeros(1, 4, 7, 8))
    assert net(torch.zeros(1, 4, 6, 8)).shape == (1, 4, 6, 8)


def test_sizes_of_successive_calls_are_independent() -> None:
    net = IUNet(2, (4, 8))
    first, second = torch.rand(1, 4, 7, 9), torch.rand(1, 4, 12, 10)
    y = net(first, crop=False)
    net(second)
    torch.testing.assert_close(net.inverse(y, spatial_size=(7, 9)), first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("channels", "strides", "built"),
    [
        ((32, 64, 128), 2, (32, 64, 128)),
        ((24, 60, 130), 2, (24, 56, 128)),  # 60 lies between 56 and 64: the smaller
        ((4, 100), 2, (4, 24)),  # at most 8 * 3
        ((4, 1), 2, (4, 8)),  # at least 8 * 1
        ((6, 6, 6), [(1, 1, 1), 2], (6, 5, 8)),
    ],
)
def test_nearest_reachable_channels(channels: tuple, strides: object, built: tuple) -> None:
    if built == channels:
        assert IUNet(3, channels, strides).channels == built
        return
    with pytest.warns(UserWarning, match="cannot be reached") as record:
        net = IUNet(3, channels, strides)
    assert net.channels == built
    assert str(built) in str(record[0].message)
    assert record[0].filename == __file__


class Negation(nn.Module):
    """An invertible layer of a user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x

    inverse = forward


def test_branches_and_layers_of_ones_own() -> None:
    calls = []

    def make_branch(dims: int, in_channels: int, out_channels: int, stage: str, level: int, index: int) -> nn.Module:
        calls.append((dims, in_channels, out_channels, stage, level, index))
        return Negation() if index == 1 else nn.Conv1d(in_channels, out_channels, 1)

    net = randomize(IUNet(1, (5, 4), couplings=2, make_branch=make_branch)).double()
    assert calls == [
        (1, 3, 2, "encoder", 0, 0),
        (1, 2, 3, "encoder", 0, 1),
        (1, 3, 2, "decoder", 0, 0),
        (1, 2, 3, "decoder", 0, 1),
        (1, 2, 2, "encoder", 1, 0),
        (1, 2, 2, "encoder", 1, 1),
        (1, 2, 2, "decoder", 1, 0),
        (1, 2, 2, "decoder", 1, 1),
    ]
    x = torch.randn(2, 5, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(net.inverse(net(x)), x)
    inverted = gradients(net, x)
    net.activations = "store"
    assert max(relative_errors(inverted, gradients(net, x))) < 1e-10


@pytest.mark.parametrize(
    "arguments",
    [{"channel_mixing": 1}, {"kernel_size": 5}, {"convs_per_coupling": 2}, {"strides": 4}, {"expansion": 2}],
)
def test_numbers_of_numpy_are_taken_as_others_are(arguments: dict[str, int]) -> None:
    def shapes(kind: Any) -> dict[str, Any]:
        options: dict[str, Any] = {name: kind(number) for name, number in arguments.items()}
        if "expansion" in options:
            options = {"branch": ("mednext", options)}
        return {name: tensor.shape for name, tensor in IUNet(1, (4, 4), **options).state_dict().items()}

    assert shapes(np.int64) == shapes(int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 1, 2 or 3"),
        ({"channels": ()}, "channels must be positive"),
        ({"channels": (1, 4)}, "at least 2"),
        ({"channels": (4, -8)}, "channels must be positive"),
        ({"channels": (2, 4), "strides": 1}, "fewer than 2"),
        ({"channels": (4, 8.0)}, "channels must be positive"),
        ({"strides": 0}, "strides must be"),
        ({"strides": [2, 2]}, "strides must be an int or 1 entries"),
        ({"strides": [(2, 2, 2)]}, "strides must be"),
        ({"channels": (4, 9), "strides": 3}, "needs strides of 1, 2 or 4"),
        ({"couplings": 0}, "couplings must be"),
        ({"couplings": (1, 2, 3)}, "couplings must be a positive int or 2"),
        ({"convs_per_coupling": 0}, "convs_per_coupling must be"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"dropout": True}, "dropout must be a rate"),
        ({"channel_mixing": "always"}, "channel_mixing must be"),
        ({"channel_mixing": 0}, "channel_mixing must be"),
        ({"orthogonal_map": "givens"}, "orthogonal_map must be one of"),
        ({"resampling_init": "db4"}, "resampling_init must be"),
        ({"padding_mode": "mirror"}, "padding_mode must be"),
        ({"activations": "forget"}, "activations must be"),
        ({"strides": 2.5}, "strides must be"),
        ({"couplings": 1.5}, "couplings must be"),
        ({"make_branch": 3}, "make_branch must make"),
        ({"learnable_resampling": "False"}, "learnable_resampling must be True or False"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IUNet(**{"spatial_dims": 2, "channels": (4, 8), **arguments})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 8, 8), r"shape \(batch, 4, size, size\), got \(1, 3, 8, 8\)"),
        (torch.zeros(1, 4, 8), "got \\(1, 4, 8\\)"),
        (torch.zeros(1, 4, 8, 1), "at least \\(2, 2\\) voxels"),
        (torch.zeros(0, 4, 8, 8), "at least one image"),
        (torch.zeros(1, 4, 8, 8, dtype=torch.int16), "must be floating point, got torch.int16"),
        ([[1.0]], "got list"),
    ],
)
def test_bad_inputs(x: object, message: str) -> None:
    net = IUNet(2, (4, 8))
    for method in (net, net.inverse, net.encode, net.decode_inverse):
        with pytest.raises(ValueError, match=message):
            method(x)


@pytest.mark.parametrize("count", [0, 2])
def test_a_list_of_several_images_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"got a list of {count}"):
        IUNet(2, (4, 8))([torch.zeros(1, 4, 8, 8) for _ in range(count)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 1.5}, "must be positive, got 1.5 and 2"),
        ({"out_channels": 0}, "must be positive, got 1 and 0"),
        ({"deep_supervision": "false"}, "deep_supervision must be True or False, got 'false'"),
    ],
)
def test_bad_arguments_of_the_segmentation_network(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegIUNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": (4, 8), **arguments})


def test_bad_codes() -> None:
    net = IUNet(2, (4, 8))
    skip, deepest = net.encode(torch.rand(1, 4, 8, 8))
    for codes in ((skip,), (deepest, skip), (skip[..., :4], deepest)):
        for method in (net.decode, net.encode_inverse):
            with pytest.raises(ValueError, match="code"):
                method(codes)


def test_copies_pickles_and_state_dicts() -> None:
    net = randomize(SegIUNet(2, 1, 3, (4, 8), couplings=1))
    x = torch.rand(1, 1, 8, 8)
    restored = SegIUNet(2, 1, 3, (4, 8), couplings=1)
    restored.load_state_dict(net.state_dict())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), restored):
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=0)
        assert other.activations == "invert"


def test_seg_iunet_checks_its_input() -> None:
    net = SegIUNet(3, 2, 4, (4, 16))
    assert net(torch.rand(1, 2, 6, 8, 5)).shape == (1, 4, 6, 8, 5)
    with pytest.raises(ValueError, match=r"\(batch, 2, size, size, size\), got \(1, 1, 8, 8, 8\)"):
        net(torch.rand(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="floating point"):
        net(torch.ones(1, 2, 8, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be positive"):
        SegIUNet(3, 0, 4, (4, 16))


def test_a_stem_and_a_head_of_ones_own() -> None:
    """Of the usual kinds, which do not say how many channels they take or give."""
    net, x = SegIUNet(2, 1, 2, (4, 8), couplings=1).eval(), torch.rand(1, 3, 8, 8)
    net.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())  # type: ignore[assignment]
    net.head = nn.Identity()  # type: ignore[assignment] # for its features
    torch.testing.assert_close(net(x), net.iunet(net.stem(x)))
    with pytest.raises(ValueError, match=r"must be a tensor of shape \(batch, channels, size, size\), got \(3, 8, 8\)"):
        net(x[0])
    with pytest.raises(RuntimeError, match="Set the attribute in_channels of the stem"):
        torch.jit.script(net)
    net.stem.in_channels = 3  # type: ignore[assignment]
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))


@pytest.mark.parametrize("channels", [(4,), (4, 16), (4, 16, 32, 64)])
def test_deep_supervision(channels: tuple[int, ...]) -> None:
    net = randomize(SegIUNet(3, 1, 3, channels, couplings=2, deep_supervision=True)).double()
    x = torch.randn(1, 1, 8, 16, 8, dtype=torch.double, requires_grad=True)
    logits = net(x)
    assert [tuple(level.shape) for level in logits] == [
        (1, 3, 8 >> level, 16 >> level, 8 >> level) for level in range(max(len(channels) - 1, 1))
    ]
    found = []
    for net.activations in ("invert", "store"):
        loss = sum((level + 1) * logits.square().mean() for level, logits in enumerate(net(x)))
        found.append(torch.autograd.grad(loss, [x, *net.parameters()]))
    assert max(relative_errors(*found)) < 1e-10
    torch.testing.assert_close(net.eval()(x), logits[0])


@pytest.mark.gpu
def test_gradients_on_a_gpu() -> None:
    net, x = small(3, couplings=3)
    net.cuda()
    x = x.detach().cuda().requires_grad_()
    inverted = gradients(net, x)
    net.activations = "store"
    assert max(relative_errors(inverted, gradients(net, x))) < 1e-10


def test_the_segmentation_network_takes_the_arguments_of_the_invertible_one() -> None:
    ours = inspect.signature(IUNet).parameters
    theirs = inspect.signature(SegIUNet).parameters
    # `deep_supervision` is its own.
    assert [theirs[name] for name in ours] == list(ours.values())
    assert set(theirs) - set(ours) == {"in_channels", "out_channels", "deep_supervision"}


def test_a_meta_tensor_is_taken_as_a_tensor_is() -> None:
    # MONAI's trainers hand their images over as such.
    net = SegIUNet(2, 1, 2, (4, 8), couplings=1)
    image = torch.rand(1, 1, 9, 8)
    torch.testing.assert_close(net(MetaTensor(image)).as_tensor(), net(image))


def test_branches_are_what_their_names_say() -> None:
    net = IUNet(3, (8, 16), couplings=1, kernel_size=5, branch=("mednext", {"expansion": 3}))
    depthwise, norm, expand, act, contract = net.encoder[0][0].branch
    assert (depthwise.groups, depthwise.kernel_size, depthwise.bias) == (4, (5, 5, 5), None)
    assert (expand.weight.shape[0], contract.weight.shape[0]) == (12, 4)
    assert (type(norm).__name__, type(act).__name__) == ("InstanceNorm3d", "GELU")
    (block,) = IUNet(3, (8, 16), couplings=1, branch="residual").encoder[0][0].branch
    assert type(block).__name__ == "UnetResBlock"
    plain = IUNet(2, (4, 8), couplings=1, branch="residual", norm=None, act=None)
    assert plain(torch.rand(1, 4, 8, 8)).shape == (1, 4, 8, 8)
    # Rebuilt to the last bit where that is asked for.
    for branch in ("residual", "mednext"):
        exact = randomize(IUNet(2, (4, 8), branch=branch, exact=True))
        x = torch.rand(1, 4, 8, 8, requires_grad=True)
        rebuilt = gradients(exact, x)
        exact.activations = "store"
        assert all(torch.equal(first, second) for first, second in zip(rebuilt, gradients(exact, x)))


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        ("transformer", "must be one of conv, residual, mednext"),
        (("conv", {"expansion": 2}), 'only "mednext" has an option'),
        (("mednext", {"ratio": 2}), 'only "mednext" has an option'),
        (("mednext", {"expansion": 0}), "positive int"),
    ],
)
def test_what_names_no_branch_is_refused(branch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IUNet(2, (4, 8), branch=branch)
