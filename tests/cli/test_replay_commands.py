"""`replay stats|verify|show|export|import` on real runs, as a user calls them."""

from __future__ import annotations

import json
import shutil
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from distributed_muzero.algorithm.returns import n_step_returns
from distributed_muzero.config import load_preset, make_config
from distributed_muzero.replay.dataset import read_dataset
from distributed_muzero.run_folder import create_run
from tests import processes

TRAIN = ("train", "--preset", "debug", "--in-process", "--shards", 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs `a` and `b`, which nobody changes."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        options = ("--runs-dir", folder, "--name", name, "--seed", seed, "--max-train-steps", 120)
        done = processes.run(*TRAIN, *options)
        assert done.returncode == 0, done.stderr
        assert segment(folder / name, 0) and segment(folder / name, 1), "both shards hold something"
    return folder


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "a.parquet"
    assert replay("export", runs / "a", path)["file"] == str(path)
    return path


@pytest.fixture
def own(runs, tmp_path):
    """A copy of `a` to change."""
    shutil.copytree(runs / "a", tmp_path / "own")
    return tmp_path / "own"


def replay(command, *arguments, returncode=0):
    done = processes.run("replay", command, *arguments, "--json")
    assert done.returncode == returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refusal(*arguments):
    done = processes.run("replay", *arguments)
    assert done.returncode == 2, done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    return done.stderr


def segment(run, shard=0, log="episodes"):
    return min((run / "replay" / f"shard_{shard}" / log).glob("segment_*.log"))


def test_stats_count_what_the_export_holds(runs, exported):
    result = replay("stats", "a", "--runs-dir", runs)
    total, episodes = result["total"], list(read_dataset(exported))
    returns = [episode.episode_return for episode in episodes]
    assert [shard["shard"] for shard in result["shards"]] == [0, 1]
    assert total["episodes"] == len(episodes) == sum(shard["episodes"] for shard in result["shards"])
    assert total["transitions"] == total["inserted_transitions"] == sum(e.num_steps for e in episodes)
    assert total["mean_return"] == pytest.approx(np.mean(returns))
    assert (total["min_return"], total["max_return"]) == (min(returns), max(returns))
    assert total["sampled_rows"] >= 120 * 16
    files = (runs / "a" / "replay").rglob("segment_*.log")
    assert total["log_bytes"] == sum(file.stat().st_size for file in files)
    assert not any(total["damage"].values())


def test_stats_and_verify_print_tables_for_people(runs):
    done = processes.run("replay", "stats", runs / "a")
    assert done.returncode == 0, done.stderr
    assert {"episodes", "transitions", "shard", "total"} <= set(done.stdout.split())
    done = processes.run("replay", "verify", runs / "a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("all is well")


def test_a_good_run_verifies(runs, exported):
    result = replay("verify", runs / "a")
    assert result["ok"] and result["validated_against"] == "CartPole-v1"
    counted = sum(shard["episodes"]["episodes"] for shard in result["shards"])
    assert counted == pq.read_metadata(exported).num_rows
    assert all(shard["journal"]["records"]["state"] for shard in result["shards"])


def test_verify_finds_one_flipped_bit(own):
    path = segment(own, shard=1)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    result = replay("verify", own, returncode=1)
    assert not result["ok"]
    assert not any(result["shards"][0]["episodes"]["damage"].values())
    assert any(result["shards"][1]["episodes"]["damage"].values())
    assert "not all is well" in processes.run("replay", "verify", own).stdout
    # What is intact can still be counted and taken out.
    assert any(replay("stats", own)["total"]["damage"].values())


def test_verify_finds_an_episode_that_is_in_two_shards(own):
    shutil.rmtree(own / "replay" / "shard_1")
    shutil.copytree(own / "replay" / "shard_0", own / "replay" / "shard_1")
    result = replay("verify", own, returncode=1)
    assert (
        len(result["shards"][1]["episodes"]["duplicate_ids"]) == result["shards"][0]["episodes"]["episodes"]
    )
    assert not result["shards"][0]["episodes"]["duplicate_ids"]


def test_verify_misses_episodes_whose_file_is_gone_and_the_next_launch_tells_of_them(own):
    (held,) = {item["episodes"] for item in replay("stats", own)["shards"] if item["shard"] == 1}
    for path in (own / "replay" / "shard_1" / "episodes").glob("segment_*.log"):
        path.unlink()
    result = replay("verify", own, returncode=1)
    assert [shard["missing_episodes"] for shard in result["shards"]] == [0, held]
    assert f"{held} episodes that it held are no longer" in processes.run("replay", "verify", own).stdout
    resumed = processes.run("resume", own, "--max-train-steps", 160, "--in-process")
    assert resumed.returncode == 0 and f"{held} stored episodes are no longer" in resumed.stderr


def test_verify_misses_a_shard(own):
    shutil.rmtree(own / "replay" / "shard_1")
    assert replay("verify", own, returncode=1)["missing_shards"] == [1]


def test_another_log_format_is_refused(own):
    path = segment(own)
    data = bytearray(path.read_bytes())
    data[8:12] = (99).to_bytes(4, "little")
    data[12:16] = zlib.crc32(data[:12]).to_bytes(4, "little")
    path.write_bytes(data)
    for command in ("verify", "stats"):
        assert "replay log format 99, this version reads format 1" in refusal(command, own)


def test_show_tells_an_episode_as_it_is_stored(runs, exported):
    episodes = {episode.episode_id: episode for episode in read_dataset(exported)}
    best = replay("show", runs / "a", "best")
    assert best["episode_return"] == max(episode.episode_return for episode in episodes.values())
    episode = episodes[best["episode_id"]]
    assert [step["action"] for step in best["steps"]] == episode.actions.tolist()
    assert [step["policy"] for step in best["steps"]] == episode.policies.tolist()
    algorithm = make_config(load_preset("debug")).algorithm
    returns = n_step_returns(
        episode.rewards, episode.root_values, algorithm.discount, algorithm.td_steps, episode.to_play
    )
    assert [step["n_step_return"] for step in best["steps"]] == returns[:-1].tolist()
    assert replay("show", runs / "a", best["episode_id"]) == best
    latest = replay("show", runs / "a", "latest", "--steps", 2)
    assert len(latest["steps"]) == 2 < latest["num_steps"]
    assert latest["weights_version"] == max(episode.weights_version for episode in episodes.values())


def test_show_prints_a_table(runs):
    done = processes.run("replay", "show", runs / "a", "latest", "--steps", 2)
    assert done.returncode == 0, done.stderr
    for word in ("seed", "weights version", "return", "policy", "root value", "n-step return", "more steps"):
        assert word in done.stdout


def test_export_chooses_by_return_and_age(runs, exported, tmp_path):
    returns = sorted(episode.episode_return for episode in read_dataset(exported))
    bound = returns[len(returns) // 2]
    path = tmp_path / "some.parquet"
    replay("export", runs / "a", path, "--min-return", bound)
    assert sorted(e.episode_return for e in read_dataset(path)) == [r for r in returns if r >= bound]
    assert replay("export", runs / "a", path, "--last", 2)["episodes"] == 2
    newest = replay("show", runs / "a", "latest")["episode_id"]
    assert newest in [episode.episode_id for episode in read_dataset(path)]


def test_an_import_is_stored_once_and_played_on_with(runs, exported, own):
    other = own.parent / "b"
    shutil.copytree(runs / "b", other)
    before = replay("stats", other)["total"]
    number = pq.read_metadata(exported).num_rows
    first = replay("import", other, exported)
    assert (first["offered"], first["stored"], first["duplicates"]) == (number, number, 0)
    again = replay("import", other, exported, own)
    assert (again["offered"], again["stored"], again["duplicates"]) == (2 * number, 0, 2 * number)
    after = replay("stats", other)["total"]
    assert after["episodes"] == before["episodes"] + number
    assert after["inserted_transitions"] == before["inserted_transitions"] + first["stored_transitions"]
    assert replay("verify", other)["ok"]
    replay("export", other, own.parent / "both.parquet")
    together = {e.episode_id: e for e in read_dataset(own.parent / "both.parquet")}
    for episode in read_dataset(exported):
        held = together[episode.episode_id]
        for name in (
            "observations",
            "actions",
            "rewards",
            "policies",
            "root_values",
            "legal_masks",
            "to_play",
        ):
            assert getattr(held, name).tobytes() == getattr(episode, name).tobytes()


def test_an_import_into_another_environment_changes_nothing(exported, tmp_path):
    folder = create_run(tmp_path, "acrobot", make_config(load_preset("acrobot")))
    error = refusal("import", folder.path, exported)
    assert "CartPole-v1 with observations (4,) float32 and 2 actions" in error
    assert "Acrobot-v1 with observations (6,) float32 and 3 actions" in error
    assert not list(folder.replay.iterdir())


def test_a_run_that_goes_on_can_be_read_but_not_written_to(exported, tmp_path):
    options = ("--runs-dir", tmp_path, "--name", "on", "--max-train-steps", 10**7, "--max-minutes", 5)
    with processes.started(*TRAIN, *options) as running:
        processes.wait_for("episodes", lambda: list(tmp_path.rglob("shard_1/episodes/segment_*.log")))
        assert "in use by another process" in refusal("import", tmp_path / "on", exported)
        seen = [replay("stats", tmp_path / "on")["total"]["episodes"] for _ in range(3)]
        assert 0 < seen[0] <= seen[-1]
        assert replay("verify", tmp_path / "on")["ok"]
        assert replay("export", tmp_path / "on", tmp_path / "on.parquet")["episodes"] >= seen[-1]
        assert running.poll() is None


def test_mistakes_end_in_one_message(runs, exported, own, tmp_path):
    assert "no episode 'r/9/9/9'" in refusal("show", runs / "a", "r/9/9/9")
    assert "no run" in refusal("stats", "nobody", "--runs-dir", runs)
    assert "no dataset at" in refusal("import", own, tmp_path / "nowhere.parquet")
    assert "no episodes" in refusal("export", runs / "a", tmp_path / "x.parquet", "--min-return", 10**6)
    assert ".parquet" in refusal("export", runs / "a", tmp_path / "x.csv")
    young = create_run(tmp_path, "young", make_config(load_preset("debug")))
    for command in (("stats",), ("verify",), ("show", "best"), ("export", tmp_path / "x.parquet")):
        assert "no replay shards" in refusal(command[0], young.path, *command[1:])
    damaged = tmp_path / "damaged.parquet"
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 8
    damaged.write_bytes(data)
    assert "damaged.parquet is damaged" in refusal("import", own, damaged)
    assert not (tmp_path / "x.parquet").exists()
