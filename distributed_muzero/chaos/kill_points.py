"""Kills a learner with SIGKILL at named points, lets it go on, and compares its end with one that was left alone.

    python -m distributed_muzero.chaos.kill_points --folder F --steps 60 --checkpoint-every 10
        [--kill-at NAME --occurrence 25]

is that learner: it goes on from the folder's last checkpoint, and prints a line `[step, time.monotonic()]` when it is
ready and after each step. Batches follow from seed and step alone; the network draws from torch's generator and counts
its calls, so that a checkpoint without generators or without integer buffers ends elsewhere. The code under test
knows nothing of this: the child replaces one attribute of it by one that kills.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distributed_muzero import checkpoint
from distributed_muzero.algorithm import training
from distributed_muzero.config import LearnerConfig, NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import DistributedMuZeroError
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.mlp import MLP
from distributed_muzero.types import Batch
from distributed_muzero.workers.learner import Learner

SPEC = EnvironmentSpec("kill points", (3,), np.dtype(np.float32), (4,))
NETWORK = NetworkConfig(embedding_size=8, hidden_sizes=(16,), support_size=11)
LEARNER = LearnerConfig(batch_size=8, publish_interval=4, warmup_steps=5, decay_steps=100, device="cpu")
NUM_UNROLL_STEPS = 2
CHILD_TIMEOUT_SECONDS = 120.0


def nothing(real: Callable, *args: Any, **kwargs: Any) -> None:
    """The call is killed before it begins."""


def all_of_it(real: Callable, *args: Any, **kwargs: Any) -> None:
    """The call is killed when it is about to return."""
    real(*args, **kwargs)


def half_a_file(real: Callable, path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


def half_a_folder(real: Callable, path: Path) -> None:
    for file in sorted(path.iterdir())[::2]:
        file.unlink()


def any_call(*args: Any, **kwargs: Any) -> bool:
    return True


def name_begins(start: str) -> Callable[..., bool]:
    return lambda path, *args, **kwargs: path.name.startswith(start)


def is_the_average(tensor: Tensor, *args: Any) -> bool:
    return tensor.numel() > 100  # the normaliser's statistics are of three numbers


class KillPoint(NamedTuple):
    """Dies in a call of `owner.attribute`, once `first` has done a part of it."""

    owner: Any
    attribute: str
    first: Callable[..., None]
    per: Literal["step", "checkpoint", "removal"]  # there is one such call for each
    counts: Callable[..., bool] = any_call  # which calls are meant, by their arguments


KILL_POINTS: dict[str, KillPoint] = {
    "before_forward": KillPoint(training, "unroll_losses", nothing, "step"),
    "after_backward": KillPoint(torch.optim.AdamW, "step", nothing, "step"),
    "after_optimizer_step": KillPoint(torch.optim.AdamW, "step", all_of_it, "step"),
    "after_average": KillPoint(Tensor, "lerp_", all_of_it, "step", is_the_average),
    "before_state": KillPoint(Learner, "state", nothing, "checkpoint"),
    "inside_state": KillPoint(FlatWeights, "named_arrays", all_of_it, "checkpoint"),
    "before_first_file": KillPoint(
        checkpoint, "write_synced", nothing, "checkpoint", name_begins("weights.")
    ),
    "half_of_weights_file": KillPoint(
        checkpoint, "write_synced", half_a_file, "checkpoint", name_begins("weights.")
    ),
    "before_manifest": KillPoint(checkpoint, "write_synced", nothing, "checkpoint", name_begins("manifest.")),
    "before_done": KillPoint(checkpoint, "write_synced", nothing, "checkpoint", name_begins("DONE")),
    "half_of_done": KillPoint(checkpoint, "write_synced", half_a_file, "checkpoint", name_begins("DONE")),
    "before_rename": KillPoint(Path, "rename", nothing, "checkpoint", name_begins(".leftover-writing-")),
    "after_rename": KillPoint(Path, "rename", all_of_it, "checkpoint", name_begins(".leftover-writing-")),
    "before_pruning": KillPoint(checkpoint, "prune_checkpoints", nothing, "checkpoint"),
    "while_pruning": KillPoint(
        shutil, "rmtree", half_a_folder, "removal", name_begins(".leftover-removing-")
    ),
}


class KillResult(NamedTuple):
    name: str
    seconds_to_resume: float  # from the new process's start to the end of its first step
    weights_equal: bool  # sha256 of the last checkpoint's file, against the run that was left alone
    optimizer_equal: bool
    steps_lost: int  # done before the kill, and done again
    occurrence: int  # of the point's calls, this one killed
    resumed_from: int  # learner steps of the checkpoint that it went on from
    steps_after: int  # made by the process that went on

    @property
    def broken(self) -> list[str]:
        """What went wrong, in words: the ends differ, or nothing was resumed that they could differ in."""
        checks = {
            "weights differ": self.weights_equal,
            "optimizer differs": self.optimizer_equal,
            "it began anew": self.resumed_from > 0,
            "it made no steps afterwards": self.steps_after > 0,
        }
        return [
            f"{self.name}, occurrence {self.occurrence}: {text}"
            for text, holds in checks.items()
            if not holds
        ]


def run_kill_points(
    folder: Path,
    seed: int,
    names: Iterable[str] | None = None,
    progress: Callable[[KillResult], object] | None = None,
    *,
    steps: int = 60,
    checkpoint_every: int = 10,
) -> list[KillResult]:
    """Runs a learner undisturbed, then one for each kill point (all of them, unless named) that is killed and goes on.

    folder: new or empty, one subfolder a run.   seed: of networks, batches, and which occurrence of a point kills.
    progress: called with each result. Raises DistributedMuZeroError if a point isn't reached or a child fails, and
    ValueError if there are too few checkpoints for a kill to leave one before and steps after.
    """
    length = {"steps": steps, "checkpoint_every": checkpoint_every}
    expected = _hashes(folder / "uninterrupted", _finish(folder / "uninterrupted", seed, **length), steps)
    results = []
    for name in KILL_POINTS if names is None else names:
        occurrence = _choose_occurrence(name, seed, **length)
        killed = _run_child(folder / name, seed, name, occurrence, **length)
        if killed.returncode != -signal.SIGKILL:
            raise DistributedMuZeroError(
                f"kill point {name}, occurrence {occurrence}: expected the child to die by SIGKILL, it ended with "
                f"code {killed.returncode}: never reached, or {killed.stderr[-500:]!r}"
            )
        started = time.monotonic()
        lines = _finish(folder / name, seed, **length)
        found = _hashes(folder / name, lines, steps)
        result = KillResult(
            name,
            # The clock is the machine's.
            seconds_to_resume=lines[:2][-1][1] - started,
            weights_equal=found["weights"] == expected["weights"],
            optimizer_equal=found["optimizer"] == expected["optimizer"],
            steps_lost=int(_lines(killed)[-1][0] - lines[0][0]),
            occurrence=occurrence,
            resumed_from=int(lines[0][0]),
            steps_after=int(lines[-1][0] - lines[0][0]),
        )
        results.append(result)
        if progress:
            progress(result)
    return results


def train(
    folder: Path, seed: int, steps: int, checkpoint_every: int, on_step: Callable[[int], object]
) -> None:
    """Learns from the folder's last checkpoint, or from the start, up to `steps`; the last one writes a checkpoint."""
    learner = make_learner(seed)
    saved = checkpoint.latest_checkpoint(folder)
    if saved is not None:
        learner.restore(saved.tensors, saved.state)
    on_step(learner.num_steps)
    while learner.num_steps < steps:
        learner.step(make_batch(seed, learner.num_steps))
        on_step(learner.num_steps)
        if learner.num_steps % checkpoint_every == 0 or learner.num_steps == steps:
            checkpoint.write_checkpoint(folder, learner.num_steps, *learner.state())
            checkpoint.prune_checkpoints(folder, LEARNER.keep_checkpoints)


class ForgetfulMLP(MLP):
    """Drops a share of the embedding that depends on how often it was asked, drawn from torch's generator."""

    num_calls: Tensor

    def __init__(self) -> None:
        super().__init__(SPEC, 1, NETWORK)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def representation(self, observations: Tensor) -> Tensor:
        self.num_calls += 1
        share = 0.1 + 0.1 * (int(self.num_calls) % 3)
        return functional.dropout(super().representation(observations), share, self.training)


def make_learner(seed: int) -> Learner:
    torch.manual_seed(seed)
    return Learner(ForgetfulMLP(), LEARNER)


def make_batch(seed: int, step: int) -> Batch:
    """The batch of a learner step: the same numbers whenever it is asked for."""
    rng = np.random.default_rng([seed, step])
    shape = (LEARNER.batch_size, NUM_UNROLL_STEPS + 1)
    return Batch(
        observations=rng.normal(size=(shape[0], 1, *SPEC.observation_shape)).astype(np.float32),
        target_policies=rng.dirichlet(np.ones(SPEC.num_actions), shape).astype(np.float32),
        target_actions=rng.integers(SPEC.num_actions, size=shape, dtype=np.int32),
        target_returns=rng.normal(size=shape).astype(np.float32),
        target_rewards=rng.normal(size=shape).astype(np.float32),
        importance_weights=rng.uniform(0.5, 1.5, shape[0]).astype(np.float32),
        positions=np.zeros((shape[0], 2), np.int64),
        weights_versions=np.zeros(shape[0], np.int64),
    )


def arm(point: KillPoint, occurrence: int) -> None:
    """From now on, this process dies in the given call of the kill point, counted from 1."""
    real = getattr(point.owner, point.attribute)
    calls = itertools.count(1)

    @functools.wraps(real)
    def armed(*args: Any, **kwargs: Any) -> Any:
        if point.counts(*args, **kwargs) and next(calls) == occurrence:
            point.first(real, *args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(point.owner, point.attribute, armed)


def occurrences(name: str, steps: int, checkpoint_every: int) -> range:
    """The calls of a point at which a kill tells something: a checkpoint is there, and steps are left after it.

    Raises ValueError if there is none.
    """
    num_checkpoints = -(-steps // checkpoint_every)
    # The first removal is at checkpoint keep + 1. The last checkpoint is left out: a kill in it may leave it complete.
    calls = {
        "step": range(checkpoint_every + 1, steps + 1),
        "checkpoint": range(2, num_checkpoints),
        "removal": range(1, num_checkpoints - LEARNER.keep_checkpoints),
    }[KILL_POINTS[name].per]
    if not calls:
        raise ValueError(
            f"{name} needs a checkpoint before it and steps after it; got {num_checkpoints} checkpoints, of which "
            f"{LEARNER.keep_checkpoints} are kept"
        )
    return calls


def _choose_occurrence(name: str, seed: int, steps: int, checkpoint_every: int) -> int:
    rng = np.random.default_rng([seed, list(KILL_POINTS).index(name)])
    return int(rng.choice(occurrences(name, steps, checkpoint_every)))


def _run_child(
    folder: Path, seed: int, kill_at: str | None, occurrence: int, *, steps: int, checkpoint_every: int
) -> subprocess.CompletedProcess[str]:
    options = {"folder": folder, "seed": seed, "steps": steps, "checkpoint-every": checkpoint_every}
    if kill_at:
        options |= {"kill-at": kill_at, "occurrence": occurrence}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "distributed_muzero.chaos.kill_points", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_SECONDS, check=False)


def _finish(folder: Path, seed: int, *, steps: int, checkpoint_every: int) -> list[tuple[int, float]]:
    """Runs a child to its end; its lines."""
    done = _run_child(folder, seed, None, 0, steps=steps, checkpoint_every=checkpoint_every)
    if done.returncode != 0:
        raise DistributedMuZeroError(
            f"the learner in {folder} ended with code {done.returncode}: {done.stderr}"
        )
    return _lines(done)


def _lines(done: subprocess.CompletedProcess[str]) -> list[tuple[int, float]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def _hashes(folder: Path, lines: list[tuple[int, float]], steps: int) -> dict[str, str]:
    """The sha256 of each file of the last checkpoint, by stem. Raises DistributedMuZeroError for another step."""
    saved = checkpoint.latest_checkpoint(folder)
    if saved is None or saved.step != steps or lines[-1][0] != steps:
        raise DistributedMuZeroError(
            f"expected a checkpoint of step {steps} in {folder}, found {saved and saved.step}"
        )
    manifest = json.loads((saved.path / "manifest.json").read_text())
    return {Path(name).stem: entry["sha256"] for name, entry in manifest["files"].items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="A learner that goes on from its folder, and kills itself if told to."
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-at", choices=KILL_POINTS)
    parser.add_argument("--occurrence", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.kill_at:
        arm(KILL_POINTS[options.kill_at], options.occurrence)
    train(
        options.folder,
        options.seed,
        options.steps,
        options.checkpoint_every,
        lambda step: print(json.dumps([step, time.monotonic()]), flush=True),
    )


if __name__ == "__main__":
    main()
