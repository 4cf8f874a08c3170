"""Judging edits against a release: which still fit, which need a person's look, which cannot be applied."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from .edits import Edit
from .errors import ForkError
from .splice import Source

OK, REVIEW, CONFLICT = "ok", "review", "conflict"


@dataclass(frozen=True)
class Finding:
    """What became of one edit: a status, why, and the fingerprint found (None in a conflict)."""

    edit: Edit
    status: str
    detail: str = ""
    fingerprint: str | None = None


@dataclass(frozen=True)
class Edited:
    """One upstream file: its path, the findings of its edits, and its new bytes (None in a conflict)."""

    target: str
    findings: list[Finding]
    data: bytes | None


def by_file(tree: Path, edits: list[Edit], version: str) -> list[Edited]:
    """Try every edit on the upstream files under `tree`, which stay as they are."""
    ordered = sorted(edits, key=lambda edit: edit.target)
    return [_one_file(tree, target, list(group), version) for target, group in groupby(ordered, lambda e: e.target)]


def _one_file(tree: Path, target: str, edits: list[Edit], version: str) -> Edited:
    try:
        source = _read(tree, target, edits[0])
    except ForkError as error:
        return Edited(target, [Finding(edit, CONFLICT, error.message) for edit in edits], None)
    findings = [_finding(source, edit) for edit in edits]
    if any(finding.status == CONFLICT for finding in findings):
        return Edited(target, findings, None)
    try:
        return Edited(target, findings, source.apply(edits, version))
    except ForkError as error:
        return Edited(target, [Finding(edit, CONFLICT, error.message) for edit in edits], None)


def _finding(source: Source, edit: Edit) -> Finding:
    try:
        found = source.locate(edit).fingerprint
        if edit.fingerprint == found:
            return Finding(edit, OK, "", found)
    except ForkError as error:
        return Finding(edit, CONFLICT, error.message)
    what = "upstream changed the code around it" if edit.fingerprint else "no fingerprint is recorded"
    return Finding(edit, REVIEW, edit.error(f"needs review: {what}; look, then run fork.py record").message, found)


def _read(tree: Path, target: str, edit: Edit) -> Source:
    try:
        data = (tree / target).read_bytes()
    except OSError:
        raise edit.error("upstream has no such file") from None
    return Source(data, target)
