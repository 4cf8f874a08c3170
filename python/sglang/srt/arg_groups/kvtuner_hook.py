"""Server-argument resolution for the quantized KV cache."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.kvtuner.config.flags import DEFAULT_PAGE_SIZE, FLAG_OF_FIELD, KVTunerConfig, KVTunerConfigError

logger = logging.getLogger(__name__)

_SOURCE = "handle_kvtuner"


def handle_kvtuner(server_args: Any) -> None:
    """Check the ``--kvtuner-*`` flags against the model and the other flags, and settle what follows from them.

    Raises KVTunerConfigError (a ValueError) that names the flag, its value and what would be valid. Does nothing but
    look for stray ``--kvtuner-*`` flags when ``--enable-kvtuner-quant`` is off.
    """
    if not server_args.enable_kvtuner_quant:
        _refuse_flags_without_switch(server_args)
        return

    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
    from sglang.srt.kvtuner.config import compatibility
    from sglang.srt.kvtuner.config.cache_format import build_cache_format
    from sglang.srt.kvtuner.config.preset_header import warn_of_mismatch

    view = resolving_view(server_args)
    config = KVTunerConfig.from_args(server_args)
    compatibility.refuse_unsupported_device(view.device)
    # Against the raw record: a default that resolution filled in is no request of the user's.
    compatibility.refuse_unsupported_features(server_args)
    model_config = model_config_of(server_args)
    compatibility.refuse_unsupported_model(model_config)

    page_size = _page_size(server_args)
    cache_format = build_cache_format(
        config,
        num_layers=model_config.num_hidden_layers,
        head_dim=model_config.head_dim,
        page_size=page_size,
    )
    warn_of_mismatch(config, server_args.model_path, page_size)
    # torch_native is upstream's backend without CUDA graphs and Triton helpers, which is what the reference needs
    # around it; the attention itself is ours (see kvtuner/backend.py).
    declare_resolution(server_args, _SOURCE, page_size=page_size, attention_backend="torch_native")
    logger.info("Quantized KV cache: %s", cache_format.describe())


def _page_size(server_args: Any) -> int:
    requested = server_args.page_size
    if requested is None:
        return DEFAULT_PAGE_SIZE
    if requested < 8 or requested & (requested - 1):
        raise KVTunerConfigError(
            f"--page-size is {requested}; with --enable-kvtuner-quant valid are powers of two from 8 on "
            f"({DEFAULT_PAGE_SIZE} by default)"
        )
    return requested


def _refuse_flags_without_switch(server_args: Any) -> None:
    from sglang.srt.arg_groups.arg_utils import record_fields

    defaults = {field.name: field.default for field in record_fields(type(server_args))}
    for name, flag in FLAG_OF_FIELD.items():
        value = getattr(server_args, name)
        if value != defaults[name]:
            raise KVTunerConfigError(
                f"{flag} is {value!r} but --enable-kvtuner-quant is missing, so it would have no effect; add "
                "--enable-kvtuner-quant or leave the flag out"
            )
