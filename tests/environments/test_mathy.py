"""Mathy's environments: held against plain mathy_envs move by move, and against numbers read off an expression."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from distributed_muzero.config import EnvironmentConfig
from distributed_muzero.environments.checks import check_environment
from distributed_muzero.environments.registry import environment_ids, make_environment
from distributed_muzero.errors import EnvironmentFailure, UnknownEnvironmentError

pytest.importorskip("mathy_envs", reason="mathy isn't installed: pip install 'distributed_muzero[mathy]'")

from mathy_core.parser import ExpressionParser
from mathy_core.rules import DistributiveFactorOutRule

from distributed_muzero.environments.mathy_games import (
    TOPICS,
    make_rules,
    read_name,
    read_options,
    trainable_games,
)
from distributed_muzero.environments.mathy_moves import can_factor_out
from tests.environments.plain_mathy import PlainMathy

ARITHMETIC, COMMUTE, _, FACTOR_OUT, ASSOCIATE, _, _ = range(7)
RULES = 7
SIMPLIFYING = [0, 3, 5]  # constant arithmetic, distributive factoring, variable multiplication


def make(game, max_episode_steps=10_000, **kwargs):
    return make_environment(
        EnvironmentConfig(id=f"mathy:{game}", max_episode_steps=max_episode_steps, kwargs=kwargs)
    )


def make_plain(game, environment, **kwargs):
    """Plain mathy at the position in which the environment's game has begun."""
    config = EnvironmentConfig(id=f"mathy:{game}", kwargs=kwargs)
    topic, _ = read_name(config.id)
    return PlainMathy(
        make_rules(topic, read_options(config, topic)),
        environment.expression,
        environment._state.max_moves,
    )


def wins(environment, seed):
    """Plays a game, mostly with moves that simplify where there are any; returns whether it was won."""
    rng = np.random.default_rng(seed)
    environment.initial_state(seed)
    is_terminal = False
    while not is_terminal:
        mask = environment.mask()
        if mask[:, SIMPLIFYING].any() and rng.random() < 0.7:
            mask[:, [rule for rule in range(RULES) if rule not in SIMPLIFYING]] = False
        _, _, is_terminal = environment.step(int(rng.choice(np.flatnonzero(mask))))
    return environment.won


def play_beside_plain(game, num_games, **kwargs):
    """Random games in both; returns the ends."""
    environment = make(game, **kwargs)
    ends = []
    for seed in range(num_games):
        rng = np.random.default_rng(seed)
        environment.initial_state(seed)
        plain = make_plain(game, environment, **kwargs)
        is_terminal = False
        while not is_terminal:
            mask, expected = environment.mask(), plain.mask()
            assert (mask[: len(expected)] == expected).all() and not mask[len(expected) :].any()
            token, rule = divmod(int(rng.choice(np.flatnonzero(mask))), RULES)
            reward, _, is_terminal = environment.step(token * RULES + rule)
            seen = (reward, environment.expression, is_terminal)
            if environment.end in ("nodes", "stuck"):
                break
            assert seen == plain.step(rule, token), f"seed {seed}"
        ends.append(environment.end)
    return ends


@pytest.mark.parametrize("game", trainable_games())
def test_the_same_moves_lead_to_the_same_as_in_plain_mathy(game):
    play_beside_plain(game, 2)


ODD = [
    "4x + 2x + 7 - 3",
    "-(4 + 2)x - -y",
    "sgn(x) + 3! + 2x",
    "(x + y)(x - y)",
    "2.5x + 0.5x + 0.5x",
    "x / 2 + x / 2 - 4 / 0",
    "x * -4 - -2x^2 + x^2 * x^3",
    "7 * (10y^3 * x) * 2y",
    "0x + 4x",
]


@pytest.mark.parametrize("problem", ODD)
def test_any_expression_is_played_as_plain_mathy_plays_it(problem):
    assert set(play_beside_plain("poly-easy", 3, problem=problem, max_moves=12)) <= {"won", "moves", "visits"}


def test_all_ways_to_end_are_met_in_plain_mathy_too():
    assert {"won", "moves", "visits"} <= set(play_beside_plain("complex-easy", 12))


def test_factoring_out_is_allowed_where_mathy_allows_it():
    terms = [
        f"{number}{variable}{power}"
        for number in ("", "-3", "0", "0.5", "1", "6", "15")
        for variable, power in (("", ""), ("x", ""), ("x", "^2"), ("x", "^0"), ("y", "^2"))
        if number or variable
    ]
    rule, parser = DistributiveFactorOutRule(), ExpressionParser()
    num_allowed = 0
    for left, right in itertools.product(terms, terms):
        node = parser.parse(f"{left} + {right}")
        assert can_factor_out(rule, node) == rule.can_apply_to(node), node
        num_allowed += can_factor_out(rule, node)
    assert 0 < num_allowed < len(terms) ** 2


def test_a_number_too_large_to_look_for_its_factors_can_not_be_factored_out():
    environment = make("poly-easy", problem="9999999999999999999x + 2x")
    environment.initial_state()
    assert not environment.mask()[:, FACTOR_OUT].any() and environment.mask()[:, COMMUTE].any()


def test_tokens_are_seen_in_order_with_what_holds_them_together():
    environment = make("poly-easy", problem="4x + 2z^40", max_nodes=12)
    observation = environment.initial_state()
    columns = {
        column.name: values
        for column, values in zip(environment.spec.token_columns, observation.T, strict=True)
    }
    # 4 * x + 2 * z ^ 40, the numbers of the tokens: 0 1 2 3 4 5 6 7 8
    tokens = {
        "token": [1, 5, 2, 3, 1, 5, 2, 7, 1],
        "letter": [0, 0, 24, 0, 0, 0, 26, 0, 0],
        "small_constant": [5, 0, 0, 0, 3, 0, 0, 0, 33],
        "side": [1, 1, 2, 0, 1, 2, 1, 2, 2],
        "parent": [1, 3, 1, -1, 5, 3, 7, 5, 7],
        "left": [-1, 0, -1, 1, -1, 4, -1, 6, -1],
        "right": [-1, 2, -1, 5, -1, 7, -1, 8, -1],
        "can_cs": [0, 0, 0, 1, 0, 0, 0, 0, 0],
        "can_df": [0] * 9,
    }
    for name, expected in tokens.items():
        assert columns[name].tolist() == expected + [0] * 3, name
    assert columns["log_constant"][[0, 4, 8]] == pytest.approx(np.log([5, 3, 41]))
    assert columns["depth"][:9] == pytest.approx([0.2, 0.1, 0.2, 0, 0.2, 0.1, 0.3, 0.2, 0.3])
    assert (columns["time"] == 0).all() and columns["visits"] == pytest.approx(1 / 4)
    assert columns["moves_left"] == pytest.approx(8 / 20)  # two terms, four moves for each
    _, after, _ = environment.step(3 * RULES + COMMUTE)
    assert environment.expression == "2z^40 + 4x"
    names = [column.name for column in environment.spec.token_columns]
    assert after[:, names.index("time")] == pytest.approx(1 / 8)
    assert after[:, names.index("moves_left")] == pytest.approx(7 / 20)


def test_which_topic_it_is_can_be_seen():
    hashes = set()
    for topic in TOPICS:
        observation = make(f"{topic}-easy").initial_state(1)
        hashes.add(tuple(observation[0, -2:]))
    assert len(hashes) == len(TOPICS)


def test_a_game_is_won_by_the_moves_that_a_person_would_make():
    environment = make("poly-easy", problem="4x + 2x", max_moves=12)
    environment.initial_state()
    assert environment.describe() == "4x + 2x\n12 of 12 moves left"
    assert environment.action_name(3 * RULES + FACTOR_OUT) == "distributive factoring at 3: 4x + 2x"
    reward, _, is_terminal = environment.step(3 * RULES + FACTOR_OUT)
    assert (reward, environment.expression, is_terminal) == (0.01, "(4 + 2) * x", False)
    assert environment.read_action(1 * RULES + ARITHMETIC) == ("constant arithmetic", 1)
    assert environment.part(1 * RULES + ARITHMETIC) == "(4 + 2)" and not environment.won
    reward, _, is_terminal = environment.step(1 * RULES + ARITHMETIC)
    # 1 and a bonus: 1 / moves, twice that as they are less than half of more than ten
    assert (reward, environment.expression, is_terminal) == (2.0, "6x", True)
    assert (environment.won, environment.end, environment.truncated) == (True, "won", False)
    with pytest.raises(EnvironmentFailure, match=r"initial_state\(\) first"):
        environment.step(0)


def test_a_fourth_visit_loses_and_a_return_costs_more_each_time():
    environment = make("poly-easy", problem="4x + 2x", max_moves=20)
    environment.initial_state()
    rewards = [environment.step(3 * RULES + COMMUTE)[0] for _ in range(6)]
    assert rewards == pytest.approx([-0.01, -0.04, -0.04, -0.06, -0.06, -1.0])
    assert (environment.end, environment.won, environment.truncated) == ("visits", False, False)


def test_the_last_move_loses():
    environment = make("poly-easy", problem="4x + 2x", max_moves=1)
    environment.initial_state()
    assert environment.step(3 * RULES + COMMUTE)[::2] == (-1.0, True)
    assert environment.end == "moves" and not environment.truncated


def test_too_many_nodes_lose_and_the_move_is_not_made():
    problem = "2 * (x + y)"
    environment = make("poly-commute-easy", problem=problem, max_nodes=5)
    environment.initial_state()
    reward, observation, is_terminal = environment.step(1 * RULES + 2)  # 2x + 2y has seven
    assert (reward, is_terminal, environment.end, environment.expression) == (-1.0, True, "nodes", problem)
    assert np.count_nonzero(observation[:, 0]) == 5
    wider = make("poly-commute-easy", problem=problem, max_nodes=7)
    wider.initial_state()
    assert not wider.step(1 * RULES + 2)[2] and wider.expression == "2x + 2y"


def test_an_expression_to_which_no_rule_applies_loses():
    environment = make("poly-commute-easy", problem="2^3")
    environment.initial_state()
    assert environment.step(1 * RULES + ARITHMETIC)[::2] == (-1.0, True)
    assert (environment.end, environment.expression) == ("stuck", "8")


def test_a_game_longer_than_the_limit_of_the_config_is_truncated():
    environment = make("poly-easy", max_episode_steps=1, problem="4x + 2x")
    environment.initial_state()
    assert environment.step(3 * RULES + COMMUTE)[2]
    assert environment.truncated and environment.end is None


def test_forbidden_actions_are_refused():
    environment = make("poly-easy", problem="4x + 2x")
    environment.initial_state()
    for action in (-1, 0, 7 * RULES, 64 * RULES):
        with pytest.raises(EnvironmentFailure, match=f"step 0: action {action} is forbidden"):
            environment.step(action)
    with pytest.raises(EnvironmentFailure, match="token 7; expected 0 to 6"):
        environment.part(7 * RULES)


def test_a_move_at_which_mathy_fails_is_told():
    environment = make("poly-easy", problem="2^-1 + x")
    environment.initial_state()
    with pytest.raises(
        EnvironmentFailure, match=r"mathy fails at constant arithmetic of token 1 in 2\^-1 \+ x: Val"
    ):
        environment.step(1 * RULES + ARITHMETIC)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            "2^64",
            r"mathy can't compute '2\^64': its constant arithmetic gives 0, which is wrong; give smaller",
        ),
        ("7^30", "its constant arithmetic gives 1576789505350337489, which is wrong"),
        ("2^-1", r"mathy can't compute '2\^-1': its constant arithmetic fails; .* exponents from 0 on"),
        ("-8^0.5", "gives nan, which is wrong"),
        ("5/0", r"the problem '5/0' has no value, or too large a one \(it divides by zero\)"),
        ("1 / (x - x) + 2", "it divides by zero"),
        ("2^99999999999 + x", "a power is too large"),
        ("2.5! + x", r"2\.5! is no factorial of a whole number"),
        ("xy^2", r"misreads the problem 'xy\^2' as y\^2 \* x \* y; write \* between factors"),
        ("a/(b/c)", r"loses brackets of the problem 'a/\(b/c\)': it writes a / b / c"),
        ("(2x)^2 + x", r"it writes 2x\^2 \+ x"),
        ("1.5^400", "isn't known within"),
        ("x - 4^2 + 3x + x^0.5 + 10^15", "value isn't known within 1e-06"),
    ],
)
def test_a_problem_that_mathy_gets_wrong_is_refused_where_moves_must_be_right(problem, message):
    with pytest.raises(EnvironmentFailure, match=message):
        make("poly-easy", problem=problem, sound=True)


@pytest.mark.parametrize(
    ("problem", "part", "wrong"),
    [
        ("2^64 + 3", "2^64", "0 + 3"),
        ("2^-1 + x", "2^-1", None),
        ("x - 4^2", "- 4^2", "x + -4^2"),  # mathy reads that as x + (-4)^2
        ("7 - (2 + x)", "- (2 + x)", "7 + (-2 + x)"),
        ("x - 4^2 + 3x + 0.5y + 10^15", "- 4^2", "x + -4^2 + 3x + 0.5y + 10^15"),
        ("x - 4^2 + x^0.5 + 10^5", "- 4^2", "x + -4^2 + x^0.5 + 10^5"),
    ],
)
def test_moves_that_mathy_gets_wrong_are_forbidden_where_asked_for(problem, part, wrong):
    loose, sound = make("poly-easy", problem=problem), make("poly-easy", problem=problem, sound=True)
    for environment in (loose, sound):
        environment.initial_state()
    [left_out] = np.flatnonzero(loose.mask() & ~sound.mask())
    assert loose.part(left_out) == part
    assert loose._results[problem][divmod(left_out, RULES)] == wrong


@pytest.mark.parametrize(
    "problem",
    ["1/3", "0.1 + 0.2", "9999999999999999999 + 1", "2^62", "(0 - 8)^0.5", "1.5^20", "3! * x + sgn(x)"],
)
def test_arithmetic_within_rounding_is_right(problem):
    loose, sound = make("poly-easy", problem=problem), make("poly-easy", problem=problem, sound=True)
    for environment in (loose, sound):
        environment.initial_state()
    assert (sound.mask() == loose.mask()).all()


def test_an_environment_without_wrong_moves_keeps_its_promises():
    kwargs = {"problem": "x - 4^2 + 2x + 7 - (2 + x)", "sound": True}
    report = check_environment(lambda: make("poly-easy", 100, **kwargs), max_episode_steps=100, num_games=4)
    assert [row for row in report.checks if not row.passed] == []


@pytest.mark.parametrize("game", trainable_games())
def test_every_environment_can_be_won(game):
    environment = make(game)
    assert any(wins(environment, seed) for seed in range(20))


def test_the_haystack_could_not_be_won_as_mathy_makes_it():
    """Terms such as 4x can't be commuted there, so that nothing can be done to them."""
    environment = make("poly-like-terms-haystack-easy", preferred_term_commute=False)
    environment.initial_state(1)
    names = [column.name for column in environment.spec.token_columns]
    for seed in range(10):
        observation = environment.initial_state(seed)
        products = observation[:, names.index("token")] == 5
        assert products.any() and not environment.mask()[products].any()


@pytest.mark.parametrize("game", ["poly-easy", "poly-like-terms-haystack-normal", "poly-combine-hard"])
def test_all_promises_are_kept(game):
    report = check_environment(lambda: make(game, 100), max_episode_steps=100, num_games=4)
    assert [row for row in report.checks if not row.passed] == []


def test_rules_leave_numpys_and_pythons_settings_alone():
    with np.errstate(invalid="raise"):
        state = random.getstate()
        wins(make("poly-easy"), 3)
        assert np.geterr()["invalid"] == "raise" and random.getstate() == state


def test_all_are_listed():
    assert len(trainable_games()) == 24
    listed = [entry.id for entry in environment_ids() if entry.family == "mathy"]
    assert listed == [f"mathy:{game}" for game in trainable_games()]


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ("poly-eazy", r"no such topic and difficulty \(did you mean 'poly-easy'"),
        ("poly", "has the topics binomial, complex, poly, .*each with -easy, -normal, -hard"),
        ("poly", r"\(did you mean 'poly-easy' or 'poly-normal' or 'poly-hard'\?\)"),
        ("Poly-Hard", "did you mean 'poly-hard'"),
        ("", "no such topic and difficulty; mathy has"),
    ],
)
def test_unknown_topics_get_the_nearest_name(game, message):
    with pytest.raises(UnknownEnvironmentError, match=message):
        make(game)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_node": 3}, r"no option 'max_node' \(did you mean 'max_nodes'\?\)"),
        ({"max_nodes": 0}, "max_nodes is 0; expected a whole number from 1 to 200"),
        ({"max_nodes": 201}, "max_nodes is 201"),
        ({"max_nodes": True}, "max_nodes is True"),
        ({"max_moves": 1.5}, "max_moves is 1.5; expected a whole number from 1 to 1000"),
        ({"problem": 7}, "problem is 7; expected an expression"),
        ({"problem": " "}, "problem is ' '"),
        ({"problem": "4x + "}, r"problem '4x \+ ' is no expression \(UnexpectedBehavior: .*write it as"),
        ({"problem": "x $ y"}, "is no expression .*Invalid token"),
        ({"problem": "-(-x)"}, "is no expression"),
        ({"problem": "(" * 300 + "x" + ")" * 300}, "is no expression .*RecursionError"),
        ({"problem": "4x + 2x", "max_nodes": 6}, "has 7 nodes, max_nodes is 6"),
        ({"problem": "4x"}, "nothing to simplify in '4x', a single term"),
        ({"problem": "7"}, "nothing to simplify in '7', a single term"),
        ({"problem": "4x / 2"}, "mathy knows no rule that can be applied to '4x / 2'"),
        ({"problem": "x^2y"}, r"no rule that can be applied to 'x\^\(2y\)'"),
        ({"problem": "4x = 8"}, "'4x = 8' is an equation; expected an expression to simplify"),
        ({"sound": True}, "sound is for a problem of one's own"),
        ({"problem": "x" * 5000}, "the problem has 5000 characters; expected up to 4096"),
        ({"operators": []}, r"operators is \[\]; expected a list out of"),
        ({"operators": "+"}, r"operators is '\+'"),
        ({"operators": ["*"]}, r"operators is \['\*'\]"),
        ({"constants": 1}, "constants is 1; expected true or false"),
        ({"preferred_term_commute": "no"}, "preferred_term_commute is 'no'"),
    ],
)
def test_options_that_can_not_be_had_are_refused(kwargs, message):
    with pytest.raises(EnvironmentFailure, match=message):
        make("poly-easy", **kwargs)


def test_operators_of_other_topics_can_not_be_had():
    with pytest.raises(EnvironmentFailure, match="operators and constants are for mathy:poly-easy"):
        make("complex-easy", operators=["+"])


def test_a_move_that_leads_back_can_be_seen():
    env = make("poly-easy", problem="4x + 2x", max_nodes=16)
    first = env.initial_state(0)
    column = [column.name for column in env.spec.token_columns].index("can_cs")
    assert first[3, column] == 1
    swap = 3 * RULES + COMMUTE
    _, there, _ = env.step(swap)
    assert env.expression == "2x + 4x" and there[3, column] == 2
    _, back, _ = env.step(swap)
    assert env.expression == "4x + 2x" and back[3, column] == 2
    assert np.array_equal(env.initial_state(0), first)


@pytest.mark.parametrize("game", ["poly-normal", "binomial-easy", "complex-hard", "poly-commute-easy"])
def test_a_moves_mark_tells_the_visits_that_it_leads_to(game):
    env, rng = make(game), np.random.default_rng(1)
    names = [column.name for column in env.spec.token_columns]
    first, visits = names.index("can_ca"), names.index("visits")
    most = 0
    for seed in range(6):
        observation, is_over = env.initial_state(seed), False
        while not is_over:
            swaps = [a for a in np.flatnonzero(env.mask()) if a % RULES == COMMUTE]
            action = int(rng.choice(swaps[:2] or np.flatnonzero(env.mask())))  # so that it comes back
            token, rule = divmod(action, RULES)
            mark = observation[token, first + rule]
            _, observation, is_over = env.step(action)
            if env.end not in ("nodes", "stuck"):
                assert mark == 4 * observation[0, visits]
                most = max(most, mark)
    assert most >= 3


def test_a_move_is_not_marked_in_another_expression_of_the_same_text():
    """Brackets of a problem fall away when mathy writes it out, and are not there on coming back."""
    env = make("complex-easy", problem="2x * (3y * 4z)", max_moves=20)
    first = env.initial_state(0)
    swap = 1 * RULES + COMMUTE
    env.step(swap)
    assert env.expression == "x * 2 * 3y * 4z"
    _, back, _ = env.step(swap)
    names = [column.name for column in env.spec.token_columns]
    assert env.expression == "2x * 3y * 4z"
    assert first[3, names.index("depth")] == 0 and back[7, names.index("depth")] == 0  # the root's
    rules = back[:, names.index("can_ca") : names.index("can_ca") + RULES]
    assert np.array_equal(rules > 0, env.mask())
    assert rules.max() == rules[1, COMMUTE] == 2  # of all moves, only this one leads to what has been there
