import numpy as np
import pytest
import torch

from distributed_muzero import planning
from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.config import NetworkConfig, SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ContractError, DistributedMuZeroError, NonFiniteError
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.networks.registry import make_networks
from tests.games import constant_functions, nim_functions, nim_networks

ONE = torch.ones(1, 1)


def simulations(number, **options):
    return SearchConfig(num_simulations=number, **options)


def test_value_and_policy_of_two_simulations_by_hand():
    # One action that always pays 1, values 0: the backups bring 1, then 1 + ½·1; ν = (0 + 1 + 1.5) / 3.
    value, policy = planning(
        *constant_functions(1, reward=1.0), ONE, torch.ones(1), search=simulations(2), discount=0.5
    )
    assert value == pytest.approx(2.5 / 3) and policy.tolist() == [1]


def test_where_players_alternate_the_reply_counts_against_the_mover():
    # The same with the sign turned: 1, then 1 − ½·1; ν = (0 + 1 + 0.5) / 3.
    functions = constant_functions(1, reward=1.0)
    assert planning(*functions, ONE, torch.ones(1), search=simulations(2), discount=-0.5)[0] == pytest.approx(
        0.5
    )


@pytest.mark.parametrize(("pile", "best"), [(1, 0), (2, 1), (4, 0), (5, 1), (7, 0)])
def test_perfect_model_of_nim_finds_the_winning_move(pile, best):
    value, policy = planning(
        *nim_functions(),
        torch.tensor([[pile]]),
        torch.tensor([1, pile > 1]),
        search=simulations(200),
        discount=-1,
    )
    assert int(policy.argmax()) == best and value > 0


@pytest.mark.parametrize("pile", [3, 6])
def test_perfect_model_of_nim_knows_a_lost_pile(pile):
    assert (
        planning(
            *nim_functions(), torch.tensor([[pile]]), torch.ones(2), search=simulations(400), discount=-1
        )[0]
        < 0
    )


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6, 1)])
def test_policy_has_the_shape_of_the_mask_row_by_row(shape):
    _, policy = planning(*constant_functions(6, logits=[0.0, 0, 0, 0, 9, 0]), ONE, torch.ones(shape))
    assert policy.shape == shape and int(policy.flatten().argmax()) == 4
    assert float(policy.sum()) == pytest.approx(1)


def test_forbidden_action_gets_exactly_zero_however_well_it_pays():
    h, _, g_s, f_v, f_p = constant_functions(3, logits=[0.0, 50.0, 0.0])
    functions = h, lambda s, a: (a == 1).float() * 100, g_s, f_v, f_p
    _, policy = planning(
        *functions, ONE, torch.tensor([1, 0, 1]), noise=True, rng=np.random.default_rng(0), discount=0.9
    )
    assert policy[1] == 0 and (policy[[0, 2]] > 0).all()


def test_the_mask_binds_at_the_root_only():
    # Action 1 is forbidden at the root and alone pays; a search that uses it one step later finds its reward.
    h, _, g_s, f_v, f_p = constant_functions(2)
    functions = h, lambda s, a: (a == 1).float(), g_s, f_v, f_p
    assert planning(*functions, ONE, torch.tensor([1, 0]), discount=0.9)[0] > 0.5


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ([0, 0], "allows none"),
        ([1.0, float("nan")], "1 .allowed. and 0 .forbidden. only"),
        ([1, 2], "1 .allowed. and 0 .forbidden. only"),
        ([1, 1, 1], "logits of shape .1, 2. for masks of shape .1, 3."),
        ([], "mask"),
    ],
)
def test_wrong_mask_is_an_error_that_says_what_came(mask, says):
    with pytest.raises(ContractError, match=says):
        planning(*constant_functions(2), ONE, torch.tensor(mask))


@pytest.mark.parametrize(
    "options", [{"reward": float("nan")}, {"value": float("inf")}, {"logits": [0.0, float("nan")]}]
)
def test_network_that_gives_nan_or_inf_is_named_in_an_error(options):
    with pytest.raises(NonFiniteError):
        planning(*constant_functions(2, **options), ONE, torch.ones(2))


def test_observation_with_nan_is_an_error():
    with pytest.raises(NonFiniteError, match="observation"):
        planning(*constant_functions(2), ONE * float("nan"), torch.ones(2))


def test_noise_needs_a_generator_so_that_every_search_can_be_repeated():
    with pytest.raises(DistributedMuZeroError, match="rng"):
        planning(*constant_functions(2), ONE, torch.ones(2), noise=True)


def test_same_generator_seed_gives_the_same_noisy_search_and_another_seed_another():
    def policy(seed):
        rng = np.random.default_rng(seed)
        search = SearchConfig(dirichlet_fraction=0.9)
        return planning(*constant_functions(8), ONE, torch.ones(8), noise=True, rng=rng, search=search)[
            1
        ].tolist()

    assert policy(1) == policy(1) != policy(2)


def test_no_noise_unless_it_is_asked_for():
    def result(rng):
        return planning(*constant_functions(4), ONE, torch.ones(4), rng=rng)[1].tolist()

    assert result(np.random.default_rng(1)) == result(np.random.default_rng(2)) == result(None)


def test_planning_equals_the_same_row_inside_a_batch():
    """No row of the batch feels the others: the search of each pile is the search of it alone."""
    piles = np.arange(1, 9, dtype=np.float32)[:, None, None]
    legal = np.stack([[True, pile > 1] for pile in piles.ravel()])
    result = plan_batch(
        make_search_model(nim_networks()), piles, legal, SearchConfig(), -1.0, rng=None, noise=False
    ).result
    for row, pile in enumerate(piles):
        value, policy = planning(
            *nim_functions(), torch.from_numpy(pile), torch.from_numpy(legal[row]), discount=-1.0
        )
        assert value == result.root_values[row]
        assert policy.tolist() == result.action_weights[row].tolist()


@pytest.mark.parametrize("q_normalization", ["parent_and_siblings", "tree_min_max", "min_max"])
def test_planning_with_our_networks_equals_their_row_inside_a_batch(q_normalization):
    networks = make_networks(
        EnvironmentSpec("t", (3,), np.dtype(np.float32), (4,)), 2, NetworkConfig(), seed=1
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in networks.parameters():  # heads start flat; give them opinions
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    observations = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    config = SearchConfig(num_simulations=12, q_normalization=q_normalization)
    batch = plan_batch(
        make_search_model(networks), observations, np.ones((5, 4), bool), config, 0.9, rng=None, noise=False
    ).result
    for row in range(5):
        value, policy = planning(
            *networks.functions,
            torch.from_numpy(observations[row]),
            torch.ones(4),
            search=config,
            discount=0.9,
        )
        assert value == pytest.approx(batch.root_values[row], abs=1e-3)
        np.testing.assert_allclose(policy.numpy(), batch.action_weights[row], atol=1.1 / 12)


def test_value_is_the_search_value_of_the_root_not_the_networks():
    assert planning(*constant_functions(2, reward=1.0, value=0.0), ONE, torch.ones(2))[0] > 0.5


def test_a_tensor_that_needs_gradients_can_be_planned_from():
    planning(*constant_functions(2), ONE.clone().requires_grad_(), torch.ones(2, requires_grad=True))
