"""Each promise of a sequence of tokens is broken by a tiny environment, which fails that check and no other."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_muzero.environments.base import EnvironmentSpec, TokenColumn
from distributed_muzero.environments.checks import check_environment

COLUMNS = (
    TokenColumn("kind", "category", 3),
    TokenColumn("next", "index"),
    TokenColumn("size", "number"),
    TokenColumn("left", "category", 4, shared=True),
)


class Row:
    """Three tokens in five rows, each linked to the next one; a step takes the last one away, two end the game."""

    columns = COLUMNS
    action_shape = (5, 2)
    last_mask_row = 0

    def __init__(self):
        self.spec = EnvironmentSpec(
            "row", (5, len(COLUMNS)), np.dtype(np.float32), self.action_shape, token_columns=self.columns
        )

    def initial_state(self, seed=None):
        self.num_tokens = 3
        return self.observe()

    def step(self, action):
        if not 0 <= action < 10:
            raise ValueError(f"action {action}")
        self.num_tokens -= 1
        return 0.0, self.observe(), self.num_tokens == 1

    def mask(self):
        mask = np.zeros(self.action_shape, bool)
        mask[self.last_mask_row, 0] = True
        return mask

    def to_play(self):
        return 0

    @property
    def truncated(self):
        return False

    def close(self):
        pass

    def observe(self):
        observation = np.zeros(self.spec.observation_shape, np.float32)
        for row in range(self.num_tokens):
            observation[row, :3] = (1 + row % 2, row + 1 if row + 1 < self.num_tokens else -1, row / 2)
        observation[:, 3] = self.num_tokens
        self.spoil(observation)
        return observation

    def spoil(self, observation):
        pass


def spoilt(at, number):
    def spoil(self, observation):
        observation[at] = number

    return type("Spoilt", (Row,), {"spoil": spoil})


def with_spec(**members):
    return type("Other", (Row,), members)


BROKEN = [
    ("tokens", spoilt((0, 0), 0), "step 0, seed 1: row 0 is empty, and a token comes after it"),
    ("tokens", spoilt((slice(None), slice(None)), 0), "no token; expected one or more"),
    ("tokens", spoilt((1, 0), 3), "column kind holds 3; expected whole numbers from 0 to 2"),
    ("tokens", spoilt((0, 0), 0.5), "column kind holds 0.5"),
    ("tokens", spoilt((0, 1), 4), "column next holds 4; expected whole numbers from -1 to 2"),
    ("tokens", spoilt((0, 1), -2), "column next holds -2"),
    ("tokens", spoilt((4, 2), 1), "column size: not 0 in an empty row"),
    ("tokens", spoilt((4, 3), 0), "column left is shared, and differs between rows"),
    ("tokens", with_spec(last_mask_row=3), "mask allows something to row 3, in which no token is"),
    ("spec", with_spec(action_shape=(4, 2)), r"action_shape is \(4, 2\); expected \(5, R\)"),
    ("spec", with_spec(action_shape=(10,)), r"action_shape is \(10,\)"),
    ("spec", with_spec(columns=COLUMNS[:3]), r"observations \(5, 4\) with 3 token columns"),
    ("spec", with_spec(columns=COLUMNS[::-1]), "first column is .*expected a category of each token"),
    ("spec", with_spec(columns=COLUMNS[:3] + COLUMNS[2:3]), "two columns have one name"),
    (
        "spec",
        with_spec(columns=(*COLUMNS[:3], TokenColumn("left", "category", 1))),
        "left: 1 categories; expected 2",
    ),
    ("spec", with_spec(columns=(*COLUMNS[:3], TokenColumn("left", "word"))), "left: kind 'word'"),
    (
        "spec",
        with_spec(columns=(*COLUMNS[:3], TokenColumn("left", "index", shared=True))),
        "left: a shared index",
    ),
]


def check(make):
    report = check_environment(make, max_episode_steps=10, num_games=3)
    return report, {row.name: row.detail for row in report.checks if row.passed is False}


@pytest.mark.parametrize(("name", "make", "message"), BROKEN)
def test_a_broken_promise_fails_its_check_and_no_other(name, make, message):
    _, found = check(make)
    assert found.keys() == {name}
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[name])


def test_a_sound_sequence_keeps_all_promises():
    report, found = check(Row)
    assert not found
    details = {row.name: row.detail for row in report.checks}
    assert details["tokens"] == "1 to 3 of them, first, in range; nothing can be done to empty rows"
    assert details["spec"].endswith("4 columns of up to 5 tokens")
