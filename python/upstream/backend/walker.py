"""Following upstream's objects through own code: which of their names it imports, reads, calls and overrides.

Types come from imports, annotations, construction, plain assignments and the declared objects; nothing is guessed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .surface import Surface

Uses = Iterator[tuple[str, set[str]]]


@dataclass(frozen=True)
class Type:
    """What an expression is: an instance of class ``name``, or, not ``instance``, what ``name`` names itself."""

    name: str
    instance: bool = False


@dataclass
class Code:
    """All own modules by name, and the declared objects by name: a variable, an attribute, or a call such as ``get()``.

    classes: the members of every own class. parents: what each one extends.
    """

    surface: Surface
    modules: Mapping[str, ast.Module]
    objects: Mapping[str, str]
    classes: dict[str, set[str]] = field(default_factory=dict)
    parents: dict[str, list[Type]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for module, tree in self.modules.items():
            imports = Walker(self, module)
            for node in ast.walk(tree):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    imports.bind_import(node)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.classes[f"{module}:{node.name}"] = _members(node)
                    self.parents[f"{module}:{node.name}"] = [
                        t for base in node.bases if (t := imports.type_of(base) or _sibling(module, base))
                    ]

    def upstream_bases(self, own: str) -> list[str]:
        """The upstream classes that an own class extends, through own ones too."""
        found: list[str] = []
        for parent in self.parents.get(own, []):
            found += self.upstream_bases(parent.name) if parent.name in self.classes else [parent.name]
        return [name for name in found if self.surface.class_of(name)]

    def defines(self, own: str, member: str) -> bool:
        """Whether an own class, or an own base of it, has the member."""
        if own not in self.classes:
            return False
        return member in self.classes[own] or any(self.defines(parent.name, member) for parent in self.parents[own])

    def comes_from_elsewhere(self, upstream: str, member: str) -> bool:
        """Whether a member that an upstream class has not is that of an own class that extends it, or of a foreign base."""
        if self.surface.member(upstream, member):
            return False
        heirs = [own for own in self.classes if upstream in self.upstream_bases(own)]
        foreign = hasattr(object, member) or self.surface.extends_foreign(upstream)
        return foreign or any(self.defines(own, member) for own in heirs)

    def is_own(self, module: str) -> bool:
        return module in self.modules


class Walker:
    """Walks one own module, or the code of an edit in the upstream module ``module``, whose ``names`` have these types."""

    def __init__(self, code: Code, module: str, names: Mapping[str, str] | None = None):
        self._code = code
        self._module = module
        self._names: dict[str, Type | None] = {name: Type(cls, True) for name, cls in (names or {}).items()}
        self._class: str | None = None

    def walk(self, node: ast.AST) -> Uses:
        """Every use in ``node``, with the names of the arguments that a call passes."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from self.bind_import(node)
        elif isinstance(node, ast.ClassDef):
            yield from self._walk_class(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from self._walk_function(node)
        else:
            if isinstance(node, (ast.Attribute, ast.Subscript)):
                yield from self._read(node)
            elif isinstance(node, ast.Call):
                yield from self._call(node)
            for child in ast.iter_child_nodes(node):
                yield from self.walk(child)
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)

    def bind_import(self, node: ast.Import | ast.ImportFrom) -> list[tuple[str, set[str]]]:
        used = []
        for alias in node.names:
            module = alias.name if isinstance(node, ast.Import) else node.module or ""
            if module.partition(".")[0] != "sglang":
                continue
            name = f"{module}:{alias.name}" if isinstance(node, ast.ImportFrom) else module
            if isinstance(node, ast.ImportFrom) and f"{module}.{alias.name}" in self._code.modules:
                name = f"{module}.{alias.name}"
            if not self._code.is_own(name.partition(":")[0]):
                found = self._code.surface.find(name)
                if found is not None and found.kind == "module":
                    name = name.replace(":", ".")
                used.append((name, set()))
            self._names[alias.asname or alias.name] = Type(name)
        return used

    def _walk_class(self, node: ast.ClassDef) -> Uses:
        outer, self._class = self._class, f"{self._module}:{node.name}"
        for base in self._code.upstream_bases(self._class):
            yield f"base:{base}", set()
            for member in sorted(_members(node)):
                if self._code.surface.member(base, member):
                    yield f"{base}.{member}", set()
        for child in ast.iter_child_nodes(node):
            yield from self.walk(child)
        self._class = outer
        self._names[node.name] = Type(f"{self._module}:{node.name}")

    def _walk_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Uses:
        outer = dict(self._names)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for number, argument in enumerate(arguments):
            declared = self._annotated(argument.annotation)
            self._names[argument.arg] = declared or self._declared(argument.arg)
            if number == 0 and self._class and argument.arg == "self":
                self._names["self"] = Type(self._class, True)
        for child in ast.iter_child_nodes(node):
            yield from self.walk(child)
        self._names = outer

    def _read(self, node: ast.Attribute | ast.Subscript) -> Uses:
        owner = self.type_of(node.value)
        if owner is None:
            return
        if isinstance(node, ast.Attribute):
            yield from self._member(owner, node.attr)
        elif owner.instance and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
            yield from self._member(owner, node.slice.value)

    def _member(self, owner: Type, name: str, passes: set[str] = frozenset()) -> Uses:
        if owner.name in self._code.classes:
            if not self._code.defines(owner.name, name):
                for base in self._code.upstream_bases(owner.name):
                    yield from self._member(Type(base), name, passes)
        elif self._code.surface.class_of(owner.name):
            if not self._code.comes_from_elsewhere(owner.name, name):
                yield f"{owner.name}.{name}", passes
        elif ":" not in owner.name and not self._code.is_own(owner.name) and not name.startswith("__"):
            yield f"{owner.name}:{name}", passes

    def _call(self, node: ast.Call) -> Uses:
        passes = {keyword.arg for keyword in node.keywords if keyword.arg}
        function = node.func
        if isinstance(function, ast.Name) and function.id == "getattr" and len(node.args) > 1:
            owner, name = self.type_of(node.args[0]), getattr(node.args[1], "value", None)
            if owner and isinstance(name, str):
                yield from self._member(owner, name)
        if isinstance(function, ast.Attribute) and (owner := self.type_of(function.value)):
            yield from self._member(owner, function.attr, passes)
        called = self.type_of(function)
        if called is None or called.instance:
            return
        bases = self._code.upstream_bases(called.name) if called.name in self._code.classes else [called.name]
        for base in bases:
            if not self._code.surface.class_of(base):
                if self._code.surface.find(base):
                    yield base, passes
            elif self._code.surface.member(base, "__init__"):
                if base == called.name:
                    yield f"{base}.__init__", passes
            else:  # a dataclass or a struct: what is passed are its fields
                for name in passes:
                    if not self._code.defines(called.name, name):
                        yield f"{base}.{name}", set()

    def type_of(self, node: ast.expr) -> Type | None:
        if isinstance(node, ast.Name):
            return self._names[node.id] if node.id in self._names else self._declared(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value)
            if owner and not owner.instance and ":" not in owner.name:
                return Type(f"{owner.name}:{node.attr}")
            return self._declared(node.attr)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super" and self._class:
                return next((Type(base, True) for base in self._code.upstream_bases(self._class)), None)
            called = self.type_of(node.func)
            if called and not called.instance and self._is_class(called.name):
                return Type(called.name, True)
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            return self._declared(f"{name}()")
        return None

    def _is_class(self, name: str) -> bool:
        return name in self._code.classes or self._code.surface.class_of(name) is not None

    def _declared(self, name: str) -> Type | None:
        cls = self._code.objects.get(f"{self._module}:{name}") or self._code.objects.get(name)
        return Type(cls, True) if cls else None

    def _annotated(self, node: ast.expr | None) -> Type | None:
        if isinstance(node, ast.BinOp):
            return self._annotated(node.left) or self._annotated(node.right)
        named = self.type_of(node) if isinstance(node, ast.Name) else None
        return Type(named.name, True) if named and self._is_class(named.name) else None

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, item in zip(target.elts, value.elts):
                self._assign(part, item)
        elif isinstance(target, ast.Name):
            self._names[target.id] = self.type_of(value) or self._declared(target.id)


def _members(node: ast.ClassDef) -> set[str]:
    """What a class declares, and what its methods assign to themselves."""
    found = set()
    for child in node.body:
        found |= {getattr(child, "name", None)}
        for target in getattr(child, "targets", [getattr(child, "target", None)]):
            found |= {getattr(target, "id", None)}
    for child in ast.walk(node):
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.ctx, ast.Store)
            and getattr(child.value, "id", "") == "self"
        ):
            found.add(child.attr)
    return found - {None}


def _sibling(module: str, base: ast.expr) -> Type | None:
    return Type(f"{module}:{base.id}") if isinstance(base, ast.Name) else None
