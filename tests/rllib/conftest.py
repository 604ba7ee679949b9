"""A Ray of its own for the tests of a module, in a folder with a short path."""

import tempfile

import pytest
import ray
from ray import tune

from distributed_muzero.rllib import DistributedMuZero


@pytest.fixture(scope="module")
def own_ray():
    # Sockets live in Ray's folder, and their paths may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="dm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        tune.register_trainable(
            "DistributedMuZero", DistributedMuZero
        )  # forgotten with the Ray of another module
        yield
        ray.shutdown()
