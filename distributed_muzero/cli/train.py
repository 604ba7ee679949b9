"""`train`: from options to a config, a run's folder, the loop, and a last evaluation."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed_muzero.config import (
    Config,
    load_file,
    load_preset,
    make_config,
    parse_overrides,
    preset_names,
)
from distributed_muzero.errors import ConfigError

FINAL_EVALUATION_STREAM = 10**12  # no evaluation during training used these seeds: theirs are learner steps


def train(
    preset: Annotated[str | None, typer.Option(help="A shipped preset; `config presets` lists them.")] = None,
    env: Annotated[
        str | None, typer.Option(help="An environment's id with the default config; see `envs`.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of config sections.")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name; made up when absent.")] = None,
    runs_dir: Annotated[Path, typer.Option(help="The folder of all runs.")] = Path("runs"),
    seed: Annotated[int | None, typer.Option(help="run.seed")] = None,
    actors: Annotated[int | None, typer.Option(help="actor.num_actors: actor processes.")] = None,
    envs_per_actor: Annotated[
        int | None, typer.Option(help="actor.envs_per_actor: games in lockstep.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="replay.num_shards")] = None,
    max_env_steps: Annotated[int | None, typer.Option(help="Stop after so many environment steps.")] = None,
    max_train_steps: Annotated[int | None, typer.Option(help="Stop after so many learner steps.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    stop_at_return: Annotated[
        float | None, typer.Option(help="Stop when an evaluation reaches this mean.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="One process, without Ray.")] = False,
) -> None:
    """Train on an environment: one learner, shards, actors and an evaluator, until a limit is reached or Ctrl-C.

    The first Ctrl-C ends the run with a checkpoint, a second one at once.
    """
    options: dict[str, dict[str, Any]] = {
        "run": {
            "seed": seed,
            "max_env_steps": max_env_steps,
            "max_train_steps": max_train_steps,
            "max_minutes": max_minutes,
            "stop_at_return": stop_at_return,
        },
        "actor": {"num_actors": actors, "envs_per_actor": envs_per_actor},
        "replay": {"num_shards": shards},
    }
    given = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in options.items()
    }
    run_training(
        make_config(_source(preset, env, config), given, parse_overrides(set_ or [])),
        name,
        runs_dir,
        in_process,
    )


def _source(preset: str | None, env: str | None, file: Path | None) -> dict[str, Any]:
    if sum(source is not None for source in (preset, env, file)) != 1:
        raise ConfigError(
            f"name what to train by exactly one of --preset ({', '.join(preset_names())}), --env ID or --config FILE"
        )
    if preset is not None:
        return load_preset(preset)
    return load_file(file) if file is not None else {"environment": {"id": env}}


def run_training(config: Config, name: str | None, runs_dir: Path, in_process: bool) -> None:
    """Makes the run's folder, trains, evaluates what did best, and says where everything lies."""
    from distributed_muzero.cli.evaluate import evaluate_run, print_result
    from distributed_muzero.environments.registry import make_environment
    from distributed_muzero.networks.registry import check_name
    from distributed_muzero.observability.progress import Progress
    from distributed_muzero.run_folder import create_run

    if in_process:
        from distributed_muzero.workers.local import train as train_loop
    else:
        from distributed_muzero.cluster.session import train as train_loop
    from distributed_muzero.workers.bookkeeper import Bookkeeper

    # What can't be made must not leave a run's folder behind.
    check_name(config.network.name)
    make_environment(config.environment).close()
    folder = create_run(runs_dir, name, config)
    with Progress(limits=config.run) as progress, stop_on_signal(progress) as stop:
        progress.message(f"run {folder.name} in {folder.path}")
        book = Bookkeeper(config, folder, progress)
        status = "failed"
        try:
            reason = train_loop(config, folder.name, book, stop.is_set)
            status = "stopped" if stop.is_set() else "finished"
        finally:
            book.close(status)
        progress.message(f"{status} after {book.state.seconds:.1f} s: {reason}")
    state = book.state
    print(f"run: {folder.path}")
    print(f"environment steps: {state.env_steps}, learner steps: {state.learner.learner_steps}")
    if status == "finished" and state.learner.learner_steps:
        seeds = (config.run.seed, FINAL_EVALUATION_STREAM)
        print_result(evaluate_run(folder, config.evaluator.num_episodes, seeds, None))


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
