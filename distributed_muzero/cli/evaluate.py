"""`evaluate`: noise-free games of a run's best checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_muzero.cli import options

if TYPE_CHECKING:
    from distributed_muzero.run_folder import RunFolder


def evaluate(
    run: Annotated[str, typer.Argument(help="A run's name, or the path or URI of its folder.")],
    episodes: Annotated[int, typer.Option(min=1, help="Games to play.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Where the games' starts come from.")] = 10_000,
    simulations: Annotated[int | None, typer.Option(min=1, help="In place of the run's own.")] = None,
    runs_dir: options.RunsDir = options.RUNS,
    trust_env_code: options.TrustEnvCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Play games with a run's best checkpoint: greedy, without noise, in environments of its own."""
    from distributed_muzero.workers.runs import open_to_read

    folder = open_to_read(run, runs_dir, exclude=("replay",))
    result = evaluate_run(folder, episodes, (seed,), simulations)
    if as_json:
        print(json.dumps(result))
    else:
        print_result(result)


def evaluate_run(
    folder: RunFolder, num_episodes: int, seeds: Sequence[int], num_simulations: int | None
) -> dict[str, Any]:
    """Evaluates the best checkpoint, or the last one where none was evaluated. Raises CheckpointError."""
    from distributed_muzero import checkpoint
    from distributed_muzero.errors import CheckpointError
    from distributed_muzero.workers.builder import Builder

    saved = checkpoint.best_or_latest(folder.checkpoints)
    if saved is None:
        raise CheckpointError(
            f"run {folder.name} has no checkpoint yet in {folder.checkpoints}; train it for longer"
        )
    evaluator = Builder(folder.config, folder.name).evaluator()
    evaluator.load(saved)
    try:
        result = evaluator.evaluate(num_episodes, seeds, num_simulations)
    finally:
        evaluator.close()
    return {**result, "checkpoint": saved.path.name}


def print_result(result: Mapping[str, Any]) -> None:
    print(
        f"evaluation of {result['checkpoint']} (weights version {result['weights_version']}), "
        f"{result['episodes']} games without noise: "
        f"mean return {result['mean_return']:.1f} ± {result['std_return']:.1f}"
    )
