"""How many actors a run needs so that neither they nor the learner starve. No ray, no clock of its own.

The limiter of the replay shards holds both sides to the samples per insert that were asked for: the side that is too
fast waits. With too few actors the learner waits for batches; with too many, the actors wait for the shards to take
their games. The share of its time that each side waits says how far off the number is.
"""

from __future__ import annotations

import math

from distributed_muzero.workers.run_state import Crew, Waiting

MEASURE_SECONDS = 15.0  # of the learner's time, before each decision
TOLERATED = 0.1  # share of its time that a side may wait
SPARE = 0.05  # more actors than would just do: it is they that should wait a little, rather than the learner
LARGEST_STEP = 2  # times as many actors, or as few


def desired_actors(num_actors: int, waiting: Waiting, limits: tuple[int, int]) -> int:
    """The number of actors that would have kept both sides busy while `waiting` was measured, inside `limits`.

    num_actors: at work meanwhile.   Where the learner waits a share w, it could learn from 1 / (1 − w) times as many;
    where the actors wait a share w, (1 − w) as many would play as much. If both wait, something else is too slow (a
    shard, the network), and another number of actors is no help.

    The number stays once it is found: measured with as many actors, neither side waits so long that it would become
    another, unless their speeds change by more than what is tolerated.
    """
    starving, idle = waiting.learner_share > TOLERATED, waiting.actor_share > TOLERATED
    wanted = num_actors
    if starving and not idle:
        enough = math.ceil(num_actors / max(1 - waiting.learner_share, 0.01))
        wanted = min(enough, num_actors * LARGEST_STEP)
    elif idle and not starving:
        enough = math.ceil(num_actors * (1 - waiting.actor_share) * (1 + SPARE))
        wanted = min(max(enough, num_actors // LARGEST_STEP), num_actors)
    return min(max(wanted, limits[0]), limits[1])


class Autoscaler:
    """Decides anew whenever it has seen enough of the last decision's effect."""

    def __init__(self, num_actors: int, limits: tuple[int, int] | None = None):
        self.num_actors = min(max(num_actors, limits[0]), limits[1]) if limits else num_actors
        self._before = Waiting()
        self._num_live: int | None = None

    def decide(self, crew: Crew, waiting: Waiting, learner_has_stepped: bool, limits: tuple[int, int]) -> int:
        """The actors to ask for now.

        waiting: since the launch. Nothing is measured while the number at work changes, or before the learner's first
        step: a replay that is still filling tells nothing. Pending actors may be so for ever: others are not asked for
        meanwhile, but fewer may be.
        """
        self.num_actors = min(max(self.num_actors, limits[0]), limits[1])
        has_changed = self._num_live not in (None, crew.live)
        self._num_live = crew.live
        if has_changed or not crew.live or crew.draining or not learner_has_stepped:
            self._before = waiting
            return self.num_actors
        measured = waiting.since(self._before)
        if measured.learner_seconds >= MEASURE_SECONDS:
            wanted = desired_actors(crew.live, measured, limits)
            if not crew.pending or wanted < crew.live:
                self.num_actors = wanted
            self._before = waiting
        return self.num_actors
