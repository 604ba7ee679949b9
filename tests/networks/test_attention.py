import torch

from distributed_muzero.networks.attention import Layers, distance_bias, distance_buckets


def test_distance_buckets_by_hand():
    """Exact to 7, then 8 buckets up to 64, each √√√8 times as wide: the first holds 8 … 10; what is before is 16 on."""
    distances = torch.tensor([0, 1, 7, 8, 10, 11, 63, 64, 1000, -1, -8, -1000])
    assert distance_buckets(distances).tolist() == [0, 1, 7, 8, 8, 9, 15, 15, 15, 17, 24, 31]


def test_bias_of_slot_j_seen_from_slot_i_is_that_of_their_distance():
    table = torch.arange(64.0).view(32, 2)
    bias = distance_bias(table, 20)
    for i, j in ((0, 0), (0, 5), (5, 0), (19, 0), (3, 19)):
        assert bias[:, i, j].tolist() == table[distance_buckets(torch.tensor(j - i))].tolist()


def test_closed_slots_are_not_looked_at():
    torch.manual_seed(0)
    layers = Layers(8, 2, 2)
    x, is_open = torch.randn(1, 5, 8), torch.tensor([[1.0, 1, 1, 0, 0]])
    before = layers(x, is_open)
    x[0, 3:] = 100
    assert torch.equal(before[0, :3], layers(x, is_open)[0, :3])
    torch.testing.assert_close(before[0, :3], layers(x[:, :3], is_open[:, :3])[0])
