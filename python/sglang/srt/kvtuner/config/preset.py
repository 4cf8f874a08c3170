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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import yaml

from sglang.srt.kvtuner.config.flags import FLAGS, Flag
from sglang.srt.kvtuner.config.preset_file import (
    PresetError,
    bool_of,
    compose,
    described,
    integer_of,
    read_text,
    where,
)

__all__ = ["LayerBits", "PresetError", "load_preset"]

_OPTIONS = {flag.attribute: flag for flag in FLAGS if flag.layered}
_BITS = ("nbits_key", "nbits_value")  # what a layer must say


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


def load_preset(
    path: str, *, hadamard_key: bool = False, sink_length: int = 0, kv_heads: int | None = None
) -> tuple[LayerBits, ...]:
    """Read a preset; entry i is layer i. ``hadamard_key`` and ``sink_length`` hold for layers that do not say.
    ``kv_heads`` are the model's, over all ranks; None where they are not known.

    Raises PresetError, naming file and line, for an unreadable file, malformed YAML, unknown or missing keys, bits
    other than 2, 4, 8, 16, a rotation other than true or false, a negative number of sinks, repeated or missing layers,
    heads that the model does not have, missing heads, and heads of a layer that disagree.
    """
    return _PresetReader(path, hadamard_key, sink_length, kv_heads).read()


class _PresetReader:
    def __init__(self, path: str, hadamard_key: bool, sink_length: int, kv_heads: int | None) -> None:
        self.path, self.kv_heads = path, kv_heads
        self.defaults: dict[str, int] = {"hadamard_key": hadamard_key, "sink_length": sink_length}

    def read(self) -> tuple[LayerBits, ...]:
        root = compose(self.path, read_text(self.path))
        if root is None:
            raise PresetError(f"{where(self.path)}the file is empty")
        layers: dict[int, LayerBits] = {}
        for index, node, key_node in self._integer_entries(root, "layer"):
            if index in layers:
                self._fail(key_node, f"layer {index} is given twice")
            layers[index] = self._layer(index, node)
        if not layers:
            self._fail(root, "the preset has no layers")
        missing = _first_missing(layers, len(layers))
        if missing is not None:
            self._fail(root, f"layer {missing} is missing; layers are numbered from 0 without gaps")
        return tuple(layers[i] for i in range(len(layers)))

    def _layer(self, index: int, node: yaml.Node) -> LayerBits:
        if isinstance(node, yaml.MappingNode) and any(integer_of(key) is not None for key, _ in node.value):
            return self._per_head_layer(index, node)
        return self._bits(f"layer {index}", node)

    def _per_head_layer(self, index: int, node: yaml.MappingNode) -> LayerBits:
        heads: dict[int, LayerBits] = {}
        for head, bits_node, key_node in self._integer_entries(node, f"head of layer {index}"):
            if head in heads:
                self._fail(key_node, f"head {head} of layer {index} is given twice")
            if self.kv_heads is not None and head >= self.kv_heads:
                self._fail(key_node, f"head {head} of layer {index} does not exist; the model has {self._have_heads()}")
            heads[head] = self._bits(f"layer {index}, head {head}", bits_node)
            first = next(iter(heads.values()))
            if heads[head] != first:
                self._fail(
                    key_node,
                    f"heads of layer {index} differ: head {head} has {heads[head]}, others {first}; the packed cache has "
                    "one precision per layer",
                )
        missing = _first_missing(heads, len(heads) if self.kv_heads is None else self.kv_heads)
        if missing is not None:
            has = (
                "heads are numbered from 0 without gaps"
                if self.kv_heads is None
                else f"the model has {self._have_heads()}"
            )
            self._fail(node, f"head {missing} of layer {index} is missing; {has}")
        return first

    def _have_heads(self) -> str:
        return "1 KV head, 0" if self.kv_heads == 1 else f"{self.kv_heads} KV heads, 0 to {(self.kv_heads or 0) - 1}"

    def _bits(self, what: str, node: yaml.Node) -> LayerBits:
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, f"{what} is not a mapping of {' and '.join(_BITS)}")
        found: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key not in _OPTIONS:
                self._fail(
                    key_node, f"{what} has the unknown key {described(key_node)}; valid are {', '.join(_OPTIONS)}"
                )
            if key in found:
                self._fail(key_node, f"{what} gives {key} twice")
            found[key] = self._value(_OPTIONS[key], what, value_node)
        for key in _BITS:
            if key not in found:
                self._fail(node, f"{what} has no {key}")
        options = {**self.defaults, **found}
        return LayerBits(
            options["nbits_key"], options["nbits_value"], bool(options["hadamard_key"]), options["sink_length"]
        )

    def _value(self, flag: Flag, what: str, node: yaml.Node) -> int:
        value = bool_of(node) if flag.type is bool else integer_of(node)
        if value is None or not flag.accepts(value):
            self._fail(node, f"{flag.attribute} of {what} is {described(node)}; valid are {flag.valid}")
        return value

    def _integer_entries(self, node: yaml.Node, what: str) -> Iterator[tuple[int, yaml.Node, yaml.Node]]:
        """Pairs of a mapping with integers from 0 on as keys: the integer, its value's node, and its own."""
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, "a preset is a mapping from layer index to bits")
        for key_node, value_node in node.value:
            index = integer_of(key_node)
            if index is None or index < 0:
                self._fail(key_node, f"{described(key_node)} is not the index of a {what}")
            yield index, value_node, key_node

    def _fail(self, node: yaml.Node, problem: str) -> NoReturn:
        raise PresetError(where(self.path, node.start_mark) + problem)


def _first_missing(found: dict[int, LayerBits], count: int) -> int | None:
    return next((index for index in range(count) if index not in found), None)
