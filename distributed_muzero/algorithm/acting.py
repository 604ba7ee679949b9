"""acting(): one episode with search, the second public function of the contract, and the lockstep that actors use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from distributed_muzero.algorithm.planning import DEFAULT_DISCOUNT, as_array, legal_mask, plan_batch
from distributed_muzero.config import SearchConfig
from distributed_muzero.errors import ContractError, EnvironmentFailure, NonFiniteError
from distributed_muzero.networks.base import as_networks
from distributed_muzero.networks.inference import SearchModel, make_search_model
from distributed_muzero.search.tree import Tree
from distributed_muzero.types import Episode, SearchResult, Step


def acting(
    env: Any,
    h: Callable,
    g_r: Callable,
    g_s: Callable,
    f_v: Callable,
    f_p: Callable,
    *,
    history_length: int = 1,
    search: SearchConfig | None = None,
    discount: float = DEFAULT_DISCOUNT,
    temperature: float = 1.0,
    noise: bool = True,
    rng: np.random.Generator | None = None,
    max_steps: int = 10_000,
) -> list[Step]:
    """Plays one episode and returns its steps (observation [*O], policy [*A], action, reward, value).

    env: initial_state() -> state, step(action) -> (reward, state, is_terminal), mask() -> [*A]; optionally to_play()
    and truncated (decision 10). temperature chooses the action from the visits; π in a step is untempered
    (decision 9). With search.policy "gumbel" the search chooses, and temperature has no say (decision 21).
    rng: absent, a freshly seeded generator. A game longer than `max_steps` is cut there.
    """
    rng = rng if rng is not None else np.random.default_rng()
    model = make_search_model(as_networks(h, g_r, g_s, f_v, f_p))
    game = Game(env, history_length)
    while not game.is_over and len(game.actions) < max_steps:
        act([game], model, search or SearchConfig(), discount, temperature, noise=noise, rng=rng)
    return game.steps()


class Game:
    """An episode while it is played: the environment, the stack of last observations, what was seen and done."""

    def __init__(self, env: Any, history_length: int, seed: int | None = None):
        self.env = env
        self.seed = seed
        state = env.initial_state() if seed is None else env.initial_state(seed)
        self.is_over = False
        self.observations = [self._checked(state)]
        self.mask_shape: tuple[int, ...] = ()
        self.legal_masks: list[np.ndarray] = []
        self.actions: list[int] = []
        self.rewards: list[float] = []
        self.policies: list[np.ndarray] = []
        self.root_values: list[float] = []
        self.players = [self._player()]
        shape = self.observations[0].shape
        # Early observations are padded with zeros, as in training (decision 2).
        self.history = np.zeros((history_length, *shape), self.observations[0].dtype)
        self.history[-1] = self.observations[0]

    def read_mask(self) -> np.ndarray:
        """The legal actions of the current state, flat bool [A]; read anew at every step (decision 7)."""
        mask = as_array(self.env.mask())
        self.mask_shape = mask.shape
        try:
            return legal_mask(mask)
        except ContractError as error:
            raise ContractError(f"{error} (step {len(self.actions)}, seed {self.seed})") from None

    @property
    def alternates(self) -> bool:
        """Whether two players take turns, so that values change sign from one step to the next."""
        num_players = getattr(getattr(self.env, "spec", None), "num_players", None)
        return hasattr(self.env, "to_play") if num_players is None else num_players == 2

    def play(self, legal: np.ndarray, policy: np.ndarray, action: int, value: float) -> None:
        """Plays `action` in the environment and writes down the step."""
        reward, state, is_terminal = self.env.step(action)
        self.legal_masks.append(legal)
        self.policies.append(policy)
        self.actions.append(action)
        self.root_values.append(value)
        self.rewards.append(float(reward))
        if not np.isfinite(self.rewards[-1]):
            raise NonFiniteError(
                f"the environment gave the reward {reward} at step {len(self.actions) - 1}, seed {self.seed}"
            )
        observation = self._checked(state)
        self.observations.append(observation)
        self.history[:-1] = self.history[1:]
        self.history[-1] = observation
        self.is_over = bool(is_terminal)
        self.players.append(self._player())
        if self.alternates and self.players[-1] == self.players[-2]:
            raise EnvironmentFailure(
                f"player {self.players[-1]} is to move again at step {len(self.actions)}, seed {self.seed}: a search "
                "for two needs players who move strictly in turn; let the other one pass. With one "
                "player, say so (spec.num_players 1) or leave out to_play()"
            )

    def move(self, action: int) -> None:
        """Plays `action`, of which nothing is learnt: no search stands behind it, and no policy or value is kept."""
        legal = self.read_mask()
        self.play(legal, np.zeros(len(legal)), action, 0.0)

    def play_opening(self, num_moves: int, rng: np.random.Generator) -> None:
        """Plays random legal moves, and forgets them: the episode begins behind them. It may be over by then."""
        for _ in range(num_moves):
            if not self.is_over:
                self.move(int(rng.choice(np.flatnonzero(self.read_mask()))))
        for made in (self.legal_masks, self.actions, self.rewards, self.policies, self.root_values):
            made.clear()
        del self.observations[:-1], self.players[:-1]
        # As the learner will see it, who knows nothing of what was before.
        self.history[:-1] = 0

    @property
    def truncated(self) -> bool:
        return bool(getattr(self.env, "truncated", False))

    def steps(self) -> list[Step]:
        """The contract's tuples, with tensors."""
        return [
            Step(
                torch.as_tensor(observation),
                torch.from_numpy(policy.reshape(self.mask_shape)),
                action,
                reward,
                value,
            )
            for observation, policy, action, reward, value in zip(
                self.observations, self.policies, self.actions, self.rewards, self.root_values, strict=False
            )
        ]

    def episode(
        self, episode_id: str, environment_id: str, weights_version: int, final_value: float
    ) -> Episode:
        """The finished game. `final_value` is ν_T, used only if the game was truncated."""
        return Episode(
            episode_id=episode_id,
            environment_id=environment_id,
            seed=self.seed or 0,
            weights_version=weights_version,
            observations=np.stack(self.observations),
            legal_masks=np.stack(self.legal_masks),
            actions=np.asarray(self.actions, np.int32),
            rewards=np.asarray(self.rewards, np.float32),
            policies=np.stack(self.policies).astype(np.float32),
            root_values=np.asarray([*self.root_values, final_value if self.truncated else 0.0], np.float32),
            to_play=np.asarray(self.players, np.int8),
            terminated=not self.truncated,
            truncated=self.truncated,
        )

    def _checked(self, state: Any) -> np.ndarray:
        observation = as_array(state).copy()
        if not np.isfinite(observation).all():
            steps = len(getattr(self, "actions", ()))
            raise NonFiniteError(
                f"the environment gave an observation with NaN or Inf at step {steps}, seed {self.seed}"
            )
        return observation

    def _player(self) -> int:
        if self.is_over and self.players:
            return 1 - self.players[-1] if self.alternates else self.players[-1]
        return int(self.env.to_play()) if hasattr(self.env, "to_play") else 0


class Decision(NamedTuple):
    """What a search says of the games that it was asked for, a row each."""

    legal_masks: np.ndarray  # [B, A] bool
    result: SearchResult
    actions: np.ndarray  # [B] to be played
    tree: Tree
    seconds: float  # that the search took


def act(
    games: Sequence[Game],
    model: SearchModel,
    config: SearchConfig,
    discount: float,
    temperature: float,
    *,
    noise: bool,
    rng: np.random.Generator,
    num_simulations: int | None = None,
) -> float:
    """One step of every game, as `decide` says. Returns the seconds that the search took."""
    made = decide(
        games, model, config, discount, temperature, noise=noise, rng=rng, num_simulations=num_simulations
    )
    policies, root_values = made.result.action_weights, made.result.root_values
    for row, game in enumerate(games):
        game.play(made.legal_masks[row], policies[row], int(made.actions[row]), float(root_values[row]))
    return made.seconds


def decide(
    games: Sequence[Game],
    model: SearchModel,
    config: SearchConfig,
    discount: float,
    temperature: float,
    *,
    noise: bool,
    rng: np.random.Generator,
    num_simulations: int | None = None,
) -> Decision:
    """One batched search over all games. Temperature 0 takes the most visited action.

    With the policy "gumbel" the search decides for the action, whatever the temperature (decision 21).
    """
    legal = np.stack([game.read_mask() for game in games])
    observations = np.stack([game.history for game in games])
    signed_discount = -discount if games[0].alternates else discount
    began = time.perf_counter()
    try:
        plan = plan_batch(
            model,
            observations,
            legal,
            config,
            signed_discount,
            rng=rng,
            noise=noise,
            num_simulations=num_simulations,
        )
    except NonFiniteError as error:
        at = ", ".join(f"{row}: {len(game.actions)}, {game.seed}" for row, game in enumerate(games))
        raise NonFiniteError(f"{error} (row: step, seed of its game = {at})") from None
    seconds = time.perf_counter() - began
    actions = plan.actions
    if actions is None:
        actions = choose_actions(plan.result.visit_counts, temperature, rng)
    return Decision(legal, plan.result, actions, plan.tree, seconds)


def choose_actions(visit_counts: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """Draws an action of each row [B, A] with probability ∝ visits^(1/temperature)."""
    if temperature == 0:
        return visit_counts.argmax(1)
    counts = visit_counts / visit_counts.max(1, keepdims=True)
    cumulative = np.cumsum(counts ** (1 / temperature), 1)
    draws = rng.random(len(cumulative)) * cumulative[:, -1]
    return (cumulative <= draws[:, None]).sum(1)
