"""Full precision for products with orthogonal matrices, whatever the program has asked for.

`torch.set_float32_matmul_precision("high")`, which Lightning, nnU-Net and many scripts call, lets products of float32
run in TensorFloat-32, with 10 binary digits behind the point. The transpose of a matrix would then no longer undo it,
and activations would be rebuilt wrongly.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from monai_iunet.networks.layers.autocast import without_autocast

__all__ = ["full_precision"]

# What products ask for is a setting of the process, not of a thread. The first to enter sets it and the last to leave
# sets it back; products of other threads are in full precision meanwhile.
_lock = threading.Lock()
_inside = 0
_before: list[Any] = []
FULL = ("ieee", "none", "highest")  # "none": nothing was asked for
# Whether backends have a precision each, as from PyTorch 2.9 on.
HAS_PRECISIONS = hasattr(torch.backends.cuda.matmul, "fp32_precision") and hasattr(torch.backends.mkldnn, "matmul")


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute matrix products in float32 as they are written: without autocast, TensorFloat-32 or bfloat16.

    A compiler or tracer records operators only, so what it makes follows the setting of the program.

    Args:
        device_type: of autocast.

    Example:
        >>> with torch.autocast("cpu"), full_precision("cpu"):
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    with without_autocast(device_type):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            yield
            return
        if not _enter():
            yield
            return
        try:
            yield
        finally:
            _leave()


def _enter() -> bool:
    """Ask for full precision, and return whether that is to be taken back: not if it is what the program asks for."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = _get()
            if all(precision in FULL for precision in _before):
                return False
            _set(["ieee"] * len(_before) if HAS_PRECISIONS else ["highest"])
        _inside += 1
    return True


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            _set(_before)


def _get() -> list[Any]:
    if not HAS_PRECISIONS:
        return [torch.get_float32_matmul_precision()]
    backends: Any = torch.backends
    return [backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision]


def _set(precisions: list[Any]) -> None:
    if not HAS_PRECISIONS:
        torch.set_float32_matmul_precision(precisions[0])
        return
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = precisions
