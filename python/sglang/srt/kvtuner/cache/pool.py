"""The packed KV pool: per layer buffers of packed pages for K and for V, the residual window's rings, and sinks."""

from __future__ import annotations

from typing import Any

import torch

from sglang.srt.kvtuner.attention.steps import SequenceStep
from sglang.srt.kvtuner.cache import huge_pages
from sglang.srt.kvtuner.cache.residual_window import ResidualWindow
from sglang.srt.kvtuner.cache.sinks import Sinks
from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.format.formats import TensorFormat
from sglang.srt.kvtuner.format.page_codec import decode_pages, encode_pages
from sglang.srt.mem_cache.memory_pool import KVCache


class KVTunerTokenToKVPool(KVCache):
    """KV cache of packed pages.

    keys, values: per local layer uint8 [num_pages, kv_heads, block_bytes]; page 0 takes the writes of padded rows, as
    slot 0 does in upstream's pools. Upstream's page allocator hands out the pages; ``size`` counts usable tokens.
    attention: what reads the pool, for reports; set by the attention backend.
    """

    def __init__(
        self,
        cache_format: CacheFormat,
        *,
        size: int,
        num_slots: int,
        kv_heads: int,
        full_precision_dtype: torch.dtype,
        device: str,
        start_layer: int,
        end_layer: int,
    ) -> None:
        # dtype is what the buffers hold. It also keeps upstream's fused rope-and-store kernels, which write bf16 rows
        # through get_key_buffer, away from packed pages.
        super().__init__(
            size=size,
            page_size=cache_format.page_size,
            dtype=torch.uint8,
            layer_num=end_layer - start_layer,
            device=device,
            enable_memory_saver=False,
            start_layer=start_layer,
            end_layer=end_layer,
        )
        self.format = cache_format
        self.attention = "none yet"
        self.kv_heads = kv_heads
        self.head_dim = cache_format.layers[start_layer].key.head_dim
        self.full_precision_dtype = full_precision_dtype
        self.formats = cache_format.layers[start_layer:end_layer]
        num_pages = size // cache_format.page_size + 1

        def buffers(formats: list[TensorFormat]) -> list[torch.Tensor]:
            shapes = [(num_pages, kv_heads, fmt.block_bytes) for fmt in formats]
            return huge_pages.zeros(shapes, torch.uint8, device)

        self.keys = buffers([layer.key for layer in self.formats])
        self.values = buffers([layer.value for layer in self.formats])
        rows = dict(
            kv_heads=kv_heads,
            head_dim=self.head_dim,
            dtype=full_precision_dtype,
            device=device,
        )
        self.window = ResidualWindow(cache_format, num_layers=self.layer_num, num_slots=num_slots, **rows)
        self.sinks = Sinks([layer.sink_length for layer in self.formats], num_pages=num_pages, **rows)
        self.mem_usage = sum(self.get_kv_size_bytes()) / (1 << 30)

    def packed_bytes(self) -> int:
        """Bytes allocated for packed pages, the padding page included."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes allocated for K and for V, rings and sinks included."""
        return (
            sum(t.nbytes for t in (*self.keys, *self.window.keys, *self.sinks.keys)),
            sum(t.nbytes for t in (*self.values, *self.window.values, *self.sinks.values)),
        )

    def read_prior(self, layer_id: int, step: SequenceStep) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the tokens before a step, float32 [prior, kv_heads, head_dim] each."""
        i = layer_id - self.start_layer
        return (
            self._read(self.keys[i], self.sinks.keys[i], self.window.keys[i], self.formats[i].key, step),
            self._read(self.values[i], self.sinks.values[i], self.window.values[i], self.formats[i].value, step),
        )

    def store(self, layer_id: int, step: SequenceStep, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store a step's own K and V, [new, kv_heads, head_dim]: pack the pages it completes, keep the newest tokens.

        Call it after :meth:`read_prior` of the same step and layer: a long chunk overwrites ring rows that its own
        queries read.
        """
        i = layer_id - self.start_layer
        self._store(self.keys[i], self.sinks.keys[i], self.window.keys[i], self.formats[i].key, step, k)
        self._store(self.values[i], self.sinks.values[i], self.window.values[i], self.formats[i].value, step, v)

    def _read(
        self, pages: torch.Tensor, sinks: torch.Tensor, ring: torch.Tensor, fmt: TensorFormat, step: SequenceStep
    ) -> torch.Tensor:
        packed = decode_pages(pages[step.packed_pages], fmt)  # [pages, heads, page_size, head_dim]
        packed = packed.transpose(1, 2).reshape(step.packed_end, self.kv_heads, self.head_dim)
        if step.packed_end:
            packed[: sinks.shape[1]] = sinks[step.packed_pages[0]].float()
        return torch.cat([packed, ring[step.slot, step.prior_rows].float()])

    def _store(
        self,
        pages: torch.Tensor,
        sinks: torch.Tensor,
        ring: torch.Tensor,
        fmt: TensorFormat,
        step: SequenceStep,
        new: torch.Tensor,
    ) -> None:
        completed = step.completed_pages.numel()
        if completed:
            tokens = torch.cat([ring[step.slot, step.open_rows], new])[: completed * self.page_size]
            if step.prior < self.page_size:
                sinks[step.completed_pages[0]] = tokens[: sinks.shape[1]]
            tokens = tokens.unflatten(0, (completed, self.page_size)).transpose(1, 2)
            pages[step.completed_pages] = encode_pages(tokens, fmt)
        ring[step.slot, step.kept_rows] = new[new.shape[0] - step.kept_rows.numel() :]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        raise NotImplementedError(_NO_ROWS)

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        raise NotImplementedError(_NO_ROWS)

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError(_NO_ROWS)

    def set_kv_buffer(self, layer: Any, loc: Any, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        raise NotImplementedError(_NO_ROWS)


_NO_ROWS = (
    "the quantized KV cache has no full-precision rows to read or write by token slot; a feature that needs them is "
    "not supported with --enable-kvtuner-quant"
)
