"""Advantage actor-critic in one process."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from distributed_muzero.errors import ContractError, EnvironmentFailure, NonFiniteError
from distributed_muzero.mathy.agents.a3c import A3CAgent, A3CConfig, Actor, Contribution, Segment
from distributed_muzero.mathy.agents.evaluation import evaluate_agent, game_seeds
from distributed_muzero.mathy.agents.games import Episode, batch_of, read_now
from distributed_muzero.mathy.envs import PolySimplify

TINY = {"units": 8, "embedding_units": 4, "lstm_units": 4, "rnn_size": 6, "episodes_per_worker": 4}


def args_of(folder, **values):
    return A3CConfig(**{**TINY, "model_dir": str(folder), **values})


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def test_returns_by_hand():
    segment = Segment()
    segment.rewards, segment.next_value = [1.0, 2.0, 4.0], 8.0
    assert segment.returns(0.5) == [4.0, 6.0, 8.0]  # 1 + ½(2 + ½(4 + ½ 8)), 2 + ½(4 + ½ 8), 4 + ½ 8


def test_an_ended_episode_is_worth_nothing_after_its_end():
    segment = Segment()
    segment.rewards = [0.0, 1.0]
    assert segment.returns(0.9) == [0.9, 1.0]


def test_the_loss_by_hand(tmp_path):
    args = args_of(tmp_path, gamma=0.5, entropy_loss_scaling=0.1, value_loss_scaling=0.3)
    actor = Actor(args, predictions=7)
    segments, _ = actor._play()
    losses = []
    for segment in segments:
        with torch.no_grad():
            outputs = actor.model.read(batch_of([segment.observations]))
        for t, target in enumerate(segment.returns(0.5)):
            policy = torch.softmax(outputs.masked_logits[0, t], -1)
            value = outputs.values[0, t]
            entropy = -sum(p * torch.log(p) for p in policy[policy > 0])
            advantage = target - float(value)
            losses.append(
                -torch.log(policy[segment.actions[t]]) * advantage + 0.3 / 2 * advantage**2 - 0.1 * entropy
            )
    assert actor._loss(segments).item() == pytest.approx(float(sum(losses)) / len(losses), rel=1e-4)


def test_an_actors_windows_begin_with_the_state_that_they_were_played_with(tmp_path):
    actor = Actor(args_of(tmp_path, update_gradients_every=3), predictions=7)
    actor._play()
    before = read_now(actor.model, actor.episodes).values[:, 0]
    segments, _ = actor._play()
    with torch.no_grad():
        again = [float(actor.model.read(batch_of([s.observations])).values[0, 0]) for s in segments]
    assert all(np.isclose(again, float(value), atol=1e-6).any() for value in before)


def test_the_history_is_the_mean_of_earlier_states():
    env = PolySimplify()
    episode = Episode(env, 2, seed=3)
    for state in ([1.0, 0.0], [3.0, 1.0]):
        episode.play(episode.observation.mask.index(1), state, [0.0, 0.0])
    assert episode.observation.rnn_history_h == [2.0, 0.5]
    assert episode.observation.rnn_state_h == [3.0, 1.0]


def test_one_seed_trains_one_model(tmp_path):
    results = [A3CAgent(args_of(tmp_path / name, max_eps=20)) for name in "ab"]
    assert results[0].train() == results[1].train()
    np.testing.assert_array_equal(weights(results[0].model), weights(results[1].model))


def test_training_stops_at_max_eps_and_goes_on_from_there(tmp_path):
    first = A3CAgent(args_of(tmp_path, max_eps=5)).train()
    assert 5 <= first.episodes < 5 + 8 * 4
    assert A3CAgent(args_of(tmp_path, max_eps=5)).train()[:3] == first[:3]
    second = A3CAgent(args_of(tmp_path, max_eps=first.episodes + 1)).train()
    assert second.episodes > first.episodes and second.updates > first.updates


def test_a_later_launch_plays_other_problems(tmp_path):
    args = args_of(tmp_path)
    problems = [{e.state.agent.problem for e in Actor(args, 7, start=start).episodes} for start in (0, 0, 9)]
    assert problems[0] == problems[1] and not problems[0] & problems[2]


def test_an_actor_in_place_of_a_lost_one_plays_other_problems(tmp_path):
    args = args_of(tmp_path)
    first, second = ({e.state.agent.problem for e in Actor(args, 7, num_lost=n).episodes} for n in (0, 1))
    assert not first & second


def test_actors_play_different_problems_of_all_topics_in_turn(tmp_path):
    args = args_of(tmp_path, topics=("poly", "binomial"))
    types = [episode.state.agent.problem_type for episode in Actor(args, 7).episodes]
    assert types[:2] == types[2:] and types[0] != types[1]
    problems = [{e.state.agent.problem for e in Actor(args, 7, index=index).episodes} for index in range(2)]
    assert not problems[0] & problems[1]


def test_a_requested_stop_ends_it_with_a_saved_model(tmp_path):
    asked = iter([False, False, True, True])
    result = A3CAgent(args_of(tmp_path)).train(stop_requested=lambda: next(asked))
    assert result.updates == 2
    assert A3CAgent(args_of(tmp_path)).model.counts["updates"] == 2


class Fails(A3CAgent):
    """Two contributions, and then an error."""

    error: Exception

    def _contributions(self):
        yield from islice(super()._contributions(), 2)
        raise self.error


@pytest.mark.parametrize(("error", "saved"), [(EnvironmentFailure("no"), 2), (NonFiniteError("no"), 0)])
def test_what_was_learnt_before_a_failure_is_saved_unless_it_is_not_finite(tmp_path, error, saved):
    agent = Fails(args_of(tmp_path))
    agent.error = error
    with pytest.raises(type(error)):
        agent.train()
    assert agent.model.counts["updates"] == 2
    assert A3CAgent(args_of(tmp_path)).model.counts["updates"] == saved


def test_seconds_end_it(tmp_path):
    assert A3CAgent(args_of(tmp_path, max_seconds=1e-6)).train().updates == 0


def test_a_gradient_is_clipped(tmp_path):
    agent = A3CAgent(args_of(tmp_path, gradient_clip_norm=0.5))
    size = weights(agent.model).size
    agent._update(Contribution(np.full(size, 100.0, np.float32), 1, []))
    norm = torch.cat([parameter.grad.flatten() for parameter in agent.model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    agent = A3CAgent(args_of(tmp_path))
    before = weights(agent.model).copy()
    with pytest.raises(NonFiniteError, match="after 0 updates"):
        agent._update(Contribution(np.full(before.size, np.nan, np.float32), 1, []))
    np.testing.assert_array_equal(weights(agent.model), before)


def test_it_learns_a_little(tmp_path):
    """Played at random, 27 of 100 problems are solved."""
    args = args_of(
        tmp_path, units=32, embedding_units=16, lstm_units=16, rnn_size=32, max_eps=450, learning_rate=3e-3,
        episodes_per_worker=16,
    )  # fmt: skip
    result = A3CAgent(args).train()
    assert result.won > 0.6, result


def test_an_evaluation_plays_each_seeds_problem_once(tmp_path):
    model = A3CAgent(args_of(tmp_path)).model
    seeds = game_seeds(5, [1])
    played = evaluate_agent(model, PolySimplify, seeds)
    assert played.num_problems == len(played.returns) == len(played.won) == 5
    assert played.solved == np.mean(played.won) and played.mean_return == pytest.approx(
        np.mean(played.returns)
    )
    assert evaluate_agent(model, PolySimplify, seeds) == played
    alone = evaluate_agent(model, PolySimplify, seeds[3:4])
    assert alone.returns == played.returns[3:4]
    assert evaluate_agent(model, PolySimplify, seeds, temperature=1.0).returns != played.returns


def test_an_evaluation_needs_seeds(tmp_path):
    with pytest.raises(ContractError, match="no seeds came"):
        evaluate_agent(A3CAgent(args_of(tmp_path)).model, PolySimplify, [])
