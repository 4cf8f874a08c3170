"""Composing the fork's tree: upstream's files, the edits, the own files, the metadata."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import BinaryIO

from . import edits, own, premises, review, wheel
from .errors import ForkError
from .pin import ROOT, Pin


def compose(
    pin: Pin, upstream: BinaryIO, tree: Path, *, root: Path = ROOT, link: bool = False, reviewed: bool = True
) -> None:
    """Compose the fork in the empty folder `tree` from the wheel `upstream`; own files are linked with `link`.

    Raises ForkError where an edit cannot be applied, or upstream has an own file too; and, unless `reviewed` is False, which
    is for trying a release, where an edit needs review or the premises were not reviewed on this release.
    """
    if reviewed:
        premises.require_reviewed(pin, root)
    wheel.unpack(upstream, tree)
    for file in review.by_file(tree, edits.load(root), pin.fork_version):
        for finding in file.findings:
            if finding.status == review.CONFLICT or (reviewed and finding.status != review.OK):
                raise ForkError(finding.detail)
        (tree / file.target).write_bytes(file.data)
    own.add(own.find(root), tree, link=link)
    restamp(pin, tree, root)


def restamp(pin: Pin, tree: Path, root: Path = ROOT) -> Path:
    """Turn upstream's metadata folder in `tree` into the fork's: the version, the folder's name, our licence beside.

    Returns the folder. Raises ForkError where the metadata is not that of the pinned version.
    """
    old = tree / f"sglang-{pin.version}.dist-info"
    try:
        metadata = (old / "METADATA").read_bytes()
    except OSError:
        raise ForkError(f"the upstream wheel has no metadata of sglang {pin.version}") from None
    head, blank, body = metadata.partition(b"\n\n")
    line = re.compile(rb"^Version: %s$" % re.escape(pin.version.encode()), re.MULTILINE)
    head, count = line.subn(b"Version: " + pin.fork_version.encode(), head)
    if count != 1:
        raise ForkError(f"upstream's metadata names its version {count} times")
    (old / "METADATA").write_bytes(head + blank + body)
    (old / "licenses").mkdir(exist_ok=True)
    shutil.copyfile(root / "LICENSE", old / "licenses" / "LICENSE.kvtuner")
    return old.rename(tree / f"sglang-{pin.fork_version}.dist-info")


def wheel_name(pin: Pin, upstream: str) -> str:
    """The fork's file name for an upstream wheel: its tag with the fork's version."""
    tag = upstream.removeprefix(f"sglang-{pin.version}-")
    return f"sglang-{pin.fork_version}-{tag}"
