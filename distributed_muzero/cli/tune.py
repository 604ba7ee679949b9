"""`tune`: many short trainings over a space of settings, and the best of them as a run."""

from __future__ import annotations

import datetime
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from distributed_muzero.cli import options
from distributed_muzero.cli.tune_view import TrialsTable, print_trials, shown
from distributed_muzero.config import TRUST_VARIABLE, parse_overrides
from distributed_muzero.errors import ConfigError, RunError
from distributed_muzero.mirror.uri import is_uri
from distributed_muzero.run_folder import check_name, open_run
from distributed_muzero.workers.snapshot import copy_run

TRIALS_FOLDER = ".tune"  # in the runs folder
FINAL_STREAM = 2 * 10**12  # of games that no trial was chosen by


class Scheduler(StrEnum):
    none = "none"
    asha = "asha"
    pbt = "pbt"


def tune(
    space: Annotated[
        Path, typer.Option(help="YAML: a line for each setting, such as lr: {loguniform: [1.0e-4, 1.0e-2]}.")
    ],
    preset: options.Preset = None,
    env: options.Env = None,
    trust_env_code: options.TrustEnvCode = False,
    set_: options.Set = None,
    trials: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 8,
    scheduler: Annotated[
        Scheduler,
        typer.Option(help="asha stops trials that fall behind, pbt lets them go on from better ones."),
    ] = Scheduler.asha,
    iterations: Annotated[
        int, typer.Option(min=1, help="Of a trial, at most; each ends with an evaluation.")
    ] = 12,
    iteration_seconds: Annotated[float, typer.Option(min=0.1, help="Of training in an iteration.")] = 10.0,
    episodes: Annotated[int, typer.Option(min=1, help="Of each evaluation, and of the last one.")] = 20,
    actors: Annotated[
        int, typer.Option(min=0, help="Processes of a trial that play; 0 = a trial is one process.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of settings, and of each run.")] = 1,
    name: options.Name = None,
    runs_dir: options.RunsDir = options.RUNS,
) -> None:
    """Search for good settings with Ray Tune. The best trial becomes a run, ready for `evaluate` and `resume`.

    As many trials go on at a time as there are CPUs. With RAY_ADDRESS set, they live in that cluster, whose nodes have
    to see the runs folder.
    """
    if (preset is None) == (env is None):
        raise ConfigError("name what to train by exactly one of --preset and --env")
    if is_uri(runs_dir):
        raise ConfigError(f"--runs-dir {runs_dir}: a search keeps its trials in a folder, not at a URI")
    # Trials find what this command was given where it was given.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    from distributed_muzero.cli.evaluate import evaluate_run, print_result
    from distributed_muzero.cluster.session import num_cpus, ray_session
    from distributed_muzero.rllib.algorithm import MuZeroConfig
    from distributed_muzero.rllib.saved import run_in
    from distributed_muzero.rllib.tuning import Watcher, check_space, read_space, search
    from distributed_muzero.workers.launching import check_parts

    domains = read_space(space)
    config = MuZeroConfig(preset).environment(env).update_from_dict(parse_overrides(set_ or []))
    config.env_runners(num_env_runners=actors).debugging(seed=seed)
    config.reporting(min_time_s_per_iteration=iteration_seconds)
    config.evaluation(evaluation_interval=1, evaluation_duration=episodes)
    plan = config.plan()
    check_parts(plan.config)
    try:
        check_space(config, domains, scheduler)
    except ConfigError as error:
        raise ConfigError(f"{space}: {error}") from None
    chosen_name = name or f"tune-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    check_name(chosen_name)
    target, folder = Path(runs_dir) / chosen_name, Path(runs_dir) / TRIALS_FOLDER
    if target.exists() or (folder / chosen_name).exists():
        raise RunError(f"{chosen_name} exists already in {runs_dir}; choose another --name")
    cpus = 1 + num_cpus(plan.config) if actors else 1
    with ray_session(cpus, runtime_env={"env_vars": _trust()}), TrialsTable(list(domains)) as table:
        watcher = Watcher(list(domains), table.show)
        best = search(config, domains, trials, scheduler, iterations, chosen_name, folder, seed, watcher)
    with best.checkpoint.as_directory() as saved:
        copy_run(run_in(saved), target)
    print_trials(watcher.rows)
    broken_off = sum(row["state"] not in ("terminated", "error") for row in watcher.rows)
    if broken_off:
        print(
            f"the search was broken off: {broken_off} of {len(watcher.rows)} trials hadn't ended. "
            "They can't go on; the run is what was best by then",
            file=sys.stderr,
        )
    chosen = ", ".join(f"{key} {shown(value)}" for key, value in best.chosen.items())
    print(
        f"best: trial {best.trial} with {chosen}: {best.score:.1f} in the evaluation by which it was chosen"
    )
    print_result(evaluate_run(open_run(target), (seed, FINAL_STREAM)))
    print(f"run: {target}    trials: {folder / chosen_name}")


def _trust() -> dict[str, str]:
    """What lets the processes of a cluster import what this one may."""
    if os.environ.get(TRUST_VARIABLE) != "1":
        return {}
    path = [os.getcwd(), os.environ.get("PYTHONPATH")]
    return {TRUST_VARIABLE: "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
