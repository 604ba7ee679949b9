"""`envs` and `envs check`: what can be trained here, and whether an environment keeps its promises."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_muzero.cli import options
from distributed_muzero.config import EnvironmentConfig, make_config, parse_overrides
from distributed_muzero.errors import ConfigError

if TYPE_CHECKING:
    from distributed_muzero.environments.checks import Report

app = typer.Typer(help="List the environments that can be trained here, or check one.")
RESULTS = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[dim]not seen[/]"}


@app.callback(invoke_without_command=True)
def envs(context: typer.Context) -> None:
    """List the environments that can be trained here, or check one."""
    if context.invoked_subcommand is not None:
        return
    from distributed_muzero.environments.registry import environment_ids

    entries = environment_ids()
    width = max(len(entry.id) for entry in entries)
    for entry in entries:
        needs = f"  needs: {entry.missing}" if entry.missing else ""
        extra = f"  with {entry.kwargs}" if entry.kwargs else ""
        print(f"{entry.id:{width}}  {entry.family}{extra}{needs}")


@app.command()
def check(
    id: Annotated[str, typer.Argument(metavar="ID", help="An environment's id, as for `train --env`.")],
    env_kwargs: Annotated[
        str, typer.Option(metavar="YAML", help="For its constructor, such as '{size: 9}'.")
    ] = "{}",
    max_episode_steps: Annotated[
        int, typer.Option(min=1, help="environment.max_episode_steps: a longer game has to be truncated.")
    ] = EnvironmentConfig().max_episode_steps,
    games: Annotated[int, typer.Option(min=1, help="Random games to play.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.1, help="At most, for these games.")] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the first game.")] = 1,
    trust_env_code: options.TrustEnvCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Play random games and check what an environment promises: a row for each promise, exit code 1 if one breaks."""
    from distributed_muzero.environments.checks import check_environment
    from distributed_muzero.environments.registry import make_environment

    section = {"id": id, "kwargs": parse_kwargs(env_kwargs), "max_episode_steps": max_episode_steps}
    config = make_config({"environment": section}).environment
    report = check_environment(
        lambda: make_environment(config),
        max_episode_steps=max_episode_steps,
        num_games=games,
        seed=seed,
        seconds=seconds,
    )
    if as_json:
        print(json.dumps(as_dict(id, report)))
    else:
        show(id, report)
    if not report.passed:
        raise typer.Exit(1)


def parse_kwargs(text: str) -> dict[str, Any]:
    """As `--set environment.kwargs=…` reads them. Raises ConfigError unless the text is a YAML mapping."""
    try:
        kwargs = parse_overrides([f"environment.kwargs={text}"])["environment"]["kwargs"]
    except ConfigError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ConfigError(f"--env-kwargs {text!r}: expected a YAML mapping, such as '{{size: 9}}'")
    return kwargs


def as_dict(id: str, report: Report) -> dict[str, Any]:
    return {
        "id": id,
        "passed": report.passed,
        "games": report.num_games,
        "steps": report.num_steps,
        "checks": [row._asdict() for row in report.checks],
    }


def show(id: str, report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(id), title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for row in report.checks:
        table.add_row(row.name, RESULTS[row.passed], escape(row.detail))
    console = Console()
    console.print(table)
    failed = [row.name for row in report.checks if row.passed is False]
    console.print(f"broken: {', '.join(failed)}" if failed else "all promises are kept")
