"""The benchmark as a whole: which sections run, until when, and where the results go."""

from __future__ import annotations

import dataclasses
import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from monai_iunet.benchmark import report
from monai_iunet.benchmark.peers import INSTALL, PEERS, available_peers
from monai_iunet.benchmark.section import FULL_CPU, FULL_GPU, QUICK, Job, Row, Section, Settings, SkippedError
from monai_iunet.benchmark.sections import SECTIONS
from monai_iunet.errors import InputError

__all__ = ["run_benchmark"]


def run_benchmark(
    device: torch.device,
    output: Path,
    console: Console,
    peers: bool = False,
    quick: bool = False,
    minutes: float | None = None,
    sections: Sequence[str] = (),
    overwrite: bool = False,
) -> list[str]:
    """Measure, show, and save what was found after each job, so that whatever ends the run loses no more than one.

    What is in `output` already, from the same machine and versions, is not measured again unless its code has changed.

    Args:
        device: where the networks run.
        output: JSON file of the results, in a folder that exists.
        console: where the tables go.
        peers: whether other packages take part, those that can be imported.
        quick: whether everything is small.
        minutes: after which no further job begins.
        sections: which to run; all by default.
        overwrite: whether to measure again what is in `output`, and to replace what comes from elsewhere.

    Returns:
        What failed, a line each.

    Raises:
        InputError: for unknown sections, and for results in `output` that belong to something else.
    """
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise InputError(f"--section {', '.join(unknown)}: not one of {', '.join(SECTIONS)}.")
    sizes = QUICK if quick else FULL_GPU if device.type == "cuda" else FULL_CPU
    versions = available_peers() if peers else {}
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    settings = Settings(device, sizes, tuple(versions), deadline)
    header = {**report.header(device, versions), "sizes": dataclasses.asdict(sizes)}
    results = _continued(header, output, overwrite)
    missing = [name for name in PEERS if name not in versions]
    if peers and missing:
        console.print(f"Not importable, so left out: {', '.join(missing)}. Install with: {INSTALL}")
    console.print(f"{results['device']}, {results['threads']} threads, {results['system']}, {results['date']}")
    console.print(f"Python {results['python']}, " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()))
    console.print(f"Times: median (range) of up to {sizes.rounds} rounds, in which all take turns.\n")
    for name in results["sections"]:
        if name not in (sections or SECTIONS) and results["code"].get(name) != _code(name):
            console.print(f"{name}: kept, though its code has changed")
    failures: list[str] = []
    for name in sections or SECTIONS:
        section = SECTIONS[name]
        if section.needs_gpu and device.type != "cuda":
            console.print(f"{name}: left out, needs a GPU")
            continue
        if overwrite or results["code"].get(name) != _code(name):
            results["sections"].pop(name, None)
            results["code"][name] = _code(name)
        failures += _run_section(section, settings, results, output, console)
        if results["sections"].get(name):
            report.show(section, results["sections"][name], console)
        if time.monotonic() > deadline:
            console.print(f"{minutes:g} minutes are over. The same command goes on from here.")
            break
    return failures


def _run_section(
    section: Section, settings: Settings, results: dict[str, Any], output: Path, console: Console
) -> list[str]:
    failures = []
    rows: list[Row] = results["sections"].setdefault(section.name, [])
    for job in section.jobs(settings):
        if any(row["job"] == job.name and "failed" not in row for row in rows):
            continue
        if time.monotonic() > settings.deadline:
            break
        with console.status(f"{section.name}: {job.name}"):
            found = _measure(job)
        rows[:] = [row for row in rows if row["job"] != job.name] + found
        for row in found:
            for kind in ("skipped", "failed"):
                if kind in row:
                    console.print(f"{section.name}, {job.name}: {kind}, {escape(row[kind])}")
            if "failed" in row:
                failures.append(f"{section.name}, {job.name}: {row['failed']}")
        report.write_json(results, output)
    return failures


def _measure(job: Job) -> list[Row]:
    """Return the rows of a job. What fails does not take the others along."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="memcnn")
            return [{"job": job.name, **row} for row in job.measure()]
    except SkippedError as reason:
        return [{"job": job.name, "skipped": str(reason)}]
    except torch.OutOfMemoryError:
        return [{"job": job.name, "skipped": "out of memory"}]
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return [{"job": job.name, "failed": f"{type(error).__name__}: {first}"}]
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def _code(name: str) -> str | None:
    return report.code_of(SECTIONS[name]) if name in SECTIONS else None


def _continued(header: dict[str, Any], output: Path, overwrite: bool) -> dict[str, Any]:
    """Return the results so far, none if there are none."""
    new: dict[str, Any] = {**header, "code": {}, "sections": {}}
    if not output.exists():
        return new
    try:
        found = report.read_json(output)
        differing = [key for key in header if key != "date" and found.get(key) != report.for_json(header[key])]
    except (ValueError, AttributeError) as error:
        if overwrite:
            return new
        raise InputError(f"{output}: holds no results of a benchmark. Name another --output.") from error
    if not differing:
        return {**found, "date": header["date"]}
    if overwrite:
        return new
    raise InputError(
        f"{output}: its results come from another {', '.join(differing)}. Pass --overwrite to replace them, or name "
        "another --output."
    )
