"""`config show|presets|schema`: what can be set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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

app = typer.Typer(help="Show presets, values and the schema of the configuration.", no_args_is_help=True)


@app.command()
def show(
    preset: Annotated[str | None, typer.Option(help="A shipped preset.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Print the whole configuration as YAML: the defaults, a preset or a file, with overrides."""
    if preset is not None and config is not None:
        raise ConfigError("give --preset or --config, not both")
    base = load_preset(preset) if preset is not None else load_file(config) if config is not None else {}
    print(make_config(base, parse_overrides(set_ or [])).to_yaml(), end="")


@app.command()
def presets() -> None:
    """List the shipped presets."""
    for name in preset_names():
        print(f"{name:20} {load_preset(name)['environment']['id']}")


@app.command()
def schema() -> None:
    """Print the configuration's JSON schema."""
    print(json.dumps(Config.model_json_schema(), indent=2))
