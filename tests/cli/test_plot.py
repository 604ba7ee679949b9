"""`plot`, on run folders as the Recorder writes them."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_muzero.cli.plot import Over, default_axis, plot
from distributed_muzero.config import make_config
from distributed_muzero.errors import ConfigError, RunError
from distributed_muzero.observability.curves import group_by_seed, read_records
from distributed_muzero.observability.plotting import COLOURS, make_figure
from distributed_muzero.observability.recorder import Recorder
from distributed_muzero.run_folder import create_run, open_run
from distributed_muzero.workers.runs import created
from tests.processes import run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three seeds of one experiment, and another one; the current folder lies beside them."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "runs"
    for seed in (1, 2, 3):
        fill(create_run(folder, f"pole-{seed}", make_config({"run": {"seed": seed}})), slope=seed)
    fill(create_run(folder, "wide", make_config({"learner": {"batch_size": 64}})), slope=5)
    return folder


def fill(folder, slope):
    with Recorder(folder) as recorder:
        for second in range(1, 31):
            metrics = {
                "time/seconds": second,
                "rollout/ep_rew_mean": slope * second,
                "rollout/env_steps_per_second": 1000,
                "train/learner_steps": 10 * second,
                "train/value_loss": 1 / second,
                "restarts/actor": 0,
            }
            recorder.record(metrics, 1000 * second)
            if second % 10 == 0:
                evaluation = {"mean_return": 2.0 * slope * second, "std_return": 1.0, "returns": [1.0]}
                recorder.record_evaluation(
                    {
                        **evaluation,
                        "env_steps": 1000 * second,
                        "learner_steps": 10 * second,
                        "seconds": second,
                    }
                )


def records_of(runs, *names):
    return [read_records(open_run(name, runs)) for name in names]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}


def test_a_picture_of_one_run_lies_here_under_its_name(runs):
    done = run("plot", "pole-1", "--runs-dir", runs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote pole-1.png\n", "")
    assert png_size(Path("pole-1.png"))[0] == 1200


def test_an_older_picture_is_replaced_and_that_is_said(runs, capsys):
    for _ in range(2):
        plot(["pole-1", "wide"], str(runs), None, None, None)
    assert capsys.readouterr().out == "wrote pole-1_and_1_more.png\nreplaced pole-1_and_1_more.png\n"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "JPG"])
def test_the_suffix_says_which_kind(runs, suffix):
    out = Path(f"curves.{suffix}")
    plot([str(runs / "wide")], "runs", out, Over.minutes, ["train/value_loss"])
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "JPG": b"\xff\xd8\xff"}
    assert out.read_bytes().startswith(begins[suffix])


def test_panels_are_those_that_are_recorded_and_have_units(runs):
    found = panels(make_figure(group_by_seed(records_of(runs, "pole-1")), "env_steps"))
    labels = {title: (axes.get_xlabel(), axes.get_ylabel()) for title, axes in found.items()}
    assert labels == {
        "return": ("environment steps", "return"),
        "value loss": ("environment steps", "nats"),
        "environment steps a second": ("environment steps", "steps/s"),
    }


def test_evaluations_have_markers_and_training_returns_none(runs):
    axes = panels(make_figure(group_by_seed(records_of(runs, "pole-1")), "minutes"))["return"]
    training, evaluation = axes.lines
    assert (training.get_marker(), evaluation.get_marker()) == ("", "o")
    assert evaluation.get_xdata() == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert evaluation.get_ydata() == pytest.approx([20, 40, 60])


def test_seeds_are_one_colour_with_a_band_and_another_run_has_its_own(runs):
    figure = make_figure(group_by_seed(records_of(runs, "pole-1", "wide", "pole-2", "pole-3")), "env_steps")
    axes = panels(figure)["return"]
    assert {line.get_color() for line in axes.lines} == set(COLOURS[:2])
    bands = axes.collections
    assert len(bands) == 2  # of evaluations and of training
    # The three seeds' evaluations at 30,000 steps are 60, 120 and 180: mean 120, deviation 60.
    edge = bands[1].get_paths()[0].vertices
    assert edge[:, 1].max() == pytest.approx(180) and edge[:, 0].max() == pytest.approx(30_000)
    (legend,) = [legend for place in figure.subfigs for legend in place.legends]
    assert [text.get_text() for text in legend.get_texts()] == ["pole (3 seeds, mean ± std)", "wide"]


def test_a_run_that_is_named_twice_counts_once(runs):
    plot(["wide", str(runs / "wide")], str(runs), None, None, None)
    assert Path("wide.png").exists()


def test_any_metric_by_name(runs):
    figure = make_figure(
        group_by_seed(records_of(runs, "wide")), "env_steps", ["restarts/actor", "eval/std_return"]
    )
    assert list(panels(figure)) == ["restarts/actor", "eval/std_return"]


def test_elo_is_drawn_where_evaluations_have_it(runs):
    with Recorder(open_run("wide", runs)) as recorder:
        recorder.record_evaluation(
            {"mean_return": 1.0, "std_return": 0.0, "returns": [1.0], "elo": 1200.0, "env_steps": 10}
        )
    assert "Elo" in panels(make_figure(group_by_seed(records_of(runs, "wide")), "env_steps"))


def test_runs_that_play_nothing_are_drawn_over_learner_steps(runs):
    offline = create_run(
        runs, "offline", make_config({"actor": {"num_actors": 0}, "reanalyse": {"ratio": 1.0}})
    )
    fill(offline, slope=1)
    assert default_axis(records_of(runs, "offline")) is Over.learner_steps
    assert default_axis(records_of(runs, "offline", "wide")) is Over.env_steps


def test_a_run_at_a_uri_is_fetched_without_its_replay(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTRIBUTED_MUZERO_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    uri = f"file://{tmp_path}/there"
    with created(uri, "far", make_config({})) as (folder, copies):
        fill(folder, slope=1)
        (folder.replay / "shard_0").mkdir()
        (folder.replay / "shard_0" / "large").write_bytes(b"1")
        copies.push()
    plot(["far"], uri, None, None, None)
    assert png_size(Path("far.png"))[0] == 1200
    [fetched] = (tmp_path / "state").glob("*/.fetched/*/*/far")
    assert (fetched / "metrics.jsonl").exists() and not (fetched / "replay").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "no run 'nobody' in"),
        (["pole-1", "--out", "curves.bmp"], "no picture is known by .bmp; choose one of"),
        (["pole-1", "--out", "curves"], "it has no suffix; choose one of"),
        (["pole-1", "--out", "nowhere/a.png"], "there is no folder nowhere"),
        (["pole-1", "--out", "folder.png"], "that is a folder"),
        (["pole-1", "--metric", "train/value_los"], "did you mean 'train/value_loss'?"),
        (["pole-1", "--metric", "restarts"], "name one of restarts/actor"),
        (["pole-1", "--metric", "restarts/learner"], "no numbers of 'restarts/learner' over env_steps yet"),
        (
            ["pole-1", "--metric", "train/gpu_bytes"],
            "no numbers of 'train/gpu_bytes' over env_steps yet in pole-1",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_picture(runs, arguments, message):
    Path("folder.png").mkdir()
    done = run("plot", *arguments, "--runs-dir", runs)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["folder.png"]


def test_a_young_run_says_that_there_is_nothing_yet(runs):
    create_run(runs, "young", make_config({}))
    with pytest.raises(RunError, match="run 'young' has recorded nothing yet"):
        plot(["pole-1", "young"], str(runs), None, None, None)


def test_a_picture_that_the_disk_refuses_is_told(runs):
    with pytest.raises(ConfigError, match=r"can't write /proc/self/curves.png.*choose another --out"):
        plot(["wide"], str(runs), Path("/proc/self/curves.png"), None, None)


def test_no_other_command_loads_matplotlib():
    code = (
        "import sys, distributed_muzero.cli.main, distributed_muzero.workers.bookkeeper; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "matplotlib" not in done.stdout.split()
