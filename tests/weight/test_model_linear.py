"""A packed projection: the same numbers as torch's own, in few shapes, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
from flume_weight.model.linear import LONE_ROW_LIMIT, Linear, computed_rows


@pytest.mark.parametrize("in_size", [64, LONE_ROW_LIMIT + 64])
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17, 33, 130])
def test_every_row_is_what_it_is_alone_and_what_torch_says(rows, in_size):
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(48, in_size), torch.randn(48), torch.randn(rows, in_size)
    linear = Linear(weight.clone(), bias)
    linear.pack()
    y = linear(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), atol=1e-3, rtol=1e-4)
    for row in range(rows):
        assert torch.equal(y[row], linear(x[row : row + 1])[0])


def test_many_numbers_of_rows_are_computed_as_few_and_seldom_many_more():
    numbers = {computed_rows(rows, 64) for rows in range(1, 2049)}
    assert len(numbers) == 44
    assert all(rows <= computed_rows(rows, 64) <= max(16, 1.25 * rows) for rows in range(1, 2049))
    assert [computed_rows(rows, 64) for rows in (1, 9, 16, 512, 2048)] == [1, 9, 16, 512, 2048]
