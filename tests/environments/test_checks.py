"""Each promise of an environment is broken by a tiny one, which fails that check and no other."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments import checks, random_games
from distributed_muzero.environments.base import MAX_MAGNITUDE, EnvironmentSpec
from distributed_muzero.environments.chain import ChainEnvironment
from distributed_muzero.environments.checks import check_environment
from distributed_muzero.environments.checks_of_games import OF_GAMES, Broken
from distributed_muzero.environments.checks_of_instances import OF_INSTANCES, check_after_the_end
from distributed_muzero.environments.registry import make_environment
from tests.environments.games import Nim


def check(make, max_episode_steps=100, **options):
    return check_environment(make, max_episode_steps=max_episode_steps, num_games=5, **options)


def failing(report):
    return {row.name: row.detail for row in report.checks if row.passed is False}


class NoNumberOfPlayers(Nim):
    def __init__(self):
        super().__init__()
        self.spec = self.spec._replace(num_players=3)


class NoTupleOfSizes(Nim):
    def __init__(self):
        super().__init__()
        self.spec = self.spec._replace(action_shape=(3.0,))


class NoActions(Nim):
    def __init__(self):
        super().__init__()
        self.spec = self.spec._replace(action_shape=())


class NoDtype(Nim):
    def __init__(self):
        super().__init__()
        self.spec = self.spec._replace(observation_dtype="float32")


class LongDoubles(Nim):
    """More bytes than networks and files can take."""

    def __init__(self):
        super().__init__()
        self.spec = self.spec._replace(observation_dtype=np.dtype(np.longdouble))


class OtherByteOrder(Nim):
    def __init__(self):
        super().__init__()
        self.spec = self.spec._replace(observation_dtype=np.dtype(np.float32).newbyteorder())


class Raises(Nim):
    def step(self, action):
        if self.left < 6:
            raise KeyError("lost")
        return super().step(action)


class Doubles(Nim):
    def observe(self):
        return super().observe().astype(np.float64)


class Longer(Nim):
    def observe(self):
        return np.zeros(self.left + 1, np.float32)


class NotANumber(Nim):
    def observe(self):
        return np.full(11, np.nan if self.left < 6 else 0, np.float32)


class BeyondReplay(Nim):
    """Finite, and a float32, but no shard takes it."""

    def observe(self):
        return np.full(11, -2e15 if self.left < 6 else 0, np.float32)


class RewardBeyondReplay(Nim):
    def step(self, action):
        reward, observation, is_terminal = super().step(action)
        return reward * -2e15, observation, is_terminal


class InfiniteReward(Nim):
    def step(self, action):
        reward, observation, is_terminal = super().step(action)
        return reward * np.inf if is_terminal else reward, observation, is_terminal


class RewardInWords(Nim):
    def step(self, action):
        _, observation, is_terminal = super().step(action)
        return "won" if is_terminal else "nothing", observation, is_terminal


class NothingAllowed(Nim):
    def mask(self):
        return super().mask() & (self.left > 5)


class MaskOfAnotherShape(Nim):
    def mask(self):
        return super().mask()[:, None]


class MaskOfProbabilities(Nim):
    def mask(self):
        return super().mask() * 0.5


class OnePlayerMoves(Nim):
    def to_play(self):
        return 0


class ThirdPlayer(Nim):
    def to_play(self):
        return self.player + 1


class EndInWords(Nim):
    def step(self, action):
        reward, observation, is_terminal = super().step(action)
        return reward, observation, "over" if is_terminal else ""


class TruncatedInWords(Nim):
    truncated = "no"


class NeverEnds(Nim):
    def step(self, action):
        _, observation, _ = super().step(action)
        if self.left < 4:
            self.left = self.stones
        return 0.0, observation, False


class OneBuffer(Nim):
    """Its own array is given out, and written over."""

    def observe(self):
        if not hasattr(self, "buffer"):
            self.buffer = np.zeros(11, np.float32)
        self.buffer[:] = super().observe()
        return self.buffer


class OtherMaskWhenAskedAgain(Nim):
    def observe(self):
        self.is_asked = False
        return super().observe()

    def step(self, action):
        self.is_asked = False
        return super().step(action)

    def mask(self):
        mask = super().mask() & (np.arange(3) < (1 if self.is_asked else 3))
        self.is_asked = True
        return mask


class OwnMask(Nim):
    """Its own array is given out: whoever writes to it forbids what was allowed."""

    def initial_state(self, seed=None):
        self.own = np.ones(3, dtype=bool)
        return super().initial_state(seed)

    def mask(self):
        if hasattr(self, "left"):
            self.own &= np.arange(1, 4) <= self.left
        return self.own


class TakesAnything(Nim):
    def step(self, action):
        return super().step(min(action, self.left - 1, 2))


class StartsByChance(Nim):
    num_made = 0

    def __init__(self):
        type(self).num_made += 1
        super().__init__()

    def initial_state(self, seed=None):
        observation = super().initial_state(seed)
        self.player = self.num_made % 2
        return observation


class SharedHeap(Nim):
    """One heap for all instances."""

    heap = 0

    @property
    def left(self):
        return SharedHeap.heap

    @left.setter
    def left(self, number):
        SharedHeap.heap = number


class OtherTruncatedWhenAskedAgain(Nim):
    is_cut = False

    @property
    def truncated(self):
        self.is_cut = not self.is_cut
        return self.is_cut


class ClosesOnlyAGame(Nim):
    def close(self):
        del self.left


class ClosesNoGame(Nim):
    def close(self):
        assert getattr(self, "left", self.stones) < self.stones, "a game goes on"


class ClosesNever(Nim):
    def close(self):
        raise OSError("no window")


class RewardsAgain(Nim):
    def step(self, action):
        return (1.0, self.observe(), True) if self.left == 0 else super().step(action)


class GoesOnAfterTheEnd(Nim):
    def step(self, action):
        return (0.0, self.observe(), False) if self.left == 0 else super().step(action)


class StartsOnce(Nim):
    """The second game begins where the first one ended."""

    def initial_state(self, seed=None):
        return self.observe() if getattr(self, "left", 1) == 0 else super().initial_state(seed)


BROKEN = [
    ("spec", NoNumberOfPlayers, "num_players is 3; expected 1 or 2"),
    ("spec", NoTupleOfSizes, r"action_shape is \(3.0,\); expected a tuple of sizes"),
    ("spec", NoActions, r"action_shape is \(\); expected a tuple of sizes"),
    ("spec", NoDtype, "observation_dtype is 'float32'; expected a numpy dtype"),
    (
        "observations",
        Doubles,
        r"step 0, seed 1: shape \(11,\) and type float64; expected \(11,\) and float32",
    ),
    ("observations", Longer, r"step 1, seed 1: shape \(\d+,\).*expected \(11,\)"),
    ("spec", LongDoubles, "which networks can't take; expected numbers of up to 8 bytes"),
    ("spec", OtherByteOrder, r"dtype\('>f4'\).*in this machine's byte order"),
    ("observations", BeyondReplay, r"seed 1: holds -2e\+15; expected a finite number from -1e\+15 to 1e\+15"),
    (
        "rewards",
        RewardBeyondReplay,
        r"the reward is -2000000000000000.0; expected a finite number from -1e\+15",
    ),
    ("observations", NotANumber, r"step \d, seed 1: holds nan; expected finite"),
    ("rewards", InfiniteReward, r"seed 1: the reward is inf; expected a finite"),
    ("rewards", RewardInWords, "step 0, seed 1: the reward is 'nothing'; expected a number"),
    ("masks", NothingAllowed, "allows no action; at least one must be legal"),
    ("masks", MaskOfAnotherShape, r"shape \(3, 1\) and type bool; expected \(3,\)"),
    ("masks", MaskOfProbabilities, "holds 0.5; expected 0 and 1 only"),
    ("turns", OnePlayerMoves, "step 1, seed 1: player 0 is to move again"),
    ("turns", ThirdPlayer, r"to_play\(\) is 2; expected 0 … 1"),
    ("ends", EndInWords, "is_terminal is ''; expected True or False"),
    ("ends", TruncatedInWords, "truncated is 'no'; expected True or False"),
    ("length", NeverEnds, "goes on after 100 steps; expected the environment to cut"),
    ("earlier observations", OneBuffer, "step 0, seed 1: changed after it was given out"),
    ("masks again", OtherMaskWhenAskedAgain, r"mask\(\) gave two different masks"),
    ("masks again", OwnMask, "changing the mask that was given out"),
    ("illegal actions", TakesAnything, "action 3 was accepted; expected an error"),
    ("seeds", StartsByChance, "in two environments: the player of step 0 differs"),
    ("instances", SharedHeap, "another environment beside it changed the game"),
    (
        "after the end",
        OtherTruncatedWhenAskedAgain,
        "truncated is (True|False), and (True|False) when asked again",
    ),
    ("close", ClosesOnlyAGame, r"before the first game: close\(\) raised AttributeError: "),
    ("close", ClosesNoGame, r"before the first game: close\(\) raised AssertionError: a game goes on"),
    ("close", ClosesNever, r"after the random games: close\(\) raised OSError: no window"),
]


@pytest.mark.parametrize(("name", "make", "message"), BROKEN, ids=[make.__name__ for _, make, _ in BROKEN])
def test_a_broken_promise_fails_its_check_and_no_other(name, make, message):
    found = failing(check(make))
    assert found.keys() == {name}
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[name])


def test_each_check_is_failed_by_a_broken_environment():
    names = {"spec", "length", "close", *OF_GAMES, *OF_INSTANCES}
    assert {name for name, _, _ in BROKEN} | {"play"} == names


def test_what_is_raised_is_told_with_step_and_seed():
    found = failing(check(Raises))
    assert "seed 1: step(" in found["play"] and "raised KeyError: 'lost'" in found["play"]


def test_a_game_that_begins_where_the_last_one_ended_is_found():
    assert "step 0, seed 2: allows no action" in failing(check(StartsOnce))["masks"]


def test_a_sound_game_keeps_all_promises():
    report = check(Nim)
    assert report.passed and not failing(report) and report.num_games == 5
    details = {row.name: row.detail for row in report.checks}
    assert details["turns"] == "both players in turn"
    assert details["rewards"] == "finite, from 0 to 1"
    assert details["illegal actions"].startswith("3 raises ValueError, a forbidden one (step ")
    assert details["after the end"] == "initial_state() begins anew; a further step() raises ValueError"
    assert details["close"] == "before, within and after games"


@pytest.mark.parametrize(
    ("make", "effect"),
    [
        (RewardsAgain, "is accepted: reward 1.0, the game ends"),
        (GoesOnAfterTheEnd, "is accepted: reward 0.0, the game goes on"),
    ],
)
def test_what_a_step_after_the_end_does_is_told_but_not_judged(make, effect):
    report = check(make)
    assert report.passed, failing(report)
    details = {row.name: row.detail for row in report.checks}
    assert details["after the end"] == f"initial_state() begins anew; a further step() {effect}"


def test_a_game_that_does_not_begin_anew_after_an_end_is_found():
    with pytest.raises(
        Broken, match=r"seed 1, played again after its end: .* differs; expected the same game"
    ):
        check_after_the_end(StartsOnce, 1, 100)


def test_an_observation_may_be_one_number():
    class OneNumber(Nim):
        def __init__(self):
            super().__init__()
            self.spec = self.spec._replace(observation_shape=())

        def observe(self):
            return np.array(self.left, np.float32)

    report = check(OneNumber)
    assert report.passed, failing(report)


def test_the_largest_numbers_that_replay_takes_are_sound():
    class Large(Nim):
        def observe(self):
            return np.full(11, -MAX_MAGNITUDE, np.float32)

        def step(self, action):
            reward, observation, is_terminal = super().step(action)
            return reward * MAX_MAGNITUDE, observation, is_terminal

    assert check(Large).passed


class NeverStarts(Nim):
    def initial_state(self, seed=None):
        raise KeyError("no board")


class NothingIsLegal(Nim):
    def mask(self):
        return np.zeros(3, bool)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            NeverStarts,
            ["observations", "rewards", "masks", "turns", "earlier observations", "ends", "instances"],
        ),
        (NothingIsLegal, ["play", "rewards", "earlier observations", "ends", "instances"]),
    ],
)
def test_a_row_about_which_nothing_was_seen_is_neither_kept_nor_broken(make, names):
    rows = {row.name: row.passed for row in check(make).checks}
    assert {name: rows[name] for name in names} == dict.fromkeys(names)


def test_two_environments_are_not_compared_where_one_alone_raises():
    row = next(row for row in check(Raises).checks if row.name == "instances")
    assert row.passed is None and "raised KeyError: 'lost'" in row.detail


class Giant:
    """Observations of 1 MB in a game without an end."""

    truncated = False
    spec = EnvironmentSpec("giant", (2**20,), np.dtype(np.uint8), (2,))

    def initial_state(self, seed=None):
        return np.zeros(2**20, np.uint8)

    def step(self, action):
        if action > 1:
            raise ValueError(action)
        return 0.0, self.initial_state(), False

    def mask(self):
        return np.ones(2, bool)

    def to_play(self):
        return 0

    def close(self):
        pass


def test_games_stop_where_what_is_kept_of_them_reaches_its_limit(monkeypatch):
    monkeypatch.setattr(checks, "MAX_BYTES", 20 * 2**20)
    report = check(Giant, 10_000)
    # Each observation is kept twice; the first one comes before the first step.
    assert report.passed and report.num_games == 1 and report.num_steps == 9
    rows = {row.name: row for row in report.checks}
    assert rows["length"].passed is None
    assert rows["length"].detail == "no game ended in the memory there was"


def test_all_games_together_stay_within_the_limit(monkeypatch):
    class Ends(Giant):
        def initial_state(self, seed=None):
            self.num_steps = 0
            return super().initial_state()

        def step(self, action):
            self.num_steps += 1
            return 0.0, np.zeros(2**20, np.uint8), self.num_steps == 3

    monkeypatch.setattr(checks, "MAX_BYTES", 20 * 2**20)
    report = check(Ends)
    assert report.num_games == 3 and 6 <= report.num_steps <= 8


def test_a_game_alone_has_a_limit_too():
    game = random_games.play(Giant(), 1, 10_000)
    assert game.short_of == "memory" and len(game.copies) == 64


def test_a_long_game_of_little_observations_is_counted_as_the_memory_it_takes():
    class Small(Giant):
        def initial_state(self, seed=None):
            return np.zeros(4, np.uint8)

    tracemalloc.start()
    try:
        game = random_games.play(Small(), 1, 5_000)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.5 * used < game.num_bytes < 2 * used


@pytest.mark.parametrize("id", ["chain", "CartPole-v1", "Taxi-v3", "FrozenLake-v1"])
def test_environments_that_come_along_keep_all_promises(id):
    config = EnvironmentConfig(id=id, max_episode_steps=60)
    report = check(lambda: make_environment(config), 60)
    assert report.passed, failing(report)


def test_truncated_games_are_counted():
    report = check(lambda: ChainEnvironment(length=50, max_episode_steps=10))
    details = {row.name: row.detail for row in report.checks}
    assert details["ends"] == "0 by the rules, 5 truncated" and details["length"] == "10 to 10 steps"


def test_what_took_too_long_to_come_up_is_neither_kept_nor_broken():
    ticks = iter(range(10**6))
    report = check(Nim, clock=lambda: float(next(ticks)), seconds=3.0)
    rows = {row.name: row for row in report.checks}
    assert rows["length"].passed is None and rows["ends"].passed is None
    assert rows["length"].detail == "no game ended in the time there was"
    assert report.passed and report.num_games == 1
