"""What a person who plays sees and types: in colour on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from distributed_muzero.config import SearchConfig
    from distributed_muzero.matches.person import Move, Opinion, Outcome, PersonGame

KEYS = {
    **dict.fromkeys(("?", "help"), "moves"),
    **dict.fromkeys(("h", "hint"), "hint"),
    **dict.fromkeys(("u", "undo"), "undo"),
    **dict.fromkeys(("r", "resign"), "resign"),
    **dict.fromkeys(("q", "quit"), "quit"),
}
HELP = "? lists the moves, h gives a hint, u takes back, r resigns, q quits"
TOP_MOVES = 5
LISTED_MOVES = 400
ECHOED_CHARACTERS = 40
MAX_LINE = 10_000  # characters of an answer; what is over begins the next one


def find_move(text: str, names: Mapping[int, str]) -> int | None:
    """The action of that name, else of that number; None if there is none, or several.

    Names count as they are written first, as a chess player means different moves by Bxc3 and bxc3; then without regard
    to case and spaces.
    """
    for fold in (str.strip, _fold):
        found = [action for action, name in names.items() if fold(name) == fold(text)]
        if len(found) == 1:
            return found[0]
    return int(text) if text.isdecimal() and len(text) < 10 and int(text) in names else None


class View:
    """One game on standard output, and the answers from standard input."""

    def __init__(self, game: PersonGame, console: Console | None = None):
        self.game = game
        self.console = console or Console()
        self.has_opponent = game.game.alternates
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), soft_wrap=True)

    def introduce(self, title: str, search: SearchConfig, seed: int) -> None:
        self.say(f"{title}, {search.num_simulations} simulations ({search.policy}), seed {seed}", "bold")
        if self.has_opponent:
            self.say(f"you play {'first' if self.game.begins else 'second'}")
        self.say(f"a move is its name or its number; {HELP}", "dim")

    def ask(self) -> str | None:
        """The next line, without spaces around it; None at the end of the input."""
        if sys.stdin is None:
            return None
        if sys.stdin.isatty():
            try:
                return input("your move: ").strip()
            except EOFError:
                self.say("")
                return None
        line = sys.stdin.readline(MAX_LINE)
        self.say(f"your move: {line.strip()[:ECHOED_CHARACTERS]}")
        return line.strip() if line else None

    def show_position(self, title: str) -> None:
        board = Text(self.game.describe().rstrip("\n"))
        if self.console.is_terminal:
            self.console.print(Panel.fit(board, title=title, padding=(0, 2)))
        else:
            self.say(f"\n{title}")
            self.console.print(board, soft_wrap=True)

    def show_moves(self, names: Mapping[int, str]) -> None:
        shown = [_numbered(action, name) for action, name in list(names.items())[:LISTED_MOVES]]
        self.console.print(Columns(map(Text, shown), padding=(0, 3)))
        if len(names) > len(shown):
            self.say(f"and {len(names) - len(shown)} more")
        self.say(HELP, "dim")

    def show_opinion(self, opinion: Opinion) -> None:
        """To whoever is to move: the moves with the largest shares of the search's policy."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True)
        table.add_row("  move", "share", "value", "prior", style="dim")
        legal = sorted(self.game.legal_actions(), key=lambda action: -opinion.policy[action])
        for action in legal[:TOP_MOVES]:
            name = Text(f"  {_numbered(action, self.game.action_name(action))}")
            qvalue = "-" if math.isnan(opinion.qvalues[action]) else f"{opinion.qvalues[action]:+.2f}"
            share, prior = (f"{part[action]:.0%}" for part in (opinion.policy, opinion.priors))
            table.add_row(name, share, qvalue, prior)
        whom = "you" if self.game.is_persons_turn else "it"
        best = _numbered(opinion.action, self.game.action_name(opinion.action))
        self.say(f"the search: value {opinion.value:+.2f} for {whom}, it would play {best}", "cyan")
        self.console.print(table)

    def tell_own(self, move: Move) -> None:
        self.say(f"you play {move.name}")

    def tell_answer(self, move: Move, opinion: Opinion) -> None:
        self.say(
            f"it plays {_numbered(move.action, move.name)}, value {opinion.value:+.2f} for it", "bold cyan"
        )

    def tell_idle(self, move: Move) -> None:
        whom = "you have" if move.player == self.game.person else "it has"
        self.say(f"{whom} nothing to do but {move.name}", "dim")

    def tell_taken_back(self, number: int) -> None:
        self.say(f"taken back: {_moves(number)}" if number else "there is no move of yours to take back yet")

    def tell_wrong(self, text: str, names: Mapping[int, str]) -> None:
        example = _numbered(*next(iter(names.items())))
        shown = text if len(text) <= ECHOED_CHARACTERS else f"{text[:ECHOED_CHARACTERS]}…"
        self.say(
            f"{shown!r} is no legal move: expected a name or number, such as {example}, or one of ? h u r q",
            "red",
        )

    def tell_left(self, reason: str) -> None:
        self.say(f"{reason}: the game ends here, after {_moves(self.game.num_moves)}")

    def tell_end(self) -> None:
        self.show_position("the end")
        self.say(
            f"{verdict(self.game.outcome(), self.has_opponent)} after {_moves(self.game.num_moves)}", "bold"
        )


def verdict(outcome: Outcome, has_opponent: bool) -> str:
    """How a game ended, to the person: `you win`."""
    if outcome.ended == "resigned":
        return "you resign: the search wins" if has_opponent else "you give up"
    cut = ", cut by the environment's limit" if outcome.ended == "cut" else ""
    if not has_opponent:
        return f"the game is over with a return of {outcome.score:g}{cut}"
    if outcome.score == 0:
        return f"a draw{cut}"
    winner = "you win" if outcome.score > 0 else "the search wins"
    margin = "" if abs(outcome.score) == 1 else f" by {abs(outcome.score):g}"
    return f"{winner}{margin}{cut}"


def _numbered(action: int, name: str) -> str:
    return name if name == str(action) else f"{action} {name}"


def _moves(number: int) -> str:
    return "1 move" if number == 1 else f"{number} moves"


def _fold(text: str) -> str:
    return "".join(text.split()).casefold()
