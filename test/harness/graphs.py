"""Decode and prefill graphs on a CPU: scripted requests through upstream's scheduler, with tapes in the place of CUDA graphs.

Light to import: what runs the script is in graph_serving.py, in a process where Triton interprets its kernels.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from harness.models import random_llama
from harness.processes import forked_processes

PAGE = 16
VOCAB, LAYERS = 512, 2

FLAGS = (
    *("--device", "cpu", "--skip-tokenizer-init", "--random-seed", "0", "--log-level", "error"),
    *("--enable-kvtuner-quant", "--dtype", "float32", "--context-length", "128", "--max-total-tokens", "512"),
    *("--max-running-requests", "3", "--page-size", str(PAGE), "--kvtuner-q-group-size", str(PAGE)),
    *("--chunked-prefill-size", str(2 * PAGE), "--kvtuner-residual-length", str(2 * PAGE)),
)
GRAPHS = (
    *("--cuda-graph-backend-decode", "full", "--cuda-graph-backend-prefill", "breakable"),
    *("--cuda-graph-bs-prefill", str(2 * PAGE)),
)


@dataclass(frozen=True)
class Asked:
    """A greedy request for ``most`` tokens. after: (name of another, tokens that it must have answered). stops: ends with the
    first token, whatever that is, which the scheduler cannot know before it launches the next step."""

    prompt: tuple
    most: int
    after: tuple | None = None
    stops: bool = False


@dataclass(frozen=True)
class Serving:
    """script: requests by name. options: flags beside FLAGS. rows: of the decode graphs. fault: called before anything else, to
    break the product (graph_faults.py)."""

    script: dict
    options: tuple = ()
    rows: tuple = (1, 3)
    fault: Callable | None = None


@dataclass
class Served:
    """What came of it: tokens and ring starts by request, what happened by name, the kernels that served, launches of a
    replayed decode step by its rows."""

    tokens: dict = field(default_factory=dict)
    ring_starts: dict = field(default_factory=dict)
    events: Counter = field(default_factory=Counter)
    kernels: str = ""
    launches: dict = field(default_factory=dict)


@contextmanager
def graph_processes():
    """Yields a function that runs a Serving in a process of its own; its Future returns Served, or raises ShadowMismatch.

    By default Triton serves with graphs, and every step is compared with the torch reference's; with ``reference=True`` the torch
    reference serves, without graphs.
    """
    changes = {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_ENABLE_WAR_BARRIER": "1",  # as on a GPU, upstream waits for the event before it writes the request table
        "SGLANG_ENABLE_GRAPH_POOL_PRECARVE": "0",
    }
    checkpoint = random_llama(layers=LAYERS, heads=4, kv_heads=2, head_dim=64, hidden=64, intermediate=128, vocab=VOCAB)
    with forked_processes("harness.graph_serving", changes) as call:
        yield lambda serving, reference=False: call(_serve, serving, checkpoint, reference)


def _serve(serving, checkpoint, reference):
    from harness.graph_serving import serve

    os.environ["SGLANG_KVTUNER_KERNELS"] = "reference" if reference else "triton"
    if serving.fault is not None:
        serving.fault()
    graphs = () if reference else (*GRAPHS, "--cuda-graph-bs-decode", *map(str, serving.rows))
    return serve(serving.script, checkpoint, (*FLAGS, *graphs, *serving.options), shadowed=not reference)
