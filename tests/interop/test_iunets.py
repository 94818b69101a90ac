"""The class of the released package on our engine: agreement with that package, where it is installed."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from monai_iunet.interop.iunets import iUNet, load_iunets_state_dict
from monai_iunet.interop.iunets_blocks import StandardBlock
from tests.interop.iunets_reference import FILE, NETWORKS, images, original

TUTORIAL = Path(__file__).parents[3] / "shared" / "notes" / "iunets_tutorial_1.rst"

needs_original = pytest.mark.skipif(
    importlib.util.find_spec("iunets") is None or importlib.util.find_spec("memcnn") is None,
    reason="needs iunets and memcnn (pip install --no-deps iunets memcnn)",
)

CASES: dict[str, dict[str, Any]] = {
    "1D": {"in_channels": 3, "architecture": (2, 3), "dim": 1},
    "2D": {"in_channels": 3, "architecture": (2, 1, 2), "dim": 2},
    "3D": {"in_channels": 4, "architecture": (1, 2), "dim": 3},
    "2D, exp": {"in_channels": 4, "architecture": (2, 2), "dim": 2, "resampling_method": "exp"},
    "3D, exp": {"in_channels": 3, "architecture": (1, 1), "dim": 3, "resampling_method": "exp"},
    "mixing by exp": {"in_channels": 4, "architecture": (2, 2), "dim": 2, "channel_mixing_method": "exp"},
    "mixing after each": {"in_channels": 5, "architecture": (2, 2), "dim": 2, "channel_mixing_freq": 1},
    "no mixing": {"in_channels": 5, "architecture": (2, 2), "dim": 2, "channel_mixing_freq": 0},
    "mixing after two": {"in_channels": 5, "architecture": (4, 3), "dim": 2, "channel_mixing_freq": 2},
    "constant": {"in_channels": 6, "architecture": (1, 1, 1), "dim": 2, "slice_mode": "constant"},
    "pixel shuffle": {"in_channels": 6, "architecture": (1, 1), "dim": 2, "resampling_init": "pixel_shuffle"},
    "anisotropic": {"in_channels": 8, "architecture": (1, 2), "dim": 3, "resampling_stride": (2, 1, 3)},
    "a stride per level": {
        "in_channels": 8,
        "architecture": (1, 1, 1),
        "dim": 2,
        "resampling_stride": [(2, 1), 2],
    },
    "deep blocks": {"in_channels": 5, "architecture": (2, 2), "dim": 2, "module_kwargs": {"block_depth": 3}},
    "not learnable": {"in_channels": 4, "architecture": (1, 1), "dim": 2, "learnable_resampling": False},
    "stored": {"in_channels": 4, "architecture": (1, 1), "dim": 2, "disable_custom_gradient": True},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_agree_with_those_on_record(name: str) -> None:
    recorded = torch.load(FILE, weights_only=True)["networks"][name]
    ours = iUNet(**NETWORKS[name]).eval()
    load_iunets_state_dict(ours, recorded["state_dict"])
    with torch.no_grad():
        torch.testing.assert_close(ours(recorded["x"]), recorded["output"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.inverse(recorded["y"]), recorded["inverse"], rtol=1e-3, atol=1e-3)


def tutorial_with_the_import_changed() -> list[str]:
    """The blocks of code of the released package's tutorial, on the CPU, with two epochs where it has 50."""
    if not TUTORIAL.is_file():
        pytest.skip("the tutorial of iunets is not beside the checkout (in ../shared/notes)")
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = re.findall(r"\.\. code:: (?:python|text)\n\n((?:    .*\n|\n)+)", text)
    changes = {
        "from iunets import iUNet": "from monai_iunet.interop.iunets import iUNet",
        "'cuda'": "'cpu'",
        "(50)": "(2)",
    }
    for before, after in changes.items():
        assert any(before in block for block in blocks)
        blocks = [block.replace(before, after) for block in blocks]
    return ["\n".join(line[4:] for line in block.splitlines()).strip() for block in blocks]


def test_its_tutorial_runs_with_the_import_line_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loading, building, layout, training, segmenting = tutorial_with_the_import_changed()
    monkeypatch.setattr("matplotlib.pyplot.plot", lambda curve: None)
    torchvision = types.ModuleType("torchvision")
    pictures = [(torch.rand(3, 32, 32), 0) for _ in range(8)]
    torchvision.datasets = types.SimpleNamespace(CIFAR10=lambda **_: pictures)  # type: ignore[attr-defined]
    torchvision.transforms = types.SimpleNamespace(Compose=list, ToTensor=object)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    names: dict[str, Any] = {}
    for block in (loading, building):
        exec(block, names)
    assert capsys.readouterr().out.strip() == layout
    exec(training, names)
    assert len(names["loss_curve"]) == 2
    assert names["loss_curve"][1] < names["loss_curve"][0]
    exec(segmenting, names)
    assert names["model"](torch.rand(1, 3, 8, 8, 8)).shape == (1, 10, 8, 8, 8)


@needs_original
@pytest.mark.parametrize("name", CASES)
def test_outputs_agree(name: str) -> None:
    arguments = CASES[name]
    theirs, ours = original(**arguments), iUNet(**arguments)
    load_iunets_state_dict(ours, theirs.state_dict())
    assert list(ours.channels) == theirs.channels
    x = images(arguments["dim"], arguments["in_channels"])
    with torch.no_grad():
        y = theirs(x.clone())
        torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.eval()(x), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.inverse(y), theirs.inverse(y.clone()), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.inverse(y), x, rtol=1e-3, atol=1e-3)
        for mine, other in zip(ours.encode(x), theirs.encode(x.clone()), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@needs_original
@pytest.mark.parametrize("padding_mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("revert", [True, False])
def test_outputs_agree_where_the_size_does_not_divide(padding_mode: str, revert: bool) -> None:
    arguments = {"in_channels": 4, "architecture": (1, 1, 1), "dim": 2, "padding_mode": padding_mode}
    arguments["revert_input_padding"] = revert
    theirs, ours = original(**arguments), iUNet(**arguments)
    load_iunets_state_dict(ours, theirs.state_dict())
    x = torch.randn(1, 4, 13, 11)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x.clone()), rtol=1e-4, atol=1e-4)


class Scaling(nn.Module):
    """An invertible layer of one's own."""

    def __init__(self, channels: int, level: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 1.0 + level))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.weight


@needs_original
def test_layers_of_ones_own() -> None:
    seen: list[dict[str, Any]] = []

    def create(in_channels: int, **places: Any) -> nn.Module:
        seen.append({"in_channels": in_channels, **places})
        return Scaling(in_channels, places["level"])

    arguments: dict[str, Any] = {"in_channels": 4, "architecture": (2, 1), "dim": 2, "create_module_fn": create}
    arguments["module_kwargs"] = {"extra": 1}
    theirs = original(**arguments)
    expected, seen[:] = list(seen), []
    ours = iUNet(**arguments)

    def key(place: dict[str, Any]) -> tuple[Any, ...]:
        return place["LR"], place["level"], place["module_index"]

    assert sorted(seen, key=key) == sorted(expected, key=key)
    load_iunets_state_dict(ours, theirs.state_dict())
    x = images(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x.clone()), rtol=1e-4, atol=1e-4)


@needs_original
def test_a_state_of_another_network_changes_nothing() -> None:
    ours = iUNet(4, (1, 1), 2)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for state, message in (
        (original(in_channels=4, architecture=(1, 2), dim=2).state_dict(), "no place for"),
        (original(in_channels=6, architecture=(1, 1), dim=2).state_dict(), "has the shape"),
        ({}, "is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_iunets_state_dict(ours, state)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_it_is_the_identity_at_first_and_learns() -> None:
    net = iUNet(in_channels=3, architecture=(2, 2, 2), dim=2)
    x = images(2, 3)
    torch.testing.assert_close(net(x), x, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), x.flip(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_its_other_methods() -> None:
    net = iUNet(in_channels=(4, 8, 8), architecture=(1, 1), dim=2)
    x = images(2, 4, 8)
    codes = net.encode(x)
    torch.testing.assert_close(net.decode(codes), net(x))
    torch.testing.assert_close(net.decode(*codes), net(x))
    torch.testing.assert_close(net.encoder_inverse(*codes), x, rtol=1e-4, atol=1e-4)
    for found, expected in zip(net.decoder_inverse(net(x)), codes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slice_mode": "triple"}, "slice_mode must be"),
        ({"resampling_method": "givens"}, "resampling_method must be one of exp, cayley, householder"),
        ({"channel_mixing_freq": -2}, "channel_mixing_freq must be -1, 0 or positive"),
        ({"padding_value": 1, "padding_mode": "reflect"}, "padding_value needs padding_mode"),
        ({"resampling_kwargs": {"a": 1}}, "resampling_kwargs must be empty, got a"),
        ({"channel_mixing_kwargs": {"b": 1}}, "channel_mixing_kwargs must be empty, got b"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iUNet(4, (1, 1), 2, **arguments)


def test_householder_works_but_cannot_be_taken_over() -> None:
    net = iUNet(4, (1, 1), 2, resampling_method="householder")
    assert net(images(2, 4)).shape == (2, 4, 12, 12)
    with pytest.raises(ValueError, match="Householder"):
        load_iunets_state_dict(net, {})


# Channels that the head of the repository built for those wanted, by its formula, worked out by hand.
LEVELS = [
    ((3, 8, 16, 32, 40), 2, 2, (3, 8, 16, 32, 40)),  # its tutorial
    ((64, 128, 256, 384), 2, 2, (64, 128, 256, 384)),
    ((4, 10, 30), 2, 2, (4, 8, 28)),  # 2.5 and 7.5 channels are wanted; those that skip are rounded to even
    ((2, 100), 2, 2, (2, 4)),  # one channel skips at least
    ((8, 20), 3, [(1, 2, 2)], (8, 20)),
]


@pytest.mark.parametrize(("wanted", "dim", "stride", "built"), LEVELS)
@pytest.mark.filterwarnings("ignore:channels=")
def test_channels_per_level_are_those_of_the_head(wanted: Any, dim: int, stride: Any, built: Any) -> None:
    net = iUNet(wanted, (1,) * len(wanted), dim, resampling_stride=stride)
    assert net.channels == built
    # As it says it: the share of the channels that skip, rounded.
    for total, next_wanted, skipped, values in zip(built, wanted[1:], net.skipped_channels, net.channel_multipliers):
        assert abs(skipped - max(1, total - next_wanted / values)) <= 0.5


def test_channels_that_cannot_be_reached_are_told() -> None:
    with pytest.warns(UserWarning, match=r"channels=\(4, 10\) cannot be reached .* nearest: \(4, 8\)"):
        iUNet(channels=(4, 10), architecture=(1, 1), dim=2)


# As its tutorial shows it.
LAYOUT = """
3-3-(1/2)--------------------------------------------------------(1/2)-3-3
------8-8-(4/4)-------------------------------------------(4/4)-8-8-------
-------------16-16-(8/8)--------------------------(8/8)-16-16-------------
---------------------32-32-(22/10)-----(22/10)-32-32----------------------
-------------------------------40-40--40-40-------------------------------
"""


def test_the_layout_of_the_head_s_tutorial(capsys: pytest.CaptureFixture[str]) -> None:
    iUNet(channels=(3, 8, 16, 32, 40), dim=2, architecture=(2, 2, 2, 2, 2)).print_layout()
    assert capsys.readouterr().out.strip() == LAYOUT.strip()


def test_blocks_of_the_head_and_the_places_of_layers() -> None:
    net = iUNet(channels=(4, 8), architecture=(2, 1), dim=2)
    block = net.encoder[0][0].branch
    kinds = ["Conv2d", "InstanceNorm2d", "LeakyReLU"] * 2
    assert [type(layer).__name__ for layer in block] == kinds
    x = images(2, 4, 8)
    assert not torch.allclose(net(x), x, atol=0.1)  # it is not the identity at first
    torch.testing.assert_close(net.inverse(net(x)), x, rtol=1e-4, atol=1e-4)
    same = iUNet(channels=(4, 8), architecture=(2, 1), dim=2, module_kwargs={"zero_init": True})
    torch.testing.assert_close(same(x), x, rtol=1e-4, atol=1e-4)
    places: list[dict[str, Any]] = []

    def create(in_channels: int, **place: Any) -> nn.Module:
        places.append({"in_channels": in_channels, **place})
        return Scaling(in_channels, place["level"])

    iUNet(channels=(4, 8), architecture=(1, 1), dim=2, create_module_fn=create)
    common = {"dim": 2, "module_index": 0, "architecture": (1, 1)}
    expected = [
        {"in_channels": 4 + 4 * level, "level": level, "branch": branch, **common}
        for level in (0, 1)
        for branch in ("encoder", "decoder")
    ]
    assert places == expected


@pytest.mark.parametrize("normalization", ["instance", "batch", None])
def test_gradients_and_checkpoints_of_the_head_s_blocks(normalization: str | None) -> None:
    """Names of its checkpoints are those of the release, each weight of a block listed twice, as `seq` and as `F`."""
    options: dict[str, Any] = {"channels": (4, 8), "architecture": (2, 1), "dim": 2}
    options["module_kwargs"] = {"normalization": normalization, "depth": 2}
    gradients, means = [], []
    for disabled in (False, True):
        torch.manual_seed(0)
        net = iUNet(**options, disable_custom_gradient=disabled).double()
        net(images(2, 4, 8).double()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        means.append([b for name, b in net.named_buffers() if "running_mean" in name or "num_batches" in name])
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(*means)
    state = {}
    for stage, levels in (("encoder_modules", net.encoder), ("decoder_modules", net.decoder)):
        for level, layers in enumerate(levels):
            for index, layer in enumerate(layers):
                prefix = f"{stage}.{level}.{index}._fn."
                if hasattr(layer, "matrix"):
                    state[f"{prefix}weight"] = torch.randn_like(layer.matrix.weight)
                    continue
                for name, tensor in layer.branch.state_dict().items():
                    state |= {f"{prefix}F.{copy}.{name}": tensor + 1 for copy in ("seq", "F")}
    for name, resamplings in (("downsampling_layers", net.downsamplings), ("upsampling_layers", net.upsamplings)):
        state |= {f"{name}.{i}._fn.weight": torch.randn_like(one.matrix.weight) for i, one in enumerate(resamplings)}
    target = iUNet(**options).double()
    load_iunets_state_dict(target, state)
    for name, tensor in target.encoder[0][0].branch.state_dict().items():
        torch.testing.assert_close(tensor, state[f"encoder_modules.0.0._fn.F.F.{name}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": (4, 8, 16)}, "channels must be one per level, 2 as in architecture"),
        ({"channels": (4, 8), "slice_mode": "double"}, "slice_mode goes with in_channels"),
        ({"channels": (4, 8), "in_channels": 4}, "either channels, per level, or in_channels"),
        ({}, "either channels, per level, or in_channels"),
        ({"channels": (4, 1)}, "no channels would be left at a level"),
        ({"channels": (4, 8), "architecture": ()}, "architecture"),
        ({"channels": (4, 8), "module_kwargs": {"normalization": "group"}}, "normalization must be instance, batch or"),
    ],
)
def test_bad_arguments_with_channels_per_level(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iUNet(**{"architecture": (1, 1), "dim": 2, **arguments})


def test_what_the_head_would_leave_unread_is_refused() -> None:
    with pytest.raises(TypeError, match="block_depth"):
        iUNet(channels=(4, 8), architecture=(1, 1), dim=2, module_kwargs={"block_depth": 3})
    with pytest.raises(TypeError, match="base_filters"):
        iUNet(channels=(4, 8), architecture=(1, 1), dim=2, base_filters=3)  # type: ignore[call-arg]


def test_the_block_has_its_depth() -> None:
    block = StandardBlock(3, 2, 3, block_depth=2)
    assert [tuple(layer.weight.shape[:2]) for layer in block if isinstance(layer, nn.Conv3d)] == [(3, 2), (3, 3)]


ATTRIBUTES = (
    *("architecture", "dim", "num_levels", "module_kwargs", "channels_before_downsampling", "skipped_channels"),
    *("padding_mode", "padding_value", "revert_input_padding", "resampling_stride", "channel_multipliers"),
    *("resampling_method", "resampling_init", "resampling_kwargs", "downsampling_factors", "channel_mixing_freq"),
    *(
        "learnable_channel_mixing",
        "channel_mixing_method",
        "channel_mixing_kwargs",
        "disable_custom_gradient",
    ),
)


@needs_original
@pytest.mark.parametrize("name", CASES)
def test_attributes_are_the_same(name: str) -> None:
    theirs, ours = original(**CASES[name]), iUNet(**CASES[name])
    for attribute in ATTRIBUTES:
        value, expected = getattr(ours, attribute), getattr(theirs, attribute)
        assert (list(value) if isinstance(value, tuple) else value) == (
            list(expected) if isinstance(expected, tuple) else expected
        ), attribute


@needs_original
@pytest.mark.parametrize("shape", [(13,), (13, 11), (9, 8, 7)])
@pytest.mark.parametrize("value", [0, 1.5])
def test_padding_is_the_same(shape: tuple[int, ...], value: float) -> None:
    arguments = {"in_channels": 4, "architecture": (1, 1, 1), "dim": len(shape), "padding_value": value, "verbose": 0}
    theirs, ours = original(**arguments), iUNet(**arguments)
    load_iunets_state_dict(ours, theirs.state_dict())
    x = torch.randn(1, 4, *shape)
    assert ours.get_padding(x) == theirs.get_padding(x)
    torch.testing.assert_close(ours.pad(x), theirs.pad(x))
    padding = ours.get_padding(x)[1]
    torch.testing.assert_close(ours.revert_padding(ours.pad(x), padding), x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x.clone()), rtol=1e-4, atol=1e-4)
        for mine, other in zip(
            ours.encode(x, use_padding=True), theirs.encode(x.clone(), use_padding=True), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"encode: the spatial size must be divisible .*use_padding=True"):
        ours.encode(x)


def test_depth_is_another_name_of_block_depth() -> None:
    deep, same = (iUNet(4, (1, 1), 2, module_kwargs={name: 3}) for name in ("depth", "block_depth"))
    assert [tensor.shape for tensor in deep.state_dict().values()] == [
        tensor.shape for tensor in same.state_dict().values()
    ]
