"""Soaks: upstream's scheduler under random traffic, with everything that the cache returns compared at every step."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

from harness.processes import forked_processes
from harness.soak_model import CONTEXT, soak_checkpoint

PAGE = 16

# A cache so small that requests are retracted, and pages so small that they fill often.
FLAGS = (
    *("--device", "cpu", "--skip-tokenizer-init", "--random-seed", "0", "--enable-kvtuner-quant"),
    *("--context-length", str(CONTEXT), "--max-total-tokens", "1024", "--max-running-requests", "8"),
    *("--page-size", str(PAGE), "--kvtuner-q-group-size", str(PAGE), "--chunked-prefill-size", "64"),
    *("--schedule-conservativeness", "0", "--log-level", "error"),
)


@dataclass(frozen=True)
class Scenario:
    """One soak.

    options: flags beside FLAGS, over which they win. tokens: how many to compare, at least. clients: requests under way at a
    time. longest_prompt: tokens. aborts, samples: chance of an abort per step, and of a request for several samples.
    priorities: requests have one. test_retract: upstream's SGLANG_TEST_RETRACT. kernels: value of SGLANG_KVTUNER_KERNELS.
    fault: called in the process of the soak before anything else, to break the product (soak_faults.py).
    """

    options: tuple = ()
    tokens: int = 100_000
    clients: int = 12
    longest_prompt: int = CONTEXT // 2
    aborts: float = 0.02
    samples: float = 0.2
    priorities: bool = False
    test_retract: bool = False
    kernels: str = "auto"
    fault: Callable | None = None
    seed: int = 0

    @property
    def flags(self):
        return (*FLAGS, *self.options)


@contextmanager
def soak_processes():
    """Yields a function that runs a Scenario in a process of its own; its Future returns or raises as soak_scheduler.soak."""
    checkpoint = soak_checkpoint()
    # Requests are admitted as if they asked for few tokens, so that the pool gets full while they run. Upstream ends with
    # "Prefill out of memory" where it is full when a long prompt's next chunk comes: choose another seed then.
    with forked_processes("harness.soak_scheduler", {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}) as call:
        yield lambda scenario: call(_run, scenario, checkpoint)


def _run(scenario, checkpoint):
    from harness.soak_scheduler import soak

    os.environ["SGLANG_KVTUNER_KERNELS"] = scenario.kernels
    if scenario.fault is not None:
        scenario.fault()
    return soak(scenario, checkpoint)
