"""`replay stats|verify|show|export|import`: what a run has stored, out of it, and into it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_muzero.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from distributed_muzero.config import Config
    from distributed_muzero.environments.base import EnvironmentSpec
    from distributed_muzero.replay.inspection import Held
    from distributed_muzero.run_folder import RunFolder
    from distributed_muzero.types import Episode

app = typer.Typer(
    help="Look at the episodes that a run has stored, take them out, put others in.", no_args_is_help=True
)

Run = Annotated[str, typer.Argument(help="A run's name, or the path or URI of its folder.")]


class Form(StrEnum):
    """What an export writes."""

    dataset = "dataset"
    rllib = "rllib"


RunsDir = options.RunsDir
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")]
RUNS = options.RUNS


@app.command()
def stats(run: Run, runs_dir: RunsDir = RUNS, as_json: AsJson = False) -> None:
    """Count what the shards hold on disk. Works while the run goes on."""
    from distributed_muzero.replay.inspection import replay_stats

    result = replay_stats(_open(run, runs_dir).replay)
    if as_json:
        _print_json(result)
    else:
        _print(_stats_table(result))


@app.command()
def verify(run: Run, runs_dir: RunsDir = RUNS, as_json: AsJson = False) -> None:
    """Check every checksum, record and episode. Exit code 1 if anything is damaged, invalid or there twice."""
    from distributed_muzero.replay.inspection import verify_replay

    folder = _open(run, runs_dir)
    replay = folder.config.replay
    spec = _spec_or_none(folder.config)
    result = verify_replay(folder.replay, replay.num_shards, spec, replay.max_transitions)
    if as_json:
        _print_json(result)
    else:
        _print_verification(result)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def show(
    run: Run,
    episode: Annotated[str, typer.Argument(help="An episode's id, or `latest`, or `best`.")],
    steps: Annotated[int | None, typer.Option(min=1, help="The first so many steps only.")] = None,
    runs_dir: RunsDir = RUNS,
    as_json: AsJson = False,
) -> None:
    """Print one stored episode, step by step, with the policies and values it is learnt from."""
    folder = _open(run, runs_dir)
    held, found = _find(folder, episode)
    result = _episode_fields(held, found, folder.config, steps)
    if as_json:
        _print_json(result)
    else:
        _print_episode(result)


@app.command("export")
def export_(
    run: Run,
    file: Annotated[
        Path,
        typer.Argument(
            help="The .parquet file to write, an old one is replaced; for --format rllib a new folder."
        ),
    ],
    min_return: Annotated[float | None, typer.Option(help="Leave out episodes that return less.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="The newest so many of these.")] = None,
    form: Annotated[
        Form, typer.Option("--format", help="rllib: what RLlib's offline algorithms read.")
    ] = Form.dataset,
    runs_dir: RunsDir = RUNS,
    as_json: AsJson = False,
) -> None:
    """Write the episodes that a run holds to Parquet, a row for each. Works while the run goes on."""
    from distributed_muzero.files import folder_bytes
    from distributed_muzero.replay.dataset import write_dataset
    from distributed_muzero.replay.inspection import select_episodes
    from distributed_muzero.replay.recording_writer import write_recording

    replay = _open(run, runs_dir).replay
    print(f"exporting {replay} to {file}", file=sys.stderr)
    if form is Form.rllib:
        num_episodes, num_transitions = write_recording(
            file, lambda: select_episodes(replay, min_return, last)
        )
        num_bytes = folder_bytes(file)
    else:
        info = write_dataset(file, select_episodes(replay, min_return, last))
        num_episodes, num_transitions, num_bytes = (
            info.num_episodes,
            info.num_transitions,
            file.stat().st_size,
        )
    if as_json:
        fields = {"episodes": num_episodes, "transitions": num_transitions, "bytes": num_bytes}
        _print_json({"file": str(file), **fields})
    else:
        print(f"{file}: {num_episodes} episodes, {num_transitions} transitions, {num_bytes} bytes")


@app.command("import")
def import_(
    run: Run,
    datasets: Annotated[
        list[Path],
        typer.Argument(help="Exported files, folders of them, other runs' folders, or what RLlib recorded."),
    ],
    runs_dir: RunsDir = RUNS,
    as_json: AsJson = False,
) -> None:
    """Put exported episodes into a run that isn't going on, as if it had played them. Each is stored once."""
    from distributed_muzero.replay.dataset import import_datasets
    from distributed_muzero.workers.builder import Builder
    from distributed_muzero.workers.runs import opened, place_of

    at_uri = place_of(run, runs_dir) is not None
    # On this machine the shards' own locks keep a run that goes on from being written to.
    importing = opened(run, runs_dir, _tell) if at_uri else nullcontext((_open(run, runs_dir), None))
    with importing as (folder, copies):
        # Nobody plays meanwhile, so the shards' limiters hold nothing back.
        actor = folder.config.actor.model_copy(update={"num_actors": 0})
        builder = Builder(folder.config.model_copy(update={"actor": actor}), folder.name)
        if copies:
            copies.claim_shards(folder.config.replay.num_shards)
        _tell(f"importing {', '.join(map(str, datasets))} into {folder.replay}")
        counts = import_datasets(datasets, folder.replay, builder)
        if copies:
            copies.push()
    if as_json:
        _print_json(counts._asdict())
        return
    rejected = "".join(f", {number} rejected ({reason})" for reason, number in counts.rejected.items())
    evicted = f"; {counts.evicted_transitions} transitions gave way" if counts.evicted_transitions else ""
    print(
        f"{counts.offered} episodes: {counts.stored} stored ({counts.stored_transitions} transitions), "
        f"{counts.duplicates} there already{rejected}{evicted}"
    )


# What is found ------------------------------------------------------------------------------------------------


def _open(run: str, runs_dir: str) -> RunFolder:
    from distributed_muzero.workers.runs import open_to_read

    return open_to_read(run, runs_dir)


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _spec_or_none(config: Config) -> EnvironmentSpec | None:
    """The environment's spec; none where what it needs isn't installed here, which is told."""
    from distributed_muzero.environments.registry import make_environment
    from distributed_muzero.errors import EnvironmentFailure

    try:
        environment = make_environment(config.environment)
    except EnvironmentFailure as error:
        print(f"episodes are decoded, but not validated: {error}", file=sys.stderr)
        return None
    environment.close()
    return environment.spec


def _find(folder: RunFolder, wanted: str) -> tuple[Held, Episode]:
    from distributed_muzero.errors import RunError
    from distributed_muzero.replay.inspection import find_episode, list_all_held

    held = list_all_held(folder.replay)
    if wanted == "latest":
        chosen = held[-1:]
    elif wanted == "best":
        chosen = sorted(held, key=lambda item: item.episode_return)[-1:]
    else:
        chosen = [item for item in held if item.episode_id == wanted]
    episode = find_episode(folder.replay, chosen[0].place) if chosen else None
    if episode is None:
        examples = ", ".join(item.episode_id for item in held[-3:])
        raise RunError(
            f"run {folder.name} holds no episode {wanted!r}; it holds {len(held)}"
            + (f", the newest are {examples}" if held else "; let it play for longer")
        )
    return chosen[0], episode


def _episode_fields(held: Held, episode: Episode, config: Config, num_steps: int | None) -> dict[str, Any]:
    """Plain values: the header, and a list of steps."""
    from distributed_muzero.algorithm.returns import n_step_returns

    algorithm = config.algorithm
    returns = n_step_returns(
        episode.rewards, episode.root_values, algorithm.discount, algorithm.td_steps, episode.to_play
    )
    shown = range(episode.num_steps)[:num_steps]
    steps = [
        {
            "step": t,
            "player": int(episode.to_play[t]),
            "action": int(episode.actions[t]),
            "reward": float(episode.rewards[t]),
            "policy": [float(share) for share in episode.policies[t]],
            "root_value": float(episode.root_values[t]),
            "n_step_return": float(returns[t]),
        }
        for t in shown
    ]
    return {
        "episode_id": episode.episode_id,
        "environment_id": episode.environment_id,
        "seed": episode.seed,
        "shard": held.shard,
        "key": held.key,
        "weights_version": episode.weights_version,
        "targets_version": held.targets_version,
        "ending": "terminated" if episode.terminated else "truncated",
        "num_steps": episode.num_steps,
        "episode_return": episode.episode_return,
        "final_root_value": float(episode.root_values[-1]),
        "steps": steps,
    }


# Printing -----------------------------------------------------------------------------------------------------


def _print_json(result: Mapping[str, Any]) -> None:
    from distributed_muzero.files import to_json

    print(to_json(result).decode(), end="")


def _print(table: Table) -> None:
    from rich.console import Console

    Console(soft_wrap=True).print(table)


def _stats_table(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    columns = [(f"shard {shard['shard']}", shard) for shard in result["shards"]] + [
        ("total", result["total"])
    ]
    table = Table("", *(name for name, _ in columns))
    for name in result["total"]:
        table.add_row(name.replace("_", " "), *(_text(values[name]) for _, values in columns))
    return table


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number}" for key, number in value.items() if number) or "none"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _print_verification(result: Mapping[str, Any]) -> None:
    for shard in result["shards"]:
        if shard["missing_episodes"]:
            print(
                f"shard {shard['shard']}: {shard['missing_episodes']} episodes that it held are no longer in its log"
            )
        for name in ("episodes", "journal"):
            found = shard[name]
            print(
                f"shard {shard['shard']} {name}: {found['segments']} segments, {found['bytes']} bytes, "
                f"records: {_text(found['records'])}; damage: {_text(found['damage'])}"
            )
            if found["undecodable_records"]:
                print(f"  {found['undecodable_records']} records can't be decoded")
            for episode_id, reason in found["invalid_episodes"].items():
                print(f"  invalid episode {episode_id}: {reason}")
            for episode_id in found["duplicate_ids"]:
                print(f"  episode {episode_id} is there twice")
    for index in result["missing_shards"]:
        print(f"shard {index} is missing")
    num_episodes = sum(shard["episodes"]["episodes"] for shard in result["shards"])
    print(f"{num_episodes} episodes in the logs: {'all is well' if result['ok'] else 'not all is well'}")


def _print_episode(result: Mapping[str, Any]) -> None:
    from rich.table import Table

    searched = result["targets_version"]
    anew = f", searched anew with version {searched}" if searched is not None else ""
    print(f"episode {result['episode_id']} of {result['environment_id']}, seed {result['seed']}")
    print(f"shard {result['shard']}, key {result['key']}; weights version {result['weights_version']}{anew}")
    print(
        f"{result['ending']} after {result['num_steps']} steps, return {result['episode_return']:g}, "
        f"final root value {result['final_root_value']:g}"
    )
    table = Table("step", "player", "action", "reward", "policy", "root value", "n-step return")
    for step in result["steps"]:
        policy = " ".join(f"{share:.3f}" for share in step["policy"])
        numbers = (f"{step[name]:.3f}" for name in ("root_value", "n_step_return"))
        table.add_row(
            str(step["step"]),
            str(step["player"]),
            str(step["action"]),
            f"{step['reward']:g}",
            policy,
            *numbers,
        )
    _print(table)
    left = result["num_steps"] - len(result["steps"])
    if left:
        print(f"{left} more steps")
