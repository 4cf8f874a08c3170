"""Upstream's scheduler under random traffic: at every step every prior token reads as it was computed, and planted faults are found."""

from functools import partial

import pytest

from harness import soak_faults
from harness.data import ROOT
from harness.processes import start_all
from harness.soak import Scenario, soak_processes
from harness.soak_checker import SoakMismatch
from sglang.kernels.ops.attention.kvtuner import cpu as cpu_ops

MIXED = ("--enable-mixed-chunk",)
# Too few tokens for the requests that run.
FULL, FULL_PROMPT = ("--max-total-tokens", "512"), 100


def cache(residual, key, value, *, sinks=0, asym=False, axis_key=0):
    return (
        *("--kvtuner-residual-length", str(residual), "--kvtuner-sink-length", str(sinks)),
        *("--kvtuner-nbits-key", str(key), "--kvtuner-nbits-value", str(value)),
        *("--kvtuner-asym", str(asym).lower(), "--kvtuner-axis-key", str(axis_key)),
    )


PRESET = (
    *("--kvtuner-config", str(ROOT / "test" / "data" / "soak_preset.yaml")),
    *("--page-size", "64", "--max-total-tokens", "2048", "--chunked-prefill-size", "256"),
)

SCENARIOS = {
    "full pool": Scenario((*cache(64, 4, 4), *FULL), longest_prompt=FULL_PROMPT, seed=1),
    "retractions": Scenario((*cache(0, 4, 2, sinks=4, asym=True, axis_key=1), *MIXED), test_retract=True, seed=2),
    "priorities": Scenario(
        (*cache(128, 8, 8, sinks=16), "--enable-priority-scheduling", "--max-running-requests", "4"),
        priorities=True,
        seed=3,
    ),
    "no prefix cache": Scenario((*cache(64, 2, 8, sinks=4), *MIXED, "--disable-radix-cache"), seed=4),
    "bfloat16": Scenario(
        (*cache(0, 2, 16), *FULL, "--dtype", "bfloat16", "--kvtuner-hadamard-key"), longest_prompt=FULL_PROMPT, seed=15
    ),
    "no overlap": Scenario((*cache(128, 16, 4, asym=True), *MIXED, "--disable-overlap-schedule"), seed=6),
    "preset": Scenario((*cache(128, 4, 4, asym=True), *PRESET, *MIXED), seed=7),
    "reference": Scenario(
        (*cache(64, 4, 4, sinks=3, axis_key=1), *FULL, *MIXED), kernels="reference", longest_prompt=FULL_PROMPT, seed=8
    ),
}
# What must have happened, beside what happens in each of them.
ALWAYS = {"decode batch", "chunked prefill", "sample", "abort", "abort of all", "end: abort", "end: length", "flush"}
EVENTS = {
    "full pool": {"prefix hit", "retraction"},
    "retractions": {"prefix hit", "retraction", "mixed batch"},
    "priorities": {"prefix hit", "preemption"},
    "no prefix cache": {"mixed batch"},
    "bfloat16": {"prefix hit", "retraction"},
    "no overlap": {"prefix hit", "mixed batch"},
    "preset": {"prefix hit", "mixed batch"},
    "reference": {"prefix hit", "mixed batch", "retraction"},
}
WITH_SINKS = {"retractions", "priorities", "no prefix cache", "preset", "reference"}

# Each with what the soak says: the cache holds something else, or attention read something else.
HOLDS, READ = "differ|were returned|cannot be read", "attention to"
FAULTS = {
    "page id off by one": (soak_faults.page_id_off_by_one, HOLDS),
    "stale ring start": (soak_faults.stale_ring_start, HOLDS),
    "packed into another page": (partial(soak_faults.written_off_by_one, "pages"), HOLDS),
    "ring row off by one, written": (partial(soak_faults.written_off_by_one, "ring"), HOLDS),
    "sinks written beside another page": (partial(soak_faults.written_off_by_one, "sinks"), HOLDS),
    "another page read": (partial(soak_faults.read_off_by_one, "pages"), READ),
    "ring row off by one, read": (partial(soak_faults.read_off_by_one, "ring"), READ),
    "sinks of another page read": (partial(soak_faults.read_off_by_one, "sinks"), READ),
}


@pytest.fixture(scope="module")
def compiled():
    """Why there are no C++ kernels here, or None. They are built before the clock of a soak runs."""
    try:
        cpu_ops.module().body_name()
    except cpu_ops.KernelBuildError as e:
        return str(e)
    return None


@pytest.fixture(scope="module")
def started(request, compiled):
    with soak_processes() as start:
        yield start_all(request, start, lambda test: scenarios_of(test, compiled is None))


@pytest.fixture
def soak(started, request):
    """The Future of the test's soak."""
    return started[request.node.name][0]


def scenarios_of(test, compiled):
    params = test.callspec.params if hasattr(test, "callspec") else {}
    if "seed" in params:
        fault, _ = FAULTS[params["name"]]
        options = (*cache(64, 4, 4, sinks=4), *FULL, *MIXED)
        return [(Scenario(options, longest_prompt=FULL_PROMPT, fault=fault, seed=params["seed"]),)]
    scenario = SCENARIOS.get(params.get("name"))
    return [(scenario,)] if scenario and (compiled or scenario.kernels == "reference") else []


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_prior_token_reads_as_it_was_computed(request, compiled, name):
    scenario = SCENARIOS[name]
    if compiled is not None and scenario.kernels != "reference":
        pytest.skip(compiled)
    tokens, events, kernels = request.getfixturevalue("soak").result()
    print(f"{kernels}: {tokens.total()} tokens compared, {dict(tokens)}; {dict(events)}")
    assert (kernels == "torch reference") == (scenario.kernels == "reference")
    assert tokens.total() >= scenario.tokens
    assert tokens["page"] and tokens["ring"]
    assert bool(tokens["sink"]) == (name in WITH_SINKS)
    missing = (ALWAYS | EVENTS[name]) - set(+events)
    assert not missing, f"did not happen: {missing}"
    assert bool(events["prefix hit"]) == ("prefix hit" in EVENTS[name])


def test_scenarios_compare_enough():
    assert sum(scenario.tokens for scenario in SCENARIOS.values()) >= 500_000


@pytest.mark.parametrize("seed", (1, 2))
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(soak, name, seed):
    _, message = FAULTS[name]
    with pytest.raises(SoakMismatch, match=message) as found:
        soak.result()
    print(found.value)
