"""The device that checks run on: a GPU, or a CPU with Triton's interpreter for a small mode.

Both have the same methods, so that a check is one piece of code; the interpreter's graph runs its function again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

WARM_UPS = 2
# Of a spin that holds a graph up: about a tenth of a second on today's clocks.
SPIN_CYCLES = 200_000_000


class Interpreter:
    """Triton's interpreter on the CPU. small: whether checks take few and small shapes. dtypes: of models that it computes
    right; it multiplies bfloat16 matrices wrongly."""

    gpu = False
    small = True
    dtypes = (torch.float16, torch.float32)

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        return {"name": "Triton's interpreter on the CPU"}

    def synchronize(self) -> None:
        """Wait for all that was launched."""

    def free_bytes(self) -> int:
        """Memory that buffers can have; pages of them that nothing touches cost none here."""
        return 1 << 40

    def allocated(self) -> tuple[int, int]:
        """Bytes that tensors take, and that the allocator holds."""
        return 0, 0

    @contextlib.contextmanager
    def no_syncs(self) -> Iterator[None]:
        """What waits for the device in here is an error."""
        yield

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run ``function`` WARM_UPS times and capture it; returns what replays it."""
        for _ in range(WARM_UPS):
            function()
        return function

    def race(self) -> InterpreterRace:
        return InterpreterRace()

    def cold_samples(self, replay: Callable[[], None], count: int) -> list[float]:
        """Seconds that the device takes for ``replay``, ``count`` times, each behind a write that clears its L2 cache."""
        return self.wall_samples(replay, count)

    def host_samples(self, function: Callable[[], None], count: int) -> list[float]:
        """Seconds that the host takes to launch ``function`` on an idle device."""
        return self.wall_samples(function, count)

    def wall_samples(self, function: Callable[[], None], count: int) -> list[float]:
        """Seconds from the launch of ``function`` on an idle device until the device is done."""
        return [_timed(function) for _ in range(count)]

    def launches(self, function: Callable[[], None]) -> int | None:
        """Kernels, copies and fills that ``function`` runs on the device; None where nothing can count them."""
        return None


class InterpreterRace:
    """Someone who writes what a graph reads, between its plan and its layers."""

    def __init__(self) -> None:
        self._intruder: Callable[[], None] | None = None

    def mark(self) -> None:
        """In the captured function: the intruder may come from here on."""
        if self._intruder is not None:
            self._intruder()

    def replay(self, graph: Callable[[], None], intruder: Callable[[], None]) -> None:
        """Replay while the intruder comes as early as it may; returns when both are done."""
        self._intruder = intruder
        graph()
        self._intruder = None


class Gpu:
    """As :class:`Interpreter`, on the current CUDA device. Raises RuntimeError where there is none."""

    gpu = True
    dtypes = (torch.bfloat16, torch.float16)

    def __init__(self, small: bool = False) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        self.small = small
        self.device = torch.device("cuda", torch.cuda.current_device())

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def allocated(self) -> tuple[int, int]:
        return torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)

    @contextlib.contextmanager
    def no_syncs(self) -> Iterator[None]:
        earlier = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(earlier)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), self.no_syncs():
            function()
        return graph.replay

    def race(self) -> GpuRace:
        return GpuRace()

    def cold_samples(self, replay: Callable[[], None], count: int) -> list[float]:
        # Long enough for the host to run ahead, so that the device does not wait between the events.
        other = torch.empty(max(512 << 20, 4 * self.describe()["l2_bytes"]), dtype=torch.uint8, device=self.device)
        found = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            start.record()
            replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        return found

    def host_samples(self, function: Callable[[], None], count: int) -> list[float]:
        found = []
        for _ in range(count):
            torch.cuda.synchronize()
            found.append(_timed(function))
        torch.cuda.synchronize()
        return found

    def wall_samples(self, function: Callable[[], None], count: int) -> list[float]:
        torch.cuda.synchronize()

        def and_wait() -> None:
            function()
            torch.cuda.synchronize()

        return [_timed(and_wait) for _ in range(count)]

    def launches(self, function: Callable[[], None]) -> int | None:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            function()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


class GpuRace:
    """As :class:`InterpreterRace`: the intruder is a second stream, which waits for an event recorded in the graph; behind the
    event the graph spins, so that the intruder is done before the layers begin."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(external=True)
        self._stream = torch.cuda.Stream()

    def mark(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            self._event.record()
            torch.cuda._sleep(SPIN_CYCLES)

    def replay(self, graph: Callable[[], None], intruder: Callable[[], None]) -> None:
        graph()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._event)
            intruder()
        torch.cuda.synchronize()


def _timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


Device = Gpu | Interpreter
