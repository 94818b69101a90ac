"""The tensors between invertible layers, and who can give them back.

A `State` is recognized by its memory: the same storage, place, shape, strides and version. The call that made it holds
it until another invertible layer takes it, which can give it back from then on.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage

from monai_iunet.engine.pytorch_private import (
    current_backward_pass,
    graph_is_retained,
    has_values,
    saved_tensor_hooks,
    version,
)
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.saved_tensors import place_of

__all__ = [
    "Maker",
    "State",
    "Taker",
    "given_to_user",
    "here",
    "is_here",
    "is_retained",
    "make_known",
    "save_with_autograd",
]

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a value

# A thread and a backward pass. What either has made it may use; another thread with another pass over the same graph
# makes its own, because memory is written over. One pass runs in several threads where there are several devices.
Maker = tuple[int, int]


def here() -> Maker:
    """Return this thread and the backward pass that runs in it, -1 if none does."""
    return threading.get_ident(), current_backward_pass()


def is_here(maker: Maker) -> bool:
    """Return whether a maker is this thread, or the backward pass that runs in it."""
    thread, backward_pass = maker
    return thread == threading.get_ident() or (backward_pass != -1 and backward_pass == current_backward_pass())


class Taker(Protocol):
    """A call of a layer, which takes states and makes others.

    Attributes:
        outputs: the states that it made.
    """

    outputs: tuple[State, ...]

    def needs(self, storage: UntypedStorage) -> bool:
        """Return whether a rebuilt tensor that autograd has not asked for yet lies in this memory."""

    def invert(self) -> None:
        """Rebuild the states that were taken, and give them back."""


class State:
    """Holds a tensor that a layer made, or knows the call that can give it back."""

    __slots__ = (
        "__weakref__",
        "_checksum",
        "_guard",
        "_held",
        "_private",
        "_rebuilt",
        "_saver",
        "_shape",
        "_taker",
        "_version",
    )

    def __init__(self, tensor: Tensor, keep: bool, private: bool) -> None:
        self._taker: weakref.ref[Taker] | None = None
        self._guard: Taker | None = None  # keeps the taker alive where no graph does
        self._held = None if keep else tensor.detach()
        self._saver = save_with_autograd(tensor.detach()) if keep else None
        is_packed = saved_tensor_hooks() is not None
        self._private = private and not is_packed
        self._checksum = _checksum(tensor) if keep and not private and not is_packed else None
        self._version, self._shape = version(tensor), tensor.shape
        self._rebuilt: tuple[Maker, Tensor, bool] | None = None  # who made it, the value, whether its memory is ours
        if not keep:
            found = weakref.ref(self), current_backward_pass()
            _STATES.setdefault(tensor.untyped_storage(), {})[place_of(tensor)] = found

    @classmethod
    def of(cls, tensor: Tensor) -> State | None:
        """Return the state that a tensor is: the same memory, unchanged, not a copy or another view; else None.

        Within a backward pass, in which a checkpoint evaluates again, it has to be of the same pass: the graph of what
        would take it is freed before its own.
        """
        if tensor.layout is not torch.strided or tensor.is_inference():
            return None
        reference, made_in = _STATES.get(tensor.untyped_storage(), {}).get(place_of(tensor), (None, -1))
        state = reference() if reference is not None and made_in == current_backward_pass() else None
        return state if state is not None and state._version == version(tensor) else None

    def be_taken(self, call: Taker) -> None:
        """Let go of the tensor, which the call can give back from now on."""
        self._taker, self._guard, self._held = weakref.ref(call), call, None

    @property
    def taker(self) -> Taker:
        """The call that took the tensor."""
        call = self._taker() if self._taker is not None else None
        if call is None:
            raise RuntimeError(
                "A state of a reversible chain cannot be rebuilt, because an earlier backward pass has freed the graph "
                "behind it. Specify retain_graph=True in that one."
            )
        return call

    def note_values(self) -> None:
        """Notice from now on what is written to the tensor without a version, too."""
        if self._held is not None:
            self._checksum = _checksum(self._held)

    def give(self, tensor: Tensor, ours: bool, let_go: bool) -> None:
        """Take the tensor back; if asked to, let go of the call that gave it, and so of all calls behind it."""
        self._rebuilt = here(), tensor, ours
        if let_go:
            self._guard = None

    @property
    def is_known(self) -> bool:
        rebuilt = self._rebuilt
        mine = rebuilt is not None and is_here(rebuilt[0])
        return mine or self._held is not None or self._saver is not None

    def take(self, for_good: bool) -> tuple[Tensor, bool] | None:
        """Return the tensor, if it is known, and whether its memory may be reused; forget what was rebuilt.

        Args:
            for_good: whether nobody will ask again in this backward pass. A tensor that autograd keeps is then let go,
                if the graph is freed.
        """
        rebuilt = self._rebuilt
        if rebuilt is not None and is_here(rebuilt[0]):
            _, tensor, ours = rebuilt
            self._rebuilt = None
            taker = self._taker() if self._taker is not None else None
            return tensor, ours and (taker is None or not taker.needs(tensor.untyped_storage()))
        saver = self._saver
        if saver is not None:
            try:
                (tensor,) = saver.grad_fn.saved_tensors
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):  # but raised by a hook of the user's
                    raise
                raise self._was_modified() from error
            self._check_values(tensor)
            let_go = for_good and not is_retained()
            if let_go:
                self._saver = None
            return tensor, let_go and self._private
        if self._held is None:
            return None
        self._check_values(self._held, version(self._held))
        return self._held, False

    def _check_values(self, tensor: Tensor, version_now: int | None = None) -> None:
        """Check that the tensor is as it was, by its version, where autograd has not done so, and by its values."""
        is_other = self._checksum is not None and self._checksum != _checksum(tensor)
        if is_other or version_now not in (None, self._version):
            raise self._was_modified()

    def _was_modified(self) -> RuntimeError:
        return RuntimeError(
            f"A state of a reversible chain, of shape {tuple(self._shape)}, has been modified by an inplace operation "
            "before its backward pass, which needs it as it was. Use an operation that is not in place."
        )


# Of each storage, the states that lie in it, by place, each with the backward pass in which it was made, if any. No
# tensor is kept alive by it.
_STATES: weakref.WeakKeyDictionary[UntypedStorage, dict[Any, tuple[weakref.ref[State], int]]]
_STATES = weakref.WeakKeyDictionary()


def _checksum(tensor: Tensor) -> int | None:
    """Return a check sum of a tensor on a CPU, where no version tells of what is written, or sorted, through NumPy.

    On a GPU, where a program would have to wait for it, and of what has no values, there is none.
    """
    whole = tensor.detach()
    if whole.device.type != "cpu" or whole.layout is not torch.strided or not has_values(whole):
        return None
    whole = torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole.resolve_neg()
    bits = whole.view(BITS[whole.element_size()])
    bits = bits.permute(sorted(range(bits.ndim), key=bits.stride, reverse=True))  # as they lie in memory
    total = 0
    for part in [bits] if bits.is_contiguous() else bits:  # else copies are made, one after another
        values: Any = part.contiguous().numpy()
        total = zlib.crc32(values, total)
    return total


def given_to_user(tensor: Tensor) -> Tensor:
    """Return a tensor within a chain, to which a user gets access, and may write through NumPy, as no version tells."""
    state = None if needs_plain_operators(tensor) else State.of(tensor)
    if state is not None:
        state.note_values()
    return tensor


def save_with_autograd(*tensors: Tensor) -> Any:
    """Return a tensor whose node keeps others saved with autograd, where saved-tensor hooks see them."""
    with torch.enable_grad():
        return _Saver.apply(torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]


def is_retained() -> bool:
    """Return whether the graph survives the backward pass that is running."""
    backward_pass = current_backward_pass()
    known, retained = _RETAINED[0]
    if backward_pass == -1 or known != backward_pass:
        saver = save_with_autograd()  # keeps its node alive
        retained = graph_is_retained(saver.grad_fn)
        _RETAINED[0] = backward_pass, retained
    return retained


# The backward pass that was asked last, by its number, and the answer; -1 is none of them.
_RETAINED: list[tuple[int, bool]] = [(-1, False)]


class _Saver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()


def make_known(state: State) -> None:
    """Rebuild a state, by inverting the calls downstream as far as necessary.

    Happens where no gradient came from the call that took it, because a loss depends on a part of a chain only. States
    found on the way are dropped again, so that the memory does not grow with the length of the way.
    """
    pending = [] if state.is_known else [state]
    while pending:
        call = pending[-1].taker
        missing = [output for output in call.outputs if not output.is_known]
        if missing:
            pending += missing
            continue
        call.invert()
        while pending and pending[-1].is_known:
            pending.pop()
