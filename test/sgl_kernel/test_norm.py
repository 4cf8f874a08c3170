"""Root-mean-square normalisation, against a loop."""

import pytest
import torch

from sgl_kernel import rmsnorm


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rows_are_scaled_to_unit_mean_square(dtype, tolerance):
    x, weight, eps = torch.randn(5, 32).to(dtype), torch.randn(32).to(dtype), 1e-5
    result = rmsnorm(x, weight, eps)
    assert result.dtype == dtype
    for row, values in zip(result.double(), x.double()):
        root = (sum(float(value) ** 2 for value in values) / 32 + eps) ** 0.5
        expected = torch.tensor([float(v) / root * float(w) for v, w in zip(values, weight)], dtype=torch.float64)
        torch.testing.assert_close(row, expected, rtol=tolerance, atol=tolerance)


def test_out_is_written_and_returned():
    x, out = torch.randn(2, 4), torch.empty(2, 4)
    assert rmsnorm(x, torch.ones(4), out=out) is out
    assert torch.equal(out, rmsnorm(x, torch.ones(4)))


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match="rows have 4 elements"):
        rmsnorm(torch.randn(2, 4), torch.ones(3))
