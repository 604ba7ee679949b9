"""A Ray for one command: started here and ended with it, or the one that the environment points to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from distributed_muzero.cluster.connect import connect
from distributed_muzero.cluster.driver import Driver
from distributed_muzero.cluster.jobs import is_http
from distributed_muzero.cluster.makers import make_control
from distributed_muzero.cluster.run_control import Desired, first_desired
from distributed_muzero.config import Config
from distributed_muzero.errors import ClusterError, LogError
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.builder import num_reanalysers
from distributed_muzero.workers.layout import lay_out, with_shards
from distributed_muzero.workers.run_state import STOPPED, Ending

EXCHANGE_SECONDS = 10.0
SHARDS_END_SECONDS = 15.0  # until killed shards have let go of their logs


def turns(
    config: Config, run_name: str, book: Bookkeeper, stop_requested: Callable[[], bool]
) -> Generator[None, None, Ending]:
    """The same as `workers.local.turns`, with the roles as processes."""
    with ray_session(num_cpus(config)):
        desired = first_desired(config)._replace(shards_stay=book.copies is not None)
        control = make_control(run_name, desired)
        # Until the driver tells more: which run of this name it is.
        control.exchange.remote({"run": run_name, "state": "starting", "folder": book.folder.place})
        try:
            while True:
                driver = Driver(config, run_name, book, stop_requested, desired, control)
                try:
                    if ending := (yield from driver.turns()):
                        return ending
                finally:
                    control = driver.control.handle
                    if ray.is_initialized():  # and may go on without the run
                        driver.kill_all()
                # The number that was chosen goes on, where one was.
                desired = driver.desired._replace(num_actors=driver.autoscaler.num_actors)
                desired = change_shards(book, desired, control)
                config = book.config
                if stop_requested():
                    return STOPPED
        finally:
            if ray.is_initialized():
                ray.kill(control)


def change_shards(book: Bookkeeper, desired: Desired, control: Any) -> Desired:
    """Lays the replay out for as many shards as are desired; where that fails, the run goes on with those it had."""
    book.progress.message(f"laying out the replay for {desired.num_shards} shards")
    book.folder.write_counts("laying out")
    ray.wait([control.exchange.remote({**book.status, "state": "laying out"})], timeout=EXCHANGE_SECONDS)
    config = with_shards(book.config, desired.num_shards)
    try:
        lay_out(book.folder.replay, config, SHARDS_END_SECONDS)
    except LogError as error:
        before = book.config.replay.num_shards
        book.progress.message(f"the run goes on with {before} shards: {error}")
        ray.wait([control.set_desired.remote(num_shards=before)], timeout=EXCHANGE_SECONDS)
        lay_out(book.folder.replay, book.config)
        config, desired = book.config, desired._replace(num_shards=before)
    book.change_config(config)
    return desired


def num_cpus(config: Config) -> int:
    """That a run's processes ask Ray for."""
    num_shards = config.replay.num_shards if config.replay.spread_shards else 0
    num_actors = max(config.actor.num_actors, *(config.actor.autoscale or (0,)))
    return num_actors + num_reanalysers(config) + num_shards


@contextmanager
def ray_session(num_cpus: int, **options: object) -> Iterator[None]:
    """Ray as this process has it; else connects to RAY_ADDRESS if it is set; else starts one on this machine.

    It is ended afterwards, unless it was there before.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if is_http(address):
        raise ClusterError(
            f"RAY_ADDRESS is {address}, where jobs are submitted; unset it to train on this machine, or use `submit`"
        )
    if not address:
        # Ray starts its workers at niceness 15: beside any other program they would get next to nothing.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Every actor asks for a whole CPU; on a small machine they share what is there.
        options = {"num_cpus": max(os.cpu_count() or 1, num_cpus), "include_dashboard": False, **options}
    before = signal.getsignal(signal.SIGTERM)
    connect(address or "local", **options)
    own = ray.get_runtime_context().gcs_address
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # ray.init puts its own handler there, which exits at once
        yield
    finally:
        if ray.is_initialized() and ray.get_runtime_context().gcs_address == own:  # and not another one since
            ray.shutdown()
