import numpy as np
import pytest
import torch

from distributed_muzero.config import NetworkConfig
from distributed_muzero.environments.base import EnvironmentSpec
from distributed_muzero.errors import ConfigError
from distributed_muzero.networks.base import as_networks
from distributed_muzero.networks.mlp import MLP
from distributed_muzero.networks.registry import make_networks, network_names, register_networks
from tests.games import nim_functions

SPEC = EnvironmentSpec("t", (4,), np.dtype(np.float32), (2,))


def weights(networks):
    return torch.cat([p.detach().flatten() for p in networks.parameters()])


def test_same_seed_same_weights_another_seed_others():
    first, again, other = (weights(make_networks(SPEC, 1, NetworkConfig(), seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_making_networks_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_networks(SPEC, 1, NetworkConfig(), seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_registered_factory_is_found_by_name_and_gets_spec_history_and_config():
    class Wide(MLP):
        def __init__(self, spec, history_length, config):
            super().__init__(spec, history_length, config)
            self.arguments = spec, history_length, config

    register_networks("wide-of-the-registry-test", Wide)
    config = NetworkConfig(name="wide-of-the-registry-test")
    assert make_networks(SPEC, 3, config).arguments == (SPEC, 3, config)
    assert "wide-of-the-registry-test" in network_names()


def test_a_name_can_be_taken_once_only():
    with pytest.raises(ConfigError, match="exist already"):
        register_networks("mlp", MLP)


def test_unknown_name_is_an_error_that_lists_what_exists():
    with pytest.raises(ConfigError, match=r"no networks 'mpl'.*mlp"):
        make_networks(SPEC, 1, NetworkConfig(name="mpl"))


def test_our_five_functions_are_recognised_and_others_wrapped():
    networks = make_networks(SPEC, 1, NetworkConfig())
    assert as_networks(*networks.functions) is networks
    h, g_r, g_s, f_v, f_p = networks.functions
    assert as_networks(h, g_r, g_s, lambda s: f_v(s), f_p) is not networks  # one is another: none is assumed
    assert as_networks(*nim_functions()).value(torch.ones(3, 1)).tolist() == [0, 0, 0]
