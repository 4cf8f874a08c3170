"""A cache on the device under test beside its twin, which the torch reference fills and reads from plans made by hand.

Nothing that is expected comes from a planner, a kernel or a ring owner of the product: prefixes, ends of packed pages and page ids are
known here from what the requests did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_checks import construction
from gpu_checks.device import Device
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.format.formats import LayerFormat

PADDING = 0  # slot and page of padded rows


@dataclass(frozen=True)
class Shape:
    """Of a cache and the model around it. residual: newest tokens in full precision. num_pages: page 0 among them. max_pages: of
    a request."""

    layers: Sequence[LayerFormat]
    heads: int
    kv_heads: int
    residual: int
    dtype: torch.dtype
    num_slots: int = 4
    num_pages: int = 64
    max_pages: int = 16

    @property
    def page(self) -> int:
        return self.layers[0].key.page_size

    @property
    def head_dim(self) -> int:
        return self.layers[0].key.head_dim


@dataclass
class Request:
    """length: tokens so far. found: of them, those that came from the prefix cache. pages: page ids in order."""

    length: int
    found: int
    pages: list[int]


@dataclass(frozen=True)
class Rows:
    """A step's queries [layers, tokens, heads, head_dim], keys and values [layers, tokens, kv_heads, head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Cache:
    """storage: under test, driven by ``kernels``. twin: what it must hold.

    storage: buffers for the kernels in the place of own ones; its pages and slots are shifted by ``page_shift`` and
    ``slot_shift`` against the twin's, so that a huge pool can be compared with a small one.
    """

    def __init__(
        self, device: Device, shape: Shape, *, seed: int = 0, storage: CacheStorage | None = None, page_shift: int = 0,
        slot_shift: int = 0, workspace_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.shape, self.page = device, shape, shape.page
        self.page_shift, self.slot_shift = page_shift, slot_shift
        self.twin = self._storage()
        self.storage = self._storage() if storage is None else storage
        self.reference = ReferenceKernels(self.twin)
        self.kernels = construction.make_kernels(
            self.storage, heads=shape.heads, most_pages=shape.max_pages, workspace_tokens=workspace_tokens
        )
        slots = shape.num_slots + slot_shift
        self.req_to_token = torch.zeros(slots, shape.max_pages * self.page, dtype=torch.int32, device=device.device)
        self.req_generation = torch.zeros(slots, dtype=torch.int64)
        self.planner = construction.make_planner(self.kernels, self.req_to_token, self.req_generation, max_rows=64)
        self.requests = {PADDING: Request(0, 0, [PADDING])}
        self._generator = torch.Generator(device.device).manual_seed(seed)
        # The last page is the first to go, the others follow in random order.
        order = torch.randperm(shape.num_pages - 2, generator=torch.Generator().manual_seed(seed)) + 1
        self._free = [*order.tolist(), shape.num_pages - 1]
        # Channels differ in size and offset, as keys do.
        self._size, self._offset = self._random(2, 1, shape.kv_heads, shape.head_dim).abs() + 0.1

    def begin(self, slot: int, prefix_of: int | None = None, prefix_pages: int = 0) -> None:
        """A new request takes the slot; it found the first ``prefix_pages`` pages of another slot's request. Pages of the slot's
        earlier request go to whoever asks next, unless another request has them."""
        pages = [] if prefix_of is None else self.requests[prefix_of].pages[:prefix_pages]
        earlier = self.requests.pop(slot, None)
        if earlier is not None:
            kept = {page for request in self.requests.values() for page in request.pages}
            self._free += [page for page in earlier.pages if page not in kept]
        self.requests[slot] = Request(len(pages) * self.page, len(pages) * self.page, list(pages))
        self.req_generation[slot + self.slot_shift] += 1
        for index in range(len(pages)):
            self._enter(slot, index)

    def rows(self, count: int) -> Rows:
        """New rows for all layers."""
        shape = self.shape
        q = self._random(len(shape.layers), count, shape.heads, shape.head_dim) * 2
        kv = [self._random(len(shape.layers), count, shape.kv_heads, shape.head_dim) for _ in range(2)]
        k, v = (x * self._size + self._offset for x in kv)
        return Rows(*(x.to(shape.dtype) for x in (q, k, v)))

    def blank_rows(self, count: int) -> Rows:
        """Zeros in their shape: draws no random numbers."""
        shape, device = self.shape, self.device.device
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        return Rows(
            *(torch.zeros(len(shape.layers), count, h, shape.head_dim, dtype=shape.dtype, device=device) for h in heads)
        )

    def make_room(self, slot: int, length: int) -> None:
        """Pages for ``length`` tokens of the slot's request."""
        request = self.requests[slot]
        while len(request.pages) * self.page < length:
            request.pages.append(self._free.pop())
            self._enter(slot, len(request.pages) - 1)

    def extend(self, slot: int, count: int, *, by_kernels: bool = False, rows: Rows | None = None) -> None:
        """Store ``count`` more tokens without attention: the twin by the reference, the storage by the kernels or as a copy."""
        rows = self.rows(count) if rows is None else rows
        plan, expected = self.plan_extend([slot], [count])
        for layer in range(len(self.shape.layers)):
            if by_kernels:
                self.kernels.store(layer, self.kernels.plan(plan), rows.k[layer], rows.v[layer])
            self.reference.store(layer, expected, rows.k[layer], rows.v[layer])
        if not by_kernels:
            self.copy_twin()
        self.requests[slot].length += count

    def plan_extend(self, slots: list[int], counts: list[int]) -> tuple[StepPlan, StepPlan]:
        """The planner's plan of an extend, and the one made by hand; makes room."""
        for slot, count in zip(slots, counts, strict=True):
            self.make_room(slot, self.requests[slot].length + count)
        prefix_lens = [self.requests[slot].length for slot in slots]
        shifted = [self._shifted(slot) for slot in slots]
        return self.planner.plan(shifted, prefix_lens, counts), self.expected_plan(slots, counts)

    def expected_plan(self, slots: list[int], counts: list[int]) -> StepPlan:
        """By hand, with the twin's slots and pages."""
        requests = [self.requests[slot] for slot in slots]
        aged = [max(request.length - self.shape.residual, 0) // self.page * self.page for request in requests]
        return construction.make_plan(
            self.device.device,
            slots=slots,
            prefix_lens=[request.length for request in requests],
            packed_end=[max(end, request.found) for end, request in zip(aged, requests, strict=True)],
            counts=counts,
            pages=[request.pages for request in requests],
        )

    def decode_inputs(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and sequence lengths of a decode step, int64 on the device; makes room for its tokens."""
        for slot in slots:
            if slot != PADDING:
                self.make_room(slot, self.requests[slot].length + 1)
        lens = [self.requests[slot].length + 1 for slot in slots]
        shifted = [self._shifted(slot) for slot in slots]
        return tuple(torch.tensor(x, dtype=torch.int64).to(self.device.device) for x in (shifted, lens))  # type: ignore[return-value]

    def padded_rows(self, slots: list[int]) -> Rows:
        """Rows of a decode step. Those of padding are equal: all of them are stored in one place."""
        rows = self.rows(len(slots))
        padding = [i for i, slot in enumerate(slots) if slot == PADDING]
        for x in (rows.k, rows.v):
            x[:, padding] = x[:, padding[:1]]
        return rows

    def decode(self, slots: list[int], *, rows: Rows | None = None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """A decode step of the kernels and of the twin: outputs per layer, [tokens, heads, head_dim] in the model's dtype and
        in float32."""
        inputs = self.decode_inputs(slots)
        rows = self.padded_rows(slots) if rows is None else rows
        with self.device.no_syncs():
            ours = self.run_layers(self.planner.plan_decode(*inputs), rows)
        return ours, self.expect_decode(slots, rows)

    def run_layers(self, step: StepPlan, rows: Rows) -> list[torch.Tensor]:
        """Attention and storing of all layers by the kernels."""
        plan, outputs = self.kernels.plan(step), []
        for layer in range(len(self.shape.layers)):
            outputs.append(self.kernels.attend(layer, plan, rows.q[layer], rows.k[layer], rows.v[layer], self.scaling))
            self.kernels.store(layer, plan, rows.k[layer], rows.v[layer])
        return outputs

    def expect_decode(self, slots: list[int], rows: Rows) -> list[torch.Tensor]:
        """The twin's outputs of a decode step, float32; lengths grow."""
        expected, outputs = self.expected_plan(slots, [1] * len(slots)), []
        for layer in range(len(self.shape.layers)):
            q, k, v = rows.q[layer], rows.k[layer], rows.v[layer]
            outputs.append(self.reference.attend(layer, expected, q.float(), k, v, self.scaling))
            self.reference.store(layer, expected, k, v)
        for slot in slots:
            self.requests[slot].length += slot != PADDING
        return outputs

    @property
    def scaling(self) -> float:
        return self.shape.head_dim**-0.5

    def copy_twin(self) -> None:
        """The storage under test holds what the twin does."""
        for _, ours, twins in self._buffers():
            ours.copy_(twins)

    def differences(self) -> list[str]:
        """Buffers that do not hold what the twin's do, bit for bit."""
        found = []
        for name, ours, twins in self._buffers():
            # As bytes: a NaN that both hold is no difference.
            a, b = (x.contiguous().view(torch.uint8) if x.numel() else x for x in (ours, twins))
            if not torch.equal(a, b):
                found.append(f"{int((a != b).sum())} bytes of {name}")
        return found

    def _buffers(self) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        found = []
        for layer, (ours, twins) in enumerate(zip(self.storage.layers, self.twin.layers, strict=True)):
            for half, a, b in (("K", ours.key, twins.key), ("V", ours.value, twins.value)):
                found.append((f"packed {half} pages of layer {layer}", a.pages[self.page_shift :], b.pages))
                found.append((f"the {half} ring of layer {layer}", a.ring[self.slot_shift :], b.ring))
                found.append((f"the {half} sinks of layer {layer}", a.sinks[self.page_shift :], b.sinks))
        return found

    def _storage(self) -> CacheStorage:
        shape = self.shape
        return construction.make_storage(
            shape.layers, num_pages=shape.num_pages, num_slots=shape.num_slots, residual=shape.residual,
            kv_heads=shape.kv_heads, dtype=shape.dtype, device=self.device.device,
        )  # fmt: skip

    def _shifted(self, slot: int) -> int:
        return slot + self.slot_shift

    def _enter(self, slot: int, index: int) -> None:
        first = (self.requests[slot].pages[index] + self.page_shift) * self.page
        tokens = torch.arange(first, first + self.page, dtype=torch.int32, device=self.device.device)
        self.req_to_token[self._shifted(slot), index * self.page : (index + 1) * self.page] = tokens

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device.device)


def row_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of a row [tokens, heads, head_dim] relative to its norm; infinite where one is not finite."""
    error = (ours.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return error.max().item() if bool(error.isfinite().all()) else float("inf")


def same_plan(step: StepPlan, expected: StepPlan, page: int, page_shift: int = 0) -> str | None:
    """What differs between a planner's plan and one made by hand, or None."""
    for name in ("prefix_lens", "packed_end", "query_start"):
        if getattr(step, name).tolist() != getattr(expected, name).tolist():
            return f"{name} is {getattr(step, name).tolist()}, not {getattr(expected, name).tolist()}"
    ends = (expected.prefix_lens + expected.query_start.diff()).tolist()
    for row, end in enumerate(ends):
        ours, theirs = step.pages[row, : end // page].tolist(), expected.pages[row, : end // page].tolist()
        if ours != [p + page_shift for p in theirs]:
            return f"pages of row {row} are {ours}, not {theirs}"
    return None
