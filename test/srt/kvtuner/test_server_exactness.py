"""The served quantized cache against upstream's cache and against an independent simulation, in float32.

One flag-off server gives what everything is compared with; see ``flag_off``.
"""

import math
import os
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch

import harness
from harness.chosen import chosen_values
from harness.fake_quant import Recipe, window_logprobs
from harness.text import prose_tokens, windows
from harness.upstream import unpack_upstream

pytestmark = pytest.mark.server

FLOAT32 = ("--dtype", "float32", "--sleep-on-idle")
CHUNK = 128
KV8 = Recipe(8, 8)
KV4 = Recipe(4, 4, asym=True, axis_key=1, axis_value=0, group=64)
K8V4 = Recipe(8, 4, asym=True)
KV4_PER_TOKEN = Recipe(4, 4)
KV4_ROTATED = Recipe(4, 4, hadamard_key=True)
KV4_G32 = Recipe(4, 4, asym=True, axis_key=1, group=32)
KV4_PER_TOKEN_G32 = Recipe(4, 4, group=32)
RECIPES = {
    "KV8 symmetric": (KV8, 0.003),
    "K8V4 asymmetric": (K8V4, 0.01),
    "KV4 per token": (KV4_PER_TOKEN, 0.05),
    "KV4 per token g32": (KV4_PER_TOKEN_G32, 0.02),
    "KV4 K per channel": (KV4, 0.05),
    "KV4 K per channel g32": (KV4_G32, 0.01),
    "KV4 K rotated": (KV4_ROTATED, 0.05),
}

# Runs in every process of a server, before anything else.
IMPORT_LOGGER = """
import os, sys
class Logger:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("sglang.srt."):
            with open(os.environ["KVTUNER_IMPORT_LOG"], "a") as log:
                log.write(f"{os.getpid()} {name}\\n")
sys.meta_path.insert(0, Logger())
"""
OURS = "sglang.srt.kvtuner"


def greedy_prompts(checkpoint):
    """Twenty prompts of 200 to 2,000 tokens."""
    ids = prose_tokens(checkpoint)
    lengths = [200 + i * 1800 // 19 for i in range(20)]
    return [ids[97 * i : 97 * i + length] for i, length in enumerate(lengths)]


def greedy(server, prompts):
    return [server.generate(p, 32, sampling_params={"ignore_eos": True})["output_ids"] for p in prompts]


def token_logprobs(server, texts):
    """Log-probabilities of the windows' tokens but the first, from the server, float64 [tokens]."""
    logprobs = []
    for ids in texts:
        answer = server.generate(ids, 1, return_logprob=True, logprob_start_len=0)
        logprobs += [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    assert len(logprobs) == sum(len(ids) - 1 for ids in texts)
    return torch.tensor(logprobs, dtype=torch.float64)


def perplexity(logprobs):
    return math.exp(-logprobs.mean())


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.fixture(scope="module")
def texts(smollm2_checkpoint):
    return windows(smollm2_checkpoint, 4, 1024)


class ImportLog:
    """What the processes of a server import of ``sglang.srt``; ``env`` goes to the server."""

    def __init__(self, folder):
        (folder / "sitecustomize.py").write_text(IMPORT_LOGGER)
        self._log = folder / "imports.log"
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.env = {"PYTHONPATH": path, "KVTUNER_IMPORT_LOG": str(self._log)}

    def by_process(self):
        """Sets of modules, by process id."""
        found = defaultdict(set)
        for line in self._log.read_text().splitlines():
            process, name = line.split()
            found[process].add(name)
        return found

    def of_the_scheduler(self):
        """Modules of the process that loads the model and holds its cache."""
        (found,) = [names for names in self.by_process().values() if "sglang.srt.models.llama" in names]
        return found


@pytest.fixture(scope="module")
def flag_off(smollm2_checkpoint, texts, tmp_path_factory):
    """What the server answers with the flag off, and which modules it imported."""
    folder = tmp_path_factory.mktemp("flag_off")
    imports = ImportLog(folder)
    flags = (*FLOAT32, "--chunked-prefill-size", "2048")
    with harness.launch_server(smollm2_checkpoint, *flags, log_path=folder / "server.log", env=imports.env) as server:
        return SimpleNamespace(
            tokens=greedy(server, greedy_prompts(smollm2_checkpoint)),
            logprobs=token_logprobs(server, texts),
            imports=imports,
            page_size=server.server_info()["page_size"],
        )


def test_flag_off_runs_no_code_of_ours(flag_off):
    # The flags' own check at start-up and the switch are all that may load.
    allowed = {f"{OURS}.hooks", f"{OURS}.config.flags"}
    allowed |= {f"{OURS}.format.quantizer"}  # flags.py takes the valid bits from it
    allowed |= {name.rpartition(".")[0] for name in allowed} | {OURS}
    for names in flag_off.imports.by_process().values():
        assert {name for name in names if name.startswith(OURS)} <= allowed
    # The log saw upstream's cache being built, and the switch being asked, in the process where ours would be.
    seen = flag_off.imports.of_the_scheduler()
    assert {"sglang.srt.mem_cache.memory_pool", f"{OURS}.hooks"} <= seen
    assert flag_off.page_size == 1


def test_flag_off_answers_as_upstream_does(smollm2_checkpoint, flag_off, launch_server, tmp_path):
    env = {"PYTHONPATH": str(unpack_upstream(tmp_path / "upstream"))}
    prompts = greedy_prompts(smollm2_checkpoint)[:5]
    with launch_server(smollm2_checkpoint, *FLOAT32, "--chunked-prefill-size", "2048", env=env) as server:
        assert "enable_kvtuner_quant" not in server.server_info()
        assert greedy(server, prompts) == flag_off.tokens[: len(prompts)]


def test_window_larger_than_every_sequence_equals_flag_off(smollm2_checkpoint, flag_off, launch_server, tmp_path):
    flags = ("--enable-kvtuner-quant", "--kvtuner-residual-length", "4096", "--chunked-prefill-size", "2048")
    imports = ImportLog(tmp_path)
    # Prefixes shared through the radix cache would be read from packed pages.
    flags = (*FLOAT32, *flags, "--max-running-requests", "4")
    with launch_server(smollm2_checkpoint, *flags, env=imports.env) as server:
        found = greedy(server, greedy_prompts(smollm2_checkpoint))
    assert found == flag_off.tokens
    # What must not load with the flag off is seen here.
    assert {f"{OURS}.cache.pool", f"{OURS}.attention.backend"} <= imports.of_the_scheduler()


@pytest.fixture(scope="module")
def server_of(request, flag_off, smollm2_checkpoint, tmp_path_factory):
    """Called with a recipe's name, a context with its server, which may still start. The next test's server starts meanwhile: that
    takes most of a minute, on one core."""
    names = chosen_values(request, "name")
    started = {}

    def start(name):
        recipe, _ = RECIPES[name]
        flags = (*recipe.flags(), "--kvtuner-residual-length", "0", "--chunked-prefill-size", str(CHUNK))
        log = tmp_path_factory.mktemp("server") / "server.log"
        stack = ExitStack()
        server = harness.launch_server(smollm2_checkpoint, *FLOAT32, *flags, log_path=log, wait=False)
        return stack, stack.enter_context(server)

    @contextmanager
    def server_of(name):
        first = names.index(name)
        for each in names[first : first + 2]:
            if each not in started:
                started[each] = start(each)
        stack, server = started[name]
        with stack:
            yield server

    yield server_of
    for stack, _ in started.values():
        stack.close()


@pytest.mark.parametrize("name", RECIPES)
def test_perplexity_of_the_served_cache(smollm2_checkpoint, texts, flag_off, server_of, name):
    recipe, limit = RECIPES[name]
    with server_of(name) as server:
        simulated = window_logprobs(smollm2_checkpoint, texts, recipe, CHUNK).flatten().double()
        server.wait_until_healthy()
        served = token_logprobs(server, texts)
    exact = flag_off.logprobs
    found = {"flag off": exact, "served": served, "simulated": simulated}
    print("perplexity:", ", ".join(f"{name} {perplexity(logprobs):.4f}" for name, logprobs in found.items()))
    changes = {"served": served - exact, "simulated": simulated - exact, "between them": served - simulated}
    print("rms change:", ", ".join(f"{name} {rms(change):.5f}" for name, change in changes.items()))
    assert abs(perplexity(served) / perplexity(exact) - 1) <= limit
    # What quantization does to every token, whose square is about twice the KL.
    assert rms(changes["served"]) == pytest.approx(rms(changes["simulated"]), rel=0.1)
    assert rms(changes["between them"]) <= 0.2 * rms(changes["simulated"])
    # What is left of that on average. Where it is little, so are a few codes that rounding errors move: noise of the mean.
    noise = rms(served - simulated) / len(exact) ** 0.5
    excess = (simulated - exact).mean().item()
    assert abs((served - simulated).mean().item()) <= max(0.1 * abs(excess), 3 * noise, 5e-5)
