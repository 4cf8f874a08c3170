"""The fork's metadata, made from upstream's: its own version, both licences, and no address that is not the fork's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from .errors import ForkError
from .pin import ROOT, Pin

LICENCE_FILE = "LICENSE.kvtuner"
UPSTREAM_LICENCE = "Apache-2.0"
LICENCES = f"{UPSTREAM_LICENCE} AND MIT"

_FIELD = re.compile(rb"([^\s:]+): *([^\n]*\n(?:[ \t][^\n]*\n)*)")
# Where to get upstream, to read about it and to report its faults: none of it is true of the fork.
_ADDRESSES = ("home-page", "download-url", "project-url")
# Forms of declaring a licence that do not go with an expression.
_OLD_LICENCES = ("license", "license-expression")


def stamp(pin: Pin, version: str, tree: Path, root: Path = ROOT) -> Path:
    """Turn upstream's metadata folder in `tree` into the fork's: the metadata, the folder's name, our licence beside.

    Returns the folder. Raises ForkError where the metadata is not that of the pinned version.
    """
    old = tree / f"sglang-{pin.version}.dist-info"
    try:
        data = (old / "METADATA").read_bytes()
    except OSError:
        raise ForkError(f"the upstream wheel has no metadata of sglang {pin.version}") from None
    (old / "METADATA").write_bytes(rewrite(data, pin.version, version))
    (old / "licenses").mkdir(exist_ok=True)
    shutil.copyfile(root / "LICENSE", old / "licenses" / LICENCE_FILE)
    return old.rename(tree / f"sglang-{version}.dist-info")


def rewrite(data: bytes, upstream: str, version: str) -> bytes:
    """Upstream's METADATA as the fork's; the other fields and the description stay as they are.

    Raises ForkError where it is not of version `upstream` or declares licences in a way that this cannot follow.
    """
    head, blank, body = data.partition(b"\n\n")
    fields = [(name.decode().lower(), value.decode().rstrip("\n")) for name, value in _FIELD.findall(head + b"\n")]
    names = [value for name, value in fields if name == "version"]
    if names != [upstream]:
        raise ForkError(f"upstream's metadata is not of version {upstream} but of {', '.join(names) or 'none'}")
    form = next((value for name, value in fields if name == "metadata-version"), "none")
    if form not in ("2.4", "2.5"):
        raise ForkError(f"upstream's metadata has the form {form}; licences are declared as in 2.4 and 2.5")
    for name, value in fields:
        if name == "license-expression" and value != UPSTREAM_LICENCE:
            raise ForkError(f"upstream's licence is {value}, not {UPSTREAM_LICENCE}: see what the fork then is under")

    def changed(match: re.Match[bytes]) -> bytes:
        name, value = match[1].decode().lower(), match[2]
        if name == "version":
            return b"Version: " + version.encode() + b"\n"
        if name in _ADDRESSES + _OLD_LICENCES or (name == "classifier" and value.startswith(b"License ::")):
            return b""
        return match[0]

    head = _FIELD.sub(changed, head + b"\n")
    return head + f"License-Expression: {LICENCES}\nLicense-File: {LICENCE_FILE}".encode() + blank + body
