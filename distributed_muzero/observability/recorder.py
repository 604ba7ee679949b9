"""Writes a run's metrics: metrics.jsonl, evaluations.jsonl and TensorBoard, over environment steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from distributed_muzero.files import to_json
from distributed_muzero.observability.metrics import check_known, evaluation_metrics
from distributed_muzero.run_folder import RunFolder


class Recorder:
    """Appends to the run's files; one for each run at a time. Also a context manager.

    A line of metrics.jsonl is `{"env_steps": …, "wall_time": …, "<metric>": …}`; a number that isn't finite
    becomes null. Each line is in the file when the call returns. `wall_time` (seconds since the epoch) is for
    people: nothing is decided by it.
    """

    def __init__(self, run: RunFolder, wall_clock: Callable[[], float] = time.time):
        self._wall_clock = wall_clock
        self._metrics = _open_lines(run.metrics_file)
        self._evaluations = _open_lines(run.evaluations_file)
        self._tensorboard = EventFileWriter(str(run.tensorboard))
        self._env_steps = 0
        self._closed = False

    def record(self, metrics: Mapping[str, float], env_steps: int) -> None:
        """Writes metrics as they stood after `env_steps`. Raises ValueError for an unknown name."""
        check_known(metrics)
        self._env_steps = int(env_steps)
        now = self._wall_clock()
        values = {name: float(value) for name, value in metrics.items()}
        self._metrics.write(to_json({"env_steps": self._env_steps, "wall_time": now, **values}))
        self._add_scalars(values, self._env_steps, now)

    def record_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Writes an evaluation, as the evaluator gives it (`mean_return`, `std_return`, `returns`, …).

        It belongs to its own `env_steps` if it names them, else to those of the last `record`.
        """
        now = self._wall_clock()
        env_steps = int(evaluation.get("env_steps", self._env_steps))
        self._evaluations.write(to_json({**evaluation, "env_steps": env_steps, "wall_time": now}))
        self._add_scalars(evaluation_metrics(evaluation), env_steps, now)

    def close(self) -> None:
        """Flushes and closes the files; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._tensorboard.close()
            self._metrics.close()
            self._evaluations.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_scalars(self, scalars: Mapping[str, float], env_steps: int, now: float) -> None:
        # As simple values: every reader of event files knows them as scalars, older and torch's included.
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._tensorboard.add_event(Event(wall_time=now, step=env_steps, summary=Summary(value=values)))
        self._tensorboard.flush()


def _open_lines(path: Path) -> BinaryIO:
    """Opens a file of lines to append to, without buffering. A last line that a kill cut off is dropped."""
    file = path.open("ab+", buffering=0)
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return file
