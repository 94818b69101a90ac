"""What a training step will hold, before anything of it is allocated.

The step is run with tensors that have a shape but no values (`FakeTensorMode`), and the bytes of their storages are
counted as those of real ones are, by `LiveBytes`. So a plan is made of any network, loss and optimizer, and agrees with
a count of the real step. What libraries take inside an operator, and what an allocator rounds up or keeps, is not
counted.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from monai_iunet.engine.pytorch_private import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    hooks_of,
    tree_leaves,
    without_modes,
)
from monai_iunet.engine.slabs import two_slices
from monai_iunet.io.text import first_line
from monai_iunet.planning.live_bytes import LiveBytes

__all__ = [
    "ChoosesActivations",
    "Loss",
    "MakeOptimizer",
    "TrainingPlan",
    "images_for",
    "plan_inference_pass",
    "plan_training",
    "rehearse",
    "step_without_optimizer",
]

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Any, Tensor], Tensor]


@runtime_checkable
class ChoosesActivations(Protocol):
    """A network whose levels rebuild or store their activations, such as `IUNet`.

    Attributes:
        activations: "invert", "convolutions" or "store" per level, or one of them, or "auto".

    Example:
        >>> from monai_iunet import IUNet
        >>> isinstance(IUNet(2, (4, 8)), ChoosesActivations), isinstance(nn.Conv2d(1, 1, 1), ChoosesActivations)
        (True, False)
    """

    activations: Any

    @property
    def levels(self) -> int:
        """Number of levels."""

    def activations_for(self, image_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
        """Return the choice per level for images of a shape."""

    def couplings_of(self, level: int) -> Iterable[nn.Module]:
        """Return the modules of a level that are evaluated again if it rebuilds its activations."""


@dataclass(frozen=True)
class TrainingPlan:
    """Holds the bytes of one training step and one inference pass.

    Attributes:
        spatial_size: of the patch.
        batch_size: patches per step.
        parameters: parameters and buffers.
        gradients: gradients of the parameters.
        optimizer_state: what the optimizer keeps, from the second step on.
        activations: what the network holds after its forward pass, its input and output included.
        loss: what the loss holds after its forward pass.
        training_peak: the most that is held at any moment of a step, all of the above included.
        inference_peak: the most that is held in a forward pass without gradients, parameters included.

    Example:
        >>> plan = plan_training(nn.Conv1d(1, 1, 1, bias=False), spatial_size=(100,), optimizer=None)
        >>> plan.parameters, plan.gradients
        (4, 4)
    """

    spatial_size: tuple[int, ...]
    batch_size: int
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    loss: int
    training_peak: int
    inference_peak: int


def plan_training(
    network: nn.Module,
    spatial_size: Sequence[int],
    in_channels: int = 1,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    optimizer: MakeOptimizer | None = torch.optim.AdamW,
    loss: Loss | None = None,
) -> TrainingPlan:
    """Count the bytes of a training step and of an inference pass of any network.

    Args:
        network: as it is trained; it is neither run nor changed.
        spatial_size: of the patch.
        in_channels: channels of the images.
        batch_size: patches per step.
        dtype: of autocast; float32 for none.
        optimizer: makes an optimizer from a list of parameters; a class of `torch.optim`, say. None to leave it out.
        loss: takes the output of the network and a target `(batch, 1, *spatial_size)` of class numbers; by default the
            mean square of the output.

    Raises:
        ValueError: when the network cannot be run on such images, or in such a type.
        TypeError: when `optimizer` makes no optimizer.

    Example:
        >>> from monai.networks.nets import UNet
        >>> plan = plan_training(UNet(3, 1, 2, (8, 16), (2,)), spatial_size=(64, 64, 64))
        >>> plan.training_peak > plan.inference_peak > plan.parameters
        True
    """
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer {optimizer!r}: must make one of parameters, as torch.optim.AdamW does, or be None.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype {dtype}: must be that of autocast, torch.bfloat16 or torch.float16, or torch.float32 for none."
        )
    shape = (batch_size, in_channels, *spatial_size)
    with rehearse(network, shape, dtype) as fake:
        counted = _count_step(fake, shape, dtype, optimizer, loss)
        inference = _count_inference(fake.eval(), shape, dtype)
    return TrainingPlan(tuple(spatial_size), batch_size, inference_peak=inference, **counted)


def step_without_optimizer(
    network: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32, loss: Loss | None = None
) -> int:
    """Return the peak of both passes, parameters and gradients included; for a network in `rehearse`."""
    return _count_step(network, shape, dtype, None, loss)["training_peak"]


def plan_inference_pass(network: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Count the most that a forward pass without gradients holds, parameters included, in bytes.

    Args:
        network: neither run nor changed.
        shape: of the images, `(batch, channels, *spatial)`.
        dtype: of autocast; float32 for none.

    Raises:
        ValueError: when the network cannot be run on such images.

    Example:
        >>> plan_inference_pass(nn.Conv1d(1, 1, 1, bias=False), (1, 1, 100))
        804
    """
    with rehearse(network, shape, dtype) as fake:
        return _count_inference(fake.eval(), shape, dtype)


@contextmanager
def rehearse(
    network: nn.Module, shape: Sequence[int], dtype: torch.dtype, activations: Sequence[str] | None = None
) -> Iterator[Any]:
    """Copy a network, in training mode, without values, and enter a context in which no tensor has any.

    Args:
        network: stays as it is.
        shape: of the images, `(batch, channels, *spatial)`.
        dtype: of autocast; float32 for none.
        activations: of an `IUNet` or `SegIUNet`; by default those of the network, with "auto" what it would choose.

    Raises:
        ValueError: for what goes wrong within, because the network cannot take such images.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake: Any = _without_values(network, mode).train()
    if isinstance(network, ChoosesActivations):
        # Made before, because with "auto" making the choice is a rehearsal too.
        fake.activations = activations or network.activations_for(shape, dtype)
    try:
        with mode, _WithValues(), two_slices():  # type: ignore[no-untyped-call]
            yield fake
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        came, said = " x ".join(map(str, shape)), first_line(error)
        raise ValueError(f"{type(network).__name__} cannot be planned for images of {came}: {said}") from error


class _WithValues(TorchDispatchMode):
    """Answers questions for values where tensors have none, as losses and optimizers ask them.

    Counting, as in `torch.arange(2, 5).tolist()`, is done. For what depends on an image, zero is the answer.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_real = tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if is_real or func.overloadpacket is torch.ops.aten.arange:
            return without_modes(lambda: func(*args, **(kwargs or {})))
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 0.0 if args[0].is_floating_point() else 0


def _without_values(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a network so that its parameters and buffers have no values; the network's own are not touched.

    One that was built on meta is copied as to a CPU. Hooks of a user, who is to see the network itself alone, are left
    out, but not those of PyTorch, as of weights that are pruned or normalized.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for name, hooks in hooks_of(module).items():
            kept = ((key, hook) for key, hook in hooks.items() if not callable(hook) or _is_of_pytorch(hook))
            memo[id(getattr(module, name))] = OrderedDict(kept)
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # as such weights are, which cannot be copied
                memo[id(value)] = mode.from_tensor(value.detach())
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_meta:
            with mode:
                fake: Tensor = torch.empty_like(tensor.detach(), device="cpu")
        else:
            fake = mode.from_tensor(tensor.detach())
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(network, memo)


def _is_of_pytorch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"


def images_for(network: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return images for a network in `rehearse`, where it is and of the type that its parameters have.

    Example:
        >>> images_for(nn.Conv1d(1, 1, 1).bfloat16(), (1, 1, 100)).dtype
        torch.bfloat16
    """
    types = (parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    return torch.empty(*shape, dtype=next(types, None), device=_device(network))


def _count_step(
    network: nn.Module, shape: Sequence[int], dtype: torch.dtype, optimizer: MakeOptimizer | None, loss: Loss | None
) -> dict[str, int]:
    device = _device(network)
    images, target = images_for(network, shape), torch.zeros(shape[0], 1, *shape[2:], device=device)
    fixed = [*network.parameters(), *network.buffers()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with LiveBytes(ignore=[*fixed, target]) as live:
        with _autocast(device, dtype):
            output = network(images)
            held = live.now()
            value = (loss or _mean_square)(output, target)
        of_loss = live.now() - held
        # As in a training loop that does not hold on to the output.
        del output
        value.backward()
        del value
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    state: list[Tensor] = []
    in_step = 0
    if optimizer is not None and gradients:
        state, in_step = _count_optimizer(optimizer(trained), [*fixed, *gradients])
    for parameter in trained:
        parameter.grad = None
    return {
        "parameters": _bytes(fixed),
        "gradients": _bytes(gradients),
        "optimizer_state": _bytes(state),
        "activations": held,
        "loss": of_loss,
        "training_peak": _bytes(fixed) + _bytes(state) + max(live.peak, _bytes(gradients) + in_step),
    }


def _count_optimizer(optimizer: torch.optim.Optimizer, others: list[Tensor]) -> tuple[list[Tensor], int]:
    """Return what the optimizer keeps, which its first step makes, and the bytes that a further step takes beside."""
    optimizer.step()
    state = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    with LiveBytes(ignore=[*others, *state]) as live:
        optimizer.step()
    return state, live.peak


def _count_inference(network: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> int:
    fixed = [*network.parameters(), *network.buffers()]
    with LiveBytes(ignore=fixed) as live, torch.no_grad(), _autocast(_device(network), dtype):
        network(images_for(network, shape))
    return live.peak + _bytes(fixed)


def _mean_square(output: Any, target: Tensor) -> Tensor:
    outputs = [output] if isinstance(output, Tensor) else output
    return torch.stack([part.float().square().mean() for part in outputs]).sum()


@contextmanager
def _autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def _device(network: nn.Module) -> torch.device:
    """Return where the network is; where it would be by default, if it has no parameters."""
    return next((parameter.device for parameter in network.parameters()), torch.get_default_device())


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of the storages of tensors, each storage once."""
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in tensors})
