"""Whether this process runs with the quantized cache. Imports nothing heavy: upstream's code asks with the flag off."""

from __future__ import annotations


def enabled() -> bool:
    """True when the published configuration has ``--enable-kvtuner-quant``."""
    from sglang.srt.runtime_context import get_context

    context = get_context()
    # Unit tests and tools build parts of the engine without publishing a configuration.
    if not context.is_config_namespace_published("kvtuner"):
        return False
    return context.config_bag("kvtuner").enable_kvtuner_quant
