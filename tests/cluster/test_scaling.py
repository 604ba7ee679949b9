"""A run that grows and shrinks while it plays and learns (P16), on nodes that come and go."""

from __future__ import annotations

import pytest

from tests.cluster.nodes import CHAIN, SLOW_CHAIN, connected_nodes, run_in, unanswered

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.long
def test_it_grows_to_eight_as_nodes_come_and_shrinks_to_two_without_losing_a_game(tmp_path):
    with connected_nodes(3) as nodes, run_in(nodes, tmp_path, *CHAIN, "--actors", 1) as run:
        run.ask(num_actors=8)
        run.wait("all that find room", lambda: run.actors("live") == 3)
        assert (run.actors("desired"), run.actors("pending")) == (8, 5)
        steps = run.learner_steps
        run.wait("learner steps meanwhile", lambda: run.learner_steps > steps + 20)

        nodes.add(5)
        run.wait("eight actors", lambda: run.actors("live") == 8)
        assert run.actors("pending") == 0
        run.wait(
            "a learner that is busy and actors that wait", lambda: run.status()["actors_waiting"] > 0.2, 30
        )
        waiting = {name for name, history in run.histories().items() if unanswered(history)}
        assert any(name.index >= 2 for name in waiting), "no dismissed actor holds a finished game: no test"

        run.ask(num_actors=2)
        run.wait("two actors", lambda: (run.actors("desired"), run.actors("draining")) == (2, 0))
        dismissed = {name: history for name, history in run.histories().items() if name.index >= 2}
        assert len(dismissed) == 6
        assert not any(unanswered(history) for history in dismissed.values())
        assert run.status()["undelivered_episodes"] == 0
        assert run.status()["restarts"] == 0

        steps = run.learner_steps
        run.wait("learner steps afterwards", lambda: run.learner_steps > steps + 20)
        assert {name.index for name in run.actor_processes()} == {0, 1}
        run.judge(num_games=50)


@pytest.mark.long
def test_it_chooses_more_actors_where_the_learner_starves(tmp_path):
    starving = ("--set", "replay.samples_per_insert=2", "--set", "actor.autoscale=[1, 6]", "--actors", 1)
    with connected_nodes(6) as nodes, run_in(nodes, tmp_path, *SLOW_CHAIN, *starving) as run:
        run.wait("more actors", lambda: run.actors("live") > 1, 100)
        assert run.actors("desired") <= 6
        assert run.status()["restarts"] == 0
