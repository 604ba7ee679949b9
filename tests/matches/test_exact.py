"""Play in every position: counts held against plain recursion over all replies."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.config import Config, EnvironmentConfig, SearchConfig
from distributed_muzero.errors import EnvironmentFailure
from distributed_muzero.matches.players import PriorPlayer, RandomPlayer, SearchPlayer
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.networks.registry import make_networks

pytest.importorskip("pyspiel")

import pyspiel

from distributed_muzero.environments import open_spiel
from distributed_muzero.matches.exact import play_everywhere
from distributed_muzero.matches.rule_players import MinimaxPlayer
from distributed_muzero.matches.solver import rules_of, solve

MOVING_TWICE = "dots_and_boxes(num_rows=1,num_cols=2)"
NIM = "nim(pile_sizes=1;2;2)"  # misère


def maker(game, **options):
    return lambda: open_spiel.make(EnvironmentConfig(id=f"openspiel:{game}", **options))


@pytest.fixture(scope="module")
def solutions():
    return {game: solve(rules_of(maker(game)(), "a test")) for game in ("tic_tac_toe", MOVING_TWICE, NIM)}


class Recorded:
    """A player whose moves are written down, by OpenSpiel's history without the moves that do nothing."""

    is_deterministic = True
    name = "recorded"

    def __init__(self, player):
        self.player, self.moves, self.histories = player, {}, []

    def choose(self, games, rng):
        actions = self.player.choose(games, rng)
        for game, action in zip(games, actions, strict=True):
            self.moves[position(game.env.state)] = int(action)
            self.histories.append(game.history.copy())
        return actions


class Planted:
    """Plays the first optimal move; but in one position, any other."""

    is_deterministic = True
    name = "planted"

    def __init__(self, solution, where):
        self.solution, self.where = solution, where

    def choose(self, games, rng):
        return [self.move(game.env.state) for game in games]

    def move(self, state):
        optimal = self.solution.optimal_actions(state).tolist()
        if position(state) == self.where:
            return next(action for action in state.legal_actions() if action not in optimal)
        return optimal[0]


class First:
    """Plays the first legal action."""

    is_deterministic = True
    name = "first"

    def choose(self, games, rng):
        return [int(np.flatnonzero(game.read_mask())[0]) for game in games]


def position(state):
    return state.current_player(), str(state)


def can_lose(state, side, moves):
    """Whether some replies make the player of a side lose, which plays the moves that are written down."""
    if state.is_terminal():
        return state.returns()[side] < 0
    own = state.current_player() == side
    if own and position(state) not in moves:
        return True  # it wasn't asked, as the position is lost
    actions = [moves[position(state)]] if own else state.legal_actions()
    return any(can_lose(state.child(action), side, moves) for action in actions)


def worth(state, player, known):
    """Exact value by plain recursion, for a player."""
    if state.is_terminal():
        return state.returns()[player]
    key = position(state)
    if key not in known:
        mover = state.current_player()
        best = max(worth(state.child(action), mover, known) for action in state.legal_actions())
        known[key] = best if mover == 0 else -best
    return known[key] if player == 0 else -known[key]


def by_recursion(game, moves):
    """positions, losses and mistakes, with nothing of what is tested."""
    known, found = {}, {}
    start = pyspiel.load_game(game).new_initial_state()
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if not state.is_terminal() and position(state) not in found:
            found[position(state)] = state
            waiting += [state.child(action) for action in state.legal_actions()]
    asked = [state for state in found.values() if worth(state, state.current_player(), known) >= 0]
    losses = sum(can_lose(state, state.current_player(), moves) for state in asked)
    mistakes = sum(
        worth(state.child(moves[position(state)]), state.current_player(), known)
        < worth(state, state.current_player(), known)
        for state in asked
    )
    starts = [can_lose(start, side, moves) for side in (0, 1)]
    return len(asked), losses, mistakes, starts


def play(player, game, solutions, **options):
    return play_everywhere(player, maker(game), solutions[game], np.random.default_rng(1), **options)


@pytest.mark.parametrize("game", ["tic_tac_toe", MOVING_TWICE, NIM])
def test_a_perfect_player_has_no_losses_and_no_mistakes(game, solutions):
    result = play(MinimaxPlayer(solutions[game]), game, solutions)
    assert result.losses == result.mistakes == 0
    summary = result.to_json()
    assert summary["optimal_move_share"] == summary["decisive_optimal_share"] == 1.0
    assert summary["first_mistakes"] == []
    assert 0 < result.decisive_positions < result.positions < len(solutions[game].values)
    expected = {0: ("draw", "draw"), 1: ("win", "loss"), -1: ("loss", "win")}
    assert (result.as_first, result.as_second) == expected[int(np.sign(result.start_value))]


def test_one_planted_mistake_is_counted_exactly(solutions):
    """X on 0 and 8, O on 4, and O to move must take a side: a corner lets X make two threats."""
    state = pyspiel.load_game("tic_tac_toe").new_initial_state()
    for action in (0, 4, 8):
        state.apply_action(action)
    player = Recorded(Planted(solutions["tic_tac_toe"], position(state)))
    result = play(player, "tic_tac_toe", solutions)
    assert (result.positions, result.losses, result.mistakes) == by_recursion("tic_tac_toe", player.moves)[:3]
    assert result.mistakes == 1 and result.optimal == result.positions - 1
    [mistake] = result.first_mistakes
    assert sorted(mistake.moves[::2]) == [0, 8] and mistake.moves[1] == 4
    assert mistake.played in (2, 6) and sorted(mistake.optimal) == [1, 3, 5, 7]
    assert (mistake.value, mistake.value_after) == (0, -1)
    # It is lost from there, and from each position in which replies lead there; of two moves that lead there, O's
    # answer to X in a corner is the centre; the first side is never concerned.
    assert result.losses >= 2 and result.as_first == "draw" and result.as_second == "loss"


def test_a_mistake_that_gives_a_win_away_is_no_loss(solutions):
    """X on 0 and 1, O on 3 and 8: X takes 5, where 2 wins, and 4 and 7 make two threats; nobody wins any more."""
    state = pyspiel.load_game("tic_tac_toe").new_initial_state()
    for action in (0, 3, 1, 8):
        state.apply_action(action)
    player = Recorded(Planted(solutions["tic_tac_toe"], position(state)))
    result = play(player, "tic_tac_toe", solutions)
    [mistake] = result.first_mistakes
    assert (mistake.played, mistake.optimal) == (5, [2, 4, 7])
    assert (mistake.value, mistake.value_after) == (1, 0)
    assert (result.losses, result.mistakes) == (0, 1)
    assert (result.as_first, result.as_second) == ("draw", "draw")
    assert (result.positions, result.losses, result.mistakes) == by_recursion("tic_tac_toe", player.moves)[:3]


def random_model(spec, history_length, seed):
    networks = make_networks(spec, history_length, Config().network, seed)
    flat = FlatWeights(networks)
    weights = flat.read().numpy()
    num_parameters = flat.vector.numel()
    weights[:num_parameters] = np.random.default_rng(seed).normal(0, 0.3, num_parameters)
    flat.write(weights)
    networks.eval()
    return make_search_model(networks)


@pytest.mark.parametrize(
    ("game", "searches"),
    [("tic_tac_toe", True), ("tic_tac_toe", False), (MOVING_TWICE, True), (NIM, True)],
)
def test_bad_networks_are_counted_as_by_plain_recursion(game, searches, solutions):
    model = random_model(maker(game)().spec, 1, seed=1)
    search = SearchConfig(num_simulations=6)
    player = Recorded(SearchPlayer("bad", model, search, 1.0) if searches else PriorPlayer("bad", model))
    result = play(player, game, solutions)
    positions, losses, mistakes, starts = by_recursion(game, player.moves)
    assert (result.positions, result.losses, result.mistakes) == (positions, losses, mistakes)
    assert [result.as_first == "loss", result.as_second == "loss"] == starts
    assert result.losses > 0 and result.mistakes > 0
    assert len(player.moves) == positions  # each was asked for once, and no lost one


def test_a_player_without_a_thought_is_counted_too(solutions):
    player = Recorded(First())
    result = play(player, "tic_tac_toe", solutions)
    assert (result.positions, result.losses, result.mistakes) == by_recursion("tic_tac_toe", player.moves)[:3]
    assert len(result.first_mistakes) == 10
    lengths = [len(mistake.moves) for mistake in result.first_mistakes]
    assert lengths == sorted(lengths)


def test_networks_with_a_history_see_the_moves_that_lead_there(solutions):
    player = Recorded(RandomPlayer())
    play(player, "tic_tac_toe", solutions, history_length=3)
    assert {history.shape for history in player.histories} == {(3, 3, 3, 3)}
    late = [history for history in player.histories if history[-1][:2].sum() >= 4]
    # What was seen two moves ago lacks just one stone of each player.
    assert late and all(now[-1][:2].sum() - now[0][:2].sum() == 2 for now in late)


def test_games_that_are_cut_are_refused(solutions):
    with pytest.raises(
        EnvironmentFailure, match=r"cuts games after 5 steps.*raise environment.max_episode_steps"
    ):
        play_everywhere(
            RandomPlayer(),
            maker("tic_tac_toe", max_episode_steps=5),
            solutions["tic_tac_toe"],
            np.random.default_rng(1),
        )
