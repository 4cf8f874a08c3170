"""Unpacking and writing wheels, so that equal trees give equal bytes."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path
from typing import BinaryIO

# 1980-01-01, the first day that a zip file can name.
FIRST_DAY = 315532800


def unpack(wheel: Path | BinaryIO, folder: Path, only: str = "") -> None:
    """Unpack what begins with `only` into `folder`, with the executable bits that zipfile itself does not restore."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.filename.startswith(only) and not entry.is_dir():
                path = archive.extract(entry, folder)
                os.chmod(path, 0o755 if entry.external_attr >> 16 & 0o111 else 0o644)


def pack(tree: Path, wheel: Path) -> None:
    """Write the files under `tree` as `wheel`, the `.dist-info` folder last, with a new RECORD at the very end.

    File times are $SOURCE_DATE_EPOCH, or one fixed day without it; permissions are 644, or 755 for executables.
    """
    (info,) = tree.glob("*.dist-info")
    record = f"{info.name}/RECORD"
    names = [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()]
    names.sort(key=lambda name: (name.startswith(info.name + "/"), name))
    rows = []
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            if name != record:
                data = (tree / name).read_bytes()
                _add(archive, name, data, bool((tree / name).stat().st_mode & 0o111))
                rows.append((name, _digest(data), len(data)))
        _add(archive, record, _table([*rows, (record, "", "")]))


def _add(archive: zipfile.ZipFile, name: str, data: bytes, executable: bool = False) -> None:
    moment = max(int(os.environ.get("SOURCE_DATE_EPOCH") or FIRST_DAY), FIRST_DAY)
    entry = zipfile.ZipInfo(name, time.gmtime(moment)[:6])
    entry.create_system = 3  # Unix, wherever this runs: it is what gives the permissions their meaning
    entry.external_attr = (0o100755 if executable else 0o100644) << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, data)


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _table(rows: list[tuple]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
