"""Environments that an actor plays in, made on first use and used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distributed_muzero.environments.base import Environment


class EnvironmentPool:
    """Those of several stages. It makes one where none of the stage is idle, and keeps at most `max_idle` idle ones."""

    def __init__(self, factories: Sequence[Callable[[], Environment]], max_idle: int):
        """factories: one for each stage."""
        self._factories = factories
        self._max_idle = max_idle
        self._idle: list[tuple[int, Environment]] = []  # with their stage, the one given back last at the end
        self._made: list[Environment] = []

    def take(self, stage: int) -> Environment:
        """An environment of the stage, until it is given back; the one that was idle for the shortest time."""
        for place in reversed(range(len(self._idle))):
            if self._idle[place][0] == stage:
                return self._idle.pop(place)[1]
        self._made.append(env := self._factories[stage]())
        return env

    def give_back(self, stage: int, env: Environment) -> None:
        """The one that is idle for the longest time is closed where there are too many."""
        self._idle.append((stage, env))
        if len(self._idle) > self._max_idle:
            _, oldest = self._idle.pop(0)
            self._made = [other for other in self._made if other is not oldest]
            oldest.close()

    def close(self) -> None:
        """Closes all, also those that are in use."""
        for env in self._made:
            env.close()
