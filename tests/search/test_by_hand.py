"""Small searches whose every number can be worked out on paper."""

import numpy as np
import pytest

from distributed_muzero.config import SearchConfig
from distributed_muzero.search import Expansion, muzero_search

BANDIT = {0: 1.0, 1: 3.0}  # reward of each action; all values are 0 and all priors equal


def bandit(normalization: str, num_simulations: int, discount: float = 0.5):
    def expand(parents, actions, children):
        return Expansion(np.array([BANDIT[int(actions[0])]]), np.zeros(1), np.zeros((1, 2)))

    config = SearchConfig(
        num_simulations=num_simulations, q_normalization=normalization, min_max_bounds=(0.0, 4.0), max_depth=1
    )
    return muzero_search(
        np.zeros((1, 2)),
        np.zeros(1),
        np.ones((1, 2), bool),
        expand,
        config,
        discount=discount,
        rng=np.random.default_rng(0),
        noise=False,
        dtype=np.float64,
    )


@pytest.mark.parametrize(
    ("normalization", "visit_counts"),
    [
        # Simulation 0: a tie, so action 0; Q(0) = 1. Then c(N) ≈ 1.25·√N, half of it times the prior's share:
        # 1: N = 2, bonus .44 and .88. parent: lo 0, hi 1, so Q̄(0) = 1, score 1.44 against .88: action 0.
        #    tree: one value known, Q̄(0) = Q = 1, the same.  fixed: Q̄(0) = 1/4, .69 against .88: action 1.
        # 2: N = 3. parent: value 2/3, Q̄(0) = 1, 1 + 1.08/3 = 1.36 against 1.08.  tree: the same.
        #    fixed: Q̄ = 1/4 and 3/4, equal bonus: action 1.
        ("parent_and_siblings", [3, 0]),
        ("tree_min_max", [3, 0]),
        ("min_max", [1, 2]),
    ],
)
def test_three_simulations_of_a_bandit(normalization, visit_counts):
    result, _ = bandit(normalization, 3)
    assert result.visit_counts.tolist() == [visit_counts]


def test_root_value_is_the_mean_of_its_own_value_and_all_returns():
    result, _ = bandit("min_max", 3)  # returns 1, 3, 3 and the root's own 0
    assert result.root_values.tolist() == [7 / 4]
    assert result.qvalues.tolist() == [[1.0, 3.0]]
    np.testing.assert_allclose(result.action_weights, [[1 / 3, 2 / 3]])


@pytest.mark.parametrize(("discount", "root_value"), [(0.5, 1 / 2), (-1.0, 0.0), (1.0, 4 / 3)])
def test_backup_of_a_chain(discount, root_value):
    # One action: the root (value 0) → a child worth 2 by reward 0 → a leaf worth 2 by reward 0.
    # Returns at the root: γ·2 and γ²·2, so ν = (0 + 2γ + 2γ²) / 3, which is 1/2 at γ = 1/2, 0 at −1, 4/3 at 1.
    def expand(parents, actions, children):
        return Expansion(np.zeros(1), np.full(1, 2.0), np.zeros((1, 1)))

    result, tree = muzero_search(
        np.zeros((1, 1)),
        np.zeros(1),
        np.ones((1, 1), bool),
        expand,
        SearchConfig(num_simulations=2),
        discount=discount,
        rng=np.random.default_rng(0),
        noise=False,
        dtype=np.float64,
    )
    np.testing.assert_allclose(result.root_values, [root_value], atol=1e-15)
    np.testing.assert_allclose(tree.node_values[0], [root_value, 1 + discount, 2.0], atol=1e-15)
    assert tree.parents.tolist() == [[-1, 0, 1]]


def test_alternating_players_prefer_the_move_that_is_bad_for_the_other():
    # Action 0 hands the opponent a position worth −1 to them, action 1 one worth +1.
    def expand(parents, actions, children):
        sign = np.where(parents == 0, 1.0, -1.0)
        return Expansion(np.zeros(1), sign * np.where(actions == 0, -1.0, 1.0), np.zeros((1, 2)))

    result, _ = muzero_search(
        np.zeros((1, 2)),
        np.zeros(1),
        np.ones((1, 2), bool),
        expand,
        SearchConfig(num_simulations=2, pb_c_init=100.0, max_depth=1),
        discount=-1.0,
        rng=np.random.default_rng(0),
        noise=False,
    )
    assert result.qvalues.tolist() == [[1.0, -1.0]]
