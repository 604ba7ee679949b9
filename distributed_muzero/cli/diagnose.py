"""`diagnose`: how good a run's learnt model is along real games."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_muzero.cli import checkpoints, options
from distributed_muzero.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.table import Table

    from distributed_muzero import checkpoint
    from distributed_muzero.run_folder import RunFolder

NOT_NEEDED = ("tensorboard", "history")  # of a run at a URI
NARROWEST = 110  # columns of a table that goes to a file


def diagnose(
    run: Annotated[str, typer.Argument(help="A run's name, or the path or URI of its folder.")],
    episodes: Annotated[
        int, typer.Option(min=1, help="Games to play; with --replay, the newest so many that are stored.")
    ] = 20,
    replay: Annotated[
        bool, typer.Option("--replay", help="Along the run's stored games, instead of playing any.")
    ] = False,
    depth: Annotated[
        int | None, typer.Option(min=0, help="Steps to unroll; default: the run's num_unroll_steps.")
    ] = None,
    simulations: Annotated[int | None, typer.Option(min=1, help="In place of the run's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where the starts of the games come from.")] = 10_000,
    which: checkpoints.Checkpoint = checkpoints.BEST,
    runs_dir: options.RunsDir = options.RUNS,
    trust_env_code: options.TrustEnvCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Draw it as well; the suffix says what kind of picture.")
    ] = None,
) -> None:
    """Compare a run's learnt model with real games: errors by unroll depth, calibration of values, the search."""
    from distributed_muzero.cli.plot import check_out
    from distributed_muzero.workers.runs import open_to_read

    image_format = None if out is None else check_out(out)
    folder = open_to_read(run, runs_dir, NOT_NEEDED if replay else (*NOT_NEEDED, "replay"))
    saved = checkpoints.load_checkpoint(folder, which)
    result = diagnose_run(folder, saved, episodes, replay, depth, simulations, seed)
    if not replay and result["distinct_games"] == 1 < result["games"]:
        print(
            f"all {result['games']} games are alike: without noise, nothing in them is random. --replay takes the "
            "run's stored games, which differ",
            file=sys.stderr,
        )
    if out is not None and image_format is not None:
        _write_picture(result, out, image_format)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def diagnose_run(
    folder: RunFolder,
    saved: checkpoint.Checkpoint,
    num_episodes: int,
    from_replay: bool,
    num_unroll_steps: int | None,
    num_simulations: int | None,
    seed: int,
) -> dict[str, Any]:
    """Of one checkpoint. Raises RunError where stored games are asked for and there is none."""
    from distributed_muzero.workers import diagnosis
    from distributed_muzero.workers.builder import Builder

    config = folder.config
    builder = Builder(config, folder.name)
    networks = builder.networks()
    diagnosis.load_weights(networks, saved)
    if from_replay:
        games = _stored_games(folder, num_episodes)
    else:
        games = diagnosis.play(builder.environment, networks, config, num_episodes, (seed,), num_simulations)
    result = diagnosis.diagnose(
        networks,
        games,
        config,
        builder.spec.num_players,
        num_unroll_steps=num_unroll_steps,
        num_simulations=num_simulations,
    )
    return {
        "run": folder.name,
        "environment": config.environment.id,
        "checkpoint": saved.path.name,
        "weights_version": saved.state["weights_version"],
        "source": "replay" if from_replay else "played",
        **result,
    }


def _stored_games(folder: RunFolder, number: int) -> list[Any]:
    from distributed_muzero.replay.inspection import select_episodes

    games = [stored.episode for stored in select_episodes(folder.replay, last=number)]
    if not games:
        raise RunError(
            f"run {folder.name} has stored no game yet in {folder.replay}; leave out --replay, so that games are played"
        )
    return games


def _write_picture(result: Mapping[str, Any], path: Path, image_format: str) -> None:
    from distributed_muzero.files import write_atomically
    from distributed_muzero.observability.diagnosis_plot import draw

    try:
        write_atomically(path, draw(result, _headline(result), image_format))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"can't write {path}: {error}; choose another --out") from None
    print(f"wrote {path}", file=sys.stderr)


def _headline(result: Mapping[str, Any]) -> str:
    origin = "stored games" if result["source"] == "replay" else "games played without noise"
    return (
        f"{result['run']} ({result['environment']}), {result['checkpoint']}: {result['games']} {origin}, "
        f"{result['positions']} positions, {result['simulations']} simulations"
    )


def show(result: Mapping[str, Any]) -> None:
    """As tables and sentences, for a person."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, NARROWEST)
    root, search = result["root"], result["search"]
    sentences = (
        f"standard deviation of the returns {_text(result['return_std'])}, of the rewards "
        f"{_text(result['reward_std'])}; {result['truncated_games']} of {result['games']} games were cut by a limit",
        f"search and prior: KL {_text(root['kl'])} nats, the same best action at {root['agreement']:.1%} of the "
        f"positions, entropy {_text(root['search_entropy'])} and {_text(root['prior_entropy'])} nats",
        f"trees: leaves {search['mean_depth']:.1f} deep on average, deepest nodes {search['mean_highest']:.1f} on "
        f"average and {search['highest']} at most; {search['cut_share']:.1%} of the simulations cut by max_depth",
    )
    console.print(_headline(result), markup=False, soft_wrap=True)
    console.print(_depth_table(result))
    for sentence in sentences:
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(_calibration_table(result["calibration"]))


def _depth_table(result: Mapping[str, Any]) -> Table:
    title = f"by unroll depth k (trained up to {result['trained_depth']})"
    table = _table(title, "k", "positions", "value RMSE", "bias", "to search's", "reward RMSE")
    for name in ("policy KL", "illegal"):
        table.add_column(name, justify="right")
    for row in result["depths"]:
        table.add_row(
            str(row["k"]),
            str(row["values"]),
            *(
                _text(row[key])
                for key in (
                    "value_rmse",
                    "value_bias",
                    "search_value_rmse",
                    "reward_rmse",
                    "policy_kl",
                    "illegal_mass",
                )
            ),
        )
    return table


def _calibration_table(calibration: Mapping[str, Any]) -> Table:
    table = _table("calibration of the values at the root", "of", "positions", "predicted", "mean return")
    for name, found in calibration.items():
        for one in found["bins"]:
            table.add_row(name, str(one["count"]), _text(one["predicted"]), _text(one["returned"]))
        table.add_row(name, "all", "error", _text(found["error"]), end_section=True)
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _text(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
