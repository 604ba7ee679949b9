import numpy as np
import pytest
import torch
from torch.nn import functional

from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.environments.chain import JUMP, LEFT, MOVES, RIGHT, ChainEnvironment, solve
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.torch_inference import TorchInference
from distributed_muzero.replay.schema import StoredEpisode, Targets
from distributed_muzero.types import Episode
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.reanalyser import Reanalyser, ReanalyseReport
from distributed_muzero.workers.replay_shard import ReplayShard
from tests.episodes import make_episode

# Powers of two throughout, so that float32 holds every value and every mean of equal values exactly.
CHAIN = ChainEnvironment(length=7, left_reward=0.25, right_reward=1.0)
DISCOUNT = 0.5
SOLUTION = solve(CHAIN, DISCOUNT)
BEST = SOLUTION.optimal_actions
WRONG = 7.0  # the value that actors claim for every step
WALKS = {
    "to the right": [RIGHT, JUMP, RIGHT],
    "to the left": [LEFT, LEFT],
    "both ways": [RIGHT, LEFT, RIGHT, RIGHT, RIGHT, LEFT, RIGHT, RIGHT],
    "cut": [RIGHT, RIGHT, LEFT, RIGHT, LEFT, JUMP],
}


class ChainNetworks(Networks):
    """Knows the rules of the chain; what it says of values and policies are its weights."""

    def __init__(self):
        super().__init__()
        self.values = torch.nn.Parameter(torch.zeros(CHAIN.length))
        self.logits = torch.nn.Parameter(torch.zeros(CHAIN.length, len(MOVES)))
        edges = [[self._edge(s, a) for a in range(len(MOVES))] for s in range(CHAIN.length)]
        self.rewards, self.next_states = torch.tensor(edges).unbind(-1)

    @staticmethod
    def _edge(state, action):
        return (0.0, state) if CHAIN.is_end(state) else CHAIN.transition(state, action)

    def representation(self, observations):
        return observations[:, -1]

    def transition(self, embeddings, actions):
        following = self.next_states[embeddings.argmax(1), actions].long()
        return functional.one_hot(following, CHAIN.length).to(embeddings.dtype)

    def reward_output(self, embeddings, actions, next_embeddings):
        return self.rewards[embeddings.argmax(1), actions]

    def value_output(self, embeddings):
        return self.values[embeddings.argmax(1)]

    def policy(self, embeddings):
        return self.logits[embeddings.argmax(1)]


def exact_weights():
    logits = np.where(BEST, 0, -1000)
    return np.concatenate([SOLUTION.values, logits.ravel()]).astype(np.float32)


def ignorant_weights():
    return np.zeros_like(exact_weights())


def walk(name, number=0, version=0):
    """An episode of one of the walks, with wrong values and policies that know nothing."""
    states, rewards = [CHAIN.start], []
    for action in WALKS[name]:
        assert CHAIN.legal_actions(states[-1])[action] and not CHAIN.is_end(states[-1])
        reward, after = CHAIN.transition(states[-1], action)
        states.append(after)
        rewards.append(reward)
    terminated = CHAIN.is_end(states[-1])
    assert terminated == (name != "cut")
    legal = np.stack([CHAIN.legal_actions(state) for state in states[:-1]])
    return Episode(
        episode_id=f"run/0/0/{number}",
        environment_id="chain",
        seed=0,
        weights_version=version,
        observations=np.eye(CHAIN.length, dtype=np.float32)[states],
        legal_masks=legal,
        actions=np.array(WALKS[name], np.int32),
        rewards=np.array(rewards, np.float32),
        policies=(legal / legal.sum(1, keepdims=True)).astype(np.float32),
        root_values=np.float32([WRONG] * len(rewards) + [0 if terminated else WRONG]),
        to_play=np.zeros(len(states), np.int8),
        terminated=terminated,
        truncated=not terminated,
    )


def walks(number, first=0):
    names = list(WALKS)
    return [walk(names[i % len(names)], i) for i in range(first, first + number)]


def states_of(episode):
    return episode.observations.argmax(1)


def make(**sections):
    first = {
        "environment": {"id": "chain"},
        "algorithm": {"discount": DISCOUNT, "td_steps": 1, "num_unroll_steps": 2},
        "search": {"num_simulations": 9},
        "replay": {"max_transitions": 400, "min_size_to_sample": 1, "error_buffer": 1e9},
        "reanalyse": {"ratio": 0.5, "batch_size": 8, "root_noise": False},  # exact answers
        "learner": {"batch_size": 16},
    }
    return make_config({name: {**first.get(name, {}), **sections.get(name, {})} for name in first | sections})


@pytest.fixture
def make_shard(tmp_path):
    shards = []

    def make(config, index=0):
        shards.append(ReplayShard(CHAIN.spec, config, index, tmp_path / f"shard_{index}"))
        return shards[-1]

    yield make
    for shard in shards:
        shard.close()


def make_reanalyser(config, version=1, weights=None, index=0):
    reanalyser = Reanalyser(ChainNetworks(), config, CHAIN.spec, index)
    reanalyser.set_weights(version, exact_weights() if weights is None else weights)
    return reanalyser


def work(reanalyser, *shards, put=None):
    """Until no shard has anything to give."""
    waits = []

    def put_into(index, targets):
        return shards[index].update_targets(targets)

    return reanalyser.work(
        lambda index, number: shards[index].take_for_reanalyse(number),
        put or put_into,
        lambda: bool(waits),
        waits.append,
    )


def held(shard):
    return [shard.ring.episode(entry) for entry in shard.ring]


def assert_exact(episode):
    states = states_of(episode)
    np.testing.assert_array_equal(episode.root_values, SOLUTION.values[states])
    np.testing.assert_array_equal(episode.policies, BEST[states[:-1]])


def test_the_chain_has_one_best_action_everywhere_and_values_that_float32_holds():
    assert BEST[1:-1].sum(1).tolist() == [1] * 5
    assert SOLUTION.values.tolist() == [0, 0.25, 0.25, 0.5, 0.5, 1, 0]


def test_wrong_targets_are_replaced_by_the_exact_ones(make_shard):
    config = make()
    shard = make_shard(config)
    shard.insert(walks(8))
    assert all((episode.root_values[:-1] == WRONG).all() for episode in held(shard))
    report = work(make_reanalyser(config, version=3), shard)
    assert (report.episodes, report.updated) == (8, 8)
    for episode in held(shard):
        assert_exact(episode)

    batch = shard.sample()
    assert (batch.weights_versions == 3).all()
    episodes = walks(8)
    for row, (key, t) in enumerate(batch.positions):
        states = states_of(episodes[key])
        rewards = [*episodes[key].rewards, 0, 0]
        values = [*SOLUTION.values[states], 0, 0]
        steps = range(t, t + 3)
        last = len(states) - 1
        # One step of reward and the value behind it; at a time limit the value itself, at the end nothing.
        returns = [rewards[i] + DISCOUNT * values[i + 1] if i < last else values[i] for i in steps]
        np.testing.assert_array_equal(batch.target_returns[row], np.float32(returns))
        policies = [BEST[states[i]] if i < last else np.zeros(3) for i in steps]
        np.testing.assert_array_equal(batch.target_policies[row], np.float32(policies))


def test_refreshed_targets_are_there_after_a_restart(make_shard):
    config = make()
    shard = make_shard(config)
    shard.insert(walks(4))
    work(make_reanalyser(config), shard)
    shard.close()
    again = make_shard(config)
    assert len(held(again)) == 4
    for episode in held(again):
        assert_exact(episode)
    assert again.take_for_reanalyse(1) == []  # what was refreshed is counted for ever


@pytest.mark.parametrize("late_version", [4, 5])
def test_a_late_answer_of_older_or_equal_weights_is_ignored(make_shard, late_version):
    config = make(reanalyse={"ratio": 0.9})
    shard = make_shard(config)
    shard.insert(walks(4))
    late = make_reanalyser(config, late_version, ignorant_weights())
    taken = shard.take_for_reanalyse(sum(map(len, WALKS.values())))
    answers = late.refresh(taken, ReanalyseReport())
    assert len(answers) == 4
    for answer, (_, episode) in zip(answers, taken, strict=True):
        assert (answer.root_values != SOLUTION.values[states_of(episode)]).any()
    report = work(make_reanalyser(config, 5), shard)
    assert report.updated >= 4
    assert shard.update_targets(answers) == 0
    for episode in held(shard):
        assert_exact(episode)
    assert (shard.sample().weights_versions == 5).all()


def test_weights_as_old_as_those_that_played_change_nothing(make_shard):
    config = make()
    shard = make_shard(config)
    shard.insert([walk("to the right", version=6)])
    report = work(make_reanalyser(config, version=6), shard)
    assert (report.episodes, report.updated) == (1, 0)
    assert held(shard)[0].root_values[0] == WRONG


def test_an_episode_that_was_evicted_meanwhile_is_not_counted_as_updated(make_shard):
    config = make(replay={"max_transitions": 24}, reanalyse={"batch_size": 19})
    shard = make_shard(config)
    shard.insert(walks(4))  # 3, 2, 8 and 6 steps with one row more each: 23 of 24 rows

    def put(index, targets):
        assert [item.key for item in targets] == [0, 1, 2, 3]
        shard.insert([walk("to the right", 4)])
        return shard.update_targets(targets)

    turns = iter([False, True])
    report = make_reanalyser(config).work(
        lambda index, number: shard.take_for_reanalyse(number), put, lambda: next(turns), pytest.fail
    )
    evicted = [key for key in range(4) if shard.ring.get(key) is None]
    assert evicted == [0]
    assert (report.episodes, report.updated, report.positions) == (4, 3, 19)
    for episode in held(shard)[:-1]:
        assert_exact(episode)
    assert held(shard)[-1].root_values[0] == WRONG


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.8])
def test_refreshed_to_played_is_the_ratio_to_its_rest(make_shard, ratio):
    config = make(reanalyse={"ratio": ratio})
    shard = make_shard(config)
    reanalyser = make_reanalyser(config)
    longest = max(map(len, WALKS.values()))
    refreshed = simulations = 0
    for version in range(1, 11):
        reanalyser.set_weights(version, exact_weights())
        shard.insert(walks(5, first=5 * version))
        report = work(reanalyser, shard)
        refreshed += report.positions
        simulations += report.simulations
        played = shard.stats()["inserted_transitions"]
        # Whole episodes are handed out, so that the last one may reach past the ratio.
        assert 0 <= refreshed - played * ratio / (1 - ratio) < longest
        assert shard.stats()["refreshed_transitions"] == refreshed
    assert played > 200 and simulations == 9 * refreshed


def test_all_shards_are_served_and_each_gets_the_answers_of_its_own(make_shard):
    config = make(replay={"num_shards": 3})
    shards = [make_shard(config, index) for index in range(3)]
    for index, shard in enumerate(shards):
        shard.insert(walks(4 + index, first=100 * index + index))
    report = work(make_reanalyser(config), *shards)
    assert (report.episodes, report.updated) == (15, 15)
    for shard in shards:
        for episode in held(shard):
            assert_exact(episode)


def test_workers_begin_at_different_shards_and_go_on_where_they_stopped():
    config = make(replay={"num_shards": 3}, reanalyse={"num_workers": 4})
    for index, expected in enumerate([[0, 1, 2, 0, 1], [1, 2, 0, 1, 2], [2, 0, 1, 2, 0], [0, 1, 2, 0, 1]]):
        asked = []
        reanalyser = make_reanalyser(config, index=index)
        for number in (2, 3):
            turns = iter([False] * number + [True])
            reanalyser.work(
                lambda shard, _, asked=asked: asked.append(shard) or [],
                pytest.fail,
                lambda turns=turns: next(turns),
                lambda _: None,
            )
        assert asked == expected


def test_it_asks_for_one_batch_at_a_time():
    config = make(reanalyse={"batch_size": 5})
    asked = []
    turns = iter([False, True])
    make_reanalyser(config).work(
        lambda shard, number: asked.append(number) or [], pytest.fail, lambda: next(turns), asked.append
    )
    assert asked == [5, 0.005]


def test_waits_grow_until_there_is_something_to_do():
    reanalyser = make_reanalyser(make())
    found = [[] for _ in range(7)] + [[StoredEpisode(0, walk("cut"))]] + [[], []]
    waits, given = [], []

    def put(index, targets):
        given.extend(targets)
        return 1

    report = reanalyser.work(lambda *_: found.pop(0), put, lambda: not found, waits.append)
    assert waits == [0.005, 0.01, 0.02, 0.04, 0.08, 0.08, 0.08, 0.005, 0.01]
    assert (report.episodes, report.updated, len(given)) == (1, 1, 1)


def test_a_report_tells_what_was_searched():
    config = make(reanalyse={"num_simulations": 4})
    report = ReanalyseReport()
    stored = [StoredEpisode(7, walk("to the right")), StoredEpisode(9, walk("cut"))]
    targets = make_reanalyser(config, version=2).refresh(stored, report)
    assert [(item.key, item.version) for item in targets] == [(7, 2), (9, 2)]
    assert (report.positions, report.simulations, report.episodes, report.updated) == (9, 36, 2, 0)


def test_weights_versions_never_go_back():
    reanalyser = make_reanalyser(make(), version=3)
    for version in (2, 3):
        reanalyser.set_weights(version, ignorant_weights())
        [answer] = reanalyser.refresh([StoredEpisode(0, walk("cut"))], ReanalyseReport())
        assert answer.version == 3 and answer.root_values[0] == SOLUTION.values[CHAIN.start]
    reanalyser.set_weights(4, ignorant_weights())
    [answer] = reanalyser.refresh([StoredEpisode(0, walk("cut"))], ReanalyseReport())
    assert answer.version == 4 and answer.root_values[0] != SOLUTION.values[CHAIN.start]


def opinionated(networks, seed=1):
    flat = FlatWeights(networks)
    weights, num_parameters = flat.read().numpy(), flat.vector.numel()
    weights[:num_parameters] = 0.5 * np.random.default_rng(seed).normal(size=num_parameters)
    return weights


@pytest.mark.parametrize("limit", [5, 30])
def test_the_weights_that_played_without_noise_say_it_again(limit):
    """Histories, masks and the end of a game reach the search as they did when an actor played it."""
    config = make(
        environment={"history_length": 3, "max_episode_steps": limit, "kwargs": {"length": 20}},
        search={"num_simulations": 6, "dirichlet_fraction": 0.0},
        actor={"envs_per_actor": 3},
    )
    builder = Builder(config, "run")
    weights = opinionated(builder.networks())
    actor = builder.actor(0, 0)
    actor.set_weights(0, weights, 0)
    episodes = [episode for _ in range(2 * limit) for episode in actor.step()]
    actor.close()
    assert len(episodes) >= 3
    reanalyser = Reanalyser(builder.networks(), config, builder.spec)
    reanalyser.set_weights(0, weights)
    stored = [StoredEpisode(key, episode) for key, episode in enumerate(episodes)]
    for episode, answer in zip(episodes, reanalyser.refresh(stored, ReanalyseReport()), strict=True):
        # A batch of another size rounds differently.
        np.testing.assert_allclose(answer.policies, episode.policies, atol=1.1 / 6)
        np.testing.assert_allclose(answer.root_values, episode.root_values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("num_players", "sign"), [(1, 1), (2, -1)])
def test_values_change_sign_where_two_players_alternate(num_players, sign):
    """One simulation: ν is the mean of the network's value v and of u ± γ · v."""

    class Constant(Networks):
        def __init__(self):
            super().__init__()
            self.value_of_all = torch.nn.Parameter(torch.zeros(1))

        representation = staticmethod(lambda o: o[:, -1])
        transition = staticmethod(lambda s, a: s)
        reward_output = staticmethod(lambda s, a, following: torch.full((len(s),), 3.0))
        policy = staticmethod(lambda s: torch.zeros(len(s), 2))

        def value_output(self, embeddings):
            return self.value_of_all.expand(len(embeddings))

    spec = EnvironmentSpec("duel", (1,), np.dtype(np.float32), (2,), num_players)
    reanalyser = Reanalyser(Constant(), make(search={"num_simulations": 1}), spec)
    reanalyser.set_weights(1, np.full(1, 8, np.float32))
    episode = make_episode(3, spec=spec, terminated=False, two_players=num_players == 2)
    [answer] = reanalyser.refresh([StoredEpisode(0, episode)], ReanalyseReport())
    assert answer.root_values.tolist() == [(8 + 3 + sign * DISCOUNT * 8) / 2] * 3 + [8]


def test_cuda_without_a_gpu_is_an_error_of_its_section(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"reanalyse\.device is cuda.*auto or cpu"):
        Reanalyser(ChainNetworks(), make(reanalyse={"device": "cuda"}), CHAIN.spec)
    reanalyser = Reanalyser(ChainNetworks(), make(reanalyse={"device": "auto"}), CHAIN.spec)
    assert reanalyser.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_networks_search_there_and_say_the_same():
    configs = [make(reanalyse={"device": device}) for device in ("cpu", "cuda")]
    builder = Builder(configs[0], "run")
    weights = opinionated(builder.networks())
    stored = [StoredEpisode(i, make_episode(9, seed=i, spec=builder.spec)) for i in range(3)]
    answers: list[list[Targets]] = []
    for config in configs:
        reanalyser = Reanalyser(builder.networks(), config, builder.spec)
        reanalyser.set_weights(1, weights)
        answers.append(reanalyser.refresh(stored, ReanalyseReport()))
    assert isinstance(reanalyser.search_model, TorchInference)
    assert reanalyser.search_model.device.type == "cuda"
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one.root_values, other.root_values, rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(one.policies, other.policies, atol=1.1 / 9)
