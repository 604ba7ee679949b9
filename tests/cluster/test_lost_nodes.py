"""Actors and nodes that die while a run plays and learns (P1)."""

from __future__ import annotations

import time

import pytest

from tests.cluster.nodes import LOOSE, SLOW_CHAIN, connected_nodes, played_after, run_in
from tests.cluster.slow_chain import faults

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_KILLS = 10
REPLACED_SECONDS = 15.0


@pytest.mark.long
def test_actors_of_a_lost_node_wait_for_another_and_the_learner_goes_on(tmp_path):
    with connected_nodes(3) as nodes, run_in(nodes, tmp_path, *SLOW_CHAIN, *LOOSE, "--actors", 3) as run:
        (node,) = nodes.cluster.worker_nodes
        run.wait("three actors", lambda: run.actors("live") == 3)
        (learner,) = run.processes("LearnerWorker")
        lost = set(run.actor_processes())

        nodes.lose(node)
        run.wait("their loss", lambda: run.actors("pending") == 3)
        steps = run.learner_steps
        run.wait("learner steps without actors", lambda: run.learner_steps > steps + 20)

        other, moment = nodes.add(3), time.monotonic()
        run.wait("three actors", lambda: run.actors("live") == 3)
        run.wait(
            "games of all of them",
            lambda: sum(played_after(h, moment) is not None for h in run.histories().values()) == 3,
        )
        found = run.actor_processes()
        assert {name.index for name in found} == {name.index for name in lost}
        assert not found.keys() & lost, "an actor took the name of a lost one"
        assert set(found.values()) <= set(nodes.workers(other))
        assert learner in run.processes("LearnerWorker")
        assert run.status()["restarts"] == 3
        run.judge(num_games=50)


@pytest.mark.faults
def test_ten_killed_actors_are_replaced_and_leave_no_part_of_a_game(tmp_path):
    with connected_nodes(4) as nodes, run_in(nodes, tmp_path, *SLOW_CHAIN, *LOOSE, "--actors", 4) as run:
        run.wait("four actors", lambda: run.actors("live") == 4)
        (learner,) = run.processes("LearnerWorker")
        seconds = []
        for number in range(NUM_KILLS):
            victim, process = sorted(run.actor_processes().items())[number % 4]
            steps, moment = run.learner_steps, time.monotonic()
            process.kill()

            def first_game(victim=victim, moment=moment):
                """When its successor offered one."""
                times = [
                    played_after(history, moment)
                    for name, history in run.histories().items()
                    if name.index == victim.index and name.incarnation > victim.incarnation
                ]
                return next(filter(None, times), None)

            seconds.append(run.wait("its successor's first game", first_game) - moment)
            run.wait("learner steps", lambda steps=steps: run.learner_steps > steps)
        assert max(seconds) <= REPLACED_SECONDS, seconds
        assert run.processes("LearnerWorker") == [learner]
        assert run.status()["restarts"] == NUM_KILLS
        run.judge(num_games=50)
        episodes = run.episodes()
        assert {episode.episode_id: found for episode in episodes if (found := faults(episode))} == {}


@pytest.mark.faults
def test_weights_outlive_the_node_of_the_learner(tmp_path):
    # More than what travels with a call's answer; it lies on the learner's node.
    wide = ("--set", "network.hidden_sizes=[128, 128]", "--set", "learner.checkpoint_seconds=5")
    with connected_nodes(2) as nodes:
        node = nodes.add(0, num_gpus=1)
        with run_in(nodes, tmp_path, *SLOW_CHAIN, *LOOSE, *wide, "--actors", 2) as run:
            run.wait("two actors", lambda: run.actors("live") == 2)
            assert set(run.processes("LearnerWorker")) <= set(nodes.workers(node))
            run.wait("a checkpoint", lambda: list((run.path / "checkpoints").glob("step_*/DONE")))
            players = run.actor_processes()
            nodes.lose(node)
            moment = time.monotonic()
            run.wait(
                "games without a learner",
                lambda: all(played_after(h, moment + 3) is not None for h in run.histories().values()),
            )
            assert run.actor_processes() == players
            nodes.add(0, num_gpus=1)
            steps = run.learner_steps
            run.wait("another learner", lambda: run.learner_steps > steps)
            assert run.actor_processes() == players
            run.end()
            assert run.verdict().is_good
            assert all(versions == sorted(versions) for versions in run.versions().values())
