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

A tensor between two layers is a `State` (see `state.py`). What is not recognized as one (a view, a copy, a tensor that
was changed) is none, and the call that made the state keeps it, as plain autograd would.

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
  in each step, and of what is set within an object of one's own only the effect on what a branch returns is noticed
  (`second_result.py`), in a coupling that is not computed in 16 bits: not a factor that a normalization takes away.
- So it is with a `TorchDispatchMode` that is left before the backward pass. One that is entered for the backward pass
  alone, and changes results, changes those of the second evaluation, too.
- What is written to a parameter through `.data` between the passes is not noticed, as it is not by plain autograd; nor
  is what is so written to a state within a chain, or to an output that is not on a CPU, which plain autograd does not
  need.
- A graph holds the modules that it is to evaluate again, with their hooks. A tensor that such a hook has caught is only
  free when a backward pass has gone through its graph; a hook that is not to hold one catches it detached.

Sources: Gomez et al., The Reversible Residual Network, 2017 (arXiv 1707.04585); Etmann, Ke, Schönlieb, iUNets, 2020
(arXiv 2005.05220). PyTorch's `torch/utils/checkpoint.py` repeats evaluations in the same way, from stored inputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy as is_uninitialized

from monai_iunet.engine.foreign_code import runs_foreign_code
from monai_iunet.engine.pytorch_private import out_of_batches, version
from monai_iunet.engine.recording import needs_plain_operators
from monai_iunet.engine.repetition import Conditions
from monai_iunet.engine.saved_tensors import Caught, Converted, Kind, Saved, kind_of, version_of
from monai_iunet.engine.state import Maker, State, here, is_here, is_retained, make_known, save_with_autograd

__all__ = ["Call", "InvertibleLayer", "Tensors"]

Tensors = tuple[Tensor, ...]
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
                (offloading, checkpointing) see them, and what is written to them through NumPy is noticed. Otherwise
                the call holds them until another invertible layer takes them.
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
        self.outputs: tuple[State, ...] = ()
        self._layer = layer
        self._conditions = None if layer.is_function_of_weights else Conditions(layer, inputs[0].device)
        self._may_keep_inputs = bool(self._conditions.foreign) if self._conditions else runs_foreign_code(layer)
        self._inputs = [(tensor.requires_grad, tensor.stride()) for tensor in inputs]
        self._sources: list[weakref.ref[State] | None] = []
        self._kinds: list[Kind] = []  # of the tensors that autograd was to save
        # What holds results of the first evaluation for the second, and which are held.
        self._kept: tuple[Any, list[bool]] | None = None
        # Who has rebuilt these tensors, what is left of them, and their versions.
        self._saved: tuple[Maker, list[Saved | None], list[int]] = ((0, -1), [], [])

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
                self._kept = save_with_autograd(*held), [tensor is not None for tensor in kept]
            sources = [State.of(tensor) for tensor in inputs]
            self._sources = [None if source is None else weakref.ref(source) for source in sources]
            self.outputs = tuple(State(output, keep, private) for output in outputs)
            # Last, so that nothing has changed if an error was raised before, as by a checkpoint that has seen enough.
            for source in sources:
                if source is not None:
                    source.be_taken(self)
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
    def _pack(self, tensor: Tensor) -> _Number:
        self._kinds.append(kind_of(tensor))
        return _Number(len(self._kinds) - 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _unpack(self, stands: _Number) -> Tensor:
        if stands.tensor is not None:
            return stands.tensor
        number = stands.number
        maker, saved, versions = self._saved
        if not is_here(maker) or saved[number] is None:
            is_recorded = torch.is_grad_enabled()  # which leaving inference mode changes
            with out_of_batches(), torch.inference_mode(False), torch.set_grad_enabled(is_recorded):
                saved, versions = self._rebuild()
        tensor, saved[number] = saved[number], None
        assert tensor is not None
        if isinstance(tensor, Converted):
            with out_of_batches():
                tensor = tensor.tensor()
        elif version(tensor) != versions[number]:
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)}, which {type(self._layer).__name__} needs to compute a "
                "gradient, has been modified by an inplace operation. Use one that is not in place."
            )
        if self._may_keep_inputs:
            with out_of_batches(), torch.inference_mode(False):
                stands.tensor = None if is_retained() else tensor
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
            let_go = not is_retained()
            self._hand_on(inputs, others, let_go)
            if let_go:
                self._kept = None
        rebuilt: list[Saved | None] = list(saved)
        versions = saved.versions if isinstance(saved, Caught) else [version_of(tensor) for tensor in saved]
        self._saved = here(), rebuilt, versions
        return rebuilt, versions

    def check_saved(self, saved: Sequence[Saved]) -> None:
        """Check that the second evaluation has saved tensors like those of the first.

        Raises:
            RuntimeError: when it has not.
        """
        if list(map(kind_of, saved)) != self._kinds:
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
                make_known(state)
            taken.append(value)
        return [tensor for tensor, _ in taken], [ours for _, ours in taken]

    def _hand_on(self, inputs: Sequence[Tensor], others: Sequence[UntypedStorage], let_go: bool) -> None:
        """Leave the inputs with the calls that made them; memory that belongs to other tensors is not to be reused."""
        for tensor, source in zip(inputs, self._sources):
            state = source() if source is not None else None
            if state is not None:
                ours = not self._may_keep_inputs and all(tensor.untyped_storage() is not storage for storage in others)
                state.give(tensor, ours, let_go)


class _Number:
    """Stands for a tensor that autograd was to save, by its number.

    Attributes:
        tensor: what was given, where a function of one's own may ask twice: `ctx.saved_tensors[0]`, then `[1]`.
            Behind it autograd lets go of this object, unless the graph is retained, where it is rebuilt.
    """

    __slots__ = ("number", "tensor")

    def __init__(self, number: int) -> None:
        self.number = number
        self.tensor: Tensor | None = None


def _run(layer: InvertibleLayer, inputs: Tensors, keep: bool, inverse: bool, private: bool = False) -> Tensors:
    weights = layer.weights()
    rebuilds = layer.rebuilds and torch.is_grad_enabled() and not needs_plain_operators(*inputs, *weights)
    if not rebuilds or any(map(_becomes_another, layer.modules())):
        return (layer.restore if inverse else layer.transform)(inputs, weights)
    return Call(layer, inverse, inputs, weights).record(inputs, weights, keep, private)


def _becomes_another(module: nn.Module) -> bool:
    """Return whether a module is another one when it was evaluated, as in TorchScript, or lazy and evaluated first."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    is_lazy = isinstance(module, LazyModuleMixin)
    return is_lazy and any(map(is_uninitialized, (*module.parameters(False), *module.buffers(False))))


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


def _refuse(_: Any) -> NoReturn:
    raise RuntimeError(
        "This tensor was computed while activations were rebuilt in a backward pass, and cannot be differentiated. A "
        "hook has caught it: take what the hook sees in the forward pass."
    )
