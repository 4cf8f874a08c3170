"""The --kvtuner-* flags on the command line, in a --config file, and in the published configuration."""

import argparse
import logging

import pytest

from sglang.srt.kvtuner import hooks
from sglang.srt.kvtuner.config.flags import FLAG_OF_FIELD, KVTunerConfig, parse_bool
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs, prepare_server_args

DEFAULTS = {
    "enable_kvtuner_quant": False,
    "kvtuner_nbits_key": 4,
    "kvtuner_nbits_value": 4,
    "kvtuner_asym": False,
    "kvtuner_axis_key": 0,
    "kvtuner_axis_value": 0,
    "kvtuner_q_group_size": 64,
    "kvtuner_residual_length": 128,
    "kvtuner_sink_length": 0,
    "kvtuner_hadamard_key": False,
    "kvtuner_config": None,
}


@pytest.fixture(autouse=True)
def logging_as_before():
    """Upstream sets up the root logger when it parses."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def fields(argv):
    """What a command line comes to: the fields that differ from the defaults."""
    args = prepare_server_args(["--model-path", "model", *argv])
    return {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) != DEFAULTS[name]}


def test_defaults():
    args = prepare_server_args(["--model-path", "model"])
    assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS
    assert {name: getattr(ServerArgs(model_path="model"), name) for name in DEFAULTS} == DEFAULTS
    assert KVTunerConfig.from_args(args) == KVTunerConfig()


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--enable-kvtuner-quant", {"enable_kvtuner_quant": True}),
        ("--kvtuner-nbits-key 8 --kvtuner-nbits-value 2", {"kvtuner_nbits_key": 8, "kvtuner_nbits_value": 2}),
        ("--kvtuner-nbits-key 16 --kvtuner-nbits-value 16", {"kvtuner_nbits_key": 16, "kvtuner_nbits_value": 16}),
        ("--kvtuner-axis-key 1", {"kvtuner_axis_key": 1}),
        ("--kvtuner-axis-value=1", {"kvtuner_axis_value": 1}),
        ("--kvtuner-q-group-size 32", {"kvtuner_q_group_size": 32}),
        ("--kvtuner-q-group-size -1", {"kvtuner_q_group_size": -1}),
        ("--kvtuner-residual-length 0", {"kvtuner_residual_length": 0}),
        ("--kvtuner-sink-length 4", {"kvtuner_sink_length": 4}),
        ("--kvtuner-config preset.yaml", {"kvtuner_config": "preset.yaml"}),
        ("--kvtuner-asym", {"kvtuner_asym": True}),
        ("--kvtuner-asym true", {"kvtuner_asym": True}),
        ("--kvtuner-asym=True", {"kvtuner_asym": True}),
        ("--kvtuner-asym false", {}),
        ("--kvtuner-hadamard-key", {"kvtuner_hadamard_key": True}),
        ("--kvtuner-hadamard-key=true --kvtuner-axis-key 0", {"kvtuner_hadamard_key": True}),
        ("--kvtuner-hadamard-key false", {}),
        ("--kvtuner-asym --kvtuner-axis-key 1", {"kvtuner_asym": True, "kvtuner_axis_key": 1}),
        ("--kvtuner-asym true --kvtuner-asym false", {}),
    ],
)
def test_command_line(argv, expected):
    given = fields(argv.split())
    assert given == expected
    assert all(type(given[name]) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--kvtuner-nbits-key 3", "--kvtuner-nbits-key: invalid choice: 3 (choose from 2, 4, 8, 16)"),
        ("--kvtuner-nbits-value 32", "--kvtuner-nbits-value: invalid choice: 32"),
        ("--kvtuner-axis-key 2", "--kvtuner-axis-key: invalid choice: 2 (choose from 0, 1)"),
        ("--kvtuner-axis-value -1", "--kvtuner-axis-value: invalid choice: -1"),
        ("--kvtuner-asym yes", "--kvtuner-asym: 'yes' is neither true nor false"),
        ("--kvtuner-asym 1", "--kvtuner-asym: '1' is neither true nor false"),
        ("--kvtuner-q-group-size half", "--kvtuner-q-group-size: invalid int value: 'half'"),
        ("--kvtuner-residual-length 1.5", "--kvtuner-residual-length: invalid int value: '1.5'"),
        ("--kvtuner-nbits 4", "--kvtuner-nbits could match --kvtuner-nbits-key, --kvtuner-nbits-value"),
    ],
)
def test_command_lines_that_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        fields(argv.split())
    # Newer versions of Python quote choices and leave out the word before an ambiguous option.
    assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("kvtuner-asym: true\n", {"kvtuner_asym": True}),
        ("kvtuner-asym: false\n", {}),
        ("kvtuner-hadamard-key: true\n", {"kvtuner_hadamard_key": True}),
        ("kvtuner_asym: true\n", None),  # upstream passes the key on as it is, and the flag has dashes
        ("enable-kvtuner-quant: true\nkvtuner-nbits-key: 8\n", {"enable_kvtuner_quant": True, "kvtuner_nbits_key": 8}),
        ("enable-kvtuner-quant: false\n", {}),
        (
            "kvtuner-q-group-size: -1\nkvtuner-residual-length: 0\n",
            {"kvtuner_q_group_size": -1, "kvtuner_residual_length": 0},
        ),
        ("kvtuner-config: /presets/a.yaml\n", {"kvtuner_config": "/presets/a.yaml"}),
        ("kvtuner-nbits-value: 3\n", None),
    ],
)
def test_config_file(tmp_path, text, expected):
    path = tmp_path / "server.yaml"
    path.write_text(text)
    if expected is None:
        with pytest.raises(SystemExit):
            fields(["--config", str(path)])
    else:
        assert fields(["--config", str(path)]) == expected


def test_the_command_line_wins_over_the_config_file(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("kvtuner-asym: true\nkvtuner-nbits-key: 2\n")
    given = fields(["--config", str(path), "--kvtuner-asym", "false", "--kvtuner-nbits-key", "8"])
    assert given == {"kvtuner_nbits_key": 8}


def test_every_flag_has_a_help_text():
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    actions = {action.dest: action for action in parser._actions}
    for name in DEFAULTS:
        assert actions[name].help
        assert actions[name].option_strings == [FLAG_OF_FIELD.get(name, "--enable-kvtuner-quant")]
    assert "--kvtuner-asym [true|false]" in parser.format_help()


@pytest.mark.parametrize(
    "text, expected", [("true", True), ("False", False), (" TRUE ", True), (False, False), (True, True)]
)
def test_parse_bool(text, expected):
    assert parse_bool(text) is expected


@pytest.mark.parametrize("text", ("", "1", "0", "yes", "no", "t", None))
def test_parse_bool_refuses_other_words(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither true nor false"):
        parse_bool(text)


def test_the_published_configuration_has_the_flags():
    given = {**DEFAULTS, "enable_kvtuner_quant": True, "kvtuner_nbits_key": 2, "kvtuner_asym": True}
    with get_context().override_server_args(**given):
        bag = get_context().config_bag("kvtuner")
        assert {name: getattr(bag, name) for name in DEFAULTS} == given
        assert KVTunerConfig.from_args(bag) == KVTunerConfig(nbits_key=2, asym=True)


def test_the_switch_follows_the_published_configuration():
    assert hooks.enabled() is False, "nothing is published"
    with get_context().override_server_args():
        assert hooks.enabled() is False
    with get_context().override_server_args(enable_kvtuner_quant=True):
        assert hooks.enabled() is True
    assert hooks.enabled() is False
