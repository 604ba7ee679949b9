"""A run's folder: where everything that a run leaves behind lies, and the rules for its name.

runs/<name>/ config.yaml  launches.json  status.json  metrics.jsonl  evaluations.jsonl  tensorboard/  checkpoints/
             replay/
"""

from __future__ import annotations

import datetime
import difflib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distributed_muzero.config import Config, make_config
from distributed_muzero.errors import ConfigError, RunError
from distributed_muzero.files import sync_folder, to_json, write_atomically

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# What can't change in a run that goes on; without keys, the whole section.
FIXED: dict[str, tuple[str, ...]] = {
    "environment": ("id", "kwargs", "history_length"),
    "network": (),
    "run": ("seed",),
}
MAX_LISTED = 20  # runs named in an error
AT_WORK = ("starting", "running", "laying out")  # what the status says of a run that may live
# Of a status: what is so only while somebody is at work, or of the launch that wrote it.
OF_THE_MOMENT = frozenset(
    {
        "actors", "reanalysers", "env_steps_per_second", "learner_steps_per_second", "staleness", "actors_waiting",
        "learner_waiting", "checkpoint_age_seconds", "disk_free_bytes", "metrics", "copy", "reason", "seconds",
    }
)  # fmt: skip


class Launch(NamedTuple):
    """One start of a run. What it names after its number, or after weights versions of its own, is named once."""

    number: int
    first_version: int  # above all that earlier launches reserved


FIRST_LAUNCH = Launch(0, 0)


@dataclass(frozen=True)
class RunFolder:
    """An existing run: its folder, its configuration as read back from it, and the paths in it."""

    path: Path  # absolute
    config: Config
    uri: str | None = None  # where a copy of it is kept

    @property
    def place(self) -> str:
        """Where people find it."""
        return str(self.path) if self.uri is None else self.uri.partition("?")[0]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def replay(self) -> Path:
        return self.path / "replay"

    @property
    def history(self) -> Path:
        return self.path / "history"

    @property
    def launches_file(self) -> Path:
        return self.path / "launches.json"

    @property
    def datasets_file(self) -> Path:
        return self.path / "datasets.json"

    def locked(self) -> AbstractContextManager[None]:
        """Keeps other processes from going on with this run. Raises RunError if one does."""
        return locked(self.path)

    def begin_launch(self, unknown_versions: int = 0) -> Launch:
        """Counts the starts of the run, durably. One of a version that didn't count them has its checkpoints.

        unknown_versions: that may have been given out, besides those that are written down.
        """
        try:
            known = json.loads(self.launches_file.read_text()) if self.launches_file.exists() else {}
            launch = Launch(
                int(known.get("launches", any(self.checkpoints.glob("step_*")))),
                int(known.get("versions", 0)) + unknown_versions,
            )
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise RunError(
                f'can\'t read {self.launches_file}: {error}; write {{"launches": N, "versions": V}} into it, with '
                "numbers above all that the run has used, such as 1000 and 1000000"
            ) from None
        self.reserve_versions(launch, launch.first_version)
        return launch

    def reserve_versions(self, launch: Launch, end: int) -> None:
        """Later launches begin at weights version `end`, durably."""
        try:
            write_atomically(self.launches_file, to_json({"launches": launch.number + 1, "versions": end}))
        except OSError as error:
            raise RunError(f"can't write {self.launches_file}: {error}; the old one is intact") from None

    def with_config(self, config: Config) -> RunFolder:
        """The run with other settings, not written yet. Raises RunError for those that can't change."""
        for section, keys in FIXED.items():
            before, after = getattr(self.config, section), getattr(config, section)
            for key in keys or type(before).model_fields:
                if getattr(before, key) != getattr(after, key):
                    raise RunError(
                        f"{section}.{key} of run {self.name!r} is {getattr(before, key)!r} and can't become "
                        f"{getattr(after, key)!r}: its weights and episodes depend on it; start a new run with it"
                    )
        num_shards = self.config.replay.num_shards
        if self.uri is not None and config.replay.num_shards != num_shards:
            raise RunError(
                f"run {self.name!r} has {num_shards} replay shards and can't have {config.replay.num_shards}: shards "
                "can't be laid out anew in a runs folder at a URI; start a new run with so many"
            )
        return replace(self, config=config)

    def write_config(self) -> None:
        try:
            write_atomically(self.config_file, self.config.to_yaml().encode())
        except OSError as error:
            raise RunError(f"can't write {self.config_file}: {error}; the old one is intact") from None

    def read_evaluations(self) -> list[dict[str, Any]]:
        """All whole lines of evaluations.jsonl, oldest first; those that can't be read are left out."""
        found = []
        with suppress(OSError):
            for line in self.evaluations_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def write_datasets(self, datasets: Sequence[Path | str]) -> None:
        """Notes what an offline run has yet to import, paths and URIs; nothing once all of it is."""
        texts = [text if isinstance(text, str) else str(text.resolve()) for text in datasets]
        try:
            write_atomically(self.datasets_file, to_json(texts))
        except OSError as error:
            raise RunError(f"can't write {self.datasets_file}: {error}") from None

    def read_datasets(self) -> list[Path | str]:
        """What `write_datasets` noted last."""
        try:
            texts = json.loads(self.datasets_file.read_text(encoding="utf-8"))
            return [Path(text) if text.startswith("/") else text for text in texts]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RunError(f"can't read {self.datasets_file}: {error}") from None

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replaces status.json at once: a reader never meets half. Raises RunError if the disk refuses."""
        try:
            write_atomically(self.status_file, to_json(status, indent=2))
        except OSError as error:
            raise RunError(f"can't write {self.status_file}: {error}; the old one is intact") from error

    def write_counts(self, state: str, reason: str | None = None) -> None:
        """The status of a launch in which nobody plays, yet or any more: the last one's counts. Raises RunError.

        reason: why it is so, in words.
        """
        before = None
        with suppress(RunError):
            before = self.read_status()
        status = {**counts_of(before or {}, self.name, state), "updated": now_text()}
        self.write_status({**status, "reason": reason} if reason else status)

    def read_status(self) -> dict[str, Any] | None:
        """The last status; None before the first. Raises RunError if the file can't be read."""
        try:
            return json.loads(self.status_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(
                f"can't read {self.status_file}: {error}; the run writes it anew when it goes on"
            ) from None

    def current_status(self) -> dict[str, Any]:
        """The last status, with state `lost` where it says running and no process on this machine goes on."""
        status = self.read_status() or {"run": self.name, "state": "starting"}
        if status["state"] in AT_WORK:
            with suppress(RunError), self.locked():
                return counts_of(status, self.name, "lost")
        return status


def now_text() -> str:
    """This moment, as a status tells when it was written."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def counts_of(status: Mapping[str, Any], run: str, state: str) -> dict[str, Any]:
    """The status of a run that nobody is at work on now: the state, and the counts of the last one written."""
    counts = {key: value for key, value in status.items() if key not in OF_THE_MOMENT}
    return {**counts, "run": run, "state": state}


@contextmanager
def locked(path: Path, advice: str = "choose another disk") -> Iterator[None]:
    """Keeps other processes from going on with the run in this folder. Raises RunError if one does.

    advice: for a folder that can't be locked.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context((path / "lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"run {path.name!r} is going on in another process; stop that one first, or wait for its end"
            ) from None
        except OSError as error:
            raise RunError(
                f"can't lock {path / 'lock'}, which keeps two processes from going on with one run: {error}; "
                f"its folder has to be writable, on a disk with room that knows locks; {advice}"
            ) from None
        yield


def check_name(name: str) -> None:
    """Raises RunError for a name that no run may have."""
    if not NAME.fullmatch(name):
        raise RunError(
            f"run name {name!r}: expected 1 to 64 letters, digits and _ . - (the first a letter or digit)"
        )


def create_run(
    runs_dir: Path | str, name: str | None, config: Config, advice: str = "choose another --runs-dir"
) -> RunFolder:
    """Makes the folder of a new run and writes its config.yaml.

    Without a name, `default_run_name` gives one that is free. Raises RunError for a name that isn't allowed
    or is taken, and when the folder can't be written, with the `advice`.
    """
    root = Path(runs_dir)
    chosen = name if name is not None else _free_name(root, default_run_name(config))
    path = _inside(root, chosen)
    if path.exists():
        raise RunError(
            f"run {chosen!r} exists already in {root}; choose another --name, or go on with it: resume {chosen}"
        )
    # Under its name it is whole: a kill leaves nothing that is neither a run nor free.
    unnamed = path.with_name(f".creating-{chosen}-{os.getpid()}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unnamed, ignore_errors=True)
        unnamed.mkdir()
        for folder in ("tensorboard", "checkpoints", "replay"):
            (unnamed / folder).mkdir()
        write_atomically(unnamed / "config.yaml", config.to_yaml().encode())
        unnamed.rename(path)
        sync_folder(root)
    except OSError as error:
        shutil.rmtree(unnamed, ignore_errors=True)
        if root.is_file():
            raise RunError(f"the runs folder {root} is a file; {advice}") from None
        raise RunError(f"can't make the run's folder {path}: {error}; {advice}") from None
    return RunFolder(path, config)


def open_run(run: Path | str, runs_dir: Path | str = "runs") -> RunFolder:
    """Opens a run by its name in `runs_dir`, or by the path of its folder, wherever that lies.

    Raises RunError if there is none or its config.yaml can't be used, naming the runs that exist.
    """
    root, text = Path(runs_dir), str(run)
    if NAME.fullmatch(text) and (root / text).exists():
        path = _inside(root, text)
    elif (Path(text) / "config.yaml").is_file() or (Path(text) / "checkpoints").is_dir():
        path = Path(text).resolve()
    else:
        raise no_such_run(text, root, run_names(root))
    return RunFolder(path, _read_config(path / "config.yaml"))


def run_names(runs_dir: Path | str) -> list[str]:
    """The runs in a folder, newest first."""
    found = [path.parent for path in Path(runs_dir).glob("*/config.yaml") if NAME.fullmatch(path.parent.name)]
    found.sort(key=lambda path: (path / "config.yaml").stat().st_mtime, reverse=True)
    return [path.name for path in found]


def default_run_name(config: Config, now: datetime.datetime | None = None) -> str:
    """Environment, local time, seed: `cartpole-20261121-014500-1`."""
    now = datetime.datetime.now() if now is None else now
    unversioned = re.sub(r"-v\d+$", "", config.environment.id)
    environment = re.sub(r"[^a-z0-9]+", "-", unversioned.lower()).strip("-")[:32] or "run"
    return f"{environment}-{now:%Y%m%d-%H%M%S}-{config.run.seed}"


def _free_name(root: Path, name: str) -> str:
    candidates = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next((candidate for candidate in candidates if not (root / candidate).exists()), name)


def _inside(root: Path, name: str) -> Path:
    """The absolute path of a run's folder. Raises RunError if the name isn't allowed or leads elsewhere."""
    check_name(name)
    path = (root / name).resolve()
    if path != root.resolve() / name:
        raise RunError(f"run {name!r} leads out of {root}, to {path}; give that folder's path instead")
    return path


def _read_config(path: Path) -> Config:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(
            f"{path.parent} has no config.yaml; if it is a run's folder, write the `config` of a "
            "checkpoints/step_*/state.json there"
        ) from None
    except OSError as error:
        raise RunError(f"can't read the run's {path}: {error}") from None
    return config_of(data, path)


def config_of(data: bytes, path: Path | str) -> Config:
    """A run's config as its config.yaml holds it.   path: of that file, for messages. Raises RunError."""
    try:
        sections = yaml.safe_load(data.decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"can't read the run's {path}: {error}") from None
    if not isinstance(sections, dict):
        raise RunError(f"the run's {path} isn't a mapping of sections; restore it, or start a new run")
    try:
        return make_config(sections)
    except ConfigError as error:
        raise RunError(f"the run's {path} doesn't fit this version: {error}") from None


def no_such_run(run: str, place: Path | str, names: Sequence[str], order: str = "newest first") -> RunError:
    """The error for a run that isn't among those of a runs folder."""
    if not names:
        return RunError(
            f"no run {run!r}: {place} holds no runs yet; name another --runs-dir, or a run's folder"
        )
    close = difflib.get_close_matches(run, names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return RunError(
        f"no run {run!r} in {place}{hint}. Runs there, {order}: {', '.join(names[:MAX_LISTED])}{more}"
    )
