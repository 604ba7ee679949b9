"""MuZero Reanalyse (MuZero paper, appendix H; MuZero Unplugged): stored steps searched with newer weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import NonFiniteError
from distributed_muzero.networks.inference import SearchModel
from distributed_muzero.types import Episode


def refresh(
    episodes: Sequence[Episode],
    model: SearchModel,
    search: SearchConfig,
    *,
    discount: float,
    history_length: int,
    batch_size: int,
    num_simulations: int | None = None,
    noise: bool,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the model's search says of every step: π [T, A] and ν [T+1] float32 of each episode (decision 17).

    The search is the one that actors play with. The steps of all episodes are searched together, `batch_size` at
    once. ν_T is 0 if the game terminated, else the network's value of the final observation.
    discount: negative where players alternate.  num_simulations: in place of the search's own.
    noise: at the root, as for actors.  rng: for it. PUCT without noise follows from the weights alone, and never tries
    an action whose prior has become small: a policy may stay wrong for ever. Gumbel MuZero without noise still tries
    the actions that it considers, always the same ones.
    Raises NonFiniteError for NaN or Inf from the network, naming a step of an episode.
    """
    if not episodes:
        return []
    histories = _Histories(episodes, history_length)
    steps, last_rows = histories.step_rows, histories.last_rows
    legal_masks = np.concatenate([episode.legal_masks for episode in episodes])
    policies = np.empty(legal_masks.shape, np.float32)
    root_values = np.zeros(len(histories.observations), np.float32)

    for part in _parts(len(steps), batch_size):
        rows = steps[part]
        try:
            result = plan_batch(
                model,
                histories.at(rows),
                legal_masks[part],
                search,
                discount,
                rng=rng,
                noise=noise,
                num_simulations=num_simulations,
            ).result
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (row 0 is {histories.name(rows[0])})") from None
        policies[part] = result.action_weights
        root_values[rows] = result.root_values

    # A time limit is no ending: the final observation is worth what the network says (decision 3).
    cut = last_rows[[not episode.terminated for episode in episodes]]
    for part in _parts(len(cut), batch_size):
        root_values[cut[part]], _ = model.initial(histories.at(cut[part]), 1)
    if not np.isfinite(root_values).all():
        bad = histories.name(int(np.flatnonzero(~np.isfinite(root_values))[0]))
        raise NonFiniteError(f"the network's value is NaN or Inf at {bad}; check its weights")

    ends = np.cumsum([episode.num_steps for episode in episodes])
    return list(zip(np.split(policies, ends[:-1]), np.split(root_values, last_rows[:-1] + 1), strict=True))


class _Histories:
    """The observations of episodes back to back, to be stacked at any rows; T steps take T+1 rows.

    observations: [R, *O].  step_rows: the rows of all steps, in order.  last_rows: of the final observations.
    """

    def __init__(self, episodes: Sequence[Episode], history_length: int):
        num_rows = np.array([episode.num_steps + 1 for episode in episodes])
        self.observations = np.concatenate([episode.observations for episode in episodes])
        self.last_rows = np.cumsum(num_rows) - 1
        self.step_rows = np.delete(np.arange(len(self.observations)), self.last_rows)
        self._first_rows = np.repeat(self.last_rows + 1 - num_rows, num_rows)
        self._episodes = episodes
        self._offsets = np.arange(1 - history_length, 1)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The last observations at `rows` [B], [B, N, *O]; zeros before the first (decision 2)."""
        first = self._first_rows[rows, None]
        past = rows[:, None] + self._offsets
        stacked = self.observations[np.maximum(past, first)]
        stacked[past < first] = 0
        return stacked

    def name(self, row: int) -> str:
        episode = self._episodes[int(np.searchsorted(self.last_rows, row))]
        return f"step {row - self._first_rows[row]} of the episode {episode.episode_id}"


def _parts(number: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, number, size))
