"""A run's status as `watch` shows it: what it is now, and how that went in the last minutes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distributed_muzero.observability.progress import number, share

Status = Mapping[str, Any]  # Bookkeeper.write_status makes it; an older version's, or an early one, has less

SPARKS = "▁▂▃▄▅▆▇█"
TRAIL_SECONDS, TRAIL_WIDTH = 240.0, 30  # of a sparkline, and its characters
WAITING_SECONDS = 30.0  # over which it is said who waits for whom
WAITS = 0.1  # share of the time from which on somebody waits
LABEL_WIDTH = len("samples/insert")
COLOURS = {"running": "green", "finished": "green", "failed": "red", "lost": "red"}
ENDINGS = {
    "finished": "it reached one of its limits",
    "stopped": "it was asked to stop; `resume` goes on with it",
    "failed": "an error ended it, which its output tells; `resume` goes on with it",
    "lost": "its process is gone; `resume` goes on with it",
}
LOSSES = {"loss": "total", "value_loss": "value", "reward_loss": "reward", "policy_loss": "policy"}


def ending(status: Status) -> str:
    """How a run that isn't at work has ended, in words."""
    state, reason = status["state"], status.get("reason")
    if reason and state == "finished":
        return reason
    if reason and state == "failed":
        return f"{reason}; `resume` goes on with it"
    return ENDINGS[state]


class Trails:
    """What a status said in the last minutes of the launch."""

    def __init__(self) -> None:
        self._past: deque[Status] = deque()

    def add(self, status: Status) -> None:
        now = status.get("seconds")
        if now is None:
            return
        if self._past and now < self._past[-1]["seconds"]:  # another launch
            self._past.clear()
        self._past.append(status)
        while self._past[0]["seconds"] <= now - TRAIL_SECONDS:
            self._past.popleft()

    def mean(self, key: str, seconds: float = WAITING_SECONDS) -> float | None:
        """Over the last seconds; None where nothing is known."""
        now = self._past[-1]["seconds"] if self._past else 0.0
        values = [
            past[key] for past in self._past if past.get(key) is not None and past["seconds"] > now - seconds
        ]
        return sum(values) / len(values) if values else None

    def sparkline(self, key: str, lowest: float | None = None) -> str:
        """The newest on the right; each character is a mean, blank where nothing was known.

        lowest: what the lowest bar stands for; default: the smallest mean.
        """
        slots: list[list[float]] = [[] for _ in range(TRAIL_WIDTH)]
        for past in self._past:
            if past.get(key) is not None:
                age = self._past[-1]["seconds"] - past["seconds"]
                slots[-1 - int(age / TRAIL_SECONDS * TRAIL_WIDTH)].append(past[key])
        means = [sum(slot) / len(slot) if slot else None for slot in slots]
        known = [mean for mean in means if mean is not None]
        if not known:
            return ""
        low, high = min(known) if lowest is None else lowest, max(known)
        steps = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
        bars = (" " if mean is None else SPARKS[round((mean - low) * steps)] for mean in means)
        return "".join(bars).strip()


def view(status: Status, trails: Trails, width: int) -> Panel:
    """The whole picture; what isn't known (yet, or to an older version) is left out."""
    state = str(status["state"])
    head = Text.assemble((state, f"bold {COLOURS.get(state, 'yellow')}"))
    if state in ENDINGS:
        head.append(f": {ending(status)}")
    if status.get("seconds") is not None:
        head.append(f" · {duration(status['seconds'])}")
    progress = Table.grid(padding=(0, 2))
    progress.add_column(style="dim", no_wrap=True, min_width=LABEL_WIDTH)
    progress.add_column(justify="right", no_wrap=True)
    progress.add_column(justify="right", no_wrap=True)
    progress.add_column(no_wrap=True)
    for row in progress_rows(status, trails):
        progress.add_row(*row)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True, min_width=LABEL_WIDTH)
    facts.add_column(overflow="fold")
    for label, text in fact_rows(status, trails):
        facts.add_row(label, text)
    return Panel(
        Group(head, "", progress, "", facts), title=str(status["run"]), title_align="left", width=width
    )


def progress_rows(status: Status, trails: Trails) -> list[tuple[str, str, str, str]]:
    """(label, number, rate, sparkline) of what grows, or should."""
    rows = []
    for label, key in (("env steps", "env_steps"), ("learner steps", "learner_steps")):
        rate = status.get(f"{key}_per_second")
        speed = "" if rate is None else f"{number(rate)} /s"
        rows.append(
            (label, number(status.get(key)), speed, trails.sparkline(f"{key}_per_second", lowest=0.0))
        )
    rows.append(("episodes", number(status.get("episodes")), "", ""))
    for label, key in (("mean return", "mean_return"), ("evaluation", "evaluation")):
        rows.append((label, number(status.get(key)), "", trails.sparkline(key)))
    if curriculum := status.get("curriculum"):
        rows.append(("stage", stage_text(curriculum), "", ""))
    # Of two players; of one, where games are won or not.
    for label, key in (("score", "score"), ("Elo", "elo"), ("solved", "solved")):
        if status.get(key) is not None:
            rows.append((label, number(status[key]), "", trails.sparkline(key)))
    return rows


def fact_rows(status: Status, trails: Trails) -> list[tuple[str, str]]:
    """(label, text) of everything else that is known."""
    rows = [
        ("processes", processes(status)),
        ("waiting", waiting(trails)),
        ("losses", " · ".join(losses(status))),
        ("staleness", text_of(status, "staleness", lambda value: f"{number(value)} versions of the weights")),
        ("samples/insert", text_of(status, "samples_per_insert", number)),
        ("restarts", restarts(status)),
        ("games lost", lost_games(status)),
        ("disk", text_of(status, "disk_free_bytes", lambda value: f"{size(value)} free")),
        ("checkpoint", text_of(status, "checkpoint_age_seconds", lambda value: f"{duration(value)} ago")),
        ("copy", text_of(status, "copy", copy_text)),
        ("metrics", text_of(status, "metrics", str)),
        ("folder", text_of(status, "folder", str)),
    ]
    return [(label, text) for label, text in rows if text]


def plain_line(status: Status, trails: Trails) -> str:
    """All that matters in one line."""
    state = str(status["state"])
    parts = [
        f"{status['run']} {state}" + (f": {ending(status)}" if state in ENDINGS else ""),
        text_of(status, "seconds", lambda value: f"time {duration(value)}"),
        *(
            " ".join(text for text in row[:2]) + (f" ({row[2]})" if row[2] else "")
            for row in progress_rows(status, trails)
            if row[1] != "–"
        ),
        *(
            f"{label} {text}"
            for label, text in fact_rows(status, trails)
            if label not in ("waiting", "folder")
        ),
        waiting(trails),
    ]
    return " · ".join(part for part in parts if part)


def text_of(status: Status, key: str, show: Callable[[Any], str]) -> str:
    """Nothing for what isn't known."""
    return "" if status.get(key) is None else show(status[key])


def processes(status: Status) -> str:
    """`4 of 4 actors live, 1 draining · 2 reanalysers · 1 shard`."""
    found = []
    if actors := status.get("actors"):
        more = [f"{actors[name]} {name}" for name in ("pending", "draining") if actors.get(name)]
        found.append(", ".join([f"{actors['live']} of {counted(actors['desired'], 'actor')} live", *more]))
    for name in ("reanalyser", "shard"):
        if status.get(f"{name}s"):
            found.append(counted(status[f"{name}s"], name))
    return " · ".join(found)


def waiting(trails: Trails) -> str:
    """Who waits for whom: the limiter makes the faster side wait."""
    shares = (
        ("actors_waiting", "the actors wait", "learner"),
        ("learner_waiting", "the learner waits", "actors"),
    )
    known = [(share, who, whom) for key, who, whom in shares if (share := trails.mean(key)) is not None]
    texts = [f"{who} {share:.0%} of the time for the {whom}" for share, who, whom in known if share >= WAITS]
    return ", ".join(texts) or ("nobody waits long" if known else "")


def losses(status: Status) -> list[str]:
    """`total 2.1`, `value 0.8` and so on."""
    known = status.get("losses") or {}
    return [f"{label} {number(known[name])}" for name, label in LOSSES.items() if name in known]


def restarts(status: Status) -> str:
    """By role, where that is known."""
    if (total := status.get("restarts")) is None:
        return ""
    roles = [
        counted(times, role.replace("_", " "))
        for role, times in status.get("restarts_by_role", {}).items()
        if times
    ]
    return ", ".join(roles) or (number(total) if total else "none")


def lost_games(status: Status) -> str:
    counts = (("undelivered", "undelivered_episodes"), ("rejected", "rejected_episodes"))
    return ", ".join(f"{number(status[key])} {name}" for name, key in counts if status.get(key) is not None)


def stage_text(curriculum: Mapping[str, Any]) -> str:
    """`2 of 5, won 87%`."""
    won, stage = curriculum.get("win_rate"), f"{curriculum['stage']} of {curriculum['num_stages']}"
    return stage if won is None else f"{stage}, won {share(won)}"


def copy_text(copy: Mapping[str, Any]) -> str:
    """Of a run at a URI."""
    age = copy.get("seconds_since_push")
    made = "none yet" if age is None or not math.isfinite(age) else f"{duration(age)} ago"
    return f"{made}, {counted(copy.get('failures', 0), 'failure')}"


def counted(count: int, thing: str) -> str:
    """`1 actor`, `2 actors`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """In its two largest units: `34 s`, `2 min 14 s`, `3 h 12 min`, `2 d 3 h`."""
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def size(num_bytes: float) -> str:
    """`12.3 GB`."""
    steps = min(int(math.log10(num_bytes) / 3), 4) if num_bytes >= 1 else 0
    return f"{number(num_bytes / 1000**steps)} {('B', 'kB', 'MB', 'GB', 'TB')[steps]}"
