"""What fork.py's verbs do. Each prints to standard output and returns an exit status."""

from __future__ import annotations

import difflib
import os
import tempfile
from pathlib import Path

from . import compose as composing
from . import edits, fetch, identity, own, releases, review, wheel
from .errors import ForkError
from .pin import PIN, ROOT, Pin


def compose(folder: str, root: Path = ROOT) -> int:
    """Write the composed tree into `folder`. Raises ForkError where that is no empty folder."""
    tree = Path(folder)
    if tree.exists() and (not tree.is_dir() or any(tree.iterdir())):
        raise ForkError(f"{tree} is not an empty folder")
    pin = Pin.load(root)
    composing.compose(pin, fetch.fetch(pin), tree, root=root)
    print(f"sglang {identity.version(pin, root)} is in {tree}")
    return 0


def wheels(folder: str, root: Path = ROOT) -> int:
    """Write the fork's wheel for every interpreter and machine that is pinned; print their paths. Raises ForkError."""
    pin = Pin.load(root)
    if os.environ.get(fetch.WHEEL) and len(pin.sha256) > 1:
        raise ForkError(
            f"{fetch.WHEEL} names one file, but {len(pin.sha256)} upstream wheels are needed; "
            f"name a folder that holds them in {fetch.FIND_LINKS}"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in sorted(pin.sha256):
        print(Path(folder, composing.build(pin, name, Path(folder), root)), flush=True)
    return 0


def diff(root: Path = ROOT) -> int:
    """Print a unified diff of the edited files, whatever needs review, and the own files."""
    pin = Pin.load(root)
    with tempfile.TemporaryDirectory() as folder:
        wheel.unpack(fetch.fetch(pin), Path(folder))
        for file in review.by_file(Path(folder), edits.load(root), identity.version(pin, root)):
            if file.data is None:
                raise ForkError(_conflicts(file.findings)[0].detail)
            sides = [(Path(folder) / file.target).read_bytes(), file.data]
            lines = [[line.decode() for line in side.splitlines(keepends=True)] for side in sides]
            print("".join(difflib.unified_diff(*lines, f"a/{file.target}", f"b/{file.target}")), end="")
    print("\nOwn files:")
    for name in sorted(own.find(root)):
        print(f"  {name}")
    return 0


def check(root: Path = ROOT) -> int:
    """Print how every edit fits the pinned release; 1 where not every one is ok."""
    pin = Pin.load(root)
    return _report(releases.judge(fetch.fetch(pin), pin, root))


def record(root: Path = ROOT) -> int:
    """Write the fingerprints found on the pinned release into the files of edits; 1 where an edit conflicts."""
    pin = Pin.load(root)
    findings, collisions = releases.judge(fetch.fetch(pin), pin, root)
    found = {f.edit.id: f.fingerprint for f in findings if f.fingerprint}
    for path in edits.edit_files(root):
        if edits.record(path, found, root):
            print(f"recorded: {path.relative_to(root)}")
    conflicts = _conflicts(findings)
    return _report((conflicts, collisions)) if conflicts or collisions else 0


def rebase(version: str, write: bool, root: Path = ROOT) -> int:
    """Print how every edit fits release `version`, and move the pin there if asked to and nothing conflicts."""
    pin = Pin.load(root)
    with tempfile.TemporaryDirectory() as folder:
        upstream = releases.download(fetch.select(pin), version, Path(folder))
        findings, collisions = releases.judge(upstream, pin, root)
        status = _report((findings, collisions))
        if write and (_conflicts(findings) or collisions):
            raise ForkError(f"{PIN} stays at {pin.version}: there are conflicts")
        if write:
            releases.moved(pin, version, Path(folder)).save(root)
            print(f"{PIN} is at {version}." + (" Review the edits above, then run fork.py record." if status else ""))
    return status


def _conflicts(findings: list[review.Finding]) -> list[review.Finding]:
    return [finding for finding in findings if finding.status == review.CONFLICT]


def _report(judged: tuple[list[review.Finding], list[str]]) -> int:
    findings, collisions = judged
    rows = [(f.status, f.edit.id, f.edit.target, f.edit.scope or "(module)") for f in findings]
    rows += [(review.CONFLICT, "(own file)", name, "") for name in collisions]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for detail in dict.fromkeys(f.detail for f in findings if f.detail):
        print(f"- {detail}")
    for name in collisions:
        print(f"- upstream has a file of its own at {name}")
    counts = {status: sum(row[0] == status for row in rows) for status in (review.OK, review.REVIEW, review.CONFLICT)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts[review.REVIEW] or counts[review.CONFLICT] else 0
