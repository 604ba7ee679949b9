"""A model without arithmetic: what a search costs apart from its network."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from distributed_muzero.search.simulate import CompiledExpand, Expand, Expansion


@register_jitable
def replay(arrays, parents, actions, children, rewards, values, prior_logits):
    """Writes the next of the recorded answers; arrays[3] counts them."""
    recorded_rewards, recorded_values, recorded_logits, turn = arrays
    rewards[:] = recorded_rewards[turn[0]]
    values[:] = recorded_values[turn[0]]
    prior_logits[:] = recorded_logits[turn[0]]
    turn[0] += 1


class Recording:
    """Notes what another model says in its first search, and repeats it in every later one.

    The search is compiled as a whole where it is with that model.
    """

    def __init__(self, model: Any):
        self.model = model
        self.start: tuple[np.ndarray, np.ndarray] | None = None
        self.expansions: list[Expansion] = []
        self.expand: Expand = self._record

    def initial(self, observations: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        if self.start is None:
            self.start = self.model.initial(observations, num_nodes)
        else:
            self.expand = self._make_replay()
        return self.start

    def _record(self, parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
        expansion = self.model.expand(parents, actions, children)
        copied = Expansion(*(part.copy() for part in expansion[:3]))
        self.expansions.append(copied)
        return copied

    def _make_replay(self) -> Expand:
        answers = iter(self.expansions)

        def from_python(parents: np.ndarray, actions: np.ndarray, children: np.ndarray) -> Expansion:
            return next(answers)

        like = self.model.expand
        if not isinstance(like, CompiledExpand):
            return from_python
        columns = [np.stack(column) for column in zip(*(x[:3] for x in self.expansions), strict=True)]
        return CompiledExpand(replay, (*columns, np.zeros(1, np.int64)), like.room, from_python)
