"""Back-propagation that rebuilds activations instead of storing them.

A layer with an inverse needs no stored input: its input follows from its output. Every call of an `InvertibleLayer`
is one autograd node of its own, and the nodes of a chain pass rebuilt states upstream, beside the gradients:

    forward     x0 --layer1--> x1 --layer2--> x2 --layer3--> x3        only x3 is kept
    backward    x0 <--node1--- x1 <--node2--- x2 <--node3--- x3        states, rebuilt one by one
                g0 <--node1--- g1 <--node2--- g2 <--node3--- g3        gradients

When node k runs, the node after it has already rebuilt the state between them (autograd runs a node only after all
nodes that depend on its output), so the memory for states is that of a single one, whatever the depth. The state lives
in a `_Cell`, shared by the call that produced it and the call that consumed it; a call finds the cells of its inputs
through their `grad_fn`. Because each node is an ordinary one, whose inputs are the states and the parameters, gradients
of the parameters arrive layer by layer (so distributed training overlaps communication), hooks and anomaly mode work,
and a state may leave the chain and come back as a gradient.

What a second evaluation needs in order to repeat the first is recorded with the call: the autocast setting and, where
random numbers were drawn, the state of the generators. During that evaluation the layer's parameters are replaced by
detached aliases and its buffers by copies, so that hooks on parameters fire once and running statistics move once.

Sources: Gomez et al., The Reversible Residual Network, 2017 (arXiv 1707.04585); Etmann, Ke, Schönlieb, iUNets, 2020
(arXiv 2005.05220).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["InvertibleLayer", "Recall", "differentiate", "fill", "is_exporting"]

Tensors = tuple[Tensor, ...]
OptionalTensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Recall:
    """What a layer's backward pass is told of the call.

    Attributes:
        weights: what `weights()` returned.
        replay: context in which evaluating the module repeats the call, recorded by autograd; its value is the list of
            leaves that stand in for `weights`, which the module's parameters are replaced by.
        overwrite: per output, whether its memory may be reused.
        inverse: whether the call was one of `inverse`, so that its "inputs" are what `forward` returns.
        inputs_wanted: whether a call upstream waits for the inputs; if not, `pull_back` may return none.
        remembered: what `remember` returned.
    """

    weights: Tensors
    replay: Callable[[], AbstractContextManager[list[Tensor]]]
    overwrite: Sequence[bool]
    inverse: bool
    inputs_wanted: bool
    remembered: Tensors


class InvertibleLayer(nn.Module):
    """A bijection between tuples of tensors, whose backward pass rebuilds its input from its output.

    A subclass defines `transform` and its inverse `restore`, in ordinary differentiable PyTorch. Calling the layer, and
    calling `inverse`, then back-propagates without storing anything but the outputs that are marked `keep`. A subclass
    that can do better than "restore the input, transform it again, differentiate" overrides `pull_back`.

    Attributes:
        rebuilds: whether the backward pass rebuilds the input (default), or plain autograd stores what it needs.
        exact: whether the input is rebuilt to the last bit, by a layer that knows how.
        largest: with `exact`, the size of the largest value that the last call has made.

    Example:
        >>> class Swap(InvertibleLayer):
        ...     def transform(self, inputs, weights):
        ...         return inputs[1], inputs[0]
        ...     restore = transform
        >>> first, second = Swap()(torch.zeros(1), torch.ones(1))
        >>> first.item(), second.item()
        (1.0, 0.0)
    """

    rebuilds: bool = True
    exact: bool = False
    largest: Tensor | None = None

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        """The bijection itself: outputs from inputs."""
        raise TypeError(f"{type(self).__name__} does not define `transform(inputs, weights)`.")

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        """The inverse bijection: inputs from outputs."""
        raise TypeError(f"{type(self).__name__} does not define `restore(outputs, weights)`.")

    def weights(self) -> Tensors:
        """The tensors, beside its inputs, that the layer depends on and that receive gradients.

        They are computed once per call. By default the layer's parameters, which `transform` reads from the module.
        """
        return tuple(self.parameters())

    def remember(self, inputs: Tensors, outputs: Tensors, weights: Tensors, inverse: bool) -> Tensors:
        """What `recover` needs beside the outputs of a call, kept until its backward pass. By default nothing."""
        return ()

    def recover(self, outputs: Tensors, weights: Tensors, remembered: Tensors, inverse: bool) -> Tensors:
        """The inputs of a call from its outputs. By default what `restore`, or `transform`, makes of them."""
        return (self.transform if inverse else self.restore)(outputs, weights)

    def note_largest(self, tensor: Tensor, scale: float = 1.0) -> None:
        """Keep the size of the largest value of a call in `largest`, on its device; not in an export."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return
        low, high = tensor.detach().aminmax()
        size = torch.maximum(-low, high) * scale
        self.largest = size if self.largest is None else torch.maximum(self.largest, size)

    def forward(self, *inputs: Tensor, keep: bool | Sequence[bool] = True) -> Tensors:
        """Apply the layer.

        Args:
            inputs: the tensors of the state.
            keep: whether an output is stored for the backward pass, for all outputs or one by one. Pass False for
                an output that goes into another `InvertibleLayer`, which will rebuild it.
        """
        return _run(self, inputs, keep, inverse=False)

    def inverse(self, *outputs: Tensor, keep: bool | Sequence[bool] = True) -> Tensors:
        """Apply the inverse of the layer; differentiable, and as frugal as `forward`."""
        return _run(self, outputs, keep, inverse=True)

    def pull_back(
        self, outputs: list[Tensor], grad_outputs: OptionalTensors, call: Recall
    ) -> tuple[Tensors, OptionalTensors, OptionalTensors]:
        """From outputs and their gradients to inputs and theirs: the backward pass of one call.

        Args:
            outputs: what the call returned, rebuilt; empty the list to free them early.
            grad_outputs: their gradients, None where there is none.
            call: what else is known of the call.

        Returns:
            The inputs, their gradients, and the gradients of the weights (None where there is none).
        """
        redo = self.restore if call.inverse else self.transform
        with call.replay() as leaf_weights, torch.no_grad():
            inputs = self.recover(tuple(outputs), tuple(leaf_weights), call.remembered, call.inverse)
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        with call.replay() as leaf_weights:
            again = redo(leaves, tuple(leaf_weights))
        gradients = differentiate(again, (*leaves, *leaf_weights), grad_outputs)
        return inputs, gradients[: len(leaves)], gradients[len(leaves) :]


def fill(grad_outputs: OptionalTensors, outputs: Sequence[Tensor]) -> Tensors:
    """The gradients, zeros where there is none."""
    return tuple(torch.zeros_like(out) if grad is None else grad for grad, out in zip(grad_outputs, outputs))


def differentiate(outputs: Sequence[Any], inputs: Sequence[Tensor], grad_outputs: OptionalTensors) -> OptionalTensors:
    """`torch.autograd.grad` where any output may have no gradient and any input may need none (None for those)."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    reached = [(out, grad) for out, grad in zip(outputs, grad_outputs) if grad is not None]
    if not wanted or not reached:
        return (None,) * len(inputs)
    outs, grads = zip(*reached)
    found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)


class _Cell:
    """Place of one state between the call that produced it and the call that consumed it.

    Filled by the backward pass of the consumer, emptied by that of the producer.
    """

    __slots__ = ("__weakref__", "consumer", "identity", "owned", "pinned", "storage", "value")

    def __init__(self, state: Tensor) -> None:
        self.value: Tensor | None = None
        self.pinned: Tensor | None = None  # the state itself, for a consumer that will not rebuild it
        self.owned = False  # whether the engine made the value, so that its memory may be reused
        self.consumer: _Call | None = None
        self.storage = weakref.ref(state.untyped_storage())
        self.identity = state.storage_offset(), state.shape, state._version

    @property
    def known(self) -> Tensor | None:
        """The state, if it is at hand."""
        return self.value if self.pinned is None else self.pinned

    def is_place_of(self, tensor: Tensor) -> bool:
        """Whether the tensor is the state of this cell: the same memory, unchanged, not a copy or another view."""
        identity = tensor.storage_offset(), tensor.shape, tensor._version
        return self.storage() is tensor.untyped_storage() and identity == self.identity


class _Call:
    """One call of a layer: how to evaluate it again, and where its states are.

    Calls refer to each other downstream only, through `outputs` and `_Cell.consumer`; the way up is weak. A cycle would
    keep tensors alive until the garbage collector runs.
    """

    def __init__(self, layer: InvertibleLayer, inverse: bool, inputs: Tensors, weights: Tensors) -> None:
        self.layer = layer
        self.inverse = inverse
        self.device = inputs[0].device
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((self.device.type, "cpu"))
            if torch.amp.is_autocast_available(kind)
        ]
        self.generator_states: list[Tensor] | None = None
        self.weights = tuple(weight.detach().requires_grad_(weight.requires_grad) for weight in weights)
        self.sources = tuple(_link(tensor, self) for tensor in inputs)
        self.outputs: tuple[_Cell, ...] = ()
        self.kept: dict[int, Tensor] = {}
        self.remembered: Tensors = ()

    def evaluate(self, inputs: Tensors, weights: Tensors) -> Tensors:
        """The forward pass; notes what a repetition has to restore."""
        before = _generator_states(self.device)
        with self._autocast():
            outputs = (self.layer.restore if self.inverse else self.layer.transform)(inputs, weights)
        if list(map(_bytes_of, before)) != list(map(_bytes_of, _generator_states(self.device))):
            self.generator_states = before
        self.outputs = tuple(map(_Cell, outputs))
        with self._autocast():
            self.remembered = self.layer.remember(inputs, outputs, weights, self.inverse)
        return outputs

    @contextmanager
    def replay(self, weights: Tensors) -> Iterator[list[Tensor]]:
        """Evaluate the layer as it was evaluated in the call, recorded by autograd, without side effects."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._autocast())
            if self.generator_states is not None:
                stack.callback(_set_generator_states, self.device, _generator_states(self.device))
                _set_generator_states(self.device, self.generator_states)
            yield stack.enter_context(_stand_ins(self.layer, weights))

    def invert(self, outputs: Tensors) -> Tensors:
        """The inputs from the outputs, without gradients."""
        with self.replay(self.weights) as weights, torch.no_grad():
            return self.layer.recover(outputs, tuple(weights), self.remembered, self.inverse)

    def take_output(self, index: int) -> tuple[Tensor, bool]:
        """A rebuilt output and whether its memory is ours; its cell is empty afterwards."""
        cell = self.outputs[index]
        if cell.pinned is not None:
            if not cell.is_place_of(cell.pinned):
                raise RuntimeError("A state of a reversible chain was changed in place before its backward pass.")
            return cell.pinned, False
        if cell.value is None:
            _rebuild(cell)
        value, cell.value = cell.value, None
        assert value is not None
        return value, cell.owned

    def hand_on(self, inputs: Tensors, foreign: Sequence[Tensor]) -> None:
        """Leave the rebuilt inputs with the calls that produced them; what shares memory with `foreign` is not ours."""
        storages = {tensor.untyped_storage()._cdata for tensor in foreign}
        for tensor, source in zip(inputs, self.sources):
            cell = source() if source is not None else None
            if cell is not None:
                cell.value = tensor
                cell.owned = tensor.untyped_storage()._cdata not in storages

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        # Without its cache: that would hand copies cast in the forward pass, unrecorded, to the recorded repetition.
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
            yield


class _Rebuilding(torch.autograd.Function):
    """The autograd node of one call."""

    @staticmethod
    def forward(ctx: Any, call: _Call, keep: bool | Sequence[bool], *tensors: Tensor) -> Tensors:
        count = len(call.sources)
        inputs, weights = tensors[:count], tensors[count:]
        outputs = call.evaluate(inputs, weights)
        keeps = [keep] * len(outputs) if isinstance(keep, bool) else keep
        kept = {index: output for index, output in enumerate(outputs) if keeps[index]}
        ctx.call = call
        # Saved with autograd, which notices changes in place and frees them in time, and with the call, for `_rebuild`.
        ctx.save_for_backward(*weights, *kept.values())
        call.kept = {index: output.detach() for index, output in kept.items()}
        ctx.kept = tuple(kept)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        call: _Call = ctx.call
        if all(grad is None for grad in grad_outputs):
            return (None,) * len(ctx.needs_input_grad)
        count = len(call.weights)
        weights, kept = ctx.saved_tensors[:count], dict(zip(ctx.kept, ctx.saved_tensors[count:]))
        remembered = call.remembered
        if not graph_is_retained(ctx):
            call.kept, call.remembered = {}, ()
        outputs, overwrite = map(
            list, zip(*((kept[i], False) if i in kept else call.take_output(i) for i in range(len(call.outputs))))
        )
        foreign = [output for output, ours in zip(outputs, overwrite) if not ours]
        del kept
        inputs_wanted = any(source is not None and source() is not None for source in call.sources)
        recall = Recall(weights, lambda: call.replay(weights), overwrite, call.inverse, inputs_wanted, remembered)
        inputs, grad_inputs, grad_weights = call.layer.pull_back(outputs, grad_outputs, recall)
        call.hand_on(inputs, foreign)
        return (None, None, *grad_inputs, *grad_weights)


def is_exporting() -> bool:
    """Whether torch.export is tracing.

    `torch.compiler.is_exporting()` says so of every compiled graph, too, up to PyTorch 2.11.
    """
    return torch.compiler._is_exporting_flag


def _run(layer: InvertibleLayer, inputs: Tensors, keep: bool | Sequence[bool], inverse: bool) -> Tensors:
    weights = layer.weights()
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *weights))
    if not (recorded and layer.rebuilds) or torch.jit.is_tracing() or is_exporting():
        for tensor in inputs if recorded else ():
            if (cell := _cell_of(tensor)) is not None:
                cell.pinned = tensor.detach()
        return (layer.restore if inverse else layer.transform)(inputs, weights)
    return _Rebuilding.apply(_Call(layer, inverse, inputs, weights), keep, *inputs, *weights)  # type: ignore[no-untyped-call]


def _link(tensor: Tensor, consumer: _Call) -> weakref.ref[_Cell] | None:
    """The cell of a state that another call produced; from now on `consumer` can rebuild that state."""
    cell = _cell_of(tensor)
    if cell is None:
        return None
    cell.consumer = consumer
    return weakref.ref(cell)


def _cell_of(tensor: Tensor) -> _Cell | None:
    """The cell of a state that a call produced, found by the state itself."""
    if tensor.grad_fn is None:
        return None
    # Fully sharded training puts a node before the layer that passes the state on as it is: look one node further.
    for node, index in ((tensor.grad_fn, tensor.output_nr), *tensor.grad_fn.next_functions):
        call = getattr(node, "call", None)
        if isinstance(call, _Call) and call.outputs[index].is_place_of(tensor):
            return call.outputs[index]
    return None


def _rebuild(cell: _Cell) -> None:
    """Fill a cell whose consumer took no part in the backward pass, by inverting the calls downstream.

    Happens when a loss depends on some outputs of a chain only. States found on the way are dropped again, so that the
    memory does not grow with the length of the way.
    """
    found: dict[_Cell, Tensor] = {}
    pending = [cell]
    while pending:
        call = pending[-1].consumer
        if call is None:
            raise RuntimeError(
                "A state of a reversible chain was neither kept nor consumed by another invertible layer, so it cannot "
                "be rebuilt. Call the last layer of the chain with `keep=True`."
            )
        outputs = [
            call.kept[index] if index in call.kept else found.get(output, output.known)
            for index, output in enumerate(call.outputs)
        ]
        missing = [place for place, value in zip(call.outputs, outputs) if value is None]
        if missing:
            pending += missing
            continue
        for output in call.outputs:
            found.pop(output, None)
        known = tuple(value for value in outputs if value is not None)
        for source, value in zip(call.sources, call.invert(known)):
            place = source() if source is not None else None
            if place is not None:
                found[place] = value
        while pending and pending[-1] in found:
            pending.pop()
    for place, value in found.items():
        place.value, place.owned = value, False


@contextmanager
def _stand_ins(module: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put leaves in the place of those parameters of a module that are among `weights`, and copies of its buffers.

    Gradients of the leaves reach no hook and no `.grad` of the parameters, and whatever a forward pass does to a buffer
    is forgotten.
    """
    leaves = [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]
    leaf_of = {id(weight): leaf for weight, leaf in zip(weights, leaves)}
    owners: list[dict[str, Any]] = [place for part in module.modules() for place in (part._parameters, part._buffers)]
    originals = [dict(place) for place in owners]
    try:
        for place in owners:
            for name, tensor in place.items():
                if isinstance(tensor, nn.Parameter):
                    place[name] = leaf_of.get(id(tensor), tensor)
                elif tensor is not None:
                    place[name] = tensor.clone()
        yield leaves
    finally:
        for place, original in zip(owners, originals):
            place.update(original)


def _generator_states(device: torch.device) -> list[Tensor]:
    """States of the random number generators that a layer on the device may draw from."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _bytes_of(state: Tensor) -> bytes:
    """The content of a generator's state, read without an operator: memory is planned where operators only pretend."""
    return ctypes.string_at(state.data_ptr(), state.numel())


def _set_generator_states(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


def graph_is_retained(ctx: Any) -> bool:
    """Whether the graph survives the backward pass that is running; if not, frees what this node saved."""
    ctx.maybe_clear_saved_tensors()
    try:
        ctx.saved_tensors  # noqa: B018 - raises once the saved tensors are freed
    except RuntimeError:
        return False
    return True
