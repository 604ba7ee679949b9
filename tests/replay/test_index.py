import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.replay.index import EpisodeRing, row_bytes
from tests.episodes import SPEC, make_episode


class ListModel:
    """The ring as a list of (first row, episode): a newcomer drops whatever it covers and all that is older."""

    def __init__(self, capacity):
        self.capacity, self.next_row, self.held, self.evicted = capacity, 0, [], []

    def add(self, episode):
        num_rows = episode.num_steps + 1
        first = self.next_row if self.next_row + num_rows <= self.capacity else 0
        covered = [
            age
            for age, (row, held) in enumerate(self.held)
            if row < first + num_rows and first < row + held.num_steps + 1
        ]
        keep = max(covered) + 1 if covered else 0
        self.evicted += [held for _, held in self.held[:keep]]
        self.held = [*self.held[keep:], (first, episode)]
        self.next_row = first + num_rows


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 9), max_size=40), capacity=st.integers(10, 40), data=st.data())
def test_equals_a_simple_list(lengths, capacity, data):
    ring, model = EpisodeRing(SPEC, capacity, 2**30), ListModel(capacity)
    all_starts = {}
    for number, length in enumerate(lengths):
        episode = make_episode(length, seed=number, name=str(number), version=number)
        starts = data.draw(st.integers(1, length))
        returns = np.arange(length + 1) + 100.0 * number
        ring.add(number, episode, returns, starts)
        model.add(episode)
        all_starts[number] = starts

        assert ring.num_episodes == len(model.held)
        assert ring.num_evicted_episodes == len(model.evicted)
        assert ring.num_transitions == sum(held.num_steps for _, held in model.held)
        assert ring.num_evicted_transitions == sum(held.num_steps for held in model.evicted)
        assert ring.num_transitions + ring.num_evicted_transitions == sum(lengths[: number + 1])
        assert ring.num_starts == sum(all_starts[held.weights_version] for _, held in model.held)

    c = ring.columns
    for first, held in model.held:
        number, played, last = (
            held.weights_version,
            slice(first, first + held.num_steps),
            first + held.num_steps,
        )
        rows = slice(first, last + 1)
        np.testing.assert_array_equal(c.observations[rows], held.observations)
        np.testing.assert_array_equal(c.legal_masks[played], held.legal_masks)
        np.testing.assert_array_equal(c.legal_masks[last], held.legal_masks[-1])
        np.testing.assert_array_equal(c.actions[played], held.actions)
        np.testing.assert_array_equal(c.rewards[rows], [*held.rewards, 0])
        np.testing.assert_array_equal(c.policies[played], held.policies)
        assert (c.policies[last] == 0).all()
        np.testing.assert_array_equal(c.returns[rows], np.arange(held.num_steps + 1) + 100 * number)
        assert (c.first_rows[rows] == first).all() and (c.last_rows[rows] == last).all()
        assert (c.episode_keys[rows] == number).all() and (c.weights_versions[rows] == number).all()

    if lengths:
        valid = {first + t for first, held in model.held for t in range(all_starts[held.weights_version])}
        drawn = ring.sample_rows(60 * len(valid), np.random.default_rng(0))
        assert set(drawn.tolist()) == valid  # each is missed with probability e⁻⁶⁰


def test_every_valid_start_is_drawn_equally_often():
    ring = EpisodeRing(SPEC, 30, 2**30)
    for number, length in enumerate((9, 9, 9, 5)):  # the last one wraps and drops the first
        ring.add(number, make_episode(length, seed=number), np.zeros(length + 1), length)
    rows, counts = np.unique(ring.sample_rows(230_000, np.random.default_rng(0)), return_counts=True)
    assert len(rows) == 9 + 9 + 5
    np.testing.assert_allclose(counts, 10_000, rtol=0.05)


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30), transitions=st.integers(10, 60))
def test_both_budgets_hold_at_every_moment(lengths, transitions):
    max_bytes = 45 * row_bytes(SPEC) + 7
    ring = EpisodeRing(SPEC, transitions, max_bytes)
    held = [ring._starts, ring.root_values, ring.to_play, *ring.columns]
    assert sum(column.nbytes for column in held) <= max_bytes  # nothing is allocated later
    for number, length in enumerate(lengths):
        ring.add(number, make_episode(length, seed=number), np.zeros(length + 1), length)
        assert ring.num_transitions <= transitions and ring.num_bytes <= max_bytes


def test_row_bytes_is_what_the_columns_take():
    ring = EpisodeRing(SPEC, 100, 2**30)
    assert sum(
        column.nbytes for column in (ring._starts, ring.root_values, ring.to_play, *ring.columns)
    ) == 100 * row_bytes(SPEC)


def test_an_episode_as_long_as_the_ring_replaces_everything():
    ring = EpisodeRing(SPEC, 10, 2**30)
    for number, length in enumerate((3, 3, 9, 9)):
        ring.add(number, make_episode(length, seed=number), np.zeros(length + 1), length)
    assert (ring.num_episodes, ring.num_evicted_episodes, ring.num_transitions) == (1, 3, 9)
