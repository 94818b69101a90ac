"""Learning from cases in which not every structure was contoured.

A structure without voxels in a case may exist, but was not drawn. Counting its voxels as background would teach the
network not to find it. In such a case the structure and the background are one class, "either of them", whose
probability is the sum of both; the loss is taken over that class and the structures that were contoured. In logits,

    log sum over the merged classes of exp(logit)

is the logit of the merged class, so any loss with a softmax can be applied to it.

Source: Shi et al., Marginal loss and exclusion loss for partially supervised multi-organ segmentation, 2021
(arXiv 2007.03868).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.networks import one_hot
from monai.transforms import MapTransform
from torch import Tensor, nn

from monai_iunet.losses.class_numbers import check_labels, check_one_channel

__all__ = ["MarginalLoss", "NoteContouredd", "OneHotContouredd"]

UNKNOWN = -1


class NoteContouredd(MapTransform):
    """Note which classes a label map contains, before it is cropped: adds `KEY_contoured`, `(num_classes,)`, bool.

    Args:
        keys: label maps `(1, *spatial)` of class numbers.
        num_classes: number of classes, background included, which always counts as contoured.

    Raises:
        ValueError: for labels that are not the number of a class, and for maps of several channels.

    Example:
        >>> labels = torch.tensor([[[0, 2], [0, 2]]])
        >>> NoteContouredd("label", num_classes=3)({"label": labels})["label_contoured"].tolist()
        [True, False, True]
    """

    def __init__(self, keys: KeysCollection, num_classes: int) -> None:
        super().__init__(keys)
        self.num_classes = num_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            labels = torch.as_tensor(item[key])
            check_one_channel(labels, str(key))
            check_labels(labels, self.num_classes, str(key))
            contoured = torch.bincount(labels.long().flatten(), minlength=self.num_classes) > 0
            contoured[0] = True
            item[f"{key}_contoured"] = contoured
        return item


class OneHotContouredd(MapTransform):
    """Turn class numbers into one channel per class, in which a class that was not contoured is -1 everywhere.

    Args:
        keys: label maps `(1, *spatial)`, whose contoured classes `NoteContouredd` has noted.

    Raises:
        ValueError: for labels that are not the number of a class, as if they were resampled linearly, and for maps of
            several channels.

    Example:
        >>> data = NoteContouredd("label", num_classes=3)({"label": torch.tensor([[0, 2]])})
        >>> OneHotContouredd("label")(data)["label"].tolist()
        [[1.0, 0.0], [-1.0, -1.0], [0.0, 1.0]]
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            contoured = item[f"{key}_contoured"]
            labels = torch.as_tensor(item[key])
            check_one_channel(labels, str(key))
            check_labels(labels, len(contoured), str(key))
            channels = one_hot(labels, num_classes=len(contoured), dim=0)
            channels[~contoured] = UNKNOWN
            item[key] = channels
        return item


class MarginalLoss(nn.Module):
    """Computes a loss in which structures that were not contoured in a case are merged with the background.

    Args:
        loss: takes logits and one-hot target, both `(1, classes, *spatial)`, with the background first; for example
            `monai.losses.DiceCELoss(softmax=True, include_background=False)`.

    Raises:
        ValueError: when the loss is one of MONAI's that takes no softmax, as by default, or has such a part.

    Example:
        >>> from monai.losses import DiceCELoss
        >>> loss = MarginalLoss(DiceCELoss(softmax=True, include_background=False))
        >>> target = torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
        >>> surely_class_2 = torch.tensor([0.0, 0.0, 100.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
        >>> round(loss(surely_class_2, target).item(), 4)
        0.0
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        names = "softmax", "use_softmax", "other_act"
        modules = loss.modules() if isinstance(loss, nn.Module) else ()
        parts = [part for part in modules if any(hasattr(part, name) for name in names)]
        without = [part for part in parts if not any(getattr(part, name, None) for name in names)]
        if without:
            what = type(loss).__name__
            what = what if len(without) == len(parts) else f"the {type(without[0]).__name__} of {what}"
            raise ValueError(
                f"loss must take a softmax of the logits, since that is what merges classes; {what} takes none. Build "
                "it with softmax=True; FocalLoss with use_softmax=True, which in a DiceFocalLoss can be set: "
                "`loss.focal.use_softmax = True`."
            )
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the mean of the loss over the samples, in float32; one in which no structure was contoured adds 0.

        Args:
            input: logits `(batch, classes, *spatial)`.
            target: of the same shape; one-hot, -1 in the channels of classes that were not contoured.

        Raises:
            ValueError: when the shapes differ, or the target is not one-hot.
        """
        if input.shape != target.shape:
            raise ValueError(
                f"target must be one-hot, of the shape of the logits {tuple(input.shape)}, got {tuple(target.shape)}. "
                "OneHotContouredd makes it."
            )
        losses = []
        # MONAI's losses sum over voxels in the type of the logits, which a float16 leaves at 65,504.
        for logits, truth in zip(input.to(torch.promote_types(input.dtype, torch.float32)), target):
            known = truth.flatten(1).amin(1) >= 0  # resampling may have changed the last digit of -1
            known[0] = False
            if not known.any():
                # A single class is certain: no loss, and no gradient, whatever the logits are.
                losses.append(torch.where(torch.zeros_like(logits, dtype=torch.bool), logits, 0).sum())
                continue
            if truth[0].amin() < 0 or truth.amax() >= 2:
                raise ValueError(
                    "target must be one-hot: 0 and 1, and -1 in the channels of classes that were not contoured, of "
                    f"which the background is none. Got down to {truth[0].amin():g} in the background, and up to "
                    f"{truth.amax():g}. OneHotContouredd makes it."
                )
            background = logits[~known].logsumexp(0, keepdim=True)
            merged = torch.cat([background, logits[known]])
            losses.append(self.loss(merged[None], torch.cat([truth[:1], truth[known]])[None]))
        return torch.stack(losses).mean()
