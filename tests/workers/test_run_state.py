import pytest

from distributed_muzero.config import RunConfig
from distributed_muzero.workers.run_state import SUMS, ActorReport, LearnerReport, RunState


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def make_state(**limits):
    clock = Clock()
    return RunState(RunConfig(**limits), clock), clock


def test_a_run_without_limits_is_never_over():
    state, clock = make_state()
    clock.seconds += 1e9
    state.add_actor_report(ActorReport(env_steps=10**9))
    assert state.stop_reason() is None


def test_environment_steps_end_a_run():
    state, _ = make_state(max_env_steps=100)
    state.add_actor_report(ActorReport(env_steps=99))
    assert state.stop_reason() is None
    state.add_actor_report(ActorReport(env_steps=1))
    assert "100 environment steps" in state.stop_reason()


def test_learner_steps_end_a_run():
    state, _ = make_state(max_train_steps=10)
    state.add_learner_report(LearnerReport(9, 0))
    assert state.stop_reason() is None
    state.add_learner_report(LearnerReport(10, 1))
    assert "10 learner steps" in state.stop_reason()


def test_minutes_end_a_run():
    state, clock = make_state(max_minutes=0.5)
    clock.seconds += 29
    assert state.stop_reason() is None
    clock.seconds += 1
    assert "0.5 minutes" in state.stop_reason()


def test_only_an_evaluation_that_reaches_the_return_ends_a_run():
    state, _ = make_state(stop_at_return=5)
    state.add_actor_report(ActorReport(returns=[9.0], lengths=[1]))  # play with noise doesn't count
    state.evaluation = {"mean_return": 4.9}
    assert state.stop_reason() is None
    state.evaluation = {"mean_return": 5.0}
    assert "mean return of 5" in state.stop_reason()


def test_counts_add_up_and_a_lost_learner_turns_back_its_steps_but_no_version():
    state, _ = make_state()
    state.add_learner_report(LearnerReport(20, 2, {"train/loss": 1.0}))
    state.add_learner_report(LearnerReport(10, 1, {}))
    assert (state.learner.learner_steps, state.learner.weights_version) == (10, 2)
    assert state.learner.metrics == {"train/loss": 1.0}


def test_rates_are_over_the_time_since_the_last_look():
    state, clock = make_state()
    state.add_actor_report(ActorReport(env_steps=100, simulations=1000))
    clock.seconds += 10
    assert state.metrics([])["rollout/env_steps_per_second"] == pytest.approx(10)
    state.add_actor_report(ActorReport(env_steps=300, returns=[2.0, 4.0], lengths=[5, 7]))
    clock.seconds += 2
    metrics = state.metrics([])
    assert metrics["rollout/env_steps_per_second"] == pytest.approx(150)
    assert metrics["search/simulations_per_second"] == 0
    assert (metrics["rollout/ep_rew_mean"], metrics["rollout/ep_len_mean"]) == (3, 6)


def test_samples_per_insert_is_over_all_shards():
    state, _ = make_state()
    counts = ("duplicates", "ignored_priorities", "log_bytes", "log_failures", "limited/inserts")
    shard = dict.fromkeys((*SUMS, "pending_transitions"), 0) | {"transitions": 10, "episodes": 1}
    shard |= dict.fromkeys(counts, 3)
    shards = [
        {**shard, "sampled_rows": 300, "inserted_transitions": 10},
        {**shard, "sampled_rows": 100, "inserted_transitions": 30},
    ]
    metrics = state.metrics(shards)
    assert (metrics["replay/samples_per_insert"], metrics["replay/transitions"]) == (10, 20)
    assert [metrics[f"replay/{name}"] for name in counts] == [6] * 5


def test_the_age_of_the_replay_is_that_of_the_oldest_game_of_all_shards():
    state, _ = make_state()
    shard = dict.fromkeys((*SUMS, "pending_transitions"), 0)
    state.add_learner_report(LearnerReport(100, weights_version=9))
    assert "replay/age" not in state.metrics([shard])
    metrics = state.metrics([{**shard, "oldest_version": 7}, {**shard, "oldest_version": 4}, shard])
    assert metrics["replay/age"] == 5


def test_who_reports_nothing_yet_is_not_said_to_wait_for_nobody():
    state, _ = make_state()
    assert state.metrics([])["actors/waiting"] == 0
    state.add_actor_report(ActorReport(seconds=10, waited_seconds=9))
    assert state.metrics([])["actors/waiting"] == pytest.approx(0.9)
    # An actor whose shard hangs gives its next report after seconds.
    assert state.metrics([])["actors/waiting"] == pytest.approx(0.9)
    state.add_actor_report(ActorReport(seconds=10))
    assert state.metrics([])["actors/waiting"] == 0


def test_refused_episodes_are_counted_by_reason_over_all_shards():
    state, _ = make_state()
    shard = dict.fromkeys((*SUMS, "pending_transitions"), 0)
    shards = [{**shard, "rejects/shape": 2}, {**shard, "rejects/shape": 1, "rejects/dtype": 1}]
    metrics = state.metrics(shards)
    assert (metrics["replay/rejects/shape"], metrics["replay/rejects/dtype"]) == (3, 1)


def test_counts_of_a_restarted_shard_go_on_from_where_they_stood():
    state, _ = make_state()
    shard = dict.fromkeys((*SUMS, "pending_transitions"), 0)

    def counted(failures, transitions):
        metrics = state.metrics([{**shard, "log_failures": failures, "transitions": transitions}])
        return metrics["replay/log_failures"], metrics["replay/transitions"]

    assert counted(8, 100) == (8, 100)
    assert counted(6, 90) == (8, 90)  # a shard with two failures began anew; what is stored now is no count
    assert counted(7, 90) == (9, 90)
    assert counted(0, 90) == (9, 90)
    assert counted(3, 90) == (12, 90)


def test_a_learner_that_goes_back_to_its_checkpoint_has_no_negative_rate():
    state, clock = make_state()
    state.add_learner_report(LearnerReport(100, 5))
    state.metrics([])
    clock.seconds += 1
    state.add_learner_report(LearnerReport(40, 5))
    assert state.metrics([])["train/learner_steps_per_second"] == 0
