"""`bench`: speed, measured here and now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from distributed_muzero.errors import ConfigError

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)

MAX_PRODUCERS = 8

Json = Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")]
Folder = Annotated[
    Path | None,
    typer.Option(help="Where logs are written; the disk counts.", exists=True, file_okay=False),
]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Of an option. Raises ConfigError."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, such as 1,64") from None


def show(result: dict[str, Any], print_table: Callable[[Any], None], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        print_table(result)


@app.command()
def search(
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64,256",
    simulations: Annotated[
        int | None, typer.Option(min=1, help="Simulations a search; by default 50 for E64, 200 for T64.")
    ] = None,
    policy: Annotated[str, typer.Option(help="muzero or gumbel, or both by commas.")] = "muzero",
    network: Annotated[
        str, typer.Option(help="E64 (CartPole's size) or T64 (tic-tac-toe's), or both by commas.")
    ] = "E64",
    against: Annotated[str | None, typer.Option(help="Also run this one on the same network: mctx.")] = None,
    as_json: Json = False,
) -> None:
    """Simulations per second of CPU time of the search on small yardstick networks, on one thread."""
    if against not in (None, "mctx"):
        raise ConfigError(f"--against {against!r}: only mctx is known")
    sizes = numbers("--batches", batches)
    from distributed_muzero.benchmarks.search import print_table, run

    result = run(
        batches=sizes,
        simulations=simulations,
        against_mctx=against == "mctx",
        policies=policy.split(","),
        networks=network.split(","),
    )
    show(result, print_table, as_json)


@app.command()
def replay(
    seconds: Annotated[float, typer.Option(help="How long each measurement lasts.")] = 1.0,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """Batches a second out of a replay shard, on one thread, and durable episodes a second into it, through Ray."""
    from distributed_muzero.benchmarks.replay import print_table, run_inserts, run_sampling
    from distributed_muzero.cluster.session import ray_session
    from distributed_muzero.cluster.throughput import insert_speed

    # One after the other: Ray's own processes would take their share of the cores.
    result = run_sampling(seconds, folder=folder)
    with ray_session(MAX_PRODUCERS):
        result |= run_inserts(insert_speed, seconds, producers=(1, MAX_PRODUCERS), folder=folder)
    show(result, print_table, as_json)


@app.command()
def broadcast(
    actors: Annotated[int, typer.Option(min=1, help="Actor processes that take the weights.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Versions of each kind.")] = 10,
    as_json: Json = False,
) -> None:
    """From the learner's step to the last actor: seconds, private memory, and what it costs the learner."""
    from distributed_muzero.benchmarks.broadcast import print_table, run
    from distributed_muzero.cluster.broadcasting import measure
    from distributed_muzero.cluster.session import ray_session

    with ray_session(actors):
        result = run(measure, actors, repeats=repeats)
    show(result, print_table, as_json)


@app.command()
def cluster(
    actors: Annotated[str, typer.Option(help="Numbers of synthetic actors, by commas.")] = "10,100,500",
    shards: Annotated[str, typer.Option(help="Numbers of replay shards, by commas.")] = "1,2,4",
    seconds: Annotated[float, typer.Option(help="How long each turn lasts, with all actors at work.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each measurement.")] = 3,
    folder: Folder = None,
    as_json: Json = False,
) -> None:
    """The data plane alone: real driver and shards, hundreds of synthetic actors, a learner that doesn't learn."""
    from distributed_muzero.benchmarks.cluster import print_table, run
    from distributed_muzero.cluster.session import ray_session
    from distributed_muzero.cluster.simulation import Players, simulate

    counts = numbers("--actors", actors), numbers("--shards", shards)
    with ray_session(1):
        result = run(simulate, Players, *counts, seconds, repeats, folder)
    show(result, print_table, as_json)
