"""Spaces that a person writes, what is chosen of them, and searches with Tune."""

import json

import pytest
from ray import tune
from ray.tune.schedulers.pbt import _explore

from distributed_muzero.errors import ConfigError
from distributed_muzero.rllib import MuZeroConfig
from distributed_muzero.rllib.algorithm import DistributedMuZero
from distributed_muzero.rllib.tuning import check_space, chosen_of, lay, make_scheduler, read_space
from tests.processes import run

SPACE = """
lr: {loguniform: [1e-4, 1.0e-2]}
samples_per_insert: {choice: [4, 8, 1e1]}
learner.weight_decay: {uniform: [0, 0.001]}
num_simulations: {randint: [2, 9]}
"""


def written(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def test_a_space_is_read_as_it_is_written(tmp_path):
    space = read_space(written(tmp_path, SPACE))
    assert list(space) == ["lr", "samples_per_insert", "learner.weight_decay", "num_simulations"]
    assert (space["lr"].lower, space["lr"].upper) == (1e-4, 1e-2)
    assert space["samples_per_insert"].categories == [4, 8, 10]
    assert isinstance(space["num_simulations"], tune.search.sample.Integer)
    check_space(MuZeroConfig("debug"), space, "asha")


def test_chosen_values_are_laid_into_their_sections():
    settings = {"lr": 1.0, "learner": {"warmup_steps": 3}}
    laid = lay(settings, {"lr": 0.5, "learner.weight_decay": 0.1, "search.policy": "gumbel"})
    assert laid == {
        "lr": 0.5,
        "learner": {"warmup_steps": 3, "weight_decay": 0.1},
        "search": {"policy": "gumbel"},
    }
    assert settings["learner"] == {"warmup_steps": 3}
    assert chosen_of(laid, ["lr", "learner.weight_decay"]) == {"lr": 0.5, "learner.weight_decay": 0.1}


BAD_SPACES = {
    "nothing": ("", "expected a line for each setting"),
    "no kind": ("lr: 0.1", r"lr: 0.1: expected \{kind: \[arguments\]\}"),
    "an unknown kind": ("lr: {normal: [0, 1]}", "no kind 'normal'; expected one of uniform"),
    "no list": ("lr: {uniform: 3}", "uniform: 3: expected a list"),
    "too few": ("lr: {uniform: [3]}", r"lr: uniform \[3\]: expected two numbers"),
    "no step": ("lr: {quniform: [1, 3]}", "expected two numbers and a step"),
    "no logarithm": ("lr: {loguniform: [0, 1.0e-2]}", "expected numbers above 0"),
    "a section": ("learner: {weight_decay: {uniform: [0, 1]}}", r"is written learner\.weight_decay: "),
    "the wrong way round": ("lr: {loguniform: [1.0e-2, 5.0e-4]}", "expected the lower end first"),
    "text": ("lr: {uniform: [a, b]}", "lr: uniform"),
    "no YAML": ("lr: {", "can't read the space"),
}


@pytest.mark.parametrize(("text", "message"), BAD_SPACES.values(), ids=BAD_SPACES)
def test_a_space_that_cannot_be_read_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_space(written(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "domain", "message"),
    [
        ("lrr", tune.uniform(0, 1), "did you mean 'lr'"),
        ("learner.lr", tune.uniform(0, 1), "unknown key 'learner.lr'"),
        ("gamma", tune.uniform(0.9, 1.05), r"gamma \(algorithm.discount\).*got 1.05"),
        ("num_simulations", tune.choice([4, 0]), "num_simulations.*got 0"),
        (
            "network.embedding_size",
            tune.choice([32, 64]),
            "can't change while a run goes on, as pbt asks for",
        ),
        ("actor.num_actors", tune.choice([1, 2]), "num_env_runners and actor.num_actors are both set"),
        ("env", tune.choice(["A", "B"]), "can't be searched over"),
        ("environment.id", tune.choice(["A", "B"]), "can't be searched over"),
        ("num_simulations", tune.uniform(1, 5), "valid integer"),
        ("search", tune.choice([{"policy": "gumbel"}, {"polizy": "muzero"}]), "unknown key 'search.polizy'"),
    ],
)
def test_a_space_of_what_cannot_be_is_refused(name, domain, message):
    with pytest.raises(ConfigError, match=message):
        check_space(MuZeroConfig("debug").env_runners(num_env_runners=0), {name: domain}, "pbt")


def test_pbt_stays_in_the_space():
    space = {
        "search.policy": tune.choice(["muzero", "gumbel"]),
        "samples_per_insert": tune.choice([4, 8, 16, 32]),
        "gamma": tune.quniform(0.9, 0.99, 0.03),
        "num_simulations": tune.randint(2, 9),
    }
    scheduler = make_scheduler("pbt", 6, space)
    chosen = {"search": {"policy": "gumbel"}, "samples_per_insert": 8, "gamma": 0.93, "num_simulations": 3}
    seen = []
    for _ in range(200):
        chosen, _ = _explore(
            chosen, scheduler._hyperparam_mutations, 0.25, (1.2, 0.8), scheduler._custom_explore_fn
        )
        seen.append(tuple(chosen_of(chosen, list(space)).values()))
    policies, samples, discounts, simulations = map(set, zip(*seen, strict=True))
    assert policies == {"muzero", "gumbel"} and samples == {4, 8, 16, 32}
    assert discounts <= {0.9, 0.93, 0.96, 0.99} and simulations <= set(range(2, 9))


def test_what_pbt_multiplies_stays_in_the_space():
    space = {
        "gamma": tune.uniform(0.9, 0.99),
        "search.num_simulations": tune.randint(2, 9),
        "n_step": tune.choice([1, 5]),
    }
    within = make_scheduler("pbt", 6, space)._custom_explore_fn
    moved = within(
        {"gamma": 1.1, "search": {"num_simulations": 1, "policy": "gumbel"}, "n_step": 5, "lr": 1.0}
    )
    assert moved == {
        "gamma": 0.99, "search": {"num_simulations": 2, "policy": "gumbel"}, "n_step": 5, "lr": 1.0
    }  # fmt: skip


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.long
def test_a_search_stops_what_falls_behind_and_makes_the_best_one_a_run(tmp_path):
    space = written(tmp_path, "lr: {loguniform: [1.0e-3, 1.0e-2]}\nsearch.num_simulations: {choice: [2, 4]}")
    done = run(
        "tune", "--preset", "debug", "--space", space, "--trials", 4, "--iterations", 4, "--iteration-seconds", 1,
        "--episodes", 2, "--runs-dir", tmp_path / "runs", "--name", "found", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "best: trial " in done.stdout and "evaluation of found/step_" in done.stdout
    results = sorted((tmp_path / "runs" / ".tune" / "found").glob("*/result.json"))
    assert len(results) == 4
    iterations = [len(path.read_text().splitlines()) for path in results]
    assert max(iterations) == 4 and min(iterations) < 4  # ASHA let some go on, not all
    evaluated = run("evaluate", "found", "--runs-dir", tmp_path / "runs", "--episodes", 2, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["episodes"] == 2


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.long
def test_with_pbt_a_trial_goes_on_from_anothers_weights(own_ray, tmp_path):
    config = (
        MuZeroConfig("debug")
        .env_runners(num_env_runners=0)
        .training(lr=tune.loguniform(1e-4, 1e-2))
        .reporting(min_time_s_per_iteration=0.5)
        .evaluation(evaluation_interval=1, evaluation_duration=2)
    )
    scheduler = tune.schedulers.PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        quantile_fraction=0.5,
        hyperparam_mutations={"lr": tune.loguniform(1e-4, 1e-2)},
    )
    results = tune.Tuner(
        "DistributedMuZero",
        param_space=config,
        tune_config=tune.TuneConfig(
            num_samples=2,
            reuse_actors=True,
            scheduler=scheduler,
            metric="evaluation/env_runners/episode_return_mean",
            mode="max",
        ),
        run_config=tune.RunConfig(
            name="pbt", storage_path=str(tmp_path), stop={"training_iteration": 8}, verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
        ),
    ).fit()  # fmt: skip
    assert not results.errors
    copies = (tmp_path / "pbt" / "pbt_global.txt").read_text().splitlines()
    assert copies
    with results[0].checkpoint.as_directory() as saved:
        algorithm = DistributedMuZero.from_checkpoint(saved)
    assert algorithm.evaluate()["env_runners"]["num_episodes"] == 2
    algorithm.stop()
