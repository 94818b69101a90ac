"""What is compared: each function measures one comparison and returns its rows, ready for a table and for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn
from torch.nn import functional

from monai_iunet.benchmark.measure import (
    Spread,
    forward_macs,
    peak_of_inference,
    peak_of_training,
    peak_with_optimizer,
    ratio,
    time_alternately,
)
from monai_iunet.benchmark.peers import CONTESTANTS, MakeNetwork
from monai_iunet.losses.chunked_dice_ce import ChunkedDiceCELoss
from monai_iunet.networks.blocks.resampling import OrthogonalDownsampling
from monai_iunet.networks.nets.iunet import IUNet
from monai_iunet.networks.nets.seg_iunet import SegIUNet
from monai_iunet.planning.budget import best_activations
from monai_iunet.planning.live_bytes import LiveBytes
from monai_iunet.planning.plan import plan_training

__all__ = [
    "AUTO_UNITS",
    "EQUAL_COST",
    "choices",
    "depth",
    "largest_cubes",
    "losses",
    "per_voxel",
    "plans",
    "resampling",
    "whole_volume",
]

Row = dict[str, Any]
AUTO_UNITS = 20
CLASSES = (3, 8, 118)


def depth(
    names: Sequence[str], couplings: int, rounds: int, device: torch.device, channels: Sequence[int], size: int
) -> list[Row]:
    """Memory and time of one training step of 3D networks with that many couplings per level.

    The step is `z = x * 1; y = net(z); y.square().mean().backward()`. Memory is in units of the bytes of `x`; the loss
    alone, around a network that does nothing, takes 7. "auto" may take `AUTO_UNITS`.
    """
    x = torch.randn(1, channels[0], *[size] * 3, device=device, requires_grad=True)
    unit = x.numel() * x.element_size()
    makers: dict[str, MakeNetwork] = {name: CONTESTANTS[name] for name in names}
    nets: dict[str, nn.Module] = {name: make(channels, couplings).to(device) for name, make in makers.items()}
    for net in nets.values():
        if isinstance(net, IUNet) and net.activations == "auto":
            parameters = sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())
            net.memory_budget = AUTO_UNITS * unit + parameters  # which are there anyway; gradients are not yet

    def step(net: nn.Module) -> None:
        z = x * 1
        y = net(z)
        y.square().mean().backward()

    def infer(net: nn.Module) -> None:
        with torch.no_grad():
            z = x * 1
            y = net(z)  # noqa: F841 - the caller holds on to the result

    training = time_alternately({name: _bind(step, net) for name, net in nets.items()}, rounds, device)
    inference = time_alternately({name: _bind(infer, net) for name, net in nets.items()}, rounds, device)
    rows = []
    for name, net in nets.items():
        row = {
            "network": name,
            "couplings": couplings,
            "training_memory": peak_of_training(net, _bind(step, net)) / unit,
            "inference_memory": peak_of_inference(net, _bind(infer, net)) / unit,
            "training_seconds": Spread.of(training[name]),
            "inference_seconds": Spread.of(inference[name]),
        }
        if "ours, store" in nets:
            row["training_over_store"] = ratio(training[name], training["ours, store"])
            row["inference_over_store"] = ratio(inference[name], inference["ours, store"])
        if "iunets" in nets:
            row["training_over_iunets"] = ratio(training[name], training["iunets"])
        rows.append(row)
    return rows


def _checkpoint_unet(*args: Any, **kwargs: Any) -> nn.Module:
    from monai.networks.nets.unet import CheckpointUNet  # MONAI 1.6 and newer

    return CheckpointUNet(*args, **kwargs)


# Segmentation networks of about the cost of the nnU-Net's default, per voxel and forward pass.
EQUAL_COST: dict[str, Callable[[], nn.Module]] = {
    "SegIUNet": lambda: SegIUNet(3, 1, 2, (24, 112, 416, 512), couplings=3),
    "DynUNet": lambda: DynUNet(3, 1, 2, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=(32, 64, 128, 256, 320)),
    "SegResNet": lambda: SegResNet(3, 28, 1, 2, norm=("GROUP", {"num_groups": 4})),
    "UNet": lambda: UNet(3, 1, 2, (100, 200, 400, 800), (2, 2, 2), num_res_units=2),
    "CheckpointUNet": lambda: _checkpoint_unet(3, 1, 2, (100, 200, 400, 800), (2, 2, 2), num_res_units=2),
}


def _equal_cost(networks: dict[str, Callable[[], nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    for name, make in networks.items():
        try:
            yield name, make()
        except ImportError:  # an older MONAI
            continue


def per_voxel(networks: dict[str, Callable[[], nn.Module]], size: int, rounds: int, device: torch.device) -> list[Row]:
    """Memory and time per voxel of one training step and of inference, on a cube of `size`, batch 1, float32."""
    x = torch.rand(1, 1, *[size] * 3, device=device)
    nets = {name: net.to(device) for name, net in _equal_cost(networks)}

    def step(net: nn.Module) -> None:
        net(x).square().mean().backward()

    def infer(net: nn.Module) -> None:
        with torch.no_grad():
            net(x)

    training = time_alternately({name: _bind(step, net) for name, net in nets.items()}, rounds, device)
    inference = time_alternately({name: _bind(infer, net) for name, net in nets.items()}, rounds, device)
    voxels = size**3
    return [
        {
            "network": name,
            "kmac_per_voxel": forward_macs(net, x) / voxels / 1e3,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "training_bytes_per_voxel": peak_of_training(net, _bind(step, net)) / voxels,
            "inference_bytes_per_voxel": peak_of_inference(net, _bind(infer, net)) / voxels,
            "training_microseconds_per_voxel": Spread.of(1e6 * time / voxels for time in training[name]),
            "inference_microseconds_per_voxel": Spread.of(1e6 * time / voxels for time in inference[name]),
        }
        for name, net in nets.items()
    ]


def choices(make: Callable[[], Any], size: int, rounds: int, device: torch.device) -> list[Row]:
    """Memory and time of a training step between rebuilding all activations and storing all, by budget.

    Budgets are parts of the way from the memory of the one to that of the other. The line is that between the two ends
    in memory and time; what lies below it does better than mixing the two.
    """
    x = torch.rand(1, 1, *[size] * 3, device=device)
    ends = {activations: _with_activations(make(), activations).to(device) for activations in ("invert", "store")}
    peaks = [plan_training(net, x.shape[2:], optimizer=None).training_peak for net in ends.values()]
    nets = {"invert": ends["invert"]}
    for part in (0.2, 0.4, 0.6, 0.8):
        chosen = best_activations(ends["invert"], int(peaks[0] + part * (peaks[1] - peaks[0])), x.shape)
        nets.setdefault(_short(chosen), _with_activations(make(), chosen).to(device))
    nets["store"] = ends["store"]
    actions = {name: _bind(lambda net: net(x).square().mean().backward(), net) for name, net in nets.items()}
    seconds = time_alternately(actions, rounds, device)
    memory = {name: peak_of_training(net, actions[name]) for name, net in nets.items()}
    rows = []
    for name in nets:
        part = (memory[name] - memory["invert"]) / (memory["store"] - memory["invert"])
        line = [(1 - part) * low + part * high for low, high in zip(seconds["invert"], seconds["store"])]
        rows.append(
            {
                "activations": name,
                "training_bytes_per_voxel": memory[name] / size**3,
                "training_microseconds_per_voxel": Spread.of(1e6 * time / size**3 for time in seconds[name]),
                "training_over_store": ratio(seconds[name], seconds["store"]),
                "training_over_line": ratio(seconds[name], line),
            }
        )
    return rows


def _with_activations(net: Any, activations: str | Sequence[str]) -> Any:
    net.activations = activations
    return net


def _short(chosen: Sequence[str]) -> str:
    """Return text such as `store levels 2, 3`, the finest level being 1."""
    stored = [str(level) for level, activations in enumerate(chosen, 1) if activations == "store"]
    return f"store levels {', '.join(stored)}" if stored else "invert"


def plans(networks: dict[str, Callable[[], nn.Module]], size: int, device: torch.device) -> list[Row]:
    """What a step of training with AdamW and the loss was planned to hold at most, and what it held."""
    images = torch.rand(1, 1, *[size] * 3, device=device)
    target = torch.randint(0, 2, images.shape, device=device)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    rows = []
    for name, net in _equal_cost(networks):
        for dtype in (torch.float32, torch.bfloat16):
            net.to(device)
            planned = plan_training(net, images.shape[2:], dtype=dtype, loss=loss).training_peak
            measured = peak_with_optimizer(net, images, target, dtype, loss)
            net.cpu()
            rows.append(
                {
                    "network": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "planned_mebibytes": planned / 2**20,
                    "measured_mebibytes": measured / 2**20,
                    "planned_over_measured": planned / measured,
                }
            )
    return rows


def losses(size: int, rounds: int, device: torch.device) -> list[Row]:
    """Dice and cross-entropy, forward and backward, by number of classes: MONAI's and ours.

    Memory is in units of the logits, which are counted, as is their gradient; the target is not.
    """
    rows = []
    for classes in CLASSES:
        logits = torch.randn(1, classes, *[size] * 3, device=device, requires_grad=True)
        target = torch.randint(0, classes, (1, 1, *[size] * 3), device=device)
        made: dict[str, nn.Module] = {
            "ours, chunked": ChunkedDiceCELoss(to_onehot_y=True, softmax=True),
            "MONAI": DiceCELoss(to_onehot_y=True, softmax=True),
        }

        def step(loss: nn.Module, logits: Tensor = logits, target: Tensor = target) -> None:
            logits.grad = None
            loss(logits, target).backward()

        actions = {name: _bind(step, loss) for name, loss in made.items()}
        seconds = time_alternately(actions, rounds, device)
        for name, action in actions.items():
            logits.grad = None
            with LiveBytes(ignore=[target]) as live:
                action()
            rows.append(
                {
                    "loss": name,
                    "classes": classes,
                    "memory": live.peak / (logits.numel() * logits.element_size()),
                    "bytes_per_voxel": live.peak / size**3,
                    "milliseconds": Spread.of(1e3 * time for time in seconds[name]),
                    "over_monai": ratio(seconds[name], seconds["MONAI"]),
                }
            )
    return rows


def resampling(rounds: int, device: torch.device, channels: int, size: int) -> list[Row]:
    """Orthogonal downsampling by 2 per axis: ours against the strided grouped convolution that does the same.

    The copy is that of the tensor: it moves as many bytes as one resampling has to.
    """
    x = torch.randn(1, channels, *[size] * 3, device=device, requires_grad=True)
    downsampling = OrthogonalDownsampling(channels, (2, 2, 2), (8 * channels,)).to(device)
    kernel = downsampling.matrix().detach().reshape(8 * channels, 1, 2, 2, 2).requires_grad_()
    gradient = torch.randn(1, 8 * channels, *[size // 2] * 3, device=device)

    def down(rebuilds: bool) -> Tensor:
        downsampling.rebuilds = rebuilds
        return downsampling(x)[0]

    def convolve() -> Tensor:
        return functional.conv3d(x, kernel, stride=2, groups=channels)

    forward: dict[str, Callable[[], Any]] = {
        "ours, invert": lambda: down(True),
        "ours, store": lambda: down(False),
        "strided grouped convolution": convolve,
        "copy": lambda: x.detach().clone(),
    }
    outputs = {name: action() for name, action in forward.items() if name != "copy"}
    weights = {name: kernel if name.startswith("strided") else downsampling.matrix.weight for name in outputs}
    backward = {name: _bind(_gradient, output, [x, weights[name]], gradient) for name, output in outputs.items()}
    forward_seconds = time_alternately(forward, rounds, device)
    backward_seconds = time_alternately(backward, rounds, device)
    return [
        {
            "layer": name,
            "forward_milliseconds": Spread.of(1e3 * time for time in forward_seconds[name]),
            "backward_milliseconds": Spread.of(1e3 * time for time in backward_seconds.get(name, [math.nan])),
            "forward_over_copy": ratio(forward_seconds[name], forward_seconds["copy"]),
        }
        for name in forward
    ]


def _gradient(output: Tensor, inputs: list[Tensor], gradient: Tensor) -> None:
    torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def largest_cubes(networks: dict[str, Callable[[], nn.Module]], device: torch.device, limit: int = 1024) -> list[Row]:
    """The largest cube, a multiple of 32, on which one step of Adam under bf16 autocast fits on the GPU."""
    rows: list[Row] = []
    for name, net in _equal_cost(networks):

        def fits(size: int, net: nn.Module = net) -> bool:
            return _fits(net, (size,) * 3, device)[0]

        rows.append({"network": name, "largest_cube": _largest(fits, limit)})
    return rows


def whole_volume(make: Callable[[], nn.Module], size: Sequence[int], device: torch.device) -> Row:
    """One training step on a whole volume, unpatched: whether it fits, and the most that was allocated."""
    fits, allocated = _fits(make(), size, device)
    return {"spatial_size": list(size), "fits": fits, "gibibytes": allocated / 2**30}


def _fits(net: nn.Module, size: Sequence[int], device: torch.device) -> tuple[bool, int]:
    net = net.to(device)
    optimizer = torch.optim.Adam(net.parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        x = torch.rand(1, 1, *size, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
        loss.backward()
        optimizer.step()
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    finally:
        net.zero_grad(set_to_none=True)
        net.cpu()
    return fits, torch.cuda.max_memory_allocated(device)


def _largest(fits: Callable[[int], bool], limit: int, step: int = 32) -> int:
    """Return the largest multiple of `step` up to `limit` that fits, by bisection; 0 if none does."""
    low, high = 0, limit // step + 1  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _bind(action: Callable[..., object], *args: Any) -> Callable[[], object]:
    return lambda: action(*args)
