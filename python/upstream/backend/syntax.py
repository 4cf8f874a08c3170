"""Upstream's code as a syntax tree: comparing statements, finding them, fingerprinting what is around them."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator

from .errors import ForkError

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)
_BLOCKS = ("body", "orelse", "handlers", "finalbody", "cases")
_UNCOMPARED = ("kind", "ctx", "type_comment")
# What completes a header to a statement: any block, `try`, `match`.
_TAILS = ("\n    pass", "\n    pass\nfinally:\n    pass", "\n    case _: pass")


def canonical(node, *, closed: bool = False, skip: tuple[str, ...] = ()) -> str:
    """A text that is equal for equal trees, on every Python: ast.dump is not, as its output differs by release.

    `closed` leaves out the bodies of the definitions inside `node`; `skip` leaves out fields of `node` itself.
    """
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = []
    for name, value in ast.iter_fields(node):
        items = value if isinstance(value, list) else [value]
        if isinstance(node, ast.JoinedStr):
            # The first releases of 3.12 end a nested format with an empty text.
            items = [item for item in items if not (isinstance(item, ast.Constant) and item.value == "")]
        if name in skip or name in _UNCOMPARED or items in ([], [None]):
            continue
        parts = [canonical(item, closed=closed, skip=_inside(item, closed)) for item in items]
        fields.append(f"{name}=[{','.join(parts)}]")
    return f"{type(node).__name__}({','.join(fields)})"


def _inside(node, closed: bool) -> tuple[str, ...]:
    return ("body",) if closed and isinstance(node, _DEFINITIONS) else ()


def statements(scope: ast.AST) -> Iterator[ast.stmt]:
    """Every statement of `scope` in order, through nested blocks but not into nested functions and classes."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)) and not isinstance(child, _DEFINITIONS):
            yield from statements(child)


def find_scopes(tree: ast.Module, name: str) -> list[ast.AST]:
    """The definitions with this dotted name, several where `if` or `@overload` allow it; the module itself for ""."""
    found: list[ast.AST] = [tree]
    for part in name.split(".") if name else ():
        found = [s for scope in found for s in statements(scope) if isinstance(s, _DEFINITIONS) and s.name == part]
    return found


class Anchor:
    """One statement, or the header of a compound one, to be found in a scope. Raises ForkError where it is neither."""

    def __init__(self, text: str):
        text = text.strip()
        self._skip: tuple[str, ...] = ()
        if text.endswith(":"):
            node = _one_statement(*(text + tail for tail in _TAILS))
            decorated = getattr(node, "decorator_list", [])
            self._skip = _BLOCKS if decorated else (*_BLOCKS, "decorator_list")
        else:
            node = _one_statement(text)
        self._type = type(node)
        self._canonical = canonical(node, skip=self._skip)

    def matches(self, node: ast.stmt) -> bool:
        return type(node) is self._type and canonical(node, skip=self._skip) == self._canonical


def _one_statement(*candidates: str) -> ast.stmt:
    for text in candidates:
        try:
            body = ast.parse(text).body
        except (SyntaxError, ValueError):
            continue
        if len(body) == 1:
            return body[0]
    raise ForkError("the anchor is not one statement")


def fingerprint(scope: ast.AST, anchored: ast.stmt | None) -> str:
    """Sixteen hex digits that change when upstream changes what an edit relies on.

    That is the whole function, a class without the bodies of its methods, or, at module level, the anchored
    statement; without one, the module without the bodies of its functions and classes.
    """
    if isinstance(scope, ast.Module) and anchored is not None:
        text = canonical(anchored)
    else:
        text = canonical(scope, closed=not isinstance(scope, _FUNCTIONS))
    return digest(text)


def digest(*parts: ast.AST | str | None) -> str:
    """Sixteen hex digits of texts and of trees, which are compared as :func:`canonical` writes them."""
    texts = [part if isinstance(part, str) else canonical(part) for part in parts]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
