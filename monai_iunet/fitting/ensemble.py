"""The networks of all folds together, beside the best one of them: which is more accurate, and what each costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from monai.bundle import ConfigParser
from rich.table import Table

from monai_iunet.bundling.task import Task
from monai_iunet.bundling.workflows import inference_config
from monai_iunet.fitting.cross_validation import Score, summarize, summarize_gain
from monai_iunet.io.files import check_folder
from monai_iunet.io.weights import read_weights, write_state
from monai_iunet.networks.nets.seg_ensemble import SegEnsemble
from monai_iunet.training.record import record_file, training_record, write_record
from monai_iunet.training.seen_cases import TRAINED_ON

__all__ = ["Comparison", "Judged", "write_ensemble"]


@dataclass(frozen=True)
class Judged:
    """What the judging cases say of a network.

    Attributes:
        name: of the network.
        scores: per case and structure.
        seconds: per case, of the processor if there is no GPU.
    """

    name: str
    scores: list[Score]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The best network of a fold and the ensemble of all, on the same cases.

    Attributes:
        best: the best network, by its own validation.
        ensemble: the ensemble.
        structures: their names.
        fair: whether no member of the ensemble was trained on the cases; if not, it is judged too well.
        unit: of the seconds.

    Example:
        >>> from monai_iunet.fitting.cross_validation import MEASURES
        >>> best, ensemble = (
        ...     Judged(name, [Score(str(case), "liver", dict.fromkeys(MEASURES, dice)) for case in range(9)], seconds)
        ...     for name, dice, seconds in (("fold_0", 0.8, 1.0), ("ensemble", 0.9, 5.0))
        ... )
        >>> Comparison(best, ensemble, ("liver",), fair=True, unit="s").ensemble_is_better
        True
    """

    best: Judged
    ensemble: Judged
    structures: tuple[str, ...]
    fair: bool
    unit: str

    @property
    def ensemble_is_better(self) -> bool:
        """Whether the ensemble has a higher mean Dice, by more than the cases differ by chance."""
        return self.fair and summarize_gain(self.best.scores, self.ensemble.scores)[1] > 0

    def sentence(self) -> str:
        """Say which of the two is used, and why."""
        cases = len({score.case for score in self.best.scores})
        if not self.fair:
            return (
                f"No case was kept from all folds. These {cases} are those that {self.best.name} was validated on, and "
                "all other members of the ensemble were trained on them, so its Dice is too good and cannot be "
                f"compared; the times can. {self.best.name} is used."
            )
        gain, low, high = summarize_gain(self.best.scores, self.ensemble.scores)
        chosen = "the ensemble" if self.ensemble_is_better else self.best.name
        return (
            f"Neither was trained or chosen by these {cases} cases. With the ensemble the mean Dice of a case is "
            f"{gain:+.4f} ({low:+.4f} to {high:+.4f}, 95 % interval); it is used if all of that is above zero: "
            f"{chosen} is used."
        )

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for judged in (self.best, self.ensemble):
            mean = summarize(judged.scores, self.structures)[-1]
            interval = f"{mean['dice_low']:.3f} to {mean['dice_high']:.3f}"
            rows.append((judged.name, f"{mean['dice']:.3f}", interval, f"{judged.seconds:.2f}"))
        return rows

    def table(self) -> Table:
        """Return the comparison as a table to print."""
        title = f"Best network and ensemble\n{self.sentence()}"
        table = Table("", "Dice", "95 % interval", f"{self.unit} per case", title=title)
        for row in self._rows():
            table.add_row(*row)
        return table

    def as_markdown(self) -> str:
        """Return the comparison as text and a table in Markdown."""
        rows = "\n".join(f"| {' | '.join(row)} |" for row in self._rows())
        return (
            f"{self.sentence()}\n\n| network | Dice | 95 % interval | {self.unit} per case |\n|---|---|---|---|\n{rows}"
        )


def write_ensemble(members: Sequence[Path], task: Task, path: Path) -> None:
    """Write the weights of an ensemble, and what its training was given.

    Args:
        members: files of the members' weights, with `training.json` beside them.
        task: of the ensemble.
        path: file to write.
    """
    check_folder(path.parent)
    parser = ConfigParser(inference_config(task))
    network = parser.get_parsed_content("network_def")
    records = [json.loads(record_file(member).read_text(encoding="utf-8")) for member in members]
    of_all = {name: value for name, value in records[0].items() if name not in ("fold", "folds")}
    trained_on = sorted({digest for record in records for digest in record.get(TRAINED_ON, ())})
    write_record({**of_all, "network": training_record(network, [])["network"], TRAINED_ON: trained_on}, path)
    write_state(SegEnsemble.state_of([read_weights(member) for member in members]), path)
