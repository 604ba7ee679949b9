"""Actors of the A3C agent as processes of Ray."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import contextmanager, suppress
from subprocess import PIPE, Popen

import psutil
import pytest

from tests.processes import descendants, find_role, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]

TRAIN = """
import json, sys
from pathlib import Path
from distributed_muzero.mathy.agents.a3c import A3CAgent, A3CConfig
args = A3CConfig(
    model_dir=sys.argv[1], units=8, embedding_units=4, lstm_units=4, rnn_size=6, episodes_per_worker=4,
    **json.loads(sys.argv[2]),
)
print(json.dumps(A3CAgent(args).train((Path(sys.argv[1]) / 'stop').exists)._asdict()))
"""

# The second actor answers once and hangs; the one in its place knows that one was lost, and answers as ever.
HANG = """
import sys, time
from functools import partial
import numpy as np
from distributed_muzero.cluster.a3c import contributions

class Answers:
    def __init__(self, name, hangs=False, num_lost=0):
        self.name, self.hangs, self.num_calls = name, hangs, 0

    def contribute(self, weights):
        self.num_calls += 1
        time.sleep(1000 if self.hangs and self.num_calls > 1 else 0.1)
        return self.name

def second(num_lost):
    return Answers("in its place" if num_lost else "first of two", hangs=num_lost == 0)

makers = [partial(Answers, "steady"), second]
found = set()
for answer in contributions(makers, lambda: np.zeros(1), timeout_seconds=5, max_lost=3):
    if answer not in found:
        found.add(answer)
        print(answer, flush=True)
    if answer == "in its place":
        break
"""


@contextmanager
def training(folder, script=TRAIN, **options):
    """In a process and a Ray of its own."""
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as ray:
        process = Popen(
            [sys.executable, "-c", script, str(folder), json.dumps(options)],
            stdout=PIPE, stderr=PIPE, text=True, env={**os.environ, "RAY_TMPDIR": ray},
        )  # fmt: skip
        try:
            yield process
        finally:
            left = descendants(process.pid)
            process.kill()
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.communicate()


def result_of(process):
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1]), errors


def test_two_actors_train_one_model_that_goes_on_afterwards(tmp_path):
    with training(tmp_path, num_workers=2, max_eps=30) as process:
        first, _ = result_of(process)
    assert first["episodes"] >= 30 and first["updates"] >= 2
    with training(tmp_path, num_workers=2, max_eps=first["episodes"] + 10) as process:
        second, _ = result_of(process)
    assert second["updates"] > first["updates"] and second["episodes"] >= first["episodes"] + 10


def test_an_actor_that_dies_is_replaced(tmp_path):
    with training(tmp_path, num_workers=2, max_eps=10**6, save_every=5) as process:
        wait_for("a saved model", lambda: list(tmp_path.glob("model.checkpoints/step_*/DONE")), 120)
        doomed = find_role(process.pid, "GradientWorker")[0]
        doomed.kill()
        doomed.wait(10)
        wait_for("two actors", lambda: len(find_role(process.pid, "GradientWorker")) == 2, 60)
        (tmp_path / "stop").touch()
        result, errors = result_of(process)
    assert result["updates"] > 5
    assert "is replaced" in errors


def test_an_actor_that_hangs_is_replaced_while_others_answer(tmp_path):
    with training(tmp_path, HANG) as process:
        output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert set(output.splitlines()) == {"steady", "first of two", "in its place"}
    assert "actor 1 is replaced: it gave no answer in time" in errors


def test_actors_that_are_lost_too_often_end_it(tmp_path):
    with training(tmp_path, num_workers=1, max_eps=10**6, max_lost_actors=0) as process:
        wait_for("an actor", lambda: find_role(process.pid, "GradientWorker"), 120)
        find_role(process.pid, "GradientWorker")[0].kill()
        _, errors = process.communicate(timeout=100)
    assert process.returncode != 0 and "ClusterError: 1 actors were lost" in errors
