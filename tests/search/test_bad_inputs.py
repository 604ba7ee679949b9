"""Wrong inputs are refused with words that say what came, what was expected, and where."""

import numpy as np
import pytest

from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ContractError, NonFiniteError
from distributed_muzero.search import Expansion, gumbel_search, muzero_search

LOGITS, VALUES, LEGAL = np.zeros((3, 2)), np.zeros(3), np.ones((3, 2), bool)


def good_expansion(simulation):
    return Expansion(np.zeros(3), np.zeros(3), np.zeros((3, 2)))


@pytest.fixture(params=[muzero_search, gumbel_search])
def search(request):
    """A search of either policy: every wrong input is tried with both."""

    def run(logits=LOGITS, values=VALUES, legal=LEGAL, expansion=good_expansion, **options):
        simulations = iter(range(100))
        _, tree, *_ = request.param(
            logits,
            values,
            legal,
            lambda parents, actions, children: expansion(next(simulations)),
            SearchConfig(num_simulations=8),
            discount=0.9,
            rng=np.random.default_rng(0),
            **options,
        )
        return tree

    return run


def changed(array, index, number):
    array = array.copy()
    array[index] = number
    return array


def test_a_row_that_forbids_everything_is_named(search):
    with pytest.raises(ContractError, match="every action in row 1"):
        search(legal=changed(LEGAL, 1, False))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"logits": np.zeros(3)}, r"root_logits has shape \(3,\)"),
        ({"logits": np.zeros((3, 0))}, r"root_logits has shape \(3, 0\)"),
        ({"values": np.zeros((3, 1))}, r"root_values has shape \(3, 1\); expected \(3,\)"),
        ({"legal": np.ones((2, 2), bool)}, r"legal_mask is bool of shape \(2, 2\)"),
        ({"legal": np.ones((3, 2))}, "legal_mask is float64"),
        ({"num_simulations": 0}, "num_simulations is 0"),
    ],
)
def test_wrong_roots_are_refused(search, inputs, words):
    with pytest.raises(ContractError, match=words):
        search(**inputs)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_root_that_is_not_finite_is_named(search, number):
    with pytest.raises(NonFiniteError, match=r"root in row 2 .*legal"):
        search(logits=changed(LOGITS, (2, 1), number))
    with pytest.raises(NonFiniteError, match="root in row 0"):
        search(values=changed(VALUES, 0, number))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rewards": np.zeros((3, 1))},
        {"values": np.zeros(2)},
        {"prior_logits": np.zeros((3, 3))},
        {"discounts": np.zeros(1)},
    ],
)
def test_a_wrong_shape_from_the_model_names_the_simulation(search, wrong):
    def expansion(simulation):
        return good_expansion(0) if simulation < 4 else good_expansion(0)._replace(**wrong)

    with pytest.raises(ContractError, match=r"simulation 4 gave shapes .*expected \(3,\)"):
        search(expansion=expansion)


@pytest.mark.parametrize("field", ["rewards", "values", "prior_logits", "discounts"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("simulation", [0, 7])
def test_a_number_from_the_model_that_is_not_finite_names_simulation_and_row(
    search, field, number, simulation
):
    good = good_expansion(0)._replace(values=np.ones(3), discounts=np.full(3, 0.9))
    bad = good._replace(**{field: changed(getattr(good, field), 1, number)})
    with pytest.raises(NonFiniteError, match=f"simulation {simulation} .* row 1"):
        search(expansion=lambda i: bad if i == simulation else good)


def test_a_discount_that_is_not_finite_is_found_even_times_zero(search):
    bad = good_expansion(0)._replace(discounts=np.array([0.9, np.inf, 0.9]))
    with pytest.raises(NonFiniteError, match="row 1"):  # all values are 0
        search(expansion=lambda simulation: bad)


def test_minus_infinity_is_a_legitimate_prior_logit(search):
    never = good_expansion(0)._replace(prior_logits=np.tile([0.0, -np.inf], (3, 1)))
    tree = search(expansion=lambda simulation: never)
    assert (tree.children_visits[:, 1:, 1] == 0).all()


def test_noise_of_a_wrong_shape_is_refused():
    with pytest.raises(ContractError, match=r"root_gumbel has shape \(2,\); expected \(3, 2\)"):
        gumbel_search(
            LOGITS,
            VALUES,
            LEGAL,
            lambda parents, actions, children: good_expansion(0),
            SearchConfig(policy="gumbel"),
            discount=0.9,
            rng=np.random.default_rng(0),
            root_gumbel=np.zeros(2),
        )
