import importlib.util
import subprocess
import sys

import gymnasium
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments import registry
from distributed_muzero.environments.chain import ChainEnvironment
from distributed_muzero.environments.registry import environment_ids, make_environment, register_environment
from distributed_muzero.errors import ContractError, EnvironmentFailure, UnknownEnvironmentError


@pytest.fixture
def own_factories(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


def make(id, **kwargs):
    return make_environment(EnvironmentConfig(id=id, **kwargs))


def test_importing_the_registry_imports_none_of_the_packages_behind_it():
    code = "import sys, distributed_muzero.environments.registry as _; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "gymnasium", "pyspiel", "pettingzoo", "mathy_envs"}
    assert not heavy & set(result.stdout.split())


def test_everything_listed_can_be_made_and_starts():
    for entry in environment_ids():
        if entry.missing:
            continue
        environment = make(entry.id, kwargs=entry.kwargs)
        observation = environment.initial_state(seed=1)
        assert observation.shape == environment.spec.observation_shape, entry
        assert environment.mask().shape == environment.spec.action_shape, entry
        environment.close()


def test_no_trainable_id_of_gymnasium_is_left_out():
    listed = {registry._without_version(entry.id) for entry in environment_ids()}
    for spec in list(gymnasium.registry.values()):
        if registry._without_version(spec.id) not in listed and spec.namespace is None:
            with pytest.raises(EnvironmentFailure):
                make(spec.id)


def test_chain_is_made_with_its_kwargs():
    environment = make("chain", kwargs={"length": 6})
    assert isinstance(environment, ChainEnvironment) and environment.length == 6


@pytest.mark.parametrize(
    ("id", "message"),
    [
        (
            "cartpole",
            r"no environment 'cartpole' \(did you mean 'CartPole-v1'\?\)\. Here are: chain, Acrobot-v1",
        ),
        ("CratPole-v1", "did you mean 'CartPole-v1'"),
        ("chian", "did you mean 'chain'"),
        ("CartPole", "needs its version; use CartPole-v1"),
        ("LunarLander-v2", "out of date; use LunarLander-v3"),
        ("CartPole-v99", "no such version.*use CartPole-v1"),
        ("ALE/Pong-v5", "Atari games can't be trained yet"),
        ("openspeil:tic_tac_toe", r"no family 'openspeil' \(did you mean 'openspiel'\?\)"),
        (
            "petingzoo:go_v5",
            "did you mean 'pettingzoo'.*Families here: .*chain, .*mathy, .*openspiel, pettingzoo",
        ),
        ("mahty:poly-easy", "did you mean 'mathy'"),
        ("os:system", "no family 'os'.*imports the module os and calls its system.*--trust-env-code"),
        ("", "no environment ''"),
        ("minigrid/Empty-v0", "no environment 'minigrid/Empty-v0'"),
    ],
)
def test_unknown_ids_say_what_exists(id, message):
    with pytest.raises(UnknownEnvironmentError, match=message):
        make(id)


def test_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.lunar_lander", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
    with pytest.raises(UnknownEnvironmentError, match=r"pip install 'distributed_muzero\[box2d\]'"):
        make("LunarLander-v3")


def test_listing_says_what_is_missing(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "Box2D" else find_spec(name)
    )
    missing = {entry.id: entry.missing for entry in environment_ids()}
    assert (
        missing["LunarLander-v3"] == "pip install 'distributed_muzero[box2d]'"
        and missing["CartPole-v1"] is None
    )


@pytest.mark.parametrize(
    ("package", "id", "extra"),
    [
        ("pyspiel", "openspiel:tic_tac_toe", "openspiel"),
        ("pettingzoo", "pettingzoo:connect_four_v3", "pettingzoo"),
        ("mathy_envs", "mathy:poly-easy", "mathy"),
    ],
)
def test_a_family_without_its_package_names_the_command(monkeypatch, package, id, extra):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    command = f"pip install 'distributed_muzero[{extra}]'"
    assert {entry.id: entry.missing for entry in environment_ids()}[id] == command
    with pytest.raises(UnknownEnvironmentError) as caught:
        make(id)
    assert command in str(caught.value)


def test_registered_factory_gets_the_whole_section_also_for_its_prefix(own_factories):
    seen = []

    def factory(config):
        seen.append(config)
        return ChainEnvironment()

    register_environment("boards", factory)
    make("boards:tic_tac_toe", kwargs={"size": 3})
    make("boards")
    assert [config.id for config in seen] == ["boards:tic_tac_toe", "boards"] and seen[0].kwargs == {
        "size": 3
    }
    assert "boards" in [entry.id for entry in environment_ids()]


def test_a_registered_factory_that_makes_no_environment_is_told(own_factories):
    register_environment("boards", lambda config: "a board")
    with pytest.raises(
        EnvironmentFailure, match="boards:go returned str, which lacks spec, initial_state, step"
    ):
        make("boards:go")


def test_errors_of_a_factory_that_are_ours_go_through(own_factories):
    def factory(config):
        raise ContractError("the board is empty")

    register_environment("boards", factory)
    with pytest.raises(ContractError, match=r"^the board is empty$"):
        make("boards")


@pytest.mark.parametrize("name", ["chain", "openspiel", "with:colon", "", "../up"])
def test_taken_and_odd_names_are_refused(own_factories, name):
    with pytest.raises(EnvironmentFailure, match=r"registered already|expected letters"):
        register_environment(name, lambda config: ChainEnvironment())


def test_factory_of_an_installed_package_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "games-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: games\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[distributed_muzero.environments]\nrow = row_game:make\nlost = no_such_module:make\n"
    )
    (tmp_path / "row_game.py").write_text(
        "from distributed_muzero.environments.chain import ChainEnvironment\n"
        "def make(config):\n    return ChainEnvironment(**config.kwargs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make("row:long", kwargs={"length": 9}).spec.observation_shape == (9,)
    with pytest.raises(EnvironmentFailure, match="'lost' of 'no_such_module:make' can't be loaded"):
        make("lost")
    refused = r"row with kwargs {'lenght': 9}: make\(config\) raised TypeError: .*'lenght'"
    with pytest.raises(EnvironmentFailure, match=refused):
        make("row", kwargs={"lenght": 9})


def test_ids_registered_with_gymnasium_are_listed_and_made():
    gymnasium.register("mine/Car-v0", entry_point="gymnasium.envs.classic_control:MountainCarEnv")
    gymnasium.register("mine/Own-v0", entry_point=lambda: gymnasium.make("CartPole-v1").unwrapped)
    try:
        assert {"mine/Car-v0", "mine/Own-v0"} <= {entry.id for entry in environment_ids()}
        assert make("mine/Car-v0").spec.num_actions == 3 and make("mine/Own-v0").spec.num_actions == 2
    finally:
        del gymnasium.registry["mine/Car-v0"], gymnasium.registry["mine/Own-v0"]
