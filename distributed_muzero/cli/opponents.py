"""Who plays in `evaluate`: a run's checkpoint, by its search or without, and whoever it is held against."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from distributed_muzero.cli import checkpoints
from distributed_muzero.cli.options import Policy
from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ConfigError, EnvironmentFailure, RunError

if TYPE_CHECKING:
    from distributed_muzero.matches.players import Player
    from distributed_muzero.run_folder import RunFolder
    from distributed_muzero.workers.builder import Builder

EXPECTED = (
    "expected random, minimax, mcts:SIMS such as mcts:1000, step:STEP for a checkpoint of the run itself, or the name, "
    "path or URI of another run"
)
MAX_SIMULATIONS = 10_000_000


class Side(NamedTuple):
    """A run's checkpoint as a player."""

    player: Player
    checkpoint: str
    num_simulations: int  # 0 without a search
    search_policy: str | None = None  # nor this


def with_search(folder: RunFolder, num_simulations: int | None, policy: Policy | None) -> RunFolder:
    """The same run, searching otherwise where that is asked for."""
    given = {"num_simulations": num_simulations, "policy": policy and policy.value}
    asked = {key: value for key, value in given.items() if value is not None}
    search = SearchConfig.model_validate({**folder.config.search.model_dump(), **asked})
    return replace(folder, config=folder.config.model_copy(update={"search": search}))


def load_side(folder: RunFolder, builder: Builder, checkpoint: str, without_search: bool = False) -> Side:
    """Networks from a checkpoint: `best`, `latest` or a step.   builder: of the run. Raises CheckpointError."""
    from distributed_muzero.matches.players import PriorPlayer, SearchPlayer
    from distributed_muzero.workers.actor import PolicyModel

    saved = checkpoints.load_checkpoint(folder, checkpoint)
    model = PolicyModel(builder.networks())
    model.load_checkpoint(saved)
    assert model.search_model is not None
    config, name = folder.config, f"{folder.name}/{saved.path.name}"
    history_length = config.environment.history_length
    if without_search:
        return Side(PriorPlayer(name, model.search_model, history_length), saved.path.name, 0)
    searching = SearchPlayer(
        name,
        model.search_model,
        config.search,
        config.algorithm.discount,
        history_length=history_length,
    )
    return Side(searching, saved.path.name, config.search.num_simulations, config.search.policy)


def make_opponent(
    text: str, folder: RunFolder, builder: Builder, without_search: bool, runs_dir: str
) -> tuple[Player, int]:
    """Whom --opponent names, and how many observations its networks stack.

    folder, builder: of the run that it plays against. A checkpoint of the same run plays in the same manner, another
    run in its own. Raises ConfigError for a text that names nobody, EnvironmentFailure for an opponent that can't play
    this game, RunError and CheckpointError.
    """
    kind, _, number = text.partition(":")
    if text == "random":
        from distributed_muzero.matches.players import RandomPlayer

        return RandomPlayer(), 1
    is_mcts = kind == "mcts" and not number.startswith("//")
    if text == "minimax" or is_mcts:
        from distributed_muzero.matches.rule_players import make_rule_player

        name = f"mcts:{_number(text, number)}" if is_mcts else text
        return make_rule_player(name, builder.environment(), name.partition(":")[0]), 1
    if kind == "step" and not number.startswith("//"):
        side = load_side(folder, builder, str(_number(text, number)), without_search)
        return side.player, folder.config.environment.history_length
    return _other_run(text, runs_dir, builder)


def _other_run(text: str, runs_dir: str, builder: Builder) -> tuple[Player, int]:
    from distributed_muzero.workers.builder import Builder
    from distributed_muzero.workers.runs import open_to_read

    try:
        folder = open_to_read(text, runs_dir, exclude=("replay",))
    except RunError as error:
        raise RunError(f"--opponent {text!r}: {EXPECTED}; {error}") from None
    other = Builder(folder.config, folder.name)
    here, there = builder.config.environment, folder.config.environment
    if (here.id, here.kwargs) != (there.id, there.kwargs) or builder.spec != other.spec:
        raise EnvironmentFailure(
            f"run {folder.name} plays {there.id} with {there.kwargs or 'no kwargs'}, and run {builder.run_name} "
            f"{here.id} with {here.kwargs or 'no kwargs'}: expected two runs of the same game"
        )
    return load_side(folder, other, checkpoints.BEST).player, there.history_length


def _number(text: str, number: str) -> int:
    if not (number.isdecimal() and number.isascii() and len(number) < 19):
        raise ConfigError(f"--opponent {text!r}: {EXPECTED}")
    if text.startswith("mcts") and not 1 <= int(number) <= MAX_SIMULATIONS:
        raise ConfigError(f"--opponent {text!r}: expected 1 to {MAX_SIMULATIONS:,} simulations")
    return int(number)
