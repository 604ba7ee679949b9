import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.replay.priority import MAX_WEIGHT, SumTree, importance_weights

TINY = 5e-324  # the smallest number above 0
WEIGHTS = st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.sampled_from([TINY, 1e-12, 1e12, MAX_WEIGHT]))


class Constant:
    """A source of randomness that always gives the same number."""

    def __init__(self, number):
        self.number = number

    def random(self, size):
        return np.full(size, self.number)


# The edges of every slice; adding its index rounds the upper one up to the next slice, or to the total.
LOWER_EDGES, UPPER_EDGES = Constant(0.0), Constant(np.nextafter(1.0, 0.0))


def tree_of(weights):
    tree = SumTree(len(weights))
    tree.set_range(0, np.asarray(weights, np.float64))
    return tree


def targets(total, num_rows, rng):
    return (np.arange(num_rows) + rng.random(num_rows)) / num_rows * total


def test_by_hand():
    tree = tree_of([1, 0, 2, 3, 0, 2])
    assert tree.total == 8
    # Four slices of 2, each at its lower edge: 0, 2, 4, 6 in the cumulative sums 1, 1, 3, 6, 6, 8.
    rows, probabilities = tree.sample(4, LOWER_EDGES)
    assert rows.tolist() == [0, 2, 3, 5] and rows.dtype == np.int64
    assert probabilities.tolist() == [1 / 8, 2 / 8, 3 / 8, 2 / 8] and probabilities.dtype == np.float64
    # 99% up each slice: 1.98, 3.98, 5.98, 7.98.
    assert tree.sample(4, Constant(0.99))[0].tolist() == [2, 3, 3, 5]


@settings(deadline=None, max_examples=300)
@given(
    weights=st.lists(st.integers(0, 1_000), min_size=1, max_size=200).filter(any),
    num_rows=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
def test_draws_what_a_search_in_the_cumulative_sums_draws(weights, num_rows, seed):
    rows, probabilities = tree_of(weights).sample(num_rows, np.random.default_rng(seed))
    # Integers of this size are summed without rounding, so both must agree to the row.
    sums = np.cumsum(weights)
    wanted = targets(float(sums[-1]), num_rows, np.random.default_rng(seed))
    np.testing.assert_array_equal(rows, np.searchsorted(sums, wanted, side="right"))
    np.testing.assert_array_equal(probabilities, np.array(weights)[rows] / sums[-1])


@settings(deadline=None, max_examples=200)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=200).filter(any),
    num_rows=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
def test_any_weights_are_drawn_within_rounding_of_the_cumulative_sums(weights, num_rows, seed):
    tree = tree_of(weights)
    rows, probabilities = tree.sample(num_rows, np.random.default_rng(seed))
    sums = np.cumsum(weights)
    assert tree.total == pytest.approx(sums[-1], rel=1e-12)
    wanted, slack = targets(tree.total, num_rows, np.random.default_rng(seed)), 1e-12 * tree.total
    assert (wanted >= sums[rows] - np.array(weights)[rows] - slack).all()
    assert (wanted <= sums[rows] + slack).all()
    np.testing.assert_allclose(probabilities, np.array(weights)[rows] / sums[-1], rtol=1e-12)


@settings(deadline=None, max_examples=200)
@given(capacity=st.integers(1, 130), data=st.data())
def test_any_writes_leave_the_very_sums_of_a_fresh_tree(capacity, data):
    tree, model = SumTree(capacity), np.zeros(capacity)
    for _ in range(data.draw(st.integers(0, 8))):
        if data.draw(st.booleans()):
            rows = data.draw(st.lists(st.integers(0, capacity - 1), max_size=150))
            weights = data.draw(st.lists(WEIGHTS, min_size=len(rows), max_size=len(rows)))
            tree.set(np.array(rows, np.int64), np.array(weights))
            for row, weight in zip(rows, weights, strict=True):
                model[row] = weight
        else:
            first = data.draw(st.integers(0, capacity - 1))
            weights = data.draw(st.lists(WEIGHTS, max_size=capacity - first))
            tree.set_range(first, np.array(weights))
            model[first : first + len(weights)] = weights
        np.testing.assert_array_equal(tree.get(np.arange(capacity)), model)
        np.testing.assert_array_equal(tree._nodes, tree_of(model)._nodes)
    parents = np.arange(1, tree.num_leaves)
    np.testing.assert_array_equal(
        tree._nodes[parents], tree._nodes[2 * parents] + tree._nodes[2 * parents + 1]
    )


@settings(deadline=None, max_examples=200)
@given(first=st.integers(0, 99), weights=st.lists(WEIGHTS, max_size=100))
def test_a_range_equals_its_rows_one_by_one(first, weights):
    weights = np.array(weights[: 100 - first])
    by_range, by_rows, one_by_one = (tree_of(np.arange(100.0)) for _ in range(3))
    by_range.set_range(first, weights)
    by_rows.set(first + np.arange(len(weights)), weights)
    for row, weight in enumerate(weights, start=first):
        one_by_one.set(np.array([row]), np.array([weight]))
    np.testing.assert_array_equal(by_range._nodes, by_rows._nodes)
    np.testing.assert_array_equal(by_range._nodes, one_by_one._nodes)


def test_a_huge_weight_that_came_and_went_leaves_no_trace():
    tree = tree_of(np.full(1000, 0.1))
    before = tree.total
    for row in range(1000):
        tree.set(np.array([row]), np.array([1e18]))
        tree.set(np.array([row]), np.array([0.1]))
    assert tree.total == before
    tree.set_range(0, np.zeros(1000))
    assert tree.total == 0


def test_of_equal_rows_the_last_wins():
    tree = SumTree(10)
    tree.set(np.array([3, 4, 3, 3]), np.array([1.0, 2.0, 9.0, 5.0], np.float32))
    assert tree.get(np.array([3, 4, 5])).tolist() == [5, 2, 0] and tree.total == 7


def test_single_draws_follow_the_weights():
    rng = np.random.default_rng(7)
    weights = rng.exponential(size=60)
    weights[::6] = 0
    tree, num_draws = tree_of(weights), 40_000
    counts = np.bincount([tree.sample(1, rng)[0][0] for _ in range(num_draws)], minlength=60)
    possible = weights > 0
    expected = num_draws * weights[possible] / weights.sum()
    assert counts[~possible].sum() == 0
    # 50 cells: the 99.9% quantile of χ² with 49 degrees of freedom is 85.4, the 0.1% quantile 23.98.
    assert 23.98 < ((counts[possible] - expected) ** 2 / expected).sum() < 85.4


@settings(deadline=None, max_examples=50)
@given(
    # Multiples of 5e-324 (subnormal numbers) are too coarse to be cut into 512 slices.
    weights=st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=50).filter(any),
    seed=st.integers(0, 2**32),
)
def test_a_stratified_batch_holds_every_row_in_its_share(weights, seed):
    rows, _ = tree_of(weights).sample(512, np.random.default_rng(seed))
    # A row covers some slices wholly, and parts of at most two more.
    shares = 512 * np.array(weights) / np.sum(weights)
    assert (abs(np.bincount(rows, minlength=len(weights)) - shares) < 2 + 1e-9).all()


@settings(deadline=None, max_examples=300)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=70).filter(any), seed=st.integers(0, 2**32))
def test_a_row_of_weight_zero_is_never_drawn(weights, seed):
    tree = tree_of(weights)
    for rng in (np.random.default_rng(seed), UPPER_EDGES, LOWER_EDGES):
        for num_rows in (1, 7, 256):
            rows, probabilities = tree.sample(num_rows, rng)
            assert (np.array(weights)[rows] > 0).all()
            assert (probabilities > 0).all() and (probabilities <= 1).all()


def test_tiny_and_huge_weights_mixed():
    rng = np.random.default_rng(0)
    weights = 10.0 ** rng.integers(-12, 13, 5_000)
    weights[rng.random(5_000) < 0.5] = 0
    tree = tree_of(weights)
    for source in (rng, UPPER_EDGES, LOWER_EDGES):
        rows, probabilities = tree.sample(100_000, source)
        assert (weights[rows] > 0).all()
        np.testing.assert_allclose(probabilities, weights[rows] / weights.sum(), rtol=1e-9)


@pytest.mark.parametrize("place", [0, 1, 62, 63, 99])
@pytest.mark.parametrize("weight", [TINY, 1e-12, 0.1, MAX_WEIGHT])
def test_the_only_row_with_a_weight_is_always_drawn(place, weight):
    tree = SumTree(100)
    tree.set(np.array([place]), np.array([weight]))
    for rng in (np.random.default_rng(0), UPPER_EDGES, LOWER_EDGES):
        rows, probabilities = tree.sample(256, rng)
        assert (rows == place).all() and (probabilities == 1).all()


def test_the_upper_edge_never_falls_off_the_last_row_with_a_weight():
    # 0.1 added up rounds differently in every order, so the targets pass the sums that they are looked up in.
    weights = np.zeros(1_000)
    weights[:777] = 0.1
    assert tree_of(weights).sample(100_000, UPPER_EDGES)[0].max() == 776


def test_the_largest_weights_add_up_to_a_finite_total():
    tree = tree_of(np.full(4096, MAX_WEIGHT))
    assert np.isfinite(tree.total)
    assert np.unique(tree.sample(4096, np.random.default_rng(0))[0]).size == 4096


def test_a_tree_of_one_row():
    tree = SumTree(1)
    tree.set(np.array([0]), np.array([2.5]))
    assert tree.total == 2.5 and tree.sample(3, np.random.default_rng(0))[0].tolist() == [0, 0, 0]
    tree.set_range(0, np.array([0.0]))
    assert tree.total == 0


@pytest.mark.parametrize("bad", [-1.0, -TINY, np.nan, np.inf, -np.inf, 1e300])
def test_a_bad_weight_is_named_and_nothing_is_written(bad):
    tree = tree_of([1, 2, 3, 4])
    before = tree._nodes.copy()
    with pytest.raises(ValueError, match=r"weights\[1\] is " + str(bad).replace("+", r"\+")):
        tree.set(np.array([0, 1, 2]), np.array([7, bad, bad]))
    with pytest.raises(ValueError, match=r"weights\[2\] is "):
        tree.set_range(0, np.array([7, 7, bad]))
    np.testing.assert_array_equal(tree._nodes, before)


@pytest.mark.parametrize("bad", [-1, 5, 7, 8, 2**40])
def test_a_bad_row_is_named_and_nothing_is_written(bad):
    # Five rows stand on eight leaves; those of the padding are out of range too.
    tree = tree_of([1, 2, 3, 4, 5])
    before = tree._nodes.copy()
    with pytest.raises(ValueError, match=rf"rows\[1\] is {bad}; expected 0 … 4"):
        tree.set(np.array([0, bad]), np.array([7.0, 7.0]))
    with pytest.raises(ValueError, match=rf"rows\[1\] is {bad}"):
        tree.get(np.array([0, bad]))
    with pytest.raises(ValueError, match="aren't all within"):
        tree.set_range(bad, np.array([7.0]))
    np.testing.assert_array_equal(tree._nodes, before)


def test_other_misuse_is_refused():
    tree = SumTree(5)
    with pytest.raises(ValueError, match="2 rows came with 1 weights"):
        tree.set(np.array([0, 1]), np.array([1.0]))
    with pytest.raises(ValueError, match="rows 3 … 5"):
        tree.set_range(3, np.ones(3))
    with pytest.raises(TypeError):
        tree.set(np.array([0.5]), np.array([1.0]))
    with pytest.raises(ValueError, match="every weight is 0"):
        tree.sample(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="capacity is 0"):
        SumTree(0)


def test_importance_weights_by_hand():
    # N·P = 2, 1, 0.5; to the power −½, over the largest, √2.
    found = importance_weights(np.array([0.2, 0.1, 0.05]), 10, 0.5)
    np.testing.assert_allclose(found, [0.5, np.sqrt(0.5), 1], rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(importance_weights(np.array([0.2, 0.1, 0.05]), 10, 0), [1, 1, 1])


@settings(deadline=None)
@given(
    probabilities=st.lists(st.floats(1e-6, 1), min_size=1, max_size=50),
    num_items=st.integers(1, 10**6),
    exponent=st.floats(0, 1),
)
def test_importance_weights_equal_the_papers_formula(probabilities, num_items, exponent):
    literal = (num_items * np.array(probabilities)) ** -exponent
    found = importance_weights(np.array(probabilities), num_items, exponent)
    np.testing.assert_allclose(found, literal / literal.max(), rtol=1e-5)
    assert found.max() == 1


def test_importance_weights_make_the_mean_over_draws_that_over_rows():
    rng = np.random.default_rng(3)
    weights, losses = rng.exponential(size=200) + 0.1, rng.normal(size=200)
    rows, probabilities = tree_of(weights).sample(200_000, rng)
    found = importance_weights(probabilities, 200, 1.0)
    assert np.average(losses[rows], weights=found) == pytest.approx(losses.mean(), abs=2e-3)


def test_importance_weights_stay_finite_at_the_edges():
    # The tiny row stands on the upper edge.
    rows, probabilities = tree_of([MAX_WEIGHT, TINY]).sample(256, UPPER_EDGES)
    assert rows[-1] == 1
    assert np.isfinite(importance_weights(probabilities, 2, 1.0)).all()
    with pytest.raises(ValueError, match="item 1 is 0"):
        importance_weights(np.array([0.5, 0.0]), 10, 1.0)
    assert importance_weights(np.zeros(0), 10, 1.0).shape == (0,)
