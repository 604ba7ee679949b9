"""The rule that chooses the number of actors: numbers worked by hand, and a run in a few lines to try it on."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from distributed_muzero.cluster.scaling import (
    LARGEST_STEP,
    MEASURE_SECONDS,
    SPARE,
    TOLERATED,
    Autoscaler,
    desired_actors,
)
from distributed_muzero.workers.run_state import Crew, Waiting


def measured(actors=0.0, learner=0.0):
    """Of a hundred seconds: the shares that each side waited."""
    return Waiting(100, 100 * actors, 100, 100 * learner)


@pytest.mark.parametrize(
    ("num_actors", "actors", "learner", "wanted"),
    [
        (4, 0, 0.2, 5),  # learns four fifths of the time from 4: 4 / 0.8
        (9, 0, 0.25, 12),  # 9 / 0.75
        (3, 0, 0.9, 6),  # 30 by the shares; twice as many is the most
        (1, 0, 1.0, 2),
        (4, 0, 0.1, 4),  # tolerated
        (10, 0.5, 0, 6),  # 5 play as much, with a spare one by rounding up 5.25
        (40, 0.25, 0, 32),  # 30, and 5% more
        (100, 0.9, 0, 50),  # 11 by the shares; half as many is the least
        (3, 0.97, 0, 1),
        (2, 0.6, 0, 1),
        (1, 0.9, 0, 1),
        (10, 0.1, 0, 10),  # tolerated
        (2, 0.45, 0, 2),  # 1.1 are needed
        (10, 0.5, 0.5, 10),  # something else is too slow
        (10, 0, 0, 10),
    ],
)
def test_by_hand(num_actors, actors, learner, wanted):
    assert desired_actors(num_actors, measured(actors, learner), (1, 1000)) == wanted


def test_the_limits_hold():
    assert desired_actors(6, measured(learner=0.5), (2, 8)) == 8
    assert desired_actors(6, measured(actors=0.9), (4, 8)) == 4
    assert desired_actors(6, measured(), (7, 8)) == 7
    assert desired_actors(6, measured(), (1, 3)) == 3


def decide(autoscaler, seconds, crew=None, has_stepped=True, learner=0.5, actors=0.0):
    """After so many seconds since the launch, with the same shares all the time."""
    crew = crew or Crew(4, live=4)
    waiting = Waiting(4 * seconds, 4 * seconds * actors, seconds, seconds * learner)
    return autoscaler.decide(crew, waiting, has_stepped, (1, 100))


def test_it_decides_when_it_has_seen_enough():
    autoscaler = Autoscaler(4)
    assert decide(autoscaler, MEASURE_SECONDS - 1) == 4
    assert decide(autoscaler, MEASURE_SECONDS) == 8
    assert decide(autoscaler, MEASURE_SECONDS, Crew(8, live=8)) == 8  # as many are measured from now on
    assert decide(autoscaler, 2 * MEASURE_SECONDS - 1, Crew(8, live=8)) == 8
    assert decide(autoscaler, 2 * MEASURE_SECONDS, Crew(8, live=8)) == 16


@pytest.mark.parametrize(
    "why",
    [
        {"crew": Crew(4, live=3)},
        {"crew": Crew(4, live=4, draining=1)},
        {"has_stepped": False},  # the replay is filling
        {"learner": 0.6, "actors": 0.6},
        {"learner": TOLERATED, "actors": TOLERATED},
    ],
    ids=["pending", "draining", "filling", "both wait", "nobody waits"],
)
def test_it_holds_while(why):
    autoscaler = Autoscaler(4)
    assert {decide(autoscaler, seconds, **why) for seconds in range(0, 1000, 7)} == {4}


def test_what_was_waited_while_actors_came_is_not_counted():
    autoscaler = Autoscaler(4)
    before = 10 * MEASURE_SECONDS
    assert decide(autoscaler, 0, Crew(4, live=1)) == 4
    assert decide(autoscaler, before, Crew(4, live=4)) == 4
    assert decide(autoscaler, before + MEASURE_SECONDS - 1) == 4
    assert decide(autoscaler, before + MEASURE_SECONDS) == 8


def test_actors_that_never_find_a_place_keep_it_from_asking_for_more_and_not_from_asking_for_fewer():
    autoscaler = Autoscaler(64)
    stuck = Crew(64, live=40)
    assert decide(autoscaler, MEASURE_SECONDS, stuck, learner=0.5) == 64
    assert decide(autoscaler, 2 * MEASURE_SECONDS, stuck, learner=0.0, actors=0.4) < 40


def test_the_first_number_is_inside_the_limits():
    assert Autoscaler(32, (2, 8)).num_actors == 8
    assert Autoscaler(1, (2, 8)).num_actors == 2
    assert Autoscaler(32).num_actors == 32


class TinyRun:
    """Actors, the limiter and the learner, in steps of half a second.

    enough: how many actors the learner keeps up with, a real number.   slack: seconds that the learner alone takes
    from one end of the limiter's slack to the other.   start: seconds until a new actor plays.   noise: of each
    side's speed, from step to step.
    """

    STEP = 0.5

    def __init__(self, enough, slack, start, noise, seed):
        self.enough, self.slack, self.start, self.noise = enough, slack, start, noise
        self.rng = np.random.default_rng(seed)
        self.balance = 0.0  # seconds of the learner's work that lie ready, within ± slack / 2
        self.waiting = Waiting()
        self.live, self.desired, self.coming = 0, 0, 0.0

    def advance(self, desired):
        if desired > self.desired:
            self.coming = self.start
        self.desired = desired
        self.coming = max(self.coming - self.STEP, 0)
        self.live = desired if self.coming == 0 else min(self.live, desired)
        speed = 1 + self.noise * self.rng.uniform(-1, 1, size=2)
        played = self.STEP * self.live / self.enough * speed[0]
        learnt = self.STEP * speed[1]
        # What one side gives, the other may use in the same moment; beyond the slack, either waits.
        room = self.slack / 2 - self.balance
        takes = min(learnt, self.slack / 2 + self.balance + played)
        gives = min(played, room + takes)
        self.balance += gives - takes
        idle = 1 - gives / played if played else 0.0
        self.waiting = Waiting(
            self.waiting.actor_seconds + self.STEP * self.live,
            self.waiting.actor_waited + self.STEP * self.live * idle,
            self.waiting.learner_seconds + self.STEP,
            self.waiting.learner_waited + self.STEP * (1 - takes / learnt),
        )
        return Crew(desired, self.live)


def grow(run, num_actors, limits, minutes):
    """The numbers of actors, one for each step of the run."""
    autoscaler = Autoscaler(num_actors)
    desired, numbers = num_actors, []
    for _ in range(int(minutes * 60 / run.STEP)):
        crew = run.advance(desired)
        desired = autoscaler.decide(crew, run.waiting, True, limits)
        numbers.append(desired)
    return numbers


@settings(max_examples=50, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    first=st.integers(1, 200),
    enough=st.floats(0.2, 120),
    slack=st.floats(0.5, 60),
    start=st.floats(0, 120),
    noise=st.floats(0, 0.2),
    seed=st.integers(0, 2**31),
    low=st.integers(1, 20),
    span=st.integers(0, 150),
)
def test_from_anywhere_it_finds_a_number_that_starves_nobody_and_stays(
    first, enough, slack, start, noise, seed, low, span
):
    limits = (low, low + span)
    run = TinyRun(enough, slack, start, noise, seed)
    numbers = grow(run, first, limits, minutes=60)
    assert set(numbers) <= set(range(limits[0], limits[1] + 1))
    last = numbers[-1]
    # Noise may show at last that a few actors too many are tolerated; nothing leads back from there.
    assert len(set(numbers[len(numbers) // 2 :])) <= (2 if noise else 1), "it hasn't settled"
    # It turns once at most, where new actors were counted before they had an effect.
    directions = [np.sign(after - before) for before, after in pairwise(numbers) if after != before]
    assert sum(one != other for one, other in pairwise(directions)) <= 1
    before = run.waiting
    for _ in range(int(600 / run.STEP)):
        run.advance(last)
    now = run.waiting.since(before)
    if last < limits[1]:
        assert now.learner_share <= TOLERATED + 0.02
    if last > limits[0]:
        assert last <= math.ceil(enough * (1 + SPARE) * 1.02) or now.actor_share <= TOLERATED + 0.02


def test_it_takes_few_decisions():
    numbers = grow(TinyRun(50, slack=2, start=0, noise=0, seed=0), 1, (1, 100), minutes=10)
    changes = [after for before, after in pairwise(numbers) if after != before]
    assert changes[:5] == [2, 4, 8, 16, 32] and len(changes) <= 8
    assert 45 <= changes[-1] <= 56
    assert LARGEST_STEP == 2
