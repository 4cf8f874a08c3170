"""Composing the fork's tree: upstream's files, the edits, the own files, the metadata."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import BinaryIO

from . import edits, fetch, identity, metadata, own, premises, review, wheel
from .errors import ForkError
from .pin import ROOT, Pin


def compose(
    pin: Pin, upstream: BinaryIO, tree: Path, *, root: Path = ROOT, link: bool = False, reviewed: bool = True
) -> None:
    """Compose the fork in the empty folder `tree` from the wheel `upstream`; own files are linked with `link`.

    Raises ForkError where an edit cannot be applied, or upstream has an own file too; and, unless `reviewed` is False, which
    is for trying a release, where an edit needs review or the premises were not reviewed on this release.
    """
    version = identity.version(pin, root, editable=link)
    if reviewed:
        premises.require_reviewed(pin, root)
    wheel.unpack(upstream, tree)
    for file in review.by_file(tree, edits.load(root), version):
        for finding in file.findings:
            if finding.status == review.CONFLICT or (reviewed and finding.status != review.OK):
                raise ForkError(finding.detail)
        (tree / file.target).write_bytes(file.data)
    own.add(own.find(root), tree, link=link)
    metadata.stamp(pin, version, tree, root)


def build(pin: Pin, upstream: str, folder: Path, root: Path = ROOT) -> str:
    """Write the wheel that the fork makes of the pinned wheel `upstream`; return its name. Raises ForkError."""
    name = wheel_name(pin, identity.version(pin, root), upstream)
    with tempfile.TemporaryDirectory() as tree:
        compose(pin, fetch.fetch(pin, upstream), Path(tree), root=root)
        wheel.pack(Path(tree), folder / name)
    return name


def wheel_name(pin: Pin, version: str, upstream: str) -> str:
    """The fork's file name for an upstream wheel: its tag with the fork's version."""
    tag = upstream.removeprefix(f"sglang-{pin.version}-")
    return f"sglang-{version}-{tag}"
