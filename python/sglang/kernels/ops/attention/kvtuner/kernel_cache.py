"""The folder in which upstream's just-in-time compiler keeps built kernels: whose it is, and whether its builds are whole.

A library from the cache runs with all rights of the server, so the folder must be one that nobody else writes. The digest of
a build is kept beside it: a library that was cut short (which would end the process with SIGBUS) or replaced is built anew
instead of loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "SGLANG_JIT_CACHE_DIR"
_DIGEST_SUFFIX = ".sha256"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class KernelCacheRefused(ValueError):
    """The cache folder cannot be trusted; the message has the folder, its mode and owner, and what is valid."""


class DamagedBuild(RuntimeError):
    """A library in the cache is not what was built, and cannot be removed; the message names it."""


@contextmanager
def checked(root: Path, module_name: str) -> Iterator[None]:
    """Surrounds loading a module of the cache in ``root``.

    Before: the folder is made where there is none, builds that are not what they were are removed. After: digests of new
    builds are written. What is made meanwhile can be written by its owner alone. Raises KernelCacheRefused, DamagedBuild,
    OSError where the folder cannot be made.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_if_others_write(root)
    for library in _libraries(root, module_name):
        for path in reversed([library, *library.parents[: len(library.relative_to(root).parts) - 1]]):
            _refuse_if_others_write(path)
        if _digest_file(library).is_file() and _digest_file(library).read_text() == _digest(library):
            continue
        logger.warning("%s is not what was built there; it is built again", library)
        shutil.rmtree(library.parent, ignore_errors=True)
        if library.exists():
            raise DamagedBuild(f"{library} is not what was built there and cannot be removed: remove it")
    umask = os.umask(0o022)
    os.umask(umask | 0o022)  # not less than it was
    try:
        yield
    finally:
        os.umask(umask)
    for library in _libraries(root, module_name):
        _write_digest(library)


def _libraries(root: Path, module_name: str) -> list[Path]:
    return sorted(root.glob(f"*/{module_name}/build-*/deps-*/{module_name}.so"))


def _refuse_if_others_write(path: Path) -> None:
    status = path.stat()
    owner, mode = status.st_uid, stat.S_IMODE(status.st_mode)
    if owner in (os.geteuid(), 0) and not mode & _OTHERS_WRITE:
        return
    raise KernelCacheRefused(
        f"{path} of the kernel cache has mode {mode:04o} and belongs to user {owner}: who can write there could run code in the "
        f"server. Valid is a folder of user {os.geteuid()} or of root that group and others cannot write (chmod -R go-w); "
        f"{VARIABLE} names another one"
    )


def _digest_file(library: Path) -> Path:
    return library.with_name(library.name + _DIGEST_SUFFIX)


def _digest(library: Path) -> str:
    with library.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_digest(library: Path) -> None:
    """Once, and whole or not at all: processes that load one build together each come by here."""
    target = _digest_file(library)
    if target.exists():
        return
    part = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        part.write_text(_digest(library))
        part.replace(target)
    except OSError as e:  # a folder that is read alone, or a build that was removed meanwhile
        logger.debug("No digest of %s: %s", library, e)
