"""How many GPUs are asked for."""

from __future__ import annotations

import pytest

from distributed_muzero.cluster.placement import gpu_share, learner_gpus
from distributed_muzero.config import make_config


@pytest.mark.parametrize(
    ("num_gpus", "learner", "num_devices", "reanalyse", "num_workers", "of_learner", "of_reanalyser"),
    [
        # One device: all who use a GPU share alike.
        (0, "auto", 1, "auto", 1, 0, 0),
        (0, "cuda", 1, "cpu", 1, 1, 1),
        (1, "cpu", 1, "auto", 2, 0, 1 / 2),
        (1, "auto", 1, "auto", 1, 1 / 2, 1 / 2),
        # Several: whole GPUs, and what is left is shared.
        (0, "auto", 2, "auto", 1, 0, 0),
        (0, "cuda", 2, "auto", 1, 2, 0),
        (4, "cpu", 2, "auto", 2, 0, 1),
        (4, "auto", 2, "auto", 2, 2, 1),
        (4, "auto", 3, "cuda", 2, 3, 1 / 2),
        (2, "auto", 2, "auto", 3, 2, 0),
        # A node that is yet to come.
        (2, "auto", 2, "cuda", 3, 2, 1 / 3),
        (1, "auto", 4, "cpu", 1, 4, 0),
    ],
)
def test_a_learner_with_several_devices_gets_a_gpu_for_each_and_the_others_share_the_rest(
    num_gpus, learner, num_devices, reanalyse, num_workers, of_learner, of_reanalyser
):
    sections = {
        "environment": {"id": "chain"},
        "learner": {"device": learner, "num_devices": num_devices, "batch_size": 12},
        "reanalyse": {"ratio": 0.5, "device": reanalyse, "num_workers": num_workers},
    }
    config = make_config(sections)
    assert learner_gpus(config, num_gpus) == of_learner
    assert gpu_share(config, num_gpus) == of_reanalyser
