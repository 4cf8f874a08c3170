"""Memory: what sizing counts against what the pool allocates, and upstream's own sizing path on top of it."""

import logging
import re

import pytest
import torch

from harness.cache import mixed_format
from harness.sizing import MB, allocated
from sglang.srt.kvtuner.cache import sizing
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.cache.sizing import CacheCosts, KVTunerPoolConfigurator
from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.kvtuner.hooks import build_configurator
from sglang.srt.runtime_context import get_context


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("start, end", [(0, 4), (1, 3)])
@pytest.mark.parametrize("kv_heads, sinks", [(1, 0), (3, 0), (2, 5)])
def test_costs_are_the_bytes_of_the_buffers(dtype, start, end, kv_heads, sinks):
    cache_format = mixed_format(page_size=32, residual=40, sinks=sinks)
    costs = CacheCosts.of(cache_format, start_layer=start, end_layer=end, kv_heads=kv_heads, itemsize=dtype.itemsize)
    requests, tokens = 5, 9 * 32
    pool = KVTunerTokenToKVPool(
        cache_format, size=tokens, num_slots=requests + 1, kv_heads=kv_heads, full_precision_dtype=dtype, device="cpu",
        start_layer=start, end_layer=end,
    )  # fmt: skip
    assert pool.storage.page_bytes() + pool.storage.sink_bytes() == (tokens // 32 + 1) * costs.page_bytes
    assert pool.storage.sink_bytes() == (tokens // 32 + 1) * costs.sink_bytes
    assert pool.storage.ring_bytes() == costs.rings_bytes(requests)
    assert costs.full_token_bytes == 2 * (end - start) * kv_heads * 16 * dtype.itemsize
    assert sum(pool.get_kv_size_bytes()) == (tokens // 32 + 1) * costs.page_bytes + costs.rings_bytes(requests)


@pytest.mark.parametrize("requests", (1, 7, 100))
def test_tokens_fill_the_budget_and_no_more(requests):
    costs = CacheCosts(page_bytes=1000, ring_bytes=333, full_token_bytes=99, page_size=64)
    fits = (requests + 1) * 333 + 1000  # the padding slot and the padding page
    for budget in (0, fits - 1, fits, fits + 999):
        assert costs.tokens_within(budget, requests) == 0
    assert costs.tokens_within(fits + 1000, requests) == 64
    for budget in range(fits + 1000, fits + 50_000, 617):
        pages = costs.tokens_within(budget, requests) // 64
        assert (pages + 1) * 1000 + costs.rings_bytes(requests) <= budget
        assert (pages + 2) * 1000 + costs.rings_bytes(requests) > budget


def test_rings_take_at_most_their_share():
    costs = CacheCosts(page_bytes=1000, ring_bytes=333, full_token_bytes=99, page_size=64)
    for budget in range(5_000, 2_000_000, 33_333):
        requests = costs.requests_within_share(budget)
        assert requests == 1 or costs.rings_bytes(requests) <= sizing.RING_SHARE * budget
        assert costs.rings_bytes(requests + 1) > sizing.RING_SHARE * budget


@pytest.mark.parametrize("budget", (8 * MB, 20 * MB + 12_345))
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"kvtuner_nbits_key": 8, "kvtuner_residual_length": 0},
        {"kvtuner_nbits_key": 16, "kvtuner_sink_length": 4},
        {"kvtuner_asym": True, "kvtuner_axis_key": 1, "kvtuner_q_group_size": 32},
    ],
)
@pytest.mark.parametrize("requests", (None, 1, 12))
def test_the_pool_fills_the_budget(serve, budget, flags, requests):
    runner = serve(budget, max_running_requests=requests, **flags)
    config, pool = runner.settle()
    page_bytes = allocated(pool) - pool.storage.ring_bytes()
    page_bytes //= pool.storage.num_pages
    assert allocated(pool) <= budget < allocated(pool) + page_bytes
    assert pool.size == config.max_total_num_tokens and pool.size % 64 == 0
    assert pool.storage.num_slots == config.max_running_requests + 1
    if requests is not None:
        assert config.max_running_requests == requests
    else:
        assert config.max_running_requests == 1 or pool.storage.ring_bytes() <= 0.2 * budget


def test_heads_of_this_rank(serve):
    """Half the heads: every page and ring is half as large, so twice the tokens fit."""
    one, pool_of_one = serve(16 * MB, max_running_requests=4).settle()
    two, pool_of_two = serve(16 * MB, tp_size=2, max_running_requests=4).settle()
    assert (pool_of_one.storage.kv_heads, pool_of_two.storage.kv_heads) == (2, 1)
    assert pool_of_two.storage.page_bytes() // (
        two.max_total_num_tokens + 64
    ) * 2 == pool_of_one.storage.page_bytes() // (one.max_total_num_tokens + 64)
    assert two.max_total_num_tokens > 2 * one.max_total_num_tokens


@pytest.mark.parametrize("limit, tokens", [(2000, 1984), (256, 256)])
def test_max_total_tokens(serve, limit, tokens):
    config, pool = serve(16 * MB, max_total_tokens=limit).settle()
    assert config.max_total_num_tokens == pool.size == tokens
    # Fewer pages need fewer rings: a running request holds at least one.
    assert config.max_running_requests <= max(tokens // 64, 1)
    assert pool.storage.num_slots == config.max_running_requests + 1


@pytest.mark.parametrize("limit", (-1000, -1, 0, 64, 255))
def test_max_total_tokens_that_serve_nothing(serve, limit):
    with pytest.raises(KVTunerConfigError, match=f"--max-total-tokens is {limit}; .* 256 and above, 4 pages"):
        serve(16 * MB, max_total_tokens=limit).settle()


def test_a_budget_of_fewer_pages_than_a_request_needs(serve):
    costs = sizing.costs_of(runner := serve(MB, max_running_requests=1), sizing.cache_format_of(runner))
    runner.budget = costs.rings_bytes(1) + 5 * costs.page_bytes  # page 0 pads
    assert runner.settle()[0].max_total_num_tokens == 256
    runner.budget -= 1
    with pytest.raises(KVTunerConfigError, match="beside at least 4 packed pages"):
        runner.settle()


def test_max_total_tokens_keeps_the_requests_that_were_asked_for(serve):
    config, _ = serve(16 * MB, max_total_tokens=640, max_running_requests=5).settle()
    assert config.max_running_requests == 5


def test_rings_that_leave_no_room_for_a_page(serve):
    runner = serve(8 * MB, max_running_requests=500, kvtuner_residual_length=256)
    with pytest.raises(KVTunerConfigError) as caught:
        runner.settle()
    assert "--max-running-requests 500 and --kvtuner-residual-length 256 need " in str(caught.value)


def test_a_budget_too_small_for_one_ring(serve):
    with pytest.raises(KVTunerConfigError, match="--max-running-requests 1 and --kvtuner-residual-length 128 need"):
        serve(MB // 4).settle()


def test_requests_never_exceed_upstreams_own_bound(serve):
    runner = serve(1 << 40)
    configurator = build_configurator(runner)
    config = configurator.calculate_pool_sizes(runner.budget, 64)
    assert config.ring_requests == sizing.MOST_REQUESTS
    config.max_running_requests = 100
    assert configurator.finalize_with_max_running_requests(config).max_running_requests == 100


def test_the_log_tells_what_is_allocated(serve, caplog):
    with caplog.at_level(logging.INFO, logger=sizing.__name__):
        config, pool = serve(16 * MB).settle()
    text = caplog.text
    pages, page, page_bytes = map(int, re.search(r"(\d+) pages of (\d+) tokens, (\d+) bytes each", text).groups())
    assert pages * page_bytes == pool.storage.page_bytes() and (pages - 1) * page == pool.size
    slots = re.search(r"(\d+) requests and 1 padding slot, (\d+) tokens, (\d+) bytes each", text)
    requests, ring, ring_bytes = map(int, slots.groups())
    assert (requests + 1) * ring_bytes == pool.storage.ring_bytes() and ring == pool.storage.ring_length
    assert f"--max-running-requests was not given, {requests} requests are admitted" in text
    assert f"max_total_num_tokens={config.max_total_num_tokens}," in text
    assert "stored K 4.25, V 4.25" in text


def test_the_log_tells_what_sinks_cost(serve, caplog):
    with caplog.at_level(logging.INFO, logger=sizing.__name__):
        _, pool = serve(16 * MB, kvtuner_sink_length=3).settle()
    found = re.search(r"(\d+) pages of 64 tokens, (\d+) bytes each, (\d+) of them for sinks\)", caplog.text)
    pages, page_bytes, sink_bytes = map(int, found.groups())
    assert pages * sink_bytes == pool.storage.sink_bytes()
    assert pages * page_bytes == pool.storage.page_bytes() + pool.storage.sink_bytes()


def test_a_cache_dtype_that_the_checkpoint_forces_is_refused(serve):
    runner = serve(16 * MB)
    runner.kv_cache_dtype = torch.float8_e4m3fn
    with pytest.raises(KVTunerConfigError, match="KV cache in torch.float8_e4m3fn"):
        sizing.cache_format_of(runner)


def test_without_the_flag_upstream_sizes_its_own_pool(serve, monkeypatch):
    from sglang.srt.model_executor import pool_configurator

    runner = serve(16 * MB)
    assert isinstance(pool_configurator.create_memory_pool_configurator(runner), KVTunerPoolConfigurator)
    get_context().override("test", enable_kvtuner_quant=False)
    monkeypatch.setattr(sizing, "KVTunerPoolConfigurator", None)
    # Upstream's own configurators read more of a runner than this one has.
    with pytest.raises(AttributeError):
        pool_configurator.create_memory_pool_configurator(runner)
