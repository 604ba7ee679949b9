"""`train`: from options to a config, a run's folder, the loop, and a last evaluation."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_muzero.cli import options
from distributed_muzero.config import Config, make_config, parse_overrides
from distributed_muzero.errors import RunError, RunIsOver

if TYPE_CHECKING:
    from distributed_muzero.workers.run_state import Ending
    from distributed_muzero.workers.runs import Opened

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for a job's command
FINAL_EVALUATION_STREAM = 10**12  # no evaluation during training used these seeds: theirs are learner steps


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
    from distributed_muzero.workers.launching import check_can_begin, check_parts
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
    from distributed_muzero.workers.importing import dataset_path
    from distributed_muzero.workers.launching import check_can_begin, check_parts
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
    from distributed_muzero.observability.progress import Progress
    from distributed_muzero.workers.launching import launch
    from distributed_muzero.workers.run_state import STOPPED, outcome

    began = time.monotonic()
    loop = play_here if in_process else play_on_ray
    with run as opened:
        config = change(opened[0].config)
        with Progress(limits=config.run) as progress, stop_on_signal(progress) as stop:
            launched = outcome(
                launch(opened, config, in_process, loop, progress, stop.is_set, datasets, check)
            )
            if launched is None:
                progress.message(f"stopped after {time.monotonic() - began:.1f} s: {STOPPED.reason}")
                return
    book, ending = launched
    state, folder = book.state, book.folder
    print(f"run: {folder.place}")
    print(f"environment steps: {state.env_steps}, learner steps: {state.learner.learner_steps}")
    if not state.learner.learner_steps:
        print(nothing_learnt(state.env_steps, config.replay.min_size_to_sample))
    elif not (ending.was_stopped or ending.was_hurried or stop.is_set()):
        seeds = (config.run.seed, FINAL_EVALUATION_STREAM)
        print_result(evaluate_run(folder, seeds))


def play_here(*launched: Any) -> Generator[None, None, Ending]:
    from distributed_muzero.workers.local import turns

    return turns(*launched)


def play_on_ray(*launched: Any) -> Generator[None, None, Ending]:
    from distributed_muzero.cluster.session import turns

    return turns(*launched)


def nothing_learnt(env_steps: int, min_size_to_sample: int) -> str:
    waits = f"the learner waits for {min_size_to_sample} stored steps (replay.min_size_to_sample)"
    return f"nothing was learnt, and there is no checkpoint{f': {waits}' if env_steps < min_size_to_sample else ''}"


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
