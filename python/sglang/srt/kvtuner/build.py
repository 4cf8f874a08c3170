"""Entry points that upstream's memory set-up calls when the quantized cache is on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.kvtuner.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.sizing import local_kv_heads, plan_of

if TYPE_CHECKING:
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool


def build_pool(kvc: KVCacheConfigurator, sizes: Any, req_to_token_pool: ReqToTokenPool) -> KVTunerTokenToKVPool:
    """Allocate the packed pool for the sizes that upstream settled (``sizes.max_total_num_tokens``), with one ring per
    request slot."""
    return KVTunerTokenToKVPool(
        plan_of(kvc),
        size=sizes.max_total_num_tokens,
        num_slots=req_to_token_pool.req_to_token.shape[0],
        kv_heads=local_kv_heads(kvc),
        full_precision_dtype=kvc.kv_cache_dtype,
        device=kvc.device,
        start_layer=kvc.layer_info.start_layer,
        end_layer=kvc.layer_info.end_layer,
    )
