"""Poisoned episodes (promise P8): every way to spoil a valid one that we could think of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.types import Episode
from distributed_muzero.workers.replay_shard import ReplayShard

SPEC = EnvironmentSpec("mutants", (2,), np.dtype(np.float32), (3,))
NUM_STEPS = 6
ARRAYS = ("observations", "legal_masks", "actions", "rewards", "policies", "root_values", "to_play")
FLOAT_ARRAYS = ("observations", "rewards", "policies", "root_values")
ABSURD = 10**9  # steps
HUGE = np.float32(3e38)

Mutator = Callable[[Episode, np.random.Generator], Any]


class MutatorResult(NamedTuple):
    n: int
    accepted: list[str]  # names of mutants that were stored, or not refused with a reason
    crashed: list[str]  # and what was raised
    unusable: list[str]  # after which a valid episode wasn't taken

    @property
    def broken(self) -> int:
        return len(self.accepted) + len(self.crashed) + len(self.unusable)


def run_mutators(folder: Path, seed: int, progress: Callable[[str], None] | None = None) -> MutatorResult:
    """Offers each mutant to a real shard, alone, and then a valid episode. folder: new or empty."""
    rng = np.random.default_rng(seed)
    shard = ReplayShard(SPEC, _config(seed), 0, folder)
    mutators = make_mutators()
    result = MutatorResult(len(mutators), [], [], [])
    try:
        for name, mutate in mutators.items():
            mutant = mutate(make_episode(rng, SPEC, NUM_STEPS, f"mutant/{name}"), rng)
            _offer_mutant(shard, name, mutant, result)
            sane = make_episode(rng, SPEC, NUM_STEPS, f"sane/{name}")
            if [reply.status for reply in shard.insert([sane])] != ["stored"]:
                result.unusable.append(name)
            if progress:
                progress(name)
    finally:
        shard.close()
    return result


def make_episode(rng: np.random.Generator, spec: EnvironmentSpec, num_steps: int, name: str) -> Episode:
    """A valid episode of random numbers that ended by its rules."""
    legal = rng.random((num_steps, spec.num_actions)) < 0.6
    legal[:, 0] = True
    # At least one action is forbidden, one allowed.
    legal[0, -1] = False
    policies = legal * (0.1 + rng.random(legal.shape))
    observations = rng.normal(size=(num_steps + 1, *spec.observation_shape))
    return Episode(
        episode_id=name,
        environment_id=spec.id,
        seed=int(rng.integers(2**31)),
        weights_version=int(rng.integers(100)),
        observations=observations.astype(spec.observation_dtype),
        legal_masks=legal,
        actions=policies.argmax(1).astype(np.int32),
        rewards=rng.normal(size=num_steps).astype(np.float32),
        policies=(policies / policies.sum(1, keepdims=True)).astype(np.float32),
        root_values=np.append(rng.normal(size=num_steps), 0).astype(np.float32),
        to_play=np.zeros(num_steps + 1, np.int8),
        terminated=True,
        truncated=False,
    )


def make_mutators() -> dict[str, Mutator]:
    """Functions (valid episode, generator) -> mutant, by name."""
    return {
        **_numbers(),
        **_shapes(),
        **_types(),
        **_games(),
        **_claims(),
        **_fields(),
        "not an episode: None": lambda episode, rng: None,
        "not an episode: dict": lambda episode, rng: vars(episode),
        "not an episode: array": lambda episode, rng: episode.rewards,
    }


def _offer_mutant(shard: ReplayShard, name: str, mutant: Any, result: MutatorResult) -> None:
    before = shard.stats()
    num_bytes = shard.store.log.num_bytes
    try:
        replies = shard.insert([mutant])
    except Exception as error:
        result.crashed.append(f"{name}: {type(error).__name__}: {error}")
        return
    shard.commit()
    after = shard.stats()
    refused = [reply.status for reply in replies] == ["rejected"] and bool(replies[0].reason)
    counted = after["rejected_episodes"] == before["rejected_episodes"] + 1
    untouched = after["episodes"] == before["episodes"] and shard.store.log.num_bytes == num_bytes
    if not (refused and counted and untouched):
        result.accepted.append(name)


def _config(seed: int) -> Any:
    replay = {"max_transitions": 5000, "min_size_to_sample": 5000}
    return make_config({"replay": replay, "algorithm": {"num_unroll_steps": 2}, "run": {"seed": seed}})


def _with_number(name: str, number: Any) -> Mutator:
    """One random place of an array gets this number."""

    def mutate(episode: Episode, rng: np.random.Generator) -> Episode:
        array = getattr(episode, name).copy()
        array.flat[rng.integers(array.size)] = number
        return replace(episode, **{name: array})

    return mutate


def _with_array(name: str, change: Callable[[np.ndarray], Any]) -> Mutator:
    return lambda episode, rng: replace(episode, **{name: change(getattr(episode, name))})


def _with(**values: Any) -> Mutator:
    return lambda episode, rng: replace(episode, **values)


def _numbers() -> dict[str, Mutator]:
    bad = {"NaN": np.nan, "Inf": np.inf, "-Inf": -np.inf}
    mutators = {
        f"{name} with {word}": _with_number(name, number)
        for name in FLOAT_ARRAYS
        for word, number in bad.items()
    }
    # Finite, but returns or squares of them aren't.
    for name in FLOAT_ARRAYS:
        mutators[f"{name} near the end of float32"] = _with_array(name, lambda a: np.full_like(a, HUGE))
    mutators["rewards that overflow downwards"] = _with_array("rewards", lambda a: np.full_like(a, -HUGE))
    return mutators


def _shapes() -> dict[str, Mutator]:
    mutators: dict[str, Mutator] = {}
    for name in ARRAYS:
        mutators[f"{name} one shorter"] = _with_array(name, lambda a: a[:-1].copy())
        mutators[f"{name} one longer"] = _with_array(name, lambda a: np.concatenate([a, a[-1:]]))
        mutators[f"{name} with an axis more"] = _with_array(name, lambda a: a[None].copy())
        mutators[f"{name} without axes"] = _with_array(name, lambda a: a.reshape(-1)[0:1].reshape(()).copy())
        mutators[f"{name} empty"] = _with_array(name, lambda a: a[:0].copy())
    mutators["policies of an action more"] = _with_array("policies", lambda a: np.pad(a, [(0, 0), (0, 1)]))
    mutators["legal_masks of an action less"] = _with_array("legal_masks", lambda a: a[:, :-1].copy())
    mutators["no steps at all"] = lambda episode, rng: replace(
        episode, **{name: getattr(episode, name)[:0].copy() for name in ARRAYS}
    )
    mutators["a final observation and no steps"] = lambda episode, rng: replace(
        episode,
        **{name: getattr(episode, name)[: len(getattr(episode, name)) - NUM_STEPS].copy() for name in ARRAYS},
    )
    return mutators


def _types() -> dict[str, Mutator]:
    mutators: dict[str, Mutator] = {}
    for name in ARRAYS:
        mutators[f"{name} as a list"] = _with_array(name, lambda a: a.tolist())
        mutators[f"{name} missing"] = _with(**{name: None})
        mutators[f"{name} of objects"] = _with_array(name, lambda a: a.astype(object))
        mutators[f"{name} as text"] = _with_array(name, lambda a: a.astype("S8"))
        mutators[f"{name} masked"] = _with_array(name, np.ma.masked_array)
    for name in ("actions", *FLOAT_ARRAYS):
        mutators[f"{name} in the other byte order"] = _with_array(
            name, lambda a: a.astype(a.dtype.newbyteorder())
        )
    for name in FLOAT_ARRAYS:
        mutators[f"{name} in double precision"] = _with_array(name, lambda a: a.astype(np.float64))
    mutators["actions as int64"] = _with_array("actions", lambda a: a.astype(np.int64))
    mutators["legal_masks as numbers"] = _with_array("legal_masks", lambda a: a.astype(np.uint8))
    mutators["legal_masks with bytes of neither truth"] = _with_array(
        "legal_masks", lambda a: (3 * a.view(np.uint8)).view(bool)
    )
    mutators["rewards as complex numbers"] = _with_array("rewards", lambda a: a.astype(np.complex64))
    mutators["observations as dates"] = _with_array("observations", lambda a: a.astype("M8[s]"))
    return mutators


def _games() -> dict[str, Mutator]:
    """What no game can have been."""

    def played_although_forbidden(episode: Episode, rng: np.random.Generator) -> Episode:
        actions = episode.actions.copy()
        actions[0] = np.argmin(episode.legal_masks[0])
        return replace(episode, actions=actions)

    def policy_on_forbidden(episode: Episode, rng: np.random.Generator) -> Episode:
        policies = episode.policies.copy()
        policies[0] = 0
        policies[0, np.argmin(episode.legal_masks[0])] = 1
        return replace(episode, policies=policies)

    def negative_policy(episode: Episode, rng: np.random.Generator) -> Episode:
        policies = episode.policies.copy()
        policies[0] = 0
        policies[0, :2] = 1.5, -0.5
        return replace(episode, policies=policies, legal_masks=np.ones_like(episode.legal_masks))

    return {
        "action -1": _with_number("actions", -1),
        "action A": _with_number("actions", SPEC.num_actions),
        "action of 31 bits": _with_number("actions", 2**31 - 1),
        "action that the mask forbids": played_although_forbidden,
        "nothing allowed": _with_array("legal_masks", np.zeros_like),
        "policy that sums to more": _with_array("policies", lambda a: a * np.float32(1.01)),
        "policy of nothing": _with_array("policies", np.zeros_like),
        "policy on a forbidden action": policy_on_forbidden,
        "negative policy": negative_policy,
        "player 7": _with_number("to_play", 7),
        "player -1": _with_number("to_play", -1),
        "terminated and truncated": _with(terminated=True, truncated=True),
        "neither terminated nor truncated": _with(terminated=False, truncated=False),
        "terminated with a final value": _with_array("root_values", lambda a: np.append(a[:-1], a[:1] + 9)),
        "truncated before a row fits": lambda episode, rng: replace(
            make_episode(rng, SPEC, 1, episode.episode_id), terminated=False, truncated=True
        ),
    }


def _claims() -> dict[str, Mutator]:
    """Lengths beyond any memory; the arrays repeat one row, so that they need none themselves."""

    def claim(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array[:1], (ABSURD, *array.shape[1:]))

    def all_claim(episode: Episode, rng: np.random.Generator) -> Episode:
        claims: dict[str, Any] = {name: claim(getattr(episode, name)) for name in ARRAYS}
        return replace(episode, **claims)

    return {"everything claims 1e9 steps": all_claim} | {
        f"{name} claim 1e9 steps": _with_array(name, claim) for name in ARRAYS
    }


def _fields() -> dict[str, Mutator]:
    ids = {
        "empty": "",
        "huge": "x" * 10**6,
        "with half a character": "run/\ud800/1",
        "missing": None,
        "a number": 7,
        "bytes": b"run/0/0/1",
        "a list": ["run/0/0/1"],
        "an array": np.array(["a", "b"]),
    }
    numbers: dict[str, Any] = {
        "negative": -1,
        "of 64 bits": 2**63,
        "of 20000 bits": 2**20_000,
        "a half": 0.5,
        "missing": None,
    }
    numbers |= {"text": "7", "a truth": True, "NaN": float("nan")}
    mutators = {f"id {word}": _with(episode_id=value) for word, value in ids.items()}
    mutators |= {f"environment {word}": _with(environment_id=value) for word, value in ids.items()}
    for name in ("seed", "weights_version"):
        mutators |= {f"{name} {word}": _with(**{name: value}) for word, value in numbers.items()}
    for name in ("terminated", "truncated"):
        wrong = {"missing": None, "a number": 1, "text": "no", "an array": np.array([True, False])}
        mutators |= {f"{name} {word}": _with(**{name: value}) for word, value in wrong.items()}
    return mutators
