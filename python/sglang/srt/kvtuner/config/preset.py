"""Per-layer precision from KVTuner's YAML presets.

A preset maps every layer index to its bits::

    0: {nbits_key: 8, nbits_value: 4}
    1: {nbits_key: 4, nbits_value: 2, hadamard_key: true, sink_length: 4}

``hadamard_key`` and ``sink_length`` extend KVTuner's format: whether the layer's keys are rotated before they are
quantized, and how many first tokens it keeps in full precision, where the flags are not to decide. A layer may instead
map KV head indices to such entries (KVTuner's per-head form). The packed cache has one format per layer, so that form is
read where all heads of a layer agree and refused where they do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.kvtuner.format.quantizer import STORED_BITS

_KEYS = ("nbits_key", "nbits_value")
_ROTATION = "hadamard_key"
_SINKS = "sink_length"
_VALID = (*_KEYS, _ROTATION, _SINKS)  # in the order of LayerBits


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer's keys and values, whether keys are rotated, and first tokens kept in full precision."""

    key: int
    value: int
    hadamard_key: bool = False
    sink_length: int = 0

    def __str__(self) -> str:
        sinks = f" sinks {self.sink_length}" if self.sink_length else ""
        return f"K{self.key}V{self.value}{' rotated' if self.hadamard_key else ''}{sinks}"


class PresetError(KVTunerConfigError):
    """A preset that cannot be used; the message names the file and, where there is one, the line."""


def load_preset(path: str, *, hadamard_key: bool = False, sink_length: int = 0) -> tuple[LayerBits, ...]:
    """Read a preset; entry i is layer i. ``hadamard_key`` and ``sink_length`` hold for layers that do not say.

    Raises PresetError, naming file and line, for an unreadable file, malformed YAML, unknown or missing keys, bits
    other than 2, 4, 8, 16, a rotation other than true or false, a negative number of sinks, repeated or missing layers,
    and heads of a layer that disagree.
    """
    return _PresetReader(path, {_ROTATION: hadamard_key, _SINKS: sink_length}).read()


class _PresetReader:
    def __init__(self, path: str, defaults: dict[str, int]) -> None:
        self.path, self.defaults = path, defaults

    def read(self) -> tuple[LayerBits, ...]:
        try:
            with open(self.path, encoding="utf-8") as stream:
                root = yaml.compose(stream, Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise PresetError(f"--kvtuner-config {self.path}: cannot be read: {error}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or str(error)
            raise PresetError(self._where(mark) + f"not valid YAML: {problem}") from error
        if root is None:
            raise PresetError(f"--kvtuner-config {self.path}: the file is empty")
        layers = {}
        for index, node, key_node in self._integer_entries(root, "layer"):
            if index in layers:
                self._fail(key_node, f"layer {index} is given twice")
            layers[index] = self._layer(index, node)
        if not layers:
            self._fail(root, "the preset has no layers")
        missing = [index for index in range(len(layers)) if index not in layers]
        if missing:
            self._fail(root, f"layer {missing[0]} is missing; layers are numbered from 0 without gaps")
        return tuple(layers[i] for i in range(len(layers)))

    def _layer(self, index: int, node: yaml.Node) -> LayerBits:
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, f"layer {index} is not a mapping of {' and '.join(_KEYS)}")
        if any(self._is_integer(key) for key, _ in node.value):
            return self._per_head_layer(index, node)
        return self._bits(f"layer {index}", node)

    def _per_head_layer(self, index: int, node: yaml.MappingNode) -> LayerBits:
        heads = {}
        for head, bits_node, key_node in self._integer_entries(node, f"head of layer {index}"):
            if head in heads:
                self._fail(key_node, f"head {head} of layer {index} is given twice")
            heads[head] = self._bits(f"layer {index}, head {head}", bits_node)
            first = next(iter(heads.values()))
            if heads[head] != first:
                self._fail(
                    key_node,
                    f"heads of layer {index} differ: head {head} has {heads[head]}, others {first}; the packed cache has "
                    "one precision per layer",
                )
        return first

    def _bits(self, what: str, node: yaml.Node) -> LayerBits:
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, f"{what} is not a mapping of {' and '.join(_KEYS)}")
        found = {}
        for key_node, value_node in node.value:
            key = getattr(key_node, "value", None)
            if key not in _VALID:
                self._fail(key_node, f"{what} has the unknown key {key!r}; valid are {', '.join(_VALID)}")
            if key in found:
                self._fail(key_node, f"{what} gives {key} twice")
            found[key] = self._value(key, what, value_node)
        for key in _KEYS:
            if key not in found:
                self._fail(node, f"{what} has no {key}")
        return LayerBits(*({**self.defaults, **found}[key] for key in _VALID))

    def _value(self, key: str, what: str, node: yaml.Node) -> int:
        given = getattr(node, "value", None)
        if key == _ROTATION:
            valid = "true, false"
            if node.tag == "tag:yaml.org,2002:bool" and given.lower() in ("true", "false"):
                return given.lower() == "true"
        elif key == _SINKS:
            valid = "0 to a page"
            if self._is_integer(node) and int(given) >= 0:
                return int(given)
        else:
            valid = ", ".join(map(str, STORED_BITS))
            if self._is_integer(node) and int(given) in STORED_BITS:
                return int(given)
        self._fail(node, f"{key} of {what} is {given!r}; valid are {valid}")

    def _integer_entries(self, node: yaml.Node, what: str):
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, "a preset is a mapping from layer index to bits")
        for key_node, value_node in node.value:
            if not self._is_integer(key_node) or int(key_node.value) < 0:
                given = getattr(key_node, "value", None)
                self._fail(key_node, f"{given!r} is not the index of a {what}")
            yield int(key_node.value), value_node, key_node

    @staticmethod
    def _is_integer(node: yaml.Node) -> bool:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:int":
            return False
        return node.value.lstrip("-").isdigit()

    def _where(self, mark) -> str:
        line = "" if mark is None else f", line {mark.line + 1}"
        return f"--kvtuner-config {self.path}{line}: "

    def _fail(self, node: yaml.Node, problem: str):
        raise PresetError(self._where(node.start_mark) + problem)
