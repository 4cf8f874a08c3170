"""The rooms of the package: arrows run downwards, and what checks on a bare torch need imports nothing of upstream."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "python" / "sglang" / "srt" / "kvtuner"
PREFIX = "sglang.srt.kvtuner."

# From the top down; a room imports from its own and from lower ones. Imports for type checkers count as well.
ROOMS = ("tuner", "hooks", "attention", "cache", "config", "format")

WITHOUT_UPSTREAM = (
    *(f"format.{path.stem}" for path in sorted((PACKAGE / "format").glob("[a-z]*.py"))),
    "cache.storage",
    "attention.base",
    "attention.steps",
    "attention.reference",
)

# Finds modules of ``sglang`` among the repository's own files and refuses all others, wherever they are installed.
OWN_FILES_ONLY = """
import importlib.machinery, importlib.util, sys
from pathlib import Path
ROOT = Path({root!r})

class OwnFilesOnly:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] != "sglang":
            return None
        place = ROOT.joinpath(*name.split("."))
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                packages = [str(place)] if file.name == "__init__.py" else None
                return importlib.util.spec_from_file_location(name, file, submodule_search_locations=packages)
        if place.is_dir():
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        raise ImportError(f"{{name}} is upstream's")

sys.meta_path.insert(0, OwnFilesOnly)
"""


def room_of(module):
    """The room of a module of ours, or None for what belongs to none (upstream's, or the package itself)."""
    if not module.startswith(PREFIX):
        return None
    return module[len(PREFIX) :].partition(".")[0]


def imports_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_is_in_a_room():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert found == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_downwards(room):
    files = [PACKAGE / f"{room}.py"] if room == "hooks" else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    lower = ROOMS[ROOMS.index(room) :]
    for path in files:
        rooms = {room_of(module) for module in imports_of(path)} - {None}
        assert rooms <= set(lower), f"{path.relative_to(ROOT)} imports from {rooms - set(lower)}"


def run(code):
    preamble = OWN_FILES_ONLY.format(root=str(ROOT / "python"))
    return subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True, timeout=120)


def test_what_a_bare_torch_runs_imports_nothing_of_upstream():
    found = run("\n".join(f"import {PREFIX}{module}" for module in WITHOUT_UPSTREAM))
    assert found.returncode == 0, found.stderr


def test_the_test_sees_upstream():
    found = run(f"import {PREFIX}cache.pool")
    assert found.returncode and "sglang.srt.mem_cache is upstream's" in found.stderr
