import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_muzero.algorithm.value_transform import (
    CategoricalOutput,
    ScalarOutput,
    cross_entropy,
    inverse_transform,
    transform,
)

HEAD = CategoricalOutput(-20, 20, 41)


def test_transform_of_three_and_minus_eight_by_hand():
    # √(3+1) − 1 + 0.003 = 1.003;  −(√(8+1) − 1) − 0.008 = −2.008
    assert transform(torch.tensor([3.0, -8.0, 0.0])).tolist() == pytest.approx([1.003, -2.008, 0.0])


@settings(deadline=None)
@given(st.floats(-1e6, 1e6, width=32))
def test_inverse_undoes_the_transform_in_float32(x):
    back = inverse_transform(transform(torch.tensor(x, dtype=torch.float32)))
    assert float(back) == pytest.approx(x, rel=1e-5, abs=1e-6)


@settings(deadline=None)
@given(st.floats(-400, 400, width=32))
def test_the_mean_of_a_two_hot_target_is_the_transformed_number(x):
    hot = HEAD.two_hot(torch.tensor([x], dtype=torch.float64))
    assert (hot >= 0).all() and (hot > 0).sum() <= 2
    assert float(hot.sum()) == pytest.approx(1)
    assert float(hot @ HEAD.support(hot)) == pytest.approx(
        float(transform(torch.tensor(x, dtype=torch.float64)))
    )


def test_two_hot_by_hand():
    # h(3) = 1.003 lies between the bins of 1 and 2 of the support −2 … 2
    hot = CategoricalOutput(-2, 2, 5).two_hot(torch.tensor([3.0], dtype=torch.float64))
    assert hot[0].tolist() == pytest.approx([0, 0, 0, 0.997, 0.003])


@pytest.mark.parametrize("head", [HEAD, CategoricalOutput(-1, 1, 2), CategoricalOutput(0, 10, 21)])
def test_both_ends_of_the_support_are_representable(head):
    for place, end in ((0, head.low), (-1, head.high)):
        number = inverse_transform(torch.tensor([float(end)], dtype=torch.float64))
        hot = head.two_hot(number)[0]
        assert float(hot[place]) == pytest.approx(1)
        # Logits that are sure of the end bin decode to the number at the end.
        assert float(head.decode(torch.log(hot + 1e-30))) == pytest.approx(float(number), rel=1e-6, abs=1e-6)


def test_what_lies_outside_the_support_goes_to_its_end():
    hot = HEAD.two_hot(torch.tensor([1e9, -1e9]))
    assert hot.argmax(1).tolist() == [40, 0] and hot.max(1).values.tolist() == [1, 1]


@settings(deadline=None)
@given(st.floats(-300, 300, width=32))
def test_decoding_the_two_hot_target_gives_the_number_back(x):
    hot = HEAD.two_hot(torch.tensor([x], dtype=torch.float64))
    assert float(HEAD.decode(torch.log(hot + 1e-30))) == pytest.approx(x, rel=1e-6, abs=1e-6)


def test_flat_logits_decode_to_zero():
    assert float(HEAD.decode(torch.zeros(1, 41))) == pytest.approx(0, abs=1e-5)


def test_cross_entropy_is_least_at_the_target_and_a_zero_row_costs_nothing():
    target = torch.tensor([[0.25, 0.75], [0.0, 0.0]])
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert cross_entropy(
        torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]])), target
    ).tolist() == pytest.approx([entropy, 0])
    assert float(cross_entropy(torch.zeros(1, 2), target[:1])) == pytest.approx(np.log(2))


def test_scalar_output_takes_columns_and_rows_alike():
    assert ScalarOutput().loss(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 5.0])).tolist() == [1, 9]
    assert ScalarOutput().loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])).tolist() == [1, 9]
