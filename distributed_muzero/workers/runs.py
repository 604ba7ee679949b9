"""The runs of a runs folder, on this machine or at a URI: made, gone on with, read.

A run at a URI lies in a folder of this machine, of which a copy is kept there. To train is to own the copy: whoever
goes on with a run takes it over. To read, the copy is fetched.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from distributed_muzero.config import Config
from distributed_muzero.errors import RunError
from distributed_muzero.mirror import uri as uris
from distributed_muzero.mirror.download import fetch, files_at, names_at, read_at, reading_folder
from distributed_muzero.mirror.mirror import ALIVE
from distributed_muzero.mirror.owner import interval_at
from distributed_muzero.mirror.plan import step_of
from distributed_muzero.run_folder import (
    AT_WORK,
    NAME,
    RunFolder,
    config_of,
    counts_of,
    create_run,
    default_run_name,
    locked,
    no_such_run,
    open_run,
    run_names,
)
from distributed_muzero.workers.run_copy import INTERVAL_SECONDS, Copies, interval_seconds

FETCHED = ".fetched"  # no run has such a name
# One that says so and has copied nothing for so many intervals is taken for dead.
SILENT_INTERVALS = 2
POLL_SECONDS = 1.0
STATE_ADVICE = f"name a writable disk with room by {uris.STATE_VARIABLE}"

Opened = tuple[RunFolder, Copies | None]


class Place(NamedTuple):
    """A run at a URI."""

    runs: str  # URI of the runs folder
    name: str

    @property
    def uri(self) -> str:
        return uris.join(self.runs, self.name)

    @property
    def local(self) -> Path:
        """The folder on this machine that is copied there."""
        return uris.local_runs_dir(self.runs) / self.name


def place_of(run: str, runs_dir: str) -> Place | None:
    """None for a run of this machine's file systems: its name in a folder, or the path of its folder."""
    if uris.is_uri(run):
        return Place(*uris.split_name(run))
    return Place(runs_dir, run) if uris.is_uri(runs_dir) and NAME.fullmatch(run) else None


def place_in(run: str, runs_dir: str) -> str:
    """Where a run of this folder lies, as `RunFolder.place` has it."""
    place = place_of(run, runs_dir)
    return str(Path(runs_dir, run).resolve()) if place is None else place.uri.partition("?")[0]


def names_in(runs_dir: str) -> list[str]:
    """The runs of a folder, newest first; at a URI in alphabetical order. Raises RunError."""
    return names_at(runs_dir) if uris.is_uri(runs_dir) else run_names(runs_dir)


def folder_here(runs_dir: str) -> str:
    """Where runs of this machine are at work: the runs folder, or for one at a URI the folder that is copied there."""
    return str(uris.local_runs_dir(runs_dir)) if uris.is_uri(runs_dir) else runs_dir


# To train ---------------------------------------------------------------------------------------------------------


@contextmanager
def created(runs_dir: str, name: str | None, config: Config) -> Iterator[Opened]:
    """A new run, as `create_run` makes it; at a URI with a first copy, or nothing is left of it. Raises RunError."""
    if not uris.is_uri(runs_dir):
        folder = create_run(runs_dir, name, config)
        with folder.locked():
            yield folder, None
        return
    taken = names_at(runs_dir)
    place = Place(runs_dir, name if name is not None else _free_name(runs_dir, config, taken))
    if place.name in taken:
        raise RunError(
            f"run {place.name!r} exists already in {uris.shown(runs_dir)}; choose another --name, or go on with it: "
            f"resume {place.name}"
        )
    with _told_of_the_disk(place.local):
        if NAME.fullmatch(place.name) and place.local.exists():
            _remove_unborn(place)
    folder = replace(create_run(place.local.parent, place.name, config, STATE_ADVICE), uri=place.uri)
    with locked(folder.path, STATE_ADVICE):
        yield folder, _first_copy(folder.path, place.uri)


def _remove_unborn(place: Place) -> None:
    """What is left of a process that was killed before it made the first copy. Raises RunError for a run."""
    with locked(place.local, STATE_ADVICE):
        if (place.local / "launches.json").exists():
            raise RunError(
                f"{place.local} is there, but no copy of it in {uris.shown(place.runs)}: choose another --name; or, if "
                "it is of no use any more, remove it"
            )
        shutil.rmtree(place.local, ignore_errors=True)


def _first_copy(folder: Path, uri: str) -> Copies:
    try:
        copies = Copies(folder, uri)
        copies.claim_new()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()
        raise
    return copies


def _free_name(runs_dir: str, config: Config, taken: Collection[str]) -> str:
    name = default_run_name(config)
    candidates = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(text for text in candidates if text not in taken and not Place(runs_dir, text).local.exists())


@contextmanager
def opened(
    run: str,
    runs_dir: str,
    tell: Callable[[str], None],
    take_over: bool = False,
    change: Callable[[Config], Config] = lambda config: config,
    check: Callable[[RunFolder, Mapping[str, Any]], None] = lambda folder, counts: None,
) -> Iterator[Opened]:
    """A run to go on with, which nobody else does meanwhile; taken over, where its copy is at a URI.

    take_over: also from a process elsewhere that seems to go on with it.   change: what the caller will make of its
    config.   check: is given a run at a URI as it would go on, which isn't on this machine yet, and what its copy has
    counted, as a status names it. Where the run can't have the config, or either of them raises, it is not taken over.
    Raises RunError, and what they raise.
    """
    place = place_of(run, runs_dir)
    if place is None:
        folder = open_run(run, runs_dir)
        with folder.locked():
            yield folder, None
        return
    _check_exists(place)
    folder = _check_change(place, change)
    with _told_of_the_disk(place.local):
        place.local.mkdir(parents=True, exist_ok=True)
    with locked(place.local, STATE_ADVICE):
        copies = Copies(place.local, place.uri)
        # Before a run elsewhere is ended for it.
        check(folder, _copied_counts(place))
        replay = folder.config.replay
        # Spread shards fetch their copies on their own nodes.
        copies.require_room(0 if replay.spread_shards else replay.num_shards)
        if not take_over and (owner := copies.owner_elsewhere()):
            await_silence(place, owner, tell, silent_seconds(copies.interval_elsewhere()))
        copies.claim()
        yield replace(open_run(place.name, place.local.parent), uri=place.uri), copies


def _check_change(place: Place, change: Callable[[Config], Config]) -> RunFolder:
    """Before a run elsewhere is ended for it; returns the run with the changed config."""
    data, _ = read_at(place.uri, "config.yaml")
    stored = config_of(data or b"", f"{uris.shown(place.uri)}/config.yaml")
    return RunFolder(place.local, stored, place.uri).with_config(change(stored))


def _copied_counts(place: Place) -> dict[str, Any]:
    """Of the copied status; but learner steps are those of the newest checkpoint, from which a run goes on."""
    status, _ = _status_at(place)
    best, _ = _json_at(place, "checkpoints/best.json")
    checkpoints = files_at(uris.join(place.uri, "checkpoints"))
    steps = [step_of(name) for name in checkpoints if name.endswith("/DONE")]
    evaluation = best.get("mean_return", status.get("evaluation"))
    return {**status, "learner_steps": max(steps, default=0), "evaluation": evaluation}


@contextmanager
def _told_of_the_disk(folder: Path) -> Iterator[None]:
    """Raises RunError where the disk for what lies at a URI refuses."""
    try:
        yield
    except OSError as error:
        raise RunError(f"can't make {folder} for the run on this machine: {error}; {STATE_ADVICE}") from None


def await_silence(
    place: Place,
    owner: str,
    tell: Callable[[str], None],
    patience_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Returns as soon as a run counts as dead that another process had. Raises RunError if it shows that it lives.

    It lives if its status says that it goes on, and anything is copied within the patience. What the clocks of the
    store and of this machine say is never compared.
    """
    began = clock()
    first = _signs_of_life(place)
    if first is None:
        return
    tell(
        f"{owner} may still go on with run {place.name}: waiting {patience_seconds:.0f} s for a sign of it; "
        "--take-over doesn't wait"
    )
    while clock() - began < patience_seconds:
        sleep(POLL_SECONDS)
        signs = _signs_of_life(place)
        if signs is None:
            return
        if signs != first:
            raise RunError(
                f"run {place.name!r} is going on: {owner} has just copied it to {uris.shown(place.uri)}; stop that one "
                "first, or end its part in it with --take-over"
            )


def _signs_of_life(place: Place) -> tuple[object, ...] | None:
    """What changes with every copy; None if the run says itself that it is over.

    One that has said nothing yet is about to start.
    """
    status, changed_at = _status_at(place)
    if status.get("state", "starting") not in AT_WORK:
        return None
    return status, changed_at, read_at(place.uri, ALIVE)


def silent_seconds(interval: float | None = None) -> float:
    """interval: seconds between the copies of who has the run, if it is known; else as this process copies."""
    return SILENT_INTERVALS * max(interval_seconds() if interval is None else interval, INTERVAL_SECONDS)


# To read ----------------------------------------------------------------------------------------------------------


def open_to_read(run: str, runs_dir: str, exclude: Collection[str] = ()) -> RunFolder:
    """A run as it is now, or as it was copied last; what is fetched stays until this process ends, or fetches it anew.

    exclude: folders that aren't needed. Raises RunError.
    """
    place = place_of(run, runs_dir)
    if place is None:
        return open_run(run, runs_dir)
    _check_exists(place)
    parent = place.local.parent / FETCHED
    with _told_of_the_disk(parent):
        folder = reading_folder(parent) / "-".join(["without", *sorted(exclude)] if exclude else ["whole"])
    fetch(place.uri, folder / place.name, exclude)
    return replace(open_run(place.name, folder), uri=place.uri)


def last_status(run: str, runs_dir: str) -> dict[str, Any] | None:
    """The last status; None before the first. Raises RunError if there is no such run."""
    place = place_of(run, runs_dir)
    if place is None:
        return open_run(run, runs_dir).read_status()
    _check_exists(place)
    return _status_at(place)[0] or None


def current_status(run: str, runs_dir: str) -> dict[str, Any]:
    """As `last_status`, with state `lost` where it says running and nobody goes on with it."""
    return status_source(run, runs_dir)()


def status_source(run: str, runs_dir: str) -> Callable[[], dict[str, Any]]:
    """Gives `current_status` each time; whether there is such a run at a URI is asked here alone. Raises RunError."""
    place = place_of(run, runs_dir)
    if place is None:
        return lambda: open_run(run, runs_dir).current_status()
    _check_exists(place)
    return lambda: _current_status_at(place)


def _current_status_at(place: Place) -> dict[str, Any]:
    status, changed_at = _status_at(place)
    if not status:
        # Its first copy has a config alone.
        status = {"run": place.name, "state": "starting"}
        changed_at = read_at(place.uri, "config.yaml")[1]
    if status.get("state") not in AT_WORK:
        return status
    last_sign = max(changed_at or 0.0, read_at(place.uri, ALIVE)[1] or 0.0)
    silence = time.time() - last_sign
    # The owner is asked only if that can matter.
    if silence > silent_seconds(0.0) and silence > silent_seconds(interval_at(place.uri)):
        return counts_of(status, place.name, "lost")
    return status


def _status_at(place: Place) -> tuple[dict[str, Any], float | None]:
    """The copied status and when it was copied; empty before the first."""
    return _json_at(place, "status.json")


def _json_at(place: Place, name: str) -> tuple[dict[str, Any], float | None]:
    """A copied file and when it was copied; empty if it isn't there, or can't be read."""
    data, changed_at = read_at(place.uri, name)
    found = None
    with suppress(ValueError):
        found = json.loads(data or b"{}")
    return found if isinstance(found, dict) else {}, changed_at


def _check_exists(place: Place) -> None:
    names = names_at(place.runs)
    if place.name not in names:
        raise no_such_run(place.name, uris.shown(place.runs), names, "by name")
