"""Upstream's view of the packed cache: a KV pool whose pages its allocator hands out."""

from __future__ import annotations

from typing import Any

import torch

from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.config.flags import DEFAULT_WORKSPACE_TOKENS
from sglang.srt.mem_cache.memory_pool import KVCache


class KVTunerTokenToKVPool(KVCache):
    """KV cache of packed pages.

    size: usable tokens. format: of all layers of the model; layer_formats: of this rank's. storage: the buffers.
    workspace_tokens: of what reads the pool. attention: its name, kernel_bytes: its memory by use; both for reports, and set by
    the attention backend.
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
        workspace_tokens: int = DEFAULT_WORKSPACE_TOKENS,
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
        self.workspace_tokens = workspace_tokens
        self.layer_formats = cache_format.layers[start_layer:end_layer]
        self.attention = "none yet"
        self.kernel_bytes: dict[str, int] = {}
        self.storage = CacheStorage.allocate(
            self.layer_formats,
            num_pages=size // cache_format.page_size + 1,
            num_slots=num_slots,
            ring_length=cache_format.ring_length,
            residual_length=cache_format.residual_length,
            kv_heads=kv_heads,
            dtype=full_precision_dtype,
            device=device,
        )
        self.mem_usage = sum(self.get_kv_size_bytes()) / (1 << 30)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes allocated for K and for V, rings and sinks included."""
        halves = (self.storage.keys, self.storage.values)
        key, value = (sum(t.pages.nbytes + t.ring.nbytes + t.sinks.nbytes for t in half) for half in halves)
        return key, value

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
