"""What fits a given memory: the largest patch, the most couplings, the levels that had better store their activations.

Nothing is allocated to find out: see `plan.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from monai_iunet.planning.plan import (
    ChoosesActivations,
    TrainingPlan,
    images_for,
    plan_inference_pass,
    plan_training,
    rehearse,
    step_without_optimizer,
)

__all__ = ["WAYS", "best_activations", "for_a_step", "largest_patch", "largest_window", "most_couplings", "parse_bytes"]

# What a level may keep of its activations, from little to all, and about which part of an evaluation that saves.
WAYS = ("invert", "convolutions", "store")
SAVED = (0.0, 2 / 3, 1.0)
# Bytes per voxel of a forward pass, by channels of the image and type of autocast.
_PASSES: WeakKeyDictionary[nn.Module, dict[tuple[int, torch.dtype], float]] = WeakKeyDictionary()
UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}B": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("i", 1024))
}


def largest_patch(
    network: nn.Module,
    memory_budget: int | str,
    aspect: Sequence[float] = (1, 1, 1),
    multiple_of: int | Sequence[int] = 16,
    smallest: Sequence[int] | None = None,
    largest: Sequence[int] | None = None,
    **options: Any,
) -> TrainingPlan:
    """Return the plan of the largest patch whose training step fits.

    Args:
        network: see `plan_training`.
        memory_budget: bytes, or such as "24 GiB".
        aspect: proportions of the patch's axes.
        multiple_of: every axis is a multiple of this, or each of its own number. Where a network takes multiples of
            more only, so is the patch.
        smallest: the patch is at least of this size, rounded up to the multiples.
        largest: the patch is at most of this size, rounded down to the multiples.
        options: of `plan_training`, without the size.

    Raises:
        ValueError: when not even the smallest patch fits, the limits leave none, or `memory_budget` is not a size.

    Example:
        >>> from monai_iunet import SegIUNet
        >>> net = SegIUNet(2, in_channels=1, out_channels=2, channels=(8, 16))
        >>> plan = largest_patch(net, "4 MiB", aspect=(2, 1))
        >>> plan.spatial_size[0] > plan.spatial_size[1], plan.training_peak < 4 * 2**20
        (True, True)
    """
    budget = parse_bytes(memory_budget)

    multiples = (multiple_of,) * len(aspect) if isinstance(multiple_of, int) else tuple(multiple_of)
    lowest = multiples
    if smallest is not None:
        lowest = tuple(-(-extent // multiple) * multiple for extent, multiple in zip(smallest, multiples))
    highest = [math.inf] * len(aspect)
    if largest is not None:
        highest = [limit // multiple * multiple for limit, multiple in zip(largest, multiples)]
        if any(high < low for high, low in zip(highest, lowest)):
            raise ValueError(
                f"largest={tuple(largest)} leaves no multiple of {multiples} that is at least {tuple(lowest)}. Raise "
                "it, or use a network with fewer levels."
            )
    # In steps, of which the axis that takes the most grows by one multiple each.
    fastest = max(part / multiple for part, multiple in zip(aspect, multiples))

    def size_of(steps: int) -> tuple[int, ...]:
        counts = [round(steps * part / multiple / fastest) for part, multiple in zip(aspect, multiples)]
        sizes = [max(count * multiple, low) for count, multiple, low in zip(counts, multiples, lowest)]
        return tuple(int(min(size, high)) for size, high in zip(sizes, highest))

    plan, fits = _smallest_plan(network, size_of, options)
    if plan.training_peak > budget:
        raise ValueError(
            f"Even a patch of {plan.spatial_size} needs {plan.training_peak / 2**20:.0f} MiB, more than the "
            f"{budget / 2**20:.0f} MiB that there are. Use fewer channels."
        )
    # What does not depend on the patch; the rest grows about as the number of voxels does.
    fixed, state = plan.parameters + plan.gradients + plan.optimizer_state, plan.optimizer_state
    shape = options.get("batch_size", 1), options.get("in_channels", 1)
    dtype = options.get("dtype", torch.float32)

    peaks = {plan.spatial_size: plan.training_peak}  # that were counted: several numbers of steps may give one size

    def peak_of(steps: int) -> int:
        size = size_of(steps)
        if size not in peaks:
            with rehearse(network, (*shape, *size), dtype) as fake:
                peaks[size] = step_without_optimizer(fake, (*shape, *size), dtype, options.get("loss")) + state
        return peaks[size]

    first, known, peak, fails = fits, fits, plan.training_peak, math.inf
    refused, any_refused = False, False
    while fails - fits > 1 and size_of(fits) != tuple(highest):
        per_voxel = max(1, peak - fixed) / math.prod(size_of(known))
        scale = ((budget - fixed) / per_voxel / math.prod(size_of(known))) ** (1 / len(aspect))
        tried = int(min(max(known * scale, fits + 1), (fits + fails) // 2 if refused else fails - 1))
        try:
            peak, known, refused = peak_of(tried), tried, False
        except ValueError:  # as of more values than convolutions take
            refused, any_refused = True, True
        fits, fails = (fits, tried) if refused or peak > budget else (tried, fails)
    found = plan if size_of(fits) == plan.spatial_size else plan_training(network, size_of(fits), **options)
    if any_refused:
        try:
            peak_of(next(steps for steps in itertools.count(first + 1) if size_of(steps) != size_of(first)))
        except ValueError:  # of so small a patch because the network divides by more
            coarser = [multiple * (3 if first == 3 else 2) for multiple in multiples]
            with contextlib.suppress(ValueError):  # where there is none of them
                other = largest_patch(network, budget, aspect, coarser, smallest, largest, **options)
                found = max(found, other, key=lambda plan: math.prod(plan.spatial_size))
    return found


def largest_window(
    network: nn.Module,
    memory_budget: int,
    image_shape: Sequence[int],
    multiple_of: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> tuple[int, ...]:
    """Return the largest window in which an image can be segmented: the whole image, if a forward pass of it fits.

    Otherwise the longest axis is halved until it does. A pass is counted once for each network, and taken as
    proportional to the voxels.

    Args:
        network: neither run nor changed.
        memory_budget: bytes, parameters included.
        image_shape: `(channels, *spatial)`, of multiples of `multiple_of`.
        multiple_of: what the size of the window is a multiple of, per axis.
        dtype: of autocast; float32 for none.

    Raises:
        ValueError: when not even the smallest window fits.

    Example:
        >>> network = nn.Conv2d(1, 4, 1)
        >>> largest_window(network, 10_000_000, (1, 64, 96), (16, 16))
        (64, 96)
        >>> largest_window(network, 100_000, (1, 64, 96), (16, 16))
        (64, 48)
    """
    channels, *size = image_shape
    counted = _PASSES.setdefault(network, {})
    fixed = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    if (channels, dtype) not in counted:
        held = plan_inference_pass(network, (1, channels, *size), dtype) - fixed
        counted[channels, dtype] = held / math.prod(size)
    while (needed := fixed + counted[channels, dtype] * math.prod(size)) > memory_budget:
        longest = max(range(len(size)), key=lambda axis: size[axis])
        half = -(-size[longest] // 2 // multiple_of[longest]) * multiple_of[longest]
        # A normalization needs more than one voxel at the coarsest level.
        if half == size[longest] or math.prod(size) <= 2 * math.prod(multiple_of):
            raise ValueError(
                f"Even in windows of {tuple(size)} a segmentation takes {needed / 2**20:.0f} MiB, more than the "
                f"{memory_budget / 2**20:.0f} MiB that there are. Crop the image."
            )
        size[longest] = half
    return tuple(size)


def _smallest_plan(
    network: nn.Module, size_of: Callable[[int], tuple[int, ...]], options: dict[str, Any]
) -> tuple[TrainingPlan, int]:
    """Return the plan of the smallest size that a network takes: a normalization may need more than one voxel."""
    for steps in range(1, 4):
        try:
            return plan_training(network, size_of(steps), **options), steps
        except ValueError:
            continue
    return plan_training(network, size_of(4), **options), 4


def most_couplings(
    make_network: Callable[[int], nn.Module],
    memory_budget: int | str,
    spatial_size: Sequence[int],
    limit: int = 64,
    **options: Any,
) -> tuple[int, TrainingPlan]:
    """Return the greatest depth whose training step fits, and its plan.

    Args:
        make_network: the network of a number of couplings, such as
            `lambda couplings: SegIUNet(3, 1, 2, couplings=couplings)`.
        memory_budget: bytes, or such as "24 GiB".
        spatial_size: of the patch.
        limit: the most to try. Where activations are rebuilt, only parameters grow with depth.
        options: of `plan_training`, without the size.

    Raises:
        ValueError: when not even one coupling fits, or `memory_budget` is not a size.

    Example:
        >>> from monai_iunet import SegIUNet
        >>> couplings, plan = most_couplings(
        ...     lambda couplings: SegIUNet(2, 1, 2, (8, 16), couplings=couplings, activations="store"),
        ...     memory_budget="3 MiB",
        ...     spatial_size=(64, 64),
        ...     limit=8,
        ... )
        >>> 1 <= couplings < 8 and plan.training_peak < 3 * 2**20
        True
    """
    budget = parse_bytes(memory_budget)

    def plan(couplings: int) -> TrainingPlan:
        return plan_training(make_network(couplings), spatial_size, **options)

    best, fits, fails = plan(1), 1, limit
    if best.training_peak > budget:
        raise ValueError(
            f"Even one coupling per level needs {best.training_peak / 2**20:.0f} MiB, more than the "
            f"{budget / 2**20:.0f} MiB that there are. Use fewer channels or a smaller patch."
        )
    too_much = plan(limit)
    if too_much.training_peak <= budget:
        return limit, too_much
    # Memory grows about linearly with depth.
    while fails - fits > 1:
        share = (budget - best.training_peak) / (too_much.training_peak - best.training_peak)
        middle = min(max(fits + int(share * (fails - fits)), fits + 1), fails - 1)
        middle_plan = plan(middle)
        if middle_plan.training_peak <= budget:
            best, fits = middle_plan, middle
        else:
            too_much, fails = middle_plan, middle
    return fits, best


def best_activations(
    network: ChoosesActivations,
    memory_budget: int | str,
    image_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> tuple[str, ...]:
    """Choose what each level of an `IUNet` or `SegIUNet` keeps of its activations, so that a step is fast and fits.

    A level that stores saves one evaluation of its couplings, one that keeps the outputs of convolutions most of that.
    What it saves in operations and costs in bytes is counted for each level, and of all choices that fit the one is
    taken that saves the most.

    Args:
        network: the network.
        memory_budget: bytes of a step without optimizer and loss, or such as "20 GiB".
        image_shape: `(batch, channels, *spatial)`.
        dtype: of autocast; float32 for none.

    Returns:
        "invert", "convolutions" or "store" per level; all "invert" if nothing fits.

    Example:
        >>> from monai_iunet import SegIUNet
        >>> net = SegIUNet(2, in_channels=1, out_channels=2, channels=(8, 16))
        >>> best_activations(net, "1 GiB", image_shape=(1, 1, 64, 64))
        ('store', 'store')
    """
    budget = parse_bytes(memory_budget)
    levels = network.levels
    module = cast(nn.Module, network)
    with rehearse(module, image_shape, dtype, _of_ways([0] * levels)) as fake:
        if not any(parameter.requires_grad for parameter in fake.parameters()):
            fake.requires_grad_()  # for the gradient of the images, which may be wanted, takes no more

        def peak(ways: Sequence[int]) -> int:
            fake.activations = _of_ways(ways)
            return step_without_optimizer(fake, image_shape, dtype)

        if peak(most := (len(WAYS) - 1,) * levels) <= budget:
            return _of_ways(most)
        least = peak([0] * levels)
        if least > budget:
            return _of_ways([0] * levels)
        costs = [
            [0, *(peak([way if other == level else 0 for other in range(levels)]) - least for way in (1, 2))]
            for level in range(levels)
        ]
        saved = _operations_of_levels(fake, image_shape, levels)
        choices = [ways for ways in itertools.product(range(len(WAYS)), repeat=levels) if ways != most]
        choices.sort(key=lambda ways: -sum(saved[level] * SAVED[way] for level, way in enumerate(ways)))
        too_large: list[tuple[int, ...]] = []
        for ways in choices:
            # Costs add up but for what is held at different moments; what looks as if it may fit is counted, unless it
            # keeps as much at each level as something that does not fit. Each count takes a second, so every one that
            # is in vain makes the next guess more careful.
            share = 0.8 + 0.1 * len(too_large)
            if least + share * sum(costs[level][way] for level, way in enumerate(ways)) > budget:
                continue
            if any(all(map(operator.ge, ways, others)) for others in too_large):
                continue
            if peak(ways) <= budget:
                return _of_ways(ways)
            too_large.append(ways)
    return _of_ways([0] * levels)


def _of_ways(ways: Sequence[int]) -> tuple[str, ...]:
    return tuple(WAYS[way] for way in ways)


def _operations_of_levels(network: Any, image_shape: Sequence[int], levels: int) -> list[float]:
    """Count the floating-point operations of a forward pass through the couplings of each level."""
    operations = [0.0] * levels
    handles = []
    counter = FlopCounterMode(display=False)

    def add(level: int, sign: int, *_: Any) -> None:
        operations[level] += sign * counter.get_total_flops()

    for level in range(levels):
        for coupling in network.couplings_of(level):
            handles.append(coupling.register_forward_pre_hook(partial(add, level, -1)))
            handles.append(coupling.register_forward_hook(partial(add, level, 1)))
    with torch.no_grad(), counter:
        network(images_for(network, image_shape))
    for handle in handles:
        handle.remove()
    return operations


def for_a_step(gpu_memory: int | str) -> int:
    """Return the bytes that a step may hold on a GPU of this memory: nine tenths.

    The rest is for what a plan does not count: the driver, the workspace of cuDNN, and what the allocator cannot use.

    Raises:
        ValueError: see `parse_bytes`; for text of fewer bytes than a mebibyte whose unit was left out.

    Example:
        >>> for_a_step("10 KiB")
        9216
    """
    size = parse_bytes(gpu_memory)
    if isinstance(gpu_memory, str) and size < 2**20 and not re.search("[A-Za-z]", gpu_memory):
        raise ValueError(f'{gpu_memory!r} is a number of bytes. Name the unit, as in "{gpu_memory.strip()} GiB".')
    return size * 9 // 10


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes, from a number or from text such as "24 GiB" or "500 MB".

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_bytes("1.5 KiB")
        1536
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    units = {name.lower(): factor for name, factor in UNITS.items()}
    try:
        number = float(match[1]) * units[match[2].lower()] if match else 0.0
    except (KeyError, ValueError):
        number = 0.0
    if not (math.isfinite(number) and number >= 1):
        raise ValueError(f'A size must be bytes or text such as "24 GiB", got {size!r}.')
    return int(number)
