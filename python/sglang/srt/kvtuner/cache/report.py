"""What the cache stores, computed from the buffers that are allocated; shown in ``/server_info``."""

from __future__ import annotations

from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool


def pool_report(pool: KVTunerTokenToKVPool) -> dict:
    """Figures of one rank's pool.

    stored_bits*: bits of the packed buffers per element that they can hold. sink_bits: what sinks add to that.
    bytes_per_token*: of this rank. pool_bytes: packed pages and sinks. capacity_tokens_full_precision: tokens of an
    unquantized cache in the same memory (pages, sinks and rings). attention_bytes: what attention takes beside it, by use.
    nonfinite_blocks: see CacheStorage; where it is not 0, the model made keys or values that are NaN or infinite, and requests
    that read those pages get NaN.
    """
    storage = pool.storage
    tokens = storage.num_pages * pool.page_size
    elements = tokens * storage.kv_heads * storage.head_dim * pool.layer_num
    key_bytes = sum(half.pages.nbytes for half in storage.keys)
    value_bytes = sum(half.pages.nbytes for half in storage.values)
    sink_bytes, ring_bytes = storage.sink_bytes(), storage.ring_bytes()
    pool_bytes = key_bytes + value_bytes + sink_bytes
    full_token_bytes = 2 * pool.layer_num * storage.kv_heads * storage.head_dim * storage.dtype.itemsize
    nominal_key, nominal_value = pool.format.nominal_bits()
    return {
        "format": pool.format.describe(),
        "format_digest": pool.format.digest(),
        "attention": pool.attention,
        "attention_bytes": pool.kernel_bytes,
        "average_bits_key": nominal_key,
        "average_bits_value": nominal_value,
        "hadamard_key_layers": sum(layer.key.hadamard > 0 for layer in pool.format.layers),
        "stored_bits_key": key_bytes * 8 / elements,
        "stored_bits_value": value_bytes * 8 / elements,
        "stored_bits": (key_bytes + value_bytes) * 8 / (2 * elements),
        "sink_bits": sink_bytes * 8 / (2 * elements),
        "bytes_per_token": pool_bytes / tokens,
        "bytes_per_token_full_precision": full_token_bytes,
        "pool_bytes": pool_bytes,
        "sink_bytes": sink_bytes,
        "ring_bytes": ring_bytes,
        "ring_slots": storage.num_slots,
        "nonfinite_blocks": int(storage.nonfinite_blocks),
        "capacity_tokens": pool.size,
        "capacity_tokens_full_precision": (pool_bytes + ring_bytes) // full_token_bytes,
    }
