"""Check 5: decode steps replayed from CUDA graphs, against the same steps run one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_checks.cache import PADDING, Cache, Rows, Shape
from gpu_checks.device import Device
from gpu_checks.recipes import mixed_layers
from gpu_checks.report import Findings

BUCKETS = (1, 2, 4, 8)
REPLAYS = 200


@dataclass
class Captured:
    """A graph of [plan, layers] for ``bucket`` rows, with what it reads and what it leaves at fixed addresses."""

    bucket: int
    slots: torch.Tensor
    seq_lens: torch.Tensor
    rows: Rows
    outputs: list[torch.Tensor]
    replay: Callable[[], None]

    def fill(self, inputs: tuple[torch.Tensor, torch.Tensor], rows: Rows) -> None:
        """What the next replay reads."""
        self.slots.copy_(inputs[0])
        self.seq_lens.copy_(inputs[1])
        for mine, new in ((self.rows.q, rows.q), (self.rows.k, rows.k), (self.rows.v, rows.v)):
            mine.copy_(new)


def capture(
    device: Device, cache: Cache, bucket: int, mark: Callable[[], None] | None = None, late_plan: bool = False
) -> Captured:
    """Warm up on padded rows alone, as upstream does, and capture.

    mark: called between the plan and the layers. late_plan: a step that lacks the snapshot: layers plan for themselves.
    """
    inputs = cache.decode_inputs([PADDING] * bucket)
    rows = cache.blank_rows(bucket)
    outputs = [torch.empty_like(q) for q in rows.q]

    def step() -> None:
        plan = cache.planner.plan_decode(*inputs)
        if mark is not None:
            mark()
        if late_plan:
            plan = cache.planner.plan_decode(*inputs)
        for kept, out in zip(outputs, cache.run_layers(plan, rows), strict=True):
            kept.copy_(out)

    return Captured(bucket, *inputs, rows, outputs, device.capture(step))


def graph_shape(device: Device) -> Shape:
    """Of a cache with a preset's mix of layers, a few tokens from the end of a page."""
    heads, kv_heads = (2, 1) if device.small else (32, 8)
    page = mixed_layers(device.small)[0].key.page_size
    return Shape(
        mixed_layers(device.small), heads, kv_heads, residual=page + 3, dtype=device.dtypes[0], num_slots=2 * max(BUCKETS) + 1,
        num_pages=600, max_pages=48,
    )  # fmt: skip


def check(device: Device, findings: Findings, buckets: tuple[int, ...] = BUCKETS, replays: int | None = None) -> str:
    """Requests come, grow and go between replays; each replay is compared with eager steps of the same kernels on a second cache.

    buckets: rows of the graphs, the largest captured first. replays: of all of them together.
    """
    replays = (REPLAYS // 8 if device.small else REPLAYS) if replays is None else replays
    shape = graph_shape(device)
    cache, eager = Cache(device, shape, seed=1), Cache(device, shape, seed=1)
    graphs = {bucket: capture(device, cache, bucket) for bucket in sorted(buckets, reverse=True)}
    device.synchronize()
    allocated: list[tuple[int, int]] = []
    generator = torch.Generator().manual_seed(2)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    most_slots, most_tokens = shape.num_slots - 1, (shape.max_pages - 1) * cache.page
    for turn in range(replays):
        bucket = buckets[turn % len(buckets)]
        count = bucket - draw((bucket + 1) // 2) if bucket > 1 else 1
        slots = (torch.randperm(most_slots, generator=generator)[:count] + 1).tolist()
        for slot in slots:
            request = cache.requests.get(slot)
            if request is None or request.length + 1 > most_tokens or draw(20) == 0:
                length = 1 + draw(4 * cache.page)
                for each in (cache, eager):
                    each.begin(slot)
                    each.extend(slot, length, by_kernels=True)
        padded = [*slots, *[PADDING] * (bucket - count)]
        rows, graph = cache.padded_rows(padded), graphs[bucket]
        eager.padded_rows(padded)  # keeps the two caches' random numbers in step
        graph.fill(cache.decode_inputs(padded), rows)
        before = device.allocated()
        with device.no_syncs():
            graph.replay()
        findings.expect(device.allocated() == before, f"replay {turn} of bucket {bucket} allocated memory")
        inputs = eager.decode_inputs(padded)
        with device.no_syncs():
            expected = eager.run_layers(eager.planner.plan_decode(*inputs), rows)
        for each in (cache, eager):
            for slot in slots:
                each.requests[slot].length += 1
        for layer, (ours, theirs) in enumerate(zip(graph.outputs, expected, strict=True)):
            same = torch.equal(ours[:count], theirs[:count])
            findings.expect(
                same, f"replay {turn} of bucket {bucket}, layer {layer}: outputs differ from the eager step's"
            )
        # Graphs have what they need from here on, and the eager side has met every shape.
        if turn >= replays // 2:
            del expected, rows, inputs, ours, theirs
            device.synchronize()
            allocated.append(device.allocated())
    for name, ours, theirs in contents(cache, eager):
        findings.expect(torch.equal(ours, theirs), f"{name} differ from the eager steps'")
    growth = [last - first for first, last in zip(allocated[0], allocated[-1], strict=True)]
    findings.numbers.update(buckets=list(buckets), replays=replays, growth_bytes=growth)
    findings.expect(growth[0] <= 0, f"tensors grew by {growth[0]} bytes over {len(allocated)} replays")
    return f"{replays} replays of {len(buckets)} graphs, {len(shape.layers)} layers: bit for bit the eager steps, no allocation"


def contents(a: Cache, b: Cache) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Buffers of two caches whose kernels made the same steps, as bytes, without what padded rows write."""
    found = []
    for layer, (x, y) in enumerate(zip(a.storage.layers, b.storage.layers, strict=True)):
        for half in ("key", "value"):
            for part in ("pages", "ring", "sinks"):
                pair = [getattr(getattr(side, half), part)[1:].contiguous() for side in (x, y)]
                if pair[0].numel():
                    found.append((f"{part} of {half}s in layer {layer}", *(t.view(torch.uint8) for t in pair)))
    return found
