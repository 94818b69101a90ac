"""Tests of the ruler for memory, where tensors change their size behind its back."""

from __future__ import annotations

import torch

from monai_iunet.planning.live_bytes import LiveBytes


def test_storages_emptied_without_an_operator_are_not_counted() -> None:
    """Other packages free activations by `storage.resize_(0)`, which no operator tells of."""
    freed = []
    with LiveBytes() as live:
        for _ in range(5):
            activations = torch.zeros(1000)
            output = activations + 1
            activations.untyped_storage().resize_(0)
            del output
            freed.append(activations)  # alive, without bytes
        assert live.now() == 0
    assert live.peak == 8000


def test_storages_filled_again_count_when_they_are_used() -> None:
    with LiveBytes() as live:
        values = torch.zeros(1000)
        values.untyped_storage().resize_(0)
        assert live.now() == 0
        values.untyped_storage().resize_(12000)
        values.fill_(1)
        assert live.now() == 12000
    assert live.peak == 12000
