"""The report of /server_info against figures worked out from the cache_format."""

from types import SimpleNamespace

import pytest
import torch

from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.cache.report import pool_report
from sglang.srt.kvtuner.config.cache_format import build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.hooks import contribute_internal_state
from sglang.version import __version__

LAYERS, HEADS, HEAD_DIM, PAGE, PAGES, SLOTS = 3, 2, 128, 64, 20, 5


def make_pool(dtype=torch.bfloat16, **settings):
    cache_format = build_cache_format(KVTunerConfig(**settings), num_layers=LAYERS, head_dim=HEAD_DIM, page_size=PAGE)
    return KVTunerTokenToKVPool(
        cache_format, size=(PAGES - 1) * PAGE, num_slots=SLOTS, kv_heads=HEADS, full_precision_dtype=dtype, device="cpu",
        start_layer=0, end_layer=LAYERS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings, key_bits, value_bits",
    [
        ({}, 4.25, 4.25),
        ({"asym": True}, 4.5, 4.5),
        ({"nbits_key": 8, "nbits_value": 2, "group_size": 32}, 8.5, 2.5),
        ({"nbits_key": 16}, 16, 4.25),
        ({"nbits_key": 8, "axis_key": 1, "group_size": 64, "asym": True}, 8.5, 4.5),
    ],
)
def test_stored_bits(settings, key_bits, value_bits):
    report = pool_report(make_pool(**settings))
    assert report["stored_bits_key"] == key_bits
    assert report["stored_bits_value"] == value_bits
    assert report["stored_bits"] == (key_bits + value_bits) / 2
    assert report["bytes_per_token"] == LAYERS * HEADS * HEAD_DIM * (key_bits + value_bits) / 8
    assert report["average_bits_key"] == settings.get("nbits_key", 4)
    assert report["average_bits_value"] == settings.get("nbits_value", 4)


@pytest.mark.parametrize("dtype, itemsize", [(torch.bfloat16, 2), (torch.float32, 4)])
def test_memory_and_capacity(dtype, itemsize):
    pool = make_pool(dtype=dtype, residual_length=100)
    report = pool_report(pool)
    token = 2 * LAYERS * HEADS * HEAD_DIM * itemsize
    ring_length = 3 * PAGE  # 100 tokens and the unfinished page, in whole pages
    assert report["bytes_per_token_full_precision"] == token
    assert report["ring_bytes"] == SLOTS * ring_length * token and report["ring_slots"] == SLOTS
    assert report["pool_bytes"] == PAGES * PAGE * LAYERS * HEADS * HEAD_DIM * 2 * 4.25 / 8
    assert report["capacity_tokens"] == (PAGES - 1) * PAGE
    assert report["capacity_tokens_full_precision"] == (report["pool_bytes"] + report["ring_bytes"]) // token


def test_what_attention_takes_is_reported_by_use():
    pool = make_pool()
    assert pool_report(pool)["attention_bytes"] == {}
    pool.kernel_bytes = {"prefill workspace of 7 tokens": 5}
    assert pool_report(pool)["attention_bytes"] == {"prefill workspace of 7 tokens": 5}


def test_sinks_are_part_of_what_a_token_costs():
    plain, report = pool_report(make_pool()), pool_report(make_pool(sink_length=4))
    assert report["sink_bytes"] == PAGES * 4 * report["bytes_per_token_full_precision"]
    assert report["pool_bytes"] == plain["pool_bytes"] + report["sink_bytes"]
    # Four of 64 tokens in 16 bits; packed pages cost what they did.
    assert (report["sink_bits"], plain["sink_bits"]) == (1.0, 0) and report["stored_bits"] == plain["stored_bits"]
    assert report["bytes_per_token"] == LAYERS * HEADS * HEAD_DIM * 2 * (4.25 + 1) / 8


def test_rotated_layers_are_counted():
    assert pool_report(make_pool())["hadamard_key_layers"] == 0
    assert pool_report(make_pool(hadamard_key=True))["hadamard_key_layers"] == LAYERS


def test_nonfinite_blocks_are_reported():
    pool = make_pool()
    assert pool_report(pool)["nonfinite_blocks"] == 0
    pool.storage.nonfinite_blocks.add_(3)
    assert pool_report(pool)["nonfinite_blocks"] == 3


def test_the_scheduler_state_gets_the_report():
    pool, state = make_pool(), {"kept": 1}
    scheduler = SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool))
    contribute_internal_state(scheduler, state)
    assert state == {"kept": 1, "kvtuner": {"version": __version__, **pool_report(pool)}}
    assert state["kvtuner"]["format_digest"] == pool.format.digest()
    assert state["kvtuner"]["format"] == pool.format.describe()
