"""Copies between slots of caches given by address."""

import pytest
import torch

from sgl_kernel import copy_all_layer_kv_cache_cpu


def addresses(buffers, dtype=torch.uint64):
    return torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=dtype)


def strides(buffers):
    return torch.tensor([buffer[0].numel() * buffer.element_size() for buffer in buffers])


@pytest.mark.parametrize("pointer_dtype", [torch.uint64, torch.int64])
def test_overlapping_copies_read_before_they_write(pointer_dtype):
    # Buffers of different widths and dtypes, as the layers of a mixed cache are.
    buffers = [torch.randn(16, 2, 8), torch.randn(16, 3).bfloat16(), torch.arange(80, dtype=torch.uint8).view(16, 5)]
    before = [buffer.clone() for buffer in buffers]
    source, target = [3, 4, 5, 9], [4, 5, 6, 3]
    copy_all_layer_kv_cache_cpu(
        addresses(buffers, pointer_dtype), strides(buffers), torch.tensor(target), torch.tensor(source)
    )
    for buffer, old in zip(buffers, before):
        expected = old.clone()
        for to, origin in zip(target, source):
            expected[to] = old[origin]
        assert torch.equal(buffer, expected)


def test_an_empty_list_copies_nothing():
    buffer = torch.arange(6.0).view(3, 2)
    none = torch.empty(0, dtype=torch.int64)
    copy_all_layer_kv_cache_cpu(addresses([buffer]), strides([buffer]), none, none)
    assert buffer.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "pointer, target, source, message",
    [(None, [-1], [0], "negative"), (0, [1], [0], "null"), (None, [0, 1], [2], "must have 1 elements")],
)
def test_what_cannot_be_copied_is_refused(pointer, target, source, message):
    buffer = torch.zeros(4, 2)
    pointers = addresses([buffer]) if pointer is None else torch.tensor([pointer])
    with pytest.raises(ValueError, match=message):
        copy_all_layer_kv_cache_cpu(pointers, strides([buffer]), torch.tensor(target), torch.tensor(source))
