"""Runs as jobs of a Ray cluster: submitted, listed, followed and stopped over its Jobs HTTP API.

A job is a run's if its metadata name the run. What needs the cluster's inside (the status of a run that goes on,
another number of actors) is asked by a small job that runs one of our own commands there: the caller needs no Ray of
the cluster's version, no port but the dashboard's.
"""

from __future__ import annotations

import asyncio
import datetime
import difflib
import json
import logging
import os
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RpcError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from distributed_muzero.cluster.connect import check_answers
from distributed_muzero.config import Config
from distributed_muzero.errors import ClusterError, DistributedMuZeroError, RunError, RunIsOver, first_line

# In a job's metadata.
RUN_KEY, FOLDER_KEY = "distributed_muzero_run", "distributed_muzero_runs_dir"
COMMAND_KEY = "distributed_muzero_command"
STATES = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.STOPPED: "stopped",
    JobStatus.SUCCEEDED: "finished",
    JobStatus.FAILED: "failed",
}
GOING_ON = ("pending", "running")
# Between SIGTERM and SIGKILL when a job is stopped; Ray's own 3 s are too few to drain and write a checkpoint.
STOP_WAIT_SECONDS = 40
REQUEST_SECONDS = 30.0
POLL_SECONDS = 0.5
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging",
)  # fmt: skip
AGENT_SECONDS = 60.0
COMMAND_SECONDS = 120.0  # of a small job; most of it is Ray's start of a process
LEFT_SECONDS = 60.0  # after its end, a small job's answer is nobody's any more
IS_OVER = "nothing is left to do: "  # what `train --resume auto` says of a run that has reached a limit
MAX_LISTED = 20  # runs named in an error
# Ray's tools read these, in this order.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class RunJob(NamedTuple):
    """A job that is, or was, one launch of a run."""

    run: str
    job_id: str
    state: str
    started: float | None  # seconds since 1970
    ended: float | None
    runs_dir: str | None  # if it was submitted with one

    @property
    def goes_on(self) -> bool:
        return self.state in GOING_ON

    def summary(self) -> dict[str, Any]:
        """For `runs`: times as ISO text."""
        return {
            "run": self.run,
            "state": self.state,
            "job": self.job_id,
            "started": iso_time(self.started),
            "ended": iso_time(self.ended),
        }


class Client(JobSubmissionClient):
    """Ray's, with a limit on each request."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": REQUEST_SECONDS, **options})


class Jobs:
    """The jobs of the cluster at `address`: http://HOST:8265, or whatever Ray's own tools take."""

    def __init__(self, address: str | None):
        """Raises ClusterError if no cluster answers there, or it wants another token."""
        self.address = cluster_address(address)
        if self.address is not None:
            check_answers(self.address)
            # Ray's client prefers this variable over its argument.
            os.environ[ADDRESS_VARIABLES[0]] = self.address
        with self._clear_errors():
            self._client = Client(self.address)
        # Told of each package that is uploaded, and of each end of a log.
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)

    def runs(self) -> list[RunJob]:
        """All launches that the cluster remembers, newest first."""
        return run_jobs(self._listed())

    def _listed(self) -> list[JobDetails]:
        with self._clear_errors():
            return self._client.list_jobs()

    def find(self, run: str | None) -> RunJob:
        """The newest launch of a run. Raises RunError if there is none, naming those there are.

        run: without a name, the only one that goes on, or else the newest.
        """
        jobs = self.runs()
        names = list(dict.fromkeys(job.run for job in jobs))
        if not names:
            raise RunError(f"no run{f' {run!r}' if run else ''}: the cluster has no runs yet; submit one")
        if run is None:
            going_on = [job for job in jobs if job.goes_on]
            if len(going_on) > 1:
                raise RunError(
                    f"several runs are going on: {', '.join(job.run for job in going_on)}; name one"
                )
            return (going_on or jobs)[0]
        if job := next((job for job in jobs if job.run == run), None):
            return job
        close = difflib.get_close_matches(run, names, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RunError(f"no run {run!r} in the cluster{hint}. Newest first: {', '.join(names[:MAX_LISTED])}")

    def find_or_none(self, run: str) -> RunJob | None:
        """The newest launch of a run."""
        return next((job for job in self.runs() if job.run == run), None)

    def has_ended_orderly(self, job_id: str) -> bool:
        """Whether the job lost nothing, see `lost_nothing`."""
        return lost_nothing(self.logs(job_id))

    def submit(
        self,
        run: str,
        config: Config,
        options: Sequence[str],
        packages: Sequence[Path] = (),
        runs_dir: str | None = None,
        may_exist: bool = False,
    ) -> str:
        """Starts a run and returns the job's id.

        options: of `train`, besides the config and the name.   packages: wheels that the job needs.   may_exist: an
        earlier launch is gone on from. Raises RunError for a name that is taken.
        """
        listed = self._listed()
        taken = {job.submission_id for job in listed}
        before = [job for job in run_jobs(listed) if job.run == run]
        if before and before[0].goes_on:
            raise RunError(
                f"run {run!r} is going on (job {before[0].job_id}); choose another --name, or stop it"
            )
        # One that failed may never have begun; if it did, the new one is refused by its folder.
        if any(job.state != "failed" for job in before) and not may_exist:
            raise RunError(
                f"run {run!r} exists ({before[0].state}); choose another --name, or go on with it: --resume auto"
            )
        command = ["train", "--config", "config.yaml", "--name", run, *options]
        if runs_dir is not None:
            command += ["--runs-dir", runs_dir]
        metadata = {RUN_KEY: run, **({FOLDER_KEY: runs_dir} if runs_dir else {})}
        names = (f"{run}-launch-{number}" for number in count(len(before) + 1))
        job_id = next(
            name for name in (*([] if before else [run]), *islice(names, MAX_LISTED)) if name not in taken
        )
        with tempfile.TemporaryDirectory() as folder, self._clear_errors():
            (Path(folder) / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            return self._start(
                command,
                submission_id=job_id,
                metadata=metadata,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS)},
                    **({"py_modules": [str(path) for path in packages]} if packages else {}),
                },
            )

    def _start(self, arguments: Sequence[str], **options: Any) -> str:
        """A head node that has just come up answers before it can take jobs: for a while, that is tried again."""
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                return self._client.submit_job(entrypoint=entrypoint(arguments), **options)
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_SECONDS)

    def state(self, job_id: str) -> str:
        with self._clear_errors():
            return STATES[self._client.get_job_status(job_id)]

    def logs(self, job_id: str) -> str:
        with self._clear_errors():
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str) -> Iterator[str]:
        """The job's output as it comes, until the job has ended."""
        with asyncio.Runner() as runner, self._clear_errors():
            lines = self._client.tail_job_logs(job_id)
            while (text := runner.run(next_or_none(lines))) is not None:
                yield text

    def stop(self, job_id: str) -> None:
        """Asks the job to end: SIGTERM, and SIGKILL after STOP_WAIT_SECONDS. Doesn't wait for it."""
        with self._clear_errors():
            self._client.stop_job(job_id)

    def wait(self, job_id: str, timeout_seconds: float) -> str:
        """The job's state once it has ended, or the one it is in when the time is over."""
        deadline = time.monotonic() + timeout_seconds
        while (state := self.state(job_id)) in GOING_ON and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return state

    def wait_until_started(self, job_id: str, timeout_seconds: float) -> str | None:
        """Where the run lies, once it says so; None if it says nothing in time.

        Raises RunError if the job has ended without a start, with what it said last; RunIsOver if that was for the
        best.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            state, output = self.state(job_id), self.logs(job_id)
            if place := place_in(output):
                return place
            if state not in GOING_ON:
                if reason := reason_over(output):
                    raise RunIsOver(reason)
                raise RunError(f"the run did not start, its job has {state}: {last_error(output)}")
            time.sleep(POLL_SECONDS)
        return None

    def execute(self, arguments: Sequence[str], timeout_seconds: float = COMMAND_SECONDS) -> str:
        """Runs one of our commands inside the cluster; returns what it printed. Raises RunError if it failed."""
        with self._command(arguments) as job_id:
            state = self.wait(job_id, timeout_seconds)
            output = self.logs(job_id)
        if state == "finished":
            return output
        if state in GOING_ON:
            raise ClusterError(
                f"the cluster didn't answer in {timeout_seconds:.0f} s (`{arguments[0]}` runs as a small job there); "
                "it may be busy: try again, or ask on its head node"
            )
        raise RunError(last_error(output))

    def execute_following(self, arguments: Sequence[str]) -> Iterator[str]:
        """As `execute`, but gives each line as it is printed."""
        with self._command(arguments) as job_id:
            rest = ""
            for text in self.follow(job_id):
                *lines, rest = (rest + text).split("\n")
                yield from lines
            if self.wait(job_id, REQUEST_SECONDS) == "failed":
                raise RunError(last_error(self.logs(job_id)))

    @contextmanager
    def _command(self, arguments: Sequence[str]) -> Iterator[str]:
        """The id of a small job, which is ended and forgotten afterwards."""
        with self._clear_errors():
            job_id = self._start(arguments, metadata={COMMAND_KEY: arguments[0]})
        try:
            yield job_id
        finally:
            with suppress(ClusterError):
                if self.state(job_id) in GOING_ON:
                    self.stop(job_id)
                    self.wait(job_id, REQUEST_SECONDS)
                self._forget_commands(job_id)

    def _forget_commands(self, own_id: str) -> None:
        """Also those of callers that were cut off."""
        with self._clear_errors():
            for job_id in commands_to_forget(self._client.list_jobs(), own_id):
                self._client.delete_job(job_id)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        where = f"at {self.address}" if self.address else "on this machine"
        try:
            yield
        except DistributedMuZeroError:
            raise
        except (AuthenticationError, aiohttp.WSServerHandshakeError) as error:
            if getattr(error, "status", 401) not in (401, 403):
                raise ClusterError(f"the cluster {where} refused that: {first_line(error)}") from None
            raise ClusterError(
                f"the cluster {where} refused the token: {first_line(error)}; put its token into ~/.ray/auth_token or "
                "RAY_AUTH_TOKEN and set RAY_AUTH_MODE=token"
            ) from None
        except (
            ConnectionError,
            RpcError,
            requests.exceptions.RequestException,
            aiohttp.ClientError,
        ) as error:
            raise ClusterError(
                f"no Ray cluster answers {where}: {first_line(error)}; give its address with --address "
                "http://HOST:8265 (`ray dashboard cluster.yaml` opens a tunnel to it), or set RAY_ADDRESS"
            ) from None
        except (RuntimeError, ValueError, OSError) as error:
            raise ClusterError(f"the cluster {where} refused that: {first_line(error)}") from None


def run_jobs(listed: Sequence[JobDetails]) -> list[RunJob]:
    """Those that are runs', newest first."""
    jobs = [job for details in listed if (job := as_run_job(details)) is not None]
    return sorted(jobs, key=lambda job: job.started or 0, reverse=True)


def as_run_job(details: JobDetails) -> RunJob | None:
    """None for a job that is no run's."""
    metadata = details.metadata or {}
    if RUN_KEY not in metadata or details.submission_id is None:
        return None
    return RunJob(
        metadata[RUN_KEY],
        details.submission_id,
        STATES[details.status],
        details.start_time and details.start_time / 1000,
        details.end_time and details.end_time / 1000,
        metadata.get(FOLDER_KEY),
    )


def commands_to_forget(listed: Sequence[JobDetails], own_id: str) -> list[str]:
    """Which small jobs nobody reads any more: one's own, first, and those that had ended long before it did.

    The cluster's times are compared with each other, never with those of this machine.
    """
    ended = {
        job.submission_id: job.end_time or 0
        for job in listed
        if COMMAND_KEY in (job.metadata or {}) and job.submission_id and STATES[job.status] not in GOING_ON
    }
    if own_id not in ended:
        return []
    limit = ended.pop(own_id) - 1000 * LEFT_SECONDS
    return [own_id, *(job_id for job_id, end in ended.items() if end <= limit)]


def cluster_address(address: str | None) -> str | None:
    """The address that is asked for, else the environment's; None: whichever cluster runs on this machine."""
    given = [address, *(os.environ.get(name) for name in ADDRESS_VARIABLES)]
    return next((text.rstrip("/") for text in given if text), None)


def is_http(address: str | None) -> bool:
    """Whether only the Jobs API can be reached there; other addresses are those of a cluster's inside."""
    return address is not None and address.startswith(("http://", "https://"))


def entrypoint(arguments: Sequence[str]) -> str:
    """A job's command; exec, so that a signal to the job meets Python itself."""
    return f"exec python -m distributed_muzero {shlex.join(arguments)}"


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object: Ray writes into a job's output as well. Raises ClusterError."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with suppress(ValueError):
                return json.loads(line)
    raise ClusterError(
        f"the cluster's answer can't be read: {output[-500:]!r}; is the same version installed there?"
    )


def place_in(output: str) -> str | None:
    """Where a run lies, as its job has printed; None before it has begun."""
    lines = (line for line in output.splitlines() if line.startswith("run "))
    return next((place.strip() for line in lines if (place := line.partition(" in ")[2])), None)


def lost_nothing(output: str) -> bool:
    """Whether the run's last word was that it has ended, which one that is killed has not; or it hadn't begun."""
    ends = ("finished after", "stopped after")
    return place_in(output) is None or any(line.startswith(ends) for line in output.splitlines())


def reason_over(output: str) -> str | None:
    """Which limit a run had reached before its job began, if that is what the job said."""
    found = (line.partition(IS_OVER) for line in output.splitlines())
    return next((reason for before, sign, reason in found if sign and not before), None)


def last_error(output: str) -> str:
    """What a failed command said last."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    if errors:
        return "\n".join(lines[errors[-1] :]).removeprefix("error: ")
    return "\n".join(lines[-10:]) or "it printed nothing; `ray job list` on the head node may tell why"


def iso_time(seconds: float | None) -> str | None:
    """In this machine's time zone."""
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


async def next_or_none(lines: AsyncIterator[str]) -> str | None:
    return await anext(lines, None)
