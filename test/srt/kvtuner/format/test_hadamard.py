"""The rotation of keys: the matrix that it is, what it leaves alone, and what it is good for."""

import pytest
import torch

from harness.fake_quant import Recipe, fake_quantize, hadamard_matrix, window_divergence
from harness.text import windows
from sglang.srt.kvtuner.format.formats import TensorFormat
from sglang.srt.kvtuner.format.hadamard import block_size, rotate
from sglang.srt.kvtuner.format.page_codec import pack_pages, unpack_pages

HEAD_DIMS = {64: 64, 128: 128, 256: 256, 80: 16, 96: 32, 48: 16, 24: 8, 6: 2}


@pytest.mark.parametrize("head_dim, block", HEAD_DIMS.items())
def test_the_matrix(head_dim, block):
    assert block_size(head_dim) == block
    matrix = rotate(torch.eye(head_dim), block)
    torch.testing.assert_close(matrix, hadamard_matrix(head_dim), rtol=0, atol=1e-6)
    # Orthonormal and symmetric: products of rotated rows are those of the rows, and twice is not at all.
    torch.testing.assert_close(matrix @ matrix, torch.eye(head_dim), rtol=0, atol=1e-6)
    inside = torch.block_diag(*[torch.ones(block, block)] * (head_dim // block)).bool()
    assert ((matrix.abs() - block**-0.5).abs()[inside] < 1e-6).all() and (matrix[~inside] == 0).all()


@pytest.mark.parametrize("head_dim", (64, 80))
def test_products_of_rotated_rows_are_kept(head_dim):
    q, k = torch.randn(2, 50, head_dim, generator=torch.Generator().manual_seed(0))
    rotated = rotate(q, block_size(head_dim)) @ rotate(k, block_size(head_dim)).T
    torch.testing.assert_close(rotated, q @ k.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_rows_are_rotated_in_float32(dtype):
    x = torch.randn(3, 5, 64).to(dtype)
    assert rotate(x, 64).dtype == torch.float32 and torch.equal(rotate(x, 64), rotate(x.float(), 64))


@pytest.mark.parametrize(
    "nbits, asym, axis, group", [(4, False, 0, 64), (4, True, 0, 16), (2, True, 1, 16), (8, False, 1, 32)]
)
@pytest.mark.parametrize("head_dim", (64, 192))
def test_rotated_pages_are_those_of_the_simulation(head_dim, nbits, asym, axis, group):
    """Rotated, rounded to the grid, rotated back."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, head_dim) * 2 + torch.randn(head_dim) * 5
    fmt = TensorFormat(nbits, asym, axis, group, 32, head_dim, True, block_size(head_dim))
    matrix = hadamard_matrix(head_dim)
    expected = fake_quantize(x @ matrix, nbits, asym, axis, group) @ matrix
    error = unpack_pages(pack_pages(x, fmt), fmt) - expected
    # The two add in different orders, so that a value or a scale near the middle of two steps may go either way.
    assert error.norm() < 0.02 * (expected - x).norm()


def test_outlier_channels_lose_their_cost():
    torch.manual_seed(0)
    x = torch.randn(4, 64, 64)
    x[..., [3, 40]] *= 30
    plain = TensorFormat(4, False, 0, 64, 64, 64, True)
    rotated = TensorFormat(4, False, 0, 64, 64, 64, True, 64)
    errors = [(unpack_pages(pack_pages(x, fmt), fmt) - x).norm() / x.norm() for fmt in (plain, rotated)]
    assert errors[1] < errors[0] / 1.5


def test_a_real_models_keys(smollm2_checkpoint):
    """4 bits, symmetric, per token: the divergence from the unquantized cache falls to less than a third."""
    recipes = [Recipe(4, 4), Recipe(4, 4, hadamard_key=True)]
    plain, rotated = window_divergence(smollm2_checkpoint, windows(smollm2_checkpoint, 2, 256), recipes, chunk=1)
    print(f"divergence: {plain:.4f}, with rotated keys {rotated:.4f}")
    assert plain > 0.01 and rotated < plain / 3
