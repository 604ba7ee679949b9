"""Whose reward is whose: from RLlib's dicts of rewards to the mover's, in games of two that are zero-sum."""

from __future__ import annotations

import math

TOLERANCE = 1e-6  # sums of rewards round


class Accounts:
    """What each player has been told that it has earned in a game, and what the mover's step was worth.

    One's gain is the other's loss, so the account of one player who has been told everything is enough. That is

    - who observes next, if the step's rewards name it: RLlib gives rewards out with observations, and PettingZooEnv
      keeps a player's until then, those for its own move included;
    - else the mover, if they name it: environments that reward each move at once, and only who made it.

    Where both are named, and at the end, both have been told everything: then their sums must cancel. A game that is
    cut elsewhere ends unchecked.
    """

    def __init__(self) -> None:
        self._earned = [0.0, 0.0]
        self._balance = 0.0  # player 0's gain so far, as far as it is known
        self.is_empty = True  # nobody has been told anything but 0
        self.was_checked = False  # both had been told everything, and it cancelled

    def add(self, rewards: tuple[float | None, float | None], mover: int, is_over: bool) -> float:
        """rewards: of player 0 and 1 in this step, None = not named. Returns the mover's.

        Raises ValueError unless the game is zero-sum so far.
        """
        other = 1 - mover
        for player, reward in enumerate(rewards):
            self._earned[player] += reward or 0.0
        self.is_empty &= not any(rewards)
        if is_over or None not in rewards:
            self._check()
        before = self._balance
        if is_over or rewards[other] is not None:
            self._balance = self._gain_of_first(other)
        elif rewards[mover] is not None:
            self._balance = self._gain_of_first(mover)
        gain = self._balance - before
        return gain if mover == 0 else -gain

    def _gain_of_first(self, player: int) -> float:
        return self._earned[0] if player == 0 else -self._earned[1]

    def _check(self) -> None:
        first, second = self._earned
        if not math.isclose(first, -second, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            raise ValueError(
                f"who moved first has earned {first:g} by now and the other player {second:g}; expected one's gain to "
                "be the other's loss: give both their rewards, and mask illegal actions rather than punishing them"
            )
        self.was_checked = True
