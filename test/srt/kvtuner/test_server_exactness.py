"""The served quantized cache against upstream's cache and against an independent simulation, in float32.

One flag-off server gives what everything is compared with; see ``flag_off``.
"""

import math
import os
from types import SimpleNamespace

import harness
import pytest
from harness.fake_quant import Recipe, window_logprobs
from harness.text import prose_tokens, windows
from harness.upstream import unpack_upstream

FLOAT32 = ("--dtype", "float32", "--sleep-on-idle")
CHUNK = 128
KV8 = Recipe(8, 8)
KV4 = Recipe(4, 4, asym=True, axis_key=1, axis_value=0, group=64)
K8V4 = Recipe(8, 4, asym=True)
KV4_PER_TOKEN = Recipe(4, 4)
KV4_ROTATED = Recipe(4, 4, hadamard_key=True)

IMPORT_LOGGER = '''
import os, sys
class Logger:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("sglang.srt.kvtuner"):
            with open(os.environ["KVTUNER_IMPORT_LOG"], "a") as log:
                log.write(name + "\\n")
sys.meta_path.insert(0, Logger())
'''


def greedy_prompts(checkpoint):
    """Twenty prompts of 200 to 2,000 tokens."""
    ids = prose_tokens(checkpoint)
    lengths = [200 + i * 1800 // 19 for i in range(20)]
    return [ids[97 * i : 97 * i + length] for i, length in enumerate(lengths)]


def greedy(server, prompts):
    return [server.generate(p, 32, sampling_params={"ignore_eos": True})["output_ids"] for p in prompts]


def perplexity(server, texts):
    """Perplexity of the windows, teacher-forced through the server's input log-probabilities."""
    logprobs = []
    for ids in texts:
        answer = server.generate(ids, 1, return_logprob=True, logprob_start_len=0)
        logprobs += [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    assert len(logprobs) == sum(len(ids) - 1 for ids in texts)
    return math.exp(-sum(logprobs) / len(logprobs))


def simulated_perplexity(checkpoint, texts, recipe):
    return math.exp(-window_logprobs(checkpoint, texts, recipe, CHUNK).mean().item())


@pytest.fixture(scope="module")
def texts(smollm2_checkpoint):
    return windows(smollm2_checkpoint, 4, 1024)


@pytest.fixture(scope="module")
def flag_off(smollm2_checkpoint, texts, tmp_path_factory):
    """What the server answers with the flag off, and which of our modules it imported."""
    folder = tmp_path_factory.mktemp("flag_off")
    (folder / "sitecustomize.py").write_text(IMPORT_LOGGER)
    imports = folder / "imports.log"
    imports.touch()
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {"PYTHONPATH": path, "KVTUNER_IMPORT_LOG": str(imports)}
    flags = (*FLOAT32, "--chunked-prefill-size", "2048")
    with harness.launch_server(smollm2_checkpoint, *flags, log_path=folder / "server.log", env=env) as server:
        return SimpleNamespace(
            tokens=greedy(server, greedy_prompts(smollm2_checkpoint)),
            perplexity=perplexity(server, texts),
            imports=set(imports.read_text().split()),
            page_size=server.server_info()["page_size"],
        )


def test_flag_off_runs_no_code_of_ours(flag_off):
    # The flags' own check at start-up and the switch are all that may load.
    allowed = {"sglang.srt.kvtuner", "sglang.srt.kvtuner.switch", "sglang.srt.kvtuner.config"}
    allowed |= {"sglang.srt.kvtuner.quantizer"}  # config.py takes the valid bits from it
    assert flag_off.imports <= allowed
    assert flag_off.page_size == 1


def test_flag_off_answers_as_upstream_does(smollm2_checkpoint, flag_off, launch_server, tmp_path):
    env = {"PYTHONPATH": str(unpack_upstream(tmp_path / "upstream"))}
    prompts = greedy_prompts(smollm2_checkpoint)[:5]
    with launch_server(smollm2_checkpoint, *FLOAT32, "--chunked-prefill-size", "2048", env=env) as server:
        assert "enable_kvtuner_quant" not in server.server_info()
        assert greedy(server, prompts) == flag_off.tokens[: len(prompts)]


def test_window_larger_than_every_sequence_equals_flag_off(smollm2_checkpoint, flag_off, launch_server):
    flags = ("--enable-kvtuner-quant", "--kvtuner-residual-length", "4096", "--chunked-prefill-size", "2048")
    # Prefixes shared through the radix cache would be read from packed pages.
    with launch_server(smollm2_checkpoint, *FLOAT32, *flags, "--max-running-requests", "4") as server:
        found = greedy(server, greedy_prompts(smollm2_checkpoint))
    assert found == flag_off.tokens


@pytest.mark.parametrize(
    "recipe, limit",
    [(KV8, 0.003), (K8V4, 0.01), (KV4_PER_TOKEN, 0.05), (KV4, 0.05), (KV4_ROTATED, 0.05)],
    ids=["KV8 symmetric", "K8V4 asymmetric", "KV4 per token", "KV4 K per channel", "KV4 K rotated"],
)
def test_perplexity_of_the_served_cache(smollm2_checkpoint, texts, flag_off, launch_server, recipe, limit):
    flags = (*recipe.flags(), "--kvtuner-residual-length", "0", "--chunked-prefill-size", str(CHUNK))
    with launch_server(smollm2_checkpoint, *FLOAT32, *flags) as server:
        served = perplexity(server, texts)
    simulated = simulated_perplexity(smollm2_checkpoint, texts, recipe)
    print(f"perplexity: flag off {flag_off.perplexity:.4f}, served {served:.4f}, simulated {simulated:.4f}")
    assert abs(served / flag_off.perplexity - 1) <= limit
    excess = simulated - flag_off.perplexity
    assert abs(served - simulated) <= max(0.1 * abs(excess), 0.002)
