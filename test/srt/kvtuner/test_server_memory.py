"""Memory of the quantized cache as the server reports it: capacity, and what happens when the pool is full."""

import random
import re
from concurrent.futures import ThreadPoolExecutor

REQUESTS = 16
# A cap on tokens that no budget here reaches: the memory fraction decides.
BY_MEMORY = ("--max-total-tokens", "100000000", "--mem-fraction-static", "0.2", "--max-running-requests", str(REQUESTS))


def logged_capacity(server):
    found = re.search(r"max_total_num_tokens=(\d+), chunked_prefill_size", server.log_text())
    assert found, server.error("the log does not give max_total_num_tokens")
    return int(found.group(1))


def test_capacity_at_the_same_memory_fraction(smollm2_checkpoint, launch_server):
    with launch_server(smollm2_checkpoint, *BY_MEMORY) as server:
        unquantized = logged_capacity(server)
    with launch_server(smollm2_checkpoint, *BY_MEMORY, "--enable-kvtuner-quant") as server:
        quantized = logged_capacity(server)
        cache = server.server_info()["internal_states"][0]["kvtuner"]
        log = server.log_text()
    pool_bytes, ring_bytes = cache["pool_bytes"], cache["ring_bytes"]
    print(
        f"tokens: {unquantized} unquantized, {quantized} quantized ({quantized / unquantized:.3f}x); "
        f"pages {pool_bytes} bytes, rings {ring_bytes} bytes"
    )
    assert pool_bytes > 1 << 30
    assert quantized >= 3.3 * unquantized
    # Without rings it would be 16 / 4.25; what is missing is the rings' share.
    without_rings = quantized * (pool_bytes + ring_bytes) / pool_bytes
    assert without_rings / cache["capacity_tokens_full_precision"] > 16 / 4.25 * 0.99
    # One ring per request and one for padding: 128 + 64 tokens of 30 layers, 3 heads, 64 elements, K and V, 2 bytes.
    assert ring_bytes == (REQUESTS + 1) * 192 * 30 * 3 * 64 * 2 * 2
    assert re.search(rf"residual windows .*{REQUESTS} requests and 1 padding slot, 192 tokens, 4423680 bytes each", log)
    assert cache["stored_bits"] == 4.25


def test_retraction_under_a_full_pool(random_llama, launch_server):
    flags = ("--max-total-tokens", "1024", "--schedule-conservativeness", "0.1", "--enable-kvtuner-quant")
    prompts = [random.Random(seed).choices(range(300, 1000), k=60) for seed in range(8)]
    with launch_server(random_llama(), *flags, "--kvtuner-residual-length", "32", "--sleep-on-idle") as server:
        with ThreadPoolExecutor(8) as pool:
            # The scheduler only overcommits for requests that may end early, so ignore_eos stays off.
            answers = list(pool.map(lambda ids: server.generate(ids, 240), prompts))
        log = server.log_text()
        assert server.is_healthy()
    assert "retract" in log.lower(), "the pool never filled up"
    for answer in answers:
        meta = answer["meta_info"]
        assert meta["finish_reason"]["type"] == "stop" or meta["completion_tokens"] == 240
