"""The fork's version: the upstream release, the fork's own release, and a digest of the code that the fork adds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from . import edits, own
from .pin import ROOT, Pin

# A part of a version that has digits alone is read as a number and loses its leading zeros. A letter prevents that.
_PREFIX = "x"
_DIGITS = 12
EDITABLE = "editable"


def version(pin: Pin, root: Path = ROOT, *, editable: bool = False) -> str:
    """The full version of what is built from `root`, such as "1.2.3+kvtuner.1.x0123456789ab". Raises ForkError."""
    parts = [pin.release, digest(root), *([EDITABLE] if editable else [])]
    return ".".join(parts)


def digest(root: Path = ROOT) -> str:
    """`x` and twelve hex digits, of the own files, of what the edits insert and where, and of our licence.

    What an edit says of its reasons and its fingerprint do not count: they do not reach the package.
    """
    files = [(name, bool(path.stat().st_mode & 0o111), _sha256(path)) for name, path in sorted(own.find(root).items())]
    changes = [(e.target, e.id, e.scope, e.where, e.anchor, e.code) for e in edits.load(root)]
    text = json.dumps([files, changes, _sha256(root / "LICENSE")])
    return _PREFIX + hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
