"""Products with orthogonal matrices are in full precision; nothing in a step waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from monai_iunet import SegIUNet
from monai_iunet.engine.pytorch_private import TorchDispatchMode
from monai_iunet.networks.layers.full_precision import full_precision


def asked_for() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def coarse() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


pytestmark = pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch 2.9 to see what is asked for"
)


class Precisions(TorchDispatchMode):
    """Notes what is asked for by each operator on more than small matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, set[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(arg, torch.Tensor) and arg.numel() > 256 for arg in args):
            self.of.setdefault(func.overloadpacket.__name__, set()).add(asked_for())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"activations": "store"}], ids=str)
def test_products_are_in_full_precision_and_convolutions_as_asked(options: dict[str, Any], coarse: None) -> None:
    net = SegIUNet(2, 1, 2, (4, 8), couplings=2, **options)
    with Precisions() as seen:
        net(torch.rand(1, 1, 16, 16)).square().mean().backward()
    full = {("ieee", "ieee")}
    assert seen.of["bmm"] == full
    assert seen.of["convolution"] == {asked_for()} != full


def test_what_the_program_asked_for_is_back_when_the_last_thread_has_left(coarse: None) -> None:
    before = asked_for()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision("cpu"):
            inside.set()
            leave.wait(10)

    with full_precision("cpu"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert asked_for() == ("ieee", "ieee")
    leave.set()
    thread.join()
    assert asked_for() == before
    with pytest.raises(KeyError), full_precision("cpu"):
        raise KeyError
    assert asked_for() == before


class Waits(TorchDispatchMode):
    """Counts the operators that wait for the device: those that bring values to Python or to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        waiting = aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select
        moves = "device" in (kwargs or {}) and any(isinstance(arg, torch.Tensor) for arg in args)
        self.count += func.overloadpacket in waiting or (moves and torch.device(kwargs["device"]) != args[0].device)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_no_operation_waits_for_the_device_but_one_check_of_the_range(
    amp: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_iunet.engine.state._checksum", lambda _: None)  # which is of a CPU alone
    # Within the mode that counts, what branches return is compared.
    monkeypatch.setattr("monai_iunet.networks.blocks.second_result.dispatch_modes", list)
    net, x = SegIUNet(2, 1, 2, (4, 8), couplings=2, exact=exact), torch.rand(1, 1, 16, 16)
    with Waits() as forward, torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = net(x).float().square().mean()
    with Waits() as backward:
        loss.backward()
    assert (forward.count, backward.count) == (int(exact), 0)


def test_images_of_too_many_values_are_refused_before_anything_is_computed() -> None:
    net, one = (
        SegIUNet(3, 1, 3, (24, 112), couplings=1),
        torch.zeros(1),
    )  # which takes no memory, however it is expanded
    net.iunet.design.check_number((1, 1, 512, 512, 304), 24, "Features")
    with pytest.raises(ValueError, match="24 channels would have 2151677952 values"):
        net(one.expand(1, 1, 512, 512, 341))
    with pytest.raises(ValueError, match="Half a state of 12 channels"):
        net.iunet(one.expand(3, 24, 512, 512, 304))
