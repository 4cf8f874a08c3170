"""How many tokens fit: exact bytes of packed pages, sinks, rings and kernels, and upstream's sizing interface on top of them.

The budget is what --mem-fraction-static leaves beside weights. What CUDA graphs and activations take is not in it: where the
fraction is not given, upstream chooses it with room for both (arg_groups/memory_hook.py). What attention holds and takes is
counted here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.config.flags import KVTunerConfig, KVTunerConfigError
from sglang.srt.kvtuner.config.limits import LEAST_PAGES, least_tokens, require_enough_tokens
from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig, MemoryPoolConfigurator

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

logger = logging.getLogger(__name__)

# Where --max-running-requests does not say, rings take at most this share of the KV budget.
RING_SHARE = 0.2
# Upstream's own upper bound on running requests when nothing is given.
MOST_REQUESTS = 4096
GB, MB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class CacheCosts:
    """Bytes on one rank.

    page_bytes: one packed page with its sinks, all local layers. ring_bytes: one request's ring, all local layers.
    full_token_bytes: one token of an unquantized cache. page_size: tokens of a page. sink_bytes: what of page_bytes is
    for sinks. kernels: what attention takes beside the cache.
    """

    page_bytes: int
    ring_bytes: int
    full_token_bytes: int
    page_size: int
    sink_bytes: int = 0
    kernels: tuple[KernelMemory, ...] = ()

    @classmethod
    def of(
        cls, cache_format: CacheFormat, *, start_layer: int, end_layer: int, kv_heads: int, itemsize: int
    ) -> CacheCosts:
        """Costs of the layers [start_layer, end_layer) with ``kv_heads`` local heads; ``itemsize`` is the bytes of a
        full-precision element."""
        layers = cache_format.layers[start_layer:end_layer]
        of_layers = [(layer.key.head_dim + layer.value.head_dim) * kv_heads for layer in layers]
        elements = sum(of_layers)
        sink_bytes = sum(layer.sink_length * count for layer, count in zip(layers, of_layers)) * itemsize
        return cls(
            page_bytes=sum(layer.page_bytes_per_head for layer in layers) * kv_heads + sink_bytes,
            ring_bytes=cache_format.ring_length * elements * itemsize,
            full_token_bytes=elements * itemsize,
            page_size=cache_format.page_size,
            sink_bytes=sink_bytes,
        )

    def rings_bytes(self, requests: int) -> int:
        """Rings of ``requests`` requests; one more belongs to upstream's padding slot."""
        return (requests + 1) * self.ring_bytes

    def kernel_bytes(self, requests: int) -> int:
        """What kernels take for ``requests`` requests and the padding slot."""
        return sum(use.bytes(requests + 1) for use in self.kernels)

    def tokens_within(self, budget: int, requests: int) -> int:
        """Tokens in whole pages that fit ``budget`` bytes beside rings and kernels of ``requests`` requests; 0 if none do."""
        rest = budget - self.rings_bytes(requests) - self.kernel_bytes(requests)
        pages = rest // self.page_bytes - 1  # page 0 pads
        return max(pages, 0) * self.page_size

    def requests_within_share(self, budget: int) -> int:
        """Requests that take at most RING_SHARE of ``budget``, rings and kernels, beside what kernels take in any case; at
        least 1."""
        share = int((budget - sum(use.fixed for use in self.kernels)) * RING_SHARE)
        return max(share // (self.ring_bytes + sum(use.per_slot for use in self.kernels)) - 1, 1)


@dataclass
class KVTunerMemoryPoolConfig(MemoryPoolConfig):
    """MemoryPoolConfig with the number of requests that rings were counted for."""

    ring_requests: int = 0


class KVTunerPoolConfigurator(MemoryPoolConfigurator):
    """Sizes the packed pool: what its kernels need and rings for all running requests first, packed pages with the rest of
    the budget."""

    def __init__(self, kvc: KVCacheConfigurator, cache_format: CacheFormat, kernels: tuple[KernelMemory, ...]) -> None:
        self._kvc = kvc
        self._format = cache_format
        self._costs = replace(costs_of(kvc, cache_format), kernels=kernels)
        self._requests: int | None = None

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        """Tokens and ring requests for a budget in bytes.

        Raises KVTunerConfigError when rings and kernels leave no room for the pages of a request, and RuntimeError when ranks
        loaded different weights.
        """
        from sglang.srt.kvtuner.config.agreement import require_agreement
        from sglang.srt.kvtuner.config.common_settings import weights_of

        # Every rank comes straight from upstream's collective memory profiling, so they arrive together. Settings were
        # compared before the model was loaded; a model that is loaded by name has its files only now.
        require_agreement(lambda: weights_of(self._format, self._kvc.model_config))
        requested = self._requested_requests()
        if requested is not None:
            requests = requested
        else:
            requests = min(self._costs.requests_within_share(available_bytes), MOST_REQUESTS)
            tokens = self._costs.tokens_within(available_bytes, requests)
            requests = max(min(requests, self._kvc.resolve_max_num_reqs(tokens)), 1)
        tokens = self._costs.tokens_within(available_bytes, requests)
        if tokens < least_tokens(self._costs.page_size):
            kernels = self._kernels(requests)
            raise KVTunerConfigError(
                f"--max-running-requests {requests} and --kvtuner-residual-length {self._format.residual_length} need "
                f"{self._costs.rings_bytes(requests) / GB:.2f} GB for residual windows, beside at least {LEAST_PAGES} packed "
                f"pages{f' and attention ({kernels})' if kernels else ''}; the KV budget is {available_bytes / GB:.2f} GB. "
                "Lower one of them, or raise --mem-fraction-static"
            )
        self._requests = requests
        return KVTunerMemoryPoolConfig(max_total_num_tokens=tokens, ring_requests=requests)

    def calculate_pool_sizes_from_max_tokens(self, max_total_num_tokens: int, page_size: int) -> MemoryPoolConfig:
        """As :meth:`calculate_pool_sizes` for a cap on tokens below what the budget holds.

        Raises KVTunerConfigError for a cap below the pages of a request.
        """
        require_enough_tokens(max_total_num_tokens, page_size)
        tokens = max_total_num_tokens // page_size * page_size
        requests = self._requests
        if self._requested_requests() is None:
            # A running request holds a page at least.
            requests = max(min(requests, tokens // page_size), 1)
        return KVTunerMemoryPoolConfig(max_total_num_tokens=tokens, ring_requests=requests)

    def finalize_with_max_running_requests(self, config: MemoryPoolConfig) -> MemoryPoolConfig:
        """Cap upstream's number of running requests to those that rings were counted for, and log the sum."""
        config.max_running_requests = min(config.max_running_requests, config.ring_requests)
        self._log(config)
        return config

    def _requested_requests(self) -> int | None:
        from sglang.srt.runtime_context import get_schedule

        requested = get_schedule().max_running_requests
        return None if requested is None else max(requested, 1)

    def _kernels(self, requests: int) -> str:
        return ", ".join(f"{use.name} {use.bytes(requests + 1) / MB:.1f} MB" for use in self._costs.kernels)

    def _log(self, config: MemoryPoolConfig) -> None:
        costs, requests = self._costs, config.max_running_requests
        pages = config.max_total_num_tokens // costs.page_size + 1
        packed, rings = pages * costs.page_bytes, costs.rings_bytes(requests)
        key_bits, value_bits = self._format.stored_bits()
        nominal_key, nominal_value = self._format.nominal_bits()
        logger.info(
            "Quantized KV cache: %s; average bits K %.4g, V %.4g, stored K %.4g, V %.4g",
            self._format.describe(), nominal_key, nominal_value, key_bits, value_bits,
        )  # fmt: skip
        logger.info(
            "Quantized KV cache memory: packed pages %.3f GB (%d pages of %d tokens, %d bytes each%s), residual windows "
            "%.3f GB (%d requests and 1 padding slot, %d tokens, %d bytes each; %.1f%% of the sum)%s",
            packed / GB, pages, costs.page_size, costs.page_bytes,
            f", {costs.sink_bytes} of them for sinks" if costs.sink_bytes else "",
            rings / GB, requests, self._format.ring_length, costs.ring_bytes, 100 * rings / (packed + rings),
            "" if self._requested_requests() is not None
            else f"; --max-running-requests was not given, {requests} requests are admitted",
        )  # fmt: skip
        if costs.kernels:
            logger.info(
                "Quantized KV cache attention: %.1f MB beside the cache (%s)",
                costs.kernel_bytes(requests) / MB, self._kernels(requests),
            )  # fmt: skip
        full = (packed + rings) // costs.full_token_bytes
        logger.info(
            "Quantized KV cache capacity: max_total_num_tokens=%d, %.2fx the %d tokens of an unquantized cache in the "
            "same memory (%.2fx without residual windows)",
            config.max_total_num_tokens, config.max_total_num_tokens / max(full, 1), full,
            costs.full_token_bytes * costs.page_size / costs.page_bytes,
        )  # fmt: skip


def cache_format_of(kvc: KVCacheConfigurator) -> CacheFormat:
    """The cache format for a model runner's cache.

    Raises KVTunerConfigError as at start-up, and for a cache dtype that a checkpoint forces.
    """
    import torch

    from sglang.srt.kvtuner.config.cache_format import build_cache_format

    if kvc.kv_cache_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise KVTunerConfigError(
            f"the checkpoint asks for a KV cache in {kvc.kv_cache_dtype}, which --enable-kvtuner-quant does not support"
        )
    return build_cache_format(
        published_config(),
        num_layers=kvc.model_config.num_hidden_layers,
        head_dim=kvc.model_config.head_dim,
        page_size=kvc.pool_page_size,
        kv_heads=kvc.model_config.get_total_num_kv_heads(),
    )


def published_config() -> KVTunerConfig:
    """What the server's flags say."""
    from sglang.srt.runtime_context import get_context

    return KVTunerConfig.from_args(get_context().config_bag("kvtuner"))


def costs_of(kvc: KVCacheConfigurator, cache_format: CacheFormat) -> CacheCosts:
    """Bytes of this rank's share of the cache."""
    return CacheCosts.of(
        cache_format,
        start_layer=kvc.layer_info.start_layer,
        end_layer=kvc.layer_info.end_layer,
        kv_heads=local_kv_heads(kvc),
        itemsize=kvc.kv_cache_dtype.itemsize,
    )


def longest_request(kvc: KVCacheConfigurator) -> int:
    """Tokens of a row of upstream's request table."""
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len

    return kvc.model_config.context_len + get_req_to_token_extra_context_len()


def local_heads(kvc: KVCacheConfigurator) -> int:
    """Query heads of this tensor-parallel rank."""
    from sglang.srt.runtime_context import get_parallel

    return kvc.model_config.num_attention_heads // get_parallel().attn_tp_size


def local_kv_heads(kvc: KVCacheConfigurator) -> int:
    """KV heads of this tensor-parallel rank."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return kvc.model_config.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size)
