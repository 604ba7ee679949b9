"""`play` as a person or a pipe uses it, against runs that were really trained for a moment."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest
from typer.testing import CliRunner

from distributed_muzero.cli.main import app
from distributed_muzero.cli.play import MAX_ANSWERS, choose_side
from distributed_muzero.cli.play_view import find_move, verdict
from distributed_muzero.errors import ConfigError
from distributed_muzero.matches.person import Outcome
from tests import processes
from tests.environments.games import EXAMPLES

TRAINED = ("--in-process", "--max-train-steps", 5, "--set", "replay.min_size_to_sample=50")
QUICK = ("--set", "search.num_simulations=8", "--set", "evaluator.num_episodes=2")
NUMBERS = "\n".join("012345678") + "\n"


def train(folder, name, *arguments, **options):
    words = ("train", *arguments, *TRAINED, *QUICK, "--runs-dir", folder, "--name", name)
    done = subprocess.run(processes.command(*words), capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def ttt(tmp_path_factory):
    pytest.importorskip("pyspiel", reason="OpenSpiel isn't installed")
    return train(tmp_path_factory.mktemp("runs"), "ttt", "--env", "openspiel:tic_tac_toe")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), "row", "--env", "chain")


@pytest.fixture(scope="module")
def chess(tmp_path_factory):
    pytest.importorskip("pyspiel", reason="OpenSpiel isn't installed")
    short = ("--set", "environment.max_episode_steps=10", "--set", "evaluator.league_size=0")
    return train(tmp_path_factory.mktemp("runs"), "chess", "--env", "openspiel:chess", *short)


def pipe(run, typed, *arguments, **options):
    """What the command prints, in a process of its own."""
    done = subprocess.run(
        processes.command("play", run, *arguments),
        input=typed,
        capture_output=True,
        text=not isinstance(typed, bytes),
        timeout=120,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def play(run, typed, *arguments):
    """The same in this process, which has loaded everything already."""
    done = CliRunner().invoke(app, ["play", *map(str, (run, *arguments))], input=typed)
    assert done.exit_code == 0, done.exception
    return done.stdout


def boards(output):
    return re.findall(r"^[.xo]{3}\n[.xo]{3}\n[.xo]{3}$", output, re.MULTILINE)


def has_won(board, mark):
    cells = board.replace("\n", "")
    lines = ["012", "345", "678", "036", "147", "258", "048", "246"]
    return any(all(cells[int(cell)] == mark for cell in line) for line in lines)


@pytest.mark.parametrize(("side", "own", "its"), [("--first", "x", "o"), ("--second", "o", "x")])
def test_a_whole_game_through_a_pipe(ttt, side, own, its):
    output = pipe(ttt, NUMBERS, side, "--seed", 1)
    assert f"you play {side[2:]}" in output and "\x1b" not in output
    *_, last = shown = boards(output)
    *_, end = output.splitlines()
    num_moves = 9 - last.count(".")
    assert end.endswith(f"after {num_moves} moves")
    expected = "you win" if has_won(last, own) else "the search wins" if has_won(last, its) else "a draw"
    assert end.startswith(expected)
    for before in shown[:-1]:  # each was shown when the person was to move
        assert before.count("x") - before.count("o") == (0 if own == "x" else 1)
    assert len(
        re.findall(r"^it plays \d [xo]\(\d,\d\), value [+-]\d\.\d\d for it$", output, re.MULTILINE)
    ) == (last.count(its))


@pytest.mark.parametrize("side", ["first", "second"])
def test_sides_are_kept_where_player_1_begins(chess, side):
    """White, who begins, is player 1 of OpenSpiel's chess."""
    lines = play(chess, "a3\na6\nq\n", f"--{side}").splitlines()
    assert f"you play {side}" in lines
    told = [line for line in lines if re.match(r"move \d|you play \w\d$|it plays", line)]
    if side == "first":
        assert told[:2] == ["move 1", "you play a3"] and told[2].startswith("it plays")
    else:
        assert told[0].startswith("it plays") and told[1:3] == ["move 2", "you play a6"]


def test_the_seed_draws_who_begins_and_repeats_the_game(ttt):
    assert pipe(ttt, NUMBERS, "--seed", 3) == play(ttt, NUMBERS, "--seed", 3)
    assert {choose_side("a game", 2, None, seed) for seed in range(20)} == {True, False}


def test_without_a_seed_one_is_made_up_and_told(ttt):
    [seed] = re.findall(r"seed (\d+)", play(ttt, ""))
    assert f"seed {seed}" in play(ttt, "", "--seed", seed)


def test_moves_are_taken_by_name_or_number(ttt):
    by_name = play(ttt, "x(1,1)\n", "--first", "--seed", 1)
    assert by_name.replace("your move: x(1,1)", "your move: 4") == play(ttt, "4\n", "--first", "--seed", 1)
    assert "X( 1,1 )" in (output := play(ttt, "X( 1,1 )\n", "--first"))
    assert "you play x(1,1)" in output


def test_wrong_answers_get_one_line_and_another_question(ttt):
    wrong = ["9", "-1", "x(9,9)", "", "4 4", "a" * 5_000]
    lines = play(ttt, "\n".join([*wrong, "4", "4"]) + "\n", "--first").splitlines()
    told = [line for line in lines if "expected" in line]
    assert len(told) == len(wrong) + 1  # the first 4 is a move
    assert told[0].startswith(
        "'9' is no legal move: expected a name or number, such as 0 x(0,0), or one of ? h u r q"
    )
    assert max(map(len, told)) < 160
    assert "you play x(1,1)" in lines


def test_bytes_that_are_no_text_are_wrong_answers(ttt):
    output = pipe(ttt, b"\xff\xfe\x00\n4\n", "--first").decode()
    assert output.count("is no legal move") == 1 and "you play x(1,1)" in output


def test_the_moves_are_listed(ttt):
    output = play(ttt, "4\n?\n", "--first", "--seed", 1)
    *_, listed = output.split("your move: ?\n")
    names = re.findall(r"(\d) x\((\d),(\d)\)", listed)
    assert len(names) == 7 and all(int(number) == 3 * int(row) + int(column) for number, row, column in names)
    assert not any(number == "4" for number, *_ in names)


def test_a_hint_shows_what_the_search_thinks(ttt):
    output = play(ttt, "h\nhint\n", "--first", "--simulations", 30)
    head = r"the search: value [+-]\d\.\d\d for you, it would play (\d x\(\d,\d\))"
    best, again = re.findall(head, output)
    rows = re.findall(r"^  (\d x\(\d,\d\)) +(\d+)% +([+-]\d\.\d\d|-) +(\d+)%$", output, re.MULTILINE)
    assert len(rows) == 10 and rows[:5] == rows[5:]
    shares = [int(share) for _, share, _, _ in rows[:5]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 102
    assert (best, best) == (again, rows[0][0])
    assert ", 30 simulations (muzero)," in output


def test_it_plays_with_the_search_that_is_asked_for(ttt):
    assert ", 7 simulations (gumbel)," in play(ttt, "", "--simulations", 7, "--search-policy", "gumbel")


def test_show_search_shows_what_it_thought_of_before_each_of_its_moves(ttt):
    output = play(ttt, "4\n", "--first", "--show-search")
    [thought] = re.findall(r"the search: value (\S+) for it, it would play (\d \S+)", output)
    assert f"it plays {thought[1]}, value {thought[0]} for it" in output
    assert "share" in output and "share" not in play(ttt, "4\n", "--first")


def test_undo_goes_back_to_ones_own_move(ttt):
    output = play(ttt, "u\n4\nu\n0\n", "--first")
    assert "there is no move of yours to take back yet" in output
    assert "taken back: 2 moves" in output
    empty, one, empty_again, other = boards(output)
    assert empty == empty_again == "...\n...\n..."
    assert one[5] == "x" and other[0] == "x" and other[5] != "x"


def test_resigning_loses(ttt):
    output = play(ttt, "4\nr\n", "--first")
    assert output.splitlines()[-1] == "you resign: the search wins after 2 moves"


@pytest.mark.parametrize(
    ("typed", "reason"), [("4\nq\n", "you left"), ("4\n", "no more input"), ("4", "no more input")]
)
def test_leaving_ends_it(ttt, typed, reason):
    output = play(ttt, typed, "--first")
    assert output.splitlines()[-1] == f"{reason}: the game ends here, after 2 moves"


def test_without_standard_input_the_game_ends(ttt):
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *processes.command("play", ttt, "--first")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no more input" in done.stdout, done.stderr


def test_an_endless_pipe_of_nonsense_ends(ttt):
    output = play(ttt, "?\n" * (MAX_ANSWERS + 50), "--first")
    assert output.splitlines()[-1].startswith(f"{MAX_ANSWERS} answers without a move")


def test_ctrl_c_ends_it_as_it_ends_other_commands(ttt):
    process = subprocess.Popen(
        processes.command("play", ttt, "--first"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if "move 1" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: the game ends here" in errors and "Traceback" not in errors


def test_on_a_terminal_the_board_has_a_frame(ttt):
    ours, its = pty.openpty()
    process = subprocess.Popen(
        processes.command("play", ttt, "--first"),
        stdin=its,
        stdout=its,
        stderr=its,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(its)
    seen = b""

    def wait_for(text):
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096)
        assert text in seen, seen

    try:
        wait_for(b"your move: ")
        os.write(ours, b"x(1,1)\n")
        wait_for("─ move 3 ─".encode())
        os.write(ours, b"\x04")  # end of file
        wait_for(b"no more input: the game ends here, after 2 moves")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
    text = seen.decode()
    assert re.search(r"│  [.o]x[.o] +│\r\n", text)
    assert "\x1b[1m" in text


def test_a_checkpoint_can_be_chosen(ttt):
    steps = sorted(int(path.name.removeprefix("step_")) for path in (ttt / "checkpoints").glob("step_*"))
    assert f"step_{steps[-1]:08d}" in play(ttt, "", "--checkpoint", "latest")
    assert f"step_{steps[0]:08d}" in play(ttt, "", "--checkpoint", steps[0])
    done = processes.run("play", ttt, "--checkpoint", 999)
    assert done.returncode == 2
    assert f"There are best, latest and the steps {', '.join(map(str, steps))}" in done.stderr


def test_one_player_plays_alone(chain):
    output = play(chain, "h\n1\nu\n" + "1\n" * 9)
    assert "value" in output and "for you" in output and "taken back: 1 move" in output
    assert "3 of 0 … 9" in output and "it plays" not in output
    assert output.splitlines()[-1] == "the game is over with a return of 1 after 6 moves"


def test_sides_are_for_two_players(chain):
    done = processes.run("play", chain, "--second")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "chain is for one player: leave out --first and --second" in done.stderr


def test_a_game_of_ones_own(tmp_path):
    run = train(tmp_path, "nim", "--env", "nim:make", "--trust-env-code", cwd=EXAMPLES)
    refused = processes.run("play", run)
    assert refused.returncode == 2 and "--trust-env-code" in refused.stderr
    output = pipe(run, "0\n0\n0\n0\n0\n0\n", "--first", "--trust-env-code", cwd=EXAMPLES)
    assert "10 of 0 … 10" in output
    assert re.match(r"(you win|the search wins) after \d+ moves", output.splitlines()[-1])


def test_no_such_run_is_one_message(tmp_path):
    done = processes.run("play", "nobody", "--runs-dir", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "nobody" in done.stderr


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("Bxc3", 7),
        ("bxc3", 8),
        (" BXC3", None),  # either of the two
        ("take 1", 0),
        ("TAKE1", 0),
        ("2", 9),  # a name comes before a number
        ("7", 7),
        ("٧", 7),
        ("1", None),
        ("9" * 5_000, None),
        ("²", None),
        ("", None),
    ],
)
def test_what_a_person_may_type_for_a_move(text, action):
    names = {0: "take 1", 2: "take 2", 7: "Bxc3", 8: "bxc3", 9: "2"}
    assert find_move(text, names) == action


@pytest.mark.parametrize(
    ("outcome", "has_opponent", "words"),
    [
        (Outcome(1.0, "by the rules"), True, "you win"),
        (Outcome(-1.0, "by the rules"), True, "the search wins"),
        (Outcome(0.0, "by the rules"), True, "a draw"),
        (Outcome(-6.0, "by the rules"), True, "the search wins by 6"),
        (Outcome(0.0, "cut"), True, "a draw, cut by the environment's limit"),
        (Outcome(1.0, "resigned"), True, "you resign: the search wins"),
        (
            Outcome(12.5, "cut"),
            False,
            "the game is over with a return of 12.5, cut by the environment's limit",
        ),
        (Outcome(0.0, "resigned"), False, "you give up"),
    ],
)
def test_how_a_game_ended(outcome, has_opponent, words):
    assert verdict(outcome, has_opponent) == words


def test_sides_follow_the_choice():
    assert [choose_side("a game", 2, first, 1) for first in (True, False)] == [True, False]
    assert choose_side("a game", 1, None, 1)
    with pytest.raises(ConfigError, match="a game is for one player"):
        choose_side("a game", 1, True, 1)
