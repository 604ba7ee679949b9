from dataclasses import replace

import numpy as np
import pytest
import torch

from distributed_muzero.algorithm.acting import Game, act
from distributed_muzero.algorithm.planning import plan_batch
from distributed_muzero.algorithm.reanalyse import refresh
from distributed_muzero.config import NetworkConfig, SearchConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import NonFiniteError
from distributed_muzero.networks.base import FunctionNetworks
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.networks.registry import make_networks
from tests.episodes import SPEC, make_episode
from tests.games import Nim, Script, constant_functions, nim_networks, stirring_functions

SEARCH = SearchConfig(num_simulations=12)
LENGTHS = [1, 7, 4, 12, 3]


def rng(seed=0):
    return np.random.default_rng(seed)


def history_model():
    return make_search_model(FunctionNetworks(*stirring_functions(SPEC.num_actions)))


def refreshed(episodes, model=None, **options):
    options = {"discount": 0.9, "history_length": 1, "batch_size": 8, "rng": rng(), "noise": False, **options}
    return refresh(episodes, model or history_model(), options.pop("search", SEARCH), **options)


def some_episodes(**options):
    """Terminated and truncated ones in turn."""
    return [
        make_episode(length, seed=i, name=f"run/0/0/{i}", terminated=i % 2 == 0, **options)
        for i, length in enumerate(LENGTHS)
    ]


def history_at(episode, t, history_length):
    """One observation at a time, behind zeros."""
    stack = np.zeros((history_length, *episode.observations.shape[1:]), episode.observations.dtype)
    for place in range(history_length):
        step = t - (history_length - 1 - place)
        if step >= 0:
            stack[place] = episode.observations[step]
    return stack


def searched_alone(model, episode, t, history_length, discount):
    observations = history_at(episode, t, history_length)[None]
    legal_mask = episode.legal_masks[t][None]
    return plan_batch(model, observations, legal_mask, SEARCH, discount, rng=None, noise=False).result


@pytest.mark.parametrize("history_length", [1, 4])
@pytest.mark.parametrize("discount", [0.9, -0.9])
def test_every_position_gets_the_answer_of_a_search_from_it_alone(history_length, discount):
    episodes = some_episodes(two_players=discount < 0)
    answers = refreshed(episodes, history_length=history_length, discount=discount)
    assert len(answers) == len(episodes)
    model = history_model()
    for episode, (policies, root_values) in zip(episodes, answers, strict=True):
        for t in range(episode.num_steps):
            alone = searched_alone(model, episode, t, history_length, discount)
            np.testing.assert_array_equal(policies[t], alone.action_weights[0])
            assert root_values[t] == alone.root_values[0]
        final = model.initial(history_at(episode, episode.num_steps, history_length)[None], 1)[0][0]
        assert root_values[-1] == (0 if episode.terminated else np.float32(final))
        assert final != 0


@pytest.mark.parametrize("history_length", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 27, 1000])
def test_the_size_of_the_batches_changes_nothing(history_length, batch_size):
    assert sum(LENGTHS) == 27
    episodes = some_episodes()
    expected = refreshed(episodes, history_length=history_length, batch_size=8)
    found = refreshed(episodes, history_length=history_length, batch_size=batch_size)
    for (policies, values), (other_policies, other_values) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(policies, other_policies)
        np.testing.assert_array_equal(values, other_values)


@pytest.mark.parametrize("num_cut", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_no_call_of_the_model_is_larger_than_the_batch(num_cut, batch_size):
    sizes = []

    class Counting:
        def __init__(self, model):
            self.expand, self._model = model.expand, model

        def initial(self, observations, num_nodes):
            sizes.append(len(observations))
            return self._model.initial(observations, num_nodes)

    episodes = [make_episode(3, seed=i, terminated=i >= num_cut) for i in range(5)]
    refreshed(episodes, Counting(history_model()), batch_size=batch_size)
    assert max(sizes) <= batch_size and sum(sizes) == 15 + num_cut


def play(env, model, discount, history_length):
    game = Game(env, history_length, None)
    while not game.is_over:
        act([game], model, SEARCH, discount, 1.0, noise=False, rng=rng(len(game.actions)))
    final_value = float(model.initial(game.history[None], 1)[0][0]) if game.truncated else 0.0
    return game.episode("run/0/0/1", "game", 0, final_value)


@pytest.mark.parametrize("history_length", [1, 4])
@pytest.mark.parametrize("truncated", [False, True])
def test_a_game_that_was_played_without_noise_keeps_its_policies_and_values(history_length, truncated):
    masks = rng().random((9, SPEC.num_actions)) < 0.6
    masks[:, 1] = True
    env = Script(9, list(masks), truncated=truncated, shape=SPEC.observation_shape)
    episode = play(env, history_model(), 0.9, history_length)
    [(policies, root_values)] = refreshed([episode], history_length=history_length, batch_size=4)
    np.testing.assert_array_equal(policies, episode.policies)
    np.testing.assert_array_equal(root_values, episode.root_values)
    assert (root_values[-1] != 0) == truncated


@pytest.mark.parametrize("first_player", [0, 1])
def test_a_game_of_two_players_keeps_its_policies_and_values(first_player):
    model = make_search_model(nim_networks())
    episode = play(Nim(11, first_player), model, 1.0, 1)
    [(policies, root_values)] = refreshed([episode], model, discount=-1.0)
    np.testing.assert_array_equal(policies, episode.policies)
    np.testing.assert_array_equal(root_values, episode.root_values)


def test_values_of_two_players_are_the_movers_own():
    # Piles 5, 4, 3, 2: only the one who has to move at 3 stands to lose.
    episode = replace(
        make_episode(4, spec=EnvironmentSpec("nim", (1,), np.dtype(np.float32), (2,)), two_players=True),
        observations=np.array([[5], [4], [3], [2], [0]], np.float32),
        legal_masks=np.ones((4, 2), bool),
    )
    model = make_search_model(nim_networks())
    [(policies, root_values)] = refreshed(
        [episode], model, discount=-1.0, search=SearchConfig(num_simulations=400)
    )
    assert np.sign(root_values).tolist() == [1, 1, -1, 1, 0]
    assert policies.argmax(1)[[0, 1, 3]].tolist() == [1, 0, 1]


def test_values_of_two_simulations_by_hand():
    # As in test_planning: backups of 1 + ½·4 and 1 + ½·(1 + ½·4) where the network says 4 of everything.
    spec = EnvironmentSpec("one", (1,), np.dtype(np.float32), (1,))
    episodes = [make_episode(2, spec=spec, terminated=terminated) for terminated in (True, False)]
    model = make_search_model(FunctionNetworks(*constant_functions(1, reward=1.0, value=4.0)))
    ended, cut = refreshed(episodes, model, discount=0.5, search=SearchConfig(num_simulations=2))
    value = pytest.approx((4 + 3 + 2.5) / 3)
    assert ended[1].tolist() == [value, value, 0] and cut[1].tolist() == [value, value, 4]
    assert ended[0].tolist() == cut[0].tolist() == [[1], [1]]


def test_policies_are_distributions_over_the_legal_actions():
    episodes = some_episodes()
    for episode, (policies, root_values) in zip(episodes, refreshed(episodes), strict=True):
        assert policies.shape == episode.policies.shape and root_values.shape == episode.root_values.shape
        assert policies.dtype == root_values.dtype == np.float32
        assert (policies[~episode.legal_masks] == 0).all() and (policies >= 0).all()
        np.testing.assert_allclose(policies.sum(1), 1, atol=1e-6)


def test_noise_reaches_the_targets_only_when_asked_for():
    search = SearchConfig(num_simulations=12, dirichlet_fraction=1.0)
    once, again = (refreshed(some_episodes(), rng=rng(seed), search=search) for seed in (1, 2))
    quiet = refreshed(
        some_episodes(), search=SearchConfig(num_simulations=12, dirichlet_fraction=0.0), noise=True
    )
    for (policies, _), (others, _), (expected, _) in zip(once, again, quiet, strict=True):
        np.testing.assert_array_equal(policies, others)
        np.testing.assert_array_equal(policies, expected)
    once, again, same = (
        refreshed(some_episodes(), rng=rng(seed), search=search, noise=True) for seed in (1, 2, 2)
    )
    assert any((one != other).any() for (one, _), (other, _) in zip(once, again, strict=True))
    for (one, _), (other, _) in zip(again, same, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_noise_frees_a_policy_that_is_sure_of_a_wrong_action():
    functions = (
        lambda o: o.flatten(1)[:, :1].double(),
        lambda s, a: (a == 1).double(),
        lambda s, a: s,
        lambda s: torch.zeros(len(s)),
        lambda s: torch.tensor([[9.0, 0.0, 0.0]]).repeat(len(s), 1),
    )
    model = make_search_model(FunctionNetworks(*functions))
    episode = make_episode(50)
    episode = replace(episode, legal_masks=np.ones_like(episode.legal_masks))
    [(stuck, _)] = refreshed([episode], model)
    assert (stuck == [1, 0, 0]).all()
    [(freed, _)] = refreshed([episode], model, noise=True)
    assert freed[:, 1].mean() > 0.2


def test_the_number_of_simulations_can_be_its_own():
    for number in (3, 30):
        answers = refreshed(some_episodes(), num_simulations=number)
        visits = np.concatenate([policies for policies, _ in answers]) * number
        np.testing.assert_allclose(visits, visits.round(), atol=1e-4)


def test_a_history_may_be_longer_than_the_game():
    episode = make_episode(1, terminated=False)
    [(policies, root_values)] = refreshed([episode], history_length=6)
    model = history_model()
    alone = plan_batch(
        model, history_at(episode, 0, 6)[None], episode.legal_masks, SEARCH, 0.9, rng=None, noise=False
    ).result
    np.testing.assert_array_equal(policies, alone.action_weights)
    final = np.float32(model.initial(history_at(episode, 1, 6)[None], 1)[0][0])
    assert root_values.tolist() == [alone.root_values[0], final]


def test_nothing_in_nothing_out():
    assert refreshed([]) == []


@pytest.mark.parametrize("history_length", [1, 4])
def test_our_networks_agree_with_a_search_from_each_position_alone(history_length):
    networks = make_networks(SPEC, history_length, NetworkConfig(), seed=1)
    flat = FlatWeights(networks)
    num_parameters, weights = flat.vector.numel(), flat.read().numpy()
    weights[:num_parameters] += 0.2 * rng().normal(size=num_parameters)
    flat.write(weights)
    model = make_search_model(networks.eval())
    episodes = some_episodes()
    answers = refreshed(episodes, model, history_length=history_length)
    for episode, (policies, root_values) in zip(episodes, answers, strict=True):
        for t in range(episode.num_steps):
            alone = searched_alone(model, episode, t, history_length, 0.9)
            # A matrix product of one row rounds in another order than that of many.
            np.testing.assert_allclose(policies[t], alone.action_weights[0], atol=1.1 / 12)
            assert root_values[t] == pytest.approx(alone.root_values[0], abs=1e-3)


def test_observations_keep_the_environments_dtype():
    spec = EnvironmentSpec("bytes", (3, 2), np.dtype(np.uint8), (2,))
    seen = []

    class Watching:
        def __init__(self):
            model = make_search_model(FunctionNetworks(*constant_functions(2)))
            self.expand, self._model = model.expand, model

        def initial(self, observations, num_nodes):
            seen.append(observations)
            return self._model.initial(observations, num_nodes)

    refreshed([make_episode(5, spec=spec, terminated=False)], Watching(), history_length=3)
    assert [(o.dtype, o.shape) for o in seen] == [(np.uint8, (5, 3, 3, 2)), (np.uint8, (1, 3, 3, 2))]


def test_nan_from_the_network_names_a_step_of_an_episode():
    model = make_search_model(FunctionNetworks(*constant_functions(3, value=float("nan"))))
    with pytest.raises(NonFiniteError, match=r"row 0 is step 0 of the episode run/0/0/0"):
        refreshed(some_episodes(), model)


def test_nan_at_the_final_observation_is_an_error():
    # 9 is shown at the end only.
    functions = list(constant_functions(3))
    functions[0] = lambda o: o[:, -1, :1]
    functions[3] = lambda s: torch.where(s[:, 0] == 9, float("nan"), 0.5)
    episode = make_episode(4, terminated=False)
    shown = np.zeros_like(episode.observations)
    shown[-1] = 9
    episode = replace(episode, observations=shown)
    with pytest.raises(NonFiniteError, match=r"value is NaN or Inf at step 4 of the episode run/0/0/1"):
        refreshed([episode], make_search_model(FunctionNetworks(*functions)))
