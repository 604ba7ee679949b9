"""A small game of tokens, with the columns that a real one has."""

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec, TokenColumn

COLUMNS = (
    TokenColumn("kind", "category", 5, links=True),  # 0 = none, and four kinds
    TokenColumn("size", "number"),
    TokenColumn("partner", "index"),
    TokenColumn("wanted", "category", 5, shared=True),
    TokenColumn("moves_left", "number", shared=True),
)


def token_spec(num_slots=12, num_rules=2, columns=COLUMNS):
    shape = num_slots, len(columns)
    return EnvironmentSpec("tokens", shape, np.dtype(np.float32), (num_slots, num_rules), 1, columns)


class Seek:
    """4 … 8 tokens of kinds 1 … 4, one of them of the wanted kind: taking it by rule 0 is worth 1, by rule 1 −1.

    Taking another one is worth 0. The game is over after two moves; the kind wanted and the tokens change in between.
    The best return is 2.
    """

    def __init__(self, seed=0, num_slots=12):
        self.spec = token_spec(num_slots)
        self.truncated = False
        self._seed = seed

    def initial_state(self, seed=None):
        self._rng = np.random.default_rng(self._seed if seed is None else seed)
        self._moves_left = 2
        return self._deal()

    def step(self, action):
        slot, rule = divmod(int(action), 2)
        reward = 0.0 if self._kinds[slot] != self._wanted else 1.0 - 2 * rule
        self._moves_left -= 1
        return reward, self._deal(), self._moves_left == 0

    def mask(self):
        mask = np.zeros(self.spec.action_shape)
        mask[: len(self._kinds)] = 1
        return mask

    def to_play(self):
        return 0

    def close(self):
        pass

    def _deal(self):
        count = int(self._rng.integers(4, 9))
        self._wanted = int(self._rng.integers(1, 5))
        others = [kind for kind in range(1, 5) if kind != self._wanted]
        self._kinds = self._rng.choice(others, count)
        self._kinds[self._rng.integers(count)] = self._wanted
        return observe(
            self.spec, self._kinds, self._rng.normal(3, 2, count), self._wanted, self._moves_left, self._rng
        )


def observe(spec, kinds, sizes, wanted, moves_left, rng):
    """[L, C]: the tokens, whose partners are drawn, one row each, then empty rows."""
    observation = np.zeros(spec.observation_shape, np.float32)
    count = len(kinds)
    observation[:count, 0], observation[:count, 1] = kinds, sizes
    observation[:count, 2] = rng.integers(-1, count, count)
    observation[:, 3], observation[:, 4] = wanted, moves_left
    return observation


def random_observations(spec, batch, longest, seed=0):
    """[B, 1, L, C] of 1 … `longest` tokens, the first row having as many."""
    rng = np.random.default_rng(seed)
    counts = [longest, *rng.integers(1, longest + 1, batch - 1)]
    rows = [
        observe(
            spec,
            rng.integers(1, 5, count),
            rng.normal(3, 2, count),
            rng.integers(1, 5),
            rng.integers(1, 9),
            rng,
        )
        for count in counts
    ]
    return np.stack(rows)[:, None]
