"""How fast mathy's environments, the network and an actor go, in CPU seconds of one thread.

    python benchmarks/mathy_speed.py --games poly-easy poly-normal poly-hard

For each game, a line of JSON: steps a second of the environment under random moves, and of plain mathy; inferences a
second (rows) of a network that has learnt nothing, first and recurrent; moves a second of an actor with 32 games in
lockstep and 25 simulations, with their environments' steps; and milliseconds of a learner step of 64 rows that are
unrolled three times. Medians of `--turns` turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

# Before any library reads them.
os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1"))

import numpy as np
from mathy_envs.time_step import is_terminal_transition

from distributed_muzero.algorithm.acting import Game, act
from distributed_muzero.config import Config, load_preset, make_config
from distributed_muzero.environments.mathy_games import make_rules, read_name, read_options
from distributed_muzero.networks.inference import make_search_model
from distributed_muzero.types import Batch
from distributed_muzero.workers.builder import Builder

GAMES, ROWS = 32, 64
SHORTEST_SECONDS = 0.3  # of a measurement


def rate(turn: Callable[[], int], turns: int) -> float:
    """Median of what `turn` does a CPU second; the first turn, which compiles, doesn't count."""
    turn()
    rates = []
    for _ in range(turns):
        began, count = time.process_time(), 0
        while time.process_time() - began < SHORTEST_SECONDS:
            count += turn()
        rates.append(count / (time.process_time() - began))
    return statistics.median(rates)


def measure(game: str, turns: int) -> dict[str, object]:
    environment = {"environment": {"id": f"mathy:{game}", "kwargs": {}}}
    config = make_config(load_preset("mathy-poly-easy"), environment)
    builder = Builder(config, "speed")
    rng = np.random.default_rng(0)
    games = [Game(builder.environment(), 1, seed) for seed in range(GAMES)]
    networks = builder.networks().eval()
    model = make_search_model(networks)
    first = np.stack([game.history for game in games])
    actions = np.array([np.flatnonzero(game.env.mask())[0] for game in games], np.int32)
    nodes = np.zeros(GAMES, np.int32)

    def first_inference() -> int:
        model.initial(first, 2)
        return GAMES

    def recurrent_inference() -> int:
        model.expand(nodes, actions, nodes + 1)
        return GAMES

    def play() -> int:
        playing = [Game(game.env, 1, int(rng.integers(2**31))) for game in games]
        began = time.process_time()
        act(playing, model, config.search, 0.99, 1.0, noise=True, rng=rng)
        elapsed.append(time.process_time() - began)
        return GAMES

    elapsed: list[float] = []
    rows = {
        "environment": rate(lambda: play_random(builder, rng), turns),
        "plain_mathy": rate(lambda: play_plain(config, rng), turns),
        "first_inference": rate(first_inference, turns),
        "recurrent_inference": rate(recurrent_inference, turns),
    }
    play()
    elapsed.clear()
    for _ in range(turns):
        play()
    rows["actor_moves"] = GAMES / statistics.median(elapsed)
    learner = builder.learner()
    batch = make_batch(config, builder, first, actions)
    learner_steps = rate(lambda: len([learner.step(batch)]), turns)
    return {
        "game": game,
        "nodes": float(np.mean((first[:, 0, :, 0] != 0).sum(axis=1))),
        **{f"{name}_per_second": round(value) for name, value in rows.items()},
        "learner_step_ms": round(1000 / learner_steps),
    }


def play_random(builder: Builder, rng: np.random.Generator) -> int:
    env, steps, is_over = builder.environment(), 0, False
    env.initial_state(int(rng.integers(2**31)))
    while not is_over:
        steps += 1
        _, _, is_over = env.step(int(rng.choice(np.flatnonzero(env.mask()))))
    return steps


def play_plain(config: Config, rng: np.random.Generator) -> int:
    """As above, with mathy_envs alone: its masks, moves and observations, its caches."""
    topic, arguments = read_name(config.environment.id)
    mathy = make_rules(topic, read_options(config.environment, topic))
    state, _ = mathy.get_initial_state(arguments)
    mathy.state_to_observation(state)
    steps, is_over = 0, False
    while not is_over:
        moves = np.argwhere(np.array(mathy.get_valid_moves(state), bool))
        if not len(moves):
            break
        rule, token = moves[rng.integers(len(moves))]
        state, change, _ = mathy.get_next_state(state, (int(rule), int(token)))
        mathy.state_to_observation(state)
        steps, is_over = steps + 1, is_terminal_transition(change)
    return steps


def make_batch(config: Config, builder: Builder, first: np.ndarray, actions: np.ndarray) -> Batch:
    times = config.algorithm.num_unroll_steps + 1
    index = np.arange(ROWS) % GAMES
    policies = np.zeros((ROWS, times, builder.spec.num_actions), np.float32)
    policies[np.arange(ROWS), :, actions[index]] = 1
    zeros = np.zeros((ROWS, times), np.float32)
    return Batch(
        first[index],
        policies,
        np.repeat(actions[index][:, None], times, axis=1),
        zeros,
        zeros,
        np.ones(ROWS, np.float32),
        np.zeros((ROWS, 2), np.int64),
        np.zeros(ROWS, np.int64),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--games", nargs="+", default=["poly-easy", "poly-normal", "poly-hard"])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    for game in arguments.games:
        print(json.dumps(measure(game, arguments.turns)), flush=True)


if __name__ == "__main__":
    main()
