"""Dice and cross-entropy for many classes, in the memory of the logits and their gradient.

Both losses depend on the logits z through a few sums s over voxels only: per sample and class the overlap of prediction
and target and the size of either, and the total of the cross-entropy. The sums are taken chunk by chunk, and so are, in
the backward pass, their derivatives:

    forward    s = sum over chunks k of s_k(z_k)                L = L(s)
    backward   dL/dz_k = (d s_k / d z_k)^T dL/ds                one chunk after another

so that whatever is made of the logits on the way is only ever there for one chunk. In the usual case, softmax p and a
class number y per voxel, the softmax is kept and the gradient written over it. With the gradients a, b, g of overlap,
size and entropy, the one-hot target [c = y] and the weight w of the voxel's class,

    dL/dz_c = p_c (b_c + w g - h) + [c = y] (a_y p_y - w g)         h = a_y p_y + sum over c of b_c p_c

In all other cases each chunk is evaluated again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from torch import Tensor
from torch.autograd.function import once_differentiable

from monai_iunet.engine.pytorch_private import graph_is_retained, has_values
from monai_iunet.engine.recording import is_transformed
from monai_iunet.losses.class_numbers import check_labels
from monai_iunet.networks.layers.autocast import without_autocast
from monai_iunet.networks.layers.cuda_graph import is_captured

__all__ = ["ChunkedDiceCELoss"]

logger = logging.getLogger(__name__)

# At least so many: what is made of a chunk, some one and a half or six times its size, then stays below a fifth of the
# logits.
LABEL_CHUNKS, CHUNKS = 18, 32
CHUNK_ELEMENTS = 2**18  # at most: they and what is made of them stay in the cache


class ChunkedDiceCELoss(DiceCELoss):
    """Computes `monai.losses.DiceCELoss` in little more memory than the logits and their gradient.

    Takes its arguments; value and gradient agree to rounding, and are taken in float32 whatever the type of the logits.
    With an `other_act`, with a single channel, for a target that needs a gradient, and under `torch.func` it is the
    loss of MONAI, which is logged once.

    Example:
        >>> loss = ChunkedDiceCELoss(to_onehot_y=True, softmax=True)
        >>> logits = torch.zeros(1, 2, 8, 8, 8, requires_grad=True)
        >>> round(loss(logits, torch.zeros(1, 1, 8, 8, 8)).item(), 4)
        1.3598
    """

    _said = False

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            input: logits `(batch, classes, *spatial)`.
            target: class numbers `(batch, 1, *spatial)` with `to_onehot_y`, else one channel per class.

        Raises:
            ValueError: for shapes that do not fit each other, for weights that are negative or of another number of
                classes, and for labels that are not the number of a class.
        """
        reason = self._reason_for_one_piece(input, target)
        if reason is not None:
            if not self._said:
                logger.warning("ChunkedDiceCELoss computes in one piece, as DiceCELoss does: %s.", reason)
                self._said = True
            return super().forward(input, target)
        expected = (input.shape[0], 1 if self.dice.to_onehot_y else input.shape[1], *input.shape[2:])
        if tuple(target.shape) != expected:
            raise ValueError(
                f"target must have the shape {expected} for logits of shape {tuple(input.shape)} and "
                f"to_onehot_y={self.dice.to_onehot_y}, got {tuple(target.shape)}."
            )
        weight = self.cross_entropy.weight
        if weight is not None and tuple(weight.shape) != (input.shape[1],):
            raise ValueError(
                f"weight must have a value for each of the {input.shape[1]} classes, got {tuple(weight.shape)}."
            )
        # Nor can values be looked at while a CUDA graph is recorded; its warm-up has checked them.
        is_read = has_values(target) and not torch.compiler.is_compiling() and not is_captured(target)
        if weight is not None and is_read and not (weight >= 0).all():
            raise ValueError(f"weight must not be negative, got {weight.tolist()}.")
        # Not `as_subclass`, which tensors without values may not have.
        plain = (tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor for tensor in (input, target))
        logits, labels = map(_with_flat_view, plain)
        if self.dice.to_onehot_y and is_read:
            check_labels(labels, logits.shape[1], "target")
        sums = _LabelSums if self._is_usual(logits) else _ChunkedSums
        *sizes, entropy = sums.apply(self, logits, labels)  # type: ignore[no-untyped-call]
        entropy = entropy / self._entropy_weight(logits, sizes[2])
        return self.lambda_dice * self._dice(*sizes) + self.lambda_ce * entropy

    def _reason_for_one_piece(self, input: Tensor, target: Tensor) -> str | None:
        if self.dice.other_act is not None:
            return "the derivative of other_act is unknown"
        if input.ndim < 3 or input.shape[1] == 1:
            return "a single channel needs little memory"
        if target.requires_grad:
            return "the target needs a gradient"
        if is_transformed(input, target):
            return "torch.func, or forward-mode differentiation, knows PyTorch's own operators only"
        return None

    def _is_usual(self, logits: Tensor) -> bool:
        usual = self.dice.softmax and self.dice.to_onehot_y and not self.dice.squared_pred
        return usual and not self.cross_entropy.label_smoothing and logits.dtype == torch.float32

    def _evaluate(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return log-softmax, softmax, prediction, target, entropy's target of a chunk `(batch, classes, voxels)`."""
        logits = logits.float()
        logarithm = logits.log_softmax(1)
        softmax = logarithm.exp()
        prediction = softmax if self.dice.softmax else logits.sigmoid() if self.dice.sigmoid else logits
        count = logits.shape[1]
        if self.dice.to_onehot_y:
            truth = (labels.long() == torch.arange(count, device=labels.device)[:, None]).float()
        else:
            truth = labels.float()
        ce, wanted = self.cross_entropy, truth
        if ce.label_smoothing:
            wanted = (1 - ce.label_smoothing) * truth + ce.label_smoothing / count
        if ce.weight is not None:
            wanted = wanted * ce.weight[:, None]
        return logarithm, softmax, prediction, truth, wanted

    def _sums(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return overlap, size of prediction and of target, `(batch, classes)`, and the total of the cross-entropy."""
        logarithm, _, prediction, truth, wanted = self._evaluate(logits, labels)
        overlap = torch.linalg.vecdot(prediction, truth, dim=2)
        squared = self.dice.squared_pred
        sizes = [torch.linalg.vecdot(part, part, dim=2) if squared else part.sum(2) for part in (prediction, truth)]
        return overlap, *sizes, -torch.dot(logarithm.flatten(), wanted.flatten())

    def _gradient(
        self, logits: Tensor, labels: Tensor, grad_overlap: Tensor, grad_size: Tensor, grad_entropy: Tensor
    ) -> Tensor:
        """Return the gradient of the logits of a chunk from those of the sums."""
        _, softmax, prediction, truth, wanted = self._evaluate(logits, labels)
        # Of the prediction: overlap = <found, true>, size = <found, 1> or <found, found>.
        gradient = truth * grad_overlap[..., None]
        gradient += 2 * prediction * grad_size[..., None] if self.dice.squared_pred else grad_size[..., None]
        if self.dice.softmax:
            gradient = softmax * (gradient - (softmax * gradient).sum(1, keepdim=True))
        elif self.dice.sigmoid:
            gradient *= prediction * (1 - prediction)
        # Of the entropy -<wanted, log softmax>.
        return gradient.add_((softmax * wanted.sum(1, keepdim=True) - wanted).mul_(grad_entropy))

    def _entropy_weight(self, logits: Tensor, true: Tensor) -> Tensor | float:
        """Return what the mean of the cross-entropy divides its total by: the weights of the voxels' classes."""
        ce = self.cross_entropy
        if ce.reduction != "mean":
            return 1.0
        if ce.weight is not None and self.dice.to_onehot_y:
            return true.sum(0) @ ce.weight.to(true)
        return logits[:, 0].numel()

    def _dice(self, overlap: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        dice = self.dice
        first = 0 if dice.include_background else 1
        sums = [part[:, first:] for part in (overlap, predicted, true)]
        overlap, predicted, true = (part.sum(0) for part in sums) if dice.batch else sums
        union = 2 * (predicted + true - overlap) if dice.jaccard else predicted + true
        loss: Tensor = 1 - (2 * overlap + dice.smooth_nr) / (union + dice.smooth_dr)
        if dice.class_weight is not None and overlap.shape[-1] > 1:  # of a single one DiceLoss takes no weight
            loss = loss * dice.class_weight.to(loss)
        return loss.mean() if dice.reduction == "mean" else loss.sum()


class _LabelSums(torch.autograd.Function):
    """The sums, for float32 logits, softmax and class numbers."""

    @staticmethod
    def forward(ctx: Any, loss: ChunkedDiceCELoss, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        ctx.weight = loss.cross_entropy.weight
        softmax = torch.empty_like(logits)
        overlap, predicted, true = logits.new_zeros(3, *logits.shape[:2])
        entropy = logits.new_zeros(())
        for part, label, place in _chunks(LABEL_CHUNKS, logits, labels, softmax):
            label = label.long()
            place.copy_(part.log_softmax(1))
            logarithm = place.gather(1, label)
            place.exp_()
            predicted += place.sum(2)
            probability = logarithm[:, 0].exp()
            # Summed apart: a float32 that has counted to 2^24, voxel by voxel, stays there.
            for total, terms in ((overlap, probability), (true, torch.ones_like(probability))):
                total += torch.zeros_like(total).scatter_add_(1, label[:, 0], terms)
            entropy -= (logarithm if ctx.weight is None else logarithm.mul_(ctx.weight[label])).sum()
        ctx.save_for_backward(softmax, labels)
        ctx.mark_non_differentiable(true)
        return overlap, predicted, true, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_overlap: Tensor, grad_size: Tensor, _: Tensor, grad_entropy: Tensor
    ) -> tuple[None, Tensor, None]:
        gradient, labels = ctx.saved_tensors
        if graph_is_retained(ctx):
            gradient = gradient.clone()
        with without_autocast(gradient.device.type):
            for place, label in _chunks(LABEL_CHUNKS, gradient, labels):
                label = label.long()
                entropy = grad_entropy if ctx.weight is None else grad_entropy * ctx.weight[label]
                at_label = place.gather(1, label).mul_(grad_overlap.gather(1, label[:, 0])[:, None]).sub_(entropy)
                mean = torch.matmul(grad_size[:, None], place).add_(at_label)
                place.mul_(grad_size[..., None] - mean)
                place.scatter_add_(1, label, at_label)
        return None, gradient, None


class _ChunkedSums(torch.autograd.Function):
    """The sums, in all other cases."""

    @staticmethod
    def forward(ctx: Any, loss: ChunkedDiceCELoss, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        ctx.loss = loss
        ctx.save_for_backward(logits, labels)
        with without_autocast(logits.device.type):
            sums = [loss._sums(*chunk) for chunk in _chunks(CHUNKS, logits, labels)]
        totals = tuple(torch.stack(parts).sum(0) for parts in zip(*sums))
        ctx.mark_non_differentiable(totals[2])
        return totals

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_overlap: Tensor, grad_size: Tensor, _: Tensor, grad_entropy: Tensor
    ) -> tuple[None, Tensor, None]:
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        with without_autocast(logits.device.type):
            for part, label, place in _chunks(CHUNKS, logits, labels, gradient):
                place.copy_(ctx.loss._gradient(part, label, grad_overlap, grad_size, grad_entropy))
        return None, gradient, None


def _chunks(least: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield at least so many equal parts of `(batch, channels, *spatial)`, as views `(batch, channels, voxels)`."""
    flat = [_flat(tensor) for tensor in tensors]
    count = max(least, tensors[0].numel() // CHUNK_ELEMENTS)
    yield from zip(*(tensor.chunk(count, 2) for tensor in flat))


def _with_flat_view(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its memory is neither in the order of its axes nor has the channels last."""
    return tensor if tensor.is_contiguous() or tensor.movedim(1, -1).is_contiguous() else tensor.contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """Return a view with one axis for all voxels."""
    if tensor.is_contiguous():
        return tensor.flatten(2)
    return tensor.movedim(1, -1).flatten(1, -2).movedim(-1, 1)
