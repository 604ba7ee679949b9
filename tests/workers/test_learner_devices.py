"""Several devices learn what one device would: real processes on this machine, over gloo."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from distributed_muzero import checkpoint
from distributed_muzero.algorithm.losses import LossWeights
from distributed_muzero.algorithm.training import add_row_gradients
from distributed_muzero.config import load_preset, make_config
from distributed_muzero.errors import ConfigError, ContractError, NonFiniteError, RunError
from distributed_muzero.networks.device import choose_devices
from distributed_muzero.networks.flat import FlatWeights
from distributed_muzero.networks.mlp import MLP
from distributed_muzero.networks.registry import register_networks
from distributed_muzero.observability.progress import Progress
from distributed_muzero.run_folder import create_run
from distributed_muzero.workers import data_parallel, learner_group, local
from distributed_muzero.workers.bookkeeper import Bookkeeper
from distributed_muzero.workers.builder import Builder
from distributed_muzero.workers.learner import Learner
from distributed_muzero.workers.learner_group import DeviceLost
from distributed_muzero.workers.run_state import outcome
from tests.processes import find_role, run, started, status, wait_for
from tests.workers.test_learner import SMALL, digest, make_batches

ROWS = 12


def make_builder(num_devices, environment=SMALL["environment"], **network):
    learner = {"batch_size": ROWS, "num_devices": num_devices, "max_grad_norm": 1e9}
    sections = {
        "environment": environment,
        "network": network,
        "replay": {"samples_per_insert": 64.0},
        "learner": learner,
    }
    return Builder(make_config(SMALL, sections), "run")


BATCHES = [
    batch._replace(importance_weights=np.random.default_rng(i).uniform(0.1, 2, ROWS).astype(np.float32))
    for i, batch in enumerate(make_batches(make_builder(1), 24))
]


def helpers_of(pid=None):
    """The processes of the learner's further devices."""
    found = []
    for process in psutil.Process(pid or os.getpid()).children(recursive=True):
        try:
            if "distributed_muzero.workers.learner_peer" in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="class", params=[2, 3])
def shared_learner(request):
    learner = make_builder(request.param).learner()
    yield learner, learner.state()
    learner.close()
    learner.close()
    assert not helpers_of()


@pytest.fixture
def several(shared_learner):
    """A learner with several devices, as new."""
    learner, at_first = shared_learner
    learner.restore(*at_first)
    return learner


@pytest.fixture
def one():
    return make_builder(1).learner()


def close(actual, expected):
    """Equal but for the order in which float32 numbers are added up."""
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * scale)


class TestAsOneDevice:
    """One group of devices for all of these, which begin with new weights each."""

    def test_gradients_metrics_and_priorities_are_those_of_one_device(self, several, one):
        for batch in BATCHES[:4]:
            expected, metrics = one.step(batch), several.step(batch)
            close(several.flat.vector.grad.numpy(), one.flat.vector.grad.numpy())
            assert metrics == pytest.approx(expected, rel=1e-5)
            close(several.priorities(batch).priorities, one.priorities(batch).priorities)

    def test_gradients_agree_with_float64(self, several):
        before = several.flat.read()
        several.step(BATCHES[0])
        networks = make_builder(1).networks()
        FlatWeights(networks).write(before)
        for buffer, as_normalized in zip(networks.buffers(), several.networks.buffers(), strict=True):
            buffer.copy_(as_normalized)
        networks.double().normalizer.eval()
        for parameter in networks.parameters():
            parameter.grad = None
        batch = BATCHES[0]
        inputs = [torch.from_numpy(batch.target_actions).long()]
        inputs += [torch.from_numpy(array).double() for array in batch[1:2] + batch[3:5]]
        weights = torch.from_numpy(batch.importance_weights).double()
        inputs = (torch.from_numpy(batch.observations), *inputs)
        add_row_gradients(networks, inputs, weights, LossWeights(1.0, 1.0, 1.0))
        expected = torch.cat([parameter.grad.flatten() for parameter in networks.parameters()])
        assert expected.dtype == torch.float64
        close(several.flat.vector.grad.numpy(), expected.numpy())

    def test_after_twenty_steps_the_weights_are_those_of_one_device(self, several, one):
        for batch in BATCHES[:20]:
            one.step(batch)
            several.step(batch)
        assert (one.flat.read() - make_builder(1).learner().flat.read()).abs().max() > 0.01
        # Adam divides by the size of the gradient: where that is near 0, rounding counts as much as a gradient. A step
        # of learning rate 0.002 can differ by as much in theory; 1e-5 is a hundred times what was seen.
        np.testing.assert_allclose(several.flat.read(), one.flat.read(), atol=1e-5)
        np.testing.assert_allclose(several.average_weights(), one.average_weights(), atol=1e-5)

    def test_statistics_of_the_observations_are_bit_for_bit_those_of_one_device(self, several, one):
        for batch in BATCHES[:5]:
            one.step(batch)
            several.step(batch)
        for name, buffer in one.networks.normalizer.named_buffers():
            assert torch.equal(several.networks.normalizer.get_buffer(name), buffer)

    def test_several_devices_go_on_bit_for_bit_from_their_checkpoint(self, several):
        for batch in BATCHES[:3]:
            several.step(batch)
        saved = several.state()
        for batch in BATCHES[3:6]:
            several.step(batch)
        expected = digest(several)
        several.restore(*saved)
        for batch in BATCHES[3:6]:
            several.step(batch)
        assert digest(several) == expected

    def test_one_device_goes_on_from_a_checkpoint_of_several_and_the_other_way_round(self, several, one):
        other = make_builder(1).learner()
        for batch in BATCHES[:3]:
            one.step(batch)
            several.step(batch)
        other.restore(*several.state())
        several.restore(*one.state())
        for batch in BATCHES[3:6]:
            for learner in (one, several, other):
                learner.step(batch)
        assert one.num_steps == several.num_steps == other.num_steps == 6
        for learner in (several, other):
            np.testing.assert_allclose(learner.flat.read(), one.flat.read(), atol=1e-5)

    def test_a_batch_with_nan_changes_nothing_and_the_next_one_is_learnt_from(self, several, one):
        one.step(BATCHES[0])
        several.step(BATCHES[0])
        weights, moment = several.flat.read(), several.optimizer.state[several.flat.vector]["exp_avg"].clone()
        # In the rows of the last device, and where all devices' normalizers learn from it.
        returns = BATCHES[1].target_returns.copy()
        returns[-1, 0] = np.nan
        observations = BATCHES[1].observations.copy()
        observations[-1] = np.nan
        for wrong in ({"target_returns": returns}, {"observations": observations}):
            with pytest.raises(NonFiniteError, match="learner step 1"):
                several.step(BATCHES[1]._replace(**wrong))
            assert torch.equal(several.flat.read(), weights)
            assert torch.equal(several.optimizer.state[several.flat.vector]["exp_avg"], moment)
        one.step(BATCHES[2])
        several.step(BATCHES[2])
        np.testing.assert_allclose(several.flat.read(), one.flat.read(), atol=1e-5)

    def test_rows_that_cant_be_shared_are_refused_and_the_next_batch_is_learnt_from(self, several):
        seven = BATCHES[0]._replace(
            **{name: getattr(BATCHES[0], name)[:7] for name in BATCHES[0]._fields[:-1]}
        )
        with pytest.raises(ContractError, match="7 rows can't be shared"):
            several.step(seven)
        several.step(BATCHES[0])
        assert several.num_steps == 1

    def test_a_second_group_in_one_process_is_refused(self, several):
        with pytest.raises(RunError, match="one learner with several devices"):
            make_builder(2).learner()
        several.step(BATCHES[0])


OWN_NETWORKS = """
import torch
from torch import nn
from distributed_muzero.networks.mlp import MLP

class Odd(MLP):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = nn.BatchNorm1d(self.representation_layers[0].in_features)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("share", torch.full((), 1 / 3, dtype=torch.float64))

    def representation(self, observations):
        self.seen = self.features(observations) * self.share.float()
        return self.representation_layers(self.dropout(self.norm(self.seen)))
"""


@pytest.fixture
def odd_networks(tmp_path, monkeypatch):
    """Networks that normalize each device's rows apart and draw numbers, of a package that all processes see."""
    (tmp_path / "odd_networks.py").write_text(OWN_NETWORKS)
    about = tmp_path / "odd_networks-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-networks\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[distributed_muzero.networks]\nodd = odd_networks:Odd\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "odd"


def test_other_networks_statistics_are_of_the_first_devices_rows_and_what_they_draw_can_be_repeated(
    odd_networks,
):
    learner = make_builder(2, name=odd_networks).learner()
    try:
        learner.step(BATCHES[0])
        seen = learner.networks.seen.detach()
        assert len(seen) == ROWS // 2
        norm = learner.networks.norm
        torch.testing.assert_close(norm.running_mean, norm.momentum * seen.mean(0))
        assert norm.num_batches_tracked == 1 and learner.networks.share == 1 / 3
        saved = learner.state()
        for batch in BATCHES[1:4]:
            learner.step(batch)
        expected = digest(learner)
        learner.restore(*saved)
        for batch in BATCHES[1:4]:
            learner.step(batch)
        assert digest(learner) == expected
    finally:
        learner.close()


def test_devices_that_see_unlike_numbers_of_tokens_learn_what_one_device_would():
    """Statistics are of tokens alone: here of 12 on one device, of 30 on the other."""
    pytest.importorskip("mathy_envs", reason="mathy isn't installed: pip install 'distributed_muzero[mathy]'")
    environment = {"id": "mathy:poly-easy", "kwargs": {"max_nodes": 9}}
    network = {"name": "node_sequence", "embedding_size": 8, "num_heads": 2, "num_blocks": 1}
    one, several = (make_builder(number, environment, **network).learner() for number in (1, 2))
    try:
        for batch in make_batches(make_builder(1, environment, **network), 3):
            for row, observation in enumerate(batch.observations[:, 0]):
                observation[1 + row // 2 :, 0] = 0
            one.step(batch)
            several.step(batch)
            close(several.flat.vector.grad.numpy(), one.flat.vector.grad.numpy())
        for ours, theirs in zip(several.networks.buffers(), one.networks.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    finally:
        several.close()


def test_every_device_computes_in_the_learners_dtype():
    config = make_builder(2).config
    config = config.model_copy(
        update={"learner": config.learner.model_copy(update={"compute_dtype": "bfloat16"})}
    )
    exact, coarse = make_builder(1).learner(), Builder(config, "run").learner()
    try:
        for batch in BATCHES[:5]:  # away from heads of zeros, which say the same in any arithmetic
            exact.step(batch)
        coarse.flat.write(exact.flat.read())
        expected, metrics = exact.step(BATCHES[5]), coarse.step(BATCHES[5])
        assert metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=0.02)
        errors = [learner.priorities(BATCHES[5]).priorities for learner in (exact, coarse)]
        for part in np.split(np.stack(errors), 2, axis=1):  # of one device each
            assert (part[0] != part[1]).any()
    finally:
        coarse.close()


def test_networks_that_the_other_processes_dont_know_are_a_mistake_in_the_config():
    register_networks("of-this-process-alone", MLP)
    with pytest.raises(ConfigError, match="no networks 'of-this-process-alone'"):
        make_builder(2, name="of-this-process-alone").learner()
    assert not helpers_of()


def test_a_device_that_is_killed_in_mid_step_is_told_and_nobody_is_left():
    learner = make_builder(3).learner()
    learner.step(BATCHES[0])
    first, second = helpers_of()
    before = learner.flat.read()
    second.suspend()  # the others wait for it
    killed = []

    def kill():
        killed.append(time.monotonic())
        second.kill()

    threading.Timer(0.5, kill).start()
    with pytest.raises(DeviceLost, match=r"device \d of the learner's 3 was killed by signal 9"):
        learner.step(BATCHES[1])
    assert time.monotonic() - killed[0] < 5
    assert not first.is_running() and not second.is_running()
    assert torch.equal(learner.flat.read(), before) and learner.num_steps == 1
    with pytest.raises(DeviceLost, match="start another learner"):
        learner.step(BATCHES[1])
    learner.close()


def test_a_device_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(learner_group, "COLLECTIVE_SECONDS", 1.5)
    monkeypatch.setattr(learner_group, "LAST_WORDS_SECONDS", 0.2)
    learner = make_builder(2).learner()
    (helper,) = helpers_of()
    helper.suspend()
    began = time.monotonic()
    with pytest.raises(DeviceLost, match="lost each other"):
        learner.step(BATCHES[0])
    assert 1 < time.monotonic() - began < 8
    assert not helper.is_running()


LONELY = """
from tests.workers.test_learner_devices import BATCHES, make_builder
learner = make_builder(3).learner()
learner.step(BATCHES[0])
print("ready", flush=True)
input()
learner.step(BATCHES[0])
"""


def test_devices_of_a_killed_learner_end_also_where_they_hang():
    process = subprocess.Popen(
        [sys.executable, "-c", LONELY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        helpers = helpers_of(process.pid)
        assert len(helpers) == 2
        helpers[1].suspend()
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(0.3)  # the learner and one device wait for the other one in the middle of a step
        process.kill()
        _, alive = psutil.wait_procs(helpers[:1], timeout=5)
        assert not alive
        helpers[1].resume()
        _, alive = psutil.wait_procs(helpers[1:], timeout=5)
        assert not alive
    finally:
        process.kill()
        process.communicate()


def test_a_run_in_one_process_saves_what_was_learnt_when_a_device_is_lost(tmp_path):
    config = make_config(load_preset("debug"), {"learner": {"num_devices": 2}, "run": {"max_minutes": 1}})
    folder = create_run(tmp_path, "r", config)
    book = Bookkeeper(config, folder, Progress(Console(file=io.StringIO())))

    def kill_when_it_has_learnt():
        if book.state.learner.learner_steps:
            for helper in helpers_of():
                helper.kill()
        return False

    with pytest.raises(RunError, match=r"was killed by signal 9\. What was learnt is saved"):
        outcome(local.turns(config, "r", book, kill_when_it_has_learnt))
    book.close("failed")
    assert checkpoint.latest_checkpoint(folder.checkpoints).step >= book.state.learner.learner_steps > 0
    assert not helpers_of()


@pytest.mark.slow
def test_a_run_in_one_process_makes_its_steps_and_ends_clean(tmp_path):
    options = ("--preset", "debug", "--runs-dir", tmp_path, "--name", "r", "--set", "learner.num_devices=2")
    done = run("train", *options, "--in-process", "--max-train-steps", 60, "--max-minutes", 3, timeout=220)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "r")["learner_steps"] >= 60
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.long
def test_through_ray_a_learner_that_lost_a_device_is_replaced(tmp_path):
    options = ("--preset", "debug", "--runs-dir", tmp_path, "--name", "r", "--set", "learner.num_devices=2")

    def steps():
        return status(tmp_path / "r").get("learner_steps", 0)

    with started("train", *options, "--set", "run.max_train_steps=null", "--max-minutes", 3) as process:
        wait_for("a checkpoint", lambda: list((tmp_path / "r" / "checkpoints").glob("step_*/DONE")))
        (learner,) = find_role(process.pid, "LearnerWorker")
        (helper,) = helpers_of(learner.pid)
        before = steps()
        helper.kill()
        wait_for("more learner steps", lambda: steps() > before + 100)
        (successor,) = find_role(process.pid, "LearnerWorker")
        assert successor.pid != learner.pid
        (helper,) = helpers_of(successor.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        psutil.wait_procs([helper], timeout=5)
        assert not helper.is_running()
    assert "the learner was lost" in errors and "was killed by signal 9" in errors


def test_a_batch_that_the_devices_cant_share_is_refused():
    with pytest.raises(ConfigError, match="batch_size 16 can't be shared by num_devices 3"):
        make_config({"learner": {"batch_size": 16, "num_devices": 3}})


def test_several_devices_need_a_recipe_of_the_networks():
    builder = make_builder(2)
    with pytest.raises(ConfigError, match="hand the learner a recipe"):
        Learner(builder.networks(), builder.config.learner)


def test_fewer_gpus_than_devices_are_an_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [str(device) for device in choose_devices("auto", "learner.device", 2)] == ["cuda:0", "cuda:1"]
    assert [device.type for device in choose_devices("cpu", "learner.device", 3)] == ["cpu"] * 3
    with pytest.raises(ConfigError, match="3 GPUs are asked for, but torch sees 2 here"):
        choose_devices("cuda", "learner.device", 3)


def test_rows_of_any_dtype_come_out_of_their_bytes():
    tensors = [
        torch.arange(12, dtype=torch.uint8).view(3, 2, 2),
        torch.tensor([2**40, -1, 5]),
        torch.rand(3, 2),
        torch.tensor([[True], [False], [True]]),
        torch.rand(3, dtype=torch.float64),
    ]
    rows, layout = data_parallel.pack(tensors)
    assert rows.shape == (3, 4 + 8 + 8 + 1 + 8)
    for some in (slice(0, 3), slice(1, 2)):
        for tensor, expected in zip(data_parallel.unpack(rows[some], layout), tensors, strict=True):
            assert torch.equal(tensor, expected[some]) and tensor.dtype == expected.dtype
