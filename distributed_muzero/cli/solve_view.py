"""What `solve` prints: the problem, a line for each step, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from distributed_muzero.config import SearchConfig
    from distributed_muzero.workers.solving import Branch, Step

REASONS = {
    "moves": "no moves are left (--max-moves gives more)",
    "visits": "an expression came back too often",
    "nodes": "the expression became too long",
    "stuck": "mathy knows no rule that leads on",
    None: "the run's environment.max_episode_steps cut it",
}


class View:
    """One problem on standard output."""

    def __init__(self, problem: str, console: Console | None = None):
        self.console = console or Console()
        self._problem = problem

    def introduce(self, title: str, search: SearchConfig, read_as: str) -> None:
        """read_as: the problem as it was understood, told if that isn't what was typed but for spaces."""
        self._say(Text(f"{title}, {search.num_simulations} simulations ({search.policy})", "dim"))
        if "".join(read_as.split()) != "".join(self._problem.split()):
            self._say(Text(f"read as: {read_as}"))

    def tell(self, steps: Sequence[Step]) -> None:
        """The problem and all steps in columns, and below each step what its search tried, if it holds that."""
        width = max(map(len, [self._problem, *(step.expression for step in steps)]))
        columns = f"{'value':>7}  rule: applied to"
        self._say(Text.assemble((f"  {self._problem:{width}}", "bold"), (columns, "dim")))
        rows = [list(_rows(step.tree)) for step in steps]
        tree_width = max((len(action) for tree in rows for action, _ in tree), default=0)
        for step, tree in zip(steps, rows, strict=True):
            self._say(
                Text.assemble(
                    (f"= {step.expression:{width}}", "bold"),
                    (f"{step.value:+7.2f}  ", "dim"),
                    (step.rule, "cyan"),
                    f": {step.node}",
                )
            )
            for action, numbers in tree:
                self._say(Text(f"{action:{tree_width}}  {numbers}", "dim"))

    def tell_end(self, num_steps: int, solved: bool, end: str | None, trained_on: str) -> None:
        """trained_on: the environment in which the run has learnt."""
        moves = "1 move" if num_steps == 1 else f"{num_steps} moves"
        if solved:
            self._say(Text(f"solved in {moves}", "bold green"))
            return
        self._say(Text(f"not solved in {moves}: {REASONS.get(end, end)}", "bold red"))
        if end is not None:
            helps = f"a run that was trained for longer, or on such problems: this run's are {trained_on}'s"
            self._say(Text(f"What helps is {helps}."))

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def _rows(branches: Sequence[Branch], level: int = 1) -> Iterator[tuple[str, str]]:
    """(action, numbers) of each branch, indented by its level."""
    for branch in branches:
        numbers = f"visits {branch.visits:5}  prior {branch.prior:4.0%}  Q {branch.qvalue:+6.2f}"
        yield "    " * level + branch.action, numbers
        yield from _rows(branch.branches, level + 1)
