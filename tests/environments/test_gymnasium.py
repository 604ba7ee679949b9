import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.gymnasium import GymnasiumEnvironment, code_observations, make_gymnasium
from distributed_muzero.errors import EnvironmentFailure, NonFiniteError, UnknownEnvironmentError


class Scripted(gymnasium.Env):
    """Says what it is told to and remembers the actions that it got."""

    def __init__(
        self, action_space=None, observation_space=None, observation=None, reward=0.0, info=None, ends=()
    ):
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.observation_space = observation_space or spaces.Box(-1, 1, (2,), np.float32)
        self.observation = np.zeros(2, np.float32) if observation is None else observation
        self.reward, self.info, self.ends = (
            reward,
            info or {},
            ends,
        )  # ends: (terminated, truncated) of each step
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        return np.zeros(2, np.float32) if self.observation.shape == (2,) else self.observation, self.info

    def step(self, action):
        self.actions.append(action)
        ended = self.ends[len(self.actions) - 1] if len(self.actions) <= len(self.ends) else (False, False)
        return self.observation, self.reward, *ended, self.info


def adapt(environment, max_episode_steps=100):
    return GymnasiumEnvironment(environment, "scripted", max_episode_steps)


def make(id, **kwargs):
    return make_gymnasium(EnvironmentConfig(id=id, **kwargs))


def play(environment, seed, num_steps=60):
    """Observations and rewards of a game whose legal actions are chosen by a fixed rule."""
    rng = np.random.default_rng(5)
    trace = [environment.initial_state(seed)]
    for _ in range(num_steps):
        reward, observation, ended = environment.step(int(rng.choice(np.flatnonzero(environment.mask()))))
        trace += [np.array(reward), observation]
        if ended:
            break
    return np.concatenate([np.ravel(part) for part in trace])


@pytest.mark.parametrize("id", ["CartPole-v1", "Acrobot-v1", "FrozenLake-v1", "Taxi-v3", "LunarLander-v3"])
def test_same_seed_plays_the_same_game_also_after_another_one(id):
    environment = make(id)
    first = play(environment, seed=3)
    play(environment, seed=4)
    np.testing.assert_array_equal(play(environment, seed=3), first)
    other = make(id)
    np.testing.assert_array_equal(play(other, seed=3), first)
    environment.close()
    other.close()


def test_spec_keeps_the_environments_own_dtype_and_shape():
    spec = make("CartPole-v1").spec
    assert spec == ("CartPole-v1", (4,), np.float32, (2,), 1, ())
    frames = spaces.Box(0, 255, (3, 8, 8), np.uint8)
    spec = adapt(Scripted(observation_space=frames, observation=np.ones((3, 8, 8), np.uint8))).spec
    assert (spec.observation_shape, spec.observation_dtype) == ((3, 8, 8), np.uint8)


def test_own_time_limit_truncates():
    environment = make("MountainCar-v0")
    environment.initial_state(1)
    ended = [environment.step(1)[2] for _ in range(200)]
    assert ended == [False] * 199 + [True] and environment.truncated


def test_config_limit_truncates_earlier():
    environment = make("MountainCar-v0", max_episode_steps=5)
    environment.initial_state(1)
    assert [environment.step(1)[2] for _ in range(5)] == [False] * 4 + [True] and environment.truncated
    environment.initial_state(1)
    assert not environment.truncated and not environment.step(1)[2]


@pytest.mark.parametrize(
    ("ending", "truncated"), [((True, False), False), ((False, True), True), ((True, True), False)]
)
def test_terminated_wins_over_truncated(ending, truncated):
    environment = adapt(Scripted(ends=[ending]))
    environment.initial_state()
    assert environment.step(0)[2] and environment.truncated is truncated


def test_terminating_in_the_limits_last_step_is_not_truncation():
    environment = adapt(Scripted(ends=[(True, False)]), max_episode_steps=1)
    environment.initial_state()
    assert environment.step(0)[2] and not environment.truncated


def test_discrete_start_is_added():
    scripted = Scripted(spaces.Discrete(3, start=-1))
    environment = adapt(scripted)
    environment.initial_state()
    for action in range(3):
        environment.step(action)
    assert scripted.actions == [-1, 0, 1] and all(scripted.action_space.contains(a) for a in scripted.actions)


@pytest.mark.parametrize(
    ("space", "shape", "last"),
    [
        (spaces.MultiDiscrete([2, 3]), (2, 3), [1, 2]),
        (spaces.MultiDiscrete([2, 3], start=[5, -1]), (2, 3), [6, 1]),
        (spaces.MultiDiscrete([[2, 3], [1, 2]]), (2, 3, 1, 2), [[1, 2], [0, 1]]),
        (spaces.MultiBinary(3), (2, 2, 2), [1, 1, 1]),
    ],
)
def test_every_flat_action_unravels_to_a_different_one_of_the_space(space, shape, last):
    scripted = Scripted(space)
    environment = adapt(scripted)
    assert environment.spec.action_shape == environment.mask().shape == shape
    environment.initial_state()
    for action in range(environment.spec.num_actions):
        environment.step(action)
    assert all(space.contains(action) for action in scripted.actions)
    assert len({action.tobytes() for action in scripted.actions}) == environment.spec.num_actions
    assert scripted.actions[-1].tolist() == last


def test_flat_actions_are_row_major():
    scripted = Scripted(spaces.MultiDiscrete([2, 3]))
    environment = adapt(scripted)
    environment.initial_state()
    environment.step(4)
    assert scripted.actions[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("space", "raw", "encoded"),
    [
        (spaces.Discrete(3), 2, [0, 0, 1]),
        (spaces.Discrete(3, start=4), np.int64(4), [1, 0, 0]),
        (spaces.MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0]),
        (spaces.MultiDiscrete([2, 2], start=[1, 0]), np.array([1, 1]), [1, 0, 0, 1]),
    ],
)
def test_discrete_observations_become_float32(space, raw, encoded):
    coding = code_observations(space, "x")
    observation = coding.encode(raw)
    assert observation.tolist() == encoded
    assert (
        (observation.dtype, observation.shape)
        == (coding.dtype, coding.shape)
        == (np.float32, (len(encoded),))
    )


def test_an_observation_outside_its_space_is_named():
    environment = adapt(Scripted(observation_space=spaces.Discrete(3), observation=np.array(3)))
    with pytest.raises(EnvironmentFailure, match=r"step 0, seed 7.*doesn't fit"):
        environment.initial_state(7)
    environment = adapt(Scripted(observation=np.zeros(5)))
    with pytest.raises(EnvironmentFailure, match=r"shape \(5,\), its space says \(2,\)"):
        environment.initial_state(7)


def test_observations_are_copies():
    scripted = Scripted()
    environment = adapt(scripted)
    environment.initial_state()
    _, before, _ = environment.step(0)
    scripted.observation += 1
    assert before.tolist() == [0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_named_with_step_and_seed(bad):
    environment = adapt(Scripted(reward=bad))
    environment.initial_state(11)
    with pytest.raises(NonFiniteError, match="scripted, step 1, seed 11: the reward"):
        environment.step(0)
    environment = adapt(Scripted(observation=np.array([0, bad], np.float32)))
    environment.initial_state(12)
    with pytest.raises(NonFiniteError, match="scripted, step 1, seed 12: the observation"):
        environment.step(0)


def test_reward_beyond_float32_is_not_finite():
    environment = adapt(Scripted(reward=1e39))
    environment.initial_state()
    with pytest.raises(NonFiniteError, match=r"1e\+39"):
        environment.step(0)


def test_mask_comes_from_the_info_of_the_last_step():
    environment = make("Taxi-v3")
    environment.initial_state(1)
    expected = environment._environment.unwrapped.action_mask(environment._environment.unwrapped.s)
    assert environment.mask().tolist() == (expected == 1).tolist() and 0 < environment.mask().sum() < 6


def test_mask_method_is_read_at_every_step():
    class Masked(Scripted):
        def action_masks(self):
            return [len(self.actions) == 0, True]

    environment = adapt(Masked())
    environment.initial_state()
    assert environment.mask().tolist() == [True, True]
    environment.step(0)
    assert environment.mask().tolist() == [False, True]


def test_masks_of_sub_actions_are_multiplied_out():
    info = {"action_mask": np.array([1, 0, 1, 1, 0])}
    environment = adapt(Scripted(spaces.MultiDiscrete([2, 3]), info=info))
    environment.initial_state()
    assert environment.mask().astype(int).tolist() == [[1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("mask", "problem"), [([0, 0], "forbids every action"), ([1, 1, 1], r"shape \(3,\)")]
)
def test_unusable_masks_are_named_with_step_and_seed(mask, problem):
    environment = adapt(Scripted(info={"action_mask": mask}))
    environment.initial_state(9)
    environment.step(0)
    with pytest.raises(EnvironmentFailure, match=f"step 1, seed 9.*{problem}"):
        environment.mask()


def test_changing_the_returned_mask_changes_nothing():
    environment = make("CartPole-v1")
    environment.initial_state(1)
    environment.mask()[:] = 0
    assert environment.mask().all()


def test_playing_without_a_game_or_outside_the_actions_is_an_error():
    environment = adapt(Scripted(ends=[(True, False)]))
    with pytest.raises(EnvironmentFailure, match="initial_state"):
        environment.step(0)
    environment.initial_state(2)
    with pytest.raises(EnvironmentFailure, match=r"action 2 isn't in 0 … 1"):
        environment.step(2)
    environment.step(0)
    with pytest.raises(EnvironmentFailure, match="initial_state"):
        environment.step(0)


def test_what_the_environment_raises_is_named():
    class Broken(Scripted):
        def step(self, action):
            raise KeyError("lost")

    environment = adapt(Broken())
    environment.initial_state(6)
    with pytest.raises(
        EnvironmentFailure, match=r"scripted, step 0, seed 6: step\(1\) raised KeyError: 'lost'"
    ):
        environment.step(1)


@pytest.mark.parametrize(
    ("id", "problem"),
    [
        ("Pendulum-v1", "continuous.*yet"),
        ("Ant-v5", "continuous.*yet"),
        ("Blackjack-v1", "Tuple.*FlattenObservation"),
    ],
)
def test_spaces_that_cannot_be_trained_say_what_to_do(id, problem):
    with pytest.raises(EnvironmentFailure, match=problem):
        make(id)


def test_flattened_observations_can_be_played():
    flat = gymnasium.wrappers.FlattenObservation(gymnasium.make("Blackjack-v1"))
    assert play(adapt(flat), seed=1).size > 40


def test_too_many_joint_actions_are_refused():
    with pytest.raises(EnvironmentFailure, match="10000000000000000000000 joint actions"):
        adapt(Scripted(spaces.MultiDiscrete([10] * 22)))


def test_kwargs_reach_the_environment_and_wrong_ones_are_named():
    assert make("FrozenLake-v1", kwargs={"map_name": "8x8"}).spec.observation_shape == (64,)
    with pytest.raises(EnvironmentFailure, match="frobnicate"):
        make("CartPole-v1", kwargs={"frobnicate": 1})


def test_missing_package_names_the_command():
    with pytest.raises(UnknownEnvironmentError, match=r"pip install 'gymnasium\[jax\]'"):
        make("phys2d/CartPole-v1")


def test_car_racing_becomes_discrete_by_its_kwargs():
    environment = make("CarRacing-v3", kwargs={"continuous": False})
    assert environment.spec.action_shape == (5,) and environment.spec.observation_dtype == np.uint8
    environment.close()
