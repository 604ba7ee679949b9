"""Learning from stored episodes alone, in a run at a URI: what was cut short goes on, here and elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RunError
from distributed_muzero.replay import dataset
from distributed_muzero.replay.inspection import list_all_held
from distributed_muzero.replay.schema import StoredEpisode
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers.importing import dataset_path, import_stored
from distributed_muzero.workers.runs import created, open_to_read, opened
from tests.cli.test_uri_runs import fail
from tests.episodes import make_episode
from tests.processes import wait_for

OFFLINE = make_config({"actor": {"num_actors": 0}, "replay": {"num_shards": 2}})
CARTPOLE = EnvironmentSpec("CartPole-v1", (4,), np.dtype(np.float32), (2,))
NUM_EPISODES = 8


def never() -> bool:
    return False


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """A dataset of eight episodes, which are imported one by one."""
    monkeypatch.setattr(dataset, "INSERT_BYTES", 1)
    episodes = [make_episode(10, name=f"x/0/0/{i}", seed=i, spec=CARTPOLE) for i in range(NUM_EPISODES)]
    path = tmp_path / "all.parquet"
    dataset.write_dataset(path, (StoredEpisode(i, episode) for i, episode in enumerate(episodes)))
    return path


class Killed(BaseException):
    """What no handler of errors takes for an error."""


class After:
    """Asks for a stop, or kills, when it has been asked so many times."""

    def __init__(self, num_calls: int, kills: bool = False):
        self.num_left = num_calls
        self.kills = kills

    def __call__(self) -> bool:
        self.num_left -= 1
        if self.num_left < 0 and self.kills:
            raise Killed
        return self.num_left < 0


def import_into(run: str, runs_dir: str, datasets: list, stop_requested=never) -> list[str]:
    """Goes on with an import as `resume --take-over` does; returns what was told."""
    told: list[str] = []
    with opened(run, runs_dir, pytest.fail, take_over=True) as (folder, copies):
        copies.claim_shards(2)
        import_stored(folder, datasets or folder.read_datasets(), copies, told.append, stop_requested)
        copies.push()
    return told


def num_held(runs_dir: str) -> int:
    return len(list_all_held(open_to_read("r", runs_dir).replay))


@pytest.mark.parametrize("kills", [False, True])
def test_an_import_that_is_cut_short_goes_on_on_another_machine(
    there, on_machine, stored, monkeypatch, kills
):
    # Nothing is copied in the background.
    monkeypatch.setenv("DISTRIBUTED_MUZERO_COPY_SECONDS", "3000")
    with created(there, "r", OFFLINE) as (folder, copies):
        copies.claim_shards(2)
        stop = After(3, kills)
        if kills:
            with pytest.raises(Killed):
                import_stored(folder, [stored], copies, print, stop)
        else:
            import_stored(folder, [stored], copies, print, stop)
            assert num_held(there) == 3
    shutil.rmtree(on_machine("a"))
    on_machine("b")
    [told] = import_into("r", there, [])
    assert f"{NUM_EPISODES} stored episodes: {NUM_EPISODES if kills else NUM_EPISODES - 3} new" in told
    assert num_held(there) == NUM_EPISODES
    assert open_to_read("r", there).read_datasets() == []


def test_what_was_imported_is_copied_while_the_import_goes_on(there, stored, tmp_path):
    copied = Path(there[7:], "r/replay")

    class UntilCopied(After):
        def __call__(self) -> bool:
            """Waits with the third episode until one of the first is copied."""
            if self.num_left == 1:
                wait_for("a copied episode", lambda: any(copied.glob("shard_*/episodes/segment_*")), 20)
            return super().__call__()

    with created(there, "r", OFFLINE) as (folder, copies), pytest.raises(Killed):
        copies.claim_shards(2)
        import_stored(folder, [stored], copies, print, UntilCopied(3, kills=True))


def test_a_run_at_a_uri_is_imported_by_its_uri_wherever_the_import_goes_on(there, on_machine, stored):
    with created(there, "r", OFFLINE) as (folder, copies):
        copies.claim_shards(2)
        import_stored(folder, [stored], copies, print, never)
    with created(there, "learns", OFFLINE) as (folder, copies):
        copies.claim_shards(2)
        import_stored(folder, [f"{there}/r"], copies, print, After(2))
        assert folder.read_datasets() == [f"{there}/r"]
    shutil.rmtree(on_machine("a"))
    on_machine("b")
    [told] = import_into("learns", there, [])
    assert f"{NUM_EPISODES} stored episodes" in told


def test_a_run_at_a_uri_is_fetched_without_what_nobody_learns_from_and_removed_after_the_import(
    there, stored
):
    with created(there, "r", OFFLINE) as (folder, copies):
        copies.claim_shards(2)
        import_stored(folder, [stored], copies, print, never)
        for place in (folder.checkpoints, folder.tensorboard, folder.history):
            place.mkdir(exist_ok=True)
            (place / "large").write_bytes(b"1")
        copies.push()
    fetched = dataset_path(f"{there}/r")
    found = {path.name for path in fetched.iterdir()}
    assert "replay" in found and not found & {"checkpoints", "tensorboard", "history"}
    with created(there, "learns", OFFLINE) as (folder, copies):
        copies.claim_shards(2)
        import_stored(folder, [f"{there}/r"], copies, print, never)
    assert len(list_all_held(folder.replay)) == NUM_EPISODES
    assert not fetched.exists()


def test_a_run_that_would_wait_for_episodes_for_ever_is_refused(there, tmp_path, stored):
    folder = create_run(tmp_path / "runs", "plain", OFFLINE)
    expected = "learns from stored episodes alone, and .* holds none: .*replay import {} DATASET"
    with pytest.raises(RunError, match=expected.format("plain")):
        import_stored(folder, [], None, pytest.fail, never)
    import_stored(folder, [stored], None, print, never)
    import_stored(folder, [], None, pytest.fail, never)

    with created(there, "r", OFFLINE) as (folder, copies):
        with pytest.raises(RunError, match=expected.format("r")):
            import_stored(folder, [], copies, pytest.fail, never)
        copies.claim_shards(2)
        import_stored(folder, [stored], copies, print, never)
        copies.release_shards()
        shutil.rmtree(folder.replay)
        import_stored(folder, [], copies, pytest.fail, never)


def test_a_run_that_plays_needs_no_episodes(tmp_path):
    import_stored(create_run(tmp_path, "r", make_config({})), [], None, pytest.fail, never)


def test_resume_tells_of_an_empty_replay_as_one_error(tmp_path):
    create_run(tmp_path, "r", OFFLINE)
    assert "holds none" in fail("resume", "r", "--runs-dir", tmp_path, "--in-process")
