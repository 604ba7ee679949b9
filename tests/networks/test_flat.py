import numpy as np
import pytest
import torch
from torch import nn

from distributed_muzero.errors import CheckpointError
from distributed_muzero.networks.flat import FlatWeights


def make_module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


def inputs(seed=0):
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(seed))


def test_size_counts_parameters_and_floating_buffers():
    flat = FlatWeights(make_module())
    assert flat.vector.numel() == 3 * 4 + 4 + 2 * 4 + 4 + 1
    assert flat.size == flat.vector.numel() + 2 * 4  # running mean and variance, not the integer count


def test_flattening_changes_no_output():
    plain, flattened = make_module(), make_module()
    FlatWeights(flattened)
    assert torch.equal(plain(inputs()), flattened(inputs()))


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_on_the_vector_is_a_step_on_every_parameter(make_optimizer):
    plain, flattened = make_module(), make_module()
    flat = FlatWeights(flattened)
    one, other = make_optimizer(plain.parameters(), lr=0.1), make_optimizer([flat.vector], lr=0.1)
    for seed in range(3):
        for module, optimizer in ((plain, one), (flattened, other)):
            optimizer.zero_grad(set_to_none=module is plain)
            module(inputs(seed)).square().mean().backward()
            optimizer.step()
    for expected, actual in zip(plain.parameters(), flattened.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.untyped_storage().data_ptr() == flat.vector.untyped_storage().data_ptr()


def test_written_weights_make_the_same_module_buffers_included():
    source, target = make_module(), make_module()
    flat = FlatWeights(source)
    optimizer = torch.optim.SGD([flat.vector], lr=0.1)
    for seed in range(3):
        source(inputs(seed)).sum().backward()
        optimizer.step()
    copy = FlatWeights(target)
    copy.write(flat.read().numpy())
    assert torch.equal(source.eval()(inputs()), target.eval()(inputs()))
    assert target[1].running_mean.abs().sum() > 0


def test_what_was_read_is_a_copy():
    flat = FlatWeights(nn.Linear(2, 2))
    before = flat.read()
    kept = before.clone()
    flat.write(np.zeros(flat.size, np.float32))
    assert torch.equal(before, kept) and (flat.read() == 0).all()


def test_names_and_back_give_the_same_vector():
    flat = FlatWeights(make_module())
    weights = np.arange(flat.size, dtype=np.float32)
    arrays = flat.named_arrays(weights)
    assert arrays["0.weight"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert list(arrays)[-2:] == ["1.running_mean", "1.running_var"]
    assert (flat.vector_of(arrays) == weights).all()
    assert (
        flat.vector_of(dict(reversed(arrays.items()))) == weights
    ).all()  # the order in a file means nothing


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("3.bias"),
        lambda arrays: arrays.update(more=np.zeros(1)),
        lambda arrays: arrays.update({"0.weight": arrays["0.weight"].T}),
    ],
)
def test_weights_of_another_network_are_refused(change):
    flat = FlatWeights(make_module())
    arrays = flat.named_arrays(np.zeros(flat.size, np.float32))
    change(arrays)
    with pytest.raises(CheckpointError, match="don't fit this network"):
        flat.vector_of(arrays)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_vector_of_another_size_is_refused(change):
    flat = FlatWeights(make_module())
    with pytest.raises(CheckpointError, match="another network"):
        flat.write(np.zeros(flat.size + change, np.float32))


def test_shared_parameters_take_one_place():
    module = nn.Sequential(layer := nn.Linear(2, 2), layer)
    flat = FlatWeights(module)
    assert flat.size == 6
    flat.write(np.arange(6, dtype=np.float32))
    assert module[1].weight.tolist() == [[0, 1], [2, 3]]
