"""The mover's reward, out of dicts of rewards that come at once or late."""

from __future__ import annotations

import pytest

from distributed_muzero.rllib.zero_sum import Accounts

# Moves of player 0, 1, 0, 1: the first gains 1, the second 2, the third nothing, the fourth 3. Each convention tells
# the same; None: not named.
GAINS = [1.0, 2.0, 0.0, 3.0]
AT_ONCE_TO_BOTH = [(1, -1), (-2, 2), (0, 0), (-3, 3)]
TO_WHO_OBSERVES_NEXT = [(None, -1), (1 - 2, None), (None, 2 - 0), (-3, 3)]
TO_WHO_HAS_MOVED = [(1, None), (None, -1 + 2), (-2 + 0, None), (-3, 3)]
AT_THE_END = [(None, None), (None, None), (None, None), (-4, 4)]


def mover_rewards(steps):
    accounts = Accounts()
    return [accounts.add(rewards, t % 2, t == len(steps) - 1) for t, rewards in enumerate(steps)]


@pytest.mark.parametrize("steps", [AT_ONCE_TO_BOTH, TO_WHO_OBSERVES_NEXT, TO_WHO_HAS_MOVED])
def test_each_mover_gets_what_its_own_move_gained(steps):
    assert mover_rewards(steps) == GAINS


def test_what_is_only_told_at_the_end_is_gained_there():
    assert mover_rewards(AT_THE_END) == [0, 0, 0, 4]


@pytest.mark.parametrize(
    "steps", [AT_ONCE_TO_BOTH, [(1, None), (None, 2), (0, None), (-5, 2)]], ids=["told", "losses told late"]
)
def test_gains_add_up_to_the_result_however_late_they_are_told(steps):
    first, second, third, fourth = mover_rewards(steps)
    assert first - second + third - fourth == -4


@pytest.mark.parametrize(
    "steps",
    [[(1, 1), (None, None)], [(-0.5, None), (0.0, 0.0)], [(None, None), (1, None)]],
    ids=["both gain", "a punishment", "a winner alone"],
)
def test_games_that_are_not_zero_sum_are_refused(steps):
    with pytest.raises(ValueError, match="expected one's gain to be the other's loss"):
        mover_rewards(steps)


def test_sums_may_round():
    steps = [(0.1, -0.1), (0.2, -0.2), (-0.3, 0.3)]
    assert mover_rewards(steps) == pytest.approx([0.1, -0.2, -0.3])
