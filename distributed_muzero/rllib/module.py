"""A run's networks as a module of RLlib's, with its search or without: `RLModule.from_checkpoint(folder)`.

R rows: B observations; B sequences of T observations where the run stacks them, which makes the module stateful.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor

from distributed_muzero.algorithm.planning import Plan, plan_batch
from distributed_muzero.algorithm.returns import signed_discount
from distributed_muzero.environments.gymnasium import code_observations
from distributed_muzero.errors import ConfigError, ContractError
from distributed_muzero.networks.inference import SearchModel, make_search_model
from distributed_muzero.replay.recorded_pieces import MASK, key_beside_mask
from distributed_muzero.rllib.masks import masked_key
from distributed_muzero.rllib.module_files import SETTINGS, ModuleFiles
from distributed_muzero.rllib.module_settings import ModuleSettings

HISTORY = "history"  # in a stateful module's state: the last N - 1 observations
FORBIDDEN = torch.finfo(torch.float32).min  # as a logit: -inf would make an entropy NaN


class Seen(NamedTuple):
    """What a batch shows."""

    histories: Tensor  # [R, N, *O]
    legal: Tensor | None  # [R, A] bool; None: all
    lead: tuple[int, ...]  # (B,) or (B, T)
    state: dict[str, Any]  # columns to hand on


class MuZeroModule(ModuleFiles, TorchRLModule, ValueFunctionAPI):
    """The policy of a run's checkpoint, by the prior alone or by a search with `num_simulations`.

    Observations are those of the run's environment, discrete ones as numbers or one-hot, or such a one beside its
    mask (`rllib.masks`); actions are flat, Discrete(A). With a search, inference plays what `evaluate` plays, and
    exploration draws from the search's policy, without noise at the root. Training gives the
    prior and, by `compute_values`, the value: an algorithm of RLlib's can go on from there, and the model behind the
    search isn't trained then.
    """

    def setup(self) -> None:
        """Raises ConfigError for spaces that aren't the run's."""
        given = self.model_config.get(SETTINGS) if isinstance(self.model_config, dict) else None
        if given is None:
            raise ConfigError(
                f"model_config has no {SETTINGS!r}; the spec of an exported module is made by "
                "distributed_muzero.rllib.export.rl_module_spec(FOLDER)"
            )
        self.settings = ModuleSettings.from_dict(given)
        self.networks = self.settings.make_networks()
        self._search_model: SearchModel | None = None
        self._encode = self._encoding()
        expected: spaces.Discrete = spaces.Discrete(self.settings.spec.num_actions)
        if self.action_space not in (None, expected):
            raise ConfigError(
                f"{self.settings.spec.id} is played with flat actions, {expected}, and the environment here has "
                f"{self.action_space}; wrap it so that they fit"
            )

    def get_initial_state(self) -> dict[str, Any]:
        """Zeros, as before a game's first observation (contract, decision 2); nothing where none are stacked."""
        spec, num_past = self.settings.spec, self.settings.history_length - 1
        zeros = np.zeros((num_past, *spec.observation_shape), spec.observation_dtype)
        return {HISTORY: zeros} if num_past else {}

    @torch.no_grad()
    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        seen = self._see(batch)
        if not self.settings.num_simulations:
            return self._answer(seen, self._prior(seen)[1])
        plan = self._plan(seen)
        chosen = plan.result.visit_counts.argmax(1) if plan.actions is None else plan.actions
        actions = torch.as_tensor(chosen, dtype=torch.long).reshape(seen.lead)
        return {**self._answer(seen, _logarithm(plan)), Columns.ACTIONS: actions}

    @torch.no_grad()
    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        seen = self._see(batch)
        logits = _logarithm(self._plan(seen)) if self.settings.num_simulations else self._prior(seen)[1]
        return self._answer(seen, logits)

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        self._search_model = None  # the weights are about to change
        seen = self._see(batch)
        embeddings, logits = self._prior(seen)
        return {**self._answer(seen, logits), Columns.EMBEDDINGS: embeddings.unflatten(0, seen.lead)}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """[B], or [B, T] where the module is stateful."""
        if embeddings is None:
            seen = self._see(batch)
            return self.networks.value(self.networks.representation(seen.histories)).reshape(seen.lead)
        lead = embeddings.shape[: 2 if self.is_stateful() else 1]
        return self.networks.value(embeddings.reshape(-1, *embeddings.shape[len(lead) :])).reshape(lead)

    def train(self, mode: bool = True) -> Self:
        """The networks' own statistics, as those of observations, stay as the run left them."""
        super().train(mode)
        self.networks.eval()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._search_model = None
        return super().load_state_dict(*args, **kwargs)

    # What a batch shows ---------------------------------------------------------------------------------------

    def _see(self, batch: dict[str, Any]) -> Seen:
        """Raises ContractError for observations of another shape than the run's."""
        shown, legal = batch[Columns.OBS], None
        if isinstance(shown, dict):
            if (key := key_beside_mask(shown)) is None:
                raise ContractError(
                    f"observations came as a Dict of {sorted(shown)}; expected {MASK} and one more"
                )
            shown, legal = shown[key], shown[MASK] != 0
            legal = legal.reshape(-1, self.settings.spec.num_actions)
        observations = torch.as_tensor(shown) if self._encode is None else self._encode(shown)
        shape = self.settings.spec.observation_shape
        num_lead = 2 if self.is_stateful() else 1
        if observations.shape[num_lead:] != shape:
            raise ContractError(
                f"observations came as {tuple(observations.shape)}; expected "
                f"{'[B, T]' if num_lead == 2 else '[B]'} and {shape} of {self.settings.spec.id}"
            )
        lead = tuple(observations.shape[:num_lead])
        if not self.is_stateful():
            return Seen(observations.unsqueeze(1), legal, lead, {})
        length = self.settings.history_length
        past = torch.as_tensor(batch[Columns.STATE_IN][HISTORY]).to(observations)
        joined = torch.cat([past, observations], 1)  # [B, N - 1 + T, *O]
        histories = joined.unfold(1, length, 1).movedim(-1, 2).flatten(0, 1)
        return Seen(histories, legal, lead, {Columns.STATE_OUT: {HISTORY: joined[:, 1 - length :]}})

    def _encoding(self) -> Callable[[Any], Tensor] | None:
        """From numbers of discrete observations to one-hots, for [B, …] or [B, T, …]; None: they come as arrays."""
        space = self.observation_space
        if key := masked_key(space):
            space = space[key]
        spec = self.settings.spec
        if space is None or space.shape == spec.observation_shape:
            return None
        coding = code_observations(space, spec.id)
        if coding.shape != spec.observation_shape:
            raise ConfigError(
                f"the module was trained on observations {spec.observation_shape} of {spec.id}, and the environment "
                f"here has {space}; use it in an environment that is shaped alike"
            )

        def encode(shown: Any) -> Tensor:
            rows = shown.reshape(-1, *space.shape)
            coded = np.stack([coding.encode(row) for row in rows.cpu().numpy()])
            lead = shown.shape[: shown.ndim - len(space.shape)]
            return torch.from_numpy(coded).to(rows.device).unflatten(0, lead)

        return encode

    # What the networks and the search say of it ---------------------------------------------------------------

    def _prior(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Embeddings [R, *E] and logits [R, A]."""
        embeddings = self.networks.representation(seen.histories)
        logits = self.networks.policy(embeddings)
        return embeddings, logits if seen.legal is None else logits.masked_fill(~seen.legal, FORBIDDEN)

    def _plan(self, seen: Seen) -> Plan:
        if self._search_model is None:
            self._search_model = make_search_model(self.networks)
        histories = seen.histories.cpu().numpy()
        shape = len(histories), self.settings.spec.num_actions
        legal = np.ones(shape, bool) if seen.legal is None else seen.legal.cpu().numpy()
        return plan_batch(
            self._search_model,
            histories,
            legal,
            self.settings.search,
            signed_discount(self.settings.discount, self.settings.spec.num_players),
            rng=None,
            noise=False,
            num_simulations=self.settings.num_simulations,
        )

    def _answer(self, seen: Seen, logits: Tensor) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: logits.unflatten(0, seen.lead), **seen.state}


def _logarithm(plan: Plan) -> Tensor:
    """Of the search's policy [R, A], as logits."""
    return torch.from_numpy(plan.result.action_weights).float().log().clamp(min=FORBIDDEN)
