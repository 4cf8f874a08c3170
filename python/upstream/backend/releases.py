"""Other upstream releases: getting them unpinned, and judging this fork against them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import BinaryIO

from packaging.utils import parse_wheel_filename

from . import edits, fetch, own, review, wheel
from .errors import ForkError
from .pin import ROOT, Pin

# pip takes a foreign platform literally, and the next release may be built against another C library.
_LIBC_MINORS = range(17, 46)


def judge(upstream: Path | BinaryIO, pin: Pin, root: Path = ROOT) -> tuple[list[review.Finding], list[str]]:
    """How every edit fits the wheel `upstream`, and the own files that are in it too, by installed path."""
    with tempfile.TemporaryDirectory() as folder:
        wheel.unpack(upstream, Path(folder))
        files = review.by_file(Path(folder), edits.load(root), pin.release)
        collisions = [name for name in sorted(own.find(root)) if Path(folder, name).exists()]
    return [finding for file in files for finding in file.findings], collisions


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
