"""MuZeroConfig: what its names stand for, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from ray import tune

from distributed_muzero.config import OFFLINE, load_preset, make_config
from distributed_muzero.errors import ConfigError
from distributed_muzero.rllib import MuZeroConfig
from distributed_muzero.rllib.settings import METHODS, SECTIONS, SETTINGS

ALL = (
    MuZeroConfig()
    .environment("FrozenLake-v1", env_config={"is_slippery": False}, max_episode_steps=50, history_length=2)
    .env_runners(num_env_runners=3, num_envs_per_env_runner=8, sample_timeout_s=90.0, autoscale=(1, 4))
    .training(
        gamma=0.9,
        lr=1e-3,
        train_batch_size_per_learner=32,
        grad_clip=1.0,
        n_step=7,
        num_unroll_steps=4,
        num_simulations=9,
        samples_per_insert=3.0,
        num_steps_sampled_before_learning_starts=200,
        replay_buffer_config={"capacity": 5_000, "alpha": 0.6, "beta": 0.4},
        search={"policy": "gumbel"},
        store_buffer_in_checkpoints=False,
    )
    .learners(num_learners=2, num_gpus_per_learner=0, num_cpus_per_learner=2)
    .evaluation(evaluation_interval=4, evaluation_duration=6, evaluation_num_simulations=5)
    .reporting(min_time_s_per_iteration=1, min_sample_timesteps_per_iteration=100)
    .debugging(seed=5)
    .framework("torch")
)


def test_every_name_reaches_its_key():
    plan = ALL.plan()
    config, given = plan
    assert not plan.in_process and not given.datasets and not given.store_buffer
    assert (given.evaluation_interval, given.min_seconds, given.min_env_steps) == (4, 1.0, 100)
    environment, actor, learner = config.environment, config.actor, config.learner
    assert (environment.id, environment.kwargs) == ("FrozenLake-v1", {"is_slippery": False})
    assert (environment.max_episode_steps, environment.history_length) == (50, 2)
    assert (actor.num_actors, actor.envs_per_actor, actor.timeout_seconds) == (3, 8, 90)
    assert actor.autoscale == (1, 4)
    assert (config.algorithm.discount, config.algorithm.td_steps) == (0.9, 7)
    assert (config.search.num_simulations, config.search.policy) == (9, "gumbel")
    assert config.algorithm.num_unroll_steps == 4
    assert (learner.batch_size, learner.num_devices, learner.num_threads, learner.device) == (64, 2, 2, "cpu")
    assert (learner.learning_rate, learner.final_learning_rate, learner.max_grad_norm) == (1e-3, 2.5e-4, 1)
    replay = config.replay
    assert (replay.samples_per_insert, replay.min_size_to_sample) == (3, 200)
    assert (replay.max_transitions, replay.priority_exponent, replay.importance_exponent) == (5000, 0.6, 0.4)
    assert (config.evaluator.num_episodes, config.evaluator.num_simulations, config.run.seed) == (6, 5, 5)


def test_a_preset_is_the_ground_without_its_limits():
    plan = MuZeroConfig("cartpole").training(num_simulations=8).plan()
    preset = make_config(load_preset("cartpole"))
    assert preset.run.stop_at_return == 475 and plan.config.run.stop_at_return is None
    assert plan.config.run.max_minutes is None
    assert plan.config.search == preset.search.model_copy(update={"num_simulations": 8})
    assert plan.config.replay == preset.replay


def test_without_env_runners_one_process_does_all():
    assert MuZeroConfig().env_runners(num_env_runners=0).plan().in_process
    plan = MuZeroConfig().plan()
    assert not plan.in_process and plan.config.actor.num_actors == 1


def test_stored_episodes_are_learnt_from_alone():
    plan = MuZeroConfig("cartpole").offline_data(input_=[Path("a.parquet"), "s3://bucket/run"]).plan()
    assert plan.given.datasets == (str(Path("a.parquet").resolve()), "s3://bucket/run")
    assert plan.config.is_offline
    for section, values in OFFLINE.items():
        assert getattr(plan.config, section).model_dump().items() >= values.items()
    assert MuZeroConfig().offline_data(input_=None).plan().given.datasets == ()
    with pytest.raises(ConfigError, match="expected a path or a URI"):
        MuZeroConfig().offline_data(input_=5)
    config = MuZeroConfig().offline_data(input_=Path("a")).training(reanalyse={"ratio": 0.5})
    assert config.plan().config.reanalyse.ratio == 0.5
    assert MuZeroConfig.from_yaml(config.to_yaml()) == config
    with pytest.raises(ConfigError, match=r"nobody plays: leave out actor\.num_actors"):
        MuZeroConfig().offline_data(input_="a").training(
            actor={"num_actors": 2}, reanalyse={"ratio": 0.5}
        ).validate()
    with pytest.raises(ConfigError, match="nobody plays: leave out num_env_runners"):
        MuZeroConfig().offline_data(input_="a").env_runners(num_env_runners=2).validate()


def test_it_goes_through_a_dictionary_and_yaml_and_back():
    assert MuZeroConfig.from_dict(ALL.to_dict()) == ALL == ALL.copy()
    again = MuZeroConfig.from_yaml(ALL.to_yaml())
    assert again.plan() == ALL.plan()
    other = ALL.copy().training(lr=1e-4)
    assert other != ALL and ALL.lr == 1e-3
    other.search["num_simulations"] = 3
    assert "num_simulations" not in ALL.search


def test_numpys_numbers_are_numbers():
    config = MuZeroConfig().training(lr=np.float64(1e-3), num_simulations=np.int64(3))
    assert config.plan().config.search.num_simulations == 3
    assert MuZeroConfig.from_yaml(config.to_yaml()).lr == 1e-3


def test_settings_are_attributes():
    config = MuZeroConfig().training(lr=0.1)
    config.lr = 0.2
    assert config.lr == 0.2
    assert config.training(lr=0.3).lr == 0.3
    assert not hasattr(config, "gamma") and not hasattr(config, "callbacks")
    with pytest.raises(ConfigError, match=r"has no 'lrr'.*did you mean 'lr'"):
        config.lrr = 1


def test_sections_are_merged():
    config = MuZeroConfig().training(search={"policy": "gumbel"}).training(search={"num_simulations": 4})
    assert config.search == {"policy": "gumbel", "num_simulations": 4}
    assert config.plan().config.search.policy == "gumbel"


REFUSED = {
    "another method's": (lambda: MuZeroConfig().training(num_env_runners=2), r"belongs to \.env_runners"),
    "a slip": (lambda: MuZeroConfig().training(num_simulation=2), "did you mean 'num_simulations'"),
    "RLlib's alone": (lambda: MuZeroConfig().training(clip_param=0.2), r"\.training\(\) has no 'clip_param'"),
    "no dictionary": (
        lambda: MuZeroConfig().training(search="gumbel"),
        "search='gumbel': expected a dictionary",
    ),
    "an unknown key": (
        lambda: MuZeroConfig().training(search={"polcy": "gumbel"}).validate(),
        "unknown key 'search.polcy'.*did you mean 'policy'",
    ),
    "a value out of range": (
        lambda: MuZeroConfig().training(gamma=1.5).validate(),
        r"gamma \(algorithm.discount\): .*less than or equal to 1; got 1.5",
    ),
    "a rate of 0": (lambda: MuZeroConfig().training(lr=0).validate(), "lr=0: expected a number above 0"),
    "half a learner": (
        lambda: MuZeroConfig().learners(num_learners=0.5).validate(),
        "num_learners=0.5: expected a whole number",
    ),
    "a share of a GPU": (
        lambda: MuZeroConfig().learners(num_gpus_per_learner=0.5).validate(),
        "num_gpus_per_learner=0.5: expected 0 or 1",
    ),
    "a queue of another kind": (
        lambda: MuZeroConfig().training(replay_buffer_config={"type": "X"}).validate(),
        "replay_buffer_config has no 'type'",
    ),
    "time steps": (
        lambda: MuZeroConfig().evaluation(evaluation_duration_unit="timesteps").validate(),
        "expected 'episodes'",
    ),
    "the same twice": (
        lambda: MuZeroConfig().training(num_simulations=8, search={"num_simulations": 4}).validate(),
        "num_simulations and search.num_simulations are both set",
    ),
    "a function": (
        lambda: MuZeroConfig().environment(lambda config: None),
        "expected an id, a class, or a name given to tune.register_env",
    ),
    "a rate twice": (
        lambda: MuZeroConfig().training(lr=0.1, learner={"learning_rate": 0.2}).validate(),
        "lr and learner.learning_rate are both set",
    ),
    "a truth value as text": (
        lambda: MuZeroConfig().training(store_buffer_in_checkpoints="False").validate(),
        "store_buffer_in_checkpoints='False': expected True or False",
    ),
    "no replay": (
        lambda: MuZeroConfig().training(replay_buffer_config=None).validate(),
        "replay_buffer_config=None: expected a dictionary",
    ),
    "what no file can hold": (
        lambda: MuZeroConfig().environment("CartPole-v1", env_config={"x": object()}).to_yaml(),
        "can't be written as YAML",
    ),
    "another framework": (lambda: MuZeroConfig().framework("tf2"), "framework 'tf2': expected 'torch'"),
    "no preset": (lambda: MuZeroConfig("cartpol"), "no preset 'cartpol'"),
    "a search space": (
        lambda: MuZeroConfig().training(lr=tune.uniform(0, 1)).validate(),
        "lr is a search space.*tune.Tuner chooses",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_its_name(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_search_spaces_pass_through_a_dictionary():
    space = tune.uniform(0, 1)
    config = MuZeroConfig().training(lr=space, search={"value_scale": space})
    assert config.to_dict()["search"]["value_scale"].lower == 0


def test_every_name_has_a_method_and_a_key_that_is_there():
    fields = make_config({}).model_dump()
    assert {name for names in METHODS.values() for name in names} == {*SETTINGS, *SECTIONS[1:]}
    for setting in SETTINGS.values():
        if setting.key is not None:
            section, _, key = setting.key.partition(".")
            assert key in fields[section]
