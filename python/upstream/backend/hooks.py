"""The build hooks that pip and other front ends call (PEP 517 and 660)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from . import compose, editable, fetch, identity, metadata, sdist, wheel
from .pin import Pin


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return []


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return []


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings=None) -> str:
    """The name of the metadata folder written into `metadata_directory`. Raises ForkError."""
    return _metadata(Path(metadata_directory), editable=False)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings=None) -> str:
    """As for a wheel, with the version of an editable install."""
    return _metadata(Path(metadata_directory), editable=True)


def build_wheel(wheel_directory: str, config_settings=None, metadata_directory=None) -> str:
    """The name of the wheel written into `wheel_directory`. Raises ForkError where there can be none."""
    pin = Pin.load()
    return compose.build(pin, fetch.select(pin), Path(wheel_directory))


def build_editable(wheel_directory: str, config_settings=None, metadata_directory=None) -> str:
    """The name of the wheel in `wheel_directory` that points at a composed tree in build/. Raises ForkError."""
    pin = Pin.load()
    upstream = fetch.fetch(pin)
    name = compose.wheel_name(pin, identity.version(pin, editable=True), fetch.select(pin))
    with tempfile.TemporaryDirectory() as folder:
        editable.lay_out(pin, upstream, name.removesuffix(".whl").split("-", 2)[2], Path(folder))
        wheel.pack(Path(folder), Path(wheel_directory, name))
    return name


def build_sdist(sdist_directory: str, config_settings=None) -> str:
    """The name of the archive of this repository's files written into `sdist_directory`. Raises ForkError."""
    return sdist.write(Pin.load(), Path(sdist_directory))


def _metadata(folder: Path, *, editable: bool) -> str:
    pin = Pin.load()
    with tempfile.TemporaryDirectory() as tree:
        wheel.unpack(fetch.fetch(pin), Path(tree), only=f"sglang-{pin.version}.dist-info/")
        info = metadata.stamp(pin, identity.version(pin, editable=editable), Path(tree))
        # A RECORD belongs to a whole wheel.
        shutil.copytree(info, folder / info.name, ignore=shutil.ignore_patterns("RECORD"))
    return info.name
