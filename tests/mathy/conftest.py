"""For all of mathy's tests."""

import pytest

from distributed_muzero.mathy.agents.games import num_threads


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small take longest where threads wait for each other."""
    with num_threads(1):
        yield
