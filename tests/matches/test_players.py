"""Players without a search: what they make of a network's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distributed_muzero.algorithm.acting import Game
from distributed_muzero.errors import NonFiniteError
from distributed_muzero.matches.players import PriorPlayer
from distributed_muzero.networks.base import FunctionNetworks
from distributed_muzero.networks.inference import make_search_model
from tests import games


def chosen(logits, *piles):
    model = make_search_model(FunctionNetworks(*games.constant_functions(2, logits=logits)))
    playing = [Game(games.Nim(pile), 1, None) for pile in piles]
    return PriorPlayer("prior", model).choose(playing, np.random.default_rng(1))


def test_the_highest_prior_of_a_legal_action_is_played():
    assert chosen([0.1, 0.2], 5, 1) == [1, 0]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused_with_their_row(wrong):
    """The second of the two actions is forbidden with one stone left."""
    with pytest.raises(
        NonFiniteError, match=r"the prior in row 1 isn't finite: logits \[0.5, .*legal \[True, True\]"
    ):
        chosen([0.5, wrong], 1, 5)
    assert chosen([0.5, wrong], 1, 1) == [0, 0]
