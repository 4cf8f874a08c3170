"""The cache format: flags against the model, ring length, and a digest that no setting escapes."""

from dataclasses import replace

import pytest

from sglang.srt.kvtuner.config.cache_format import build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig, KVTunerConfigError

MODEL = dict(num_layers=3, head_dim=128, page_size=64)


def cache_format_of(model=MODEL, **fields):
    return build_cache_format(KVTunerConfig(**fields), **model)


def refusal(model, **fields):
    with pytest.raises(KVTunerConfigError) as caught:
        cache_format_of({**MODEL, **model}, **fields)
    return str(caught.value)


def write_preset(tmp_path, *pairs):
    path = tmp_path / "preset.yaml"
    path.write_text("".join(f"{i}: {{nbits_key: {k}, nbits_value: {v}}}\n" for i, (k, v) in enumerate(pairs)))
    return str(path)


def test_every_layer_follows_the_flags():
    cache_format = cache_format_of(nbits_key=8, nbits_value=2, asym=True, axis_key=1, group_size=32, residual_length=5)
    assert len(cache_format.layers) == 3 and cache_format.page_size == 64 and cache_format.residual_length == 5
    for layer in cache_format.layers:
        assert (layer.key.nbits, layer.key.axis, layer.key.parameter_shape) == (8, 1, (2, 128))
        assert (layer.value.nbits, layer.value.axis, layer.value.parameter_shape) == (2, 0, (64, 4))
        assert layer.key.asym and layer.value.asym


def test_a_preset_overrides_the_bits_only(tmp_path):
    preset = write_preset(tmp_path, (8, 4), (4, 4), (2, 8))
    cache_format = cache_format_of(preset=preset, nbits_key=2, nbits_value=2, asym=True, axis_value=1, group_size=16)
    assert [(layer.key.nbits, layer.value.nbits) for layer in cache_format.layers] == [(8, 4), (4, 4), (2, 8)]
    assert all(layer.key.asym and layer.value.axis == 1 and layer.key.group_size == 16 for layer in cache_format.layers)
    assert cache_format.nominal_bits() == (14 / 3, 16 / 3)
    assert cache_format.stored_bits() == (14 / 3 + 2, 16 / 3 + 2)
    page_bytes = sum(layer.page_bytes_per_head for layer in cache_format.layers)
    assert page_bytes == 64 * 128 * (14 + 16) // 8 + 3 * 2 * (64 * 128 // 16) * 4
    assert "K2V8/K4V4/K8V4" in cache_format.describe()


def test_layers_that_are_left_alone(tmp_path):
    cache_format = cache_format_of(
        preset=write_preset(tmp_path, (16, 4), (4, 16), (16, 16)), asym=True, axis_key=1, group_size=32
    )
    assert [(layer.key.quantized, layer.value.quantized) for layer in cache_format.layers] == [
        (False, True), (True, False), (False, False)
    ]  # fmt: skip
    assert cache_format.nominal_bits() == (12, 12) and cache_format.stored_bits() == (
        (16 + 5 + 16) / 3,
        (5 + 16 + 16) / 3,
    )
    assert "K16V16/K16V4/K4V16, asymmetric, K per channel g32, V per token g32" in cache_format.describe()
    assert (
        cache_format_of(nbits_key=16).describe().startswith("3 layers K16V4, symmetric, K bfloat16, V per token g64, ")
    )
    assert (
        cache_format_of(nbits_key=16, nbits_value=16)
        .describe()
        .startswith("3 layers K16V16, K bfloat16, V bfloat16, page")
    )


def test_settings_of_the_quantizer_mean_nothing_to_bfloat16_pages():
    bfloat16 = cache_format_of(nbits_key=16, nbits_value=16)
    # Not even that a group must divide the head.
    other = cache_format_of(nbits_key=16, nbits_value=16, asym=True, axis_key=1, axis_value=1, group_size=48)
    assert other.digest() == bfloat16.digest() and bfloat16.stored_bits() == (16, 16)
    with pytest.raises(KVTunerConfigError, match="--kvtuner-q-group-size is 48 with --kvtuner-axis-value 0"):
        cache_format_of(nbits_key=16, group_size=48)


@pytest.mark.parametrize("head_dim, block", [(128, 128), (80, 16), (96, 32)])
def test_rotated_keys(head_dim, block):
    cache_format = cache_format_of({**MODEL, "head_dim": head_dim}, hadamard_key=True, group_size=16)
    assert {(layer.key.hadamard, layer.value.hadamard) for layer in cache_format.layers} == {(block, 0)}
    assert "K per token g16 rotated, V per token g16, " in cache_format.describe()
    assert cache_format.stored_bits() == cache_format_of({**MODEL, "head_dim": head_dim}, group_size=16).stored_bits()


def test_a_preset_chooses_the_layers_whose_keys_are_rotated(tmp_path):
    path = tmp_path / "rotated.yaml"
    bits = "nbits_key: 4, nbits_value: 4"
    path.write_text(f"0: {{{bits}}}\n1: {{{bits}, hadamard_key: true}}\n2: {{nbits_key: 16, nbits_value: 4}}\n")
    assert [layer.key.hadamard for layer in cache_format_of(preset=str(path)).layers] == [0, 128, 0]
    assert "K per token g64 rotated in 1 layers" in cache_format_of(preset=str(path)).describe()
    # The flag decides where the preset does not; bfloat16 keys are left alone.
    assert [layer.key.hadamard for layer in cache_format_of(preset=str(path), hadamard_key=True).layers] == [
        128,
        128,
        0,
    ]


@pytest.mark.parametrize("page_size", (16, 64))
def test_sinks_fit_a_page(page_size):
    model = {**MODEL, "page_size": page_size}
    assert cache_format_of(model, sink_length=page_size).describe().endswith(f", sinks {page_size}")
    assert "sinks" not in cache_format_of(model).describe()
    message = refusal(model, sink_length=page_size + 1)
    assert message == f"--kvtuner-sink-length is {page_size + 1}; valid are 0 to {page_size}, one page (--page-size)"


def test_a_preset_chooses_the_layers_that_keep_sinks(tmp_path):
    path = tmp_path / "sinks.yaml"
    bits = "nbits_key: 4, nbits_value: 4"
    path.write_text(f"0: {{{bits}}}\n1: {{{bits}, sink_length: 4}}\n2: {{{bits}, sink_length: 0}}\n")
    assert [layer.sink_length for layer in cache_format_of(preset=str(path)).layers] == [0, 4, 0]
    assert cache_format_of(preset=str(path)).describe().endswith(", sinks 4 in 1 layers")
    # The flag decides where the preset does not.
    cache_format = cache_format_of(preset=str(path), sink_length=2)
    assert [layer.sink_length for layer in cache_format.layers] == [2, 4, 0]
    assert cache_format.describe().endswith(", sinks 2 to 4 in 2 layers")
    path.write_text(path.read_text().replace("sink_length: 4", "sink_length: 65"))
    expected = f"--kvtuner-config {path}: sink_length of layer 1 is 65; valid are 0 to 64, one page (--page-size)"
    assert refusal({}, preset=str(path)) == expected


def test_odd_heads_cannot_be_rotated():
    message = refusal({"head_dim": 13}, hadamard_key=True, nbits_key=8, nbits_value=8, group_size=-1)
    assert message.startswith("--kvtuner-hadamard-key, or hadamard_key of a layer") and "head_dim 13 is odd" in message


@pytest.mark.parametrize("count", (2, 4))
def test_a_preset_with_fewer_or_more_layers_than_the_model(tmp_path, count):
    preset = write_preset(tmp_path, *[(4, 4)] * count)
    assert refusal({}, preset=preset) == f"--kvtuner-config {preset}: the preset has {count} layers, the model has 3"


def test_group_of_minus_one_is_the_head():
    assert cache_format_of(group_size=-1).layers[0].key.group_size == 128
    assert cache_format_of(group_size=-1).layers[0].value.parameter_shape == (64, 1)


@pytest.mark.parametrize("head_dim, group", [(128, 48), (80, 64), (96, 64), (64, 128)])
def test_groups_that_do_not_divide_the_head(head_dim, group):
    message = refusal({"head_dim": head_dim}, group_size=group)
    assert message.startswith(f"--kvtuner-q-group-size is {group} with --kvtuner-axis-key 0")
    assert f"head_dim {head_dim}" in message and "-1 for all of it" in message


@pytest.mark.parametrize("head_dim", (1 << 40, 10**12 + 39))
def test_divisors_of_any_number_are_listed_at_once(head_dim):
    """Counted one by one they would take days; the second number is a prime."""
    message = refusal({"head_dim": head_dim}, group_size=3)
    assert f"head_dim {head_dim} (valid: " in message and f"{head_dim}, or -1 for all of it" in message


def test_per_head_presets_have_the_heads_of_the_model(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("".join(f"{i}: {{0: {{nbits_key: 8, nbits_value: 4}}}}\n" for i in range(3)))
    assert cache_format_of({**MODEL, "kv_heads": 1}, preset=str(path)).nominal_bits() == (8, 4)
    assert "head 1 of layer 0 is missing; the model has 8 KV heads, 0 to 7" in refusal(
        {"kv_heads": 8}, preset=str(path)
    )


@pytest.mark.parametrize("page_size, group", [(64, 48), (16, 32), (64, 128)])
@pytest.mark.parametrize("which", ("key", "value"))
def test_groups_that_do_not_divide_the_page(page_size, group, which):
    model = {"page_size": page_size, "head_dim": group * 2}
    message = refusal(model, group_size=group, **{f"axis_{which}": 1})
    assert message.startswith(f"--kvtuner-q-group-size is {group} with --kvtuner-axis-{which} 1")
    assert f"--page-size {page_size}" in message


@pytest.mark.parametrize("head_dim, bits, flag", [(17, 4, "nbits-key"), (18, 2, "nbits-key"), (13, 2, "nbits-key")])
def test_heads_that_leave_a_byte_unfilled(head_dim, bits, flag):
    message = refusal({"head_dim": head_dim}, nbits_key=bits, nbits_value=bits, group_size=-1)
    assert message.startswith(f"--kvtuner-{flag} is {bits}: the model's head_dim {head_dim}")
    message = refusal({"head_dim": head_dim}, nbits_key=8, nbits_value=bits, group_size=-1)
    assert message.startswith(f"--kvtuner-nbits-value is {bits}: ")


@pytest.mark.parametrize(
    "residual, page_size, length",
    [(0, 64, 64), (1, 64, 128), (63, 64, 128), (64, 64, 128), (65, 64, 192), (128, 64, 192), (128, 16, 144)],
)
def test_ring_length_is_window_and_page_in_whole_pages(residual, page_size, length):
    cache_format = cache_format_of({**MODEL, "page_size": page_size}, residual_length=residual)
    assert cache_format.ring_length == length
    # Tokens that may be asked for: the window, and what keeps its start from being the start of a page.
    assert cache_format.ring_length >= residual + page_size - 1 and cache_format.ring_length % page_size == 0


def test_stored_bits_of_the_default_format():
    assert cache_format_of().stored_bits() == (4.25, 4.25)
    assert cache_format_of(asym=True).stored_bits() == (4.5, 4.5)
    assert cache_format_of().nominal_bits() == (4, 4)


def test_digest_changes_with_every_setting(tmp_path):
    base = dict(nbits_key=4, nbits_value=4, asym=False, axis_key=0, axis_value=0, group_size=64, residual_length=128)
    formats = [cache_format_of(**base)]
    for field, value in [
        ("nbits_key", 8),
        ("nbits_value", 8),
        ("asym", True),
        ("axis_key", 1),
        ("axis_value", 1),
        ("group_size", 32),
        ("residual_length", 129),
        ("sink_length", 1),
        ("hadamard_key", True),
        ("preset", write_preset(tmp_path, (4, 4), (4, 2), (4, 4))),
    ]:
        formats.append(cache_format_of(**{**base, field: value}))
    for field, value in [("num_layers", 4), ("head_dim", 64), ("page_size", 128)]:
        formats.append(cache_format_of({**MODEL, field: value}, **base))
    assert len({cache_format.digest() for cache_format in formats}) == len(formats)
    assert cache_format_of(**base).digest() == formats[0].digest() == replace(formats[0]).digest()


def test_digest_is_that_of_the_resolved_format(tmp_path):
    """Flags that come to the same cache format agree: ranks compare what they store, not what was typed."""
    assert cache_format_of(group_size=-1).digest() == cache_format_of(group_size=128).digest()
    assert (
        cache_format_of(preset=write_preset(tmp_path, *[(4, 4)] * 3), nbits_key=2).digest()
        == cache_format_of().digest()
    )
