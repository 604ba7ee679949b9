"""How good a learnt model is along real games (docs/diagnose.md): played for it, or stored by its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distributed_muzero.algorithm.returns import n_step_returns, signed_discount
from distributed_muzero.algorithm.targets import Columns
from distributed_muzero.checkpoint import Checkpoint
from distributed_muzero.config import Config
from distributed_muzero.environments.base import Environment
from distributed_muzero.errors import NonFiniteError, RunError
from distributed_muzero.networks.base import Networks
from distributed_muzero.networks.inference import SearchModel, make_search_model
from distributed_muzero.types import Episode
from distributed_muzero.workers.actor import PolicyModel
from distributed_muzero.workers.diagnosis_of_model import (
    Errors,
    Trajectories,
    at_depth,
    batch_at,
    make_columns,
    name_of,
    unrolled_errors,
)
from distributed_muzero.workers.diagnosis_of_search import (
    Roots,
    against_prior,
    concatenate,
    search_roots,
    summarize_depths,
)
from distributed_muzero.workers.evaluator import play_greedily

BATCH_SIZE = 128  # positions in one search, or unrolled at once
NUM_BINS = 10


def load_weights(networks: Networks, saved: Checkpoint) -> None:
    """Gives networks a checkpoint's weights, to be asked only. Raises CheckpointError if they are of others."""
    PolicyModel(networks).load_checkpoint(saved)


def play(
    make_env: Callable[[], Environment],
    networks: Networks,
    config: Config,
    num_episodes: int,
    seeds: Sequence[int],
    num_simulations: int | None = None,
) -> list[Episode]:
    """Greedy games without noise, the very ones that an Evaluator plays with these seeds."""
    environments: list[Environment] = []
    try:
        while len(environments) < num_episodes:
            environments.append(make_env())
        games = play_greedily(environments, make_search_model(networks), config, seeds, num_simulations)
        return [game.episode(f"game {i}", config.environment.id, 0, 0.0) for i, game in enumerate(games)]
    finally:
        for env in environments:
            env.close()


def diagnose(
    networks: Networks,
    episodes: Sequence[Episode],
    config: Config,
    num_players: int,
    *,
    num_unroll_steps: int | None = None,
    num_simulations: int | None = None,
) -> dict[str, Any]:
    """What the networks get wrong in these games, as plain values; docs/diagnose.md says what each number is.

    Policies and values that the episodes carry are not read: every position is searched anew, with these networks.
    num_unroll_steps, num_simulations: in place of the config's. Depths that no game is long enough for are left out.
    Raises RunError without a game, NonFiniteError for NaN or Inf from the networks.
    """
    if not episodes:
        raise RunError("there is no game to diagnose the model with; expected one at least")
    num_simulations = num_simulations or config.search.num_simulations
    most = config.algorithm.num_unroll_steps if num_unroll_steps is None else num_unroll_steps
    depth = min(most, max(episode.num_steps for episode in episodes))
    history_length = config.environment.history_length

    model = make_search_model(networks)
    columns = make_columns(episodes)
    steps = np.flatnonzero(np.arange(len(columns.actions)) < columns.last_rows)
    roots = _search(model, columns, steps, config, num_players, num_simulations)
    trajectories = _trajectories(episodes, columns, steps, roots, model, config)
    errors = [unrolled_errors(networks, trajectories, rows, history_length, depth) for rows in _parts(steps)]
    of_all = Errors(*(np.concatenate(arrays) for arrays in zip(*errors, strict=True)))
    returns = trajectories.columns.returns[steps]
    return {
        "games": len(episodes),
        "distinct_games": len(
            {episode.actions.tobytes() + episode.observations.tobytes() for episode in episodes}
        ),
        "truncated_games": sum(episode.truncated for episode in episodes),
        "positions": len(steps),
        "players": num_players,
        "simulations": num_simulations,
        "discount": config.algorithm.discount,
        "trained_depth": config.algorithm.num_unroll_steps,
        "return_std": float(returns.std(dtype=np.float64)),
        "reward_std": float(columns.rewards[steps].std(dtype=np.float64)),
        "depths": [at_depth(of_all, k) for k in range(depth + 1)],
        "root": against_prior(roots, columns.legal_masks[steps]),
        "calibration": {
            "network": calibration(roots.network_values, returns),
            "search": calibration(roots.search_values, returns),
        },
        "search": summarize_depths(roots.depths),
    }


def calibration(predicted: np.ndarray, returned: np.ndarray, num_bins: int = NUM_BINS) -> dict[str, Any]:
    """Predicted values [S] in bins of equal width against the mean of what was returned [S]; empty bins are left out.

    `error` is the expected calibration error  Σ_b n_b / S · |mean predicted − mean returned|.
    """
    predicted, returned = predicted.astype(np.float64), returned.astype(np.float64)
    edges = np.linspace(predicted.min(), predicted.max(), num_bins + 1)
    places = np.clip(np.searchsorted(edges, predicted, "right") - 1, 0, num_bins - 1)
    bins = []
    for place in np.unique(places):
        inside = places == place
        bins.append(
            {
                "low": float(edges[place]),
                "high": float(edges[place + 1]),
                "predicted": float(predicted[inside].mean()),
                "returned": float(returned[inside].mean()),
                "count": int(inside.sum()),
            }
        )
    gaps = [one["count"] * abs(one["predicted"] - one["returned"]) for one in bins]
    return {"error": sum(gaps) / len(predicted), "bins": bins}


def _search(
    model: SearchModel,
    columns: Columns,
    steps: np.ndarray,
    config: Config,
    num_players: int,
    num_simulations: int,
) -> Roots:
    """Of all `steps`, in their order."""
    discount = signed_discount(config.algorithm.discount, num_players)
    found = []
    for rows in _parts(steps):
        observations = batch_at(columns, rows, config.environment.history_length).observations
        masks = columns.legal_masks[rows]
        try:
            found.append(search_roots(model, observations, masks, config.search, discount, num_simulations))
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} (row 0 is {name_of(columns, rows[0])})") from None
    return concatenate(found)


def _trajectories(
    episodes: Sequence[Episode],
    columns: Columns,
    steps: np.ndarray,
    roots: Roots,
    model: SearchModel,
    config: Config,
) -> Trajectories:
    """Adds what the search and the rest of the games say."""
    policies, search_values = columns.policies.copy(), np.zeros(len(columns.actions))
    policies[steps] = roots.policies
    search_values[steps] = roots.search_values
    truncated = np.array([episode.truncated for episode in episodes])
    final_rows = np.unique(columns.last_rows)
    # A time limit is no ending: the final observation is worth what the network says (decision 3).
    for rows in _parts(final_rows[truncated]):
        observations = batch_at(columns, rows, config.environment.history_length).observations
        search_values[rows], _ = model.initial(observations, 1)
    returns = [
        n_step_returns(
            episode.rewards,
            np.append(np.zeros(episode.num_steps), final_value),
            config.algorithm.discount,
            episode.num_steps,
            episode.to_play,
        )
        for episode, final_value in zip(episodes, search_values[final_rows], strict=True)
    ]
    return Trajectories(
        columns._replace(policies=policies, returns=np.concatenate(returns)),
        search_values,
        columns.last_rows - truncated[columns.episode_keys],
    )


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
