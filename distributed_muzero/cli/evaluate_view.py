"""What `evaluate` prints of a match, and of every position of a game."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN_MISTAKES = 3
TITLE: dict[str, Any] = {"style": "italic", "soft_wrap": True, "markup": False, "highlight": False}
COLUMNS = ("games", "wins", "draws", "losses", "score")


def print_match(result: Mapping[str, Any]) -> None:
    """A row for each colour and one for both, then the difference of ratings."""
    console = Console()
    console.print(f"{who(result)} against {result['opponent']}", **TITLE)
    table = Table(min_width=60)
    table.add_column("", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for label, counts in (
        ("as first", result["as_first"]),
        ("as second", result["as_second"]),
        ("both", {key: result[key] for key in ("wins", "draws", "losses")}),
    ):
        table.add_row(label, *_row(counts), style="bold" if label == "both" else None)
    console.print(table)
    low, high = result["elo_interval"]
    console.print(
        f"Elo difference {_elo(result['elo_difference'], 'beyond all')} "
        f"(95%: {_elo(low, 'no lower end')} … {_elo(high, 'no upper end')})",
        highlight=False,
    )
    console.print(
        f"{result['mean_plies']:.1f} moves a game, {_openings(result['opening_plies'])}, {result['truncated']} cut by "
        f"the limit of steps; {result['seconds']:.1f} s",
        highlight=False,
    )


def print_exact(result: Mapping[str, Any], rules: Any) -> None:
    """Counts and shares, then the first mistakes with their boards.   rules: OpenSpiel's game."""
    start = result["start"]
    console = Console()
    console.print(f"{who(result)} in every position", **TITLE)
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for label, text in (
        ("positions that aren't lost", f"{result['positions']:,}"),
        ("  from which some replies beat it", f"{result['losses']:,}"),
        ("  in which its move gives something away", f"{result['mistakes']:,}"),
        ("share of optimal moves", _percent(result["optimal_move_share"])),
        ("positions in which not every move is optimal", f"{result['decisive_positions']:,}"),
        ("share of optimal moves there", _percent(result["decisive_optimal_share"])),
        ("value of the game for who begins", f"{start['value']:g}"),
        ("at worst, as first", start["as_first"]),
        ("at worst, as second", start["as_second"]),
    ):
        table.add_row(label, text)
    console.print(table)
    for mistake in result["first_mistakes"][:SHOWN_MISTAKES]:
        console.print(describe_mistake(rules, mistake), markup=False, highlight=False)
    if result["history_length"] > 1:
        console.print(
            f"The networks see {result['history_length']} observations: each position is shown after one of the ways "
            "that lead there."
        )
    console.print(f"{result['seconds']:.1f} s", highlight=False)


def describe_alone(result: Mapping[str, Any]) -> str:
    """Games in an environment for one, in a line."""
    solved = f", {result['solved']:.1%} solved" if "solved" in result else ""
    return (
        f"evaluation of {who(result)}, weights version {result['weights_version']}, in {result['environment']}: "
        f"{result['episodes']} games without noise, mean return {result['mean_return']:.2f} ± "
        f"{result['std_return']:.2f}{solved}"
    )


def who(result: Mapping[str, Any]) -> str:
    searched = result["simulations"]
    manner = f"{searched} simulations, {result['search_policy']}" if searched else "without a search"
    return f"{result['run']}/{result['checkpoint']} ({manner})"


def describe_mistake(rules: Any, mistake: Mapping[str, Any]) -> str:
    """The board, the move and those that would have been better, in the game's own words."""
    state = rules.new_initial_state()
    for action in mistake["moves"]:
        state.apply_action(action)
    player = state.current_player()
    played, *optimal = (
        state.action_to_string(player, action) for action in (mistake["played"], *mistake["optimal"])
    )
    return (
        f"\n{state}\nplayer {player} plays {played} (value {mistake['value']:g} becomes {mistake['value_after']:g}); "
        f"optimal: {', '.join(optimal)}"
    )


def _row(counts: Mapping[str, int]) -> Sequence[str]:
    games = sum(counts.values())
    score = (counts["wins"] + counts["draws"] / 2) / games
    return [str(games), *(str(counts[key]) for key in ("wins", "draws", "losses")), f"{score:.3f}"]


def _elo(difference: float | None, without: str) -> str:
    return without if difference is None else f"{difference:+.0f}"


def _openings(plies: int) -> str:
    return f"after 0 to {plies} random moves" if plies else "from the start position"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.2f}%"
