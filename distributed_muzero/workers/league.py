"""The league of a two-player run: earlier checkpoints that each new one meets, which gives the run's Elo curve.

A checkpoint's rating is what best explains its games against the members' own ratings, which stay as they were when
those joined. The run's first checkpoint has 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from distributed_muzero.checkpoint import read_checkpoint
from distributed_muzero.errors import CheckpointError, RunError, first_line
from distributed_muzero.files import write_atomically
from distributed_muzero.matches.elo import fit_rating
from distributed_muzero.run_folder import RunFolder


class Member(NamedTuple):
    """A checkpoint of the run that stays for later ones to be measured by."""

    step: int  # learner steps
    elo: float


class Rival(NamedTuple):
    """A member that is to be played against."""

    member: Member
    weights: Mapping[str, np.ndarray]  # by their names in the networks


class League:
    """Who is in the league now, as `<run>/league.json` holds it."""

    def __init__(self, folder: RunFolder, size: int, tell: Callable[[str], None]):
        """size: members at most; 0 for no league.   tell: takes what a person should know."""
        self.size = size
        self.num_lost = 0  # members whose checkpoint was gone or damaged
        self._folder = folder
        self._file = folder.path / "league.json"
        self._tell = tell
        self.members = thinned(self._read(), size)

    @property
    def steps(self) -> set[int]:
        """Of the checkpoints that the league needs."""
        return {member.step for member in self.members}

    def rivals(self, step: int) -> Iterator[Rival]:
        """The members that the checkpoint of this step meets, one after the other: all but itself.

        One whose checkpoint is gone or damaged leaves. Raises RunError if that can't be written down.
        """
        for member in [member for member in self.members if member.step != step]:
            try:
                saved = read_checkpoint(self._folder.checkpoints / f"step_{member.step:08d}")
                yield Rival(member, saved.tensors["weights"])
            except CheckpointError as error:
                self.num_lost += 1
                self._tell(f"checkpoint {member.step} leaves the league: {first_line(error)}")
                self._set([other for other in self.members if other != member])

    def rate(self, games: Sequence[Mapping[str, Any]]) -> float:
        """The Elo rating by games against members, each with `elo`, `games` and `points`.

        Without any, a checkpoint takes over the rating of the last one that has one; the first of a run has 0.
        """
        if not games:
            return self._last_elo()
        met = [(game["elo"], game["games"], game["points"]) for game in games]
        # A draw more, with the newest: who won or lost everything stays at a distance that the next ones can correct.
        newest = max(games, key=lambda game: game["step"])
        return round(fit_rating([*met, (newest["elo"], 1, 0.5)]), 1)

    def join(self, step: int, elo: float) -> None:
        """A checkpoint was rated; too many members, and one leaves. Raises RunError if the disk refuses."""
        others = [member for member in self.members if member.step != step]
        self._set(thinned([*others, Member(step, elo)], self.size))

    def _last_elo(self) -> float:
        rated = [line["elo"] for line in self._folder.read_evaluations() if is_number(line.get("elo"))]
        return float(rated[-1]) if rated else 0.0

    def _set(self, members: list[Member]) -> None:
        self.members = members
        try:
            write_atomically(self._file, sealed(members))
        except OSError as error:
            raise RunError(f"can't write {self._file}: {error}; the old one is intact") from error

    def _read(self) -> list[Member]:
        try:
            return unsealed(self._file.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self._tell(f"the league begins anew: {self._file} can't be used ({error})")
            return []


def thinned(members: Sequence[Member], size: int) -> list[Member]:
    """At most `size` of the members, by rising steps, spread over the training.

    The first and the newest stay; of the others, the one leaves whose neighbours' steps lie closest together, of
    several the oldest. A league of one keeps the newest.
    """
    stay = sorted(members)
    while len(stay) > size:
        gaps = [after.step - before.step for before, after in zip(stay, stay[2:], strict=False)]
        del stay[1 + gaps.index(min(gaps)) if size > 1 else 0]
    return stay


def sealed(members: Sequence[Member]) -> bytes:
    """league.json: the members, and the sha256 of them."""
    content = [member._asdict() for member in members]
    return json.dumps({"members": content, "sha256": _checksum(content)}).encode()


def unsealed(data: bytes) -> list[Member]:
    """The members, by rising steps. Raises ValueError for what `sealed` hasn't written like this."""
    content = json.loads(data)
    try:
        members = [Member(int(entry["step"]), float(entry["elo"])) for entry in content["members"]]
        is_intact = content["sha256"] == _checksum(content["members"])
    except (KeyError, TypeError, OverflowError):
        raise ValueError("expected members with step and elo, and their sha256") from None
    if not is_intact or not all(map(math.isfinite, (member.elo for member in members))):
        raise ValueError("its sha256 differs: it has changed")
    return sorted(members)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value that was read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
