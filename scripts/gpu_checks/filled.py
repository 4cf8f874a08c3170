"""A filled cache for measurements: requests of one length whose pages lie in random order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpu_checks import construction
from gpu_checks.device import Device
from sglang.srt.kvtuner.format.formats import LayerFormat

# Pages that are packed; the pool repeats them, since what they hold does not matter to time.
DISTINCT_PAGES = {True: 4, False: 64}  # by whether shapes are small


class Filled:
    """Decode steps of ``batch`` requests of ``context`` tokens, the step's own among them, over layers of given formats."""

    def __init__(
        self, device: Device, layers: Sequence[LayerFormat], *, context: int, batch: int, heads: int, kv_heads: int,
        residual: int, dtype: torch.dtype, splits: int | None = None,
    ) -> None:  # fmt: skip
        first = layers[0].key
        page, dim, at = first.page_size, first.head_dim, device.device
        self.context, self.batch, self.page, self._splits = context, batch, page, splits
        whole = -(-context // page)
        self.storage = construction.make_storage(
            layers, num_pages=whole * batch + 1, num_slots=batch + 1, residual=residual, kv_heads=kv_heads, dtype=dtype,
            device=at,
        )  # fmt: skip
        distinct = DISTINCT_PAGES[device.small]
        for layer in self.storage.layers:
            for half in (layer.key, layer.value):
                blocks = construction.pack_pages(torch.randn(distinct, page, dim, device=at), half.format)
                which = torch.randint(distinct, (half.pages[..., 0].numel(),), device=at)
                torch.index_select(blocks, 0, which, out=half.pages.view(-1, blocks.shape[1]))
                half.ring.normal_()
        self.kernels = construction.make_kernels(self.storage, heads=heads, most_pages=whole)
        table = torch.zeros(batch + 1, whole * page, dtype=torch.int32)
        ids = (torch.randperm(whole * batch) + 1).view(batch, whole, 1)
        table[1:] = (ids * page + torch.arange(page)).view(batch, -1).to(torch.int32)
        self.planner = construction.make_planner(
            self.kernels, table.to(at), torch.ones(batch + 1, dtype=torch.int64), max_rows=batch
        )
        self.slots = torch.arange(1, batch + 1, device=at)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int64, device=at)
        self.q = torch.randn(batch, heads, dim, device=at).to(dtype)
        self.k, self.v = torch.randn(2, batch, kv_heads, dim, device=at).to(dtype)
        self.plan = self.kernels.plan(self.planner.plan_decode(self.slots, self.seq_lens))

    def attend(self, layer: int = 0) -> None:
        with construction.decode_splits(self._splits):
            self.kernels.attend(layer, self.plan, self.q, self.k, self.v, self.q.shape[2] ** -0.5)

    def store(self, layer: int = 0) -> None:
        self.kernels.store(layer, self.plan, self.k, self.v)

    def step(self) -> None:
        """A decode step of all layers; the same one every time."""
        self.plan = self.kernels.plan(self.planner.plan_decode(self.slots, self.seq_lens))
        for layer in range(len(self.storage.layers)):
            self.attend(layer)
            self.store(layer)

    def bytes_read(self) -> int:
        """Of packed pages and ring rows, by attention of one layer."""
        layer, storage = self.storage.layers[0], self.storage
        packed = max(self.context - 1 - storage.residual_length, 0) // self.page
        of_pages = packed * sum(half.pages[0].nbytes for half in (layer.key, layer.value))
        return self.batch * (of_pages + 2 * (self.context - 1 - packed * self.page) * layer.key.ring[0, 0].nbytes)
