"""Back-propagation that rebuilds activations instead of storing them.

A layer with an inverse needs no stored input: its input follows from its output. A chain of such layers keeps its last
state only, and its backward pass rebuilds one state after the other:

    forward     x0 --layer1--> x1 --layer2--> x2 --layer3--> x3        only x3 is kept
    backward    x0 <--layer1-- x1 <--layer2-- x2 <--layer3-- x3        states, rebuilt one by one
                g0 <---------- g1 <---------- g2 <---------- g3        gradients, by autograd

The graph is the ordinary one that autograd makes of what a layer computes. Only what its nodes save is not stored:
while a layer is evaluated, saved-tensor hooks put a number in the place of each tensor that autograd would save. When
the backward pass asks for the first of them, the call of the layer is *rebuilt*: its inputs are computed from its
outputs, and evaluating the layer once more gives what was to be saved, number by number. The inputs are left where the
layer before finds its outputs, and so on.

So hooks on tensors, parameters and modules, gradients that arrive layer by layer (distributed training overlaps
communication), checkpointing within and around, losses on what is inside, and several threads work as they do with
plain autograd: the engine changes nothing but where saved tensors come from.

A tensor between two layers is a `_State`. The call that made it holds it until another invertible layer takes it, which
can give it back from then on. A state is recognized by its memory: the same storage, place, shape, strides and version.
What is not recognized (a view, a copy, a tensor that was changed) is no state, and the call that made the state
keeps it, as plain autograd would.

What the engine does not do:

- `torch.func` (`grad`, `vjp`, `jvp`, `vmap`), forward-mode differentiation, tracing and exporting take the way of plain
  autograd, right, but with the memory of `rebuilds = False`. A second derivative (`create_graph=True`) is right, but
  its graph stores what the first one rebuilt.
- Neither do layers with parts in TorchScript rebuild, which is optimized in the course of its first runs, and then
  saves other tensors than before, nor those with lazy parts in their first run, which makes their parameters.
- What casts the states of a chain to 16 bits, as a mixed-precision policy of `fully_shard` around couplings does, has
  them rebuilt with that rounding: shard branches, or the whole.
- Two backward passes over one and the same graph at the same time, from two threads, work, but rebuild states again
  and again. Threads with graphs of their own are independent.
- What a module keeps outside of its parameters, buffers, settings and hooks (see `repetition.py`) and of random
  generators (`random_numbers.py`) is not put back for the second evaluation: a layer that lists its outputs lists two
  in each step, and of what is set within an object of one's own only the effect is noticed, in a coupling that is not
  computed in 16 bits (`second_result.py`).
- What is written to a parameter through `.data` between the passes is not noticed, as it is not by plain autograd; nor
  is what is so written to an output that is not on a CPU, which plain autograd does not need.
- A graph holds the modules that it is to evaluate again, with their hooks. A tensor that such a hook has caught is only
  free when a backward pass has gone through its graph; a hook that is not to hold one catches it detached.

Sources: Gomez et al., The Reversible Residual Network, 2017 (arXiv 1707.04585); Etmann, Ke, Schönlieb, iUNets, 2020
(arXiv 2005.05220). PyTorch's `torch/utils/checkpoint.py` repeats evaluations in the same way, from stored inputs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy as is_uninitialized

from monai_iunet.engine.foreign_code import runs_foreign_code
from monai_iunet.engine.pytorch_private import (
    can_pack_saved_tensors,
    current_backward_pass,
    graph_is_retained,
    has_values,
    is_exporting,
    is_in_forward_mode,
    out_of_batches,
    saved_tensor_hooks,
    version,
)
from monai_iunet.engine.repetition import Conditions

__all__ = [
    "Call",
    "Caught",
    "Converted",
    "InvertibleLayer",
    "Saved",
    "Tensors",
    "is_recorded_by_autograd_alone",
    "is_transformed",
]

Tensors = tuple[Tensor, ...]
Saved: TypeAlias = "Tensor | Converted"  # a tensor that autograd was to save
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a value
LARGEST_ERROR = 0.05  # of a reconstruction by `restore`, relative, that may be rounding


class InvertibleLayer(nn.Module):
    """Maps tuples of tensors invertibly; the backward pass rebuilds the input from the output.

    A subclass defines `transform` and its inverse `restore`, in ordinary differentiable PyTorch. Calling the layer, and
    calling `inverse`, then back-propagates without storing more than the last state of a chain of layers. A subclass
    that can do better than "restore the inputs, transform them again" overrides `rebuild`.

    Attributes:
        rebuilds: whether the backward pass rebuilds the input (default), or plain autograd stores what it needs.
        exact: whether the input is rebuilt to the last bit, by a layer that knows how.
        is_function_of_weights: whether `transform` and `rebuild` depend on nothing but inputs and `weights()`: no
            modules with modes and buffers, no autocast, no random numbers.

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
    is_function_of_weights: bool = False

    def transform(self, inputs: Tensors, weights: Tensors) -> Tensors:
        """Compute the outputs from the inputs: the bijection itself."""
        raise NotImplementedError(f"{type(self).__name__} does not define `transform(inputs, weights)`.")

    def restore(self, outputs: Tensors, weights: Tensors) -> Tensors:
        """Compute the inputs from the outputs: the inverse bijection."""
        raise NotImplementedError(f"{type(self).__name__} does not define `restore(outputs, weights)`.")

    def weights(self) -> Tensors:
        """Return the tensors beside the inputs that `transform` and `restore` are given, computed once per call.

        By default the layer's parameters, which `transform` may as well read from the module.
        """
        return tuple(self.parameters())

    def remember(self, inputs: Tensors, outputs: Tensors, weights: Tensors, inverse: bool) -> Tensors:
        """Return what `rebuild` needs beside the outputs of a call; kept until its backward pass. None by default."""
        return ()

    def watch(self) -> AbstractContextManager[Any]:
        """Return a context for the first evaluation, whose `outputs()` are kept for `rebuild`; none by default."""
        return nullcontext()

    def recover(self, outputs: Tensors, weights: Tensors, remembered: Tensors, inverse: bool) -> Tensors:
        """Compute the inputs of a call from its outputs; by default by `restore`, or by `transform` for an inverse."""
        return (self.transform if inverse else self.restore)(outputs, weights)

    def forward(self, *inputs: Tensor, keep: bool = False, private: bool = False) -> Tensors:
        """Apply the layer.

        Args:
            inputs: the tensors of the state.
            keep: whether autograd saves the outputs, as it should at the end of a chain, so that saved-tensor hooks
                (offloading, checkpointing) see them. Otherwise the call holds them until another invertible layer
                takes them.
            private: whether nobody will hold the outputs at the time of the backward pass, which may then write over
                what autograd has saved of them.
        """
        return _run(self, inputs, keep, inverse=False, private=private)

    def inverse(self, *outputs: Tensor, keep: bool = False) -> Tensors:
        """Apply the inverse of the layer; differentiable, and as frugal as `forward`."""
        return _run(self, outputs, keep, inverse=True)

    def replace(self, inputs: list[Tensor], inverse: bool = False) -> Tensors:
        """Apply the layer, or its inverse, without a gradient, to tensors whose memory may be reused.

        A subclass that can do with less memory than a state before and one after overrides it.

        Args:
            inputs: the tensors of the state; emptied, so that the caller holds none of them.
            inverse: whether to apply the inverse.
        """
        state = tuple(inputs)
        inputs.clear()
        return self.inverse(*state) if inverse else self(*state)

    def rebuild(self, outputs: list[Tensor], overwrite: Sequence[bool], call: Call) -> tuple[Tensors, Sequence[Saved]]:
        """Compute, from the outputs of a call, its inputs and the tensors that autograd was to save, in their order.

        Args:
            outputs: what the call returned; empty the list to free them early.
            overwrite: per output, whether its memory may be reused.
            call: what else is known of the call.

        Raises:
            RuntimeError: when `restore` is not the inverse of `transform`.
        """
        with call.repeat(), torch.no_grad():
            inputs = self.recover(tuple(outputs), call.weights, call.remembered, call.inverse)
        with call.repeat() as saved:
            again = (self.restore if call.inverse else self.transform)(call.leaves(inputs), call.weights)
        for tensor, expected in zip(again, outputs):
            if not (expected.is_floating_point() or expected.is_complex()):  # as a mask, of which there are no norms
                tensor, expected = tensor.float(), expected.float()
            size = torch.linalg.vector_norm(expected)
            error = torch.linalg.vector_norm(tensor.detach() - expected)
            if size.isfinite() and not error <= LARGEST_ERROR * size:  # an error that is no number counts
                raise RuntimeError(
                    f"{type(self).__name__}: `restore` does not undo `transform` (or they draw different random "
                    "numbers), so that the input cannot be rebuilt. Mend it, or set `rebuilds = False` "
                    '(activations="store").'
                )
        return inputs, saved


class Call:
    """Holds what it takes to rebuild the inputs of one call of a layer, and the tensors that autograd was to save.

    Calls refer to each other downstream only, through `outputs` and the state's taker; the way up is weak. A cycle
    would keep tensors alive until the garbage collector runs.

    Attributes:
        weights: what `weights()` returned, cut off from its graph.
        inverse: whether the call was one of `inverse`, so that its "inputs" are what `forward` returns.
        remembered: what `remember` returned.
    """

    def __init__(self, layer: InvertibleLayer, inverse: bool, inputs: Tensors, weights: Tensors) -> None:
        self.weights = tuple(weight.detach().requires_grad_(weight.requires_grad) for weight in weights)
        self.inverse = inverse
        self.remembered: Tensors = ()
        self.outputs: tuple[_State, ...] = ()
        self._layer = layer
        self._conditions = None if layer.is_function_of_weights else Conditions(layer, inputs[0].device)
        self._may_keep_inputs = bool(self._conditions.foreign) if self._conditions else runs_foreign_code(layer)
        self._inputs = [(tensor.requires_grad, tensor.stride()) for tensor in inputs]
        self._sources: list[weakref.ref[_State] | None] = []
        self._kinds: list[_Kind] = []  # of the tensors that autograd was to save
        # What holds results of the first evaluation for the second, and which are held.
        self._kept: tuple[Any, list[bool]] | None = None
        # Who has rebuilt these tensors, what is left of them, and their versions.
        self._saved: tuple[_Maker, list[Saved | None], list[int]] = ((0, -1), [], [])

    def record(self, inputs: Tensors, weights: Tensors, keep: bool, private: bool) -> Tensors:
        """Evaluate the layer for the first time, recorded by autograd, without storing what that would save."""
        evaluate = self._layer.restore if self.inverse else self._layer.transform
        with (
            self._conditions.recorded() if self._conditions else nullcontext(),
            saved_tensors_hooks(self._pack, self._unpack),
            self._layer.watch() as watch,
        ):
            outputs = evaluate(inputs, weights)
        if any(output.requires_grad for output in outputs):
            with torch.no_grad():
                self.remembered = self._layer.remember(inputs, outputs, weights, self.inverse)
            if watch is not None and self._kinds:
                kept = watch.outputs()
                held = [tensor for tensor in kept if tensor is not None]
                self._kept = _saved(*held), [tensor is not None for tensor in kept]
            # Last, so that nothing has changed if an error was raised before.
            sources = [_State.of(tensor) for tensor in inputs]
            self._sources = [None if source is None else weakref.ref(source) for source in sources]
            for source in sources:
                if source is not None:
                    source.be_taken(self)
            self.outputs = tuple(_State(output, keep, private) for output in outputs)
        return outputs

    @contextmanager
    def repeat(self) -> Iterator[Caught]:
        """Record the second evaluation by autograd; the value of the context collects the tensors that it saves."""
        saved = Caught(self._conditions.writes_to if self._conditions else None)
        with (
            self._conditions.repeated() if self._conditions else nullcontext(),
            torch.enable_grad(),
            saved_tensors_hooks(saved.catch, _refuse),
        ):
            yield saved

    def leaves(self, inputs: Sequence[Tensor], first: int = 0) -> Tensors:
        """Return inputs for the second evaluation, with the order of axes and the need for gradients of the first.

        Kernels depend on the order of axes in memory, and so do results to the last bit.

        Args:
            inputs: rebuilt ones, from a place on.
            first: this place.
        """
        return tuple(
            _with_strides(tensor.detach(), stride).requires_grad_(wanted)
            for tensor, (wanted, stride) in zip(inputs, self._inputs[first:])
        )

    @property
    def inputs_wanted(self) -> bool:
        """Whether a call upstream waits for the inputs; if not, `rebuild` may return none."""
        return any(source is not None and source() is not None for source in self._sources)

    @property
    def kept(self) -> list[Tensor | None] | None:
        """The `outputs()` of what `watch` returned, in the first evaluation; None if it returned nothing."""
        if self._kept is None:
            return None
        saver, held = self._kept
        tensors = iter(saver.grad_fn.saved_tensors)
        return [next(tensors) if is_held else None for is_held in held]

    def invert(self) -> None:
        """Rebuild the inputs alone."""
        # A call that saved nothing is not asked again.
        outputs, overwrite = self._take_outputs(for_good=not self._kinds)
        layer = self._layer_then()
        with self._conditions.repeated() if self._conditions else nullcontext(), torch.no_grad():
            inputs = layer.recover(tuple(outputs), self.weights, self.remembered, self.inverse)
        self._hand_on(inputs, _others(outputs, overwrite), let_go=False)

    def needs(self, storage: UntypedStorage) -> bool:
        """Return whether a rebuilt tensor that autograd has not asked for yet lies in this memory."""
        return any(tensor is not None and tensor.untyped_storage() is storage for tensor in self._saved[1])

    # A branch that was compiled would have its hooks compiled, too.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pack(self, tensor: Tensor) -> int:
        self._kinds.append(_kind(tensor))
        return len(self._kinds) - 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _unpack(self, number: int) -> Tensor:
        maker, saved, versions = self._saved
        if not _is_here(maker) or saved[number] is None:
            with out_of_batches():
                saved, versions = self._rebuild()
        tensor, saved[number] = saved[number], None
        assert tensor is not None
        if isinstance(tensor, Converted):
            return tensor.tensor()
        if version(tensor) != versions[number]:
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)}, which {type(self._layer).__name__} needs to compute a "
                "gradient, has been modified by an inplace operation. Use one that is not in place."
            )
        return tensor

    def _rebuild(self) -> tuple[list[Saved | None], list[int]]:
        if not self.outputs:
            raise RuntimeError(
                f"{type(self._layer).__name__} computes gradients while it is evaluated, so it cannot be evaluated "
                'again for its own. Store activations (activations="store").'
            )
        # What is rebuilt then becomes a part of the graph of a second derivative.
        is_recorded = torch.is_grad_enabled()
        with torch.no_grad():
            outputs, overwrite = self._take_outputs(for_good=True)
            if is_recorded:
                overwrite = [False] * len(overwrite)
            others = _others(outputs, overwrite)
            inputs, saved = self._layer_then().rebuild(outputs, overwrite, self)
            self.check_saved(saved)
            if is_recorded:
                others += [tensor.untyped_storage() for tensor in inputs]
            let_go = not _is_retained()
            self._hand_on(inputs, others, let_go)
            if let_go:
                self._kept = None
        rebuilt: list[Saved | None] = list(saved)
        versions = saved.versions if isinstance(saved, Caught) else [_version(tensor) for tensor in saved]
        self._saved = _here(), rebuilt, versions
        return rebuilt, versions

    def check_saved(self, saved: Sequence[Saved]) -> None:
        """Check that the second evaluation has saved tensors like those of the first.

        Raises:
            RuntimeError: when it has not.
        """
        if list(map(_kind, saved)) != self._kinds:
            raise RuntimeError(
                f"{type(self._layer).__name__} cannot be evaluated again for the backward pass: it saved "
                f"{len(self._kinds)} tensors in the forward pass and {len(saved)} now, or tensors of other shapes or "
                "types. It must compute the same whenever it is given the same input; else store activations "
                '(activations="store").'
            )

    def _layer_then(self) -> Any:
        return self._conditions.module_then() if self._conditions else self._layer

    def _take_outputs(self, for_good: bool) -> tuple[list[Tensor], list[bool]]:
        taken = []
        for state in self.outputs:
            while (value := state.take(for_good)) is None:  # again, if another thread was quicker
                _make_known(state)
            taken.append(value)
        return [tensor for tensor, _ in taken], [ours for _, ours in taken]

    def _hand_on(self, inputs: Sequence[Tensor], others: Sequence[UntypedStorage], let_go: bool) -> None:
        """Leave the inputs with the calls that made them; memory that belongs to other tensors is not to be reused."""
        for tensor, source in zip(inputs, self._sources):
            state = source() if source is not None else None
            if state is not None:
                ours = not self._may_keep_inputs and all(tensor.untyped_storage() is not storage for storage in others)
                state.give(tensor, ours, let_go)


class Caught(list[Saved]):
    """Collects the tensors that autograd is about to save.

    Args:
        changes: whether a tensor may change when everything is collected, so that it must be copied.

    Attributes:
        stands: a stand-in for one of them, which is collected in its place.
        versions: of the tensors when they were saved.
    """

    stands: Converted | None = None

    def __init__(self, changes: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self._changes = changes
        self.versions: list[int] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def catch(self, tensor: Tensor) -> None:
        stands = self.stands
        if self._changes is not None and self._changes(tensor):
            tensor = tensor.clone()
        self.append(stands if stands is not None and stands.is_of(tensor) else tensor.detach())
        self.versions.append(_version(self[-1]))


class Converted:
    """Stands for a tensor that autograd is to have, until it asks, if the tensor follows from an input.

    Args:
        tensor: what it stands for, which is not held.
        source: the input.
        convert: computes the tensor from the input.
    """

    def __init__(self, tensor: Tensor, source: Tensor, convert: Callable[[Tensor], Tensor]) -> None:
        self.shape, self.dtype, self.device = _kind(tensor)
        self.source = source
        self._place = weakref.ref(tensor.untyped_storage()), _place(tensor)
        self._convert = convert

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the one that this stands for."""
        storage, place = self._place
        return storage() is tensor.untyped_storage() and place == _place(tensor)

    def untyped_storage(self) -> UntypedStorage:
        """Return the memory from which the tensor follows."""
        return self.source.untyped_storage()

    def tensor(self) -> Tensor:
        """Compute the tensor."""
        with torch.no_grad():
            return self._convert(self.source)


class _State:
    """Holds a tensor that a layer made, or knows the call that can give it back."""

    __slots__ = ("__weakref__", "_checksum", "_guard", "_held", "_private", "_rebuilt", "_saver", "_taker", "_version")

    def __init__(self, tensor: Tensor, keep: bool, private: bool) -> None:
        self._taker: weakref.ref[Call] | None = None
        self._guard: Call | None = None  # keeps the taker alive where no graph does
        self._held = None if keep else tensor.detach()
        self._saver = _saved(tensor.detach()) if keep else None
        is_packed = saved_tensor_hooks() is not None
        self._private = private and not is_packed
        self._checksum = _checksum(tensor) if keep and not private and not is_packed else None
        self._version = version(tensor)
        self._rebuilt: tuple[_Maker, Tensor, bool] | None = None  # who made it, the value, whether its memory is ours
        if not keep:
            _STATES.setdefault(tensor.untyped_storage(), {})[_place(tensor)] = weakref.ref(self)

    @classmethod
    def of(cls, tensor: Tensor) -> _State | None:
        """Return the state that a tensor is: the same memory, unchanged, not a copy or another view; else None."""
        if tensor.layout is not torch.strided or tensor.is_inference():
            return None
        reference = _STATES.get(tensor.untyped_storage(), {}).get(_place(tensor))
        state = reference() if reference is not None else None
        return state if state is not None and state._version == version(tensor) else None

    def be_taken(self, call: Call) -> None:
        """Let go of the tensor, which the call can give back from now on."""
        self._taker, self._guard, self._held = weakref.ref(call), call, None

    @property
    def taker(self) -> Call:
        """The call that took the tensor."""
        call = self._taker() if self._taker is not None else None
        if call is None:
            raise RuntimeError(
                "A state of a reversible chain cannot be rebuilt, because an earlier backward pass has freed the graph "
                "behind it. Specify retain_graph=True in that one."
            )
        return call

    def give(self, tensor: Tensor, ours: bool, let_go: bool) -> None:
        """Take the tensor back; if asked to, let go of the call that gave it, and so of all calls behind it."""
        self._rebuilt = _here(), tensor, ours
        if let_go:
            self._guard = None

    @property
    def is_known(self) -> bool:
        rebuilt = self._rebuilt
        mine = rebuilt is not None and _is_here(rebuilt[0])
        return mine or self._held is not None or self._saver is not None

    def take(self, for_good: bool) -> tuple[Tensor, bool] | None:
        """Return the tensor, if it is known, and whether its memory may be reused; forget what was rebuilt.

        Args:
            for_good: whether nobody will ask again in this backward pass. A tensor that autograd keeps is then let go,
                if the graph is freed.
        """
        rebuilt = self._rebuilt
        if rebuilt is not None and _is_here(rebuilt[0]):
            _, tensor, ours = rebuilt
            self._rebuilt = None
            taker = self._taker() if self._taker is not None else None
            return tensor, ours and (taker is None or not taker.needs(tensor.untyped_storage()))
        saver = self._saver
        if saver is not None:
            (tensor,) = saver.grad_fn.saved_tensors
            if self._checksum is not None and self._checksum != _checksum(tensor):
                raise self._was_modified(tensor)
            let_go = for_good and not _is_retained()
            if let_go:
                self._saver = None
            return tensor, let_go and self._private
        if self._held is not None and version(self._held) != self._version:
            raise self._was_modified(self._held)
        return None if self._held is None else (self._held, False)

    @staticmethod
    def _was_modified(tensor: Tensor) -> RuntimeError:
        return RuntimeError(
            f"A state of a reversible chain, of shape {tuple(tensor.shape)}, has been modified by an inplace operation "
            "before its backward pass, which needs it as it was. Use an operation that is not in place."
        )


# Of each storage, the states that lie in it, by place; no tensor is kept alive by it.
_STATES: weakref.WeakKeyDictionary[UntypedStorage, dict[Any, weakref.ref[_State]]] = weakref.WeakKeyDictionary()


def _checksum(tensor: Tensor) -> int | None:
    """Return the sum of the bits of a tensor on a CPU, where no version tells of what is written through NumPy.

    On a GPU, where a program would have to wait for it, and of what has no values, there is none.
    """
    whole = tensor.detach()
    if whole.device.type != "cpu" or whole.layout is not torch.strided or not has_values(whole):
        return None
    whole = torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole.resolve_neg()
    return int(whole.view(BITS[whole.element_size()]).sum())


def _saved(*tensors: Tensor) -> Any:
    """Return a tensor whose node keeps others saved with autograd, where saved-tensor hooks see them."""
    with torch.enable_grad():
        return _Saver.apply(torch.empty(0, requires_grad=True), *tensors)  # type: ignore[no-untyped-call]


def _is_retained() -> bool:
    """Return whether the graph survives the backward pass that is running."""
    backward_pass = current_backward_pass()
    known, retained = _RETAINED[0]
    if backward_pass == -1 or known != backward_pass:
        saver = _saved()  # keeps its node alive
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


def is_transformed(*tensors: Tensor) -> bool:
    """Return whether `torch.func` or forward-mode differentiation works on tensors."""
    if not can_pack_saved_tensors():
        return True
    return is_in_forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_recorded_by_autograd_alone(*tensors: Tensor) -> bool:
    """Return whether tensors are watched by something that knows PyTorch's own operators only.

    That is `torch.func`, forward-mode differentiation, a tracer, a compiler or an exporter.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or is_exporting() or is_transformed(*tensors)


def _run(layer: InvertibleLayer, inputs: Tensors, keep: bool, inverse: bool, private: bool = False) -> Tensors:
    weights = layer.weights()
    rebuilds = layer.rebuilds and torch.is_grad_enabled() and not is_recorded_by_autograd_alone(*inputs, *weights)
    if not rebuilds or any(map(_becomes_another, layer.modules())):
        return (layer.restore if inverse else layer.transform)(inputs, weights)
    return Call(layer, inverse, inputs, weights).record(inputs, weights, keep, private)


def _becomes_another(module: nn.Module) -> bool:
    """Return whether a module is another one when it was evaluated, as in TorchScript, or lazy and evaluated first."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    is_lazy = isinstance(module, LazyModuleMixin)
    return is_lazy and any(map(is_uninitialized, (*module.parameters(False), *module.buffers(False))))


def _make_known(state: _State) -> None:
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


def _others(outputs: Sequence[Tensor], overwrite: Sequence[bool]) -> list[UntypedStorage]:
    """Return the memory of those outputs that belong to somebody else than the engine."""
    return [output.untyped_storage() for output, ours in zip(outputs, overwrite) if not ours]


def _with_strides(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return the tensor, or a copy whose axes lie in memory in the order of the strides, without gaps."""
    if _same_order(tensor, stride):
        return tensor
    layout = torch.empty_like(torch.empty_strided(tensor.shape, stride, device="meta"))
    if _same_order(tensor, layout.stride()):
        return tensor
    return torch.empty_strided(tensor.shape, layout.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _same_order(tensor: Tensor, stride: Sequence[int]) -> bool:
    """Return whether a tensor has these strides, but for axes of a single element, whose stride means nothing."""
    return all(own == other for own, other, size in zip(tensor.stride(), stride, tensor.shape) if size > 1)


# A thread and a backward pass. What either has made it may use; another thread with another pass over the same graph
# makes its own, because memory is written over. One pass runs in several threads where there are several devices.
_Maker = tuple[int, int]


def _here() -> _Maker:
    return threading.get_ident(), current_backward_pass()


def _is_here(maker: _Maker) -> bool:
    thread, backward_pass = maker
    return thread == threading.get_ident() or (backward_pass != -1 and backward_pass == current_backward_pass())


_Kind = tuple[torch.Size, torch.dtype, torch.device]


def _kind(tensor: Saved) -> _Kind:
    return tensor.shape, tensor.dtype, tensor.device


def _version(tensor: Saved) -> int:
    return 0 if isinstance(tensor, Converted) else version(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return where in its storage a tensor lies, and how it is to be read."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _refuse(_: Any) -> NoReturn:
    raise RuntimeError(
        "This tensor was computed while activations were rebuilt in a backward pass, and cannot be differentiated. A "
        "hook has caught it: take what the hook sees in the forward pass."
    )
