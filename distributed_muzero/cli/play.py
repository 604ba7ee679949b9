"""`play`: a person plays in the terminal against a run's checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from distributed_muzero.cli import checkpoints, options
from distributed_muzero.cli.opponents import with_search
from distributed_muzero.cli.play_view import KEYS, View, find_move
from distributed_muzero.errors import ConfigError, EnvironmentFailure

if TYPE_CHECKING:
    from distributed_muzero.matches.person import Adviser, PersonGame

MAX_ANSWERS = 200  # to one question: an endless pipe of nonsense ends too


def play(
    run: Annotated[str, typer.Argument(help="A run's name, or the path or URI of its folder.")],
    first: Annotated[
        bool | None,
        typer.Option("--first/--second", help="Whether you begin; drawn by the seed unless given."),
    ] = None,
    simulations: Annotated[int | None, typer.Option(min=1, help="In place of the run's own.")] = None,
    search_policy: options.SearchPolicy = None,
    show_search: Annotated[
        bool, typer.Option("--show-search", help="With each of its moves, what the search thought of.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31 - 1, help="Of the game and who begins; made up when absent."),
    ] = None,
    checkpoint: checkpoints.Checkpoint = checkpoints.BEST,
    runs_dir: options.RunsDir = options.RUNS,
    trust_env_code: options.TrustEnvCode = False,
) -> None:
    """Play against a run's checkpoint in the terminal: its search is greedy and without noise.

    An environment for one player you play alone, with the search's advice.
    """
    from distributed_muzero.matches.person import Adviser, PersonGame
    from distributed_muzero.workers.actor import PolicyModel
    from distributed_muzero.workers.builder import Builder
    from distributed_muzero.workers.runs import open_to_read

    folder = with_search(open_to_read(run, runs_dir, exclude=("replay",)), simulations, search_policy)
    saved = checkpoints.load_checkpoint(folder, checkpoint)
    builder = Builder(folder.config, folder.name)
    seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    begins = choose_side(builder.spec.id, builder.spec.num_players, first, seed)
    model = PolicyModel(builder.networks())
    model.load_checkpoint(saved)
    assert model.search_model is not None
    config = folder.config
    adviser = Adviser(model.search_model, config.search, config.algorithm.discount)
    game = PersonGame(builder.environment, config.environment.history_length, seed, begins)
    view = View(game)
    view.introduce(f"{builder.spec.id}, {folder.name} at {saved.path.name}", config.search, seed)
    try:
        play_game(game, adviser, view, show_search)
    except KeyboardInterrupt:
        print("\ninterrupted: the game ends here", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        game.close()


def choose_side(id: str, num_players: int, first: bool | None, seed: int) -> bool:
    """Whether the person begins. Raises ConfigError where there is nothing to choose."""
    if num_players == 1:
        if first is not None:
            raise ConfigError(f"{id} is for one player: leave out --first and --second")
        return True
    if first is None:
        return int(np.random.default_rng([seed, num_players]).integers(2)) == 0
    return first


def play_game(game: PersonGame, adviser: Adviser, view: View, show_search: bool) -> None:
    """Until the game is over or the person leaves it."""
    while not game.is_over:
        if game.must_pass:
            view.tell_idle(game.play(game.legal_actions()[0]))
        elif not game.is_persons_turn:
            opinion = adviser.opinion(game.game)
            if show_search:
                view.show_opinion(opinion)
            view.tell_answer(game.play(opinion.action), opinion)
        elif not persons_turn(game, adviser, view):
            return
    view.tell_end()


def persons_turn(game: PersonGame, adviser: Adviser, view: View) -> bool:
    """Asks until a move is made, taken back or resigned; False if the person leaves."""
    view.show_position(f"move {game.num_moves + 1}")
    names = {action: game.action_name(action) for action in game.legal_actions()}
    for _ in range(MAX_ANSWERS):
        answer = view.ask()
        if answer is None:
            view.tell_left("no more input")
            return False
        key = KEYS.get(answer.lower())
        if key == "quit":
            view.tell_left("you left")
            return False
        if key == "moves":
            view.show_moves(names)
        elif key == "hint":
            view.show_opinion(adviser.opinion(game.game))
        elif key == "resign":
            game.resign()
            return True
        elif key == "undo":
            if take_back(game, view):
                return True
        elif (action := find_move(answer, names)) is None:
            view.tell_wrong(answer, names)
        else:
            view.tell_own(game.play(action))
            return True
    view.tell_left(f"{MAX_ANSWERS} answers without a move")
    return False


def take_back(game: PersonGame, view: View) -> bool:
    try:
        num_taken = game.take_back()
    except EnvironmentFailure as error:
        view.say(str(error))
        return False
    view.tell_taken_back(num_taken)
    return num_taken > 0
