"""What `solve` prints: the problem, a line for each step, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from distributed_muzero.config import SearchConfig
    from distributed_muzero.workers.solving import Branch, Step

WIDEST = 60  # that the column of expressions may get; longer ones push the rest to the right
ROOM = 12  # that it begins with beyond the problem's length, so that most steps stand in line
TREE_ROOM = 24  # that names of actions take besides
HARDER = "more --simulations, the other --search-policy, or a run that was trained for longer"
REASONS = {
    "moves": f"no moves are left; try --max-moves, {HARDER}",
    "visits": f"an expression came back too often; try {HARDER}",
    "nodes": f"the expression became too long; try {HARDER}",
    None: "the run's environment.max_episode_steps cut it",
}


class View:
    """One problem on standard output, each step as soon as it is made."""

    def __init__(self, problem: str, console: Console | None = None):
        self.console = console or Console()
        self._problem = problem
        self._width = min(len(problem) + ROOM, WIDEST)
        self._num_steps = 0

    def introduce(self, title: str, search: SearchConfig) -> None:
        self._say(Text(f"{title}, {search.num_simulations} simulations ({search.policy})", "dim"))
        columns = f"{'value':>7}  rule: applied to"
        self._say(Text.assemble((f"  {self._problem:{self._width}}", "bold"), (columns, "dim")))

    def tell(self, step: Step) -> None:
        """A step, and below it what its search tried, if it holds that."""
        self._num_steps += 1
        self._width = max(self._width, min(len(step.expression), WIDEST))
        self._say(
            Text.assemble(
                (f"= {step.expression:{self._width}}", "bold"),
                (f"{step.value:+7.2f}  ", "dim"),
                (step.rule, "cyan"),
                f": {step.node}",
            )
        )
        self._tell_branches(step.tree, 1)

    def tell_end(self, solved: bool, end: str | None) -> None:
        moves = "1 move" if self._num_steps == 1 else f"{self._num_steps} moves"
        if solved:
            self._say(Text(f"solved in {moves}", "bold green"))
        else:
            why = REASONS.get(end, f"{end}; try {HARDER}")
            self._say(Text(f"not solved in {moves}: {why}", "bold red"))

    def _tell_branches(self, branches: Sequence[Branch], level: int) -> None:
        for branch in branches:
            action = "    " * level + branch.action
            numbers = f"visits {branch.visits:5}  prior {branch.prior:4.0%}  Q {branch.qvalue:+6.2f}"
            self._say(Text(f"{action:{self._width + TREE_ROOM}}  {numbers}", "dim"))
            self._tell_branches(branch.branches, level + 1)

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)
