"""How a sequence of tokens is read, without torch."""

from __future__ import annotations

from typing import NamedTuple

from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError

# Of actions on a slot that isn't there: exp(−200) is 0 in float32, and a target that falls there costs 200, not Inf.
CLOSED_LOGIT = -200.0


class Columns(NamedTuple):
    """Which columns of an observation are read how; a category with how many there are of it."""

    categories: tuple[tuple[int, int], ...]  # (column, size)
    numbers: tuple[int, ...]

    @property
    def num_features(self) -> int:
        """One for each category, and one for each number."""
        return sum(size for _, size in self.categories) + len(self.numbers)


class TokenLayout(NamedTuple):
    """What an observation [L, C] says: of each token, of them all, and how tokens refer to each other."""

    tokens: Columns
    whole: Columns  # the shared ones, and behind the last column one more: how many tokens there are
    indices: tuple[int, ...]
    links: tuple[int, ...]
    num_slots: int  # L
    num_actions_of_each: int  # R, of actions [L, R]


def token_layout(spec: EnvironmentSpec, history_length: int) -> TokenLayout:
    """The layout of an environment's observations. Raises ConfigError where they aren't one sequence of tokens."""
    columns = spec.token_columns
    if not columns:
        raise _unfit(spec, "has none (spec.token_columns is empty)", "Set network.name to mlp or resnet")
    if len(spec.observation_shape) != 2 or spec.observation_shape[1] != len(columns):
        raise _unfit(
            spec, f"shows {list(spec.observation_shape)} with {len(columns)} columns", "Let it show [L, C]"
        )
    if len(spec.action_shape) != 2 or spec.action_shape[0] != spec.observation_shape[0]:
        raise _unfit(spec, f"has actions {list(spec.action_shape)}", "Let them be [L, R], R for each token")
    first = columns[0]
    if first.kind != "category" or first.shared:
        said = f"shared {first.kind}" if first.shared else first.kind
        raise _unfit(
            spec,
            f"begins with {first.name!r}, a {said}",
            "Let it begin with each token's category, 0 = no token",
        )
    for column in columns:
        if column.kind == "index" and column.shared:
            raise _unfit(spec, f"shares the index {column.name!r}", "An index belongs to its token")
        if column.links and (column.kind != "category" or column.shared):
            raise _unfit(
                spec,
                f"links tokens by {column.name!r}, which isn't a category of each",
                "Take `links` off its TokenColumn",
            )
        if column.kind == "category" and column.size < 2:
            raise _unfit(
                spec,
                f"has size {column.size} for the category {column.name!r}",
                "Give its TokenColumn one of 2 or more",
            )
    if history_length != 1:
        raise ConfigError(
            f"networks 'node_sequence' read one observation, and environment.history_length is {history_length}; set "
            "it to 1, and let shared columns tell what was before"
        )
    whole = _columns(spec, True)
    return TokenLayout(
        _columns(spec, False),
        whole._replace(numbers=(*whole.numbers, len(columns))),
        tuple(place for place, column in enumerate(columns) if column.kind == "index"),
        tuple(place for place, column in enumerate(columns) if column.links),
        *spec.action_shape,
    )


def _columns(spec: EnvironmentSpec, shared: bool) -> Columns:
    chosen = [(place, column) for place, column in enumerate(spec.token_columns) if column.shared == shared]
    return Columns(
        tuple((place, column.size) for place, column in chosen if column.kind == "category"),
        tuple(place for place, column in chosen if column.kind == "number"),
    )


def _unfit(spec: EnvironmentSpec, came: str, advice: str) -> ConfigError:
    return ConfigError(f"networks 'node_sequence' read a sequence of tokens, and {spec.id} {came}. {advice}")
