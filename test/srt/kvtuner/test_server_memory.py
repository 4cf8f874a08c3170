"""Memory of the quantized cache as the server reports it: capacity, and what happens when the pool is full."""

import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytestmark = pytest.mark.server

REQUESTS = 16
# A cap on tokens that no budget here reaches: the memory fraction decides.
BY_MEMORY = ("--max-total-tokens", "100000000", "--mem-fraction-static", "0.2", "--max-running-requests", str(REQUESTS))

# Of requests of up to 300 tokens the pool holds three.
FULL_POOL = (
    "--enable-kvtuner-quant",
    *("--kvtuner-nbits-key", "8", "--kvtuner-nbits-value", "8", "--dtype", "float32"),
    *("--max-total-tokens", "1024", "--schedule-conservativeness", "0.1", "--sleep-on-idle"),
)
# The scheduler lets a request begin where it has room for the prompt and this many tokens: for more than the pool holds.
OVERCOMMIT = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": 16}
NEW_TOKENS = 240


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


def test_retracted_requests_answer_as_they_do_alone(random_llama, launch_server):
    # In float32, with a window above every sequence and no prefix to share, nothing is read from packed pages: computing a
    # request anew changes nothing.
    flags = (*FULL_POOL, "--kvtuner-residual-length", "512")
    with launch_server(random_llama(), *flags, env=OVERCOMMIT) as server:
        prompts, together = answers_under_a_full_pool(server)
        server.flush_cache()
        alone = [server.generate(ids, NEW_TOKENS, return_logprob=True) for ids in prompts]
    for found, expected in zip(together, alone):
        assert found["output_ids"] == expected["output_ids"]
        assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-3)


def test_retracted_requests_read_their_own_pages(random_llama, launch_server):
    # With no window and chunks of one page, prefill, decode and a found prefix see the same: whole pages packed, the rest
    # in full precision. What is left is a few codes of 8 bits that rounding errors move.
    flags = ("--kvtuner-residual-length", "0", "--page-size", "64", "--chunked-prefill-size", "64")
    with launch_server(random_llama(), *FULL_POOL, *flags, env=OVERCOMMIT) as server:
        prompts, together = answers_under_a_full_pool(server)
        for ids, other, answer in zip(prompts, prompts[1:] + prompts[:1], together):
            found = torch.tensor(logprobs(answer))
            alone, of_others_page = (scored(server, begin, answer["output_ids"]) for begin in (ids, other))
            assert (found - alone).abs().max() < 0.5
            # A page of another request would be seen.
            assert (found - of_others_page).abs().mean() > 2


def scored(server, prompt, output):
    """Log-probabilities of given tokens after a prompt, computed anew, float32 [tokens]."""
    server.flush_cache()
    meta = server.generate(prompt + output, 1, return_logprob=True, logprob_start_len=0)["meta_info"]
    assert meta["cached_tokens"] == 0
    return torch.tensor([entry[0] for entry in meta["input_token_logprobs"][len(prompt) :]])


def answers_under_a_full_pool(server):
    """Prompts and answers of requests of which some were retracted."""
    prompts = [random.Random(seed).choices(range(300, 1000), k=60) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        # The scheduler only overcommits for requests that may end early, so ignore_eos stays off.
        answers = list(pool.map(lambda ids: server.generate(ids, NEW_TOKENS, return_logprob=True), prompts))
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0, "the pool never filled up"
    for answer in answers:
        meta = answer["meta_info"]
        assert meta["finish_reason"]["type"] == "stop" or meta["completion_tokens"] == NEW_TOKENS
    return prompts, answers


def logprobs(answer):
    """Log-probabilities of the generated tokens."""
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
