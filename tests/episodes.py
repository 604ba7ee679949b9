"""Random but valid episodes for tests of the replay side."""

import numpy as np

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.types import Episode

SPEC = EnvironmentSpec("made-up", (2,), np.dtype(np.float32), (3,))


def make_episode(
    num_steps: int,
    *,
    name: str = "run/0/0/1",
    seed: int = 0,
    terminated: bool = True,
    version: int = 0,
    spec: EnvironmentSpec = SPEC,
    two_players: bool = False,
) -> Episode:
    """An episode that a shard accepts; its numbers follow from `seed`."""
    rng = np.random.default_rng(seed)
    legal = rng.random((num_steps, spec.num_actions)) < 0.6
    legal[np.arange(num_steps), rng.integers(0, spec.num_actions, num_steps)] = True
    policies = legal * rng.random(legal.shape)
    root_values = rng.normal(size=num_steps + 1)
    root_values[-1] *= not terminated
    return Episode(
        episode_id=name,
        environment_id=spec.id,
        seed=seed,
        weights_version=version,
        observations=(1 + 100 * rng.random((num_steps + 1, *spec.observation_shape))).astype(
            spec.observation_dtype
        ),
        legal_masks=legal,
        actions=policies.argmax(1).astype(np.int32),
        rewards=rng.normal(size=num_steps).astype(np.float32),
        policies=(policies / policies.sum(1, keepdims=True)).astype(np.float32),
        root_values=root_values.astype(np.float32),
        to_play=(np.arange(num_steps + 1) % 2 if two_players else np.zeros(num_steps + 1)).astype(np.int8),
        terminated=terminated,
        truncated=not terminated,
    )
