"""What takes an environment of its own to see, or two. Each function makes them, plays up to `steps`, and returns what
it saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np

from distributed_muzero.environments.base import Environment
from distributed_muzero.environments.checks_of_games import NO_STEP, Broken, Unseen
from distributed_muzero.environments.random_games import RandomGame, legal_actions, play, same
from distributed_muzero.errors import first_line

NUM_SHORT_GAMES = 5

Make = Callable[[], Environment]


def check_mask_twice(make: Make, seed: int, steps: int) -> str:
    with _made(make) as environment:
        environment.initial_state(seed)
        actions = np.random.default_rng(seed)
        for step in range(steps):
            first = np.array(environment.mask())
            if not same(first, environment.mask()):
                raise Broken(f"step {step}, seed {seed}: mask() gave two different masks of one state")
            given = environment.mask()
            if isinstance(given, np.ndarray) and given.flags.writeable:
                given[...] = 0
            if not same(first, environment.mask()):
                raise Broken(
                    f"step {step}, seed {seed}: changing the mask that was given out changed the environment's own; "
                    "return a new array each time (`.copy()`)"
                )
            if not move_on(environment, first, actions):
                break
    return "the same again, and not the environment's own array"


def check_illegal_actions(make: Make, seed: int, steps: int) -> str:
    """Outside the actions: must be refused. Forbidden ones are never played; what they do is told."""
    with _made(make) as environment:
        environment.initial_state(seed)
        num_actions = environment.spec.num_actions
        try:
            environment.step(num_actions)
        except Exception as error:
            refused = f"{num_actions} raises {type(error).__name__}"
        else:
            raise Broken(
                f"action {num_actions} was accepted; expected an error outside 0 … {num_actions - 1}"
            )
    with _made(make) as environment:
        num_steps = 0
        for one in range(seed, seed + NUM_SHORT_GAMES):
            environment.initial_state(one)
            actions = np.random.default_rng(one)
            for step in range(steps):
                num_steps += 1
                mask = np.asarray(environment.mask()).ravel()
                if not mask.all():
                    action = int(np.flatnonzero(mask == 0)[0])
                    where = f"step {step}, seed {one}: {action}"
                    return f"{refused}, a forbidden one ({where}) {_effect(environment, action)}"
                if not move_on(environment, mask, actions):
                    break
    return f"{refused}; no other was forbidden in {num_steps} steps"


def _effect(environment: Environment, action: int) -> str:
    try:
        reward, _, is_terminal = environment.step(action)
        end = "the game ends" if is_terminal else "the game goes on"
    except Exception as error:
        return f"raises {type(error).__name__}"
    return f"is accepted: reward {reward}, {end}"


def check_seeds(make: Make, seed: int, steps: int) -> str:
    with _made(make) as environment:
        first, again = play(environment, seed, steps), play(environment, seed, steps)
        others = [play(environment, other, 0) for other in range(seed + 1, seed + 4)]
    if difference := first.difference(again):
        raise Broken(f"seed {seed}, twice in one environment: {difference}; expected the same game")
    with _made(make) as environment:
        if difference := first.difference(play(environment, seed, steps)):
            raise Broken(f"seed {seed}, in two environments: {difference}; expected the same game")
    starts_differ = any(not same(first.copies[0], other.copies[0]) for other in others)
    return f"the same one, the same game; {'others start elsewhere' if starts_differ else 'all start alike'}"


def check_instances(make: Make, seed: int, steps: int) -> str:
    with _made(make) as alone:
        expected = play(alone, seed, steps)
    if expected.error:
        raise Unseen(f"the game of one alone ended early: {expected.error}")
    if not expected.actions:
        raise Unseen(NO_STEP)
    with _made(make) as one, _made(make) as other:
        one.initial_state(seed)
        other.initial_state(seed + 1)
        rng = np.random.default_rng(seed + 1)
        other_plays = True
        for step, action in enumerate(expected.actions):
            if other_plays:
                other_plays = move_on(other, other.mask(), rng)
            mask = np.array(one.mask())
            reward, observation, _ = one.step(action)
            seen = (mask, reward, observation)
            if not all(
                map(same, seen, (expected.masks[step], expected.rewards[step], expected.copies[step + 1]))
            ):
                raise Broken(
                    f"step {step}, seed {seed}: another environment beside it changed the game; keep all state in "
                    "the instance"
                )
    return "two play beside each other undisturbed"


def check_after_the_end(make: Make, seed: int, steps: int) -> str:
    """What may be used then is checked. A further step is promised nothing: what it does is told."""
    with _made(make) as environment:
        game = next((game for game in _short_games(environment, seed, steps) if game.is_over), None)
        if game is None:
            raise Unseen(f"no game ended within {steps} steps")
        if (again := environment.truncated) != game.truncated:
            raise Broken(f"seed {game.seed}: truncated is {game.truncated}, and {again} when asked again")
        if difference := game.difference(play(environment, game.seed, steps)):
            raise Broken(
                f"seed {game.seed}, played again after its end: {difference}; expected the same game"
            )
        effect = _effect(environment, game.actions[-1])
    return f"initial_state() begins anew; a further step() {effect}"


def check_close(make: Make, seed: int) -> str:
    """Before the first game (training closes one of which it only wants the spec), and within a game."""
    close(make(), "before the first game")
    environment = make()
    play(environment, seed, 0)
    close(environment, "within a game")
    return "before, within and after games"


def close(environment: Environment, when: str) -> str:
    try:
        environment.close()
    except Exception as error:
        raise Broken(f"{when}: close() raised {type(error).__name__}: {first_line(error)}") from error
    return when


def move_on(environment: Environment, mask: np.ndarray, rng: np.random.Generator) -> bool:
    """Plays a legal action; returns whether the game goes on, which it doesn't where none is legal."""
    legal = legal_actions(mask)
    return len(legal) > 0 and not environment.step(int(rng.choice(legal)))[2]


def _short_games(environment: Environment, seed: int, steps: int) -> Iterator[RandomGame]:
    return (play(environment, one, steps) for one in range(seed, seed + NUM_SHORT_GAMES))


@contextmanager
def _made(make: Make) -> Iterator[Environment]:
    environment = make()
    try:
        yield environment
    finally:
        # A row of its own tells it.
        with suppress(Exception):
            environment.close()


OF_INSTANCES: dict[str, Callable[[Make, int, int], str]] = {
    "masks again": check_mask_twice,
    "illegal actions": check_illegal_actions,
    "seeds": check_seeds,
    "instances": check_instances,
    "after the end": check_after_the_end,
}
