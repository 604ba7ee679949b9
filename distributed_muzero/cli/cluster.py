"""`submit`, `status`, `logs`, `scale`, `stop`, `runs`: runs in a cluster, from one of its nodes or from anywhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed_muzero import run_folder
from distributed_muzero.cli import options
from distributed_muzero.cli.train import asks_for_shards
from distributed_muzero.errors import ClusterError, ConfigError, RunError, RunIsOver

START_SECONDS = 120.0
STOP_SECONDS = 60.0
WATCH_SECONDS = 2.0
WATCH_URI_SECONDS = 5.0  # each look is several requests
MAX_FAILURES = 5  # looks in a row that fail while a run is watched
AT_WORK = ("pending", *run_folder.AT_WORK)
WATCH_JOB_SECONDS = 600.0  # of one small job that watches for somebody outside

Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster: http://HOST:8265, or on one of its nodes `auto`. "
        "Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, then a cluster on this machine."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, one object a line.")]
Run = Annotated[str, typer.Argument(help="A run's name.")]


def submit(
    address: Address = None,
    preset: options.Preset = None,
    env: options.Env = None,
    trust_env_code: options.TrustEnvCode = False,
    config: options.ConfigFile = None,
    name: options.Name = None,
    runs_dir: Annotated[
        str | None,
        typer.Option(
            help="The folder of all runs, on the cluster; default: its own DISTRIBUTED_MUZERO_RUNS_DIR."
        ),
    ] = None,
    seed: options.Seed = None,
    actors: options.Actors = None,
    autoscale: options.Autoscale = None,
    envs_per_actor: options.EnvsPerActor = None,
    shards: options.Shards = None,
    max_env_steps: options.MaxEnvSteps = None,
    max_train_steps: options.MaxTrainSteps = None,
    max_minutes: options.MaxMinutes = None,
    stop_at_return: options.StopAtReturn = None,
    metrics_port: options.MetricsPort = None,
    set_: options.Set = None,
    resume: options.ResumeOption = options.Resume.never,
    offline: options.Offline = None,
    take_over: options.TakeOver = False,
    package: Annotated[
        list[Path] | None, typer.Option(help="A wheel that the run needs, such as your environment's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train in a cluster: as `train`, but as a job that goes on when this command has ended.

    Files of --offline are the cluster's. What is installed there is what runs.
    """
    choices = options.Choices(
        preset, env, config, name, seed, actors, autoscale, envs_per_actor, shards, max_env_steps, max_train_steps,
        max_minutes, stop_at_return, metrics_port, set_, resume, offline,
    )  # fmt: skip
    chosen = choices.make_config()
    for path in package or []:
        if path.suffix != ".whl" or not path.is_file():
            raise ConfigError(f"--package {path}: expected a wheel; `pip wheel --no-deps FOLDER` makes one")
    from distributed_muzero.cluster.jobs import Jobs
    from distributed_muzero.mirror.uri import is_uri
    from distributed_muzero.run_folder import check_name, default_run_name

    run = default_run_name(chosen) if name is None else name
    check_name(run)
    for option, place in (("--runs-dir", runs_dir), *(("--offline", path) for path in offline or [])):
        if place is not None and not is_uri(place) and not Path(place).is_absolute():
            raise ConfigError(f"{option} {place}: expected an absolute path on the cluster, or a URI")
    jobs = Jobs(address)
    may_exist = resume is options.Resume.auto
    arguments = ["--resume", resume.value, *(word for path in offline or [] for word in ("--offline", path))]
    if take_over:
        arguments.append("--take-over")
    if trust_env_code:
        arguments.append("--trust-env-code")
    if asks_for_shards(shards, set_):
        arguments += ["--shards", str(chosen.replay.num_shards)]  # else that of an earlier launch counts
    job_id = jobs.submit(run, chosen, arguments, package or [], runs_dir, may_exist)
    _tell(f"submitted as job {job_id}; waiting for it to start")
    try:
        folder = jobs.wait_until_started(job_id, START_SECONDS)
    except RunIsOver as over:
        found = {"run": run, "job": job_id, "folder": None, "over": str(over)}
        print(json.dumps(found) if as_json else f"nothing is left to do: {over}")
        return
    if as_json:
        print(json.dumps({"run": run, "job": job_id, "folder": folder}))
        return
    print(f"run {run} in {folder}" if folder else f"run {run}, which hasn't begun yet")
    where = f" --address {address}" if address else ""
    for command in (f"status {run} --watch", f"logs {run} -f", f"scale {run} --actors 4", f"stop {run}"):
        print(f"  distributed-muzero {command}{where}")


def status(
    run: Annotated[
        str | None, typer.Argument(help="A run's name; default: the one that goes on, or the last.")
    ] = None,
    address: Address = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until the run has ended.")] = False,
    as_json: Json = False,
    runs_dir: options.RunsDir = options.RUNS,
    watch_seconds: Annotated[float | None, typer.Option(hidden=True)] = None,
) -> None:
    """How a run stands: in a cluster, or, where there is none, in the runs folder here."""
    from distributed_muzero.cli.status_view import show

    statuses = watched(run, address, runs_dir, watch, watch_seconds)
    if as_json:
        for found in statuses:
            print(json.dumps(found), flush=True)
    else:
        show(statuses)


def watched(
    run: str | None, address: str | None, runs_dir: str, watch: bool, watch_seconds: float | None
) -> Generator[dict[str, Any], None, None]:
    """The run's status; with `watch`, every few seconds until the run, or the time, is over."""
    from distributed_muzero.cluster.jobs import Jobs, cluster_address, is_http, last_json
    from distributed_muzero.workers.runs import folder_here

    where = cluster_address(address)
    here = folder_here(runs_dir)
    if where is None and (at_work := run_at_work(run, here)):
        # Its driver writes there what it would answer, and how it ends: the Ray that it may have started doesn't tell.
        yield from _of_a_folder(at_work, here, watch)
        return
    if is_http(where):
        run = Jobs(where).find(run).run
    arguments = ["status", *([run] if run else []), "--json"]
    if is_http(where) and not watch:
        yield last_json(Jobs(where).execute(arguments))
        return
    if is_http(where):
        state = "running"
        while state in AT_WORK:
            state = "unknown"
            more = [*arguments, "--watch", "--watch-seconds", str(WATCH_JOB_SECONDS)]
            for line in Jobs(where).execute_following(more):
                if line.startswith("{"):
                    found = json.loads(line)
                    state = found["state"]
                    yield found
        if state == "unknown":
            raise ClusterError("the cluster gave no status; is the same version installed there?")
        return
    from distributed_muzero.cluster.control import joined, run_status

    deadline = time.monotonic() + (watch_seconds or float("inf"))
    with ExitStack() as stack:
        try:
            stack.enter_context(joined(where))
        except ClusterError as error:
            if where is not None:
                raise
            yield from _of_a_folder(run, runs_dir, watch, error)
            return
        while True:
            try:
                found = run_status(run, runs_dir, where)
            except (RunError, ClusterError) as unknown:
                # Perhaps that was the Ray of a `train` on this machine, which has no other runs and no jobs.
                if where is not None or (run is None and isinstance(unknown, RunError)):
                    raise
                yield from _of_a_folder(run, runs_dir, watch, unknown)
                return
            if where is None and (another := another_of_its_name(found, runs_dir)):
                _tell(another)
                yield from _of_a_folder(run, runs_dir, watch)
                return
            yield found
            if not watch or found["state"] not in AT_WORK or time.monotonic() >= deadline:
                return
            time.sleep(WATCH_SECONDS)


def _of_a_folder(
    run: str | None, runs_dir: str, watch: bool, error: ClusterError | RunError | None = None
) -> Iterator[dict[str, Any]]:
    """Of a run of `train` on this machine, or at a URI.   error: why no cluster tells of it."""
    from distributed_muzero.mirror.uri import is_uri
    from distributed_muzero.workers.runs import status_source

    why = f"; and {error}" if error else ""
    chosen = run or run_at_hand(runs_dir)
    if chosen is None:
        raise RunError(f"{runs_dir} holds no runs{why}")
    try:
        ask = status_source(chosen, runs_dir)
        found = ask()
    except RunError as missing:
        raise RunError(f"{missing}{why}") from None
    pause = WATCH_URI_SECONDS if is_uri(chosen) or is_uri(runs_dir) else WATCH_SECONDS
    failures = 0
    yield found
    while watch and found["state"] in AT_WORK:
        time.sleep(pause)
        try:
            found = ask()
        except RunError:
            failures += 1
            if failures > MAX_FAILURES:
                raise
            continue
        failures = 0
        yield found


def another_of_its_name(found: Mapping[str, Any], runs_dir: str) -> str | None:
    """Says so, if a run of the cluster here isn't the one of that name in the runs folder here; None if there is none.

    found: the run's status.   One that doesn't say where it lies is taken for the one here.
    """
    from distributed_muzero.run_folder import run_names
    from distributed_muzero.workers.runs import folder_here, place_in

    run, folder = found["run"], found.get("folder")
    if folder in (None, place_in(run, runs_dir)) or run not in run_names(folder_here(runs_dir)):
        return None
    return f"this machine's cluster has another run {run!r}, in {folder}; --address auto means that one"


def check_is_meant(run: str, runs_dir: str) -> None:
    """Raises RunError if the cluster here has another run of a name that the runs folder here has. For no address."""
    from distributed_muzero.cluster.control import going_on_status, joined
    from distributed_muzero.run_folder import run_names
    from distributed_muzero.workers.runs import folder_here

    if run not in run_names(folder_here(runs_dir)):  # then nobody needs to be asked
        return
    another = None
    with suppress(ClusterError, RunError), joined(None):  # what is asked of it next fails and says why
        another = another_of_its_name(going_on_status(run), runs_dir)
    if another:
        raise RunError(f"{runs_dir} has a run {run!r}, and {another}")


def run_at_work(run: str | None, runs_dir: str) -> str | None:
    """The run of this name, or of any, if it is at work in a folder of this machine. Raises RunError if several are."""
    from distributed_muzero.run_folder import run_names

    if run is None:
        run = run_at_hand(runs_dir)
    if run is None or run not in run_names(runs_dir):
        return None
    return run if status_of(run, runs_dir)["state"] in AT_WORK else None


def run_at_hand(runs_dir: str) -> str | None:
    """Of a runs folder: the run that goes on, else the one that was written last. Raises RunError if several go on."""
    from distributed_muzero.cluster.control import written_at
    from distributed_muzero.workers.runs import names_in

    found = {name: status_of(name, runs_dir) for name in names_in(runs_dir)}
    at_work = [name for name, status in found.items() if status["state"] in AT_WORK]
    if len(at_work) > 1:
        raise RunError(f"several runs are going on: {', '.join(at_work)}; name one")
    return max(at_work or found, key=lambda name: written_at(found[name]) or 0, default=None)


def status_of(run: str, runs_dir: str) -> dict[str, Any]:
    """As its folder has it, with state `unreadable` where that can't be read."""
    from distributed_muzero.workers.runs import current_status

    try:
        return current_status(run, runs_dir)
    except RunError:
        return {"run": run, "state": "unreadable"}


def logs(
    run: Run,
    address: Address = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
) -> None:
    """What a run in a cluster has printed."""
    from distributed_muzero.cluster.jobs import Jobs

    jobs = Jobs(address)
    job = jobs.find(run)
    if not follow:
        sys.stdout.write(jobs.logs(job.job_id))
        return
    for text in jobs.follow(job.job_id):
        sys.stdout.write(text)
        sys.stdout.flush()


def scale(
    run: Run,
    address: Address = None,
    actors: Annotated[
        int | None, typer.Option(min=1, help="As many; those that are too many deliver their games first.")
    ] = None,
    autoscale: Annotated[
        str | None,
        typer.Option(metavar="MIN:MAX|off", help="As many actors as keep actors and learner busy."),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Replay shards; the run pauses while their episodes are laid out anew."),
    ] = None,
    reanalysers: Annotated[int | None, typer.Option(min=1, help="Reanalysers.")] = None,
    runs_dir: options.RunsDir = options.RUNS,
    as_json: Json = False,
) -> None:
    """Change how many processes of a kind a run in a cluster has, while it goes on."""
    wishes: dict[str, Any] = {
        name: number
        for name, number in (
            ("num_actors", actors),
            ("num_shards", shards),
            ("num_reanalysers", reanalysers),
        )
        if number is not None
    }
    if actors is not None and autoscale not in (None, "off"):
        raise ConfigError("--actors and --autoscale both say how many actors: give one of them")
    if autoscale is not None:
        wishes["autoscale"] = None if autoscale == "off" else options.parse_range(autoscale)
    if not wishes:
        raise ConfigError("say what is to change: --actors, --autoscale, --shards or --reanalysers")
    from distributed_muzero.cluster.jobs import Jobs, cluster_address, is_http, last_json

    where = cluster_address(address)
    if is_http(where):
        numbers = {
            "--actors": actors,
            "--autoscale": autoscale,
            "--shards": shards,
            "--reanalysers": reanalysers,
        }
        given = [str(word) for pair in numbers.items() if pair[1] is not None for word in pair]
        jobs = Jobs(where)
        if not (job := jobs.find(run)).goes_on:
            raise RunError(f"run {run!r} isn't going on: it has {job.state}")
        desired = last_json(jobs.execute(["scale", run, *given, "--json"]))
    else:
        from distributed_muzero.cluster.control import change, joined

        if where is None:
            check_is_meant(run, runs_dir)
        with joined(where):
            desired = change(run, **wishes)._asdict()
    if as_json:
        print(json.dumps(desired))
        return
    chosen = f"{desired['autoscale'][0]} to {desired['autoscale'][1]}" if desired["autoscale"] else None
    print(
        f"run {run} is asked to have {chosen or desired['num_actors']} actors, {desired['num_shards']} shards, "
        f"{desired['num_reanalysers']} reanalysers"
    )


def stop(
    run: Run,
    address: Address = None,
    now: Annotated[
        bool, typer.Option("--now", help="Without draining and without a last checkpoint.")
    ] = False,
    runs_dir: options.RunsDir = options.RUNS,
    only_ask: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """End a run in a cluster: its actors deliver their games, a checkpoint is written, and all its processes end."""
    from distributed_muzero.cluster.control import change, joined
    from distributed_muzero.cluster.jobs import GOING_ON, Jobs, cluster_address, is_http

    where = cluster_address(address)
    if only_ask:
        with joined(where):
            change(run, in_haste=now, stop=not now)
        return
    jobs = Jobs(address)
    if where is None:
        check_is_meant(run, runs_dir)
    job = jobs.find_or_none(run)
    if job is None and not is_http(where):  # `train` on a node of the cluster
        with joined(where):
            change(run, stop=True, in_haste=now)
        print(f"run {run} is asked to stop")
        return
    job = job or jobs.find(run)
    if not job.goes_on:
        raise RunError(f"run {run!r} isn't going on: it has {job.state}")
    if now:
        # A run that doesn't answer is stopped all the same, if a little later.
        with suppress(RunError, ClusterError):
            if is_http(where):
                jobs.execute(["stop", run, "--now", "--only-ask"])
            else:
                with joined(where):
                    change(run, in_haste=True)
    jobs.stop(job.job_id)
    _tell("stopping" if now else "stopping: games are delivered, a checkpoint is written")
    state = jobs.wait(job.job_id, STOP_SECONDS)
    if state in GOING_ON:
        raise RunError(f"run {run!r} goes on after {STOP_SECONDS:.0f} s; look at `logs {run}`, and try --now")
    if not jobs.has_ended_orderly(job.job_id):
        raise RunError(f"run {run!r} was ended before it had written all; look at `logs {run}`, or resume it")
    print(f"run {run} has {state}")


def runs(address: Address = None, runs_dir: options.RunsDir = options.RUNS, as_json: Json = False) -> None:
    """The runs of a cluster, newest first; or, where there is none, those in the runs folder here."""
    from distributed_muzero.cli.status_view import show_runs
    from distributed_muzero.cluster.jobs import Jobs, cluster_address
    from distributed_muzero.workers.runs import names_in

    try:
        found = [job.summary() for job in Jobs(address).runs()]
    except ClusterError as error:
        if cluster_address(address) is not None:
            raise
        what, *_ = str(error).split(": ")
        _tell(f"{what}; the runs in {runs_dir}:")
        found = [{"run": name, "state": status_of(name, runs_dir)["state"]} for name in names_in(runs_dir)]
    if as_json:
        for line in found:
            print(json.dumps(line))
    else:
        show_runs(found)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
