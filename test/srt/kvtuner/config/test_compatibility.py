"""Features and models that are refused, each by its own name."""

import argparse
import copy
from pathlib import Path

import pytest

from harness.server_args import resolve, server_args, write_model
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.arg_groups.overrides import model_config_of
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.kvtuner.config import compatibility
from sglang.srt.kvtuner.config.compatibility import REFUSED_FEATURES
from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.server_args import ServerArgs

# A value that asks for the feature, where it is not plain True or a width of two.
VALUES = {
    "kv_cache_dtype": "fp8_e5m2",
    "attention_backend": "triton",
    "prefill_attention_backend": "triton",
    "decode_attention_backend": "triton",
    "model_impl": "transformers",
    "quantization_param_path": "scales.json",
    "hicache_storage_backend": "file",
    "speculative_algorithm": "NGRAM",
    "decoupled_spec_role": "drafter",
    "disaggregation_mode": "prefill",
    "elastic_ep_backend": "mooncake",
    "radix_cache_backend": "lmcache",
    "kv_canary": "log",
    "lora_paths": ["adapter"],
    "dllm_algorithm": "LowConfidence",
}


def value_of(feature):
    return VALUES.get(feature.field, 2 if feature.field.endswith("_size") else True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parser():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser


by_field = pytest.mark.parametrize("feature", REFUSED_FEATURES, ids=lambda feature: feature.field)


def test_no_feature_is_listed_twice():
    assert len({feature.field for feature in REFUSED_FEATURES}) == len(REFUSED_FEATURES)


@by_field
def test_a_refused_feature_is_upstreams_and_off_by_default(feature, parser):
    """Under the name and flag of the pinned upstream: a renamed one would no longer be refused."""
    defaults = {field.name: field.default for field in record_fields(ServerArgs)}
    assert feature.field in defaults
    assert defaults[feature.field] in feature.off
    action = parser._option_string_actions[feature.flag]
    assert action.dest == feature.field


@by_field
def test_a_refused_feature_is_named_with_its_value(feature, model):
    value = value_of(feature)
    with pytest.raises(KVTunerConfigError) as caught:
        compatibility.refuse_unsupported_features(server_args(model, **{feature.field: value}))
    message = str(caught.value)
    assert message.startswith(f"{feature.flag} is {value!r}, which --enable-kvtuner-quant does not support yet")
    assert "or drop --enable-kvtuner-quant" in message


# What else upstream wants with a feature before it lets it come to our check.
COMPANIONS = {
    "dwdp_size": {"tp_size": 2},
    "prefill_only_disable_kv_cache": {"is_embedding": True, "chunked_prefill_size": -1, "disable_radix_cache": True},
}


@by_field
def test_a_server_with_a_refused_feature_does_not_start(feature, model):
    fields = {feature.field: value_of(feature), **COMPANIONS.get(feature.field, {})}
    if feature.field == "enable_deterministic_inference":
        with pytest.raises(ValueError, match="deterministic inference"):  # upstream's own refusal on a CPU
            resolve(model, **fields)
        return
    with pytest.raises(KVTunerConfigError) as caught:
        resolve(model, **fields)
    assert str(caught.value).startswith(f"{feature.flag} is ")


@pytest.mark.parametrize("device", ("cpu", "cuda", "cuda:1"))
def test_supported_devices(device):
    compatibility.refuse_unsupported_device(device)


@pytest.mark.parametrize("device", ("xpu", "npu:0", "hpu", "mps", "musa"))
def test_other_devices(device):
    with pytest.raises(KVTunerConfigError, match=f"--device is '{device}'; .* supports cpu and cuda"):
        compatibility.refuse_unsupported_device(device)


@pytest.mark.parametrize(
    "architecture, config",
    [
        ("LlamaForCausalLM", {}),
        ("MistralForCausalLM", {"model_type": "mistral"}),
        ("Qwen2ForCausalLM", {"model_type": "qwen2"}),
        ("Qwen3ForCausalLM", {"model_type": "qwen3"}),
        ("Qwen3MoeForCausalLM", {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 64}),
    ],
)
def test_models_with_a_plain_cache(tmp_path, architecture, config):
    model = write_model(tmp_path / architecture, architectures=[architecture], **config)
    assert resolve(model)["enable_kvtuner_quant"] is True


MLA = dict(
    model_type="deepseek_v2", kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=64, qk_rope_head_dim=32,
    v_head_dim=64, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1,
    first_k_dense_replace=1,
)  # fmt: skip
ALTERNATING = dict(sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 2)
HYBRID = dict(
    model_type="qwen3_next", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
    shared_expert_intermediate_size=64, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=32,
    linear_value_head_dim=32, linear_conv_kernel_dim=4,
)  # fmt: skip
# Upstream's defaults for such models need a GPU; with these they come as far as our check.
ON_CPU = {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}


@pytest.mark.parametrize(
    "architecture, config, flags, reason",
    [
        ("DeepseekV2ForCausalLM", MLA, {}, "uses multi-head latent attention (MLA)"),
        ("GptOssForCausalLM", {"model_type": "gpt_oss", **ALTERNATING}, {}, "uses sliding-window attention"),
        ("Llama4ForConditionalGeneration", {"model_type": "llama4"}, {}, "uses sliding-window attention"),
        ("WhisperForConditionalGeneration", {"model_type": "whisper"}, {}, "is an encoder-decoder model"),
        ("Qwen2VLForConditionalGeneration", {"model_type": "qwen2_vl"}, {}, "is multimodal"),
        ("LlavaLlamaForCausalLM", {"model_type": "llava"}, {}, "is multimodal"),
        ("MambaForCausalLM", {"model_type": "mamba"}, {}, "has no attention cache"),
        ("Qwen3NextForCausalLM", HYBRID, ON_CPU, "mixes attention with recurrent"),
        ("FalconH1ForCausalLM", {"model_type": "falcon_h1"}, ON_CPU, "mixes attention"),
        ("LlamaForSequenceClassification", {}, {}, "is not a generation model"),
    ],
)
def test_models_that_are_refused(tmp_path, architecture, config, flags, reason):
    model = write_model(tmp_path / architecture, architectures=[architecture], **config)
    with pytest.raises(KVTunerConfigError) as caught:
        resolve(model, **flags)
    assert f"does not support {architecture}: the model {reason}" in str(caught.value)


@pytest.mark.parametrize(
    "attributes, reason",
    [
        ({"attention_arch": AttentionArch.MLA}, "(MLA)"),
        ({"attention_arch": AttentionArch.SSM}, "has no attention cache"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"is_hybrid_swa": True}, "uses sliding-window attention"),
        ({"attention_chunk_size": 8192}, "uses chunked local attention"),
        ({"has_attention_sinks": True}, "uses attention sinks"),
        ({"is_generation": False}, "is not a generation model"),
        ({"is_multimodal": True}, "is multimodal"),
        ({"num_attention_layers": 8}, "runs its layers more than once"),
        ({"v_head_dim": 32}, "has different head dimensions for K and V"),
    ],
)
def test_every_property_of_a_model_that_is_refused(model, attributes, reason):
    """One by one, on the model configuration of a Llama."""
    config = copy.copy(model_config_of(server_args(model)))
    compatibility.refuse_unsupported_model(config)
    for name, value in attributes.items():
        assert getattr(config, name) != value
        setattr(config, name, value)
    with pytest.raises(KVTunerConfigError) as caught:
        compatibility.refuse_unsupported_model(config)
    assert "LlamaForCausalLM" in str(caught.value) and reason in str(caught.value)


def layer(**changes):
    attributes = {"num_heads": 4, "head_dim": 64, "scaling": 0.125, "num_kv_heads": 2, "layer_id": 3, **changes}
    return RadixAttention(**attributes)


@pytest.mark.parametrize(
    "changes, attributes, reason",
    [
        ({"is_cross_attention": True}, {}, "cross-attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, {}, "attention type"),
        ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, {}, "attention type"),
        ({"sliding_window_size": 4096}, {}, "a sliding window of 4096"),
        ({"logit_cap": 50.0}, {}, "a logit cap of 50.0"),
        ({}, {"xai_temperature_len": 1024}, "a temperature by sequence length"),
        ({"use_irope": True}, {}, "iRoPE chunks"),
        ({"v_head_dim": 32}, {}, "different head dimensions for K and V"),
    ],
)
def test_layers_that_are_refused(changes, attributes, reason):
    refused = layer(**changes)
    for name, value in attributes.items():
        assert hasattr(refused, name)
        setattr(refused, name, value)
    with pytest.raises(KVTunerConfigError) as caught:
        compatibility.refuse_unsupported_layers([layer(layer_id=0), refused])
    assert "layer 3 has " in str(caught.value) and reason in str(caught.value)


def test_plain_layers_are_accepted():
    compatibility.refuse_unsupported_layers([layer(), layer(v_head_dim=64), layer(sliding_window_size=0)])


def test_the_docs_list_every_refused_flag():
    text = (Path(__file__).resolve().parents[4] / "docs" / "kvtuner.md").read_text(encoding="utf-8")
    assert [feature.flag for feature in REFUSED_FEATURES if f"`{feature.flag}`" not in text] == []
