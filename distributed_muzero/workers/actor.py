"""An actor: B games in lockstep through one batched search."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from distributed_muzero.algorithm.acting import Game, act
from distributed_muzero.checkpoint import Checkpoint
from distributed_muzero.config import Config
from distributed_muzero.environments.base import Environment
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.inference import SearchModel, make_search_model
from distributed_muzero.types import Episode
from distributed_muzero.workers.curriculum import Begun, ResultsInOrder, draw_stage, is_won
from distributed_muzero.workers.environment_pool import EnvironmentPool
from distributed_muzero.workers.outbox import Outbox
from distributed_muzero.workers.run_state import ActorReport

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = (
    0.005,
    0.08,
)  # between two offers to shards that hold the actors back
OPENING_TRIES = 10  # for one that doesn't end its game
FLUSH_EPISODES = 4  # short games are delivered together, as a call costs as much as a step


class PolicyModel:
    """Networks with the last weights that were published, as a model for the search."""

    def __init__(self, networks: Networks):
        self._networks = networks
        self.flat = FlatWeights(networks)
        self.version = -1
        self.search_model: SearchModel | None = None

    def set_weights(self, version: int, weights: np.ndarray) -> None:
        """Takes weights [P] of a newer version; an older or equal one is ignored, so versions never go back."""
        if version > self.version:
            self.load(version, weights)

    def load_checkpoint(self, saved: Checkpoint) -> None:
        """A checkpoint's weights. Raises CheckpointError if they are of other networks."""
        self.load(saved.state["weights_version"], self.flat.vector_of(saved.tensors["weights"]))

    def load(self, version: int, weights: np.ndarray) -> None:
        """Takes these weights, whatever came before."""
        self.flat.write(weights)
        self._networks.eval()
        self.search_model = make_search_model(self._networks)
        self.version = version


class Playing(NamedTuple):
    """A game that goes on, and what it was begun as."""

    game: Game
    begun: Begun


class Actor:
    """Plays and hands over finished episodes. Everything random comes from its seed."""

    def __init__(
        self,
        make_envs: Sequence[Callable[[], Environment]],
        networks: Networks,
        config: Config,
        run_name: str,
        index: int,
        incarnation: int,
    ):
        """make_envs: of each stage of the curriculum; a run without one has one stage."""
        self.config = config
        self.model = PolicyModel(networks)
        self.learner_step = 0
        self._name = f"{run_name}/{index}/{incarnation}"
        self._rng = np.random.default_rng([config.run.seed, index, incarnation])
        self.stage = 0
        num_games = config.actor.envs_per_actor
        self._pool = EnvironmentPool(make_envs, max_idle=num_games)
        self._results = ResultsInOrder(group=num_games)
        self._playing: list[Playing] = []
        self._num_finished = 0
        self.search_seconds = 0.0  # so far

    def set_weights(self, version: int, weights: np.ndarray, learner_step: int) -> None:
        """Newer weights and the learner's step, which the temperature schedule follows."""
        self.model.set_weights(version, weights)
        self.learner_step = max(self.learner_step, learner_step)

    def set_stage(self, stage: int) -> None:
        """The curriculum's present stage, from 0, for games that begin from now on; those that go on are finished."""
        self.stage = stage

    @property
    def temperature(self) -> float:
        steps = [step for step, _ in self.config.actor.temperatures]
        return self.config.actor.temperatures[bisect_right(steps, self.learner_step) - 1][1]

    def step(self) -> list[Episode]:
        """One step of every game; returns the episodes that ended. A finished game's place starts a new one."""
        model = self.model.search_model
        assert model is not None, "set_weights() comes first"
        while len(self._playing) < self.config.actor.envs_per_actor:
            self._playing.append(self._start())
        self.search_seconds += act(
            [playing.game for playing in self._playing],
            model,
            self.config.search,
            self.config.algorithm.discount,
            self.temperature,
            noise=True,
            rng=self._rng,
        )
        finished = []
        for place, playing in enumerate(self._playing):
            if playing.game.is_over:
                finished.append(self._finish(playing, model))
                self._playing[place] = self._start()
        return finished

    def play(
        self,
        outbox: Outbox,
        is_over: Callable[[], bool],
        sleep: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> ActorReport:
        """Steps and delivers until `is_over()`. While the shards hold it back, it waits instead of playing."""
        report = ActorReport(weights_version=self.model.version)
        start, searched = clock(), self.search_seconds
        num_games, num_simulations = self.config.actor.envs_per_actor, self.config.search.num_simulations
        wait_seconds = FIRST_WAIT_SECONDS

        def deliver() -> None:
            waits_since, was_blocked = clock(), outbox.is_blocked
            outbox.flush(report)
            # An answer that takes its time is no waiting for the learner: more actors would hide it.
            if was_blocked or outbox.is_blocked:
                report.waited_seconds += clock() - waits_since

        while not is_over():
            if outbox.is_blocked:
                waits_since = clock()
                sleep(wait_seconds)
                report.waited_seconds += clock() - waits_since
                wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
                deliver()
                continue
            wait_seconds = FIRST_WAIT_SECONDS
            for episode in self.step():
                report.returns.append(episode.episode_return)
                report.lengths.append(episode.num_steps)
                outbox.put(episode)
            report.results += self._results.take()
            report.env_steps += num_games
            report.simulations += num_games * num_simulations
            if len(outbox) >= FLUSH_EPISODES:
                deliver()
        if not outbox.is_blocked:
            # Else it has just asked in vain, and a shard that hangs would take as long to give no answer once more.
            deliver()
        report.seconds = clock() - start
        report.search_seconds = self.search_seconds - searched
        report.unacknowledged = len(outbox)
        return report

    def close(self) -> None:
        self._pool.close()

    def _start(self) -> Playing:
        stage = draw_stage(self.stage, self.config.curriculum.share_of_earlier, self._rng)
        env = self._pool.take(stage)
        return Playing(self._start_game(env), self._results.begin(stage))

    def _start_game(self, env: Environment) -> Game:
        seed = int(self._rng.integers(2**31))
        history_length, longest = self.config.environment.history_length, self.config.actor.opening_plies
        if longest:
            num_moves = int(self._rng.integers(longest + 1))
            for _ in range(OPENING_TRIES):
                game = Game(env, history_length, seed)
                game.play_opening(num_moves, self._rng)
                if not game.is_over:
                    return game
        return Game(env, history_length, seed)

    def _finish(self, playing: Playing, model: SearchModel) -> Episode:
        game, begun = playing
        # A time limit is no ending: the final observation is worth what the network says (decision 3).
        final_value = float(model.initial(game.history[None], 1)[0][0]) if game.truncated else 0.0
        self._num_finished += 1
        environment_id = self.config.stages[begun.stage].id
        episode = game.episode(
            f"{self._name}/{self._num_finished}", environment_id, self.model.version, final_value
        )
        begun.won = is_won(game.env, episode.episode_return, self.config.curriculum.won_at_return)
        self._pool.give_back(begun.stage, game.env)
        return episode
