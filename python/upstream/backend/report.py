"""Printing how the fork fits a release, and what upstream changed in what needs a look."""

from __future__ import annotations

import difflib
from pathlib import Path

from . import review
from .edits import Edit
from .errors import ForkError
from .releases import Standing
from .splice import Source
from .surface import Surface


def write(standing: Standing) -> None:
    """Print every edit, every premise that is not ok, the reasons, and the counts."""
    rows = [(f.status, f.edit.id, f.edit.target, f.edit.scope or "(module)") for f in standing.edits]
    rows += [(review.CONFLICT, "(own file)", name, "") for name in standing.collisions]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for detail in dict.fromkeys(f.detail for f in standing.edits if f.detail):
        print(f"- {detail}")
    for name in standing.collisions:
        print(f"- upstream has a file of its own at {name}")
    for status in (review.CONFLICT, review.REVIEW):
        for item in standing.premises:
            if item.status == status:
                print(f"{status}  {item.detail}")
    print("edits: " + _counts([row[0] for row in rows]))
    print("premises: " + _counts([item.status for item in standing.premises]))


def _counts(statuses: list[str]) -> str:
    return ", ".join(f"{statuses.count(status)} {status}" for status in (review.OK, review.REVIEW, review.CONFLICT))


def write_differences(standing: Standing, old: Path, new: Path) -> None:
    """Print upstream's diff between the releases unpacked in `old` and `new` of every scope that needs review."""
    before, after = Surface(old), Surface(new)
    for finding in standing.edits:
        if finding.status == review.REVIEW:
            _diff(finding.edit.id, *(_scope(tree, finding.edit) for tree in (old, new)))
    for item in standing.premises:
        if item.status == review.REVIEW and not item.new:
            _diff(item.name, *(_text(surface, item.name) for surface in (before, after)))


def _text(surface: Surface, name: str) -> str:
    kind, _, argument = name.partition(":")
    found = surface.arguments.get(argument) if kind == "argument" else surface.find(name)
    return found.text if found else ""


def _scope(tree: Path, edit: Edit) -> str:
    """The source around an edit, "" where it has no place."""
    try:
        return Source((tree / edit.target).read_bytes(), edit.target).scope_text(edit)
    except (OSError, ForkError):
        return ""


def _diff(name: str, before: str, after: str) -> None:
    print(f"\n=== {name}")
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm=""))
    print("\n".join(lines) if lines else "(the same text: what it extends or imports changed)")
