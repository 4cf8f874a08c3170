"""Server-argument resolution for the quantized KV cache."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.kvtuner.config.flags import FLAGS, SWITCH, KVTunerConfig, KVTunerConfigError, shown

if TYPE_CHECKING:
    from sglang.srt.kvtuner.config.cache_format import CacheFormat

logger = logging.getLogger(__name__)

_SOURCE = "handle_kvtuner"
_GB, _MB = 1 << 30, 1 << 20


def handle_kvtuner(server_args: Any) -> None:
    """Check the ``--kvtuner-*`` flags against the model and the other flags, and settle what follows from them.

    Raises KVTunerConfigError (a ValueError) that names the flag, its value and what would be valid. Does nothing but
    look for stray ``--kvtuner-*`` flags when ``--enable-kvtuner-quant`` is off.
    """
    SWITCH.check(server_args.enable_kvtuner_quant)
    if not server_args.enable_kvtuner_quant:
        _refuse_flags_without_switch(server_args)
        return

    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
    from sglang.srt.kvtuner.attention.dispatch import requested_kernels
    from sglang.srt.kvtuner.config import compatibility, limits
    from sglang.srt.kvtuner.config.cache_format import build_cache_format
    from sglang.srt.kvtuner.config.preset_header import warn_of_mismatch

    view = resolving_view(server_args)
    config = KVTunerConfig.from_args(server_args)
    compatibility.refuse_unsupported_device(view.device)
    compatibility.refuse_unsupported_instruction_set(view.device)
    requested_kernels(view.device)
    # Against the raw record: a default that resolution filled in is no request of the user's.
    compatibility.refuse_unsupported_features(server_args)
    page_size = limits.page_size_of(server_args.page_size)
    limits.require_chunks_of_pages(view.chunked_prefill_size, page_size)
    limits.require_enough_tokens(view.max_total_tokens, page_size)
    model_config = model_config_of(server_args)
    compatibility.refuse_unsupported_model(model_config)

    cache_format = build_cache_format(
        config,
        num_layers=model_config.num_hidden_layers,
        head_dim=model_config.head_dim,
        page_size=page_size,
        kv_heads=model_config.get_total_num_kv_heads(),
    )
    _refuse_windows_beyond_memory(cache_format, view, model_config)
    warn_of_mismatch(config, server_args.model_path, page_size)
    # torch_native is upstream's backend without CUDA graphs and Triton helpers, which is what the reference needs
    # around it; the attention itself is ours (see kvtuner/backend.py).
    declare_resolution(server_args, _SOURCE, page_size=page_size, attention_backend="torch_native")
    logger.info("Quantized KV cache: %s", cache_format.describe())


def _refuse_windows_beyond_memory(cache_format: CacheFormat, view: Any, model_config: Any) -> None:
    """Residual windows that the whole memory of the device would not hold, found before a model is loaded; what the
    model leaves of it is known, and checked, only afterwards."""
    from sglang.srt.kvtuner.cache.sizing import CacheCosts
    from sglang.srt.kvtuner.config.limits import least_tokens
    from sglang.srt.utils.common import get_device_memory_capacity

    capacity = get_device_memory_capacity(view.device)  # in MiB, None where it is not known
    if capacity is None:
        return
    costs = CacheCosts.of(
        cache_format,
        start_layer=0,
        end_layer=len(cache_format.layers),
        kv_heads=model_config.get_num_kv_heads(view.tp_size),
        itemsize=model_config.dtype.itemsize,
    )
    requests = max(view.max_running_requests or 1, 1)
    if costs.tokens_within(int(capacity * _MB), requests) < least_tokens(cache_format.page_size):
        raise KVTunerConfigError(
            f"--kvtuner-residual-length is {cache_format.residual_length}; the residual windows of {requests} running "
            f"requests (--max-running-requests) take {costs.rings_bytes(requests) // _GB} GB, the device has "
            f"{capacity * _MB / _GB:.0f} GB in all. Lower one of them"
        )


def _refuse_flags_without_switch(server_args: Any) -> None:
    for flag in FLAGS:
        value = getattr(server_args, flag.field)
        if value != flag.default:
            raise KVTunerConfigError(
                f"{flag.name} is {shown(value)} but --enable-kvtuner-quant is missing, so it would have no effect; add "
                "--enable-kvtuner-quant or leave the flag out"
            )
