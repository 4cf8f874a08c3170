"""What all ranks must have in common beside the cache format: flags, model, tokenizer, code.

Schedulers decide on their own, each from its own flags, what the next batch is. They must come to the same decision on
every rank, or collectives of different shapes meet: at best an error of the transport, at worst wrong tokens in silence.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.kvtuner.config import model_digest
from sglang.srt.kvtuner.config.agreement import Announcement
from sglang.srt.kvtuner.config.cache_format import CacheFormat, build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Namespaces of ServerArgs in which everything must agree, and what may differ in each after all: how much memory a node
# gives, its addresses, its metrics. The page size is part of the cache format, and told as that.
WHOLE_NAMESPACES = {
    "schedule": {
        "mem_fraction_static",
        "page_size",
        "prefill_delayer_forward_passes_buckets",
        "prefill_delayer_wait_seconds_buckets",
    },
    "parallel": {
        *("nccl_port", "dist_timeout", "dist_init_addr", "gated_launch_port", "node_rank"),
        *("enable_p2p_check", "load_balance_method"),
    },
    "exec.comm": {"enable_layerwise_nvtx_marker"},
}
# What must agree of other namespaces. --dtype and --quantization are told as resolved from the model.
PICKED_FIELDS = (
    "kvtuner_workspace_tokens",
    *("load_format", "context_length", "json_model_override_args", "model_impl", "kv_cache_dtype"),
    *("modelopt_quant", "quantize_and_serve"),
    *("disable_radix_cache", "radix_eviction_policy", "radix_eviction_policy_config"),
    *("device", "sampling_backend", "grammar_backend", "enable_fp32_lm_head", "enable_custom_logit_processor"),
    *("moe_a2a_backend", "moe_runner_backend", "ep_num_redundant_experts", "enable_eplb", "eplb_algorithm"),
    *("skip_tokenizer_init", "tokenizer_mode", "reasoning_parser", "enable_strict_thinking"),
    *("constrained_json_whitespace_pattern", "constrained_json_disable_any_whitespace"),
)
# Which attention computes, and what schedulers read from the environment. The instruction set of the CPU kernels is not
# among them: nodes may have different processors. Pages have the same bytes on all, and a rank's heads are computed by no other.
VARIABLES = (
    *("SGLANG_KVTUNER_KERNELS", "SGLANG_KVTUNER_PREFILL"),
    *("SGLANG_INIT_NEW_TOKEN_RATIO", "SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR", "SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS"),
    *("SGLANG_RETRACT_DECODE_STEPS", "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION", "SGLANG_MAX_NEW_TOKENS_LIMIT"),
    *("SGLANG_EXACT_CHUNK_FILL", "SGLANG_RADIX_FORCE_MISS", "SGLANG_REQ_WAITING_TIMEOUT", "SGLANG_REQ_RUNNING_TIMEOUT"),
    *("SGLANG_TEST_RETRACT", "SGLANG_TEST_RETRACT_INTERVAL", "SGLANG_TEST_RETRACT_NO_PREFILL_BS"),
)
# Of a model's configuration: where it was read from, and by what.
VOLATILE_CONFIG = {"_name_or_path", "_commit_hash", "transformers_version"}
# Own files as installed, below the package.
OWN_CODE = (
    *("srt/kvtuner", "srt/arg_groups/fields/kvtuner.py", "srt/arg_groups/kvtuner_hook.py"),
    *("kernels/jit/include/sgl_kernel/kvtuner", "kernels/jit/csrc/kvtuner", "kernels/ops/attention/kvtuner"),
)
LONGEST_VALUE = 60


def setup_of(server_args: ServerArgs, cache_format: CacheFormat) -> Announcement:
    """All of it, from the cache format and resolved arguments, before the model is loaded: weights where the model is a local folder or file."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model_config = model_config_of(server_args)
    settings = server_args.resolved_dict()
    values = {**_versions(), **flags(settings), **_model_values(model_config), **_variables()}
    files = {"own code": own_code(), "tokenizer": model_digest.tokenizer_files(str(settings["tokenizer_path"]))}
    if settings["load_format"] != "dummy":
        files["model weights"] = model_digest.weight_files(model_config.model_path)
    return Announcement.of(
        cache_format,
        values=values,
        files={kind: found for kind, found in files.items() if found},
    )


def resolved_cache_format(server_args: ServerArgs) -> CacheFormat:
    """The cache format that resolved arguments ask for."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model_config = model_config_of(server_args)
    return build_cache_format(
        KVTunerConfig.from_args(server_args),
        num_layers=model_config.num_hidden_layers,
        head_dim=model_config.head_dim,
        page_size=server_args.resolved_dict()["page_size"],
    )


def weights_of(cache_format: CacheFormat, model_config: ModelConfig) -> Announcement:
    """The weights of a model that is loaded: where the model is a name, its files are here by now."""
    from sglang.srt.runtime_context import get_model

    if get_model().load_format == "dummy":
        return Announcement.of(cache_format)
    path = model_config.model_path
    found = model_digest.weight_files(path)
    if found is None:
        found = model_digest.weight_files(_downloaded(path))
    if not found:
        logger.warning("Quantized KV cache: %s has no local weights, so ranks cannot compare them", path)
        return Announcement.of(cache_format)
    return Announcement.of(cache_format, files={"model weights": found})


def flags(settings: dict[str, Any]) -> dict[str, str]:
    """Values of the flags that must agree, by flag. ``settings`` are ServerArgs' resolved fields by name."""
    from sglang.srt.server_args import ServerArgs

    namespaces = ServerArgs._NS_BY_FIELD
    names = [
        name
        for name in settings
        if name in PICKED_FIELDS or name not in WHOLE_NAMESPACES.get(namespaces.get(name), {name})
    ]
    # A field with an underscore is a note of upstream's resolution.
    return {f"--{name.replace('_', '-')}": shown(settings[name]) for name in names if not name.startswith("_")}


@functools.cache
def own_code() -> dict[str, str]:
    """SHA-256, shortened, of every own file of the installed package, by its path in the package."""
    import sglang

    root = Path(sglang.__path__[0])
    found: list[Path] = []
    for name in OWN_CODE:
        path = root / name
        found += [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for file in sorted(found)
        if "__pycache__" not in file.parts
    }


def shown(value: Any) -> str:
    """A value as text: equal for equal values alone, and short enough for a message."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    if len(text) <= LONGEST_VALUE:
        return text
    return f"{text[:LONGEST_VALUE]}... (digest {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _versions() -> dict[str, str]:
    from sglang.version import __version__

    return {"sglang version": __version__}


def _model_values(model_config: ModelConfig) -> dict[str, str]:
    config = {name: value for name, value in model_config.hf_config.to_dict().items() if name not in VOLATILE_CONFIG}
    return {
        "--dtype": str(model_config.dtype).removeprefix("torch."),
        "--quantization": shown(model_config.quantization),
        "model's context length": shown(model_config.context_len),
        "model's end-of-text tokens": shown(sorted(model_config.hf_eos_token_id or ())),
        **{f"model config {name}": shown(value) for name, value in sorted(config.items())},
    }


def _variables() -> dict[str, str]:
    return {name: os.environ.get(name, "unset") for name in VARIABLES}


def _downloaded(name: str) -> str:
    """The local folder of a model that was loaded by name, or the name itself where there is none."""
    from huggingface_hub import snapshot_download

    from sglang.srt.runtime_context import get_model

    model = get_model()
    try:
        return str(
            snapshot_download(name, revision=model.revision, cache_dir=model.download_dir, local_files_only=True)
        )
    except (OSError, ValueError):
        return name
