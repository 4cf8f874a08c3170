"""What an upstream release offers, read from its source without importing it: names, members of classes, arguments.

A name is written ``package.module:Class.member``; see :meth:`Surface.find` for what else can be asked for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from .definitions import (
    FUNCTIONS,
    Class,
    Found,
    Module,
    assigned,
    assignment_found,
    bound_names,
    closed_class,
    declared,
    function_found,
    header,
)
from .syntax import digest, find_scopes

SERVER_ARGS = "sglang.srt.server_args:ServerArgs"
_FIELDS = Path("sglang/srt/arg_groups/fields")


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
            return owner and closed_class(owner)
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
            found = (declared(cls, name) or assigned(cls, name) for cls in self.bases(owner))
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
        bases = {
            base.id if isinstance(base, ast.Name) else ast.unparse(base) for cls in chain for base in cls.node.bases
        }
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
        return here and assignment_found(here, [node for _, node in here.assignments.get(name, [])])

    def _in_scope(self, module: str, scope: str, name: str) -> bool:
        """Whether code in a function of the module, or in the module itself, can use the name."""
        here = self.module(module)
        if here is None or name in here.bindings:
            return here is not None
        inside = [node for found in find_scopes(here.tree, scope)[-1:] for node in ast.walk(found)] if scope else []
        return any(
            name in (*bound_names(node), getattr(node, "id", None), getattr(node, "arg", None)) for node in inside
        )

    def _behaviour(self, name: str) -> Found | None:
        module, _, inside = name.partition(":")
        owner, _, method = inside.rpartition(".")
        found = self._define(module, owner or method)
        scopes = found and find_scopes(found[0].tree, inside if owner else found[1][0].name)
        if not scopes or not isinstance(scopes[-1], FUNCTIONS):
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
            return Found("class", digest(*node.bases, *node.keywords), f"{header(node)}\n")
        if isinstance(node, FUNCTIONS):
            return function_found(where, node)
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
