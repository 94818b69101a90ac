"""Several segmentation networks as one: the mean of their probabilities."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monai_iunet.networks.nets.scripting import Traced
from monai_iunet.networks.nets.seg_iunet import SegIUNet

__all__ = ["SegEnsemble"]


class SegEnsemble(nn.Module):
    """Averages networks of one kind that were trained on different cases.

    It returns logits whose softmax is the mean of the members' probabilities, so it is used as any one of them. The
    members are run one after another: memory grows by what the logits take. Of members with `deep_supervision` it takes
    the finest logits, in training too.

    Args:
        members: number of networks.
        options: arguments of `SegIUNet`, the same for all.

    Raises:
        ValueError: when there is no member, or a single class, whose softmax is 1.

    Example:
        >>> net = SegEnsemble(members=2, spatial_dims=3, in_channels=1, out_channels=3, channels=(8, 16)).eval()
        >>> net(torch.rand(1, 1, 16, 16, 16)).shape
        torch.Size([1, 3, 16, 16, 16])
    """

    def __init__(self, members: int, **options: Any) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(f"members must be positive, got {members}.")
        if options.get("out_channels", 2) < 2:
            raise ValueError(
                "out_channels must be 2 or more, background included, since members are averaged behind a softmax, "
                f"got {options['out_channels']}."
            )
        self.members = nn.ModuleList(SegIUNet(**options) for _ in range(members))

    @staticmethod
    def state_of(members: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the state of an ensemble, from those of its members, with what their modules note in theirs.

        Args:
            members: state of each network.

        Example:
            >>> sorted(SegEnsemble.state_of([{"bias": torch.zeros(1)}] * 2))
            ['members.0.bias', 'members.1.bias']
        """
        together = OrderedDict(
            (f"members.{number}.{name}", tensor)
            for number, state in enumerate(members)
            for name, tensor in state.items()
        )
        # What PyTorch keeps of each module beside its tensors: the version of an orthogonal matrix stands for its map.
        metadata = {
            f"members.{number}.{module}".rstrip("."): version
            for number, state in enumerate(members)
            for module, version in getattr(state, "_metadata", {}).items()
        }
        if metadata:
            together._metadata = metadata  # type: ignore[attr-defined]
        return together

    def __prepare_scriptable__(self) -> nn.Module:
        # The whole of it, since PyTorch would put a trace in the place of each member, in this ensemble itself.
        first: Any = self.members[0]
        return Traced(self, first.in_channels, first.iunet.factors)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the ensemble, `(batch, classes, *spatial)`, float32."""
        sums: list[Tensor] = []
        for member in self.members:
            logits = member(x)
            if isinstance(logits, list):
                logits = logits[0]
            logs = torch.log_softmax(logits.float(), 1)
            sums = [torch.logaddexp(sums[0], logs) if len(sums) > 0 else logs]
        return sums[0] - math.log(len(self.members))
