"""`chaos`: the fault campaign."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import Annotated

import typer

from distributed_muzero.errors import ConfigError


class Protection(StrEnum):
    sync = "sync"
    dedupe = "dedupe"
    checksum = "checksum"


def chaos(
    minutes: Annotated[
        float, typer.Option(min=0.01, help="Under 8, the costly checks are made fewer times.")
    ] = 8.0,
    seed: Annotated[int, typer.Option(min=0, help="What is killed, when, and how.")] = 1,
    only: Annotated[
        str | None,
        typer.Option(
            help="Promises to check, separated by commas, of P2 P3 P4 P5 P8 P10 P11 P12 P13 P15 (docs/recovery.md)."
        ),
    ] = None,
    without: Annotated[
        Protection | None, typer.Option(help="Take a protection out, to see the campaign fail.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Kill, tear, flip and fill up what the system stands on, and check what it promises. Exit 1 if one breaks."""
    from distributed_muzero.chaos.campaign import PROMISES, STORM_PROMISES, Campaign

    chosen = {name.strip().upper() for name in only.split(",")} if only else set()
    if unknown := chosen - PROMISES.keys():
        raise ConfigError(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(PROMISES)}")
    if without and chosen and not chosen & STORM_PROMISES:
        raise ConfigError(
            f"--without {without.value} shows in {' and '.join(sorted(STORM_PROMISES))} only, and --only {only} "
            "tries neither: leave one of the two out"
        )
    campaign = Campaign(seed, minutes, chosen, without.value if without else None, tell)
    campaign.run()
    result = campaign.to_json()
    if as_json:
        print(json.dumps(result))
    else:
        print_table(result)
    raise typer.Exit(1 if campaign.is_broken else 0)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_table(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("promise", "what", "n", "broken", "median s", "max s")
    for row in result["promises"]:
        times = [
            f"{row[name]:.1f}" if row[name] is not None else "" for name in ("median_seconds", "max_seconds")
        ]
        table.add_row(row["id"], row["what"], str(row["n"]), str(row["broken"]), *times)
    console = Console()
    console.print(table)
    for row in result["promises"]:
        for example in row["examples"]:
            console.print(f"{row['id']}: {example}", markup=False)
    console.print(
        f"acknowledged {result['acknowledged']}, lost {result['lost']}, duplicates {result['duplicates']}"
    )
    broken = [row["id"] for row in result["promises"] if row["broken"]]
    console.print(f"BROKEN: {', '.join(broken)}" if broken else "every promise was kept")
