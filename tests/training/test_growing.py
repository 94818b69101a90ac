"""Patches that grow during a training, and the state of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose

from monai_iunet import Checkpoints, GrowingPatches, InputError, TimedDecay, TrainingPatchd, write_bundle
from tests.bundles.helpers import run
from tests.bundles.made_data import SMALL_TASK, make_hippocampus_data

SIZES = [(8, 8, 8), (16, 8, 8), (16, 16, 16)]


def test_no_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="growing: no sizes"):
        GrowingPatches([])


def sizes_seen(
    epochs: int,
    before: int = 0,
    share: float | None = None,
    sizes: Any = SIZES,
    epoch_length: int | None = None,
    **loading: Any,
) -> list[tuple[int, ...]]:
    """Sizes of the patches of a training, epoch by epoch, which goes on after some."""
    item = {"image": torch.rand(1, 20, 20, 20), "label": torch.zeros(1, 20, 20, 20)}
    patches = Compose([TrainingPatchd(["image", "label"], "whole")])
    seen = []
    trainer: Any = Engine(lambda _, batch: seen.append(tuple(batch["image"].shape[2:])))
    trainer.data_loader = DataLoader(
        CacheDataset([item] * 2 if epoch_length else [item], patches, progress=False), **loading
    )
    schedule = None
    if share is not None:
        schedule = TimedDecay(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), max_seconds=100)
        schedule.used = 100 * share
    GrowingPatches(sizes, schedule).attach(trainer)
    trainer.state.epoch = before
    trainer.state.max_epochs = epochs
    trainer.run(trainer.data_loader, epoch_length=epoch_length)
    return seen


def test_each_size_gets_its_part_whenever_the_training_goes_on() -> None:
    whole = sizes_seen(9)
    assert whole == [size for size in SIZES for _ in range(3)]
    for before in (1, 3, 5, 8):
        assert sizes_seen(9, before) == whole[before:]
    assert sizes_seen(4, sizes=[SIZES[0], "whole"]) == [SIZES[0]] * 2 + [(20, 20, 20)] * 2


def test_workers_that_would_not_see_them_grow_are_refused() -> None:
    for options in ({"persistent_workers": True}, {"epoch_length": 1}):
        with pytest.raises(InputError, match="growing: workers"):
            sizes_seen(2, sizes=SIZES[:2], num_workers=1, **options)
    assert sizes_seen(2, sizes=SIZES[:2], num_workers=1) == SIZES[:2]


@pytest.mark.parametrize(("share", "size"), [(0.0, SIZES[0]), (0.34, SIZES[1]), (0.67, SIZES[2]), (1.0, SIZES[2])])
def test_where_time_is_what_is_given_it_is_divided(share: float, size: tuple[int, ...]) -> None:
    assert sizes_seen(1, share=share) == [size]


def test_a_training_without_such_patches_is_refused() -> None:
    trainer: Any = Engine(lambda *_: None)
    for loader in (DataLoader(CacheDataset([0], Compose([]), progress=False)), [{"image": torch.zeros(1)}]):
        trainer.data_loader = loader
        with pytest.raises(InputError, match="no TrainingPatchd"):
            GrowingPatches(SIZES).attach(trainer)
    with pytest.raises(InputError, match="roi_size"):
        GrowingPatches([(8, 8)])


@pytest.mark.long
def test_a_bundle_whose_patches_grow_goes_on_as_if_it_had_not_been_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_hippocampus_data(tmp_path / "data", training=3, validation=0)
    bundle = write_bundle(replace(SMALL_TASK, batch_size=1, folds=3), tmp_path / "small")
    options: dict[str, Any] = {
        "dataset_dir": data, "device": "$torch.device('cpu')", "val_interval": 2, "max_epochs": 6, "roi_size": "whole",
        "network_def__channels": [4, 8], "network_def__couplings": 1, "patience": 1000,
    }  # fmt: skip
    growing = [[8, 8, 8], [16, 24, 16]]
    run(bundle, "train.json", ckpt_dir=tmp_path / "whole", growing=growing, **options)
    save = Checkpoints._save

    def stop_behind_third(self: Checkpoints, trainer: Any, validator: Any) -> None:
        save(self, trainer, validator)
        if trainer.state.epoch == 3:
            raise KeyError("stopped")

    monkeypatch.setattr(Checkpoints, "_save", stop_behind_third)
    with pytest.raises((KeyError, RuntimeError)):
        run(bundle, "train.json", ckpt_dir=tmp_path / "stopped", growing=growing, **options)
    monkeypatch.undo()
    with pytest.raises(RuntimeError) as refused:
        run(bundle, "train.json", ckpt_dir=tmp_path / "stopped", resume=True, growing=growing[:1], **options)
    assert "given something else: growing" in str(refused.getrepr(chain=True))
    run(bundle, "train.json", ckpt_dir=tmp_path / "stopped", resume=True, growing=growing, **options)
    whole, stopped = (
        torch.load(tmp_path / name / "model_final.pt", weights_only=True) for name in ("whole", "stopped")
    )
    assert all(torch.equal(stopped[key], tensor) for key, tensor in whole.items())
