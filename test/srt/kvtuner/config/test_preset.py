"""Per-layer presets: what is read, and the file and line that a refusal names."""

import os
from fractions import Fraction

import pytest
import yaml

from sglang.srt.kvtuner.config.preset import LayerBits, PresetError, load_preset


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "preset.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def problem(path, line=None):
    """The message of the refusal, without the file and line that it must begin with."""
    with pytest.raises(PresetError) as caught:
        load_preset(path)
    message, start = str(caught.value), f"--kvtuner-config {path}" + (f", line {line}: " if line else ": ")
    assert message.startswith(start), message
    return message.removeprefix(start)


GOOD = "{nbits_key: 8, nbits_value: 4}"


def test_layers_come_in_the_order_of_their_indices(write):
    text = "1: {nbits_key: 4, nbits_value: 2}\n0:\n  nbits_value: 4\n  nbits_key: 8\n"
    assert load_preset(write(text)) == (LayerBits(8, 4), LayerBits(4, 2))


def test_halves_of_a_layer_that_are_left_alone(write):
    text = "0: {nbits_key: 16, nbits_value: 4}\n1: {nbits_key: 2, nbits_value: 16}\n"
    assert load_preset(write(text)) == (LayerBits(16, 4), LayerBits(2, 16))


def test_layers_may_say_whether_keys_are_rotated(write):
    text = f"0: {GOOD}\n1: {{{GOOD[1:-1]}, hadamard_key: true}}\n2:\n  0: {{{GOOD[1:-1]}, hadamard_key: False}}\n"
    path = write(text)
    assert [layer.hadamard_key for layer in load_preset(path)] == [False, True, False]
    assert [layer.hadamard_key for layer in load_preset(path, hadamard_key=True)] == [True, True, False]


def test_layers_may_say_how_many_sinks_they_keep(write):
    path = write(f"0: {GOOD}\n1: {{{GOOD[1:-1]}, sink_length: 4}}\n2: {{{GOOD[1:-1]}, sink_length: 0}}\n")
    assert [layer.sink_length for layer in load_preset(path)] == [0, 4, 0]
    assert [layer.sink_length for layer in load_preset(path, sink_length=8)] == [8, 4, 0]


def test_json_comments_quotes_and_anchors(write):
    text = '# made by hand\n{0: &first {"nbits_key": 8, "nbits_value": 4},\n 1: *first}\n'
    assert load_preset(write(text)) == (LayerBits(8, 4),) * 2


def test_heads_that_agree(write):
    text = f"0:\n  0: {GOOD}\n  1: {GOOD}\n1: {{nbits_key: 2, nbits_value: 2}}\n"
    assert load_preset(write(text)) == (LayerBits(8, 4), LayerBits(2, 2))


@pytest.mark.parametrize(
    "text, line, message",
    [
        # Not YAML.
        (f"0: {GOOD}\n1: {{nbits_key: 8, nbits_value\n", 3, "not valid YAML: "),
        (f"0: {GOOD}\n\t1: {GOOD}\n", 2, "not valid YAML: found character '\\t'"),
        ("0: *nowhere\n", 1, "not valid YAML: found undefined alias"),
        (f"0: {GOOD}\n---\n1: {GOOD}\n", 2, "not valid YAML: but found another document"),
        # Not a preset.
        (f"- {GOOD}\n- {GOOD}\n", 1, "a preset is a mapping from layer index to bits"),
        ("8\n", 1, "a preset is a mapping"),
        ("{}\n", 1, "the preset has no layers"),
        # Layers.
        (f"0: {GOOD}\nfirst: {GOOD}\n", 2, "first is not the index of a layer"),
        (f"0: {GOOD}\n1.0: {GOOD}\n", 2, "1.0 is not the index of a layer"),
        (f"0: {GOOD}\n-1: {GOOD}\n", 2, "-1 is not the index of a layer"),
        (
            f"0: {GOOD}\n'1': {GOOD}\n",
            2,
            "the string '1' (numbers, true and false take no quotes) is not the index of a layer",
        ),
        (f"0: {GOOD}\ntrue: {GOOD}\n", 2, "true is not the index of a layer"),
        (f"0: {GOOD}\n0x1: {GOOD}\n", 2, "0x1 is not the index of a layer"),
        (f"0: {GOOD}\n<<: {{1: {GOOD}}}\n", 2, "<< is not the index of a layer"),
        (f"0: {GOOD}\n? [1]\n: {GOOD}\n", 2, "is not the index of a layer"),
        (f"0: {GOOD}\n1: {GOOD}\n0: {GOOD}\n", 3, "layer 0 is given twice"),
        (f"1: {GOOD}\n2: {GOOD}\n", 1, "layer 0 is missing"),
        (f"# layers\n0: {GOOD}\n2: {GOOD}\n", 2, "layer 1 is missing"),
        (f"0: {GOOD}\n100000000: {GOOD}\n", 1, "layer 1 is missing"),
        (f"0: {GOOD}\n1000000000000: {GOOD}\n", 2, "1000000000000 is not the index of a layer"),
        # Bits of a layer.
        (f"0: {GOOD}\n1: [8, 4]\n", 2, "layer 1 is not a mapping of nbits_key and nbits_value"),
        (f"0: {GOOD}\n1: 8\n", 2, "layer 1 is not a mapping"),
        (f"0: {GOOD}\n1:\n", 2, "layer 1 is not a mapping"),
        ("0: {nbits_key: 8}\n", 1, "layer 0 has no nbits_value"),
        ("0: {nbits_value: 8}\n", 1, "layer 0 has no nbits_key"),
        ("0: {}\n", 1, "layer 0 has no nbits_key"),
        ("0:\n  nbits_key: 8\n  nbits_valeu: 4\n", 3, "layer 0 has the unknown key nbits_valeu; valid are nbits_key"),
        ("0:\n  nbits_key: 8\n  nbits_value: 4\n  group_size: 64\n", 4, "layer 0 has the unknown key group_size"),
        (f"0: &base {GOOD}\n1:\n  <<: *base\n  nbits_key: 2\n", 3, "layer 1 has the unknown key <<"),
        ("0:\n  nbits_key: 8\n  nbits_key: 4\n  nbits_value: 4\n", 3, "layer 0 gives nbits_key twice"),
        ("0:\n  nbits_key: 3\n  nbits_value: 4\n", 2, "nbits_key of layer 0 is 3; valid are 2, 4, 8, 16"),
        ("0:\n  nbits_key: 8\n  nbits_value: 32\n", 3, "nbits_value of layer 0 is 32;"),
        ("0: {nbits_key: -4, nbits_value: 4}\n", 1, "nbits_key of layer 0 is -4;"),
        ("0: {nbits_key: 4.0, nbits_value: 4}\n", 1, "nbits_key of layer 0 is 4.0;"),
        (
            "0: {nbits_key: '4', nbits_value: 4}\n",
            1,
            "nbits_key of layer 0 is the string '4' (numbers, true and false take no quotes); valid are 2, 4, 8, 16",
        ),
        ("0: {nbits_key: true, nbits_value: 4}\n", 1, "nbits_key of layer 0 is true;"),
        ("0: {nbits_key: , nbits_value: 4}\n", 1, "nbits_key of layer 0 is empty;"),
        ("0: {nbits_key: [4], nbits_value: 4}\n", 1, "nbits_key of layer 0 is a list;"),
        # Rotation.
        (
            f"0: {GOOD}\n1: {{{GOOD[1:-1]},\n  hadamard_key: 1}}\n",
            3,
            "hadamard_key of layer 1 is 1; valid are true, false",
        ),
        (f"0: {{{GOOD[1:-1]}, hadamard_key: yes}}\n", 1, "hadamard_key of layer 0 is yes;"),
        (f"0: {{{GOOD[1:-1]}, hadamard_key: 'true'}}\n", 1, "hadamard_key of layer 0 is the string 'true' ("),
        (f"0: {{{GOOD[1:-1]}, hadamard_key: [true]}}\n", 1, "hadamard_key of layer 0 is a list;"),
        (f"0:\n  0: {GOOD}\n  1: {{{GOOD[1:-1]}, hadamard_key: true}}\n", 3, "head 1 has K8V4 rotated, others K8V4;"),
        # Sinks.
        (
            f"0: {{{GOOD[1:-1]},\n  sink_length: -1}}\n",
            2,
            "sink_length of layer 0 is -1; valid are integers from 0 to a page",
        ),
        (f"0: {{{GOOD[1:-1]}, sink_length: 1.5}}\n", 1, "sink_length of layer 0 is 1.5;"),
        (f"0: {{{GOOD[1:-1]}, sink_length: [4]}}\n", 1, "sink_length of layer 0 is a list;"),
        (f"0:\n  0: {GOOD}\n  1: {{{GOOD[1:-1]}, sink_length: 4}}\n", 3, "head 1 has K8V4 sinks 4, others K8V4;"),
        # Heads.
        (f"0:\n  0: {GOOD}\n  1: {{nbits_key: 4, nbits_value: 4}}\n", 3, "heads of layer 0 differ: head 1 has K4V4"),
        (f"0:\n  0: {GOOD}\n  0: {GOOD}\n", 3, "head 0 of layer 0 is given twice"),
        (f"0:\n  0: {GOOD}\n  nbits_key: 8\n", 3, "nbits_key is not the index of a head of layer 0"),
        ("0:\n  0: {nbits_key: 8}\n", 2, "layer 0, head 0 has no nbits_value"),
        ("0:\n  0: {nbits_key: 8, nbits_value: 5}\n", 2, "nbits_value of layer 0, head 0 is 5;"),
        (f"0:\n  0: {GOOD}\n  1: 4\n", 3, "layer 0, head 1 is not a mapping"),
    ],
)
def test_presets_that_cannot_be_used(write, text, line, message):
    assert message in problem(write(text), line)


@pytest.mark.parametrize(
    "layer, line, message",
    [
        (
            f"\n  0: {GOOD}\n  1: {GOOD}\n  2: {GOOD}\n",
            4,
            "head 2 of layer 0 does not exist; the model has 2 KV heads, 0 to 1",
        ),
        (f"\n  0: {GOOD}\n  7: {GOOD}\n", 3, "head 7 of layer 0 does not exist"),
        (f"\n  0: {GOOD}\n", 2, "head 1 of layer 0 is missing; the model has 2 KV heads, 0 to 1"),
        (f"\n  1: {GOOD}\n", 2, "head 0 of layer 0 is missing"),
    ],
)
def test_heads_that_the_model_does_not_have(write, layer, line, message):
    with pytest.raises(PresetError, match=f", line {line}: {message}"):
        load_preset(write(f"0:{layer}"), kv_heads=2)


def test_heads_of_the_model(write):
    path = write(f"0:\n  1: {GOOD}\n  0: {GOOD}\n1: {GOOD}\n")
    assert load_preset(path, kv_heads=2) == (LayerBits(8, 4),) * 2
    with pytest.raises(PresetError, match="the model has 1 KV head, 0"):
        load_preset(path, kv_heads=1)
    assert (
        problem(write(f"0:\n  1: {GOOD}\n"), 2)
        == "head 0 of layer 0 is missing; heads are numbered from 0 without gaps"
    )


@pytest.mark.parametrize("text", ("", "\n\n", "# nothing but a comment\n"))
def test_empty_file(write, text):
    assert problem(write(text)) == "the file is empty"


def test_missing_file(tmp_path):
    assert problem(str(tmp_path / "none.yaml")).startswith("cannot be read: ")


def test_directory(tmp_path):
    assert problem(str(tmp_path)).startswith("cannot be read: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(write):
    path = write(f"0: {GOOD}\n")
    os.chmod(path, 0)
    assert problem(path).startswith("cannot be read: ")


def test_file_that_is_not_utf8(write):
    assert problem(write(b"0: {nbits_key: 8, nbits_value: 4} # \xff\xfe\n")).startswith("cannot be read: ")


def test_control_characters(write):
    assert problem(write("0: {nbits_key: 8, nbits_value: 4}\n\x00\n")).startswith("not valid YAML: ")


def independent_bits(path):
    """(K, V) of each layer, read with the YAML library alone."""
    layers = yaml.safe_load(path.read_text())
    pairs = []
    for index in range(len(layers)):
        heads = [layers[index]] if "nbits_key" in layers[index] else list(layers[index].values())
        assert all(head == heads[0] for head in heads)
        pairs.append((heads[0]["nbits_key"], heads[0]["nbits_value"]))
    return pairs


def test_presets_of_the_paper(shared_data):
    """KVTuner's published presets, per layer and per head, load with the average bits that they have."""
    paths = sorted(shared_data("kvtuner-presets").glob("*.yaml"))
    assert len(paths) == 34
    for path in paths:
        expected = independent_bits(path)
        bits = load_preset(str(path))
        assert [(layer.key, layer.value) for layer in bits] == expected, path.name
        averages = [Fraction(sum(column), len(bits)) for column in zip(*((layer.key, layer.value) for layer in bits))]
        assert averages == [Fraction(sum(column), len(expected)) for column in zip(*expected)], path.name
        assert all(2 <= average <= 8 for average in averages)
