"""The named actor that outsiders talk to: desired state in, status out. It dies with the run's job."""

from __future__ import annotations

from typing import Any, NamedTuple

import ray

from distributed_muzero.errors import RunError

MAX_PROCESSES = 10_000  # of one kind
NAMESPACE = "distributed_muzero"


class Desired(NamedTuple):
    """What a run is asked to be."""

    num_actors: int
    num_reanalysers: int
    num_shards: int
    autoscale: tuple[int, int] | None = None  # fewest and most actors; the driver chooses then
    stop: bool = False
    in_haste: bool = False  # a stop is to leave out draining and the last checkpoint
    shards_stay: bool = False  # as many as there are: they can't be laid out anew at a URI

    def changed(self, **wishes: Any) -> Desired:
        """With other values. Raises RunError for those that this run can't have."""
        numbers = {name: wishes[name] for name in wishes if name.startswith("num_")}
        for name, number in numbers.items():
            if not 1 <= number <= MAX_PROCESSES:
                what = name.removeprefix("num_")
                raise RunError(f"{number} {what}: expected 1 to {MAX_PROCESSES}")
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


@ray.remote(num_cpus=0)
class RunControl:
    """`(namespace "distributed_muzero", name = the run's)`. Holds wishes and the last status, decides nothing."""

    def __init__(self, desired: Desired):
        self.desired = desired
        self.status: dict[str, Any] = {}

    def exchange(self, status: dict[str, Any]) -> Desired:
        """The driver's call: leaves the newest status, takes the desired state."""
        self.status = status
        return self.desired

    def get_status(self) -> dict[str, Any]:
        return self.status

    def set_desired(self, **wishes: Any) -> Desired:
        """An outsider's call, with fields of `Desired`; returns the whole desired state. Raises RunError."""
        self.desired = self.desired.changed(**wishes)
        return self.desired
