"""Other upstream releases: getting them unpinned, and judging this fork against them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import Version

from . import edits, fetch, own, premises, review, uses
from .errors import ForkError
from .pin import ROOT, Pin
from .surface import Surface

# pip takes a foreign platform literally, and the next release may be built against another C library.
_LIBC_MINORS = range(17, 46)


@dataclass(frozen=True)
class Standing:
    """How this fork fits a release: its edits, own files that are upstream's too, by installed path, and its premises."""

    edits: list[review.Finding]
    collisions: list[str]
    premises: list[premises.Judged]

    @property
    def conflicts(self) -> bool:
        judged = (*self.edits, *self.premises)
        return bool(self.collisions) or any(item.status == review.CONFLICT for item in judged)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to look at."""
        return not self.collisions and all(item.status == review.OK for item in (*self.edits, *self.premises))


def judge(tree: Path, used: dict[str, uses.Use], pin: Pin, root: Path = ROOT) -> Standing:
    """How this fork, which uses `used` of the pinned release, fits the release unpacked in `tree`."""
    findings = [f for file in review.by_file(tree, edits.load(root), pin.release) for f in file.findings]
    collisions = [name for name in sorted(own.find(root)) if (tree / name).exists()]
    return Standing(findings, collisions, premises.judge(used, premises.Record.load(root), Surface(tree)))


def newer(pin: Pin) -> list[str]:
    """The releases that pip's index has above the pinned one, oldest first. Raises ForkError where it has none at all."""
    command = [sys.executable, "-m", "pip", "index", "versions", "sglang", "--disable-pip-version-check", "--no-input"]
    result = subprocess.run(command, capture_output=True, text=True)
    listed = re.search(r"^Available versions: (.+)$", result.stdout, re.MULTILINE)
    if result.returncode or not listed:
        raise ForkError(f"pip lists no releases: {fetch.PipFailed(result.stderr).reason()}")
    versions = sorted(map(Version, listed[1].split(", ")))
    return [str(version) for version in versions if version > Version(pin.version)]


def download(like: str, version: str, folder: Path) -> Path:
    """Release `version`'s wheel for the Python and machine of the wheel name `like`, in a new folder in `folder`.

    Nothing is known of its hash. Raises ForkError where there is none.
    """
    (tag,) = parse_wheel_filename(like)[3]
    python = re.fullmatch(r"cp(\d)(\d+)", tag.interpreter)
    machine = re.fullmatch(r"manylinux_\d+_\d+_(\w+)", tag.platform)
    if not python or not machine:
        raise ForkError(f"{like}: only wheels for CPython on manylinux can be looked up")
    options = [f"--platform=manylinux_2_{minor}_{machine[1]}" for minor in _LIBC_MINORS]
    options.append(f"--python-version={python[1]}.{python[2]}")
    try:
        return fetch.pip_download(Path(tempfile.mkdtemp(dir=folder)), *options, f"sglang=={version}")
    except fetch.PipFailed as failure:
        raise ForkError(f"pip could not download a wheel like {like} of {version}: {failure.reason()}") from None


def moved(pin: Pin, version: str, folder: Path) -> Pin:
    """A pin of release `version`, with a wheel like each one now pinned; they are downloaded into `folder` and hashed.

    The fork's own count starts again at 1. Raises ForkError where a wheel is not to be had.
    """
    wheels = [download(name, version, folder) for name in sorted(pin.sha256)]
    local = f"{pin.local.partition('.')[0]}.1"
    return Pin(version, local, {path.name: fetch.digest(path) for path in wheels})
