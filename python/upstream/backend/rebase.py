"""Trying the fork on another upstream release, and moving the pin there once it fits and starts."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from pathlib import Path

from . import compose as composing
from . import fetch, premises, releases, report, uses, wheel
from .errors import ForkError
from .pin import PIN, ROOT, Pin
from .surface import Surface

START = Path("python/upstream/start.py")
# Exit statuses of start.py.
STARTED, LACKING = 0, 3


def rebase(version: str, write: bool, python: str, root: Path = ROOT) -> int:
    """Print how the fork fits release `version`, with upstream's changes, and start it there with the interpreter `python`.

    With `write`, moves the pin there. Returns 0 where nothing is left to look at and the composed tree started. Raises
    ForkError where `write` is asked for and there is a conflict, or the tree did not start.
    """
    pin = Pin.load(root)
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder, "old"), Path(folder, "new")
        wheel.unpack(fetch.fetch(pin), old)
        used = uses.find(Surface(old), root)
        if version == pin.version:
            upstream, new = fetch.fetch(pin), old
        else:
            upstream = releases.download(fetch.select(pin), version, Path(folder))
            wheel.unpack(upstream, new)
        standing = releases.judge(new, used, pin, root)
        report.write(standing)
        report.write_differences(standing, old, new)
        if standing.conflicts:
            raise ForkError(f"{PIN} stays at {pin.version}: {version} has conflicts; nothing was started or changed")
        started = _start(
            dataclasses.replace(pin, version=version, sha256={}), upstream, Path(folder, "composed"), python, root
        )
        if write and not started:
            raise ForkError(f"{PIN} stays at {pin.version}: the composed tree was not seen to start on {version}")
        if write:
            releases.moved(pin, version, Path(folder)).save(root)
            if standing.settled:
                dataclasses.replace(premises.Record.load(root), release=version).save(used, root)
            left = "" if standing.settled else " Until fork.py record has every review above, nothing can be built."
            print(f"{PIN} is at {version}.{left}")
    return 0 if standing.settled and started else 1


def _start(pin: Pin, upstream: object, tree: Path, python: str, root: Path) -> bool:
    """Whether the tree composed from the wheel `upstream` starts; start.py prints what it did."""
    composing.compose(pin, upstream, tree, root=root, reviewed=False)
    print(f"\nStarting the tree composed on {pin.version} with {python}:", flush=True)
    status = subprocess.run([python, str(root / START), str(tree)], cwd=tree.parent).returncode
    if status == LACKING:
        print("Not started: nothing is claimed for this release. Give --python an environment that has what it lacks.")
    elif status != STARTED:
        print(f"It did not start: {START} ended with exit status {status}.")
    return status == STARTED
