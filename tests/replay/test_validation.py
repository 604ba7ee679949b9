import pickle
from dataclasses import replace

import numpy as np
import pytest

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RejectedEpisode
from distributed_muzero.replay.validation import validate
from tests.episodes import SPEC, make_episode

GOOD = make_episode(5, seed=1)


def changed(name, index, number):
    array = getattr(GOOD, name).copy()
    array[index] = number
    return replace(GOOD, **{name: array})


def played_although_forbidden():
    legal = GOOD.legal_masks.copy()
    legal[0, GOOD.actions[0]] = False
    return replace(GOOD, legal_masks=legal)


def policy_on_a_forbidden_action():
    step, action = np.argwhere(~GOOD.legal_masks)[0]
    return changed("policies", (step, action), 0.1)


@pytest.mark.parametrize("terminated", [True, False])
@pytest.mark.parametrize("two_players", [True, False])
@pytest.mark.parametrize("num_steps", [1, 5, 50])
def test_good_episodes_pass(terminated, two_players, num_steps):
    validate(make_episode(num_steps, terminated=terminated, two_players=two_players), SPEC, 50)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int32])
def test_observations_pass_in_the_environments_own_dtype(dtype):
    spec = EnvironmentSpec("t", (2, 3), np.dtype(dtype), (4,))
    validate(make_episode(4, spec=spec), spec, 50)


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("id", replace(GOOD, episode_id="")),
        ("id", replace(GOOD, episode_id="x" * 257)),
        ("length", replace(GOOD, actions=GOOD.actions[:0])),
        ("length", make_episode(51)),
        ("ending", replace(GOOD, truncated=True)),
        ("ending", replace(GOOD, terminated=False)),
        ("shape", replace(GOOD, observations=GOOD.observations[:-1])),
        ("shape", replace(GOOD, root_values=GOOD.root_values[:-1])),
        ("shape", replace(GOOD, policies=GOOD.policies[:, :-1])),
        ("dtype", replace(GOOD, rewards=GOOD.rewards.astype(np.float64))),
        ("dtype", replace(GOOD, legal_masks=GOOD.legal_masks.astype(np.uint8))),
        ("not_finite", changed("observations", (2, 0), np.nan)),
        ("not_finite", changed("rewards", 4, np.inf)),
        ("not_finite", changed("policies", (0, 0), np.nan)),
        ("not_finite", changed("root_values", 0, -np.inf)),
        ("action", changed("actions", 0, 3)),
        ("action", changed("actions", 0, -1)),
        ("illegal_action", played_although_forbidden()),
        ("policy", changed("policies", (0, GOOD.actions[0]), -0.1)),
        ("policy", policy_on_a_forbidden_action()),
        ("policy_sum", replace(GOOD, policies=GOOD.policies * np.float32(1.01))),
        ("player", changed("to_play", 0, 2)),
        ("player", changed("to_play", -1, -1)),
        ("final_value", changed("root_values", -1, 0.5)),
        ("id", replace(GOOD, episode_id="run/\ud800")),
        ("environment", replace(GOOD, environment_id="")),
        ("type", None),
        ("type", replace(GOOD, episode_id=None)),
        ("type", replace(GOOD, seed=True)),
        ("type", replace(GOOD, terminated=1)),
        ("type", replace(GOOD, rewards=GOOD.rewards.tolist())),
        ("type", replace(GOOD, observations=np.ma.masked_array(GOOD.observations))),
        ("number", replace(GOOD, seed=-1)),
        ("number", replace(GOOD, weights_version=2**63)),
        ("shape", replace(GOOD, actions=np.zeros((), np.int32))),
        ("too_large", changed("observations", (0, 0), 2e15)),
        ("too_large", changed("rewards", 0, -2e15)),
        ("too_large", changed("root_values", 0, 3e38)),
        ("legal_mask", replace(GOOD, legal_masks=(3 * GOOD.legal_masks.view(np.uint8)).view(bool))),
    ],
)
def test_bad_episode_is_refused_with_its_reason(reason, bad):
    with pytest.raises(RejectedEpisode) as caught:
        validate(bad, SPEC, 50)
    assert caught.value.reason == reason


def test_a_refusal_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(RejectedEpisode("length", "too long")))
    assert (error.reason, error.detail) == ("length", "too long")
