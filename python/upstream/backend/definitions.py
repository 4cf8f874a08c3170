"""Modules and classes of upstream as syntax trees: where names are bound, and the fingerprints of what binds them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .syntax import canonical, digest, statements

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Found:
    """Where a name is defined and what tells a change of it.

    kind: module, class, function, value, argument, namespace, variable. fingerprint: sixteen hex digits, or "" where only
    being there counts. text: the source that a review compares. function: its definition, where it is one.
    """

    kind: str
    fingerprint: str
    text: str = ""
    function: ast.FunctionDef | ast.AsyncFunctionDef | None = None


class Module:
    """One parsed file of the release."""

    def __init__(self, name: str, path: Path):
        self.name = name
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.tree = ast.parse(self.text)

    @cached_property
    def bindings(self) -> dict[str, list[ast.stmt]]:
        """The statements that bind each of the module's names."""
        found: dict[str, list[ast.stmt]] = {}
        for node in statements(self.tree):
            for name in bound_names(node):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def assignments(self) -> dict[str, list[tuple[str, ast.Assign | ast.AnnAssign]]]:
        """By attribute, every statement that assigns to it, with the name of what it is an attribute of."""
        found: dict[str, list[tuple[str, ast.Assign | ast.AnnAssign]]] = {}
        for node in ast.walk(self.tree):
            for target in _targets(node):
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                        found.setdefault(part.attr, []).append((part.value.id, node))
        return found

    def source(self, node: ast.AST) -> str:
        lines = self.text.splitlines(keepends=True)
        return "".join(lines[node.lineno - 1 : node.end_lineno])

    def origin(self, node: ast.stmt, name: str) -> tuple[str, str] | None:
        """The module and name, "" for the module itself, that an import statement takes ``name`` from."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name.partition(".")[0]) == name:
                    return (alias.name if alias.asname else name), ""
        if isinstance(node, ast.ImportFrom):
            above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return module, alias.name
        return None


@dataclass(frozen=True)
class Class:
    """A class definition and the module that it is in."""

    module: Module
    node: ast.ClassDef


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in _targets(node):
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)


def function_found(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Found:
    # A default is part of the signature, an annotation of what is returned is not: own code reads what it declares itself.
    return Found("function", digest(node.args, *node.decorator_list), module.source(node), node)


def declared(cls: Class, name: str) -> Found | None:
    nodes = [node for node in statements(cls.node) if name in bound_names(node)]
    if not nodes:
        return None
    if isinstance(nodes[-1], FUNCTIONS):
        return function_found(cls.module, next((node for node in nodes if _is_getter(node)), nodes[-1]))
    return Found("value", digest(*nodes), "".join(map(cls.module.source, nodes)))


def _is_getter(node: ast.stmt) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in getattr(node, "decorator_list", ()))


def assigned(cls: Class, name: str) -> Found | None:
    """What the methods of a class, or the module below it, assign to an attribute."""
    owners = ("self", "cls", cls.node.name)
    own = range(cls.node.lineno, cls.node.end_lineno + 1)
    top = {id(node) for node in cls.module.tree.body}
    return assignment_found(
        cls.module,
        [
            node
            for owner, node in cls.module.assignments.get(name, [])
            if owner in owners and (node.lineno in own or id(node) in top)
        ],
    )


def assignment_found(module: Module, nodes: list[ast.Assign | ast.AnnAssign]) -> Found | None:
    values = sorted({canonical(node.value) for node in nodes})
    return Found("value", digest(*values), "".join(map(module.source, nodes))) if nodes else None


def closed_class(cls: Class) -> Found:
    marks, lines = [], [header(cls.node)]
    for node in cls.node.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            marks.append(canonical(node, skip=("body",)))
            lines.append(f"    {header(node)}")
        elif not isinstance(node, ast.Expr):
            marks.append(canonical(node))
            lines.append(f"    {ast.unparse(node)}")
    return Found("class", digest(*cls.node.bases, *cls.node.keywords, *marks), "\n".join(lines) + "\n")


def header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    short = {**{field: getattr(node, field, None) for field in node._fields}, "body": [ast.Expr(ast.Constant(...))]}
    return " ".join(ast.unparse(ast.fix_missing_locations(type(node)(**short))).splitlines()[:-1])
