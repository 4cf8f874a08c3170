"""Server features and models that the quantized cache refuses by name.

A feature leaves these tables when a test shows it working with the quantized cache; docs/kvtuner.md lists them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.kvtuner.config.flags import ATTENTION_BACKEND, KVTunerConfigError, shown


@dataclass(frozen=True)
class RefusedFeature:
    """A ServerArgs field whose values other than ``off`` are refused; ``flag`` is how users know it."""

    field: str
    flag: str
    off: tuple[object, ...] = (None, False)


_OFF_OR_ONE = (None, 1)
_OWN_ATTENTION = (None, ATTENTION_BACKEND)

REFUSED_FEATURES = (
    RefusedFeature("kv_cache_dtype", "--kv-cache-dtype", ("auto",)),
    RefusedFeature("attention_backend", "--attention-backend", _OWN_ATTENTION),
    RefusedFeature("prefill_attention_backend", "--prefill-attention-backend", _OWN_ATTENTION),
    RefusedFeature("decode_attention_backend", "--decode-attention-backend", _OWN_ATTENTION),
    RefusedFeature("enable_lean_attention", "--enable-lean-attention"),
    RefusedFeature("enable_fused_qk_norm_rope", "--enable-fused-qk-norm-rope"),
    RefusedFeature("model_impl", "--model-impl", ("auto", "sglang")),
    RefusedFeature("quantization_param_path", "--quantization-param-path"),
    RefusedFeature("speculative_algorithm", "--speculative-algorithm"),
    RefusedFeature("decoupled_spec_role", "--decoupled-spec-role", (None, "null")),
    RefusedFeature("disaggregation_mode", "--disaggregation-mode", (None, "null")),
    RefusedFeature("enable_pd_role_switch", "--enable-pd-role-switch"),
    RefusedFeature("encoder_only", "--encoder-only"),
    RefusedFeature("language_only", "--language-only"),
    RefusedFeature("enable_pdmux", "--enable-pdmux"),
    RefusedFeature("pp_size", "--pp-size", _OFF_OR_ONE),
    RefusedFeature("dp_size", "--dp-size", _OFF_OR_ONE),
    RefusedFeature("attn_dp_size", "--attn-dp-size", _OFF_OR_ONE),
    RefusedFeature("enable_dp_attention", "--enable-dp-attention"),
    RefusedFeature("dcp_size", "--dcp-size", _OFF_OR_ONE),
    RefusedFeature("attn_cp_size", "--attn-cp-size", _OFF_OR_ONE),
    RefusedFeature("dwdp_size", "--dwdp-size", _OFF_OR_ONE),
    RefusedFeature("enable_prefill_cp", "--enable-prefill-cp"),
    RefusedFeature("enable_kv_cache_sharding", "--enable-kv-cache-sharding"),
    RefusedFeature("enable_attn_tp_input_scattered", "--enable-attn-tp-input-scattered"),
    RefusedFeature("elastic_ep_backend", "--elastic-ep-backend"),
    RefusedFeature("enable_two_batch_overlap", "--enable-two-batch-overlap"),
    RefusedFeature("enable_single_batch_overlap", "--enable-single-batch-overlap"),
    RefusedFeature("enable_hierarchical_cache", "--enable-hierarchical-cache"),
    RefusedFeature("hicache_storage_backend", "--hicache-storage-backend"),
    RefusedFeature("enable_unified_cache_external_linker", "--enable-unified-cache-external-linker"),
    RefusedFeature("enable_lmcache", "--enable-lmcache"),
    RefusedFeature("enable_flexkv", "--enable-flexkv"),
    RefusedFeature("enable_hisparse", "--enable-hisparse"),
    RefusedFeature("enable_unified_memory", "--enable-unified-memory"),
    RefusedFeature("enable_page_major_kv_layout", "--enable-page-major-kv-layout"),
    RefusedFeature("radix_cache_backend", "--radix-cache-backend"),
    RefusedFeature("enable_session_radix_cache", "--enable-session-radix-cache"),
    RefusedFeature("enable_streaming_session", "--enable-streaming-session"),
    RefusedFeature("prefill_only_disable_kv_cache", "--prefill-only-disable-kv-cache"),
    RefusedFeature("enable_mis", "--enable-mis"),
    RefusedFeature("enable_memory_saver", "--enable-memory-saver"),
    RefusedFeature("kv_canary", "--kv-canary", ("none",)),
    RefusedFeature("enable_lora", "--enable-lora"),
    RefusedFeature("lora_paths", "--lora-paths", (None, [], {})),
    RefusedFeature("dllm_algorithm", "--dllm-algorithm"),
    RefusedFeature("enable_deterministic_inference", "--enable-deterministic-inference"),
    RefusedFeature("enable_torch_compile", "--enable-torch-compile"),
    RefusedFeature("enable_nvidia_megakernel", "--enable-nvidia-megakernel"),
    RefusedFeature("enable_amd_monokernel", "--enable-amd-monokernel"),
    RefusedFeature("is_embedding", "--is-embedding"),
)

SUPPORTED_DEVICES = ("cpu", "cuda")

KERNELS_VARIABLE = "SGLANG_KVTUNER_KERNELS"
INSTRUCTION_SET_VARIABLE = "SGLANG_KVTUNER_CPU_ISA"
# What Linux calls the processor's features that a body of the C++ kernels is compiled for.
INSTRUCTION_SETS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "plain": (),
}
_CPU_INFO = Path("/proc/cpuinfo")


def refuse_unsupported_features(requested: Any) -> None:
    """Raise KVTunerConfigError, naming the flag, for the first feature that the quantized cache does not support.

    ``requested`` is the server configuration as the user gave it (fields of ServerArgs).
    """
    for feature in REFUSED_FEATURES:
        value = getattr(requested, feature.field)
        if value not in feature.off:
            valid = " or ".join(sorted({str(v) for v in feature.off if v is not None and v is not False}))
            remedy = f"use {valid}" if valid else "leave it out"
            raise KVTunerConfigError(
                f"{feature.flag} is {shown(value)}, which --enable-kvtuner-quant does not support yet; {remedy}, or drop "
                "--enable-kvtuner-quant"
            )


def kind_of(device: str) -> str:
    """``cuda`` of ``cuda:0``."""
    return str(device).partition(":")[0]


def refuse_unsupported_device(device: str) -> None:
    """Raise KVTunerConfigError for a device without an implementation of the quantized cache."""
    if kind_of(device) not in SUPPORTED_DEVICES:
        raise KVTunerConfigError(
            f"--device is {device!r}; --enable-kvtuner-quant supports {' and '.join(SUPPORTED_DEVICES)}"
        )


def refuse_unsupported_instruction_set(device: str) -> None:
    """Raise KVTunerConfigError for a variable that asks for C++ kernels that this machine's processor cannot run.

    The kernels ask again when they are loaded; this is before the model is.
    """
    wanted = os.environ.get(INSTRUCTION_SET_VARIABLE, "")
    if not wanted or os.environ.get(KERNELS_VARIABLE) == "reference" or kind_of(device) != "cpu":
        return
    if wanted not in INSTRUCTION_SETS:
        raise KVTunerConfigError(
            f"{INSTRUCTION_SET_VARIABLE} is {shown(wanted)}; valid are {', '.join(INSTRUCTION_SETS)}"
        )
    features = _processor_features()
    missing = [feature for feature in INSTRUCTION_SETS[wanted] if feature not in features]
    if features and missing:
        raise KVTunerConfigError(
            f"{INSTRUCTION_SET_VARIABLE} is {shown(wanted)}, but this machine's processor has no {', '.join(missing)}; "
            "leave the variable out for the best that it has"
        )


def _processor_features() -> frozenset[str]:
    """Features of the processor as Linux names them; empty where it does not say."""
    try:
        text = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def refuse_unsupported_model(model_config: Any) -> None:
    """Raise KVTunerConfigError for a model whose cache is not plain MHA or GQA in every layer."""
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    reasons = (
        (model_config.attention_arch == AttentionArch.MLA, "uses multi-head latent attention (MLA)"),
        (model_config.attention_arch != AttentionArch.MHA, "has no attention cache"),
        (mambaish_config(model_config) is not None, "mixes attention with recurrent or linear-attention layers"),
        (model_config.is_encoder_decoder, "is an encoder-decoder model"),
        (model_config.is_hybrid_swa, "uses sliding-window attention"),
        (model_config.attention_chunk_size is not None, "uses chunked local attention"),
        (model_config.has_attention_sinks, "uses attention sinks"),
        (not model_config.is_generation, "is not a generation model"),
        (model_config.is_multimodal, "is multimodal"),
        (model_config.num_attention_layers != model_config.num_hidden_layers, "runs its layers more than once"),
        (model_config.head_dim != model_config.v_head_dim, "has different head dimensions for K and V"),
    )
    for refused, reason in reasons:
        if refused:
            names = ", ".join(model_config.hf_config.architectures or ["unknown architecture"])
            raise KVTunerConfigError(
                f"--enable-kvtuner-quant does not support {names}: the model {reason}; supported are models whose "
                "cache is plain MHA or GQA"
            )


def refuse_unsupported_layers(layers: Any) -> None:
    """Raise KVTunerConfigError for an attention layer (RadixAttention) with a variant that would be ignored."""
    from sglang.srt.layers.radix_attention import AttentionType

    for layer in layers:
        reasons = (
            (layer.is_cross_attention, "cross-attention"),
            (layer.attn_type != AttentionType.DECODER, f"attention type {layer.attn_type}"),
            (layer.sliding_window_size > 0, f"a sliding window of {layer.sliding_window_size}"),
            (layer.logit_cap > 0, f"a logit cap of {layer.logit_cap}"),
            (layer.xai_temperature_len > 0, "a temperature by sequence length"),
            (layer.use_irope, "iRoPE chunks"),
            (layer.qk_head_dim != layer.v_head_dim, "different head dimensions for K and V"),
        )
        for refused, reason in reasons:
            if refused:
                raise KVTunerConfigError(
                    f"--enable-kvtuner-quant does not support this model: layer {layer.layer_id} has {reason}"
                )
