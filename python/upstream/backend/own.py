"""The project's own files: which they are and where they go in the package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import ForkError
from .pin import ROOT, read_toml

OWN = Path("python/upstream/own.toml")

_LEFTOVERS = (".pyc", ".pyo", ".so", ".o", ".orig", ".rej", ".bak", ".swp", "~")


def find(root: Path = ROOT) -> dict[str, Path]:
    """The own files by installed path. Raises ForkError where two would have the same one, or own.toml is wrong."""
    found: dict[str, Path] = {}
    for table in read_toml(root / OWN).get("own", []):
        try:
            folder, target, suffixes = root / table["from"], table["to"], table.get("suffixes")
        except KeyError as missing:
            raise ForkError(f"{OWN}: a table has no {missing}") from None
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if not path.is_file() or _is_left_over(inside) or (suffixes and path.suffix not in suffixes):
                continue
            name = f"{target}/{inside.as_posix()}"
            if name in found:
                raise ForkError(f"two own files would be installed as {name}: {found[name]} and {path}")
            found[name] = path
    return found


def add(own: dict[str, Path], tree: Path, *, link: bool = False) -> None:
    """Copy, or link, the own files into a tree of upstream's. Raises ForkError at the first that upstream has too."""
    for name, path in own.items():
        target = tree / name
        if os.path.lexists(target):
            raise ForkError(f"upstream has a file of its own at {name}: move {path}, or edit upstream's")
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            target.symlink_to(path)
        else:
            shutil.copyfile(path, target)
            target.chmod(0o755 if path.stat().st_mode & 0o111 else 0o644)


def _is_left_over(inside: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
    return hidden or inside.name.endswith(_LEFTOVERS)
