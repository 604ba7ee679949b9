import numpy as np
import pytest
import torch

from distributed_muzero.errors import NonFiniteError
from distributed_muzero.networks.flat import FlatWeights, packed, unpacked

VECTOR = torch.tensor([0.1, -2.0, 3e4, 1e-3])


@pytest.mark.parametrize(
    ("dtype", "num_bytes", "relative_error"),
    [("float32", 16, 0), ("float16", 8, 2**-11), ("bfloat16", 8, 2**-8)],
)
def test_what_is_packed_comes_back_within_the_rounding_of_its_type(dtype, num_bytes, relative_error):
    small = packed(VECTOR, dtype)
    assert small.nbytes == num_bytes
    small.flags.writeable = False  # as the object store shares it
    back = unpacked(small).float()
    assert ((back - VECTOR).abs() <= relative_error * VECTOR.abs() + 1e-12).all()
    module = torch.nn.Linear(1, 2)
    FlatWeights(module).write(small)
    np.testing.assert_array_equal(torch.cat([module.weight.flatten(), module.bias]).detach(), back)


def test_a_weight_beyond_float16_is_an_error_and_bfloat16_takes_it():
    large = torch.tensor([1.0, 7e4])
    with pytest.raises(NonFiniteError, match=r"learner\.weights_dtype to bfloat16"):
        packed(large, "float16")
    assert torch.isfinite(unpacked(packed(large, "bfloat16"))).all()
