"""Start-up through upstream's own resolution: what the flags settle, and refusals that name the flag."""

import logging

import pytest

from harness.server_args import resolve, server_args, write_model
from sglang.srt.kvtuner.config import compatibility
from sglang.srt.kvtuner.config.flags import FLAG_OF_FIELD, KVTunerConfigError
from sglang.srt.server_args import prepare_server_args


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of 4 layers with head_dim 64."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def logging_as_before():
    """Upstream sets up the root logger when it parses a command line."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def refusal(model, **fields):
    with pytest.raises(KVTunerConfigError) as caught:
        resolve(model, **fields)
    return str(caught.value)


def test_defaults(model, caplog):
    args = server_args(model)
    with caplog.at_level(logging.INFO, logger="sglang.srt.arg_groups.kvtuner_hook"):
        args.resolve_once()
    settled = args.resolved_dict()
    assert settled["page_size"] == 64 and settled["attention_backend"] == "torch_native"
    # Said by us: what upstream itself would choose depends on the machine.
    assert dict(args._resolved_overrides)["handle_kvtuner"] == {"page_size": 64, "attention_backend": "torch_native"}
    assert args.page_size is None and args.attention_backend is None, "the input is left as it was given"
    assert "4 layers K4V4, symmetric, K per token g64, V per token g64, page 64, residual 128" in caplog.text


def test_the_device_is_checked(model, monkeypatch):
    monkeypatch.setattr(compatibility, "SUPPORTED_DEVICES", ("cuda",))
    assert refusal(model).startswith("--device is 'cpu'; ")


def test_without_the_switch_nothing_is_settled(model):
    settled = resolve(model, enable_kvtuner_quant=False)
    assert settled["page_size"] != 64
    assert resolve(model, enable_kvtuner_quant=False, page_size=16)["page_size"] == 16


@pytest.mark.parametrize("page_size", (8, 16, 32, 64, 128, 256))
def test_an_explicit_page_size_is_kept(model, page_size):
    assert resolve(model, page_size=page_size)["page_size"] == page_size


@pytest.mark.parametrize("page_size", (1, 2, 4, 48, 100, 0, -64))
def test_page_sizes_that_are_refused(model, page_size):
    message = refusal(model, page_size=page_size)
    assert message.startswith(f"--page-size is {page_size}; ") and "powers of two from 8 on" in message


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
