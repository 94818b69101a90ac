"""Parts of a batch: under torchrun, SLURM and by hand, no image twice and none left out."""

from __future__ import annotations

import pytest

from monai_iunet.errors import InputError
from monai_iunet.segmentation.share import Share

IMAGES = list(range(11))


def covered(shares: list[Share]) -> list[int]:
    return sorted(image for share in shares for image in IMAGES[share.index :: share.count])


def array(task: int, low: int, high: int, step: int = 1) -> dict[str, str]:
    count = (high - low) // step + 1
    values = {"ID": task, "MIN": low, "MAX": high, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def test_parts_by_hand() -> None:
    assert covered([Share.parse(f"{number}/3", {}) for number in (1, 2, 3)]) == IMAGES
    assert Share.parse(None, {}) == Share(0, 1)
    assert str(Share.parse("2/3", {})) == "2/3"


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/2", "", "1/2/3"])
def test_no_parts(text: str) -> None:
    with pytest.raises(InputError, match="K-th of N parts"):
        Share.parse(text, {})


def test_processes_of_torchrun_and_srun() -> None:
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "3"} for rank in range(3)]
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3"} for rank in range(3)]
    for environments in (ranks, tasks):
        assert covered([Share.parse("auto", environment) for environment in environments]) == IMAGES
        with pytest.raises(InputError, match="Pass --share auto"):
            Share.parse(None, environments[0])


def test_arrays_of_slurm() -> None:
    assert covered([Share.parse("auto", array(task, 1, 4)) for task in range(1, 5)]) == IMAGES
    assert covered([Share.parse("auto", array(task, 0, 30, 10)) for task in (0, 10, 20, 30)]) == IMAGES
    both = [{**array(task, 1, 2), "RANK": str(rank), "WORLD_SIZE": "2"} for task in (1, 2) for rank in (0, 1)]
    assert covered([Share.parse("auto", environment) for environment in both]) == IMAGES
    with pytest.raises(InputError, match="leaves numbers out"):
        Share.parse("auto", {**array(5, 1, 7), "SLURM_ARRAY_TASK_COUNT": "3"})


def test_auto_needs_somebody_who_starts_processes() -> None:
    with pytest.raises(InputError, match="neither torchrun nor SLURM"):
        Share.parse("auto", {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "two"},
        {**array(1, 1, 4), "SLURM_ARRAY_TASK_ID": "5"},
    ],
)
def test_variables_that_say_nonsense_are_one_line(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"Unset it\.|Pass K/N"):
        Share.parse("auto", environment)
