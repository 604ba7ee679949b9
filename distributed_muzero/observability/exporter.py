"""A run's metrics for Prometheus: one HTTP port, and a file by which Prometheus finds it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from distributed_muzero.config import MetricsConfig
from distributed_muzero.errors import RunError, RunTakenOver
from distributed_muzero.files import write_atomically
from distributed_muzero.observability.metrics import PREFIX, metric_of
from distributed_muzero.run_folder import RunFolder
from distributed_muzero.version import __version__

ELSEWHERE = "192.0.2.1"  # an address that is nobody's (RFC 5737)
TARGETS_FOLDER = ".prometheus"  # in the folder of all runs; Prometheus looks for one file a run there


def serve_metrics(folder: RunFolder) -> AbstractContextManager[Exporter | None]:
    """A run's exporter, where its config asks for one. Raises RunError if the port is taken."""
    targets, config = folder.path.parent / TARGETS_FOLDER, folder.config.metrics
    if config.port is not None:
        return Exporter(folder.name, config, targets)
    _remove(targets / f"{folder.name}.json")  # of an earlier launch that was killed
    return nullcontext()


def check_port(config: MetricsConfig) -> None:
    """Raises RunError if metrics can't be served where the config says."""
    if config.port is not None:
        Exporter("", config).close()


class Exporter(Collector):
    """Serves what it was told last. Also a context manager, which ends the server."""

    def __init__(self, run: str, config: MetricsConfig, targets: Path | None = None):
        """targets: the folder that gets the file for Prometheus' file discovery, for as long as this lives.

        Raises RunError if the port is taken, or no port of this machine.
        """
        self._run = run
        self._values: dict[str, float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            host = _reachable(config.host)
            self._server, self._thread = start_http_server(config.port or 0, config.host, registry)
        except (OSError, OverflowError) as error:
            raise RunError(
                f"metrics can't be served on {config.host} port {config.port}: {error}; "
                "choose another with --metrics-port, or 0 for any that is free; or another metrics.host"
            ) from None
        self.address = f"{host}:{self._server.server_port}"
        self._target_file = targets / f"{run}.json" if targets else None
        if self._target_file:
            try:
                self._target_file.parent.mkdir(exist_ok=True)
                write_atomically(self._target_file, json.dumps([{"targets": [self.address]}]).encode())
            except OSError as error:
                self.close()
                raise RunError(f"{self._target_file}, where Prometheus looks for runs: {error}") from None

    def update(self, metrics: Mapping[str, float]) -> None:
        """Takes new numbers by their recorded names; others stay as they were."""
        self._values = {**self._values, **metrics}

    def collect(self) -> Iterator[Metric]:
        """Called by the server for each scrape."""
        return families(self._run, self._values)

    def describe(self) -> Iterable[Metric]:
        """Nothing yet: a registry would collect to find out."""
        return ()

    def close(self, forget: bool = True) -> None:
        """forget: the file for Prometheus goes too; else it finds that the run doesn't answer, and tells.

        A run that was taken over goes on elsewhere: nothing is to be told here.
        """
        if self._target_file and forget:
            _remove(self._target_file)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(forget=error is None or issubclass(error, RunTakenOver))


def families(run: str, values: Mapping[str, float]) -> Iterator[Metric]:
    """What is exported for these numbers; every series carries the run's name, and its label if it has one."""
    info = GaugeMetricFamily(f"{PREFIX}run_info", "the run that is exported here", labels=("run", "version"))
    info.add_metric((run, __version__), 1)
    yield info
    found: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for name, value in values.items():
        metric, label_value = metric_of(name)
        if metric.name not in found:
            family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            labels = ("run", metric.label) if metric.label else ("run",)
            text = f"{metric.help} ({metric.unit})"
            found[metric.name] = family(PREFIX + metric.exported, text, labels=labels)
        found[metric.name].add_metric((run, label_value) if metric.label else (run,), value)
    yield from found.values()


def _remove(file: Path) -> None:
    with suppress(OSError):
        file.unlink()


def _reachable(host: str) -> str:
    """What Prometheus asks for, where all addresses of this machine answer: the one that packets leave by."""
    if host in ("", "0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((ELSEWHERE, 9))  # sends nothing
            except OSError:  # no network
                return "127.0.0.1"
            return probe.getsockname()[0]
    return f"[{host}]" if ":" in host else host
