"""What an upstream release offers, read from its source without importing it: names, members of classes, arguments.

A name is written ``package.module:Class.member``; see :meth:`Surface.find` for what else can be asked for.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .syntax import canonical, digest, find_scopes, statements

SERVER_ARGS = "sglang.srt.server_args:ServerArgs"
_FIELDS = Path("sglang/srt/arg_groups/fields")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


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
            for name in _bound(node):
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


class Surface:
    """The names of the release unpacked in ``tree``."""

    def __init__(self, tree: Path):
        self._tree = tree
        self._modules: dict[str, Module | None] = {}
        self._members: dict[tuple[str, str], Found | None] = {}

    def find(self, name: str) -> Found | None:
        """What is known of ``name``, or None where the release has no such thing.

        ``module``, ``module:name``, ``module:Class.member``: a function by its signature, a class by its bases, a value by
        what is assigned. ``base:module:Class``: a class by all that it declares, signatures included.
        ``behaviour:module:Class.method``: a function with its body. ``argument:NAME``, ``namespace:NAME``: a field of
        ServerArgs, or a group of them. ``variable:NAME``: an environment variable. ``name:module:scope:name``: what code in a
        scope can use. ``assigned:module:name``: what a module assigns to an attribute, of whatever.
        """
        kind, _, rest = name.partition(":")
        if kind == "argument":
            return Found("argument", "") if rest in self.arguments or rest in self._derived else None
        if kind == "namespace":
            return Found("namespace", "") if rest in self._namespaces else None
        if kind == "variable":
            return Found("variable", "") if self._names_variable(rest) else None
        if kind == "assigned":
            return self._assigned_in(*rest.split(":"))
        if kind == "name":
            return Found("name", "") if self._in_scope(*rest.split(":")) else None
        if kind == "base":
            owner = self.class_of(rest)
            return owner and _closed_class(owner)
        if kind == "behaviour":
            return self._behaviour(rest)
        module, _, inside = name.partition(":")
        if not inside:
            return Found("module", "") if self._path(module) else None
        first, _, member = inside.partition(".")
        return self.member(f"{module}:{first}", member) if member else self._global(module, first)

    def member(self, owner: str, name: str) -> Found | None:
        """The member ``name`` of a class or of its bases: a method, a declared field, or what methods assign to it."""
        if owner == SERVER_ARGS and (name in self.arguments or name in self._derived):
            return Found("argument", "")
        if (owner, name) not in self._members:
            found = (_declared(cls, name) or _assigned(cls, name) for cls in self.bases(owner))
            self._members[owner, name] = next(filter(None, found), None)
        return self._members[owner, name]

    def bases(self, owner: str) -> Iterator[Class]:
        """The class and the bases of it that are upstream's, nearest first."""
        cls = self.class_of(owner)
        if cls is None:
            return
        yield cls
        for base in cls.node.bases:
            if isinstance(base, ast.Name) and base.id != cls.node.name:
                yield from self.bases(f"{cls.module.name}:{base.id}")

    def extends_foreign(self, owner: str) -> bool:
        """Whether the class has bases that are not upstream's: what it has of them is not its own."""
        chain = list(self.bases(owner))
        bases = {base.id if isinstance(base, ast.Name) else ast.unparse(base) for cls in chain for base in cls.node.bases}
        return bool(bases - {cls.node.name for cls in chain} - {"ABC", "abc.ABC"})

    def class_of(self, name: str) -> Class | None:
        module, _, inside = name.partition(":")
        found = self._define(module, inside)
        if found is None or not isinstance(found[1][0], ast.ClassDef):
            return None
        return Class(found[0], found[1][0])

    @cached_property
    def arguments(self) -> dict[str, Found]:
        """The fields of ServerArgs by name, by type and default; help texts do not count."""
        owned = [(cls, node) for cls in self._declarers for node in cls.node.body if isinstance(node, ast.AnnAssign)]
        return {
            node.target.id: Found("argument", digest(_argument_type(node), node.value), cls.module.source(node))
            for cls, node in owned
            if isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
        }

    @cached_property
    def _declarers(self) -> list[Class]:
        files = sorted((self._tree / _FIELDS).glob("*.py"))
        modules = [self.module(".".join(path.relative_to(self._tree).with_suffix("").parts)) for path in files]
        found = [Class(m, node) for m in modules if m for node in m.tree.body if isinstance(node, ast.ClassDef)]
        found = [cls for cls in found if _namespace(cls.node)]
        return [*found, *filter(None, [self.class_of(SERVER_ARGS)])]

    @cached_property
    def _namespaces(self) -> set[str]:
        return {name for cls in self._declarers if (name := _namespace(cls.node))}

    @cached_property
    def _derived(self) -> set[str]:
        assigned = (node for cls in self._declarers for node in cls.node.body if isinstance(node, ast.Assign))
        return {node.targets[0].id for node in assigned if _calls(node.value, "Derived")}

    def _names_variable(self, name: str) -> bool:
        environ = self._path("sglang.srt.environ")
        if environ and name in environ.read_text(encoding="utf-8"):
            return True
        needle = name.encode()
        return any(needle in path.read_bytes() for path in (self._tree / "sglang").rglob("*.py"))

    def _assigned_in(self, module: str, name: str) -> Found | None:
        here = self.module(module)
        return here and _assignment(here, [node for _, node in here.assignments.get(name, [])])

    def _in_scope(self, module: str, scope: str, name: str) -> bool:
        """Whether code in a function of the module, or in the module itself, can use the name."""
        here = self.module(module)
        if here is None or name in here.bindings:
            return here is not None
        inside = [node for found in find_scopes(here.tree, scope)[-1:] for node in ast.walk(found)] if scope else []
        return any(name in (*_bound(node), getattr(node, "id", None), getattr(node, "arg", None)) for node in inside)

    def _behaviour(self, name: str) -> Found | None:
        module, _, inside = name.partition(":")
        owner, _, method = inside.rpartition(".")
        found = self._define(module, owner or method)
        scopes = found and find_scopes(found[0].tree, inside if owner else found[1][0].name)
        if not scopes or not isinstance(scopes[-1], _FUNCTIONS):
            return None
        # Of several the last is what runs: @overload stands above.
        return Found("function", digest(scopes[-1]), found[0].source(scopes[-1]), scopes[-1])

    def _global(self, module: str, name: str) -> Found | None:
        found = self._define(module, name)
        if found is None:
            return Found("module", "") if self._path(f"{module}.{name}") else None
        where, nodes = found
        node = nodes[-1]
        if isinstance(node, ast.ClassDef):
            return Found("class", digest(*node.bases, *node.keywords), f"{_header(node)}\n")
        if isinstance(node, _FUNCTIONS):
            return _function(where, node)
        return Found("value", digest(*nodes), "".join(map(where.source, nodes)))

    def _define(self, module: str, name: str) -> tuple[Module, list[ast.stmt]] | None:
        """The statements that define a module's name, followed through imports to upstream's own."""
        seen = set()
        while (module, name) not in seen:
            seen.add((module, name))
            here = self.module(module)
            nodes = here.bindings.get(name) if here else None
            if not nodes:
                return None
            # A definition in the module wins over an import in another branch.
            defined = [node for node in nodes if not isinstance(node, (ast.Import, ast.ImportFrom))]
            classes = [node for node in defined if isinstance(node, ast.ClassDef)]
            if defined:
                return here, classes or defined
            origin = here.origin(nodes[-1], name)
            if origin is None or not origin[0].startswith("sglang"):
                return here, nodes
            module, name = origin
            if not self.module(module) or name not in self.module(module).bindings:
                return (here, nodes) if self._path(f"{module}.{name}".rstrip(".")) else None
        return None

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = self._path(name)
            self._modules[name] = Module(name, path) if path and path.is_file() else None
        return self._modules[name]

    def _path(self, name: str) -> Path | None:
        base = self._tree.joinpath(*name.split("."))
        candidates = (base.with_name(f"{base.name}.py"), base / "__init__.py", base)
        return next((path for path in candidates if path.exists()), None)


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in _targets(node):
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)


def _function(module: Module, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Found:
    # A default is part of the signature, an annotation of what is returned is not: own code reads what it declares itself.
    return Found("function", digest(node.args, *node.decorator_list), module.source(node), node)


def _declared(cls: Class, name: str) -> Found | None:
    nodes = [node for node in statements(cls.node) if name in _bound(node)]
    if not nodes:
        return None
    if isinstance(nodes[-1], _FUNCTIONS):
        return _function(cls.module, next((node for node in nodes if _is_getter(node)), nodes[-1]))
    return Found("value", digest(*nodes), "".join(map(cls.module.source, nodes)))


def _is_getter(node: ast.stmt) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in getattr(node, "decorator_list", ()))


def _assigned(cls: Class, name: str) -> Found | None:
    """What the methods of a class, or the module below it, assign to an attribute."""
    owners = ("self", "cls", cls.node.name)
    own = range(cls.node.lineno, cls.node.end_lineno + 1)
    top = {id(node) for node in cls.module.tree.body}
    return _assignment(
        cls.module,
        [
            node
            for owner, node in cls.module.assignments.get(name, [])
            if owner in owners and (node.lineno in own or id(node) in top)
        ],
    )


def _assignment(module: Module, nodes: list[ast.Assign | ast.AnnAssign]) -> Found | None:
    values = sorted({canonical(node.value) for node in nodes})
    return Found("value", digest(*values), "".join(map(module.source, nodes))) if nodes else None


def _closed_class(cls: Class) -> Found:
    marks, lines = [], [_header(cls.node)]
    for node in cls.node.body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            marks.append(canonical(node, skip=("body",)))
            lines.append(f"    {_header(node)}")
        elif not isinstance(node, ast.Expr):
            marks.append(canonical(node))
            lines.append(f"    {ast.unparse(node)}")
    return Found("class", digest(*cls.node.bases, *cls.node.keywords, *marks), "\n".join(lines) + "\n")


def _header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    short = {**{field: getattr(node, field, None) for field in node._fields}, "body": [ast.Expr(ast.Constant(...))]}
    return " ".join(ast.unparse(ast.fix_missing_locations(type(node)(**short))).splitlines()[:-1])


def _argument_type(node: ast.AnnAssign) -> ast.expr:
    """The type in ``A[type, help]``; the whole annotation elsewhere."""
    annotation = node.annotation
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name) and annotation.value.id == "A":
        inner = annotation.slice
        return inner.elts[0] if isinstance(inner, ast.Tuple) and inner.elts else inner
    return annotation


def _namespace(node: ast.ClassDef) -> str | None:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and any(getattr(t, "id", "") == "_NS_PATH" for t in statement.targets):
            return getattr(statement.value, "value", None)
    return None


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
