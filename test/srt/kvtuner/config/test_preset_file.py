"""Files that are no preset, and YAML made to keep its reader busy: each ends at once, with a short message."""

import os
import socket
import threading

import pytest

from sglang.srt.kvtuner.config.preset import LayerBits, PresetError, load_preset
from sglang.srt.kvtuner.config.preset_header import read_header

GOOD = "{nbits_key: 8, nbits_value: 4}"


def within(seconds, call):
    """What ``call()`` returns or raises; a failure where it takes longer."""
    outcome = []

    def run():
        try:
            outcome.append(("returned", call()))
        except BaseException as error:
            outcome.append(("raised", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"no answer within {seconds} s"
    kind, what = outcome[0]
    if kind == "raised":
        raise what
    return what


def refusal(path, read=load_preset):
    with pytest.raises(PresetError) as caught:
        within(60, lambda: read(str(path)))
    message = str(caught.value)
    assert message.startswith("--kvtuner-config ") and "\n" not in message
    assert len(message) < len(str(path)) + 400, "a message is read by people"
    return message


@pytest.fixture
def preset(tmp_path):
    def write(text):
        path = tmp_path / "preset.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("read", (load_preset, read_header))
def test_a_named_pipe_without_a_writer(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe", read).endswith("cannot be read: it is a pipe; a regular file is needed")


def test_what_is_no_regular_file(tmp_path):
    assert "it is a directory" in refusal(tmp_path)
    for device in ("/dev/zero", "/dev/null"):
        assert "it is a device" in refusal(device)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "cannot be read" in refusal(tmp_path / "socket")


def test_a_file_of_more_than_a_megabyte(tmp_path):
    path = tmp_path / "large.yaml"
    path.touch()
    os.truncate(path, 1 << 40)
    assert refusal(path).endswith("cannot be read: it has more than 1000000 bytes")


@pytest.mark.parametrize("path", ("pre\0set.yaml", "pre\nset.yaml", "\ud800"))
def test_paths_that_no_file_has(path):
    assert "cannot be read: " in refusal(path)


def test_an_alias_bomb(preset):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "aliases" in refusal(preset("\n".join(rows)))
    # The value that a message is about is one.
    assert "aliases" in refusal(preset("\n".join([*rows[:8], "0: {nbits_key: *a7, nbits_value: 4}"])))


def test_a_value_that_refers_to_a_list_is_not_spelled_out(preset):
    path = preset(f"x: &x [{', '.join('y' * 9 for _ in range(1000))}]\n")
    assert refusal(path).endswith("line 1: x is not the index of a layer")
    path = preset(f"0: {{nbits_key: [{', '.join('y' * 9 for _ in range(1000))}], nbits_value: 4}}\n")
    assert refusal(path).endswith("nbits_key of layer 0 is a list; valid are 2, 4, 8, 16")


def test_an_alias_of_what_it_stands_in(preset):
    assert "aliases" in refusal(preset("0: &layer {nbits_key: *layer, nbits_value: 4}\n"))


def test_aliases_of_heads_are_counted_as_heads(preset):
    heads = ", ".join(f"{i}: {GOOD}" for i in range(5000))
    assert "aliases" in refusal(preset(f"0: &heads {{{heads}}}\n" + "".join(f"{i}: *heads\n" for i in range(1, 5000))))
    assert load_preset(str(preset("0: &heads {0: " + GOOD + "}\n1: *heads\n"))) == (LayerBits(8, 4),) * 2


@pytest.mark.parametrize("layer", (GOOD, "*layer"))
def test_a_preset_of_100000_layers(preset, layer):
    rest = "".join(f"{i}: {layer}\n" for i in range(1, 100_000))
    assert "more than 100000" in refusal(preset(f"0: &layer {GOOD}\n{rest}"))


@pytest.mark.parametrize("text", ("[" * 100_000, "{a: " * 100_000, "0: " + "[" * 400 + "]" * 400, "- " * 50_000 + "x"))
def test_deep_nesting(preset, text):
    message = refusal(preset(text))
    assert "nested more than 8 levels deep" in message and ", line 1: " in message


def test_large_presets_are_read(preset):
    text = "".join(f"{i}:\n" + "".join(f"  {head}: {GOOD}\n" for head in range(32)) for i in range(100))
    assert within(60, lambda: load_preset(str(preset(text)), kv_heads=32)) == (LayerBits(8, 4),) * 100


@pytest.mark.parametrize(
    "number", ("9" * 5000, "!!int ²", "!!int ٣", "!!int --4", "010", "1_0", "+4", "!!int ''", "0b100", "4:20")
)
def test_integers_that_are_not_plain_digits(preset, number):
    assert "is not the index of a layer" in refusal(preset(f"? {number}\n: {GOOD}\n"))
    assert "nbits_key of layer 0 is " in refusal(preset(f"0: {{nbits_key: {number}, nbits_value: 4}}\n"))
    assert "sink_length of layer 0 is " in refusal(preset(f"0: {{{GOOD[1:-1]}, sink_length: {number}}}\n"))


def test_tags_construct_nothing(preset):
    assert "nbits_key of layer 0 is " in refusal(
        preset("0: {nbits_key: !!python/object/apply:os.abort [], nbits_value: 4}\n")
    )


def test_long_values_and_anchors_are_clipped(preset):
    assert "x" * 60 in refusal(preset(f"? {'x' * 100_000}\n: {GOOD}\n"))
    assert "not valid YAML" in refusal(preset(f"0: *{'x' * 100_000}\n"))
