#!/usr/bin/env python3
"""Times what a decode step costs the host, kernels left out: the quantized cache's Triton backend beside upstream's.

    python benchmark/kvtuner/host_work.py --batch 64 --json host_work.json

Needs no GPU. Tensors lie on the CPU, both backends run the code that they run on a GPU, and take turns. Launches end early, in
two ways:

* ``none``: a launch does nothing at all. What is left is the backends' own Python and torch's operations.
* ``binding``: Triton binds the arguments, specializes on them and looks the compiled kernel up, as for any launch, for a GPU
  that is not there; that kernel does nothing. This grows with the number of launches and of their arguments.

The exit status is 1 where the quantized cache's step launches more than 3 kernels per layer and 1 more, or takes more than
--limit times as long as upstream's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from host_work_backends import DecodeStep, Shape, kvtuner, upstream

LAUNCHERS = ("none", "binding")
MOST_LAUNCHES_OF_A_LAYER, MOST_LAUNCHES_OF_A_STEP = 3, 1
WARM_UP = 5


@dataclass(frozen=True)
class Result:
    """Host work of one kind of step. step: "eager", a step without CUDA graphs, or "replay", what precedes a replayed one.

    launches: kernels that the step launches. ours, upstream: median processor times in microseconds; ours_best, upstream_best: shortest
    times. ratio, ratio_of_best: ours by upstream's.
    """

    launcher: str
    step: str
    launches: int
    launches_upstream: int
    ours: float
    upstream: float
    ratio: float
    ours_best: float
    upstream_best: float
    ratio_of_best: float


class _Driver:
    """What Triton's launcher asks of a driver, without a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        return None


def _skip(kernel: JITFunction, *arguments: Any, **options: Any) -> None:
    return None


@contextlib.contextmanager
def launches_end(launcher: str) -> Iterator[None]:
    """Within, Triton's launches do not reach a GPU; launcher: one of LAUNCHERS."""
    if launcher == "none":
        with patch.object(JITFunction, "run", _skip):
            yield
        return
    bound: set[JITFunction] = set()

    def compile_nothing(kernel: JITFunction, key: str, signature: Any, device: int, *rest: Any) -> _Compiled:
        bound.add(kernel)
        # As compiling does: globals that the kernel reads, which every launch compares with what they were.
        assert kernel.cache_key
        compiled, *_ = kernel.device_caches[device]
        return compiled.setdefault(key, _Compiled())

    try:
        with patch.object(driver, "_active", _Driver()), patch.object(JITFunction, "_do_compile", compile_nothing):
            yield
    finally:
        for kernel in bound:
            kernel.device_caches.clear()


def count_launches(part: Callable[[], None], launched: list[str]) -> int:
    """Kernels that ``part`` launches; launched: where those that are not Triton's leave their names."""

    def record(kernel: JITFunction, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.__name__)

    launched.clear()
    with patch.object(JITFunction, "run", record):
        part()
    return len(launched)


def time_in_turns(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of ``repeats`` calls each, of the thread's processor time: other processes disturb that least."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time_ns()
            call()
            times[name].append((time.thread_time_ns() - start) / 1e3)
    return times


def measure(ours: DecodeStep, theirs: DecodeStep, launched: list[str], repeats: int) -> list[Result]:
    results = []
    for launcher in LAUNCHERS:
        for step in ("eager", "replay"):
            calls = {"ours": getattr(ours, step), "upstream": getattr(theirs, step)}
            launches = {name: count_launches(call, launched) for name, call in calls.items()}
            with launches_end(launcher):
                times = time_in_turns(calls, repeats)
            launched.clear()
            median = {name: statistics.median(t) for name, t in times.items()}
            best = {name: min(t) for name, t in times.items()}
            results.append(
                Result(
                    launcher=launcher,
                    step=step,
                    launches=launches["ours"],
                    launches_upstream=launches["upstream"],
                    ours=median["ours"],
                    upstream=median["upstream"],
                    ratio=median["ours"] / median["upstream"],
                    ours_best=best["ours"],
                    upstream_best=best["upstream"],
                    ratio_of_best=best["ours"] / best["upstream"],
                )
            )
    return results


def shortcomings(results: list[Result], layers: int, limit: float) -> list[str]:
    """In what the quantized cache's steps do too much."""
    most = layers * MOST_LAUNCHES_OF_A_LAYER + MOST_LAUNCHES_OF_A_STEP
    found = [f"{r.step}: {r.launches} launches, more than {most}" for r in results if r.launches > most]
    slow = [r for r in results if r.ratio > limit]
    return found + [f"{r.step}, launcher {r.launcher}: {r.ratio:.2f} times upstream's, more than {limit}" for r in slow]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--limit", type=float, default=1.3, help="most that a step may take, in upstream's")
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: kernels would run; unset it, launches are what is measured")
    torch.set_num_threads(1)
    shape = Shape(options.layers, options.heads, options.kv_heads, options.head_dim, options.batch, options.context)
    launched: list[str] = []
    with torch.inference_mode(), kvtuner(shape) as ours, upstream(shape, launched) as theirs:
        results = measure(ours, theirs, launched, options.repeats)
    print(f"{shape.layers} layers, {shape.heads} heads, {shape.kv_heads} KV heads, batch {shape.batch}; microseconds")
    print(
        f"{'step':>6} {'launcher':>8} {'launches':>8} {'upstream':>8} {'ours':>8} {'upstream':>8} {'ratio':>5} "
        f"{'best':>8} {'upstream':>8} {'ratio':>5}"
    )
    for r in results:
        print(
            f"{r.step:>6} {r.launcher:>8} {r.launches:8} {r.launches_upstream:8} {r.ours:8.1f} {r.upstream:8.1f} "
            f"{r.ratio:5.2f} {r.ours_best:8.1f} {r.upstream_best:8.1f} {r.ratio_of_best:5.2f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"settings": vars(options), "results": [asdict(r) for r in results]}, file, indent=1)
    found = shortcomings(results, shape.layers, options.limit)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
