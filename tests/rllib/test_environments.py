"""`rllib:NAME` and `rllib:MODULE:NAME`: found where Tune keeps them, without importing RLlib."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from ray import tune

from distributed_muzero.config import TRUST_VARIABLE, EnvironmentConfig
from distributed_muzero.environments.checks import check_environment
from distributed_muzero.environments.registry import environment_ids, make_environment
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError
from distributed_muzero.rllib import registered
from tests.rllib.games import Walk

ROOT = Path(__file__).parents[2]
MODULE = """
import gymnasium
from ray import tune

def cart_pole(config):
    return gymnasium.make("CartPole-v1", **config)

tune.register_env("pole-by-module", cart_pole)
"""


def make(id, **kwargs):
    return make_environment(EnvironmentConfig(id=id, kwargs=kwargs))


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(tune.registry._global_registry, "_to_flush", {})
    monkeypatch.setattr(registered, "_found", {})
    return tune.register_env


@pytest.fixture
def trusted(register, tmp_path, monkeypatch):
    """A folder with a module that registers one, in which commands are given that trust it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "registering.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "registering", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TRUST_VARIABLE, "1")


def test_a_registered_creator_gets_the_kwargs_and_makes_a_gymnasium_environment(register):
    register("pole", lambda config: gymnasium.make("CartPole-v1", **config))
    environment = make("rllib:pole", sutton_barto_reward=True)
    assert environment.spec.observation_shape == (4,) and environment.spec.id == "rllib:pole"
    environment.initial_state(1)
    assert environment.step(0)[0] == 0.0


def test_what_was_found_outlives_rays_shutdown_and_gives_way_to_a_new_one(register):
    register("pole", lambda config: gymnasium.make("CartPole-v1"))
    assert make("rllib:pole").spec.num_actions == 2
    tune.registry._global_registry._to_flush.clear()  # as a shutdown leaves it
    assert make("rllib:pole").spec.num_actions == 2
    register("pole", lambda config: gymnasium.make("Acrobot-v1"))
    assert make("rllib:pole").spec.num_actions == 3


def test_a_mask_beside_the_observation_is_found_and_all_promises_are_kept(register):
    register("walk", Walk)
    environment = make("rllib:walk", length=2)
    environment.initial_state(1)
    assert environment.spec.observation_shape == (2,) and environment.mask().tolist() == [False, True]
    report = check_environment(lambda: make("rllib:walk"), max_episode_steps=10_000, num_games=3, seconds=5)
    assert report.passed, report.checks


def test_a_module_is_imported_and_what_it_registers_is_found(trusted):
    assert make("rllib:registering:pole-by-module").spec.num_actions == 2
    assert "rllib:pole-by-module" in [entry.id for entry in environment_ids()]


def test_a_creator_of_a_module_needs_no_registration(trusted):
    assert make("rllib:registering:cart_pole").spec.num_actions == 2


def test_an_untrusted_module_is_not_imported(trusted, monkeypatch):
    monkeypatch.delenv(TRUST_VARIABLE)
    with pytest.raises(UnknownEnvironmentError, match=r"imports the module registering.*--trust-env-code"):
        make("rllib:registering:pole-by-module")
    assert "registering" not in sys.modules


@pytest.mark.parametrize(
    ("id", "error", "message"),
    [
        (
            "rllib:pool",
            UnknownEnvironmentError,
            r"'pool' isn't registered .*\(registered: pole\)\. Register it",
        ),
        ("rllib:", UnknownEnvironmentError, "give the module that does so: rllib:MODULE:NAME"),
        ("rllib:registering:pool", UnknownEnvironmentError, "nor has registering a pool to call"),
        ("rllib:no_module:pool", UnknownEnvironmentError, "No module named 'no_module'; looked among"),
        ("rllib:broken:pole", EnvironmentFailure, "the import raised ZeroDivisionError"),
        ("rllib:refusing", EnvironmentFailure, "its creator raised ValueError: no board"),
        ("rllib:odd", EnvironmentFailure, "returned str; expected a gymnasium.Env or RLlib's MultiAgentEnv"),
        ("rllib:pendulum", EnvironmentFailure, "rllib:pendulum has continuous actions"),
    ],
)
def test_what_goes_wrong_is_told(trusted, register, id, error, message):
    def refuse(config):
        raise ValueError("no board")

    if "pool" in id:
        register("pole", Walk)
    else:
        register("refusing", refuse)
        register("odd", lambda config: "a board")
        register("pendulum", lambda config: gymnasium.make("Pendulum-v1"))
    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(error, match=message):
        make(id)


def test_without_any_the_listing_says_what_it_takes(register):
    entry = next(entry for entry in environment_ids() if entry.family == "rllib")
    assert entry.id == "rllib:MODULE:NAME" and "--trust-env-code" in str(entry.missing)


def test_nothing_of_rllib_is_imported_for_a_creator_that_does_not_need_it():
    code = (
        "import sys, gymnasium; from ray import tune;"
        "tune.register_env('pole', lambda config: gymnasium.make('CartPole-v1'));"
        "from distributed_muzero.config import EnvironmentConfig;"
        "from distributed_muzero.environments.registry import make_environment;"
        "make_environment(EnvironmentConfig(id='rllib:pole')).initial_state(1);"
        "print(*[name for name in sys.modules if name.startswith(('ray.rllib', 'torch'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
