import numpy as np

from distributed_muzero.chaos import mutators
from distributed_muzero.chaos.mutators import ARRAYS, SPEC, make_episode, make_mutators, run_mutators
from distributed_muzero.replay.validation import validate
from distributed_muzero.workers import replay_shard


def test_every_mutant_is_refused_with_a_reason_and_the_shard_goes_on(tmp_path):
    result = run_mutators(tmp_path / "shard", seed=3)
    assert result.n >= 40
    assert (result.accepted, result.crashed, result.unusable) == ([], [], [])


def test_what_is_mutated_is_valid():
    rng = np.random.default_rng(0)
    for num_steps in (1, 2, 30):
        validate(make_episode(rng, SPEC, num_steps, "sane"), SPEC, 50)


def test_mutants_follow_from_the_seed():
    def mutant(seed):
        rng = np.random.default_rng(seed)
        return make_mutators()["rewards with NaN"](make_episode(rng, SPEC, 6, "x"), rng).rewards.tobytes()

    assert mutant(1) == mutant(1) != mutant(2)


def test_without_validation_the_campaign_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(replay_shard, "validate", lambda *args: None)
    # What claims to be larger than any memory would really be stored.
    small = {name: mutate for name, mutate in make_mutators().items() if "1e9" not in name}
    monkeypatch.setattr(mutators, "make_mutators", lambda: small)
    result = run_mutators(tmp_path / "shard", seed=3)
    assert "player 7" in result.accepted and result.broken > 40


def test_arrays_that_only_lie_otherwise_in_memory_are_stored_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    episode = make_episode(rng, SPEC, 6, "strided")
    for name in ARRAYS:
        array = getattr(episode, name)
        strided = np.repeat(array, 2, axis=0)[::2]
        assert not strided.flags.c_contiguous
        object.__setattr__(episode, name, strided)
    for restart in range(2):
        shard = replay_shard.ReplayShard(SPEC, mutators._config(0), 0, tmp_path / "shard")
        if restart == 0:
            assert shard.insert([episode])[0].status == "stored"
        (entry,) = shard.ring
        held = shard.ring.episode(entry)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(held, name), getattr(episode, name))
        shard.close()
