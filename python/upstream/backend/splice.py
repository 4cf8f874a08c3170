"""Putting edits into the bytes of one upstream file, and proving that nothing else changed."""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
import warnings
from dataclasses import dataclass

from .edits import Edit
from .errors import ForkError
from .syntax import Anchor, canonical, find_scopes, fingerprint, statements

NOTICE = b"# Changed by the SGLang-KVTuner project: what follows a 'kvtuner edit' comment was added."
MARK = "# kvtuner edit: "

_COOKIE = re.compile(rb"[ \t\f]*#.*?coding[:=][ \t]*[-\w.]+")


@dataclass(frozen=True)
class Place:
    """Where an edit goes: a byte offset and an indentation; `fingerprint` is that of the code around it."""

    offset: int
    indent: bytes
    follows: bool
    fingerprint: str

    def order(self) -> tuple[int, int, int]:
        # At one offset, what follows a statement comes first, and of that the deepest, as its block ends there.
        return (self.offset, 0, -len(self.indent)) if self.follows else (self.offset, 1, 0)


class Source:
    """An upstream file, ready for edits. Raises ForkError, naming `path`, where it is no Python in UTF-8."""

    def __init__(self, data: bytes, path: str):
        self.path = path
        self._mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
        self._text = data[len(self._mark) :]
        try:
            encoding = tokenize.detect_encoding(io.BytesIO(self._text).readline)[0]
            self._tree = _parse(self._text)
        except (SyntaxError, ValueError) as error:
            raise ForkError(f"{path} does not parse: {error}") from None
        if encoding != "utf-8":
            raise ForkError(f"{path} is not in UTF-8 but in {encoding}")
        # Unlike text, bytes are split exactly where Python's own parser sees a line end.
        self._lines = self._text.splitlines(keepends=True)
        self._newline = _line_end(self._lines[0]) if self._lines else b"\n"

    def locate(self, edit: Edit) -> Place:
        """Where `edit` goes. Raises ForkError where its scope or anchor is not there exactly once or offers no place."""
        scopes = find_scopes(self._tree, edit.scope)
        if not scopes:
            raise edit.error("the scope is not there")
        if not edit.anchor:
            if len(scopes) > 1:
                raise edit.error(f"the scope is there {len(scopes)} times")
            return self._at_edge(edit, scopes[0])
        try:
            anchor = Anchor(edit.anchor)
        except ForkError as error:
            raise edit.error(error.message) from None
        found = [(scope, node) for scope in scopes for node in statements(scope) if anchor.matches(node)]
        if len(found) != 1:
            raise edit.error(f"the anchor is there {len(found)} times" if found else "the anchor is not there")
        scope, node = found[0]
        return self._beside(edit, node, edit.where == "after", fingerprint(scope, node))

    def scope_text(self, edit: Edit) -> str:
        """The source of what the fingerprint of `edit` is of; the whole file for an edit of the module."""
        nodes = [scope for scope in find_scopes(self._tree, edit.scope) if not isinstance(scope, ast.Module)]
        lines = [line for n in nodes for line in self._lines[n.lineno - 1 : n.end_lineno]] if nodes else self._lines
        return b"".join(lines).decode()

    def apply(self, edits: list[Edit], version: str) -> bytes:
        """The file with the notice and all `edits`, `version` in place of @FORK_VERSION@.

        Raises ForkError where an edit has no place, or the result is not the old statements and the edits' own.
        """
        try:
            return self._proved(edits, version)
        except _Unproved as together:
            for edit in edits:
                try:
                    self._proved([edit], version)
                except _Unproved as alone:
                    raise edit.error(f"the edited file is wrong: {alone}") from None
            raise ForkError(f"{self.path}: its edits do not go together: {together}") from None

    def _at_edge(self, edit: Edit, scope: ast.AST) -> Place:
        body, mark = scope.body, fingerprint(scope, None)
        if not body:
            return Place(len(self._text), b"", True, mark)
        if edit.where == "last":
            return self._beside(edit, body[-1], True, mark)
        head = 0 if ast.get_docstring(scope, clean=False) is None else 1
        while head < len(body) and isinstance(body[head], ast.ImportFrom) and body[head].module == "__future__":
            head += 1
        return self._beside(edit, body[max(head - 1, 0)], head > 0, mark)

    def _beside(self, edit: Edit, node: ast.stmt, after: bool, mark: str) -> Place:
        # Column offsets count bytes, as these lines do.
        opening, closing = self._lines[node.lineno - 1], self._lines[node.end_lineno - 1]
        indent = opening[: node.col_offset]
        if isinstance(node, ast.If) and opening.startswith(b"elif", node.col_offset):
            raise edit.error("the anchor is an elif, which offers no place beside it")
        if indent.strip(b" \t\f") or not re.fullmatch(rb"[ \t\f]*(#.*)?[\r\n]*", closing[node.end_col_offset :]):
            raise edit.error("the anchor shares a line with other code")
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        above = node.end_lineno if after else first - 1
        return Place(sum(map(len, self._lines[:above])), indent, after, mark)

    def _proved(self, edits: list[Edit], version: str) -> bytes:
        placed = sorted(((self.locate(edit), edit) for edit in edits), key=lambda pair: pair[0].order())
        head = self._head()
        result = bytearray(self._text[:head] + NOTICE + self._newline)
        added: set[int] = set()
        code: list[ast.stmt] = []
        done = head
        for place, edit in placed:
            result += self._text[done : max(place.offset, head)]
            done = max(place.offset, head)
            if not result.endswith((b"\n", b"\r")):
                result += self._newline
            text = edit.code.replace("@FORK_VERSION@", version).strip("\n")
            lines = [f"{MARK}{edit.id}", *text.splitlines()]
            start = len(result.splitlines())
            added.update(range(start + 1, start + len(lines) + 1))
            result += b"".join((place.indent + line.encode() if line else b"") + self._newline for line in lines)
            code += ast.parse(text).body
        result += self._text[done:]
        self._prove(bytes(result), added, code)
        return self._mark + bytes(result)

    def _head(self) -> int:
        """The offset behind a shebang and an encoding line, which must stay where they are."""
        lines = 0
        for number, line in enumerate(self._lines[:2]):
            if (number == 0 and line.startswith(b"#!")) or _COOKIE.match(line):
                lines = number + 1
        return sum(map(len, self._lines[:lines]))

    def _prove(self, result: bytes, added: set[int], code: list[ast.stmt]) -> None:
        try:
            tree = _parse(result)
        except (SyntaxError, ValueError) as error:
            raise _Unproved(f"it does not parse: {error}") from None
        remover = _Remover(added)
        remover.visit(tree)
        if [canonical(node) for node in remover.removed] != [canonical(node) for node in code]:
            raise _Unproved("the added code reads differently there")
        if canonical(tree) != canonical(self._tree):
            raise _Unproved("an upstream statement reads differently now")


class _Unproved(Exception):
    pass


class _Remover(ast.NodeTransformer):
    """Takes out the statements that begin on the given lines."""

    def __init__(self, lines: set[int]):
        self.lines = lines
        self.removed: list[ast.stmt] = []

    def visit(self, node: ast.AST):
        if isinstance(node, ast.stmt) and node.lineno in self.lines:
            self.removed.append(node)
            return None
        return self.generic_visit(node)


def _parse(data: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Compiling also refuses what only parses, such as `return` outside a function.
        compile(data, "<upstream>", "exec", dont_inherit=True)
        return ast.parse(data)


def _line_end(line: bytes) -> bytes:
    return line[len(line.rstrip(b"\r\n")) :] or b"\n"
