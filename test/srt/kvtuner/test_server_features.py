"""What the server does today goes on working with the quantized cache: one server, many kinds of requests."""

import contextlib
import json
import random
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import harness
from sglang.version import __version__

pytestmark = pytest.mark.server

PAGE = 64
LAYERS = 4
RESIDUAL = 64
FLAGS = (
    "--enable-kvtuner-quant",
    *("--kvtuner-nbits-key", "8", "--kvtuner-nbits-value", "4", "--kvtuner-asym"),
    *("--kvtuner-hadamard-key", "--kvtuner-sink-length", "4"),
    *("--kvtuner-residual-length", str(RESIDUAL), "--chunked-prefill-size", "512"),
    *("--dtype", "float32", "--sleep-on-idle", "--enable-cache-report"),
)


@pytest.fixture(scope="module", params=["auto", "reference"])
def server(random_llama, tmp_path_factory, request):
    """With the device's kernels, and with the torch reference."""
    log = tmp_path_factory.mktemp("features") / "server.log"
    env = {"SGLANG_KVTUNER_KERNELS": request.param}
    with harness.launch_server(random_llama(layers=LAYERS, head_dim=64), *FLAGS, log_path=log, env=env) as running:
        yield running


@pytest.fixture
def fresh(server):
    """The server with an empty radix cache; it must be idle and whole again afterwards."""
    flush(server)
    yield server
    assert server.is_healthy()
    flush(server)


def flush(server):
    """Empty the radix cache; succeeds only once no request runs."""
    server.flush_cache()


def prompt(seed, length):
    """Token ids without special ones."""
    return random.Random(seed).choices(range(300, 1000), k=length)


def run(server, ids, tokens):
    return server.generate(ids, tokens, sampling_params={"ignore_eos": True})["output_ids"]


def test_server_info_shows_flags_and_costs(server):
    info = server.server_info()
    assert info["enable_kvtuner_quant"] is True
    assert (info["kvtuner_nbits_key"], info["kvtuner_nbits_value"], info["kvtuner_asym"]) == (8, 4, True)
    cache = info["internal_states"][0]["kvtuner"]
    # 8 and 4 bits, and 16 bits each of scale and zero point for 64 elements.
    assert (cache["stored_bits_key"], cache["stored_bits_value"]) == (8.5, 4.5)
    # All layers are rotated; 4 of 64 tokens stay in 32 bits.
    assert (cache["hadamard_key_layers"], cache["sink_bits"]) == (LAYERS, 2.0)
    assert cache["capacity_tokens"] == info["max_total_num_tokens"] == 16384
    assert info["page_size"] == PAGE
    assert cache["attention"] in server.log_text()
    assert cache["version"] == info["version"] == __version__


def test_prefix_hit_reads_packed_pages(fresh):
    ids = prompt(2, 700)
    first = fresh.generate(ids, 8)
    second, third = fresh.generate(ids, 8), fresh.generate(ids, 8)
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == third["meta_info"]["cached_tokens"] == 640
    assert second["output_ids"] == third["output_ids"]


def test_requests_that_share_a_prefix_do_not_disturb_each_other(fresh):
    shared = prompt(0, 320)
    tails = [prompt(10 + i, 40 + 13 * i) for i in range(4)]
    run(fresh, shared, 1)
    alone = [run(fresh, shared + tail, 90) for tail in tails]
    flush(fresh)
    run(fresh, shared, 1)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda tail: run(fresh, shared + tail, 90), tails))
    assert together == alone


def test_batched_decode_equals_one_by_one(fresh):
    prompts = [prompt(20 + i, 20 + 9 * i) for i in range(6)]
    alone = []
    for ids in prompts:
        alone.append(run(fresh, ids, 150))
    flush(fresh)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda ids: run(fresh, ids, 150), prompts))
    assert together == alone


def test_chunked_prefill_does_not_depend_on_what_ran_before(fresh):
    ids = prompt(0, 3000)  # six chunks
    answers = []
    for other in (1, 2):
        answers.append(fresh.generate(ids, 8, return_logprob=True, logprob_start_len=0)["meta_info"])
        flush(fresh)
        # Leaves other tokens in pages and rings that the next round is given.
        run(fresh, prompt(other, 900), 8)
        flush(fresh)
    first, second = ([entry[0] for entry in meta["input_token_logprobs"][1:]] for meta in answers)
    assert len(first) == 2999
    assert first == second


def test_output_logprobs_agree_with_input_logprobs(fresh):
    ids = prompt(100, 90)
    answer = fresh.generate(ids, 20, return_logprob=True, sampling_params={"ignore_eos": True})
    sampled = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    flush(fresh)
    # Within the residual window both ways compute on full precision.
    again = fresh.generate(ids + answer["output_ids"], 1, return_logprob=True, logprob_start_len=0)
    scored = [entry[0] for entry in again["meta_info"]["input_token_logprobs"][-20:]]
    assert sampled == pytest.approx(scored, abs=1e-3)


def test_streaming_gives_the_same_tokens(fresh):
    ids = prompt(200, 150)
    whole = fresh.generate(ids, 24)["text"]
    flush(fresh)
    texts = [event["text"] for event in stream(fresh, ids, 24)]
    assert len(texts) > 5
    assert texts[-1] == whole


def test_abort_and_disconnect_free_the_request(fresh):
    ids = prompt(300, 200)
    events = stream(fresh, ids, 4000)
    next(events)
    events.close()  # the client goes away
    request = threading.Thread(target=lambda: run_quietly(fresh, ids))
    request.start()
    time.sleep(1.0)
    fresh.request("/abort_request", {"abort_all": True})
    request.join(60)
    assert not request.is_alive()
    flush(fresh)
    assert len(run(fresh, ids, 3)) == 3


def test_more_requests_than_rings_wait_their_turn(fresh):
    prompts = [prompt(40 + i, 30) for i in range(40)]
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda ids: run(fresh, ids, 12), prompts))
    assert [len(answer) for answer in answers] == [12] * 40


def stream(server, ids, tokens):
    body = {"input_ids": ids, "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": tokens}}
    body["sampling_params"]["ignore_eos"] = True
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


def run_quietly(server, ids):
    with contextlib.suppress(harness.server.ServerError):  # an aborted request may end with an error
        run(server, ids, 4000)
