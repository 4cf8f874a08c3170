"""The checkout's own modules of ``sglang``, importable on a machine without it.

Own files come first, whatever is installed. What the repository does not have is looked for in an unpacked sglang, if one was
given or is installed; no ``__init__.py`` of a package that holds own files is run.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "python"
# All that a copy needs to run the checks, relative to the repository.
CARRIED = (
    "python/sglang",
    "scripts/gpu_check.py",
    "scripts/gpu_bench.py",
    "scripts/gpu_checks",
    "benchmark/kvtuner/triton_resources.py",
)


class OwnFilesFirst:
    """Finds modules of ``sglang`` among the repository's files, then in ``upstream``, a folder that contains ``sglang``."""

    def __init__(self, upstream: Path | None) -> None:
        self.upstream = upstream

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "sglang":
            return None
        places = [root.joinpath(*name.split(".")) for root in (PACKAGES, self.upstream) if root is not None]
        own = places[0]
        if own.is_dir() and not (own / "__init__.py").is_file():
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(place) for place in places if place.is_dir()]
            return spec
        for place in places:
            for file in (place / "__init__.py", place.with_suffix(".py")):
                if file.is_file():
                    folders = [str(place)] if file.name == "__init__.py" else None
                    return importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
            if place.is_dir():
                spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
                spec.submodule_search_locations = [str(place)]
                return spec
        where = f"nor in {self.upstream}" if self.upstream else "and no sglang is installed or was given (--upstream)"
        raise ModuleNotFoundError(f"{name} is not among this repository's files {where}", name=name)


def find_upstream(given: str | None) -> Path | None:
    """The folder that contains an unpacked ``sglang``: the given one, or where one is installed. Raises ValueError where the
    given one has none."""
    if given is not None:
        folder = Path(given).resolve()
        if not (folder / "sglang").is_dir():
            raise ValueError(
                f"--upstream is {given}; valid is a folder that contains sglang: an unpacked wheel, or site-packages"
            )
        return folder
    spec = importlib.util.find_spec("sglang")
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parents[1]


def install(upstream: Path | None) -> None:
    """Make own files importable, and upstream's behind them. Once per process, before ``sglang`` is imported.

    Raises RuntimeError where it was imported.
    """
    if any(isinstance(finder, OwnFilesFirst) for finder in sys.meta_path):
        return
    if "sglang" in sys.modules:
        raise RuntimeError(
            "sglang was imported before the checks: they run this checkout's files, in a process of their own"
        )
    sys.meta_path.insert(0, OwnFilesFirst(upstream))
    # Recipes, and how kernels are compiled for a table, are the benchmark's.
    sys.path.insert(0, str(ROOT / "benchmark" / "kvtuner"))


def carried_files() -> list[Path]:
    """Every file of CARRIED."""
    found: list[Path] = []
    for entry in CARRIED:
        path = ROOT / entry
        found += [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix == ".py")
    return found


def digest() -> str:
    """SHA-256 (hex) of the names and contents of what was checked, and of what checks it."""
    found = hashlib.sha256()
    for path in carried_files():
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
