"""Which images of a batch a process segments, when several processes or machines share it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from monai_iunet.errors import InputError

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """Describes the part of a batch that a process does: of every `count` images the one with number `index`.

    Example:
        >>> share = Share.parse("2/3", {})
        >>> list(range(10))[share.index :: share.count]
        [1, 4, 7]
    """

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def parse(cls, text: str | None, environment: Mapping[str, str] = os.environ) -> Share:
        """Return the share that a user asked for.

        Args:
            text: "K/N" for the K-th of N parts; "auto" to take both from torchrun, srun or a SLURM array, or from an
                array of such; None for all.
            environment: variables of the process.

        Raises:
            InputError: when the text or the variables say nothing of the kind; when several processes were started
                without a share, so that all would do the same.
        """
        if text is None:
            if cls._of_processes(environment).count > 1:
                raise InputError(
                    "Several processes were started, and all would segment the same images. Pass --share auto."
                )
            return cls()
        if text == "auto":
            array, processes = cls._of_array(environment), cls._of_processes(environment)
            share = cls(array.index * processes.count + processes.index, array.count * processes.count)
            for part in (array, processes):
                if not 0 <= part.index < part.count:
                    raise InputError(
                        f"--share auto: this is number {part} by torchrun or SLURM. Pass K/N, such as 1/4."
                    )
            if "RANK" not in environment and "SLURM_ARRAY_TASK_ID" not in environment and share.count == 1:
                raise InputError("--share auto: neither torchrun nor SLURM started this. Pass K/N, such as 1/4.")
            return share
        number, separator, count = text.partition("/")
        try:
            share = cls(int(number) - 1, int(count))
        except ValueError:
            share = cls(-1, 0)
        if not separator or not 0 <= share.index < share.count:
            raise InputError(f"--share {text}: auto, or the K-th of N parts is needed, such as 1/4.")
        return share

    @classmethod
    def _of_processes(cls, environment: Mapping[str, str]) -> Share:
        """Return the share of a process of torchrun, or of a step that srun started."""
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return cls(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"))
        if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
            return cls(_number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS"))
        return cls()

    @classmethod
    def _of_array(cls, environment: Mapping[str, str]) -> Share:
        """Return the share of a task of a SLURM array, such as 1-8 or 0-30:10."""
        if "SLURM_ARRAY_TASK_ID" not in environment:
            return cls()
        task, first, last, step, count = (
            _number(environment, f"SLURM_ARRAY_TASK_{name}", default)
            for name, default in (("ID", "0"), ("MIN", "0"), ("MAX", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        if (last - first) // step + 1 != count:
            raise InputError("--share auto: the SLURM array leaves numbers out. Start an array such as 1-8.")
        return cls((task - first) // step, count)


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    try:
        return int(value)
    except ValueError as error:
        raise InputError(f"{name}={value}: must be a number, as torchrun and SLURM set it. Unset it.") from error
