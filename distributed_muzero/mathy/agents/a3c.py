"""Advantage actor-critic (Mnih et al., 2016): actors play a few steps with the newest weights and return a gradient.

    L = −log π(aₜ|sₜ) · (Rₜ − V(sₜ)) + ½ c (Rₜ − V(sₜ))² − β H(π(·|sₜ)),   Rₜ = Σ_{k<m} γᵏ u_{t+k} + γᵐ V(s_{t+m})

where the steps of an actor end after m, and V = 0 where an episode ends before. Actors are processes of Ray, or one
plays in this process; who plays where makes no difference to what is computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from distributed_muzero.config import Fraction, Positive
from distributed_muzero.errors import CheckpointError, NonFiniteError
from distributed_muzero.mathy.agents.base_config import BaseConfig
from distributed_muzero.mathy.agents.games import Episode, batch_of, num_threads, read_now
from distributed_muzero.mathy.agents.policy_value_model import PolicyValueModel, get_or_create_policy_model
from distributed_muzero.mathy.envs import TOPICS
from distributed_muzero.mathy.state import MathyObservation

RECENT = 200  # episodes that `TrainingResult` speaks of

logger = logging.getLogger(__name__)


class A3CConfig(BaseConfig):
    max_eps: Positive = 2000  # episodes of the model's whole training, earlier launches included
    max_seconds: Annotated[float, Field(gt=0)] | None = None  # of this launch
    num_workers: Annotated[int, Field(ge=0)] = 0  # processes of Ray; 0: one actor plays in this process
    episodes_per_worker: Positive = 16  # that an actor plays side by side
    update_gradients_every: Positive = 8  # m, steps of each episode for one gradient
    gamma: Fraction = 0.99
    entropy_loss_scaling: Annotated[float, Field(ge=0)] = 0.01  # β
    value_loss_scaling: Annotated[float, Field(ge=0)] = 0.5  # c
    gradient_clip_norm: Annotated[float, Field(gt=0)] = 1.0
    max_nodes: Positive = 128  # an expression that grows beyond loses its episode
    save_every: Positive = 200  # updates
    timeout_seconds: Annotated[float, Field(ge=10)] = (
        60.0  # an actor that gives no gradient for so long is lost
    )
    max_lost_actors: Annotated[int, Field(ge=0)] = 3  # they are replaced; one more ends the training
    num_threads: Positive = 1  # of torch, in each process
    print_training: bool = False  # a line for each save


class Finished(NamedTuple):
    won: bool
    total_reward: float


class Contribution(NamedTuple):
    """What an actor made of its steps."""

    gradient: np.ndarray  # [P] float32, of the mean loss of a step
    num_steps: int
    finished: list[Finished]


class TrainingResult(NamedTuple):
    """Totals of the model's whole training; shares of this launch's last RECENT episodes, played with sampled
    actions (NaN without any)."""

    episodes: int
    steps: int
    updates: int
    won: float
    mean_return: float


class Actor:
    """Plays episodes with sampled actions, and learns from them in batches of a few steps."""

    def __init__(self, args: A3CConfig, predictions: int, index: int = 0, start: int = 0, num_lost: int = 0):
        """start: updates that the training had made when it was launched.   num_lost: actors lost since then.

        An actor that begins later plays other problems by them: one that made an actor hang doesn't come back.
        """
        self.args = args
        self.model = PolicyValueModel(args, predictions)
        self.rng = np.random.default_rng([args.seed, index, start, num_lost])
        self.generator = torch.Generator().manual_seed(int(self.rng.integers(2**63)))
        self._num_started = 0
        self.episodes = [self._new_episode() for _ in range(args.episodes_per_worker)]

    def contribute(self, weights: np.ndarray) -> Contribution:
        """A gradient of the weights [P], from the next steps of each episode."""
        with num_threads(self.args.num_threads):
            vector_to_parameters(torch.from_numpy(weights.copy()), self.model.parameters())
            segments, finished = self._play()
            self.model.zero_grad()
            loss = self._loss(segments)
            loss.backward()
        gradient = torch.cat([_gradient(parameter).flatten() for parameter in self.model.parameters()])
        return Contribution(gradient.numpy(), sum(len(segment.actions) for segment in segments), finished)

    def _play(self) -> tuple[list[Segment], list[Finished]]:
        ended: list[Segment] = []
        finished: list[Finished] = []
        open_segments = [Segment() for _ in self.episodes]
        for _ in range(self.args.update_gradients_every):
            outputs = read_now(self.model, self.episodes)
            probabilities = torch.softmax(outputs.masked_logits[:, 0], -1)
            actions = torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1).tolist()
            states_h, states_c = outputs.rnn_state_h[:, 0].tolist(), outputs.rnn_state_c.tolist()
            for slot, episode in enumerate(self.episodes):
                segment = open_segments[slot]
                segment.observations.append(episode.observation)
                segment.actions.append(actions[slot])
                segment.rewards.append(episode.play(actions[slot], states_h[slot], states_c[slot]))
                if episode.is_over:
                    finished.append(Finished(episode.won, episode.total_reward))
                    ended.append(segment)
                    open_segments[slot] = Segment()
                    self.episodes[slot] = self._new_episode()
        last_values = read_now(self.model, self.episodes).values[:, 0].tolist()
        for segment, value in zip(open_segments, last_values, strict=True):
            segment.next_value = value
        return ended + [segment for segment in open_segments if segment.actions], finished

    def _loss(self, segments: Sequence[Segment]) -> Tensor:
        """Mean over all steps. A segment is a window, which begins with the recurrent state that it was played with."""
        outputs = self.model.read(batch_of(segment.observations for segment in segments))
        there = _rows([[1.0] * len(segment.actions) for segment in segments])
        actions = _rows([segment.actions for segment in segments]).long()
        returns = _rows([segment.returns(self.args.gamma) for segment in segments])
        log_policy = torch.log_softmax(outputs.masked_logits, -1)
        taken = log_policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        advantages = returns - outputs.values
        entropy = -(log_policy.exp() * log_policy).sum(-1)
        losses = (
            -taken * advantages.detach()
            + 0.5 * self.args.value_loss_scaling * advantages.square()
            - self.args.entropy_loss_scaling * entropy
        )
        return (losses * there).sum() / there.sum()

    def _new_episode(self) -> Episode:
        """Of the topics in turn."""
        topic = self.args.topics[self._num_started % len(self.args.topics)]
        self._num_started += 1
        env = TOPICS[topic](max_nodes=self.args.max_nodes)
        return Episode(env, self.args.rnn_size, self.args.difficulty, int(self.rng.integers(2**31)))


class Segment:
    """Steps of one episode, one after the other."""

    def __init__(self) -> None:
        self.observations: list[MathyObservation] = []
        self.actions: list[int] = []
        self.rewards: list[float] = []
        self.next_value = 0.0  # of what follows the last step; 0 where the episode is over

    def returns(self, gamma: float) -> list[float]:
        """Rₜ of each step."""
        following, found = self.next_value, []
        for reward in reversed(self.rewards):
            following = reward + gamma * following
            found.append(following)
        return found[::-1]


class A3CAgent:
    """Trains the model of args.model_dir, and goes on with one that is there."""

    def __init__(self, args: A3CConfig):
        self.args = args
        self.predictions = TOPICS[args.topics[0]]().action_size  # all have mathy's core rules
        self.model = get_or_create_policy_model(args, self.predictions, is_main=True)
        self._recent: list[Finished] = []

    def train(self, stop_requested: Callable[[], bool] = lambda: False) -> TrainingResult:
        """Until max_eps, max_seconds or a requested stop; the model is saved every so often and at the end.

        Raises ClusterError where actors are lost too often, EnvironmentFailure where mathy fails in a game,
        CheckpointError where the model can't be saved, and NonFiniteError for a gradient that isn't finite. After the
        last two, what was saved last stays; else the model is saved first.
        """
        deadline = time.monotonic() + self.args.max_seconds if self.args.max_seconds else None
        if self._is_enough(deadline, stop_requested):
            return self.result()
        try:
            with num_threads(self.args.num_threads):
                for contribution in self._contributions():
                    self._update(contribution)
                    if self._is_enough(deadline, stop_requested):
                        break
                    if self.model.counts["updates"] % self.args.save_every == 0:
                        self._save()
        except (NonFiniteError, CheckpointError):
            raise
        except Exception:  # of actors: what was learnt from them before is sound
            self._save()
            raise
        self._save()
        return self.result()

    def result(self) -> TrainingResult:
        counts, recent = self.model.counts, self._recent
        return TrainingResult(
            counts["episodes"],
            counts["steps"],
            counts["updates"],
            float(np.mean([episode.won for episode in recent])) if recent else float("nan"),
            float(np.mean([episode.total_reward for episode in recent])) if recent else float("nan"),
        )

    def _contributions(self) -> Iterator[Contribution]:
        """Without end; each computed from the weights as they are when its actor is asked."""
        make = partial(Actor, self.args, self.predictions, start=self.model.counts["updates"])
        if self.args.num_workers == 0:
            actor = make(index=0)
            while True:
                yield actor.contribute(self._weights())
        # Ray is loaded only where its processes are wanted.
        from distributed_muzero.cluster.a3c import contributions

        yield from contributions(
            [partial(make, index=index) for index in range(self.args.num_workers)],
            self._weights,
            self.args.timeout_seconds,
            self.args.max_lost_actors,
        )

    def _weights(self) -> np.ndarray:
        return parameters_to_vector(self.model.parameters()).detach().numpy()

    def _update(self, contribution: Contribution) -> None:
        gradient = torch.from_numpy(contribution.gradient.copy())
        norm = float(gradient.norm())
        if not np.isfinite(norm):
            raise NonFiniteError(
                f"a gradient of norm {norm} came after {self.model.counts['updates']} updates; go on from the saved "
                "model with a smaller learning_rate"
            )
        gradient *= min(1.0, self.args.gradient_clip_norm / max(norm, 1e-12))
        start = 0
        for parameter in self.model.parameters():
            parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        self.model.optimizer.step()
        counts = self.model.counts
        counts["updates"] += 1
        counts["steps"] += contribution.num_steps
        counts["episodes"] += len(contribution.finished)
        self._recent = [*self._recent, *contribution.finished][-RECENT:]

    def _is_enough(self, deadline: float | None, stop_requested: Callable[[], bool]) -> bool:
        late = deadline is not None and time.monotonic() > deadline
        return late or stop_requested() or self.model.counts["episodes"] >= self.args.max_eps

    def _save(self) -> None:
        self.model.save()
        if self.args.print_training:
            result = self.result()
            print(
                f"{result.episodes} episodes, {result.steps} steps: won {result.won:.0%}, "
                f"mean return {result.mean_return:.2f}",
                flush=True,
            )


def _rows(rows: Sequence[Sequence[Any]]) -> Tensor:
    """Rows of any lengths as one tensor, zeros behind the shorter ones."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.float32)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
