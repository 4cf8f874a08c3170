"""The GPU's way through upstream's scheduler and graph runners, on a CPU: overlap, graphs, Triton's kernels, interpreted.

Tapes (harness/graph_tape.py) stand in for CUDA graphs. The torch reference follows every step of what is served, layer by layer,
with a cache of its own: attention within 1e-5, everything that the caches hold byte for byte.
"""

import random
import re

import pytest

from harness import graph_faults
from harness.data import ROOT
from harness.graph_shadow import ShadowMismatch
from harness.graphs import LAYERS, PAGE, VOCAB, Asked, Serving, graph_processes
from harness.processes import start_all

_RNG = random.Random(0)


def _tokens(count):
    return tuple(_RNG.randrange(2, VOCAB) for _ in range(count))


_SHARED = _tokens(40)
# Chunks of two pages. "stops" fills its first page with a token that comes after its end, and "one page" gets its slot.
SCRIPT = {
    "long": Asked(_SHARED + _tokens(8), 12),
    "stops": Asked(_tokens(PAGE - 1), 9, stops=True),
    "two pages": Asked(_SHARED[:36] + _tokens(6), 8, after=("long", 2)),
    "one page": Asked(_SHARED[:20] + _tokens(5), 9, after=("two pages", 1)),
}
STARTS = {"long": 0, "stops": 0, "two pages": 2 * PAGE, "one page": PAGE}
EVENTS = {
    "chunked prefill",
    "prefix hit of 1 pages",
    "prefix hit of 2 pages",
    "slot that changed hands",
    "step of a request that was over",
    "replay",
    "replay of a prefill",
    "padded replay",
    "page completed in a replay",
    "fence within a replay",
}
RECIPES = {
    # Mixed bits, sinks in one layer, rotated keys and 16-bit values in the other.
    "preset": ("--kvtuner-config", str(ROOT / "test" / "data" / "soak_preset.yaml"), "--kvtuner-asym"),
    "per channel": ("--kvtuner-asym", "--kvtuner-axis-key", "1"),
}


@pytest.fixture(scope="module")
def started(request):
    with graph_processes() as start:
        yield start_all(request, start, runs_of)


@pytest.fixture
def runs(started, request):
    """Futures of what the test runs."""
    return started[request.node.name]


def runs_of(test):
    if "recipe" in test.callspec.params:
        serving = Serving(SCRIPT, RECIPES[test.callspec.params["recipe"]])
        return [(serving,), (serving, True)]  # the second by the reference
    fault, _ = FAULTS[test.callspec.params["name"]]
    return [(Serving(SCRIPT, RECIPES["per channel"], rows=(3,), fault=fault),)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_serves_as_the_reference_does(runs, recipe):
    served, expected = (run.result() for run in runs)
    print(f"{served.kernels}: {dict(served.events)}")
    assert (served.kernels, expected.kernels) == ("Triton", "torch reference")
    missing = EVENTS - set(served.events)
    assert not missing, f"did not happen: {missing}"
    assert served.events["fence within a replay"] == served.events["replay"]
    assert served.tokens == expected.tokens
    assert {name: len(tokens) for name, tokens in served.tokens.items()} == {
        name: 1 if asked.stops else asked.most for name, asked in SCRIPT.items()
    }
    assert served.ring_starts == expected.ring_starts == STARTS
    for rows, launches in served.launches.items():
        assert launches.count("plan_decode_kernel") == 1, f"{rows} rows"
        assert len(launches) <= 1 + 3 * LAYERS, f"{rows} rows: {launches}"
    assert served.launches.keys() == {1, 3}


# Each with what the comparison says: attention read something else, or the cache holds something else.
FAULTS = {
    "ring start left out": (graph_faults.ring_start_left_out, "DECODE of .*: attention of layer 0"),
    "page ids read late": (graph_faults.page_ids_read_late, "DECODE of .*: (attention of|layer)"),
    "padded rows write a live ring": (
        graph_faults.padded_rows_write_a_live_ring,
        r"DECODE of .*: layer 0, key ring differ at \[3\]",
    ),
    # Not of the cache: the recording refuses it.
    "host read in a step": (graph_faults.host_read_in_a_step, re.escape("_local_scalar_dense.default needs the host")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(runs, name):
    _, message = FAULTS[name]
    with pytest.raises(Exception, match=message) as found:
        runs[0].result()
    assert isinstance(found.value, ShadowMismatch) or "host read" in name
    print(found.value)
