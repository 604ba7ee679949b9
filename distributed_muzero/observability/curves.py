"""What runs have recorded, as curves: one line over all launches of a run, and mean and spread over seeds.

A run that goes on counts its time anew with each launch, may find itself a little before where a kill ended it, and
its wall clock may jump. So time here is played time, summed over the launches; and where a run went over a stretch of
the axis twice, the later time counts.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.config import Config
from distributed_muzero.errors import RunError
from distributed_muzero.run_folder import RunFolder

AXES = {"env_steps": "environment steps", "minutes": "minutes played", "learner_steps": "learner steps"}
# They begin anew with each launch, so where one of them falls, a launch begins.
OF_A_LAUNCH = ("time/seconds", "driver/cpu_seconds", "search/simulations")
# What an evaluation says besides what was measured.
ABOUT_AN_EVALUATION = {"episodes", "weights_version", "learner_steps", "env_steps", "seconds", "wall_time"}
GRID_POINTS = 200


class Curve(NamedTuple):
    x: np.ndarray  # [N] float64, never falling
    y: np.ndarray  # [N] float64, finite


class Spread(NamedTuple):
    """Several curves on one grid."""

    x: np.ndarray  # [GRID_POINTS]
    mean: np.ndarray
    std: np.ndarray  # of a sample: divided by n − 1


@dataclass(frozen=True)
class Records:
    """A run's metrics and evaluations as columns, NaN where a line doesn't have a number."""

    name: str
    config: Config
    metrics: Mapping[str, np.ndarray]  # [lines] each
    evaluations: Mapping[str, np.ndarray]  # [evaluations] each

    @property
    def names(self) -> list[str]:
        """Of everything that can be drawn, sorted: metrics as they were recorded, evaluations as `eval/…`."""
        recorded = {name for name in self.metrics if "/" in name}
        return sorted(recorded | {f"eval/{name}" for name in self.evaluations.keys() - ABOUT_AN_EVALUATION})

    def curve(self, name: str, over: str) -> Curve:
        """A metric over one of AXES; empty where nothing of it was recorded."""
        key = name.removeprefix("eval/")
        if name not in self.metrics and key in self.evaluations:
            return _curve(self._evaluations_axis(over), self.evaluations[key])
        values = self.metrics.get(name)
        return Curve(np.empty(0), np.empty(0)) if values is None else _curve(self._axis(over), values)

    def _axis(self, over: str) -> np.ndarray:
        if over == "minutes":
            return self._played_seconds() / 60
        return self._column("train/learner_steps" if over == "learner_steps" else over)

    def _column(self, name: str) -> np.ndarray:
        return self.metrics.get(name, np.full(self._num_lines, np.nan))

    @property
    def _num_lines(self) -> int:
        return len(next(iter(self.metrics.values()), ()))

    def _played_seconds(self) -> np.ndarray:
        """[lines] since the run began, as if no time had passed between its launches."""
        seconds = self._column("time/seconds")
        begins = np.zeros(self._num_lines, bool)
        for name in OF_A_LAUNCH:
            begins[1:] |= np.diff(self._column(name)) < 0
        steps = np.where(begins, seconds, np.diff(seconds, prepend=0.0))
        return np.cumsum(np.nan_to_num(steps))

    def _evaluations_axis(self, over: str) -> np.ndarray:
        own = self.evaluations
        nothing = np.full(len(own["mean_return"]), np.nan)
        if over != "minutes":
            return own.get(over, nothing)
        # An evaluation tells its launch's seconds, but not which launch: that is where the counts stood so.
        played = self._played_seconds()
        progress = self._column("env_steps") + self._column("train/learner_steps")
        known = _curve(progress, played)
        seconds = own.get("seconds", nothing)
        if not len(known.x):
            return seconds / 60
        counts = own.get("env_steps", nothing) + own.get("learner_steps", nothing)
        about = np.interp(counts, known.x, known.y)
        begins = np.unique(np.round(played - self._column("time/seconds"), 6))
        candidates = begins[:, None] + seconds
        nearest = np.abs(np.nan_to_num(candidates - about)).argmin(axis=0)
        return candidates[nearest, np.arange(len(seconds))] / 60


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    records: list[Records]

    @property
    def label(self) -> str:
        names = [records.name for records in self.records]
        if len(names) == 1:
            return names[0]
        seeds = {records.config.run.seed for records in self.records}
        what = "seeds" if len(seeds) == len(names) else "runs"
        return f"{_common(names)} ({len(names)} {what}, mean ± std)"

    def curves(self, name: str, over: str) -> list[Curve]:
        """One for each run that has recorded any."""
        found = [records.curve(name, over) for records in self.records]
        return [curve for curve in found if len(curve.x)]


def read_records(folder: RunFolder) -> Records:
    """Raises RunError if nothing is recorded yet, or it can't be read."""
    try:
        metrics = columns_of(_objects(folder.metrics_file))
    except FileNotFoundError:
        metrics = {}
    except OSError as error:
        raise RunError(f"can't read {folder.metrics_file}: {error}") from None
    if not metrics:
        raise RunError(
            f"run {folder.name!r} has recorded nothing yet in {folder.metrics_file}; a run that trains writes a line "
            "there each second"
        )
    evaluations = [line for line in folder.read_evaluations() if "mean_return" in line]
    return Records(folder.name, folder.config, metrics, columns_of(evaluations))


def columns_of(lines: Iterator[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Each number's values over all lines; NaN where it is missing or null. What is no number is left out."""
    columns: dict[str, array[float]] = {}
    num_lines = 0
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float):
                column = columns.setdefault(name, array("d"))
                column.extend(repeat(np.nan, num_lines - len(column)))
                column.append(value)
        num_lines += 1
    for column in columns.values():
        column.extend(repeat(np.nan, num_lines - len(column)))
    return {name: np.array(column) for name, column in columns.items()}


def group_by_seed(records: Sequence[Records]) -> list[Group]:
    """In the order given; where metrics are served, as little as the seed, makes no other experiment."""
    groups: dict[str, Group] = {}
    for one in records:
        config = one.config.model_dump(mode="json")
        del config["metrics"], config["run"]["seed"]
        groups.setdefault(json.dumps(config, sort_keys=True), Group([])).records.append(one)
    return list(groups.values())


def thinned(curve: Curve, most: int) -> Curve:
    """At most so many points: each the mean of as many neighbours as it takes."""
    if len(curve.x) <= most:
        return curve
    starts = np.linspace(0, len(curve.x), most, endpoint=False).astype(int)
    sizes = np.diff(starts, append=len(curve.x))
    return Curve(*(np.add.reduceat(values, starts) / sizes for values in curve))


def spread(curves: Sequence[Curve]) -> Spread | None:
    """Mean and standard deviation where all curves have something; None where that is nowhere."""
    if len(curves) < 2:
        return None
    begin, end = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if begin >= end:
        return None
    grid = np.linspace(begin, end, GRID_POINTS)
    values = np.stack([np.interp(grid, curve.x, curve.y) for curve in curves])
    return Spread(grid, values.mean(axis=0), values.std(axis=0, ddof=1))


def _curve(x: np.ndarray, y: np.ndarray) -> Curve:
    """Without the lines that a later one, not as far on, makes void; without those that hold no number."""
    reached = np.isfinite(x)
    x, y = x[reached], y[reached]
    lowest_from_here_on = np.minimum.accumulate(x[::-1])[::-1]
    counts = (x <= lowest_from_here_on) & np.isfinite(y)
    return Curve(x[counts], y[counts])


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """A file's JSON objects, a line each; a line that a kill cut off, or that isn't whole yet, is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                if isinstance(found := json.loads(line), dict):
                    yield found


def _common(names: Sequence[str]) -> str:
    """What names begin with, if that says anything; else all of them."""
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length].rstrip("-_.") if length >= 3 else ", ".join(names)
