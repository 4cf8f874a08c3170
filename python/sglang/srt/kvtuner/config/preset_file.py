"""Reading a preset's file: its text and its YAML nodes, both within bounds that hold for any file."""

from __future__ import annotations

import os
import re
import stat

import yaml

from sglang.srt.kvtuner.config.flags import KVTunerConfigError, shown

LARGEST_FILE = 1_000_000
# A preset of 128 layers with 96 heads each has 75,000 nodes; they are read in about two seconds.
MOST_NODES = 100_000
# Layers, heads, options: deeper nodes are mistakes, and their own messages come before this bound.
MOST_LEVELS = 8

_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"))
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,8})")


class PresetError(KVTunerConfigError):
    """A preset that cannot be used; the message names the file and, where there is one, the line."""


def where(path: str, mark: yaml.Mark | None = None) -> str:
    """The start of a message: the flag, the file and the line."""
    line = "" if mark is None else f", line {mark.line + 1}"
    return f"--kvtuner-config {path if path.isprintable() else shown(path)}{line}: "


def read_text(path: str) -> str:
    """The text of a regular UTF-8 file of at most LARGEST_FILE bytes. Waits for nothing: a named pipe is no file.

    Raises PresetError.
    """
    try:
        # A pipe without a writer would block; what the descriptor is cannot change after it is open.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
                raise PresetError(f"{where(path)}cannot be read: it is {kind}; a regular file is needed")
            with open(descriptor, "rb", closefd=False) as stream:
                content = stream.read(LARGEST_FILE + 1)
        finally:
            os.close(descriptor)
        text = content.decode("utf-8")
    except PresetError:
        raise
    except (OSError, ValueError) as error:  # a path with NUL is a ValueError
        raise PresetError(f"{where(path)}cannot be read: {error}") from error
    if len(content) > LARGEST_FILE:
        raise PresetError(f"{where(path)}cannot be read: it has more than {LARGEST_FILE} bytes")
    return text


def compose(path: str, text: str) -> yaml.Node | None:
    """The root node of a YAML document, None for one without nodes.

    Raises PresetError for malformed YAML, too deep nesting and too many nodes, aliases' included.
    """
    loader = _BoundedLoader(path, text)
    try:
        return loader.get_single_node()
    except yaml.YAMLError as error:
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise PresetError(
            f"{where(path, getattr(error, 'problem_mark', None))}not valid YAML: {problem[:200]}"
        ) from error
    finally:
        loader.dispose()


def integer_of(node: yaml.Node) -> int | None:
    """The value of an integer in plain decimal digits; None for other nodes."""
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and _INTEGER.fullmatch(node.value):
        return int(node.value)
    return None


def bool_of(node: yaml.Node) -> bool | None:
    """The value of true or false; None for other nodes, and for YAML's yes, no, on and off."""
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:bool":
        return {"true": True, "false": False}.get(node.value.lower())
    return None


def described(node: yaml.Node) -> str:
    """What a node says, for messages: short whatever it holds or refers to."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if node.style:
        return f"the string {shown(node.value, 60)} (numbers, true and false take no quotes)"
    return node.value[:60] or "empty"


class _BoundedLoader(yaml.SafeLoader):
    """Composes nodes and constructs nothing; every alias counts as the nodes that it stands for."""

    def __init__(self, path: str, text: str) -> None:
        self._path, self._levels, self._nodes = path, 0, 0
        self._sizes: dict[int, int] = {}
        try:
            super().__init__(text)
        except yaml.YAMLError as error:  # characters that YAML does not have
            raise PresetError(f"{where(path)}not valid YAML: {' '.join(str(error).split())}") from error

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        mark = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        before = self._nodes
        self._levels += 1
        if self._levels > MOST_LEVELS:
            raise PresetError(f"{where(self._path, mark)}nested more than {MOST_LEVELS} levels deep")
        node = super().compose_node(parent, index)
        self._levels -= 1
        # A node that is not complete has no size yet: the alias stands in what it refers to.
        self._nodes += self._sizes.get(id(node), MOST_NODES) if alias else 1
        self._sizes.setdefault(id(node), self._nodes - before)
        if self._nodes > MOST_NODES:
            raise PresetError(f"{where(self._path, mark)}more than {MOST_NODES} values, those of aliases included")
        return node
