"""What fork.py's verbs do. Each prints to standard output and returns an exit status."""

from __future__ import annotations

import difflib
import os
import tempfile
from pathlib import Path

from . import compose as composing
from . import edits, fetch, identity, own, premises, releases, report, review, uses, wheel
from .errors import ForkError
from .pin import PIN, ROOT, Pin
from .surface import Surface


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
                raise ForkError(next(f.detail for f in file.findings if f.status == review.CONFLICT))
            sides = [(Path(folder) / file.target).read_bytes(), file.data]
            lines = [[line.decode() for line in side.splitlines(keepends=True)] for side in sides]
            print("".join(difflib.unified_diff(*lines, f"a/{file.target}", f"b/{file.target}")), end="")
    print("\nOwn files:")
    for name in sorted(own.find(root)):
        print(f"  {name}")
    return 0


def check(root: Path = ROOT) -> int:
    """Print how edits and premises fit the pinned release; 1 where not everything is ok."""
    pin = Pin.load(root)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        wheel.unpack(fetch.fetch(pin), tree)
        standing = releases.judge(tree, uses.find(Surface(tree), root), pin, root)
    report.write(standing)
    return 0 if standing.settled else 1


def record(patterns: list[str], root: Path = ROOT) -> int:
    """Accept what is new in this repository and the reviews whose ids match `patterns`; 1 where something else is left."""
    pin = Pin.load(root)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        wheel.unpack(fetch.fetch(pin), tree)
        used = uses.find(Surface(tree), root)
        standing = releases.judge(tree, used, pin, root)
        reviews = [*(f.edit.id for f in standing.edits), *(p.name for p in standing.premises)]
        for pattern in patterns:
            if not any(premises.matches(name, [pattern]) for name in reviews):
                raise ForkError(f"no edit or premise is called {pattern}; fork.py check lists what needs review")
        found = {
            f.edit.id: f.fingerprint
            for f in standing.edits
            if f.fingerprint and (not f.edit.fingerprint or premises.matches(f.edit.id, patterns))
        }
        for path in edits.edit_files(root):
            if edits.record(path, found, root):
                print(f"recorded: {path.relative_to(root)}")
        accepted = premises.accept(standing.premises, premises.Record.load(root), patterns)
        accepted.save(used, root)
        standing = releases.judge(tree, used, pin, root)
        if standing.settled:
            accepted.release = pin.version
            accepted.save(used, root)
    report.write(standing)
    return 0 if standing.settled else 1


def newer_releases(root: Path = ROOT) -> int:
    """Print the releases above the pinned one that the index has."""
    pin = Pin.load(root)
    versions = releases.newer(pin)
    print(f"{PIN} is at {pin.version}; newer releases: {', '.join(versions) or 'none'}")
    if versions:
        print(f"Next: make rebase VERSION={versions[-1]}")
    return 0
