"""What the project's own code and its edits use of upstream, read from their source: the premises of the fork.

What no annotation or import says is declared in python/upstream/objects.toml; docs/rebasing.md explains it.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import edits, own
from .errors import ForkError
from .pin import ROOT, read_toml
from .surface import SERVER_ARGS, Surface
from .walker import Code, Walker

OBJECTS = Path("python/upstream/objects.toml")

_FLAG = re.compile(r"--[a-z][a-z0-9-]+")
_VARIABLE = re.compile(r"SGLANG_(?!KVTUNER|UPSTREAM)[A-Z0-9_]+")
_TABLES = {
    "object": {"name", "type", "why"},
    "fields": {"file", "name", "why"},
    "members": {"owner", "names", "why"},
    "elsewhere": {"name", "module", "why"},
    "behaviour": {"name", "why"},
}


@dataclass
class Use:
    """One thing of upstream that own code relies on.

    name: as :meth:`Surface.find` has it. users: the own files and edits. whys: the reasons that were declared. passes: names
    of the arguments that own code gives it.
    """

    name: str
    users: set[str] = field(default_factory=set)
    whys: list[str] = field(default_factory=list)
    passes: set[str] = field(default_factory=set)

    @property
    def why(self) -> str:
        used = f"used by {', '.join(sorted(self.users))}" if self.users else ""
        return "; ".join(filter(None, [*self.whys, used]))


class _Notes(dict[str, Use]):
    """What was found so far, by name."""

    def __init__(self, surface: Surface, elsewhere: list[dict]):
        super().__init__()
        self._surface = surface
        self._elsewhere = {table["name"]: table for table in elsewhere}

    def add(self, name: str, user: str = "", why: str = "", passes: Iterable[str] = ()) -> None:
        if table := self._elsewhere.get(name):
            name, why = f"assigned:{table['module']}:{name.rpartition('.')[2]}", table["why"]
        elif name.startswith(f"{SERVER_ARGS}."):
            argument = f"argument:{name.removeprefix(f'{SERVER_ARGS}.')}"
            name = argument if "kvtuner" in argument or self._surface.find(argument) else name
        if name.startswith("argument:") and "kvtuner" in name:
            return  # an own one: the namespace of the --kvtuner-* flags
        use = self.setdefault(name, Use(name))
        use.users |= {user} - {""}
        use.whys += [why] if why and why not in use.whys else []
        use.passes |= set(passes)


def find(surface: Surface, root: Path = ROOT) -> dict[str, Use]:
    """What the own files and edits of the repository at ``root`` use of the pinned release ``surface``, by name.

    Raises ForkError where an own file does not parse or a declaration is wrong.
    """
    declared = declarations(root)
    paths = {_module_name(name): path for name, path in own.find(root).items() if name.endswith(".py")}
    users = {_module_name(name): name.removeprefix("sglang/") for name in own.find(root) if name.endswith(".py")}
    modules = {name: _parse(path) for name, path in paths.items()}
    for table in declared["object"]:
        module, scoped, _ = table["name"].rpartition(":")
        if scoped and module not in modules:
            raise ForkError(f"{OBJECTS}: the object {table['name']} is of no own module")
    code = Code(surface, modules, {table["name"]: table["type"] for table in declared["object"]})
    notes = _Notes(surface, declared["elsewhere"])
    for name, tree in modules.items():
        for used, passes in Walker(code, name).walk(tree):
            notes.add(used, users[name], passes=passes)
        for used in _constants(tree, surface):
            notes.add(used, users[name])
    for table in declared["fields"]:
        listed = [
            used
            for name, user in users.items()
            if user == table["file"]
            for used in _listed(modules[name], table["name"])
        ]
        if not listed:
            raise ForkError(f"{OBJECTS}: {table['file']} has no {table['name']} that lists arguments")
        for used in listed:
            notes.add(used, table["file"], table["why"])
    for edit in edits.load(root):
        for used, passes in _of_edit(code, edit, surface):
            notes.add(used, f"edit {edit.id}", passes=passes)
    for table in declared["members"]:
        for member in table["names"]:
            notes.add(f"{table['owner']}.{member}", why=table["why"])
    for table in declared["behaviour"]:
        notes.add(f"behaviour:{table['name']}", why=table["why"])
    return notes


def declarations(root: Path = ROOT) -> dict[str, list[dict]]:
    """The tables of objects.toml by kind. Raises ForkError where one has other fields than it should."""
    path = root / OBJECTS
    tables = read_toml(path) if path.exists() else {}
    for kind in tables:
        for table in tables[kind]:
            if kind not in _TABLES or set(table) != _TABLES[kind]:
                wanted = ", ".join(sorted(_TABLES.get(kind, set()))) or f"one of {', '.join(_TABLES)}"
                raise ForkError(f"{OBJECTS}: a table [[{kind}]] has {', '.join(table)}; valid are {wanted}")
    return {kind: tables.get(kind, []) for kind in _TABLES}


def _module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ForkError(f"{path} does not parse: {error}") from None


def _constants(tree: ast.AST, surface: Surface) -> Iterator[str]:
    """Upstream's flags and environment variables that code names in text of their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            argument = node.value.removeprefix("--").replace("-", "_")
            if _FLAG.fullmatch(node.value) and argument in surface.arguments:
                yield f"argument:{argument}"
            elif _VARIABLE.fullmatch(node.value):
                yield f"variable:{node.value}"


def _listed(tree: ast.Module, name: str) -> Iterator[str]:
    """The arguments that a module's table ``name`` lists, or that are passed by keyword to the function ``name()``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets):
            if isinstance(node.value, ast.Dict):
                yield from (f"namespace:{key.value}" for key in node.value.keys if isinstance(key, ast.Constant))
            yield from (f"argument:{text}" for text in _texts(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == name.removesuffix("()"):
            yield from (f"argument:{keyword.arg}" for keyword in node.keywords if keyword.arg)


def _texts(node: ast.expr) -> Iterator[str]:
    """Texts of a table; of a call the first argument, of a dictionary the values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Call):
        yield from _texts(node.args[0]) if node.args else ()
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Starred)):
        inner = node.values if isinstance(node, ast.Dict) else getattr(node, "elts", None) or [node.value]
        for item in inner:
            yield from _texts(item)


def _of_edit(code: Code, edit: edits.Edit, surface: Surface) -> Iterator[tuple[str, set[str]]]:
    tree = ast.parse(edit.code)
    target = edit.target.removesuffix(".py").replace("/", ".")
    owner = edit.scope.rpartition(".")[0]
    itself = {"self": f"{target}:{owner}"} if surface.class_of(f"{target}:{owner}") else {}
    yield from Walker(code, target, itself).walk(tree)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    bound |= {alias.asname or alias.name for node in ast.walk(tree) for alias in getattr(node, "names", ())}
    for name in {node.id for node in names} - bound - set(dir(builtins)) - {"self"}:
        yield f"name:{target}:{edit.scope}:{name}", set()
