"""Environments by the path to their factory, which are code: nobody runs them unasked."""

from __future__ import annotations

import pickle
import sys

import pytest

from distributed_muzero.config import TRUST_VARIABLE, Config, EnvironmentConfig, make_config
from distributed_muzero.environments.registry import make_environment
from distributed_muzero.errors import ConfigError, EnvironmentFailure, UnknownEnvironmentError

CODE = """
from distributed_muzero.environments.chain import ChainEnvironment

def make(config):
    return ChainEnvironment(**config.kwargs)

def make_half(config):
    class Half:
        spec = None
        def step(self, action): ...
    return Half()

def make_wrapped(config):
    class Wrapped:
        # Hands all on to one that has no answer before its first game.
        def __getattr__(self, name):
            if name == "truncated":
                raise AttributeError("no game yet")
            return getattr(ChainEnvironment(), name)
    return Wrapped()

def make_unready(config):
    class Unready(ChainEnvironment):
        @property
        def truncated(self):
            return self.cut
    return Unready()

def make_late(config):
    class Late(ChainEnvironment):
        @property
        def truncated(self):
            raise RuntimeError("no game yet")
    return Late()

def make_ours(config):
    from distributed_muzero.errors import ConfigError
    raise ConfigError("environment.kwargs: size is missing")

def make_none(config):
    raise ZeroDivisionError("no game")
"""


@pytest.fixture
def trusted(tmp_path, monkeypatch):
    """A folder with modules of games, in which commands are given that trust them."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in (("own_games", CODE), ("broken_module", "1 / 0\n"), ("needs", "import not_there\n")):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    return tmp_path


def test_a_factory_in_the_current_folder_gets_the_section(trusted):
    environment = make_environment(EnvironmentConfig(id="own_games:make", kwargs={"length": 7}))
    assert environment.spec.observation_shape == (7,)


def test_the_folder_travels_with_the_section_to_processes_elsewhere(trusted, monkeypatch, tmp_path_factory):
    sent = pickle.dumps(make_config({"environment": {"id": "own_games:make"}}))
    monkeypatch.delenv(TRUST_VARIABLE)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    received = pickle.loads(sent).environment
    assert received.code_folder == str(trusted)
    assert make_environment(received).spec.id == "chain"


def test_untrusted_code_is_not_run_and_how_to_allow_it_is_said(trusted, monkeypatch):
    monkeypatch.delenv(TRUST_VARIABLE)
    (trusted / "own_games.py").write_text("open('was_run', 'w')\n")
    with pytest.raises(UnknownEnvironmentError) as caught:
        make_environment(EnvironmentConfig(id="own_games:make"))
    message = str(caught.value)
    assert "imports the module own_games and calls its make" in message
    assert "--trust-env-code" in message and TRUST_VARIABLE in message
    assert not (trusted / "was_run").exists()


def test_trust_is_neither_written_to_a_file_nor_read_from_one(trusted, monkeypatch):
    config = make_config({"environment": {"id": "own_games:make"}})
    assert "code_folder" not in config.to_yaml() and str(trusted) not in config.to_yaml()
    with pytest.raises(ConfigError, match="_code_folder"):
        make_config({"environment": {"id": "own_games:make", "_code_folder": str(trusted)}})
    monkeypatch.delenv(TRUST_VARIABLE)
    assert Config.model_validate(config.model_dump()).environment.code_folder is None


@pytest.mark.parametrize(
    ("id", "error", "message"),
    [
        (
            "no_such_module:make",
            UnknownEnvironmentError,
            "No module named 'no_such_module'; looked among .*in /",
        ),
        ("own_games:mkae", UnknownEnvironmentError, "no attribute 'mkae'"),
        ("broken_module:make", EnvironmentFailure, "the import raised ZeroDivisionError"),
        ("needs:make", UnknownEnvironmentError, "No module named 'not_there'"),
        ("own_games:make_none", EnvironmentFailure, r"make_none\(config\) raised ZeroDivisionError: no game"),
        (
            "own_games:make_half",
            EnvironmentFailure,
            "returned Half, which lacks initial_state, mask, to_play",
        ),
        ("own_games:make_ours", ConfigError, r"^environment\.kwargs: size is missing$"),
        ("../up:make", UnknownEnvironmentError, r"no family '\.\./up'"),
    ],
)
def test_what_goes_wrong_in_it_is_told(trusted, id, error, message):
    with pytest.raises(error, match=message):
        make_environment(EnvironmentConfig(id=id))


@pytest.mark.parametrize("name", ["make_unready", "make_late", "make_wrapped"])
def test_truncated_is_not_asked_for_before_a_game(trusted, name):
    assert make_environment(EnvironmentConfig(id=f"own_games:{name}")).initial_state(1).shape == (10,)


def test_refused_kwargs_are_told(trusted):
    message = r"own_games:make with kwargs {'lenght': 7}: make\(config\) raised TypeError: .*'lenght'"
    with pytest.raises(EnvironmentFailure, match=message):
        make_environment(EnvironmentConfig(id="own_games:make", kwargs={"lenght": 7}))


def test_installed_code_comes_before_the_current_folder(trusted):
    (trusted / "json.py").write_text("raise SystemExit('the wrong one')\n")
    with pytest.raises(UnknownEnvironmentError, match="module 'json' has no attribute 'make'"):
        make_environment(EnvironmentConfig(id="json:make"))


def test_families_come_before_paths(trusted):
    (trusted / "chain.py").write_text("raise SystemExit('the wrong one')\n")
    assert make_environment(EnvironmentConfig(id="chain")).spec.id == "chain"
