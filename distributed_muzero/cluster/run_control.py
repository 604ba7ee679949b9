"""The named actor that outsiders talk to: desired state in, status out. It dies with the run's job."""

from __future__ import annotations

from typing import Any

import ray

MAX_ACTORS = 10_000
NAMESPACE = "distributed_muzero"


@ray.remote(num_cpus=0)
class RunControl:
    """`(namespace "distributed_muzero", name = the run's)`. Holds wishes and the last status, decides nothing."""

    def __init__(self, num_actors: int):
        self.desired: dict[str, Any] = {"num_actors": num_actors, "stop": False}
        self.status: dict[str, Any] = {}

    def exchange(self, status: dict[str, Any]) -> dict[str, Any]:
        """The driver's call: leaves the newest status, takes the desired state."""
        self.status = status
        return self.desired

    def get_status(self) -> dict[str, Any]:
        return self.status

    def set_desired(self, **wishes: Any) -> dict[str, Any]:
        """An outsider's call, with `num_actors=` or `stop=`; returns the whole desired state."""
        unknown = wishes.keys() - self.desired.keys()
        if unknown:
            raise ValueError(f"unknown wishes {sorted(unknown)}; known: {sorted(self.desired)}")
        if not 1 <= wishes.get("num_actors", 1) <= MAX_ACTORS:
            raise ValueError(f"num_actors must be 1 to {MAX_ACTORS}, got {wishes['num_actors']}")
        self.desired.update(wishes)
        return self.desired
