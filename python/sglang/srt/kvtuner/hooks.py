"""All that upstream's edits call. Imports nothing heavy: upstream's code asks :func:`enabled` with the flag off, too."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
    from sglang.srt.kvtuner.cache.sizing import KVTunerPoolConfigurator
    from sglang.srt.kvtuner.config.agreement import Announcement
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.server_args import ServerArgs


def enabled() -> bool:
    """True when the published configuration has ``--enable-kvtuner-quant``."""
    from sglang.srt.runtime_context import get_context

    context = get_context()
    # Unit tests and tools build parts of the engine without publishing a configuration.
    if not context.is_config_namespace_published("kvtuner"):
        return False
    return context.config_bag("kvtuner").enable_kvtuner_quant


def resolve_or_exit(server_args: Any) -> None:
    """Resolve the arguments of a command line; one that the quantized cache refuses ends the process with status 1 and
    one line. Other errors, and those of an Engine, are upstream's to show."""
    from sglang.srt.kvtuner.config.flags import KVTunerConfigError

    try:
        server_args.resolve_once()
    except KVTunerConfigError as error:
        raise SystemExit(f"sglang: error: {error}") from None


def refusal() -> str | None:
    """The message of the exception that is being handled where it is one of this package, which says all that there is to say;
    None for others, of which upstream shows the traceback."""
    error = sys.exc_info()[1]
    return str(error) if type(error).__module__.startswith("sglang.srt.kvtuner.") else None


def longest_input(limit: int, pool_tokens: int) -> int:
    """Upstream's limit on the length of a prompt, lowered to what its scheduler admits to a pool of ``pool_tokens``."""
    from sglang.srt.kvtuner.config.limits import longest_input
    from sglang.srt.runtime_context import get_schedule

    return min(limit, longest_input(pool_tokens, get_schedule().page_size))


def held_back_tokens(page_size: int) -> int:
    """Tokens of the pool that no request may count on for its answer."""
    from sglang.srt.kvtuner.config.limits import HELD_BACK_PAGES

    return HELD_BACK_PAGES * page_size


def require_same_setup(server_args: ServerArgs) -> None:
    """Stop every rank where one has other flags, another model, other code or other kernels.

    Called as soon as the ranks' process group stands, before the model is loaded. Raises RuntimeError on all ranks.
    """
    from sglang.srt.kvtuner.config.agreement import require_agreement

    require_agreement(lambda: _setup_with_kernels(server_args))


def _setup_with_kernels(server_args: ServerArgs) -> Announcement:
    """What ranks must have in common, and the kernels that this one has chosen, built and ready."""
    from dataclasses import replace

    from sglang.srt.kvtuner.attention.dispatch import choose_kernels
    from sglang.srt.kvtuner.config.common_settings import resolved_cache_format, setup_of

    cache_format = resolved_cache_format(server_args)
    setup = setup_of(server_args, cache_format)
    kernels, reasons = choose_kernels(server_args.resolved_dict()["device"], cache_format.layers)
    return replace(
        setup,
        values={**setup.values, "kernels": kernels.identity()},
        remarks={"kernels": "; ".join(reasons)} if reasons else {},
    )


def build_configurator(kvc: KVCacheConfigurator) -> KVTunerPoolConfigurator:
    """What decides how many tokens the packed pool holds, beside what the kernels take that will read it."""
    from sglang.srt.kvtuner.attention.base import Workload
    from sglang.srt.kvtuner.attention.dispatch import choose_kernels
    from sglang.srt.kvtuner.cache import sizing

    cache_format = sizing.cache_format_of(kvc)
    kernels, _ = choose_kernels(kvc.device, cache_format.layers)
    workload = Workload(
        heads=sizing.local_heads(kvc),
        kv_heads=sizing.local_kv_heads(kvc),
        head_dim=kvc.model_config.head_dim,
        page_size=cache_format.page_size,
        dtype=kvc.kv_cache_dtype,
        most_pages=sizing.longest_request(kvc) // cache_format.page_size,
        workspace_tokens=sizing.published_config().workspace_tokens,
    )
    return sizing.KVTunerPoolConfigurator(kvc, cache_format, kernels.memory(workload))


def build_pool(kvc: KVCacheConfigurator, sizes: Any, req_to_token_pool: ReqToTokenPool) -> KVTunerTokenToKVPool:
    """Allocate the packed pool for the sizes that upstream settled (``sizes.max_total_num_tokens``), with one ring per
    request slot, and register the attention backend that reads it: upstream builds that after the pool, by name."""
    from sglang.srt.kvtuner.attention.backend import KVTunerAttnBackend
    from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
    from sglang.srt.kvtuner.cache.sizing import cache_format_of, local_kv_heads, published_config
    from sglang.srt.kvtuner.config.flags import ATTENTION_BACKEND
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(ATTENTION_BACKEND)(KVTunerAttnBackend)
    return KVTunerTokenToKVPool(
        cache_format_of(kvc),
        size=sizes.max_total_num_tokens,
        num_slots=req_to_token_pool.req_to_token.shape[0],
        kv_heads=local_kv_heads(kvc),
        full_precision_dtype=kvc.kv_cache_dtype,
        device=kvc.device,
        start_layer=kvc.layer_info.start_layer,
        end_layer=kvc.layer_info.end_layer,
        workspace_tokens=published_config().workspace_tokens,
    )


def contribute_internal_state(scheduler: Any, state: dict) -> None:
    """Put this rank's version and the report of its pool into its internal state as ``kvtuner``."""
    from sglang.srt.kvtuner.cache.report import pool_report
    from sglang.version import __version__

    state["kvtuner"] = {"version": __version__, **pool_report(scheduler.token_to_kv_pool_allocator.get_kvcache())}
