"""OpenSpiel's games, behind the `Environment` protocol: `openspiel:tic_tac_toe`, `openspiel:connect_four(rows=5)`."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.open_spiel_games import Rules, load_rules, trainable_games
from distributed_muzero.environments.reading import draw_fen
from distributed_muzero.errors import EnvironmentFailure

__all__ = ["OpenSpielEnvironment", "make", "trainable_games"]

# Games whose positions come as one line, with the names of their rows and columns as their moves use them.
CHESS = ("87654321", "abcdefgh")
IN_ONE_LINE = {
    "antichess": CHESS,
    "chess": CHESS,
    "crazyhouse": CHESS,
    "shogi": ("abcdefghi", "987654321"),
}


class OpenSpielEnvironment:
    """One game, seen from the player to move.

    Observation: the game's tensor, own pieces first where it is known which planes those are; then, unless the rules
    treat both alike, a plane of 0 or 1 that says who moves.
    Reward: the mover's, half the difference of both players' (which is the mover's own in a zero-sum game).

    The search takes it that two players move in turn. Where one of them may move twice, the other has a move in
    between that does nothing: the last action of all, legal only there, and a plane of ones says so.
    """

    def __init__(self, rules: Rules, id: str, max_episode_steps: int, has_passes: bool):
        self._game, self._view = rules.game, rules.view
        self._has_passes = has_passes
        self._tensor_shape = rules.tensor_shape
        self._pass = self._game.num_distinct_actions()
        self._max_episode_steps = max_episode_steps
        length = self._tensor_shape[0] + self._view.says_player + has_passes
        self.spec = EnvironmentSpec(
            id=id,
            observation_shape=(length, *self._tensor_shape[1:]),
            observation_dtype=np.dtype(np.float32),
            action_shape=(self._pass + has_passes,),
            num_players=self._game.num_players(),
        )
        self._state: Any = None
        self._legal: list[int] = []
        self._player = 0
        self._num_steps = 0
        self._truncated = False

    def initial_state(self, seed: int | None = None) -> np.ndarray:
        self._state = self._game.new_initial_state()
        self._player = self._state.current_player()
        self._num_steps, self._truncated = 0, False
        self._find_legal()
        return self._observe()

    def step(self, action: int) -> tuple[float, np.ndarray, bool]:
        if self._state is None or self._state.is_terminal() or self._truncated:
            raise self._failure("step() without a game: call initial_state() first, also after a game's end")
        if action not in self._legal:
            raise self._failure(f"action {action} is forbidden here")
        reward = 0.0
        if action != self._pass:
            self._state.apply_action(int(action))
            reward = self._reward()
        if self.spec.num_players == 2:
            self._player = 1 - self._player
        self._num_steps += 1
        is_terminal = self._state.is_terminal()
        if self.must_pass and not self._has_passes:
            raise self._failure(
                f"player {1 - self._player} is to move twice in a row, which no random game had shown; set "
                "environment.kwargs={pass_turns: true} to give the other one a move that does nothing in between"
            )
        self._truncated = not is_terminal and self._num_steps >= self._max_episode_steps
        self._find_legal()
        return reward, self._observe(), is_terminal or self._truncated

    def mask(self) -> np.ndarray:
        mask = np.zeros(self.spec.num_actions, dtype=bool)
        mask[self._legal] = True
        return mask

    def to_play(self) -> int:
        return self._player

    @property
    def truncated(self) -> bool:
        return self._truncated

    @property
    def state(self) -> Any:
        """OpenSpiel's own state, for players who know the rules; only to be looked at, or cloned."""
        return self._state

    @property
    def must_pass(self) -> bool:
        """Whether the move in between that does nothing is the only one."""
        return not self._state.is_terminal() and self._state.current_player() != self._player

    def describe(self) -> str:
        names = IN_ONE_LINE.get(self._game.get_type().short_name)
        return draw_fen(str(self._state), *names) if names else str(self._state)

    def action_name(self, action: int) -> str:
        return "pass" if action == self._pass else self._state.action_to_string(self._player, action)

    def close(self) -> None:
        pass

    def _find_legal(self) -> None:
        self._legal = [self._pass] if self.must_pass else self._state.legal_actions()

    def _reward(self) -> float:
        rewards = self._state.rewards()
        if len(rewards) == 1:
            return float(rewards[0])
        return (rewards[self._player] - rewards[1 - self._player]) / 2

    def _observe(self) -> np.ndarray:
        planes = np.array(self._state.observation_tensor(self._player), np.float32).reshape(
            self._tensor_shape
        )
        if (order := self._view.order) is not None:
            first, second, *rest = order
            if self._view.turns and self._player == 1:
                first, second = second, first
            planes = planes[[first, second, *rest]]
        flags = [float(self._player)] * self._view.says_player + [float(self.must_pass)] * self._has_passes
        extra = [np.full((1, *self._tensor_shape[1:]), flag, np.float32) for flag in flags]
        return np.concatenate([planes, *extra])

    def _failure(self, problem: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"{self.spec.id}, step {self._num_steps}: {problem}")


def make(config: EnvironmentConfig) -> OpenSpielEnvironment:
    """Makes `openspiel:GAME`. The section's kwargs are further parameters of the game, and `pass_turns` (true or
    false: whether turns are made to alternate, see OpenSpielEnvironment; unless given, random games decide it).

    Raises UnknownEnvironmentError (no such game) and EnvironmentFailure (a game or parameters that can't be played).
    """
    parameters = dict(config.kwargs)
    pass_turns = parameters.pop("pass_turns", None)
    if pass_turns not in (None, True, False):
        raise EnvironmentFailure(f"{config.id}: pass_turns is {pass_turns!r}; expected true or false")
    rules = load_rules(config.id, json.dumps(parameters, sort_keys=True, default=str))
    has_passes = rules.moves_twice if pass_turns is None else pass_turns and rules.game.num_players() == 2
    return OpenSpielEnvironment(rules, config.id, config.max_episode_steps, has_passes)
