"""The buffers: shapes, bytes, and that no two share memory."""

import itertools

import pytest
import torch

from harness.cache import mixed_format
from sglang.srt.kvtuner.cache.storage import CacheStorage

FORMAT = mixed_format(page_size=16, residual=20, layers=3, sinks=4)


def allocate(dtype=torch.bfloat16):
    return CacheStorage.allocate(
        FORMAT.layers,
        num_pages=7,
        num_slots=5,
        ring_length=FORMAT.ring_length,
        residual_length=FORMAT.residual_length,
        kv_heads=3,
        dtype=dtype,
        device="cpu",
    )


@pytest.mark.parametrize("dtype, itemsize", [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_shapes_and_bytes(dtype, itemsize):
    storage = allocate(dtype)
    assert (storage.num_pages, storage.num_slots, storage.page_size, storage.ring_length) == (7, 5, 16, 48)
    for layer, expected in zip(storage.layers, FORMAT.layers, strict=True):
        for half, fmt in ((layer.key, expected.key), (layer.value, expected.value)):
            assert half.format == fmt
            assert half.pages.shape == (7, 3, fmt.block_bytes) and half.pages.dtype == torch.uint8
            assert half.ring.shape == (5, 48, 3, 16) and half.ring.dtype == dtype
            assert half.sinks.shape == (7, expected.sink_length, 3, 16) and half.sinks.dtype == dtype
    assert storage.page_bytes() == 7 * 3 * sum(layer.page_bytes_per_head for layer in FORMAT.layers)
    assert storage.ring_bytes() == 2 * 3 * 5 * 48 * 3 * 16 * itemsize
    assert storage.sink_bytes() == 2 * 7 * 4 * 3 * 16 * itemsize, "one of three layers has sinks"


def test_no_two_buffers_share_memory():
    storage = allocate()
    buffers = [t for half in storage.keys + storage.values for t in (half.pages, half.ring, half.sinks) if t.numel()]
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in buffers)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


def test_buffers_start_empty():
    storage = allocate()
    assert not any(t.any() for half in storage.keys + storage.values for t in (half.pages, half.ring, half.sinks))
