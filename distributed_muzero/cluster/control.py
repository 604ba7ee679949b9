"""From a node of the cluster to a run that goes on there: its status, and what it is asked to be."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from distributed_muzero.cluster.connect import connect
from distributed_muzero.cluster.jobs import Jobs, RunJob
from distributed_muzero.cluster.run_control import NAMESPACE, Desired
from distributed_muzero.errors import DistributedMuZeroError, RunError
from distributed_muzero.run_folder import counts_of
from distributed_muzero.workers.runs import last_status

ANSWER_SECONDS = 20.0


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Joins the cluster whose node this is. Raises ClusterError if there is none, or it wants another token."""
    connect(address or "auto")
    try:
        yield
    finally:
        ray.shutdown()


def names_going_on() -> list[str]:
    """The runs of this cluster whose RunControl lives, sorted."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in actors if actor["namespace"] == NAMESPACE)


def run_status(run: str | None, runs_dir: Path | str, address: str | None) -> dict[str, Any]:
    """A run's status as the run itself tells it; of one that has ended, what its folder and its job tell.

    run: without a name, the only run that goes on, or the newest.   address: of the cluster that was joined. Raises
    RunError if there is no such run.
    """
    run = run or _only_run(address)
    if run in names_going_on():
        with suppress(RunError):  # it may end just now
            return going_on_status(run)
    job = Jobs(address).find(run)
    status: dict[str, Any] = {}
    with suppress(RunError):
        status = last_status(run, job.runs_dir or str(runs_dir)) or {}
    return status_by(job, status)


def going_on_status(run: str) -> dict[str, Any]:
    """As the run itself tells it. Raises RunError if it isn't going on."""
    return _ask(run, "get_status") or {"run": run, "state": "starting"}


def status_by(job: RunJob, status: Mapping[str, Any]) -> dict[str, Any]:
    """The status of a run that doesn't answer itself.

    job: its newest launch.   status: what its folder says, perhaps still of a launch before: then the job's state
    counts, and if that one goes on, nothing of the status.
    """
    written = written_at(status)
    is_old = job.started is None or written is None or written < job.started
    if job.goes_on:
        return {**({} if is_old else status), "run": job.run, "state": job.state}
    if not is_old and status.get("state") in ("finished", "stopped", "failed"):
        return {**status, "run": job.run}
    return counts_of(status, job.run, job.state)


def written_at(status: Mapping[str, Any]) -> float | None:
    """When a status was written, in seconds since 1970; None if it doesn't say."""
    updated = status.get("updated")
    return updated and datetime.datetime.fromisoformat(updated).timestamp()


def change(run: str, **wishes: Any) -> Desired:
    """Asks a run that goes on to be otherwise; returns all that it is asked to be. Raises RunError."""
    return Desired(*_ask(run, "set_desired", **wishes))


def _only_run(address: str | None) -> str:
    names = names_going_on()
    if len(names) > 1:
        raise RunError(f"several runs are going on: {', '.join(names)}; name one")
    return names[0] if names else Jobs(address).find(None).run


def _ask(run: str, method: str, **arguments: Any) -> Any:
    try:
        control = ray.get_actor(run, namespace=NAMESPACE)
        return ray.get(getattr(control, method).remote(**arguments), timeout=ANSWER_SECONDS)
    except RayTaskError as error:
        if isinstance(error.cause, DistributedMuZeroError):
            raise error.cause from None
        raise
    except (ValueError, RayActorError):
        names = ", ".join(names_going_on()) or "none"
        raise RunError(f"run {run!r} isn't going on in this cluster. Going on: {names}") from None
    except GetTimeoutError:
        raise RunError(
            f"run {run!r} gave no answer in {ANSWER_SECONDS:.0f} s; its node may be overloaded: try again"
        ) from None
