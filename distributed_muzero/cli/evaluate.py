"""`evaluate`: how well a run's checkpoint plays, alone, against opponents, or in every position of a small game."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_muzero.cli import checkpoints, options
from distributed_muzero.cli.elsewhere import in_environment, read_kwargs
from distributed_muzero.cli.opponents import load_side, make_opponent, with_search
from distributed_muzero.errors import ConfigError

if TYPE_CHECKING:
    from distributed_muzero.run_folder import RunFolder

EPISODES, GAMES = 20, 100


def evaluate(
    run: Annotated[str, typer.Argument(help="A run's name, or the path or URI of its folder.")],
    opponent: Annotated[
        str | None,
        typer.Option(
            metavar="random|minimax|mcts:SIMS|step:STEP|RUN",
            help="Whom to play against, in a game for two; random unless given. minimax and mcts:SIMS need an "
            "openspiel: environment; step:STEP is a checkpoint of this run.",
        ),
    ] = None,
    games: Annotated[
        int | None, typer.Option(min=2, help="Against the opponent, an even number; 100 unless given.")
    ] = None,
    opening_plies: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=100,
            help="Games begin with 0 to so many random moves; 4 where both players always play the same, else 0.",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Ask for a move in every position of a small openspiel: game instead."),
    ] = False,
    no_search: Annotated[
        bool,
        typer.Option(
            "--no-search", help="Play the legal move with the highest prior, by the networks alone."
        ),
    ] = False,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Games to play, in an environment for one; 20 unless given.")
    ] = None,
    env: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Play here instead of in the run's own environment; it must be shaped alike."
        ),
    ] = None,
    env_kwargs: Annotated[
        str | None,
        typer.Option(
            metavar="YAML", help="For --env, such as '{max_moves: 30}'; the run's own aren't used there."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where the games' starts come from.")] = 10_000,
    simulations: Annotated[int | None, typer.Option(min=1, help="In place of the run's own.")] = None,
    search_policy: options.SearchPolicy = None,
    checkpoint: checkpoints.Checkpoint = checkpoints.BEST,
    runs_dir: options.RunsDir = options.RUNS,
    trust_env_code: options.TrustEnvCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Measure how well a run's checkpoint plays: greedy, without noise, in environments of its own."""
    from distributed_muzero.workers.runs import open_to_read

    check_together(
        {"--exact": exact},
        {"--opponent": opponent, "--games": games, "--opening-plies": opening_plies, "--episodes": episodes},
    )
    check_together(
        {"--no-search": no_search}, {"--simulations": simulations, "--search-policy": search_policy}
    )
    if games is not None and games % 2:
        raise ConfigError(
            f"--games {games}: expected an even number, as each start is played with both colours"
        )
    kwargs = read_kwargs(env, env_kwargs)
    folder = with_search(open_to_read(run, runs_dir, exclude=("replay",)), simulations, search_policy)
    if env is not None:
        folder = in_environment(folder, env, kwargs)
    players = num_players(folder)
    check_players(
        folder.config.environment.id,
        players,
        {"--episodes": episodes},
        {
            "--opponent": opponent,
            "--games": games,
            "--opening-plies": opening_plies,
            "--exact": exact,
        },
    )
    show: Callable[[dict[str, Any]], None] = print_result
    if exact:
        from distributed_muzero.cli.evaluate_view import print_exact

        result, rules = evaluate_everywhere(folder, checkpoint, no_search)
        show = partial(print_exact, rules=rules)
    elif players == 2:
        result = evaluate_against(
            folder,
            opponent or "random",
            games or GAMES,
            (seed,),
            checkpoint,
            no_search,
            opening_plies,
            runs_dir,
        )
        result["seed"] = seed
    else:
        result = evaluate_alone(folder, episodes or EPISODES, (seed,), checkpoint, no_search)
    if as_json:
        print(json.dumps(result))
        return
    show(result)
    if players == 2 and not exact and opponent is None:
        rules = "minimax, mcts:SIMS, " if folder.config.environment.id.startswith("openspiel:") else ""
        print(f"random moves, as no --opponent was named; others: {rules}step:STEP, another run")


def check_together(first: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raises ConfigError for options of which one leaves the others nothing to say."""
    for name, value in first.items():
        given = [other for other, setting in others.items() if setting is not None]
        if value and given:
            raise ConfigError(f"{name} leaves nothing for {', '.join(given)} to say; leave one of them out")


def num_players(folder: RunFolder) -> int:
    from distributed_muzero.workers.builder import Builder

    return Builder(folder.config, folder.name).spec.num_players


def check_players(
    environment: str, players: int, of_one: Mapping[str, Any], of_two: Mapping[str, Any]
) -> None:
    """Raises ConfigError for options that say nothing for an environment with so many players."""
    is_for_one = players == 1
    wrong = [name for name, value in (of_two if is_for_one else of_one).items() if value not in (None, False)]
    if wrong:
        fitting, here = ("two players", "one") if is_for_one else ("one player", "two")
        raise ConfigError(
            f"{wrong[0]} is for {fitting}, and {environment} is for {here}; leave it out. How many games are "
            f"played, {'--episodes' if is_for_one else '--games'} says"
        )


def evaluate_run(folder: RunFolder, seeds: Sequence[int]) -> dict[str, Any]:
    """Evaluates the best checkpoint, or the last one where none was evaluated, as the run's evaluator does: alone, or a
    game for two against its opponent. Raises CheckpointError."""
    section = folder.config.evaluator
    folder = with_search(folder, section.num_simulations, None)
    if num_players(folder) == 1:
        return evaluate_alone(folder, section.num_episodes, seeds, checkpoints.BEST, False)
    num_games = section.num_episodes + section.num_episodes % 2
    return evaluate_against(folder, section.opponent, num_games, seeds, checkpoints.BEST, False, None, "")


def evaluate_alone(
    folder: RunFolder, num_episodes: int, seeds: Sequence[int], checkpoint: str, without_search: bool
) -> dict[str, Any]:
    """Whole games in an environment for one: their returns, how many were won where that is a matter, and who played
    how. Raises CheckpointError."""
    from distributed_muzero.workers.builder import Builder

    saved = checkpoints.load_checkpoint(folder, checkpoint)
    evaluator = Builder(folder.config, folder.name).evaluator()
    evaluator.load(saved)
    try:
        result = evaluator.evaluate(num_episodes, seeds, 0 if without_search else None)
    finally:
        evaluator.close()
    search = folder.config.search
    return {
        **result,
        "run": folder.name,
        "environment": folder.config.environment.id,
        "checkpoint": saved.path.name,
        "simulations": 0 if without_search else search.num_simulations,
        "search_policy": None if without_search else search.policy,
    }


def evaluate_against(
    folder: RunFolder,
    opponent: str,
    num_games: int,
    seeds: Sequence[int],
    checkpoint: str,
    without_search: bool,
    opening_plies: int | None,
    runs_dir: str,
) -> dict[str, Any]:
    """A match: what MatchResult.to_json says, and who played how. Raises as `load_side` and `make_opponent` do."""
    import numpy as np

    from distributed_muzero.matches.match import default_opening_plies, play_match
    from distributed_muzero.workers.builder import Builder

    began, builder = time.perf_counter(), Builder(folder.config, folder.name)
    other, history_length = make_opponent(opponent, folder, builder, without_search, runs_dir)
    side = load_side(folder, builder, checkpoint, without_search)
    if opening_plies is None:
        opening_plies = default_opening_plies(side.player, other)
    result = play_match(
        side.player,
        other,
        builder.environment,
        num_games,
        np.random.default_rng(list(seeds)),
        history_length=max(folder.config.environment.history_length, history_length),
        opening_plies=opening_plies,
    )
    return {
        **result.to_json(),
        "run": folder.name,
        "checkpoint": side.checkpoint,
        "opponent": other.name,
        "simulations": side.num_simulations,
        "search_policy": side.search_policy,
        "opening_plies": opening_plies,
        "seconds": time.perf_counter() - began,
    }


def evaluate_everywhere(
    folder: RunFolder, checkpoint: str, without_search: bool
) -> tuple[dict[str, Any], Any]:
    """Every position of a small game: what ExactResult.to_json says, and who played how; and OpenSpiel's game.

    Raises CheckpointError, and EnvironmentFailure for a game that can't be solved.
    """
    import numpy as np

    from distributed_muzero.matches.exact import MAX_POSITIONS, play_everywhere
    from distributed_muzero.matches.solver import rules_of, solve
    from distributed_muzero.workers.builder import Builder

    began, builder = time.perf_counter(), Builder(folder.config, folder.name)
    history_length = folder.config.environment.history_length
    rules = rules_of(builder.environment(), "--exact")
    side = load_side(folder, builder, checkpoint, without_search)
    result = play_everywhere(
        side.player,
        builder.environment,
        solve(rules, MAX_POSITIONS),
        np.random.default_rng(0),
        history_length=history_length,
    )
    summary = {
        **result.to_json(),
        "history_length": history_length,
        "run": folder.name,
        "checkpoint": side.checkpoint,
        "simulations": side.num_simulations,
        "search_policy": side.search_policy,
        "seconds": time.perf_counter() - began,
    }
    return summary, rules


def print_result(result: Mapping[str, Any]) -> None:
    """Of games against an opponent, or alone."""
    from distributed_muzero.cli.evaluate_view import describe_alone, print_match

    if "opponent" in result:
        print_match(result)
    else:
        print(describe_alone(result))
