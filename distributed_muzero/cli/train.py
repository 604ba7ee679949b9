"""`train`: from options to a config, a run's folder, the loop, and a last evaluation."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_muzero.cli import options
from distributed_muzero.config import Config, make_config, parse_overrides
from distributed_muzero.errors import DistributedMuZeroError, RunError, RunIsOver, first_line

if TYPE_CHECKING:
    from distributed_muzero.environments.base import EnvironmentSpec
    from distributed_muzero.run_folder import RunFolder
    from distributed_muzero.workers.bookkeeper import Bookkeeper
    from distributed_muzero.workers.run_copy import Copies
    from distributed_muzero.workers.run_state import Ending
    from distributed_muzero.workers.runs import Opened

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for a job's command
FINAL_EVALUATION_STREAM = 10**12  # no evaluation during training used these seeds: theirs are learner steps
RELOCATED_VERSIONS = 10**6  # of the weights: more than a launch gives out between two copies
NOT_LEARNT_FROM = ("checkpoints", "tensorboard", "history")  # of a run at a URI that is a dataset


def train(
    preset: options.Preset = None,
    env: options.Env = None,
    trust_env_code: options.TrustEnvCode = False,
    config: options.ConfigFile = None,
    name: options.Name = None,
    runs_dir: options.RunsDir = options.RUNS,
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
    in_process: Annotated[bool, typer.Option("--in-process", help="One process, without Ray.")] = False,
    resume: options.ResumeOption = options.Resume.never,
    offline: options.Offline = None,
    take_over: options.TakeOver = False,
) -> None:
    """Train on an environment: one learner, shards, actors and an evaluator, until a limit is reached or Ctrl-C.

    The first Ctrl-C ends the run with a checkpoint, a second one at once. With RAY_ADDRESS set, the processes live in
    that cluster.
    """
    choices = options.Choices(
        preset, env, config, name, seed, actors, autoscale, envs_per_actor, shards, max_env_steps, max_train_steps,
        max_minutes, stop_at_return, metrics_port, set_, resume, offline,
    )  # fmt: skip
    chosen = choices.make_config()
    check_place(runs_dir)
    datasets = [named_dataset(text) for text in offline or []]
    if resume is not options.Resume.auto:
        run_training(chosen, name, runs_dir, in_process, datasets)
        return
    assert name is not None
    try:
        # An earlier launch may have been scaled: its number of shards counts, unless another is asked for here.
        keeps_shards = not asks_for_shards(shards, set_)
        run_training(chosen, name, runs_dir, in_process, datasets, True, take_over, keeps_shards)
    except RunIsOver as over:
        print(f"nothing is left to do: {over}")


def asks_for_shards(shards: int | None, set_: list[str] | None) -> bool:
    """Whether the command says how many replay shards there are to be, by --shards or --set."""
    return shards is not None or "num_shards" in parse_overrides(set_ or []).get("replay", {})


def resume(
    run: Annotated[str, typer.Argument(help="A run's name, or its folder.")],
    runs_dir: options.RunsDir = options.RUNS,
    max_env_steps: Annotated[
        int | None, typer.Option(help="Of the whole run, earlier steps included.")
    ] = None,
    max_train_steps: Annotated[
        int | None, typer.Option(help="Of the whole run, earlier steps included.")
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Of this launch.")] = None,
    stop_at_return: options.StopAtReturn = None,
    actors: options.Actors = None,
    shards: options.Shards = None,
    metrics_port: options.MetricsPort = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; null lifts a limit.")
    ] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One process, without Ray.")] = False,
    trust_env_code: options.TrustEnvCode = False,
    take_over: options.TakeOver = False,
) -> None:
    """Go on with a run that ended or was killed: weights, optimizer, stored episodes and counts are as they were."""
    from distributed_muzero.workers.runs import opened

    changes: dict[str, dict[str, Any]] = {
        "run": {
            "max_env_steps": max_env_steps,
            "max_train_steps": max_train_steps,
            "max_minutes": max_minutes,
            "stop_at_return": stop_at_return,
        },
        "actor": {"num_actors": actors},
        "replay": {"num_shards": shards},
        "metrics": {"port": metrics_port},
    }
    changed = options.given_only(changes)

    def change(config: Config) -> Config:
        return make_config(config.model_dump(), changed, parse_overrides(set_ or []))

    run_to_open = opened(run, runs_dir, tell, take_over, change, check_can_begin)
    train_in(run_to_open, change, in_process, check=check_parts)


def check_place(runs_dir: str) -> None:
    """Raises RunError for a folder that a cluster's job must not use: its own is removed after it."""
    from distributed_muzero.mirror.uri import is_uri

    if IN_A_JOB in os.environ and not is_uri(runs_dir) and not Path(runs_dir).is_absolute():
        raise RunError(
            f"the runs folder {runs_dir} would lie in this job's own folder, which goes with it: give an absolute path "
            f"or a URI with --runs-dir, or set {options.RUNS_DIR_VARIABLE} on the cluster's nodes"
        )


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def named_dataset(text: str) -> Path | str:
    """What --offline names: a path, or a run's URI."""
    from distributed_muzero.mirror.uri import is_uri

    return text if is_uri(text) else Path(text)


@cache
def dataset_path(dataset: Path | str) -> Path:
    """Where a dataset lies on this machine: a run at a URI is fetched, once. Raises RunError."""
    from distributed_muzero.mirror.uri import is_uri
    from distributed_muzero.workers.runs import open_to_read

    if is_uri(dataset):
        return open_to_read(str(dataset), options.RUNS, NOT_LEARNT_FROM).path
    return Path(dataset)


@contextmanager
def dataset_paths(datasets: Sequence[Path | str]) -> Iterator[list[Path]]:
    """The last use of them in this process: what was fetched is removed afterwards. Raises RunError."""
    from distributed_muzero.mirror.uri import is_uri

    paths = [dataset_path(dataset) for dataset in datasets]
    try:
        yield paths
    finally:
        for dataset, path in zip(datasets, paths, strict=True):
            if is_uri(dataset):
                shutil.rmtree(path, ignore_errors=True)
        dataset_path.cache_clear()


def run_training(
    config: Config,
    name: str | None,
    runs_dir: str,
    in_process: bool,
    datasets: Sequence[Path | str],
    may_exist: bool = False,
    take_over: bool = False,
    keeps_shards: bool = False,
) -> None:
    """Makes the run, or goes on with it if it `may_exist`, fills it with the datasets' episodes, and trains."""
    from distributed_muzero.observability.exporter import check_port
    from distributed_muzero.replay.dataset import check_datasets
    from distributed_muzero.workers.layout import with_shards
    from distributed_muzero.workers.runs import created, names_in, opened

    # What can't be made must not leave a run's folder behind.
    spec = check_parts(config)
    check_port(config.metrics)
    check_datasets([dataset_path(dataset) for dataset in datasets], spec, config)

    def change(stored: Config) -> Config:
        return with_shards(config, stored.replay.num_shards) if keeps_shards else config

    if may_exist and name is not None and name in names_in(runs_dir):
        run = opened(name, runs_dir, tell, take_over, change, check_can_begin)
    else:
        run = created(runs_dir, name, config)
    train_in(run, change, in_process, datasets)


def check_parts(config: Config) -> EnvironmentSpec:
    """That environments, networks and opponent of a run can be made. Raises ConfigError and EnvironmentFailure."""
    from distributed_muzero.networks.registry import check_name, check_observations
    from distributed_muzero.workers.builder import Builder

    check_name(config.network.name)
    builder = Builder(config, "")
    builder.check_stages()
    check_observations(config.network.name, builder.spec, config.environment.history_length)
    if config.evaluator.opponent != "random":
        from distributed_muzero.workers.match_evaluator import make_opponent

        make_opponent(config.evaluator.opponent, builder.environment)
    return builder.spec


def train_in(
    run: AbstractContextManager[Opened],
    change: Callable[[Config], Config],
    in_process: bool,
    datasets: Sequence[Path | str] = (),
    check: Callable[[Config], object] = lambda config: None,
) -> None:
    """Trains a run from where it stands, evaluates what did best, and says where everything lies.

    change: from the run's config to the one that it goes on with.   check: of that, before anything is changed.
    """
    from distributed_muzero.cli.evaluate import evaluate_run, print_result
    from distributed_muzero.observability.exporter import serve_metrics
    from distributed_muzero.observability.progress import Progress
    from distributed_muzero.workers.bookkeeper import Bookkeeper, why_over
    from distributed_muzero.workers.layout import lay_out
    from distributed_muzero.workers.run_state import STOPPED

    began = time.monotonic()
    with ExitStack() as stack:
        folder, copies = stack.enter_context(run)
        config = change(folder.config)
        progress = stack.enter_context(Progress(limits=config.run))
        stop = stack.enter_context(stop_on_signal(progress))
        folder = folder.with_config(config)
        check_not_over(folder.name, why_over(folder))
        if copies is None:  # else `check_can_begin` has done so
            check(config)
        exporter = stack.enter_context(serve_metrics(folder))
        with starting(folder, copies):
            if copies is None:
                lay_out(folder.replay, config)
            folder.write_config()
            datasets = datasets or folder.read_datasets()
            if copies and (in_process or datasets):
                # What is fetched may be much: meanwhile the run's own copy shows that somebody is at work.
                with copies.keep_pushing(once_more=False):
                    copies.claim_shards(config.replay.num_shards)
            import_stored(folder, datasets, copies, progress.message, stop.is_set)
        if stop.is_set():
            folder.write_counts("stopped", STOPPED.reason)
            if copies:
                copies.push()
            progress.message(f"stopped after {time.monotonic() - began:.1f} s: {STOPPED.reason}")
            return
        if copies:
            copies.push()
        launch = folder.begin_launch(RELOCATED_VERSIONS if copies and copies.was_fetched else 0)
        if copies:
            copies.settle()
            # Before anything is played: whoever goes on from the copy gives other ids than this launch, and sees it.
            copies.push()
            if not in_process:
                copies.release_shards()
        book = Bookkeeper(config, folder, progress, launch=launch, copies=copies, exporter=exporter)
        ending = play(book, in_process, stop)
    state = book.state
    print(f"run: {folder.place}")
    print(f"environment steps: {state.env_steps}, learner steps: {state.learner.learner_steps}")
    if not state.learner.learner_steps:
        print(nothing_learnt(state.env_steps, config.replay.min_size_to_sample))
    elif not (ending.was_stopped or ending.was_hurried or stop.is_set()):
        seeds = (config.run.seed, FINAL_EVALUATION_STREAM)
        print_result(evaluate_run(folder, seeds))


def nothing_learnt(env_steps: int, min_size_to_sample: int) -> str:
    waits = f"the learner waits for {min_size_to_sample} stored steps (replay.min_size_to_sample)"
    return f"nothing was learnt, and there is no checkpoint{f': {waits}' if env_steps < min_size_to_sample else ''}"


def check_can_begin(folder: RunFolder, counts: Mapping[str, Any]) -> None:
    """Before a run at a URI is taken over. Raises RunIsOver, RunError for a port in use, and as `check_parts` does."""
    from distributed_muzero.observability.exporter import check_port
    from distributed_muzero.workers.bookkeeper import why_over_by

    check_port(folder.config.metrics)
    check_not_over(folder.name, why_over_by(folder.config.run, counts))
    check_parts(folder.config)


def check_not_over(run: str, reason: str | None) -> None:
    """reason: the limit that the run has reached. Raises RunIsOver if there is one."""
    if reason:
        raise RunIsOver(
            f"run {run} is over: {reason}; resume it with a higher limit to go on, or with none, such as "
            "--set run.stop_at_return=null"
        )


@contextmanager
def starting(folder: RunFolder, copies: Copies | None) -> Iterator[None]:
    """While the replay is made ready. The run's status, and its copy's, no longer tells of an earlier launch."""
    try:
        folder.write_counts("starting")
        if copies:
            # Before an import, which may take long: whoever finds the copy sees that somebody is at work.
            copies.push()
        yield
    except DistributedMuZeroError as error:
        with suppress(RunError):
            folder.write_counts("failed", first_line(error))
            if copies:
                copies.push()
        raise


def play(book: Bookkeeper, in_process: bool, stop: Stop) -> Ending:
    """One launch of the run, to its end."""
    if in_process:
        from distributed_muzero.workers.local import train as train_loop
    else:
        from distributed_muzero.cluster.session import train as train_loop

    progress, folder = book.progress, book.folder
    progress.message(f"run {folder.name} in {folder.place}")
    if book.launch.number:
        progress.message(
            f"going on from {book.state.env_steps} environment steps, "
            f"{book.state.learner.learner_steps} learner steps"
        )
    progress.message("starting its workers")
    status, reason = "failed", None
    # The last copy holds what `close` writes.
    with book.copies.keep_pushing() if book.copies else nullcontext():
        try:
            ending = train_loop(book.config, folder.name, book, stop.is_set)
            status, reason = "stopped" if ending.was_stopped else "finished", ending.reason
        except Exception as error:
            reason = first_line(error)
            raise
        finally:
            book.close(status, reason)
    book.tell_of_copies()
    progress.message(f"{status} after {book.state.seconds:.1f} s: {ending.reason}")
    return ending


def import_stored(
    folder: RunFolder,
    datasets: Sequence[Path | str],
    copies: Copies | None,
    tell: Callable[[str], None],
    stop_requested: Callable[[], bool],
) -> None:
    """Puts the datasets' episodes into the run's replay; those that it holds already are not stored twice.

    What a stop or a kill leaves out is imported when the run goes on, here or elsewhere. Raises RunError if nothing can
    be learnt from.
    """
    if not datasets:
        check_can_learn(folder, copies)
        return
    folder.write_datasets(datasets)
    if copies:
        copies.push()
    from distributed_muzero.replay.dataset import import_datasets
    from distributed_muzero.workers.builder import Builder

    pushing = copies.keep_pushing(once_more=False) if copies else nullcontext()
    with pushing, dataset_paths(datasets) as paths:
        counts = import_datasets(paths, folder.replay, Builder(folder.config, folder.name), stop_requested)
    if copies:
        # Before the copy may say that nothing is left to import.
        copies.push()
    if stop_requested():
        tell("the import was stopped; it goes on when the run does")
        return
    if not counts.stored + counts.duplicates:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.rejected.items())
        raise RunError(
            f"none of the {counts.offered} stored episodes can be learnt from ({reasons}); "
            "choose other datasets, or settings that fit them"
        )
    folder.write_datasets([])
    tell(
        f"{counts.offered} stored episodes: {counts.stored} new ({counts.stored_transitions} transitions), "
        f"{counts.duplicates} known, {sum(counts.rejected.values())} refused"
    )
    if counts.evicted_transitions:
        tell(
            f"{counts.evicted_transitions} transitions didn't fit; raise replay.max_transitions to use them all"
        )


def check_can_learn(folder: RunFolder, copies: Copies | None) -> None:
    """Raises RunError for a run that learns from stored episodes alone, and has none: it would wait for ever."""
    if not folder.config.is_offline:
        return
    has_episodes = copies.has_episodes() if copies else any(folder.replay.glob("shard_*/episodes/segment_*"))
    if not has_episodes:
        raise RunError(
            f"run {folder.name!r} learns from stored episodes alone, and {folder.place} holds none: put some in with "
            f"`replay import {folder.name} DATASET`, or start another run with --offline DATASET"
        )


class Stop:
    """Set by the first signal."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def is_set(self) -> bool:
        return self._is_set


@contextmanager
def stop_on_signal(progress: Any) -> Iterator[Stop]:
    """SIGINT and SIGTERM ask for an orderly end; a second one ends the process at once."""
    stop = Stop()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            # Not an exception: it could surface anywhere, and Ray's processes end with this one in any case.
            progress.__exit__()
            os._exit(128 + number)
        stop.set()
        progress.message("ending with a checkpoint; once more ends at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
