"""Server-argument resolution for the quantized KV cache."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.kvtuner.config.flags import (
    ATTENTION_BACKEND,
    ATTENTION_BACKEND_FIELDS,
    FLAGS,
    SWITCH,
    KVTunerConfig,
    KVTunerConfigError,
    shown,
)

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
    from sglang.srt.kvtuner.attention.prefill_libraries import requested_prefill
    from sglang.srt.kvtuner.config import compatibility, limits
    from sglang.srt.kvtuner.config.cache_format import build_cache_format
    from sglang.srt.kvtuner.config.preset_header import warn_of_mismatch

    view = resolving_view(server_args)
    config = KVTunerConfig.from_args(server_args)
    compatibility.refuse_unsupported_device(view.device)
    compatibility.refuse_unsupported_instruction_set(view.device)
    requested_kernels(view.device)
    requested_prefill(view.device)
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
    graphs = _settle_cuda_graphs(server_args, view, cache_format)
    declare_resolution(server_args, _SOURCE, page_size=page_size, attention_backend=ATTENTION_BACKEND, **graphs)
    logger.info("Quantized KV cache: %s", cache_format.describe())


def _settle_cuda_graphs(server_args: Any, view: Any, cache_format: CacheFormat) -> dict[str, Any]:
    """The graphs' configuration where it cannot stay as it is; a request of the user's that cannot be met is refused."""
    from sglang.srt.kvtuner.attention.dispatch import why_no_decode_graphs
    from sglang.srt.kvtuner.config.compatibility import kind_of
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    graphs = view.cuda_graph_config
    if graphs.prefill.backend == Backend.FULL:
        raise KVTunerConfigError(
            f"{_graphs_of(Phase.PREFILL, graphs)}, which --enable-kvtuner-quant does not support; valid are breakable, disabled"
        )
    if kind_of(view.device) != "cuda" or graphs.decode.backend == Backend.DISABLED:
        return {}
    if graphs.decode.backend == Backend.BREAKABLE:
        # Its buffers for what a graph returns take tensors and tuples; a decode step returns logits in an object of their own.
        raise KVTunerConfigError(
            f"{_graphs_of(Phase.DECODE, graphs)}, which this version of SGLang cannot capture for any attention backend; valid are "
            "full, disabled"
        )
    reason = why_no_decode_graphs(view.device, cache_format.layers)
    if reason is None:
        return {}
    if (Phase.DECODE, "backend") in server_args._cuda_graph_config_locked:
        raise KVTunerConfigError(
            f"{_graphs_of(Phase.DECODE, graphs)}, but CUDA graphs cannot capture the kernels of this cache ({reason}); valid is "
            "disabled"
        )
    logger.warning("CUDA graphs of decode steps are off: they cannot capture the kernels of this cache (%s)", reason)
    return {"cuda_graph_config": with_phase(graphs, Phase.DECODE, backend=Backend.DISABLED)}


def _graphs_of(phase: str, graphs: Any) -> str:
    """The flags that can have said what the graphs of a phase are, and what they are."""
    backend = getattr(graphs, phase).backend
    return f"--cuda-graph-backend-{phase}, or the backend of {phase} in --cuda-graph-config, is {backend!r}"


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
    for field in ATTENTION_BACKEND_FIELDS:
        if getattr(server_args, field) == ATTENTION_BACKEND:
            raise KVTunerConfigError(
                f"--{field.replace('_', '-')} is {ATTENTION_BACKEND!r}, which reads the quantized KV cache alone; add "
                "--enable-kvtuner-quant or choose another backend"
            )
