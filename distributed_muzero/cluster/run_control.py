"""The named actor that outsiders talk to: desired state in, status out. It dies with the run's job."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import ray

from distributed_muzero.config import Config
from distributed_muzero.errors import RunError
from distributed_muzero.workers.builder import num_reanalysers

MAX_PROCESSES = 10_000  # of one kind
MAX_SHARDS = 256  # they live beside the driver
HASTE_SECONDS = 30.0  # after which a stop that didn't come is forgotten
NAMESPACE = "distributed_muzero"


class Desired(NamedTuple):
    """What a run is asked to be."""

    num_actors: int
    num_reanalysers: int
    num_shards: int
    autoscale: tuple[int, int] | None = None  # fewest and most actors; the driver chooses then
    most_reanalysers: int = MAX_PROCESSES  # fewer where they share a GPU
    stop: bool = False
    in_haste: bool = False  # a stop is to leave out draining and the last checkpoint
    shards_stay: bool = False  # as many as there are: they can't be laid out anew at a URI

    def changed(self, **wishes: Any) -> Desired:
        """With other values. Raises RunError for those that this run can't have."""
        numbers = {name: wishes[name] for name in wishes if name.startswith("num_")}
        for name, number in numbers.items():
            most = {"num_shards": MAX_SHARDS, "num_reanalysers": self.most_reanalysers}.get(
                name, MAX_PROCESSES
            )
            if not 1 <= number <= most:
                raise RunError(f"{number} {name.removeprefix('num_')}: this run can have 1 to {most}")
        if (wishes.get("autoscale") or (1, 1))[1] > MAX_PROCESSES:
            raise RunError(f"at most {wishes['autoscale'][1]} actors: expected at most {MAX_PROCESSES}")
        if self.num_actors == 0 and ("num_actors" in wishes or wishes.get("autoscale")):
            raise RunError(
                "this run learns from stored episodes alone; start another without --offline to play"
            )
        if self.shards_stay and wishes.get("num_shards", self.num_shards) != self.num_shards:
            raise RunError(
                f"this run has {self.num_shards} replay shards and keeps them: its runs folder is at a URI, where "
                "they can't be laid out anew"
            )
        if self.num_reanalysers == 0 and "num_reanalysers" in wishes:
            raise RunError("this run searches nothing anew: its reanalyse.ratio is 0; resume it with another")
        if "num_actors" in wishes:
            wishes.setdefault("autoscale", None)  # a number that is asked for counts
        return self._replace(**wishes)


def first_desired(config: Config) -> Desired:
    """What a run is asked to be when it starts."""
    actor, reanalyse = config.actor, num_reanalysers(config)
    desired = Desired(actor.num_actors, reanalyse, config.replay.num_shards, actor.autoscale)
    # A GPU's shares are dealt out when the run begins.
    return desired if config.reanalyse.device == "cpu" else desired._replace(most_reanalysers=reanalyse)


@ray.remote(num_cpus=0)
class RunControl:
    """`(namespace "distributed_muzero", name = the run's)`. Holds wishes and the last status, decides nothing."""

    def __init__(self, desired: Desired):
        self.desired = desired
        self.status: dict[str, Any] = {}
        self._hasty_since = 0.0
        self._num_chosen = desired.num_actors  # by the driver, when it wanted any last

    def exchange(self, status: dict[str, Any]) -> Desired:
        """The driver's call: leaves the newest status, takes the desired state."""
        self.status = status
        self._num_chosen = status.get("actors", {}).get("desired") or self._num_chosen
        if time.monotonic() - self._hasty_since > HASTE_SECONDS:
            self.desired = self.desired._replace(in_haste=False)
        return self.desired

    @property
    def num_actors(self) -> int:
        """As asked for, or as chosen last between the limits that are."""
        return self._num_chosen if self.desired.autoscale else self.desired.num_actors

    def get_status(self) -> dict[str, Any]:
        """The driver's. It wants no actors while it changes the shards: then with the number that comes back."""
        actors = self.status.get("actors")
        if not actors or self.status["shards"] == self.desired.num_shards:
            return self.status
        return {**self.status, "actors": {**actors, "desired": self.num_actors}}

    def set_desired(self, **wishes: Any) -> Desired:
        """An outsider's call, with fields of `Desired`; returns the whole desired state. Raises RunError."""
        if self.desired.autoscale and wishes.get("autoscale", self.desired.autoscale) is None:
            wishes.setdefault("num_actors", self.num_actors)
        self.desired = self.desired.changed(**wishes)
        if wishes.get("in_haste"):
            self._hasty_since = time.monotonic()
        return self.desired
