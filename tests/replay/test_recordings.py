"""What RLlib recorded, as episodes of ours; and ours as RLlib records them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from distributed_muzero.config import make_config
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import RejectedEpisode, RunError
from distributed_muzero.replay.dataset import check_datasets, import_datasets, write_dataset
from distributed_muzero.replay.msgpack_arrays import pack, unpack
from distributed_muzero.replay.recording_writer import write_recording
from distributed_muzero.replay.recordings import is_recording, read_recording
from distributed_muzero.replay.schema import StoredEpisode
from distributed_muzero.replay.validation import validate
from distributed_muzero.workers.builder import Builder
from tests.episodes import SPEC, make_episode

VECTOR = EnvironmentSpec("vector", (2,), np.dtype(np.float32), (3,))
LAKE = EnvironmentSpec("lake", (4,), np.dtype(np.float32), (3,))


def recorded(observations, actions, rewards, terminated=True, **options):
    """As RLlib's own recorder writes an episode."""
    options = {"len_lookback_buffer": 0, **options}
    episode = SingleAgentEpisode(
        observations=observations, actions=actions, rewards=rewards, terminated=terminated,
        truncated=options.pop("truncated", not terminated), **options,
    )  # fmt: skip
    return pack(episode.get_state())


def write(folder, *items):
    """A file for each, in folders like RLlib's."""
    for number, item in enumerate(items):
        place = folder / "env" / f"run-000000-{number:05d}"
        place.mkdir(parents=True)
        pq.write_table(pa.table({"item": pa.array([item], pa.binary())}), place / "abc_000000-0.parquet")
    return folder


def read(folder, spec=VECTOR, discount=0.5):
    return [stored.episode for stored in read_recording(folder, spec, discount)]


def steps(*rows, **columns):
    """A table of RLlib's other form; a row is game, obs, action, new_obs, terminated."""
    names = ("eps_id", "obs", "actions", "new_obs", "terminateds")
    table = {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    return pa.table({**table, "rewards": [1.0] * len(rows), "truncateds": [False] * len(rows), **columns})


def test_root_values_are_the_returns_to_the_end_and_the_policy_is_what_was_played(tmp_path):
    item = recorded([np.float32([i, 0]) for i in range(4)], [2, 0, 1], [1.0, 2.0, 4.0], id_="abc")
    [episode] = read(write(tmp_path, item))
    validate(episode, VECTOR, 100)
    assert episode.episode_id == "rllib/abc" and episode.terminated
    assert episode.root_values.tolist() == [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4, 0]
    assert episode.policies.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert episode.observations[:, 0].tolist() == [0, 1, 2, 3]


def test_recorded_logits_and_values_are_used(tmp_path):
    extra = {"action_dist_inputs": [np.log(np.float32([0.2, 0.3, 0.5]))] * 2, "vf_preds": [9.0, 5.0]}
    options = {"terminated": False, "extra_model_outputs": extra}
    [episode] = read(write(tmp_path, recorded([np.zeros(2, np.float32)] * 3, [0, 1], [1.0, 2.0], **options)))
    validate(episode, VECTOR, 100)
    assert np.allclose(episode.policies, [[0.2, 0.3, 0.5]] * 2)
    # 5 = 2 + γ ν: what comes behind the cut is worth 6.
    assert episode.truncated and episode.root_values.tolist() == [1 + 0.5 * 5, 5, 6]


def test_masks_discrete_observations_and_joint_actions(tmp_path):
    # Under any other name, as in environments.
    masked = [{"obs": np.int64(i), "action_mask": np.float32([1, 0, 1])} for i in (3, 1)]
    extra = {"action_dist_inputs": [np.float32([0, 7, 0])]}
    [episode] = read(write(tmp_path / "a", recorded(masked, [2], [0.0], extra_model_outputs=extra)), LAKE)
    validate(episode, LAKE, 100)
    assert episode.observations.argmax(1).tolist() == [3, 1] and episode.policies.tolist() == [[0.5, 0, 0.5]]
    joint = VECTOR._replace(action_shape=(2, 3))
    item = recorded([np.zeros(2, np.float32)] * 2, [np.int64([1, 2])], [0.0])
    assert read(write(tmp_path / "b", item), joint)[0].actions.tolist() == [5]


def test_logits_of_an_actions_parts_are_multiplied_and_those_of_flat_actions_are_not(tmp_path):
    spec = VECTOR._replace(action_shape=(2, 2))
    logits = np.log(np.float32([0.25, 0.75, 0.1, 0.9]))
    options = {"extra_model_outputs": {"action_dist_inputs": [logits]}}
    for name, action in (("parts", np.int64([1, 0])), ("flat", 2)):
        write(tmp_path / name, recorded([np.zeros(2, np.float32)] * 2, [action], [0.0], **options))
    [parts], [flat] = read(tmp_path / "parts", spec), read(tmp_path / "flat", spec)
    assert parts.actions == flat.actions == 2
    assert np.allclose(parts.policies, [[0.025, 0.225, 0.075, 0.675]])
    assert np.allclose(flat.policies, np.array([[0.25, 0.75, 0.1, 0.9]]) / 2)


def test_pieces_of_a_game_are_joined_and_a_game_that_goes_on_is_cut(tmp_path):
    observations = [np.float32([i, 0]) for i in range(6)]
    options = {"id_": "abc", "truncated": False}
    first = recorded(observations[:3], [0, 1], [1.0, 1.0], False, **options)
    other = recorded(observations[:2], [1], [1.0], id_="other")
    # The next piece repeats the step before it, as RLlib's connectors may need it.
    then = recorded(
        observations[1:5],
        [1, 2, 0],
        [1.0, 1.0, 1.0],
        False,
        t_started=2,
        **options | {"len_lookback_buffer": 1},
    )
    found = {episode.episode_id: episode for episode in read(write(tmp_path, first, other, then, then))}
    assert set(found) == {"rllib/abc", "rllib/other"}
    episode = found["rllib/abc"]
    validate(episode, VECTOR, 100)
    assert episode.actions.tolist() == [0, 1, 2, 0] and episode.truncated
    assert episode.observations[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_rows_of_steps_are_joined_by_what_they_show(tmp_path):
    rows = [("a", [0.0, 0.0], 0, [1.0, 0.0], False), ("b", [9.0, 0.0], 2, [8.0, 0.0], True)]
    last = ("a", [1.0, 0.0], 1, [2.0, 0.0], True)
    pq.write_table(steps(*rows), tmp_path / "1.parquet")
    pq.write_table(steps(*rows, last), tmp_path / "2.parquet")  # RLlib repeats what it has written before
    found = {episode.episode_id: episode for episode in read(tmp_path)}
    assert set(found) == {"rllib/a", "rllib/b"}
    assert found["rllib/a"].observations[:, 0].tolist() == [0, 1, 2] and found["rllib/a"].terminated


def write_steps(folder, *tables):
    """A folder for each time of writing, as RLlib does."""
    for number, table in enumerate(tables):
        (folder / str(number)).mkdir(parents=True)
        pq.write_table(table, folder / str(number) / "0.parquet")
    return folder


def test_rows_written_again_are_not_appended_where_a_game_comes_back_to_its_start(tmp_path):
    away, back = ("a", [0.0, 0.0], 0, [1.0, 0.0], False), ("a", [1.0, 0.0], 1, [0.0, 0.0], False)
    last = ("a", [0.0, 0.0], 2, [2.0, 0.0], True)
    again = write_steps(tmp_path / "again", steps(away, back), steps(away, back, last))
    [episode] = read(again)
    assert episode.actions.tolist() == [0, 1, 2] and episode.terminated
    goes_on = write_steps(tmp_path / "goes on", steps(away, back), steps(last))
    assert read(goes_on)[0].actions.tolist() == [0, 1, 2]


def test_fragments_of_a_game_behind_a_gap_are_numbered(tmp_path):
    rows = [("a", [float(i), 0.0], 0, [i + 1.0, 0.0], i == 6) for i in range(7)]
    folder = write_steps(tmp_path, steps(*rows[:2]), steps(*rows[3:4]), steps(*rows[5:]))
    found = {episode.episode_id: episode.num_steps for episode in read(folder)}
    assert found == {"rllib/a": 2, "rllib/a#2": 1, "rllib/a#3": 2}


def tensors(arrays):
    """A column as Ray writes it: flat lists, whose shape stands in the schema."""
    kind = pa.large_list(pa.float32())
    shape = json.dumps(arrays[0].shape).encode()
    metadata = {b"ARROW:extension:name": b"ray.data.arrow_tensor_v2", b"ARROW:extension:metadata": shape}
    return pa.field("", kind, metadata=metadata), pa.array([array.ravel() for array in arrays], kind)


@pytest.mark.parametrize("as_steps", [False, True])
def test_frames_of_another_shape_are_not_taken_for_the_environments(tmp_path, as_steps):
    spec = EnvironmentSpec("frames", (3, 2, 2), np.dtype(np.float32), (3,))
    right, flat = np.arange(12, dtype=np.float32).reshape(3, 2, 2), np.arange(12, dtype=np.float32)
    for number, frame in enumerate((right, flat, right.transpose(1, 2, 0).copy())):
        folder = tmp_path / str(number)
        if as_steps:
            folder.mkdir()
            table = steps(("a", [], 0, [], True))
            for name in ("obs", "new_obs"):
                field, column = tensors([frame])
                table = table.set_column(table.column_names.index(name), field.with_name(name), column)
            pq.write_table(table, folder / "1.parquet")
        else:
            write(folder, recorded([frame] * 2, [0], [0.0]))
        [episode] = read(folder, spec)
        if number < 2:
            assert (episode.observations == right).all()
        else:
            with pytest.raises(RejectedEpisode, match="observations"):
                validate(episode, spec, 100)


def test_pickles_are_never_read(tmp_path):
    pq.write_table(steps(("a", "BCJNGGhAjwAA", 0, "BCJNGGhAjwAA", True)), tmp_path / "1.parquet")
    with pytest.raises(RunError, match="output_compress_columns"):
        read(tmp_path)
    right = write_steps(tmp_path / "right", steps(("a", [0.0, 0.0], 0, [1.0, 0.0], True)))
    packed = steps(("a", b"BCJ", 0, b"BCJ", True))
    packed = packed.set_column(1, "obs", packed.column("obs").cast(pa.large_binary()))
    later = write_steps(tmp_path / "later", pq.read_table(right), packed)
    offline = make_config({"actor": {"num_actors": 0}})
    with pytest.raises(RunError, match=r"column (new_)?obs holds pickles"):
        check_datasets([right, later], VECTOR, offline)  # before anything is stored
    data = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b"cos\nsystem\n."}
    assert unpack(pack({"array": data})) == {"array": None}


@pytest.mark.parametrize(
    ("reason", "observations", "actions", "reward"),
    [
        ("shape", [np.zeros(3, np.float32)] * 2, [0], 0.0),
        ("dtype", [np.zeros(2, np.float32)] * 2, [np.float32(0.5)], 0.0),  # continuous
        ("action", [np.zeros(2, np.float32)] * 2, [7], 0.0),
        ("not_finite", [np.float32([np.nan, 0])] * 2, [0], 0.0),
        ("not_finite", [np.zeros(2, np.float32)] * 2, [0], 1e300),
        ("shape", [{"camera": np.zeros(2, np.float32)}] * 2, [0], 0.0),
        ("shape", [{"obs": np.zeros(2, np.float32), "action_mask": np.ones(5)}] * 2, [0], 0.0),
    ],
)
def test_what_does_not_fit_is_refused_with_its_reason(tmp_path, reason, observations, actions, reward):
    [episode] = read(write(tmp_path, recorded(observations, actions, [reward])))
    with pytest.raises(RejectedEpisode) as refused:
        validate(episode, VECTOR, 100)
    assert refused.value.reason == reason


def test_damage_and_other_files_are_told(tmp_path):
    folder = write(tmp_path, pack({"id_": "abc"}))
    with pytest.raises(RunError, match="holds what RLlib"):
        read(folder)
    assert not is_recording(tmp_path / "nothing")
    write_dataset(tmp_path / "own.parquet", [StoredEpisode(0, make_episode(5))])
    assert not is_recording(tmp_path / "own.parquet")
    (folder / "later.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="can't read"):
        check_datasets([folder], VECTOR, make_config({"actor": {"num_actors": 0}}))
    two = VECTOR._replace(num_players=2)
    with pytest.raises(RunError, match="one player's turns"):
        check_datasets([folder], two, make_config({"actor": {"num_actors": 0}}))


@pytest.mark.parametrize("terminated", [True, False])
def test_ours_come_back_and_rllib_takes_them(tmp_path, terminated):
    ours = [
        StoredEpisode(i, make_episode(6, name=f"run/{i}", seed=i, terminated=terminated)) for i in range(3)
    ]
    assert write_recording(tmp_path / "out", lambda: ours) == (3, 18)
    for stored, found in zip(ours, read(tmp_path / "out", SPEC), strict=True):
        episode = stored.episode
        validate(found, SPEC, 100)
        for name in ("observations", "legal_masks", "actions", "rewards"):
            assert np.array_equal(getattr(found, name), getattr(episode, name))
        assert np.allclose(found.policies, episode.policies, atol=1e-6)
    [item, *_] = pq.read_table(tmp_path / "out").column("item").to_pylist()
    theirs = SingleAgentEpisode.from_state(unpack(item))
    first = ours[0].episode
    assert (theirs.id_, len(theirs), theirs.is_terminated) == ("run/0", 6, terminated)
    assert list(theirs.get_actions()) == first.actions.tolist()
    assert np.array_equal(theirs.get_observations(-1)["observations"], first.observations[-1])
    with pytest.raises(RunError, match="there already"):
        write_recording(tmp_path / "out", lambda: ours)


def test_games_for_two_are_not_written(tmp_path):
    with pytest.raises(RunError, match="game for two"):
        write_recording(tmp_path / "out", lambda: [StoredEpisode(0, make_episode(4, two_players=True))])
    assert not list(tmp_path.iterdir())


def test_masks_that_come_while_the_run_is_read_are_told(tmp_path):
    masked = make_episode(4)
    plain = replace(masked, legal_masks=np.ones_like(masked.legal_masks))
    reads = iter(([plain], [plain, masked]))
    with pytest.raises(RunError, match="export again"):
        write_recording(tmp_path / "out", lambda: [StoredEpisode(0, episode) for episode in next(reads)])
    assert not list(tmp_path.iterdir())


def test_a_recording_goes_into_a_run_once(tmp_path):
    def item(number):
        return recorded([np.eye(3, dtype=np.float32)[0]] * 2, [0], [1.0], id_=str(number))

    config = make_config(
        {"environment": {"id": "chain"}, "actor": {"num_actors": 0}, "replay": {"min_size_to_sample": 1}}
    )
    builder = Builder(config, "run")
    size = builder.spec.observation_shape[0]
    fits = recorded([np.eye(size, dtype=np.float32)[0]] * 2, [0], [1.0], id_="fits")
    folder = write(tmp_path / "recorded", fits, item(1), fits)
    counts = import_datasets([folder], tmp_path / "replay", builder)
    assert (counts.offered, counts.stored, counts.rejected) == (2, 1, {"shape": 1})
    again = import_datasets([folder], tmp_path / "replay", builder)
    assert (again.stored, again.duplicates) == (0, 1)


def test_the_layout_is_that_of_msgpack_numpy():
    reference = pytest.importorskip("msgpack_numpy")
    import msgpack

    value = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": [np.float32(0.5), {"c": True}], "d": None}
    theirs = msgpack.packb(value, default=reference.encode)
    assert pack(value) == theirs
    assert np.array_equal(unpack(theirs)["a"], value["a"]) and unpack(theirs)["b"][0] == np.float32(0.5)
