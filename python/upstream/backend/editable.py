"""The editable install: a composed tree with links to the own files, and a wheel that puts it on Python's path."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from .compose import compose
from .pin import ROOT, Pin

TREES = Path("build/editable")
PATH_FILE = "__editable__.sglang.pth"


def lay_out(pin: Pin, upstream: BinaryIO, name: str, staging: Path, root: Path = ROOT) -> Path:
    """Compose build/editable/NAME anew and return it; `staging` gets what the wheel holds: metadata and path file."""
    trees = root / TREES
    trees.mkdir(parents=True, exist_ok=True)
    target = trees / name
    with tempfile.TemporaryDirectory(dir=trees, prefix=".new-") as folder:
        # The old tree is replaced only by a whole new one, so that an error leaves a working install.
        fresh = Path(folder, "fresh")
        compose(pin, upstream, fresh, root=root, link=True)
        (info,) = fresh.glob("*.dist-info")
        shutil.move(info, staging / info.name)
        if target.exists():
            target.rename(Path(folder, "old"))
        fresh.rename(target)
    (staging / PATH_FILE).write_text(f"{target}\n", encoding="utf-8")
    return target
