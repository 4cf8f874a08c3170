"""The source distribution: this repository's files, none of upstream's."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from pathlib import Path

from . import identity
from .errors import ForkError
from .pin import ROOT, Pin
from .wheel import FIRST_DAY

_FROM_UPSTREAM = ("Summary", "Description", "Requires-Python", "Requires-Dist", "Provides-Extra")
_OF_THE_WHOLE = ("License-Expression", "License-File")
_MADE = ("PKG-INFO", "build", "dist")


def write(pin: Pin, folder: Path, root: Path = ROOT) -> str:
    """Write the archive into `folder` and return its name. Raises ForkError where the files cannot be listed."""
    version = identity.version(pin, root)
    stem = f"sglang-{version}"
    about = f"Metadata-Version: 2.4\nName: sglang\nVersion: {version}\n"
    about += "".join(f"Dynamic: {field}\n" for field in _FROM_UPSTREAM + _OF_THE_WHOLE)
    moment = int(os.environ.get("SOURCE_DATE_EPOCH") or FIRST_DAY)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in _files(root):
            path = root / name
            _add(archive, f"{stem}/{name}", path.read_bytes(), moment, bool(path.stat().st_mode & 0o111))
        _add(archive, f"{stem}/PKG-INFO", about.encode(), moment)
    # tarfile's own gzip mode would write the current time into the head.
    (folder / f"{stem}.tar.gz").write_bytes(gzip.compress(plain.getvalue(), mtime=moment))
    return f"{stem}.tar.gz"


def _files(root: Path) -> list[str]:
    # Unpacked from such an archive there is no git, and nothing but its files.
    if not (root / ".git").exists() and (root / "PKG-INFO").exists():
        paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
        kept = [path for path in paths if path.parts[0] not in _MADE and "__pycache__" not in path.parts]
        return sorted(path.as_posix() for path in kept)
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ForkError(f"git cannot list the files of {root}: {error}") from None
    return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())


def _add(archive: tarfile.TarFile, name: str, data: bytes, moment: int, executable: bool = False) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    entry.mode = 0o755 if executable else 0o644
    entry.mtime = moment
    archive.addfile(entry, io.BytesIO(data))
