"""Start-up through upstream's own resolution: what the flags settle, and refusals that name the flag."""

import logging

import pytest

from harness.server_args import refusal, resolve, server_args
from sglang.srt.kvtuner.config import compatibility
from sglang.srt.kvtuner.config.flags import FLAG_OF_FIELD, KVTunerConfigError
from sglang.srt.server_args import prepare_server_args


def test_defaults(model, caplog):
    args = server_args(model)
    with caplog.at_level(logging.INFO, logger="sglang.srt.arg_groups.kvtuner_hook"):
        args.resolve_once()
    settled = args.resolved_dict()
    assert settled["page_size"] == 64 and settled["attention_backend"] == "kvtuner"
    # Said by us: what upstream itself would choose depends on the machine.
    assert dict(args._resolved_overrides)["handle_kvtuner"] == {"page_size": 64, "attention_backend": "kvtuner"}
    assert args.page_size is None and args.attention_backend is None, "the input is left as it was given"
    assert "4 layers K4V4, symmetric, K per token g64, V per token g64, page 64, residual 128" in caplog.text


@pytest.mark.parametrize("field", ("attention_backend", "prefill_attention_backend", "decode_attention_backend"))
def test_the_backend_by_its_name(model, field):
    flag = "--" + field.replace("_", "-")
    args = prepare_server_args(["--model-path", model, "--device", "cpu", "--enable-kvtuner-quant", flag, "kvtuner"])
    args.resolve_once()
    settled = args.resolved_dict()
    assert settled["attention_backend"] == "kvtuner" and settled[field] == "kvtuner"
    message = refusal(model, enable_kvtuner_quant=False, **{field: "kvtuner"})
    assert message.startswith(f"{flag} is 'kvtuner', ") and "add --enable-kvtuner-quant" in message


def test_another_backend_is_refused_with_the_valid_one(model):
    assert "use kvtuner, or drop" in refusal(model, attention_backend="triton")


def test_the_device_is_checked(model, monkeypatch):
    monkeypatch.setattr(compatibility, "SUPPORTED_DEVICES", ("cuda",))
    assert refusal(model).startswith("--device is 'cpu'; ")


def test_without_the_switch_nothing_is_settled(model):
    settled = resolve(model, enable_kvtuner_quant=False)
    assert settled["page_size"] != 64
    assert resolve(model, enable_kvtuner_quant=False, page_size=16)["page_size"] == 16


@pytest.mark.parametrize("page_size", (8, 16, 32, 64, 128, 256, 1024))
def test_an_explicit_page_size_is_kept(model, page_size):
    assert resolve(model, page_size=page_size)["page_size"] == page_size


@pytest.mark.parametrize("page_size", (1, 2, 4, 48, 100, 0, -64, 2048, 1 << 40, True, "64", 64.0))
def test_page_sizes_that_are_refused(model, page_size):
    message = refusal(model, page_size=page_size)
    assert message.startswith(f"--page-size is {page_size!r}; ") and "powers of two from 8 to 1024" in message


@pytest.mark.parametrize(
    "field, value",
    [
        ("kvtuner_nbits_key", 3),
        ("kvtuner_nbits_key", "4"),
        ("kvtuner_nbits_value", 32),
        ("kvtuner_nbits_value", None),
        ("kvtuner_axis_key", 2),
        ("kvtuner_axis_value", -1),
        ("kvtuner_asym", "yes"),
        ("kvtuner_asym", "true"),
        ("kvtuner_hadamard_key", 1),
        ("kvtuner_q_group_size", 0),
        ("kvtuner_q_group_size", -2),
        ("kvtuner_q_group_size", 48),
        ("kvtuner_q_group_size", 128),
        ("kvtuner_q_group_size", None),
        ("kvtuner_residual_length", -1),
        ("kvtuner_residual_length", 1.5),
        ("kvtuner_sink_length", -1),
        ("kvtuner_sink_length", 65),
        ("kvtuner_sink_length", None),
    ],
)
def test_values_that_cannot_work(model, field, value):
    """Also without a command line, whose parser would refuse some of them first."""
    assert refusal(model, **{field: value}).startswith(f"{FLAG_OF_FIELD[field]} is {value!r}")


@pytest.mark.parametrize("which", ("key", "value"))
def test_axis_1_with_a_group_that_the_page_does_not_hold(model, which):
    fields = {f"kvtuner_axis_{which}": 1}
    assert refusal(model, kvtuner_q_group_size=-1, **fields).startswith(
        f"--kvtuner-q-group-size is -1 with --kvtuner-axis-{which} 1"
    )
    message = refusal(model, kvtuner_q_group_size=64, page_size=32, **fields)
    assert message.startswith(f"--kvtuner-q-group-size is 64 with --kvtuner-axis-{which} 1")
    assert "--page-size 32" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"kvtuner_q_group_size": -1},
        {"kvtuner_q_group_size": 16, "kvtuner_axis_key": 1, "page_size": 16},
        {"kvtuner_nbits_key": 8, "kvtuner_nbits_value": 2, "kvtuner_asym": True, "kvtuner_axis_value": 1},
        {"kvtuner_nbits_key": 16, "kvtuner_nbits_value": 4},
        {"kvtuner_hadamard_key": True},
        {"kvtuner_sink_length": 64},
        {"kvtuner_residual_length": 0},
        {"kvtuner_residual_length": 1_000_000},
        {"tp_size": 2},
        {"enable_mixed_chunk": True},
        {"disable_radix_cache": True},
        {"chunked_prefill_size": 256},
        {"kv_cache_dtype": "auto"},
    ],
)
def test_settings_that_work(model, fields):
    settled = resolve(model, **fields)
    assert {name: settled[name] for name in fields} == fields


def test_presets(model, tmp_path):
    good, short, long, bad = (tmp_path / f"{name}.yaml" for name in ("good", "short", "long", "bad"))
    for path, layers in ((good, 4), (short, 3), (long, 5)):
        path.write_text("".join(f"{i}: {{nbits_key: 8, nbits_value: 4}}\n" for i in range(layers)))
    bad.write_text("0:\n  nbits_key: 8\n  nbits_valeu: 4\n")
    assert resolve(model, kvtuner_config=str(good))["kvtuner_config"] == str(good)
    for path, layers in ((short, 3), (long, 5)):
        expected = f"--kvtuner-config {path}: the preset has {layers} layers, the model has 4"
        assert refusal(model, kvtuner_config=str(path)) == expected
    assert refusal(model, kvtuner_config=str(bad)).startswith(f"--kvtuner-config {bad}, line 3: ")
    assert "cannot be read" in refusal(model, kvtuner_config=str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("value", ("false", "true", "", 1, 0, None))
def test_the_switch_takes_nothing_but_a_bool(model, value):
    assert refusal(model, enable_kvtuner_quant=value).startswith(f"--enable-kvtuner-quant is {value!r}")


def test_a_page_that_nobody_could_list_the_divisors_of(model):
    assert refusal(model, page_size=1 << 40, kvtuner_axis_key=1, kvtuner_q_group_size=3).startswith("--page-size is ")


@pytest.mark.parametrize("size, page_size", [(100, None), (64, 128), (1, None), (96, 64)])
def test_chunks_that_end_inside_a_page(model, size, page_size):
    message = refusal(model, chunked_prefill_size=size, page_size=page_size)
    assert message.startswith(f"--chunked-prefill-size is {size}; ")
    assert message.endswith(f"multiples of the page (--page-size {page_size or 64}), or -1 for no chunks")


@pytest.mark.parametrize("tokens", (-(10**9), -1, 0, 1, 64, 128, 255))
def test_pools_that_serve_nothing(model, tokens):
    message = refusal(model, max_total_tokens=tokens)
    assert message.startswith(f"--max-total-tokens is {tokens!r}; ")
    assert message.endswith("valid are 256 and above, 4 pages (--page-size 64)")
    assert resolve(model, max_total_tokens=256)["max_total_tokens"] == 256


def test_residual_windows_beyond_the_memory_of_the_machine(model):
    message = refusal(model, kvtuner_residual_length=2**31 - 1)
    assert message.startswith("--kvtuner-residual-length is 2147483647; the residual windows of 1 running requests")
    assert "the device has " in message
    assert "of 1000000 running requests" in refusal(model, max_running_requests=1_000_000)


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("SGLANG_KVTUNER_CPU_ISA", "neon", "SGLANG_KVTUNER_CPU_ISA is 'neon'; valid are avx512, avx2, plain"),
        (
            "SGLANG_KVTUNER_CPU_ISA",
            "avx512",
            "SGLANG_KVTUNER_CPU_ISA is 'avx512', but this machine's processor has no avx",
        ),
        ("SGLANG_KVTUNER_KERNELS", "fast", "SGLANG_KVTUNER_KERNELS is 'fast'; valid on cpu are auto, reference, cpu"),
        ("SGLANG_KVTUNER_KERNELS", "triton", "SGLANG_KVTUNER_KERNELS is 'triton' on a CPU, which is for tests"),
    ],
)
def test_kernels_that_the_environment_cannot_have(model, monkeypatch, tmp_path, variable, value, message):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu sse avx2 fma f16c\n")
    monkeypatch.setattr(compatibility, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv(variable, value)
    assert refusal(model).startswith(message)


@pytest.mark.parametrize("wanted", ("", "avx2", "plain", "avx512"))
def test_kernels_that_the_environment_can_have(model, monkeypatch, tmp_path, wanted):
    features = "" if wanted == "avx512" else "flags : avx2 fma f16c\n"  # a machine that does not say is asked later
    (tmp_path / "cpuinfo").write_text(features)
    monkeypatch.setattr(compatibility, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("SGLANG_KVTUNER_CPU_ISA", wanted)
    assert resolve(model)["page_size"] == 64


@pytest.mark.parametrize("tp_size", (1, 2))
def test_a_per_head_preset_lists_the_heads_of_the_model_and_not_of_a_rank(model, tmp_path, tp_size):
    path = tmp_path / "heads.yaml"

    def write(heads):
        bits = "".join(f"  {head}: {{nbits_key: 8, nbits_value: 4}}\n" for head in range(heads))
        path.write_text("".join(f"{layer}:\n{bits}" for layer in range(4)))

    write(2)
    assert resolve(model, kvtuner_config=str(path), tp_size=tp_size)["kvtuner_config"] == str(path)
    write(1)
    assert "head 1 of layer 0 is missing; the model has 2 KV heads" in refusal(
        model, kvtuner_config=str(path), tp_size=tp_size
    )
    write(3)
    assert "head 2 of layer 0 does not exist" in refusal(model, kvtuner_config=str(path), tp_size=tp_size)


def test_a_descriptor_is_no_preset(model):
    assert refusal(model, kvtuner_config=5).startswith("--kvtuner-config is 5; ")


def test_an_engine_gets_the_exception(model):
    import sglang

    with pytest.raises(KVTunerConfigError, match="--max-total-tokens is 64"):
        sglang.Engine(model_path=model, device="cpu", enable_kvtuner_quant=True, max_total_tokens=64)


@pytest.mark.parametrize(
    "field, value",
    [
        ("kvtuner_nbits_key", 8),
        ("kvtuner_nbits_value", 2),
        ("kvtuner_asym", True),
        ("kvtuner_axis_key", 1),
        ("kvtuner_axis_value", 1),
        ("kvtuner_q_group_size", 32),
        ("kvtuner_residual_length", 0),
        ("kvtuner_sink_length", 4),
        ("kvtuner_hadamard_key", True),
        ("kvtuner_config", "preset.yaml"),
    ],
)
def test_a_flag_without_the_switch_is_refused(model, field, value):
    message = refusal(model, enable_kvtuner_quant=False, **{field: value})
    assert message.startswith(f"{FLAG_OF_FIELD[field]} is {value!r} but --enable-kvtuner-quant is missing")


def test_a_flag_at_its_default_needs_no_switch(model):
    resolve(model, enable_kvtuner_quant=False, kvtuner_nbits_key=4, kvtuner_residual_length=128)


COMMANDS = [
    "--tp-size 2 --enable-kvtuner-quant --kvtuner-nbits-key 4 --kvtuner-nbits-value 4",
    "--tp-size 4 --nnodes 2 --node-rank 0 --dist-init-addr 10.60.252.76:29500 --enable-kvtuner-quant "
    "--kvtuner-nbits-key 4 --kvtuner-nbits-value 4",
    "--tp-size 4 --nnodes 2 --node-rank 1 --dist-init-addr 10.60.252.76:29500 --enable-kvtuner-quant "
    "--kvtuner-nbits-key 4 --kvtuner-nbits-value 4",
    "--enable-kvtuner-quant --kvtuner-asym true --kvtuner-axis-key 1 --kvtuner-axis-value 0 --kvtuner-q-group-size 64 "
    "--kvtuner-residual-length 128",
    "--enable-kvtuner-quant --kvtuner-asym --kvtuner-axis-key 0 --kvtuner-axis-value 1",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documentation(model, command):
    args = prepare_server_args(["--model-path", model, "--device", "cpu", "--skip-tokenizer-init", *command.split()])
    args.resolve_once()
    settled = args.resolved_dict()
    assert settled["enable_kvtuner_quant"] is True and settled["page_size"] == 64


def test_a_config_file(model, tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text(
        f"model-path: {model}\ndevice: cpu\nskip-tokenizer-init: true\nenable-kvtuner-quant: true\n"
        "kvtuner-asym: true\nkvtuner-q-group-size: 48\n"
    )
    args = prepare_server_args(["--config", str(path)])
    with pytest.raises(KVTunerConfigError, match="--kvtuner-q-group-size is 48"):
        args.resolve_once()
