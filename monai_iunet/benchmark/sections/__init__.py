"""The sections of the benchmark, in the order of their worth: what comes first is measured when time is short.

To add one, write a file here with a function that yields jobs, and list its `SECTION` below:

    def _jobs(settings: Settings) -> Iterator[Job]:
        for dtype in DTYPES:
            yield Job(dtype, partial(_measure, settings, dtype))

    def _measure(settings: Settings, dtype: str) -> list[Row]:
        ...  # on settings.device, in the sizes of settings.sizes, which are small with --quick
        return [{"inferer": "streaming", "dtype": dtype, "bytes": peak, "seconds": Spread.of(times)}]

    SECTION = Section(
        "inference",
        "Title of the table",
        (("inferer", "inferer", str), ("dtype", "dtype", str), ("bytes", "bytes", number(0))),  # columns
        _jobs,
    )

A job is measured as a whole, and its rows are saved before the next one begins, so a job should last seconds. Where it
cannot be measured it raises `SkippedError` with the reason. `time_alternately` takes times. Nothing else is needed: the
command runs the section, also alone (`--section inference`), prints its table and saves its rows.
"""

from monai_iunet.benchmark.section import Section
from monai_iunet.benchmark.sections import (
    budgets,
    bundles,
    compiled,
    convolutions,
    cuda_graphs,
    depth,
    equal_cost,
    exactness,
    gradient_errors,
    inference,
    largest_cubes,
    layouts,
    losses,
    plans,
    resampling,
    second_stream,
    small_gpus,
    whole_volume,
)

__all__ = ["SECTIONS"]

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        equal_cost.MEMORY,
        exactness.SECTION,
        gradient_errors.SECTION,
        whole_volume.SECTION,
        small_gpus.SECTION,
        equal_cost.TIME,
        cuda_graphs.SECTION,
        bundles.SECTION,
        largest_cubes.SECTION,
        depth.MEMORY,
        resampling.SECTION,
        layouts.SECTION,
        convolutions.SECTION,
        depth.TIME,
        losses.SECTION,
        inference.SECTION,
        plans.SECTION,
        budgets.SECTION,
        compiled.SECTION,
        second_stream.SECTION,
    )
}
