"""Upstream's view of the packed cache: sizes, what it may read, and what it must not."""

import pytest
import torch

from harness.cache import mixed_format
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool

HEADS, HEAD_DIM = 2, 16
START, END = 1, 3  # this rank's layers of the cache format's four


def make_pool(cache_format, num_pages=40, dtype=torch.bfloat16, num_slots=4):
    return KVTunerTokenToKVPool(
        cache_format,
        size=(num_pages - 1) * cache_format.page_size,
        num_slots=num_slots,
        kv_heads=HEADS,
        full_precision_dtype=dtype,
        device="cpu",
        start_layer=START,
        end_layer=END,
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_memory_is_what_the_formats_say(dtype):
    cache_format = mixed_format(page_size=32, residual=40)
    pool = make_pool(cache_format, num_pages=11, dtype=dtype, num_slots=7)
    local = cache_format.layers[START:END]
    keys = [11 * HEADS * layer.key.block_bytes for layer in local]
    values = [11 * HEADS * layer.value.block_bytes for layer in local]
    assert [t.pages.nbytes for t in pool.storage.keys] == keys and [
        t.pages.nbytes for t in pool.storage.values
    ] == values
    assert pool.storage.page_bytes() == sum(layer.page_bytes_per_head for layer in local) * 11 * HEADS
    ring = 7 * cache_format.ring_length * HEADS * HEAD_DIM * dtype.itemsize
    assert pool.storage.ring_bytes() == 2 * len(local) * ring
    assert pool.get_kv_size_bytes() == (sum(keys) + 2 * ring, sum(values) + 2 * ring)
    assert pool.mem_usage * 2**30 == pytest.approx(sum(pool.get_kv_size_bytes()))


def test_what_upstream_reads_of_a_pool():
    cache_format = mixed_format(page_size=32, residual=40)
    pool = make_pool(cache_format, num_pages=11)
    assert (pool.size, pool.page_size, pool.dtype, pool.layer_num) == (320, 32, torch.uint8, 2)
    assert pool.start_layer == START and pool.storage.dtype == torch.bfloat16


def test_there_are_no_rows_by_token_slot():
    """Upstream code that writes or reads such rows must fail and not corrupt pages."""
    pool, rows = make_pool(mixed_format()), torch.zeros(1, HEADS, HEAD_DIM)
    for call in (
        lambda: pool.get_key_buffer(1),
        lambda: pool.get_value_buffer(1),
        lambda: pool.get_kv_buffer(1),
        lambda: pool.set_kv_buffer(None, torch.tensor([1]), rows, rows),
    ):
        with pytest.raises(NotImplementedError, match="not supported with --enable-kvtuner-quant"):
            call()
