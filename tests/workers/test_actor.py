from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.config import make_config
from distributed_muzero.environments.chain import ChainEnvironment
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.replay.validation import validate
from distributed_muzero.workers.actor import Actor
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.evaluator import Evaluator
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.replay_shard import InsertReply


def make_builder(environment_id="CartPole-v1", /, **sections):
    small = {
        "environment": {"id": environment_id, "max_episode_steps": 30, "history_length": 2},
        "network": {"hidden_sizes": [16], "embedding_size": 8},
        "search": {"num_simulations": 6},
        "actor": {"envs_per_actor": 3, "max_unacknowledged": 4},
    }
    return Builder(make_config(small, sections), "run")


def some_weights(builder, seed=1):
    """Weights of networks whose heads have opinions."""
    flat = FlatWeights(builder.networks())
    weights, num_parameters = flat.read().numpy(), flat.vector.numel()
    weights[:num_parameters] = 0.5 * np.random.default_rng(seed).normal(size=num_parameters)
    return weights


def played(builder, num_steps, incarnation=0, index=0):
    actor = builder.actor(index, incarnation)
    actor.set_weights(0, some_weights(builder), 0)
    episodes = [episode for _ in range(num_steps) for episode in actor.step()]
    actor.close()
    return episodes


def same(one, other):
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def test_same_seed_plays_the_same_episodes():
    builder = make_builder()
    once, again = played(builder, 40), played(builder, 40)
    assert len(once) >= 3 and all(map(same, once, again))


def test_another_actor_or_incarnation_plays_other_episodes_under_other_ids():
    builder = make_builder()
    groups = [played(builder, 40), played(builder, 40, incarnation=1), played(builder, 40, index=1)]
    first = [replace(group[0], episode_id="") for group in groups]
    assert not same(first[0], first[1]) and not same(first[0], first[2])
    assert max(Counter(episode.episode_id for group in groups for episode in group).values()) == 1


@pytest.mark.parametrize("environment", ["CartPole-v1", "chain"])
def test_every_episode_passes_the_shards_checks(environment):
    builder = make_builder(environment)
    episodes = played(builder, 70)
    assert episodes
    for episode in episodes:
        validate(episode, builder.spec, 30)


def test_a_time_limit_bootstraps_from_the_value_of_the_final_observation():
    builder = make_builder("chain", environment={"kwargs": {"length": 20}, "max_episode_steps": 4})
    networks = builder.networks()
    FlatWeights(networks).write(some_weights(builder))
    episodes = played(builder, 9)
    assert episodes and all(episode.truncated and not episode.terminated for episode in episodes)
    for episode in episodes:
        with torch.no_grad():
            history = torch.from_numpy(episode.observations[None, -2:])
            expected = networks.value(networks.representation(history)).item()
        assert episode.root_values[-1] == pytest.approx(expected, abs=1e-4) and expected != 0


def test_weights_versions_never_go_back():
    builder = make_builder()
    actor = builder.actor(0, 0)
    actor.set_weights(3, some_weights(builder, 3), 60)
    model = actor.model.search_model
    actor.set_weights(2, some_weights(builder, 2), 40)
    actor.set_weights(3, some_weights(builder, 4), 60)
    assert (actor.model.version, actor.learner_step) == (3, 60) and actor.model.search_model is model
    actor.set_weights(4, some_weights(builder, 4), 80)
    assert (actor.model.version, actor.learner_step) == (4, 80) and actor.model.search_model is not model
    actor.close()


def test_an_episode_names_the_version_that_chose_its_last_action():
    builder = make_builder("chain", environment={"max_episode_steps": 3, "kwargs": {"length": 20}})
    actor = builder.actor(0, 0)
    actor.set_weights(1, some_weights(builder), 0)
    assert actor.step() == actor.step() == []
    actor.set_weights(2, some_weights(builder), 0)
    assert [episode.weights_version for episode in actor.step()] == [2, 2, 2]
    actor.close()


def test_temperature_falls_with_the_learners_step():
    builder = make_builder(actor={"temperatures": [[0, 1.0], [100, 0.5], [200, 0.25]]})
    actor = builder.actor(0, 0)
    seen = []
    for step in (0, 99, 100, 150, 200, 10_000, 50):  # late news of an early step changes nothing
        actor.set_weights(step, some_weights(builder), step)
        seen.append(actor.temperature)
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25]
    actor.close()


def num_pieces(observation):
    return int((observation[:2] != 0).sum())


def games_from_openings(opening_plies, num_steps):
    """A builder, the episodes, and how many of them begin with how many pieces on the board: a move each."""
    builder = make_builder(
        "openspiel:tic_tac_toe",
        actor={"opening_plies": opening_plies, "envs_per_actor": 8},
        search={"num_simulations": 2},
    )
    episodes = played(builder, num_steps)
    return builder, episodes, Counter(num_pieces(episode.observations[0]) for episode in episodes)


def test_games_begin_after_random_moves_that_are_not_kept():
    builder, episodes, starts = games_from_openings(4, 200)
    assert starts.keys() == {0, 1, 2, 3, 4} and min(starts.values()) > len(episodes) / 10
    for episode in episodes:
        validate(episode, builder.spec, 100)
        num_played = num_pieces(episode.observations[0])
        assert episode.to_play[0] == num_played % 2
        assert (episode.policies.sum(1) > 0.999).all()
        assert (
            episode.observations[:-1, :2].any(1).sum((1, 2)) == num_played + np.arange(episode.num_steps)
        ).all()


def test_an_opening_that_ends_its_game_is_drawn_again():
    _, episodes, starts = games_from_openings(8, 300)
    assert starts.keys() == set(range(9))
    # Of the games that begin at the start, few come from openings that ended all ten times.
    assert starts[0] < 0.2 * len(episodes) and starts[8] > 0.05 * len(episodes)


def test_games_in_lockstep_do_not_reach_each_other():
    """A game that ended gives its place to a new one while its neighbours go on undisturbed."""
    builder = make_builder()
    for episode in played(builder, 40):
        env = builder.environment()
        game = Game(env, 2, episode.seed)
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(game.observations[-1], episode.observations[t])
            game.play(episode.legal_masks[t], episode.policies[t], int(action), 0.0)
            assert game.rewards[-1] == episode.rewards[t]
        assert game.is_over
        env.close()


def test_with_no_shard_in_reach_an_actor_waits_and_holds_a_bounded_number_of_episodes():
    builder = make_builder("chain", environment={"max_episode_steps": 3, "kwargs": {"length": 20}})
    actor = builder.actor(0, 0)
    actor.set_weights(0, some_weights(builder), 0)
    outbox = Outbox(lambda offers: {}, 2, limit=4)
    waits = []
    turns = iter([False] * 50 + [True])
    report = actor.play(outbox, lambda: next(turns), waits.append)
    # Three games end together every third step: 3, then 6, which is over 4; the rest is waiting.
    assert len(outbox) == 6 and report.env_steps == 18 and len(waits) == 44
    assert report.simulations == 18 * 6 and report.lengths == [3] * 6
    actor.close()


@pytest.mark.parametrize(("status", "share"), [("stored", 0.0), ("wait", 1.0)])
def test_waiting_is_for_shards_that_hold_back_not_for_those_that_take_their_time(status, share):
    builder = make_builder("chain")
    actor = builder.actor(0, 0)
    actor.set_weights(0, some_weights(builder), 0)
    now = 0.0

    def slow(offers):
        nonlocal now
        now += 0.1
        return {shard: [InsertReply(status)] * len(episodes) for shard, episodes in offers.items()}

    report = actor.play(Outbox(slow, 1, 64), lambda: now >= 10, lambda seconds: None, lambda: now)
    assert report.seconds == now >= 10
    assert report.waited_seconds == pytest.approx(now * share)
    actor.close()


def test_a_shard_that_hangs_delays_an_actors_report_by_one_timeout_only():
    """Its driver would take it for hung as well, and replace it."""
    builder = make_builder("chain")
    actor = builder.actor(0, 0)
    actor.set_weights(0, some_weights(builder), 0)
    now = 0.0

    def hangs(offers):
        nonlocal now
        now += 20.0
        return {}

    report = actor.play(Outbox(hangs, 1, 64), lambda: now >= 0.25, lambda seconds: None, lambda: now)
    assert now == report.seconds == 20.0
    actor.close()


def evaluate(builder, seeds, weights_seed=1, **options):
    evaluator = builder.evaluator()
    evaluator.set_weights(0, some_weights(builder, weights_seed))
    result = evaluator.evaluate(4, seeds, **options)
    evaluator.close()
    return result


def test_two_evaluations_with_the_same_seeds_are_equal_and_other_seeds_give_other_games():
    builder = make_builder(environment={"max_episode_steps": 500})
    assert evaluate(builder, (1, 2)) == evaluate(builder, (1, 2))
    assert evaluate(builder, (1, 2))["returns"] != evaluate(builder, (1, 3))["returns"]


def test_evaluation_ignores_noise_and_temperature():
    quiet = {"search": {"dirichlet_fraction": 0.0}, "actor": {"temperatures": [[0, 0.0]]}}
    loud = {"search": {"dirichlet_fraction": 1.0}, "actor": {"temperatures": [[0, 9.0]]}}
    results = [
        evaluate(make_builder(environment={"max_episode_steps": 500}, **options), (7,))
        for options in (quiet, loud)
    ]
    assert results[0] == results[1]


def test_an_evaluator_that_is_used_again_starts_its_games_anew():
    builder = make_builder()
    evaluator = builder.evaluator()
    evaluator.set_weights(0, some_weights(builder))
    first = evaluator.evaluate(2, (1,))
    evaluator.evaluate(3, (2,))
    assert evaluator.evaluate(2, (1,)) == first
    evaluator.close()


def test_evaluation_plays_with_the_weights_it_was_given_even_within_one_version():
    """Two checkpoints may lie between two published versions; each is evaluated as it is."""
    builder = make_builder(environment={"max_episode_steps": 500})
    evaluator = builder.evaluator()
    expected = [evaluate(builder, (1,), weights_seed)["returns"] for weights_seed in (1, 6)]
    assert expected[0] != expected[1]
    for weights_seed, returns in zip((1, 6), expected, strict=True):
        evaluator.set_weights(5, some_weights(builder, weights_seed))
        assert evaluator.evaluate(4, (1,))["returns"] == returns
    evaluator.close()


def test_mean_and_deviation_are_those_of_the_returns():
    result = evaluate(make_builder(), (1,))
    assert result["mean_return"] == pytest.approx(np.mean(result["returns"]))
    assert result["std_return"] == pytest.approx(np.std(result["returns"]))
    assert (result["episodes"], len(result["returns"]), result["weights_version"]) == (4, 4, 0)


def test_evaluator_and_actor_work_with_any_environment_factory():
    builder = make_builder("chain")
    for worker in (
        Actor([ChainEnvironment], builder.networks(), builder.config, "run", 0, 0),
        Evaluator(ChainEnvironment, builder.networks(), builder.config),
    ):
        worker.close()
